//! One disk on the dispatcher: what an agent's message does to the store, and what is answered.
//!
//! No sockets and no clocks: bytes in, answers out, and the store's files through [`crate::store::files::Files`].
//! Acknowledged means durable: nothing is acknowledged before [`DiskStore::sync`] or [`DiskStore::commit`] has
//! returned.

mod attach;
mod message;

pub(super) use attach::check_device_name;

use std::sync::Arc;

use tracing::warn;

use super::room::{self, Shortage};
use crate::checkpoint::Checkpoint;
use crate::geometry::Geometry;
use crate::ids::{AgentId, DiskId, Epoch};
use crate::run::Run;
use crate::store::StoreError;
use crate::store::disk_store::DiskStore;
use crate::store::files::Files;
use crate::store::handle::Dir;
use crate::tracker::Gap;
use crate::wire::Endpoint;
use crate::wire::frame::{Area, Frame, FrameError, decode, decode_message};
use crate::wire::message::{DiskDown, DiskUp, clean_text};

/// The most bytes an agent may send ahead of acknowledgements.
const WINDOW_BYTES: u32 = 48 << 20;
/// Data is made durable and acknowledged at least this often.
const SYNC_EVERY_BYTES: u64 = 12 << 20;

/// Why the dispatcher does not go on with a disk's connection.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The agent broke the protocol.
    #[error("{0}")]
    Protocol(String),
    /// The bytes are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The disk is refused until a person has acted.
    #[error("{0}")]
    Lasting(String),
    /// There is no room for what the agent wants to send; it is to come again.
    #[error("no space: {0}")]
    Full(Shortage),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl SessionError {
    /// The last message of the connection.
    pub fn to_message(&self) -> DiskDown {
        let reason = match self {
            // Without numbers, which differ every time: the agent says a new reason once.
            Self::Full(_) => {
                "the dispatcher has no space left; changes are tracked, it goes on by itself".into()
            }
            _ => clean_text(self.to_string()),
        };
        DiskDown::Refused { reason, lasting: matches!(self, Self::Lasting(_)) }
    }

    /// Whether it is for lack of room.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Full(_) | Self::Store(StoreError::NoSpace { .. }))
    }
}

/// What a frame led to, besides answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Send this to the agent.
    Answer(Endpoint, DiskDown),
    /// The disk is attached and nothing must be scanned before syncs.
    Ready {
        /// A copy or compare has just ended.
        scanned: bool,
    },
    /// The copy that begins may not fit.
    Tight(Shortage),
    /// A checkpoint was committed.
    Committed(Box<Checkpoint>),
    /// An ordered sync failed.
    SyncFailed {
        /// Why.
        reason: String,
        /// Because the disk is paused: nothing is wrong.
        paused: bool,
    },
}

/// What is to be known of a disk before it attaches.
#[derive(Debug, Clone, Default)]
pub struct Admission {
    /// The stored disk whose place it has taken.
    pub replaces: Option<DiskId>,
    /// Whether a person has accepted that it was replaced, or shrank.
    pub accepted: bool,
}

struct Attachment {
    geometry: Geometry,
    device: String,
    epoch: Epoch,
    /// Why the disk is compared, for the journal of changes and in words.
    gap: Option<(Gap, String)>,
    scanning: bool,
    /// Groups read in a copy or compare.
    scanned_groups: u64,
    /// Highest sequence number received, and acknowledged, on snapshot and live.
    received: [u64; 2],
    acked: [u64; 2],
}

/// One disk of one agent. See the module.
pub struct DiskSession {
    files: Arc<dyn Files>,
    agent: AgentId,
    disk: DiskId,
    instance: Epoch,
    store: Option<DiskStore>,
    admission: Admission,
    attachment: Option<Attachment>,
    comparing: Option<Epoch>,
    /// The last seal was refused: the agent is to send everything pending again.
    distrust: bool,
    /// The store was opened before, or it was tried.
    was_opened: bool,
    /// Data waits for room.
    full: bool,
}

fn slot(endpoint: Endpoint) -> usize {
    usize::from(endpoint == Endpoint::Live)
}

