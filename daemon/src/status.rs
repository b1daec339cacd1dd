//! How a disk is doing: what both roles tell the bus. Only values.

use std::time::Duration;

pub use blxrep_dbus::words::DiskState;

use crate::checkpoint::Consistency;
use crate::ids::{AgentId, CheckpointId, DiskId};

/// The newest checkpoint of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Newest {
    /// Its id.
    pub id: CheckpointId,
    /// When it was frozen, in milliseconds since 1970.
    pub time_unix_ms: u64,
    /// How it was proven.
    pub consistency: Consistency,
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
    /// What went wrong last, until a checkpoint is committed.
    pub last_error: Option<String>,
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
