//! Which disks are paused on this side.
//!
//! Agent and dispatcher each keep their own list, and a disk is sent only if neither pauses it: as with DRBD's pause
//! flags (drbdsetup(8), `pause-sync`), each operator only takes back what was ordered on that side.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::disk_list::{DiskList, DiskListError};
use crate::ids::{AgentId, DiskId};

/// The disks that are paused on this side.
#[derive(Debug)]
pub struct Pauses(DiskList);

impl Pauses {
    /// Reads the file; one that is not there pauses nothing.
    ///
    /// # Errors
    /// When it cannot be read or a line is malformed: to go on would resume what somebody paused.
    pub fn load(path: PathBuf) -> Result<Self, DiskListError> {
        DiskList::load(path, "paused").map(Self)
    }

    /// Whether a disk is paused on this side.
    pub fn contains(&self, agent: &AgentId, disk: &DiskId) -> bool {
        self.0.contains(agent, disk)
    }

    /// An agent's paused disks.
    pub fn of(&self, agent: &AgentId) -> Vec<DiskId> {
        self.0.of(agent)
    }

    /// Pauses or resumes disks, durably before it returns; gives those that this changed.
    ///
    /// # Errors
    /// When the file cannot be written; then nothing is changed, before the next start at least.
    pub fn set(
        &self,
        disks: impl IntoIterator<Item = (AgentId, DiskId)>,
        pause: bool,
    ) -> Result<Vec<(AgentId, DiskId)>, DiskListError> {
        self.0.set(disks, pause)
    }
}

/// Whether one disk is paused, on either side; shared between its thread and those who order it.
#[derive(Debug, Default)]
pub struct PauseFlags {
    /// Paused on the agent's host.
    pub by_agent: AtomicBool,
    /// Paused on the dispatcher.
    pub by_dispatcher: AtomicBool,
}

impl PauseFlags {
    /// Whether nothing is to be sent.
    pub fn is_paused(&self) -> bool {
        self.by_agent.load(Ordering::Relaxed) || self.by_dispatcher.load(Ordering::Relaxed)
    }
}
