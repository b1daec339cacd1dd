//! How a disk is doing: what both roles tell the bus.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use blxrep_dbus::words::DiskState;

use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, Consistency};
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::pause::PauseFlags;

/// The newest checkpoint of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Newest {
    /// Its id.
    pub id: CheckpointId,
    /// When it was frozen, in milliseconds since 1970.
    pub time_unix_ms: u64,
    /// How it was proven.
    pub consistency: Consistency,
}

impl From<&Checkpoint> for Newest {
    fn from(checkpoint: &Checkpoint) -> Self {
        let Checkpoint { id, time_unix_ms, consistency, .. } = *checkpoint;
        Self { id, time_unix_ms, consistency }
    }
}

/// How a disk is doing.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskStatus {
    /// Whose it is.
    pub agent: AgentId,
    /// Its id.
    pub disk: DiskId,
    /// The device's name on the agent.
    pub device: String,
    /// Its size.
    pub size_bytes: u64,
    /// What it is doing.
    pub state: DiskState,
    /// Paused on the agent's host.
    pub paused_by_agent: bool,
    /// Paused on the dispatcher.
    pub paused_by_dispatcher: bool,
    /// How far a full copy or a compare is, from 0 to 1.
    pub progress: f64,
    /// Bytes changed since the newest checkpoint, as far as they are known here.
    pub dirty_bytes: u64,
    /// The newest checkpoint.
    pub newest: Option<Newest>,
    /// The time between checkpoints; only the dispatcher knows it.
    pub sync_every: Option<Duration>,
    /// What went wrong last, until a checkpoint is committed; what the newest checkpoint lacks.
    pub last_error: Option<String>,
    /// What is known to be damaged of what is stored of it, one line each; only the dispatcher knows it.
    pub damage: Vec<String>,
}

impl DiskStatus {
    /// A disk of which nothing is known yet.
    pub fn new(agent: AgentId, disk: DiskId, device: String, size_bytes: u64) -> Self {
        Self {
            agent,
            disk,
            device,
            size_bytes,
            state: DiskState::Detached,
            paused_by_agent: false,
            paused_by_dispatcher: false,
            progress: 0.0,
            dirty_bytes: size_bytes,
            newest: None,
            sync_every: None,
            last_error: None,
            damage: Vec::new(),
        }
    }
}

/// One disk, shared between its thread and those who ask for it or order it.
#[derive(Debug)]
pub struct SharedDisk {
    /// Whose it is.
    pub agent: AgentId,
    /// Its id.
    pub id: DiskId,
    /// Whether it is paused; its thread looks here.
    pub pause: PauseFlags,
    status: Mutex<DiskStatus>,
}

impl SharedDisk {
    /// A disk whose thread has not begun.
    pub fn new(status: DiskStatus) -> Self {
        let (agent, id) = (status.agent.clone(), status.disk.clone());
        Self { agent, id, pause: PauseFlags::default(), status: Mutex::new(status) }
    }

    /// How it is doing, to be read or changed.
    pub fn status(&self) -> MutexGuard<'_, DiskStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pauses or resumes it for the agent's side.
    pub fn set_paused_by_agent(&self, paused: bool) {
        self.pause.by_agent.store(paused, Ordering::Relaxed);
        self.status().paused_by_agent = paused;
    }

    /// Pauses or resumes it for the dispatcher's side.
    pub fn set_paused_by_dispatcher(&self, paused: bool) {
        self.pause.by_dispatcher.store(paused, Ordering::Relaxed);
        self.status().paused_by_dispatcher = paused;
    }
}

/// What is known of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentStatus {
    /// Its id.
    pub id: AgentId,
    /// Whether agent and dispatcher are connected.
    pub connected: bool,
    /// The host's name; empty if it was never told.
    pub hostname: String,
    /// The agent's version of blxrep; empty if it was never told.
    pub version: String,
    /// Where it connects from, or to; empty if it is not connected.
    pub address: String,
    /// When it was last connected, in milliseconds since 1970; 0 if never.
    pub last_seen_unix_ms: u64,
    /// How many disks it has.
    pub disks: u32,
    /// Why a machine of this name is refused, if one is; empty if not.
    pub refused: String,
    /// Devices that hold only a part of a restore, a sentence each; only an agent knows its own.
    pub unfinished: Vec<String>,
}

/// A checkpoint was committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointAdded {
    /// Whose.
    pub agent: AgentId,
    /// Of which disk.
    pub disk: DiskId,
    /// Which.
    pub id: CheckpointId,
}
