//! The thread of one disk: takes frames from its connections in order, lets [`DiskSession`] decide, and orders
//! syncs when they are due. The store is only ever touched here.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, error, info, warn};

use super::schedule::Schedule;
use super::session::{DiskSession, Event, SessionError};
use super::status::{DiskState, DiskStatus};
use crate::checkpoint::Consistency;
use crate::clock::unix_ms;
use crate::ids::{AgentId, DiskId};
use crate::store::catalogue::{Action, Catalogue};
use crate::wire::Endpoint;
use crate::wire::frame::encode_message;
use crate::wire::message::{ConfigDown, DiskDown};

/// Frames waiting for the store, of each disk.
const QUEUE_MAX_FRAMES: usize = 8;
/// What came last is made durable after this time even if little came.
const FLUSH_AFTER: Duration = Duration::from_millis(40);
const TICK: Duration = Duration::from_millis(500);

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
    },
    /// A frame of a connection.
    Frame(u64, Endpoint, Vec<u8>),
    /// A connection is gone.
    LinkDown(u64),
    /// Take a checkpoint as soon as possible.
    SyncNow,
    /// Make everything durable and end.
    Stop,
}

/// A disk whose thread runs.
#[derive(Clone)]
pub struct DiskHandle {
    /// The thread's queue.
    pub queue: mpsc::Sender<Input>,
    status: Arc<Mutex<DiskStatus>>,
    thread: Arc<Mutex<Option<std::thread::JoinHandle<()>>>>,
}

impl DiskHandle {
    /// Starts the thread of a disk.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn spawn(
        session: DiskSession,
        status: DiskStatus,
        every: Duration,
        catalogue: Arc<Catalogue>,
    ) -> std::io::Result<Self> {
        let (queue, inbox) = mpsc::channel(QUEUE_MAX_FRAMES);
        let (agent, disk) = (status.agent.clone(), status.disk.clone());
        let status = Arc::new(Mutex::new(status));
        let worker = Worker {
            agent,
            disk,
            session,
            inbox,
            runtime: Handle::current(),
            schedule: Schedule::new(every),
            began: Instant::now(),
            link: None,
            early: None,
            ready: false,
            orders: None,
            status: status.clone(),
            action: None,
            catalogue,
        };
        let name = format!("disk-{}", worker.disk);
        let thread = std::thread::Builder::new().name(name).spawn(move || worker.run())?;
        Ok(Self { queue, status, thread: Arc::new(Mutex::new(Some(thread))) })
    }

    /// How the disk is doing.
    pub fn status(&self) -> DiskStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
    began: Instant,
    link: Option<Link>,
    early: Option<Vec<u8>>,
    ready: bool,
    orders: Option<mpsc::Sender<ConfigDown>>,
    status: Arc<Mutex<DiskStatus>>,
    action: Option<Action>,
    catalogue: Arc<Catalogue>,
}

impl Worker {
    fn run(mut self) {
        loop {
            let wait = if self.session.has_unacked() { FLUSH_AFTER } else { TICK };
            let inbox = &mut self.inbox;
            match self.runtime.block_on(async { timeout(wait, inbox.recv()).await }) {
                Ok(None | Some(Input::Stop)) => break,
                Ok(Some(input)) => self.input(input),
                Err(_) => self.idle(),
            }
            self.order_if_due();
        }
        self.session.detach();
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::LinkUp { number, endpoint, out, orders } => {
                self.orders = Some(orders);
                self.link_up(number, endpoint, out);
            }
            Input::Frame(number, endpoint, bytes) => self.frame(number, endpoint, &bytes),
            Input::LinkDown(number) if self.is_linked(number) => self.detach(None),
            Input::LinkDown(_) | Input::Stop => {}
            Input::SyncNow => self.schedule.hurry(),
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
        let result = self.session.frame(endpoint, bytes);
        self.take(result);
    }

