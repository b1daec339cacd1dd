//! The thread of one disk: takes frames from its connections in order, lets [`DiskSession`] decide, and orders
//! syncs when they are due. The store is only ever touched here.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blxrep_dbus::problem::{Problem, ProblemKind};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::{debug, error, info, warn};

use super::registry::House;
use super::schedule::Schedule;
use super::session::{Admission, DiskSession, Event, SessionError};
use crate::checkpoint::{Checkpoint, Consistency};
use crate::clock::unix_ms;
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::message_id::{CHECKPOINT_FAILED, CHECKPOINT_FUZZY, DAMAGE_FOUND, NO_SPACE, SECTORS_UNREADABLE};
use crate::status::{CheckpointAdded, DiskState, Newest, SharedDisk};
use crate::store::StoreError;
use crate::store::catalogue::Action;
use crate::store::watched_files::WatchedFiles;
use crate::watchdog::Pulse;
use crate::wire::Endpoint;
use crate::wire::frame::encode_message;
use crate::wire::message::{ConfigDown, DiskDown};

/// Frames waiting for the store, of each disk.
const QUEUE_MAX_FRAMES: usize = 8;
/// What came last is made durable after this time even if little came.
const FLUSH_AFTER: Duration = Duration::from_millis(40);
const TICK: Duration = Duration::from_millis(500);

/// Who waits for a checkpoint; dropped if the connection breaks first.
pub type SyncReply = oneshot::Sender<Result<CheckpointId, Problem>>;

/// What the thread is told.
pub enum Input {
    /// A connection is up.
    LinkUp {
        /// The attachment's number.
        number: u64,
        /// Snapshot or live.
        endpoint: Endpoint,
        /// Frames for it.
        out: mpsc::Sender<Vec<u8>>,
        /// The agent's way for orders.
        orders: mpsc::Sender<ConfigDown>,
        /// The stored disk whose place this one has taken.
        replaces: Option<DiskId>,
    },
    /// A frame of a connection.
    Frame(u64, Endpoint, Vec<u8>),
    /// A connection is gone.
    LinkDown(u64),
    /// Take a checkpoint as soon as possible, and tell what became of it.
    SyncNow {
        /// Who waits.
        reply: SyncReply,
        /// Whether the whole disk is to be compared first.
        compare: bool,
    },
    /// It is not paused any more: a checkpoint is due.
    Resumed,
    /// Make everything durable and end.
    Stop,
}

/// A disk whose thread runs.
#[derive(Clone)]
pub struct DiskHandle {
    /// The thread's queue.
    pub queue: mpsc::Sender<Input>,
    thread: Arc<Mutex<Option<std::thread::JoinHandle<()>>>>,
}

impl DiskHandle {
    /// Starts the thread of a disk.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn spawn(shown: Arc<SharedDisk>, house: Arc<House>) -> std::io::Result<Self> {
        let (queue, inbox) = mpsc::channel(QUEUE_MAX_FRAMES);
        let (agent, disk) = (shown.agent.clone(), shown.id.clone());
        let every = house.sync_every.subscribe();
        let schedule = Schedule::new(*every.borrow());
        let pulse = house.watchdog.pulse(&format!("the thread of {agent}'s {disk}"));
        let files = Arc::new(WatchedFiles::new(house.files.clone(), pulse.clone()));
        let session = DiskSession::new(files, agent.clone(), disk.clone(), house.instance);
        let worker = Worker {
            pulse,
            agent,
            disk,
            session,
            inbox,
            runtime: Handle::current(),
            schedule,
            every,
            began: Instant::now(),
            link: None,
            early: None,
            ready: false,
            orders: None,
            replaces: None,
            waiting: Vec::new(),
            ordered: Vec::new(),
            comparing: Vec::new(),
            compared: false,
            unreadable_blocks: 0,
            shown,
            action: None,
            no_space: false,
            tight: false,
            catalogue_fails: false,
            house,
        };
        let name = format!("disk-{}", worker.disk);
        let thread = std::thread::Builder::new().name(name).spawn(move || worker.run())?;
        Ok(Self { queue, thread: Arc::new(Mutex::new(Some(thread))) })
    }

    /// Waits for the thread's end. Blocks: not for async threads.
    pub fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(_)) = thread.map(std::thread::JoinHandle::join) {
            error!("a disk's thread panicked");
        }
    }
}

