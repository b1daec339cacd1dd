//! Everything together: events in the order of a virtual clock.

use std::collections::BTreeMap;

use super::dispatcher::Dispatcher;
use super::faults::Fault;
use super::machine::Machine;
use super::oracle::Oracle;
use super::random::Random;
use crate::agent::action::{Action, DrainFor, Input, Purpose};
use crate::dispatcher::session::{Event as SessionEvent, SessionError};
use crate::geometry::Geometry;
use crate::store::StoreError;
use crate::store::simfiles::SimFiles;
use crate::tracker::{Gap, Tracker};
use crate::wire::Endpoint;
use crate::wire::frame::{decode_message, encode_data, encode_message};
use crate::wire::message::{DiskDown, DiskUp};

/// The wall clock at the beginning, in milliseconds since 1970.
const BEGIN_UNIX_MS: i64 = 1_795_000_000_000;

/// What happens at a moment.
pub(super) enum Event {
    /// The agent's thread does one thing.
    Step(u32),
    /// The agent's tick.
    Tick(u32),
    /// A program on the machine begins a write, lands it, completes it.
    Write,
    Land(u64),
    Complete(u64),
    /// The agent tries to connect.
    Connect(u32),
    /// A frame arrives at the dispatcher, or at the agent.
    Up(u64, Endpoint, Vec<u8>),
    Down(u64, Endpoint, Vec<u8>),
    /// The dispatcher notices that a connection is gone.
    Gone(u64),
    /// An order arrives at the agent: it comes on a connection of its own.
    Order,
    /// The dispatcher's thread looks round.
    Look(u8),
    /// Something breaks, or is mended.
    Fault(Fault),
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) now_ms: u64,
    pub(super) wall_offset_ms: i64,
    pub(super) machine: Machine,
    pub(super) dispatcher: Dispatcher,
    pub(super) files: SimFiles,
    pub(super) oracle: Oracle,
    /// Until when nothing crosses the network.
    pub(super) partition_until_ms: u64,
    /// Milliseconds between the program's writes, on average.
    pub(super) write_every_ms: u64,
    pub(super) is_faulty: bool,
    pub(super) trace: Option<Vec<String>>,
    queue: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    next_link: u64,
    /// When the last frame of each way of each connection arrives: frames do not overtake one another.
    ways: BTreeMap<(u64, bool, bool), u64>,
    is_stepping: bool,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let geometry = Geometry::new((random.between(1, 2) << 20) + 512 * random.between(1, 7), 12).unwrap();
        let files = SimFiles::default();
        let mut machine = Machine::new(geometry);
        // What is on the disk before anybody tracks it.
        for _ in 0..random.below(60) {
            machine.write_unseen(&mut random);
        }
        machine.tracker.raise(Gap::NewTracker);
        let mut world = Self {
            now_ms: 0,
            wall_offset_ms: 0,
            dispatcher: Dispatcher::new(&files, 0, 0),
            oracle: Oracle { allowed_blocks: geometry.blocks(), ..Oracle::default() },
            machine,
            files,
            partition_until_ms: 0,
            write_every_ms: 5 << random.below(8),
            is_faulty: true,
            trace: None,
            queue: BTreeMap::new(),
            next_event: 0,
            next_link: 1,
            ways: BTreeMap::new(),
            is_stepping: false,
            random,
        };
        world.after(0, Event::Connect(0));
        world.after(1, Event::Tick(0));
        world.after(1, Event::Write);
        world.after(1, Event::Look(0));
        world
    }

    pub(super) fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let (sent, allowed) = (self.oracle.sent_blocks, self.oracle.allowed_blocks);
            trace.push(format!("{:>7} {sent:>5}/{allowed:<5} {:.200}", self.now_ms, what()));
        }
    }

    pub(super) fn after(&mut self, delay_ms: u64, event: Event) {
        self.next_event += 1;
        self.queue.insert((self.now_ms + delay_ms, self.next_event), event);
    }

    fn wall_ms(&self) -> i64 {
        BEGIN_UNIX_MS + self.now_ms as i64 + self.wall_offset_ms
    }

    /// The next event happens.
    pub(super) fn step(&mut self) {
        let Some(((at, _), event)) = self.queue.pop_first() else { panic!("nothing happens any more") };
        self.now_ms = at;
        match event {
            Event::Step(life) => self.agent_step(life),
            Event::Tick(life) => self.tick(life),
            Event::Write => self.write(),
            Event::Land(write) => self.machine.land(write),
            Event::Complete(write) => {
                let blocks = self.machine.complete(write);
                self.oracle.allowed_blocks += blocks;
            }
            Event::Connect(life) => self.connect(life),
            Event::Up(link, endpoint, bytes) => self.up(link, endpoint, &bytes),
            Event::Down(link, endpoint, bytes) => self.down(link, endpoint, &bytes),
            Event::Gone(link) if self.dispatcher.link == Some(link) => self.dispatcher.detach(),
            Event::Gone(_) => {}
            Event::Order if self.machine.is_on => {
                self.machine.session.handle(Input::SyncOrdered);
                self.wake();
            }
            Event::Order => {}
            Event::Look(life) => self.look(life),
            Event::Fault(fault) => self.fault(fault),
        }
        self.mind_the_store();
    }

    fn write(&mut self) {
        let every = self.write_every_ms;
        let delay = self.random.between(0, 2 * every);
        self.after(delay.max(1), Event::Write);
        if self.machine.is_on && self.is_faulty {
            let write = self.machine.begin_write(&mut self.random);
            let lands = self.random.below(4);
            let completes = lands + self.random.below(6);
            self.after(lands, Event::Land(write));
            self.after(completes, Event::Complete(write));
        }
    }

    // The agent.

    /// The agent's thread has something to look at.
    pub(super) fn wake(&mut self) {
        if !std::mem::replace(&mut self.is_stepping, true) {
            let life = self.machine.life;
            self.after(0, Event::Step(life));
        }
    }

    fn tick(&mut self, life: u32) {
        if life == self.machine.life && self.machine.is_on {
            self.after(1000, Event::Tick(life));
            self.machine.session.handle(Input::Tick);
            self.wake();
        }
    }

    fn agent_step(&mut self, life: u32) {
        self.is_stepping = false;
        if life != self.machine.life || !self.machine.is_on {
            return self.wake_if_on();
        }
        if let Some(action) = self.machine.session.poll() {
            self.is_stepping = true;
            let takes = self.random.below(4);
            self.after(takes, Event::Step(life));
            self.act(action);
        }
    }

    fn wake_if_on(&mut self) {
        if self.machine.is_on {
            self.wake();
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(endpoint, message) => {
                if let DiskUp::Seal { id, consistency, .. } = &message {
                    self.oracle.sealed(*id, *consistency, &self.machine.photo);
                }
                self.note(|| format!("agent: {message:?}"));
                self.send_up(endpoint, encode_message(&message).unwrap());
            }
            Action::SendData { endpoint, area, seq, run } => {
                self.note(|| format!("agent: {area:?} {seq} {:?}", run.extent()));
                self.oracle.sent_blocks += run.extent().count;
                self.machine.unacked.push((endpoint, seq, run.extent().count));
                self.send_up(endpoint, encode_data(area, seq, &run));
            }
            Action::Drain(drain) => {
                let blocks = self.machine.tracker.drain().unwrap();
                if drain == DrainFor::Seal {
                    self.machine.take_unfrozen_photo();
                }
                let time_unix_ms = self.wall_ms() as u64;
                self.machine.session.handle(Input::Drained { drain, blocks, time_unix_ms });
            }
            Action::LoadPending => {
                let pending = self.machine.tracker.pending().unwrap();
                self.machine.session.handle(Input::Pending(pending));
            }
            Action::CheckClaim => {
                self.machine.tracker.claim().unwrap();
                self.machine.session.handle(Input::Doubts(self.machine.tracker.gap_count()));
            }
            Action::SyncFileSystems => {}
            Action::Locate(blocks) => {
                let text = format!("{} bad", blocks.len());
                self.machine.session.handle(Input::Located(blocks, text));
            }
            Action::Read(extent, purpose) => {
                // What was asked for when the pause came may still be read.
                let may = !self.machine.is_paused || matches!(purpose, Purpose::Differing(_));
                assert!(may, "read while paused");
                let result = self.machine.read(extent, &purpose);
                self.machine.session.handle(Input::Read { extent, purpose, result: Ok(result) });
            }
            Action::FinalPass { to_send, last } => {
                assert!(!self.machine.is_paused, "a freeze while paused");
                let wall_ms = self.wall_ms();
                let (written, outcome) = self.machine.final_pass(&mut self.random, wall_ms, &to_send, last);
                self.note(|| format!("agent: final pass {outcome:?}"));
                self.oracle.allowed_blocks += written;
                if outcome.is_err() {
                    self.reason_to_resend();
                }
                self.machine.session.handle(Input::FinalPass(outcome, self.machine.tracker.gap_count()));
            }
            Action::CommitTracker { id, keep, healed } => {
                self.note(|| {
                    format!("agent: {id} is committed, {} blocks stay, healed {healed:?}", keep.len())
                });
                self.machine.tracker.commit(id, &keep, healed).unwrap();
            }
            Action::DropLink { reason } => {
                self.note(|| format!("agent: connects again: {reason}"));
                self.cut();
            }
            Action::Stop { reason } => panic!("refused for good: {reason}"),
        }
    }

    // The network.

    fn delay(&mut self) -> u64 {
        let stall = self.partition_until_ms.saturating_sub(self.now_ms);
        stall
            + if self.random.once_in(50) {
                self.random.between(100, 3000)
            } else {
                self.random.between(1, 20)
            }
    }

    fn carry(&mut self, link: u64, is_up: bool, endpoint: Endpoint, event: Event) {
        let arrives = self.now_ms + self.delay();
        let way = self.ways.entry((link, is_up, endpoint == Endpoint::Live)).or_default();
        *way = arrives.max(*way);
        let delay = *way - self.now_ms;
        self.after(delay, event);
    }

    fn send_up(&mut self, endpoint: Endpoint, bytes: Vec<u8>) {
        if let Some(link) = self.machine.link {
            self.carry(link, true, endpoint, Event::Up(link, endpoint, bytes));
        }
    }

    fn send_down(&mut self, link: u64, endpoint: Endpoint, message: &DiskDown) {
        self.note(|| format!("dispatcher: {message:?}"));
        self.carry(link, false, endpoint, Event::Down(link, endpoint, encode_message(message).unwrap()));
    }

    fn connect(&mut self, life: u32) {
        if life != self.machine.life || !self.machine.is_on || self.machine.link.is_some() {
            return;
        }
        if self.now_ms < self.partition_until_ms || !self.dispatcher.is_up {
            let wait = self.random.between(300, 4000);
            return self.after(wait, Event::Connect(life));
        }
        let link = self.next_link;
        self.next_link += 1;
        self.note(|| format!("connection {link}"));
        // The dispatcher may still go by the one before: frames of that one may come behind this one's.
        self.dispatcher.detach();
        self.dispatcher.link = Some(link);
        self.machine.link = Some(link);
        let claim = self.machine.tracker.claim().unwrap();
        self.machine.session.handle(Input::LinkUp(claim, self.machine.tracker.gap_count()));
        self.wake();
    }

    /// The agent's connection breaks. What is under way may still arrive, and the dispatcher notices when it does.
    pub(super) fn cut(&mut self) {
        let Some(link) = self.machine.link.take() else { return };
        self.note(|| format!("connection {link} breaks"));
        self.oracle.allowed_blocks += self.machine.unacked.drain(..).map(|(.., blocks)| blocks).sum::<u64>();
        self.machine.session.handle(Input::LinkDown);
        let (seen, again) = (self.random.below(2000), self.random.between(1, 3000));
        if self.random.once_in(2) {
            // Nothing of it arrives.
            self.queue.retain(|_, event| !matches!(event, Event::Up(of, ..) if *of == link));
        }
        self.after(seen, Event::Gone(link));
        let life = self.machine.life;
        self.after(again, Event::Connect(life));
    }

    fn down(&mut self, link: u64, endpoint: Endpoint, bytes: &[u8]) {
        if self.machine.link != Some(link) {
            return;
        }
        let message = decode_message(bytes).unwrap();
        if let DiskDown::Ack { seq } = message {
            self.machine.unacked.retain(|(of, number, _)| *of != endpoint || *number > seq);
        }
        if let DiskDown::Committed { .. } = message {
            self.machine.unacked.clear();
        }
        self.machine.session.handle(Input::Message(endpoint, message));
        self.wake();
    }

    // The dispatcher.

    fn up(&mut self, link: u64, endpoint: Endpoint, bytes: &[u8]) {
        if self.dispatcher.link != Some(link) || !self.dispatcher.is_up {
            return;
        }
        let result = self.dispatcher.session.frame(endpoint, bytes);
        self.take(result);
    }

    fn look(&mut self, life: u8) {
        if life != self.dispatcher.life || !self.dispatcher.is_up {
            return;
        }
        if self.dispatcher.session.has_unacked() {
            let result = self.dispatcher.session.flush();
            self.take(result);
        }
        let now = self.dispatcher.elapsed(self.now_ms);
        let may = self.dispatcher.is_ready && !self.machine.is_paused;
        if may && self.dispatcher.schedule.take_due(now) {
            self.note(|| "dispatcher: orders a sync".to_owned());
            let delay = self.delay();
            self.after(delay, Event::Order);
        }
        self.after(40, Event::Look(life));
    }

    fn take(&mut self, result: Result<Vec<SessionEvent>, SessionError>) {
        match result {
            Ok(events) => events.into_iter().for_each(|event| self.event(event)),
            Err(
                error @ (SessionError::Full(_)
                | SessionError::Store(
                    StoreError::NoSpace { .. } | StoreError::Io { .. } | StoreError::Poisoned,
                )),
            ) => {
                self.note(|| format!("dispatcher: {error}"));
                if let Some(link) = self.dispatcher.link.filter(|_| !self.files.is_stopped()) {
                    self.send_down(link, Endpoint::Live, &error.to_message());
                }
                self.dispatcher.detach();
            }
            Err(error) => panic!("the dispatcher refuses: {error}"),
        }
    }

    fn event(&mut self, event: SessionEvent) {
        let now = self.dispatcher.elapsed(self.now_ms);
        match event {
            SessionEvent::Answer(endpoint, message) => {
                if let DiskDown::Attached { .. } = &message {
                    self.reason_to_resend();
                }
                if let Some(link) = self.dispatcher.link {
                    self.send_down(link, endpoint, &message);
                }
            }
            SessionEvent::Ready { .. } => self.dispatcher.is_ready = true,
            SessionEvent::Tight(_) => {}
            SessionEvent::SyncFailed { .. } => self.dispatcher.schedule.failed(now),
            SessionEvent::Committed(checkpoint) => {
                self.note(|| format!("dispatcher: {} is committed", checkpoint.id));
                self.dispatcher.schedule.committed(now);
                self.oracle.committed(&self.files, *checkpoint);
            }
        }
    }

    /// An agent that cannot know what the dispatcher has kept sends all that is pending.
    fn reason_to_resend(&mut self) {
        let pending = self.machine.tracker.pending().unwrap().len();
        self.oracle.allowed_blocks += pending;
    }

    /// A process that was stopped in the middle of something is dead.
    fn mind_the_store(&mut self) {
        if self.files.is_stopped() {
            self.fault(Fault::DispatcherDies);
        }
    }

    /// The newest checkpoint is consistent and of the disk as it is now.
    pub(super) fn has_arrived(&self) -> bool {
        self.machine.in_flight.is_empty() && self.oracle.has_arrived(&self.machine.disk)
    }
}