    fn idle(&mut self) {
        if self.session.has_unacked() {
            let result = self.session.flush();
            self.take(result);
        }
        self.update_status(|_| {});
        self.note_action();
    }

    fn take(&mut self, result: Result<Vec<Event>, SessionError>) {
        match result {
            Ok(events) => events.into_iter().for_each(|event| self.event(event)),
            Err(error) => {
                error!(AGENT = %self.agent, DISK = %self.disk, "{error}");
                self.answer(Endpoint::Live, &error.to_message());
                self.detach(Some(error.to_string()));
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Answer(endpoint, message) => self.answer(endpoint, &message),
            Event::Ready => self.ready = true,
            Event::SyncFailed(reason) => {
                warn!(AGENT = %self.agent, DISK = %self.disk, "no checkpoint: {reason}");
                self.schedule.failed(self.began.elapsed());
                self.update_status(|status| status.last_error = Some(reason));
            }
            Event::Committed(checkpoint) => {
                self.schedule.committed(self.began.elapsed());
                let (id, class) = (checkpoint.id, checkpoint.consistency);
                let note =
                    if checkpoint.note.is_empty() { String::new() } else { format!(": {}", checkpoint.note) };
                if class == Consistency::Fuzzy {
                    warn!(AGENT = %self.agent, DISK = %self.disk, CHECKPOINT = %id, "checkpoint {id} is fuzzy{note}");
                } else {
                    info!(AGENT = %self.agent, DISK = %self.disk, CHECKPOINT = %id, "checkpoint {id} ({class}){note}");
                }
                self.update_status(|status| status.last_error = None);
            }
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
        self.update_status(|status| status.last_error = error.or(status.last_error.take()));
    }

    fn order_if_due(&mut self) {
        if !self.ready || !self.schedule.take_due(self.began.elapsed()) {
            return;
        }
        let order = ConfigDown::Sync { disk: self.disk.clone() };
        let sent = self.orders.as_ref().is_some_and(|orders| orders.try_send(order).is_ok());
        debug!(AGENT = %self.agent, DISK = %self.disk, "a sync is ordered");
        if !sent {
            self.schedule.failed(self.began.elapsed());
        }
    }

    /// Keeps the progress of long work in the catalogue, once a tick.
    fn note_action(&mut self) {
        let state = self.status.lock().unwrap_or_else(PoisonError::into_inner).state;
        let (kind, done_bytes, total_bytes) = match state {
            DiskState::Copying { done_bytes, total_bytes } => ("copy", done_bytes, total_bytes),
            DiskState::Comparing => ("compare", 0, 0),
            DiskState::Syncing => ("sync", 0, 0),
            DiskState::Idle | DiskState::Detached => return self.close_action(state),
        };
        if self.action.as_ref().is_none_or(|action| action.kind != kind) {
            self.close_action(DiskState::Idle);
        }
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
            let state = if state == DiskState::Detached { "interrupted" } else { "done" }.to_owned();
            self.put_action(Action { state, updated_unix_ms: unix_ms(), ..action });
            self.action = None;
        }
    }

    fn put_action(&mut self, action: Action) {
        if let Err(error) = self.catalogue.put_action(&self.agent, &self.disk, &action) {
            warn!(AGENT = %self.agent, DISK = %self.disk, "{error}");
        }
        self.action = Some(action);
    }

    fn update_status(&self, change: impl FnOnce(&mut DiskStatus)) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.state = match (self.session.is_attached(), self.ready, self.session.copy_progress()) {
            (false, _, _) => DiskState::Detached,
            (true, false, Some((done_bytes, total_bytes))) => DiskState::Copying { done_bytes, total_bytes },
            (true, false, None) => DiskState::Comparing,
            (true, true, _) if self.schedule.is_ordered() => DiskState::Syncing,
            (true, true, _) => DiskState::Idle,
        };
        status.newest = self.session.newest().cloned().or(status.newest.take());
        change(&mut status);
    }
}