impl DiskSession {
    /// A disk; its files are opened when it is first needed.
    pub fn new(files: Arc<dyn Files>, agent: AgentId, disk: DiskId, instance: Epoch) -> Self {
        Self {
            files,
            agent,
            disk,
            instance,
            store: None,
            admission: Admission::default(),
            attachment: None,
            comparing: None,
            distrust: false,
            was_opened: false,
            full: false,
        }
    }

    /// The newest checkpoint, as far as the store is open.
    pub fn newest(&self) -> Option<&Checkpoint> {
        self.store.as_ref().and_then(DiskStore::newest)
    }

    /// Whether the agent is attached.
    pub fn is_attached(&self) -> bool {
        self.attachment.is_some()
    }

    /// Takes in what is to be known of the disk before it attaches.
    pub fn admit(&mut self, admission: Admission) {
        self.admission = admission;
    }

    /// The size of the disk that is attached.
    pub fn size_bytes(&self) -> Option<u64> {
        self.attachment.as_ref().map(|attachment| attachment.geometry.size_bytes())
    }

    /// Bytes copied and bytes of the disk, while the full copy is under way.
    pub fn copy_progress(&self) -> Option<(u64, u64)> {
        let copy = self.store.as_ref()?.copy()?;
        let total = copy.geometry.size_bytes();
        Some(((copy.groups_present << crate::geometry::GROUP_SHIFT).min(total), total))
    }

    /// How far a compare is, from 0 to 1.
    pub fn compare_progress(&self) -> f64 {
        self.attachment.as_ref().map_or(0.0, |a| a.scanned_groups as f64 / a.geometry.groups().max(1) as f64)
    }

    /// Bytes reported changed since the newest checkpoint; all of the disk if there is none.
    pub fn changed_bytes(&self) -> Option<u64> {
        let store = self.store.as_ref()?;
        let geometry = store.geometry()?;
        Some(match store.newest() {
            Some(_) => store.changed_blocks() << geometry.block_shift(),
            None => geometry.size_bytes(),
        })
    }

    /// What a checkpoint now would have to store at most.
    fn needed_bytes(&self) -> u64 {
        let Some(store) = &self.store else { return 0 };
        let shift = store.geometry().map_or(0, Geometry::block_shift);
        let copy = self.copy_progress().map_or(0, |(done, total)| total.saturating_sub(done));
        copy.saturating_add(store.exposed_blocks() << shift)
    }

