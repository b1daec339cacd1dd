//! What a person can ask of a running dispatcher.

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::ids::{AgentId, DiskId};

/// What a disk is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// Its agent is not connected.
    Detached,
    /// The full copy is under way.
    Copying {
        /// Bytes of the disk that are here.
        done_bytes: u64,
        /// Bytes of the disk.
        total_bytes: u64,
    },
    /// The whole disk is being compared after a gap.
    Comparing,
    /// A checkpoint is being taken.
    Syncing,
    /// Nothing is under way; changes are watched.
    Idle,
}

/// How a disk is doing.
#[derive(Debug, Clone, Serialize)]
pub struct DiskStatus {
    /// Whose it is.
    pub agent: AgentId,
    /// Its id.
    pub disk: DiskId,
    /// The device's name on the agent.
    pub device: String,
    /// What it is doing.
    pub state: DiskState,
    /// The newest checkpoint.
    pub newest: Option<Checkpoint>,
    /// What went wrong last, until a checkpoint is committed.
    pub last_error: Option<String>,
}
