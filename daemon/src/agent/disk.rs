//! The thread of one disk: asks [`DiskSession`] what to do and does it, one thing after the other. Tracker, disk and
//! freeze are only ever touched here.

mod anew;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::{error, info, warn};

use super::action::{Action, DrainFor, Input, Purpose, ReadResult};
use super::pace::Pace;
use super::read::read;
use super::session::DiskSession;
use super::shared::Shared;
use crate::bitmap::{BlockSet, Extent};
use crate::clock::unix_ms;
use crate::config::AgentConfig;
use crate::device::BlockDevice;
use crate::freeze::alone::Alone;
use crate::freeze::final_pass::{FinalPassJob, final_pass};
use crate::freeze::mountinfo::DeviceNumber;
use crate::freeze::{place, topology};
use crate::geometry::Geometry;
use crate::hash::{GroupDigest, group_digest};
use crate::ids::{CheckpointId, DiskId};
use crate::message_id::SECTORS_UNREADABLE;
use crate::reader::ahead::HashesAhead;
use crate::reader::{BlockReader, DirectReader, ReadError};
use crate::status::{CheckpointAdded, DiskState, SharedDisk};
use crate::tracker::{Tracker, TrackerError};
use crate::watchdog::{Pulse, SLOW_DISK_MAX};
use crate::wire::Endpoint;
use crate::wire::frame::{decode_message, encode_data, encode_message};
use crate::wire::message::DiskOffer;

/// Messages waiting for the disk.
pub const INBOX_MAX: usize = 64;
/// The tracker is drained and its changes are reported this often.
const TICK: Duration = Duration::from_secs(1);
/// How often it is looked whether another disk's freeze has ended.
const ALONE_POLL: Duration = Duration::from_millis(20);
/// The most that is read into memory while file systems are frozen.
pub const FREEZE_BUDGET_BYTES: u64 = 32 << 20;

/// What the thread is told.
pub enum Inbound {
    /// Both connections of an attachment are up.
    LinkUp {
        /// The attachment's number.
        number: u64,
        /// Frames for the snapshot connection.
        snapshot: mpsc::Sender<Vec<u8>>,
        /// Frames for the live connection.
        live: mpsc::Sender<Vec<u8>>,
    },
    /// A frame of one of them.
    Frame(u64, Endpoint, Vec<u8>),
    /// One of them is gone.
    LinkDown(u64),
    /// The dispatcher orders a checkpoint.
    Sync,
    /// The dispatcher orders a compare of the whole disk.
    Compare,
    /// End.
    Stop,
}

/// One tracked disk, with everything its thread needs.
pub struct Disk {
    /// Its stable id.
    pub id: DiskId,
    /// The path it was asked for by.
    pub path: PathBuf,
    /// The device.
    pub device: BlockDevice,
    /// Its size and block size.
    pub geometry: Geometry,
    /// What changed.
    pub tracker: Box<dyn Tracker>,
    /// Its blocks.
    pub reader: Box<dyn BlockReader>,
}

struct Link {
    number: u64,
    snapshot: mpsc::Sender<Vec<u8>>,
    live: mpsc::Sender<Vec<u8>>,
}

/// The thread's own things.
pub struct Worker {
    disk: Disk,
    shared: Arc<Shared>,
    shown: Arc<SharedDisk>,
    config: watch::Receiver<Arc<AgentConfig>>,
    guard_exe: PathBuf,
    session: DiskSession,
    paused: bool,
    /// It is refused, or could not be opened again: nothing can be done for it before it is attached.
    failed: bool,
    /// While the disk is compared.
    ahead: Option<HashesAhead>,
    last_error: Option<String>,
    pulse: Arc<Pulse>,
    inbox: mpsc::Receiver<Inbound>,
    runtime: Handle,
    link: Option<Link>,
    pace: Pace,
    offer: watch::Sender<DiskOffer>,
    refused: watch::Sender<bool>,
}

/// What is offered of a disk.
pub fn offer(disk: &Disk) -> DiskOffer {
    DiskOffer { disk: disk.id.clone(), device: disk.device.name.clone(), geometry: disk.geometry }
}