struct Link {
    number: u64,
    snapshot: Option<mpsc::Sender<Vec<u8>>>,
    live: Option<mpsc::Sender<Vec<u8>>>,
}

struct Worker {
    agent: AgentId,
    disk: DiskId,
    session: DiskSession,
    inbox: mpsc::Receiver<Input>,
    runtime: Handle,
    schedule: Schedule,
    every: watch::Receiver<Duration>,
    began: Instant,
    link: Option<Link>,
    early: Option<Vec<u8>>,
    ready: bool,
    orders: Option<mpsc::Sender<ConfigDown>>,
    replaces: Option<DiskId>,
    /// Who waits for the next sync that is ordered, and for the one that was.
    waiting: Vec<SyncReply>,
    ordered: Vec<SyncReply>,
    /// Who waits for the checkpoint behind a compare, which the disk attaches anew for; and whether the compare is done.
    comparing: Vec<SyncReply>,
    compared: bool,
    /// How many blocks could not be read, as it was said last.
    unreadable_blocks: u32,
    shown: Arc<SharedDisk>,
    action: Option<Action>,
    /// It was said that there is no space.
    no_space: bool,
    /// It was said that the copy may not fit.
    tight: bool,
    /// It was said that the catalogue fails.
    catalogue_fails: bool,
    pulse: Arc<Pulse>,
    house: Arc<House>,
}

