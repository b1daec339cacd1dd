//! The thread of one disk: takes frames from its connections in order, lets [`DiskSession`] decide, and orders
//! syncs when they are due. The store is only ever touched here.

mod orders;
mod report;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blxrep_dbus::problem::Problem;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::error;

use super::registry::House;
use super::schedule::Schedule;
use super::session::{Admission, DiskSession, Event, SessionError};
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::message_id::DAMAGE_FOUND;
use crate::status::SharedDisk;
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
}