impl Worker {
    /// A disk's thread, not started yet. `offer` changes with the disk's size; `refused` is set while the dispatcher
    /// refuses the disk until a person has acted.
    pub fn new(
        disk: Disk,
        shared: Arc<Shared>,
        shown: Arc<SharedDisk>,
        guard_exe: PathBuf,
        inbox: mpsc::Receiver<Inbound>,
        offer: watch::Sender<DiskOffer>,
        refused: watch::Sender<bool>,
    ) -> Self {
        let session = DiskSession::new(disk.geometry, disk.device.name.clone(), FREEZE_BUDGET_BYTES);
        let config = shared.config.subscribe();
        let pace = Pace::new(config.borrow().read_rate_bytes);
        let pulse = shared.watchdog.pulse(&format!("the thread of {}", disk.device.name));
        Self {
            disk,
            shared,
            shown,
            config,
            guard_exe,
            session,
            paused: false,
            failed: false,
            ahead: None,
            last_error: None,
            pulse,
            inbox,
            runtime: Handle::current(),
            link: None,
            pace,
            offer,
            refused,
        }
    }

    /// Runs until it is told to stop.
    pub fn run(mut self) {
        let mut next_tick = Instant::now();
        loop {
            self.pulse.beat();
            if Instant::now() >= next_tick {
                self.tick();
                next_tick = Instant::now() + TICK;
            }
            self.pause_or_resume();
            let inbound = match self.session.poll() {
                Some(action) => {
                    if let Err(reason) = self.act(action) {
                        self.fail(reason);
                    }
                    self.inbox.try_recv().ok()
                }
                None => {
                    let wait = next_tick.saturating_duration_since(Instant::now());
                    let inbox = &mut self.inbox;
                    match self.runtime.block_on(async { timeout(wait, inbox.recv()).await }) {
                        Ok(None) => return,
                        Ok(inbound) => inbound,
                        Err(_) => None,
                    }
                }
            };
            match inbound {
                Some(Inbound::Stop) => return,
                Some(Inbound::Compare) => {
                    if let Err(error) = self.disk.tracker.order_compare() {
                        self.fail(lost(&error));
                    }
                    info!(AGENT = %self.shared.agent, DISK = %self.disk.id, "a compare is ordered: connecting again");
                    self.drop_link();
                }
                Some(inbound) => self.inbound(inbound),
                None => {}
            }
        }
    }

    fn tick(&mut self) {
        self.session.handle(Input::Tick);
        if !matches!(self.session.state(), DiskState::Copying | DiskState::Comparing) {
            self.ahead = None;
        }
        if self.config.has_changed().unwrap_or(false) {
            self.pace = Pace::new(self.config.borrow_and_update().read_rate_bytes);
        }
        self.show();
    }

    /// Looks at the flags themselves: an order must not wait behind messages.
    fn pause_or_resume(&mut self) {
        let paused = self.shown.pause.is_paused();
        if paused != self.paused {
            self.paused = paused;
            let what = if paused { "paused: changes are tracked, nothing is sent" } else { "resumed" };
            info!(AGENT = %self.shared.agent, DISK = %self.disk.id, "{} is {what}", self.disk.device.name);
            self.session.handle(Input::Paused(paused));
            self.show();
        }
    }

    /// Shows how the disk is doing.
    fn show(&mut self) {
        let state = self.session.state();
        self.failed &= state == DiskState::Detached;
        let mut status = self.shown.status();
        status.state = if self.failed { DiskState::Failed } else { state };
        status.progress = self.session.progress();
        status.dirty_bytes = self.session.changed_bytes();
        status.newest = self.session.newest().or(status.newest);
        status.last_error.clone_from(&self.last_error);
    }

    fn inbound(&mut self, inbound: Inbound) {
        match inbound {
            Inbound::LinkUp { number, snapshot, live } => {
                self.drop_link();
                self.refused.send_replace(false);
                match self.claim() {
                    Ok(claim) => {
                        self.link = Some(Link { number, snapshot, live });
                        self.session.handle(Input::LinkUp(claim, self.disk.tracker.gap_count()));
                    }
                    Err(reason) => self.fail(reason),
                }
            }
            Inbound::Frame(number, endpoint, bytes) if self.is_linked(number) => match decode_message(&bytes)
            {
                Ok(message) => self.session.handle(Input::Message(endpoint, message)),
                Err(error) => {
                    self.complain(&error.to_string());
                    self.drop_link();
                }
            },
            Inbound::LinkDown(number) if self.is_linked(number) => self.drop_link(),
            Inbound::Sync => self.session.handle(Input::SyncOrdered),
            Inbound::Frame(..) | Inbound::LinkDown(_) | Inbound::Compare | Inbound::Stop => {}
        }
    }