impl Worker {
    fn run(mut self) {
        self.show();
        loop {
            self.pulse.beat();
            let wait = if self.session.has_unacked() { FLUSH_AFTER } else { TICK };
            let inbox = &mut self.inbox;
            match self.runtime.block_on(async { timeout(wait, inbox.recv()).await }) {
                Ok(None | Some(Input::Stop)) => break,
                Ok(Some(input)) => self.input(input),
                Err(_) => self.idle(),
            }
            self.order_if_due();
            self.end_compares();
        }
        self.session.detach();
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::LinkUp { number, endpoint, out, orders, replaces } => {
                (self.orders, self.replaces) = (Some(orders), replaces);
                self.link_up(number, endpoint, out);
            }
            Input::Frame(number, endpoint, bytes) => self.frame(number, endpoint, &bytes),
            Input::LinkDown(number) if self.is_linked(number) => self.detach(None),
            Input::LinkDown(_) | Input::Stop => {}
            Input::SyncNow { reply, compare } => self.sync_now(reply, compare),
            Input::Resumed => self.schedule.hurry(),
        }
    }

    fn sync_now(&mut self, reply: SyncReply, compare: bool) {
        let agent = &self.agent;
        let device = self.shown.status().device.clone();
        let (kind, reason) = if self.shown.pause.is_paused() {
            (ProblemKind::Paused, format!("{agent}'s {device} is paused: resume it first"))
        } else if !self.session.is_attached() {
            (ProblemKind::NotConnected, format!("{agent}'s {device} is not connected: see 'blxctl status'"))
        } else if !self.ready {
            let reason = "is still being copied or compared; a checkpoint follows by itself";
            (ProblemKind::Busy, format!("{agent}'s {device} {reason}"))
        } else if !compare {
            self.waiting.push(reply);
            return self.schedule.hurry();
        } else if self.order(true) {
            self.compared = false;
            return self.comparing.push(reply);
        } else {
            (ProblemKind::NotConnected, format!("{agent}'s {device} takes no orders now: try again"))
        };
        let _ = reply.send(Err(Problem::new(kind, reason)));
    }

    /// Tells the agent to sync. It compares by attaching anew, with a gap.
    fn order(&self, compare: bool) -> bool {
        let order = ConfigDown::Sync { disk: self.disk.clone(), compare };
        self.orders.as_ref().is_some_and(|orders| orders.try_send(order).is_ok())
    }

    /// Who waits for a compare waits over new connections of the disk, but not over a pause or the session's end.
    fn end_compares(&mut self) {
        if self.comparing.is_empty() {
            return;
        }
        if self.shown.pause.is_paused() {
            for reply in self.comparing.drain(..) {
                let reason = format!("{}'s disk {} was paused: resume it first", self.agent, self.disk);
                let _ = reply.send(Err(Problem::new(ProblemKind::Paused, reason)));
            }
        } else if self.orders.as_ref().is_none_or(mpsc::Sender::is_closed) {
            self.comparing.clear();
        }
    }

    /// Those to whom the end of the ordered sync matters.
    fn take_answered(&mut self) -> Vec<SyncReply> {
        let mut answered = std::mem::take(&mut self.ordered);
        if std::mem::take(&mut self.compared) {
            answered.append(&mut self.comparing);
        }
        answered
    }

    fn is_linked(&self, number: u64) -> bool {
        self.link.as_ref().is_some_and(|link| link.number == number)
    }

    fn link_up(&mut self, number: u64, endpoint: Endpoint, out: mpsc::Sender<Vec<u8>>) {
        if !self.is_linked(number) {
            self.detach(None);
            self.link = Some(Link { number, snapshot: None, live: None });
        }
        let Some(link) = &mut self.link else { return };
        match endpoint {
            Endpoint::Snapshot => link.snapshot = Some(out),
            _ => link.live = Some(out),
        }
        if let Some(bytes) = self.early.take() {
            self.frame(number, Endpoint::Live, &bytes);
        }
    }

    fn frame(&mut self, number: u64, endpoint: Endpoint, bytes: &[u8]) {
        if !self.is_linked(number) {
            return;
        }
        if self.link.as_ref().is_some_and(|link| link.snapshot.is_none() || link.live.is_none()) {
            // The attach may overtake the other connection's arrival here; nothing else comes before its answer.
            self.early = Some(bytes.to_vec());
            return;
        }
        if !self.session.is_attached() {
            let accepted = self.house.accepted.contains(&self.agent, &self.disk);
            self.session.admit(Admission { replaces: self.replaces.clone(), accepted });
        }
        let result = self.session.frame(endpoint, bytes);
        self.take(result);
    }

    fn idle(&mut self) {
        if self.session.has_unacked() {
            let result = self.session.flush();
            self.take(result);
        }
        self.show();
        self.note_action();
        if self.every.has_changed().unwrap_or(false) {
            self.schedule.set_every(*self.every.borrow_and_update());
        }
    }

    fn take(&mut self, result: Result<Vec<Event>, SessionError>) {
        match result {
            Ok(events) => {
                self.say_space_again();
                events.into_iter().for_each(|event| self.event(event));
            }
            Err(error) => {
                let damage = matches!(&error, SessionError::Store(StoreError::Damaged(_)));
                if error.is_no_space() {
                    self.say_no_space(&error.to_string());
                } else if damage {
                    error!(MESSAGE_ID = DAMAGE_FOUND, AGENT = %self.agent, DISK = %self.disk, "{error}");
                } else {
                    error!(AGENT = %self.agent, DISK = %self.disk, "{error}");
                }
                self.answer(Endpoint::Live, &error.to_message());
                self.detach(Some(error.to_string()));
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Answer(endpoint, message) => self.answer(endpoint, &message),
            Event::Ready { scanned } => {
                self.ready = true;
                if scanned && !self.comparing.is_empty() {
                    self.compared = true;
                    self.schedule.hurry();
                }
            }
            Event::Tight(shortage) => self.say_tight(&format!("the copy may not fit: {shortage}")),
            Event::SyncFailed { reason, paused } => self.sync_failed(reason, paused),
            Event::Committed(checkpoint) => self.committed(&checkpoint),
        }
    }

    /// Says that there is too little space: in the journal once, until there is enough again.
    fn say_no_space(&mut self, what: &str) {
        if !std::mem::replace(&mut self.no_space, true) {
            warn!(MESSAGE_ID = NO_SPACE, AGENT = %self.agent, DISK = %self.disk, "{what}");
        }
        self.shown.status().last_error = Some(what.to_owned());
    }

    fn say_space_again(&mut self) {
        if self.no_space && !self.session.is_full() {
            self.no_space = false;
            info!(AGENT = %self.agent, DISK = %self.disk, "there is space again");
            self.shown.status().last_error = None;
        }
    }

    /// Says, once for a copy, that it may not fit.
    fn say_tight(&mut self, what: &str) {
        if !std::mem::replace(&mut self.tight, true) {
            warn!(MESSAGE_ID = NO_SPACE, AGENT = %self.agent, DISK = %self.disk, "{what}");
        }
        self.shown.status().last_error = Some(what.to_owned());
    }

    /// Whether a sync has to wait for room; who waits for a checkpoint hears it.
    fn waits_for_room(&mut self) -> bool {
        let error = match self.session.shortage() {
            Ok(None) => {
                self.say_space_again();
                return false;
            }
            Ok(Some(shortage)) => SessionError::Full(shortage),
            Err(error) => error.into(),
        };
        self.say_no_space(&error.to_string());
        let mut waiting = std::mem::take(&mut self.waiting);
        if std::mem::take(&mut self.compared) {
            waiting.append(&mut self.comparing);
        }
        for reply in waiting {
            let _ = reply.send(Err(Problem::new(ProblemKind::Failed, format!("no checkpoint: {error}"))));
        }
        true
    }

    fn sync_failed(&mut self, reason: String, paused: bool) {
        self.schedule.failed(self.began.elapsed());
        let kind = if paused { ProblemKind::Paused } else { ProblemKind::Failed };
        for reply in self.take_answered() {
            let _ = reply.send(Err(Problem::new(kind, format!("no checkpoint: {reason}"))));
        }
        if paused {
            return info!(AGENT = %self.agent, DISK = %self.disk, "no checkpoint: {reason}");
        }
        warn!(
            MESSAGE_ID = CHECKPOINT_FAILED, AGENT = %self.agent, DISK = %self.disk, "no checkpoint: {reason}"
        );
        self.shown.status().last_error = Some(reason);
        self.show();
    }

    fn committed(&mut self, checkpoint: &Checkpoint) {
        self.schedule.committed(self.began.elapsed());
        let lacks = self.lacks(checkpoint);
        self.shown.status().last_error = lacks;
        self.tight = false;
        let Checkpoint { id, consistency, note, .. } = checkpoint;
        let (agent, disk) = (&self.agent, &self.disk);
        let note = if note.is_empty() { String::new() } else { format!(": {note}") };
        if *consistency == Consistency::Fuzzy {
            warn!(
                MESSAGE_ID = CHECKPOINT_FUZZY, AGENT = %agent, DISK = %disk, CHECKPOINT = %id,
                "checkpoint {id} is fuzzy{note}"
            );
        } else {
            info!(AGENT = %agent, DISK = %disk, CHECKPOINT = %id, "checkpoint {id} ({consistency}){note}");
        }
        self.show();
        if let Err(error) = self.house.accepted.take(agent, disk) {
            warn!(AGENT = %agent, DISK = %disk, "that its change was accepted is not taken back: {error}");
        }
        let added = CheckpointAdded { agent: agent.clone(), disk: disk.clone(), id: *id };
        let _ = self.house.checkpoints.send(added);
        for reply in self.take_answered() {
            let _ = reply.send(Ok(*id));
        }
    }

    /// What a checkpoint lacks, said in the journal if that is news.
    fn lacks(&mut self, checkpoint: &Checkpoint) -> Option<String> {
        let Checkpoint { id, unreadable_blocks: blocks, note, .. } = checkpoint;
        let was = std::mem::replace(&mut self.unreadable_blocks, *blocks);
        let text = format!("checkpoint {id} has zeros for {blocks} blocks that could not be read: {note}");
        if *blocks > 0 && *blocks != was {
            warn!(
                MESSAGE_ID = SECTORS_UNREADABLE, AGENT = %self.agent, DISK = %self.disk, CHECKPOINT = %id,
                "{text}"
            );
        }
        (*blocks > 0).then_some(text)
    }

    fn answer(&mut self, endpoint: Endpoint, message: &DiskDown) {
        let Some(link) = &self.link else { return };
        let out = if endpoint == Endpoint::Snapshot { &link.snapshot } else { &link.live };
        match (out, encode_message(message)) {
            // A full queue waits for the agent; a dead connection ends the wait by dropping its receiver.
            (Some(out), Ok(bytes)) => drop(out.blocking_send(bytes)),
            (_, Err(error)) => {
                error!(AGENT = %self.agent, DISK = %self.disk, "an answer cannot be encoded: {error}")
            }
            (None, _) => {}
        }
    }

    fn detach(&mut self, error: Option<String>) {
        self.link = None;
        self.early = None;
        self.ready = false;
        self.session.detach();
        self.schedule.detached();
        // Who waited hears that it will not come.
        (self.waiting, self.ordered) = (Vec::new(), Vec::new());
        if error.is_some() {
            self.shown.status().last_error = error;
        }
        self.show();
    }

    fn order_if_due(&mut self) {
        if !self.ready || self.shown.pause.is_paused() {
            return;
        }
        let now = self.began.elapsed();
        if !self.schedule.is_due(now) || self.waits_for_room() || !self.schedule.take_due(now) {
            return;
        }
        let sent = self.order(false);
        debug!(AGENT = %self.agent, DISK = %self.disk, "a sync is ordered");
        self.ordered.append(&mut self.waiting);
        self.show();
        if !sent {
            self.ordered.clear();
            self.schedule.failed(self.began.elapsed());
        }
    }

    /// Keeps the progress of long work in the catalogue, once a tick.
    fn note_action(&mut self) {
        let state = self.shown.status().state;
        let kind = match state {
            DiskState::Copying => "copy",
            DiskState::Comparing => "compare",
            DiskState::Syncing => "sync",
            _ => return self.close_action(state),
        };
        if self.action.as_ref().is_none_or(|action| action.kind != kind) {
            self.close_action(DiskState::Idle);
        }
        let (done_bytes, total_bytes) = self.session.copy_progress().unwrap_or_default();
        let now = unix_ms();
        let started_unix_ms = self.action.as_ref().map_or(now, |action| action.started_unix_ms);
        let (kind, state) = (kind.to_owned(), "running".to_owned());
        self.put_action(Action {
            kind,
            state,
            done_bytes,
            total_bytes,
            started_unix_ms,
            updated_unix_ms: now,
        });
    }

    fn close_action(&mut self, state: DiskState) {
        if let Some(action) = self.action.take() {
            let interrupted = matches!(state, DiskState::Detached | DiskState::Paused);
            let state = if interrupted { "interrupted" } else { "done" }.to_owned();
            self.put_action(Action { state, updated_unix_ms: unix_ms(), ..action });
            self.action = None;
        }
    }

    fn put_action(&mut self, action: Action) {
        let put = self.house.catalogue.put_action(&self.agent, &self.disk, &action);
        let failed_before = std::mem::replace(&mut self.catalogue_fails, put.is_err());
        if let (Err(error), false) = (put, failed_before) {
            warn!(AGENT = %self.agent, DISK = %self.disk, "{error}");
        }
        self.action = Some(action);
    }

    /// Shows how the disk is doing.
    fn show(&self) {
        let copied = self.session.copy_progress().map(|(done, total)| done as f64 / total.max(1) as f64);
        let mut status = self.shown.status();
        status.state = match (self.session.is_attached(), self.ready, copied) {
            (false, ..) => DiskState::Detached,
            // A checkpoint that is sealed is still committed.
            (true, true, _) if self.schedule.is_ordered() => DiskState::Syncing,
            _ if self.shown.pause.is_paused() => DiskState::Paused,
            (true, false, Some(_)) => DiskState::Copying,
            (true, false, None) => DiskState::Comparing,
            (true, true, _) => DiskState::Idle,
        };
        status.size_bytes = self.session.size_bytes().unwrap_or(status.size_bytes);
        let scanning = !self.ready && self.session.is_attached();
        status.progress =
            if scanning { copied.unwrap_or_else(|| self.session.compare_progress()) } else { 0.0 };
        status.dirty_bytes = self.session.changed_bytes().unwrap_or(status.dirty_bytes);
        status.newest = self.session.newest().map(Newest::from).or(status.newest);
        status.sync_every = Some(*self.every.borrow());
    }
}