    /// Whether data must wait for room, and for how much. Looks at the file system.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn shortage(&mut self) -> Result<Option<Shortage>, StoreError> {
        self.shortage_for(0)
    }

    /// Whether data waited for room when that was looked at last.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// As [`Self::shortage`], where `more` is needed besides.
    fn shortage_for(&mut self, more: u64) -> Result<Option<Shortage>, StoreError> {
        let space = Dir::new(self.files.clone()).space()?;
        if !self.full && !room::data_waits(space, 0, false) {
            return Ok(None);
        }
        let needed = self.needed_bytes().saturating_add(more);
        self.full = room::data_waits(space, needed, self.full);
        Ok(self.full.then(|| Shortage::new(space, needed)))
    }

    /// Fails if data must wait.
    fn need_room(&mut self, more: u64) -> Result<(), SessionError> {
        self.shortage_for(more)?.map_or(Ok(()), |shortage| Err(SessionError::Full(shortage)))
    }

    /// Fails if not even a journal may grow.
    fn need_reserve(&mut self) -> Result<(), SessionError> {
        let space = Dir::new(self.files.clone()).space()?;
        if !room::all_waits(space) {
            return Ok(());
        }
        self.full = true;
        Err(SessionError::Full(Shortage::new(space, self.needed_bytes())))
    }

    /// The connection is gone. What it had sent is made durable, so that it need not be sent again.
    pub fn detach(&mut self) {
        self.attachment = None;
        if let Some(Err(error)) = self.store.as_mut().map(DiskStore::sync) {
            warn!(AGENT = %self.agent, DISK = %self.disk, "what was received last is not durable: {error}");
            self.store = None;
        }
    }

    /// Takes in one frame. After an error the connection is closed and [`Self::detach`] called.
    ///
    /// # Errors
    /// When the frame breaks the protocol or the store fails. Nothing is lost: the agent keeps what is not acknowledged.
    pub fn frame(&mut self, endpoint: Endpoint, bytes: &[u8]) -> Result<Vec<Event>, SessionError> {
        let events = match &self.attachment {
            None => self.first_frame(endpoint, bytes),
            Some(attachment) => match decode::<DiskUp>(bytes, attachment.geometry)? {
                Frame::Data { area, seq, run } => self.data(endpoint, area, seq, &run),
                Frame::Message(message) => self.message(endpoint, message),
            },
        };
        self.full |= events.as_ref().is_err_and(SessionError::is_no_space);
        if matches!(events, Err(SessionError::Store(_))) {
            // Its memory may no longer be what the files hold: recover from them at the next attach.
            self.store = None;
        }
        events
    }

    fn first_frame(&mut self, endpoint: Endpoint, bytes: &[u8]) -> Result<Vec<Event>, SessionError> {
        match (endpoint, decode_message(bytes)?) {
            (Endpoint::Live, DiskUp::Attach { device, geometry, claim }) => {
                self.attach(device, geometry, claim)
            }
            _ => Err(SessionError::Protocol("the first message must be an attach".to_owned())),
        }
    }

    fn store(&mut self) -> Result<&mut DiskStore, SessionError> {
        if self.store.is_none() {
            self.comparing = None;
            // It is opened again only after an error: what was acknowledged may have been taken back.
            self.distrust |= std::mem::replace(&mut self.was_opened, true);
            let store = DiskStore::open(self.files.clone(), self.agent.clone(), self.disk.clone());
            self.store = Some(store?);
        }
        self.store.as_mut().ok_or_else(not_attached)
    }

    fn data(
        &mut self,
        endpoint: Endpoint,
        area: Area,
        seq: u64,
        run: &Run,
    ) -> Result<Vec<Event>, SessionError> {
        let attachment = self.attachment.as_ref().ok_or_else(not_attached)?;
        let received = attachment.received.get(slot(endpoint)).ok_or_else(not_attached)?;
        if seq <= *received {
            return Err(SessionError::Protocol(format!("data number {seq} came behind number {received}")));
        }
        self.need_room(0)?;
        let store = self.store.as_mut().ok_or_else(not_attached)?;
        match area {
            Area::Base => store.put_base(run)?,
            Area::Delta => store.put_delta(seq, run)?,
        }
        if let Some(received) = self.attachment.as_mut().and_then(|a| a.received.get_mut(slot(endpoint))) {
            *received = seq;
        }
        if store.unsynced_bytes() >= SYNC_EVERY_BYTES { self.flush() } else { Ok(Vec::new()) }
    }

    /// Whether something was received that is not durable or not acknowledged yet.
    pub fn has_unacked(&self) -> bool {
        let unsynced = self.store.as_ref().is_some_and(|store| store.unsynced_bytes() > 0);
        unsynced || self.attachment.as_ref().is_some_and(|a| a.received != a.acked)
    }

    /// Makes everything received durable and acknowledges it.
    ///
    /// # Errors
    /// When the store fails.
    pub fn flush(&mut self) -> Result<Vec<Event>, SessionError> {
        if let Some(store) = &mut self.store {
            let synced = store.sync();
            if let Err(error) = synced {
                self.store = None;
                return Err(error.into());
            }
        }
        let Some(attachment) = &mut self.attachment else { return Ok(Vec::new()) };
        let mut events = Vec::new();
        for ((endpoint, received), acked) in [Endpoint::Snapshot, Endpoint::Live]
            .into_iter()
            .zip(attachment.received)
            .zip(&mut attachment.acked)
        {
            if received > *acked {
                *acked = received;
                events.push(Event::Answer(endpoint, DiskDown::Ack { seq: received }));
            }
        }
        Ok(events)
    }
}

fn not_attached() -> SessionError {
    SessionError::Protocol("the disk is not attached".to_owned())
}