    fn is_linked(&self, number: u64) -> bool {
        self.link.as_ref().is_some_and(|link| link.number == number)
    }

    fn complain(&mut self, what: &str) {
        error!(AGENT = %self.shared.agent, DISK = %self.disk.id, "{what}");
        self.last_error = Some(what.to_owned());
    }

    fn drop_link(&mut self) {
        if self.link.take().is_some() {
            self.session.handle(Input::LinkDown);
            self.show();
        }
    }

    /// Carries an action out. The error is why nothing can be done for the disk for now.
    fn act(&mut self, action: Action) -> Result<(), String> {
        let lost = |error: TrackerError| lost(&error);
        match action {
            Action::Send(endpoint, message) => match encode_message(&message) {
                Ok(bytes) => self.send(endpoint, bytes),
                Err(error) => self.complain(&error.to_string()),
            },
            Action::SendData { endpoint, area, seq, run } => {
                self.send(endpoint, encode_data(area, seq, &run))
            }
            Action::Drain(drain) => {
                if drain == DrainFor::Scan {
                    // What was read ahead is from before it.
                    self.ahead = None;
                }
                let blocks = self.disk.tracker.drain().map_err(lost)?;
                self.session.handle(Input::Drained { drain, blocks, time_unix_ms: unix_ms() });
            }
            Action::LoadPending => {
                let pending = self.disk.tracker.pending().map_err(lost)?;
                self.session.handle(Input::Pending(pending));
            }
            Action::CheckClaim => {
                self.disk.tracker.claim().map_err(lost)?;
                self.session.handle(Input::Doubts(self.disk.tracker.gap_count()));
            }
            Action::SyncFileSystems => {
                self.pulse.allow(SLOW_DISK_MAX);
                self.sync_file_systems();
            }
            Action::Read(extent, purpose) => {
                let result = self.read(extent, &purpose);
                if let Err(reason) = &result {
                    self.complain(reason);
                }
                self.session.handle(Input::Read { extent, purpose, result });
            }
            Action::Locate(blocks) => self.locate(blocks),
            Action::FinalPass { to_send, last } => self.final_pass(&to_send, last),
            Action::CommitTracker { id, keep, healed } => {
                self.disk.tracker.commit(id, &keep, healed).map_err(lost)?;
                self.committed(id);
            }
            Action::DropLink { reason } => {
                // What keeps on coming, such as a full disk over there, is said once.
                if self.last_error.as_ref() != Some(&reason) {
                    warn!(AGENT = %self.shared.agent, DISK = %self.disk.id, "connecting again: {reason}");
                }
                self.last_error = Some(reason);
                self.drop_link();
            }
            Action::Stop { reason } => {
                self.refused.send_replace(true);
                return Err(reason);
            }
        }
        Ok(())
    }

    fn send(&mut self, endpoint: Endpoint, bytes: Vec<u8>) {
        let Some(link) = &self.link else { return };
        let out = if endpoint == Endpoint::Snapshot { &link.snapshot } else { &link.live };
        if out.blocking_send(bytes).is_err() {
            self.drop_link();
        }
    }

    fn sync_file_systems(&self) {
        // Only saves time: what is not written back now is written back by the freeze.
        let (major, minor) = (self.disk.device.major, self.disk.device.minor);
        let synced = topology::file_systems_on(major, minor).and_then(|on_disk| topology::sync_all(&on_disk));
        if let Err(error) = synced {
            warn!(AGENT = %self.shared.agent, DISK = %self.disk.id, "file systems could not be synced: {error}");
        }
    }

    fn read(&mut self, extent: Extent, purpose: &Purpose) -> Result<ReadResult, String> {
        let geometry = self.disk.geometry;
        self.pace.wait_for(geometry.range(extent.first, extent.count).1);
        if *purpose == Purpose::Digest
            && let Some(digest) = self.digest_ahead(extent)
        {
            return Ok(ReadResult::Digest(digest));
        }
        let (pulse, shared) = (&self.pulse, &self.shared);
        let mut go_on = || {
            pulse.allow(SLOW_DISK_MAX);
            !shared.stopping.load(Ordering::Relaxed)
        };
        read(self.disk.reader.as_mut(), extent, purpose, geometry, &mut go_on).map_err(|e| e.to_string())
    }

    /// A group's digest as a compare needs it; `None` if it is to be read here.
    fn digest_ahead(&mut self, extent: Extent) -> Option<GroupDigest> {
        let (path, geometry) = (&self.disk.device.path, self.disk.geometry);
        if self.ahead.is_none() {
            let reader = |_| Ok(Box::new(DirectReader::open(path, geometry)?) as Box<dyn BlockReader>);
            let readers: Result<_, ReadError> = (0..HashesAhead::readers()).map(reader).collect();
            self.ahead = HashesAhead::new(readers.ok()?, geometry).ok();
        }
        let hashes = self.ahead.as_mut()?.hashes(extent.first / geometry.group_blocks())?;
        Some(group_digest(&hashes))
    }

    /// Says which blocks cannot be read; said once, until they are others.
    fn locate(&mut self, blocks: BlockSet) {
        let (agent, disk, device) = (&self.shared.agent, &self.disk.id, &self.disk.device);
        let text = if blocks.is_empty() {
            info!(AGENT = %agent, DISK = %disk, "all sectors of {} can be read again", device.name);
            String::new()
        } else {
            let number = DeviceNumber { major: device.major, minor: device.minor };
            let text = place::describe(&device.name, number, self.disk.geometry, &blocks);
            warn!(
                MESSAGE_ID = SECTORS_UNREADABLE, AGENT = %agent, DISK = %disk,
                "{text}; they are tried again at every checkpoint"
            );
            text
        };
        self.session.handle(Input::Located(blocks, text));
    }

    /// Waits until no other disk of this agent is being frozen; not if this one is to be paused or to end.
    fn wait_for_others(&self) -> Option<Alone> {
        loop {
            if self.shown.pause.is_paused() || self.shared.stopping.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(alone) = Alone::try_take() {
                return Some(alone);
            }
            self.pulse.beat();
            std::thread::sleep(ALONE_POLL);
        }
    }

    fn committed(&mut self, id: CheckpointId) {
        let unreadable = self.session.unreadable_text();
        self.last_error = (!unreadable.is_empty()).then(|| unreadable.to_owned());
        self.show();
        let (agent, disk) = (self.shared.agent.clone(), self.disk.id.clone());
        info!(AGENT = %agent, DISK = %disk, CHECKPOINT = %id, "checkpoint {id} is committed");
        let _ = self.shared.checkpoints.send(CheckpointAdded { agent, disk, id });
    }

    fn final_pass(&mut self, to_send: &BlockSet, last: Option<CheckpointId>) {
        let config = self.config.borrow().clone();
        self.show();
        let Some(_alone) = self.wait_for_others() else {
            self.pause_or_resume();
            let gave_up = Err("the disk is paused, or the agent ends".to_owned());
            self.session.handle(Input::FinalPass(gave_up, self.disk.tracker.gap_count()));
            return;
        };
        // Every hook may take its time in each of three stages.
        let hooks = config.hooks_dir.iter().flat_map(std::fs::read_dir).flatten().count();
        let hooks = u32::try_from(hooks).unwrap_or(u32::MAX);
        self.pulse
            .allow(SLOW_DISK_MAX.saturating_add(config.hook_timeout.saturating_mul(3).saturating_mul(hooks)));
        let job = FinalPassJob {
            agent: config.id.clone(),
            device_path: self.disk.device.path.clone(),
            device: DeviceNumber { major: self.disk.device.major, minor: self.disk.device.minor },
            geometry: self.disk.geometry,
            hooks_dir: config.hooks_dir.clone(),
            hook_timeout: config.hook_timeout,
            freeze_timeout: config.freeze_timeout,
            budget_bytes: FREEZE_BUDGET_BYTES,
            last,
            state_dir: config.state_dir.clone(),
            guard_exe: self.guard_exe.clone(),
        };
        let outcome = final_pass(&job, self.disk.tracker.as_mut(), self.disk.reader.as_mut(), to_send);
        let outcome = outcome.map_err(|e| e.to_string());
        if let Err(reason) = &outcome {
            self.complain(reason);
        }
        self.session.handle(Input::FinalPass(outcome, self.disk.tracker.gap_count()));
    }
}

fn lost(error: &TrackerError) -> String {
    format!("the tracker is lost: {error}")
}
