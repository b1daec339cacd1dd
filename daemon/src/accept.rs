//! Disks whose change a person accepted: smaller than its newest checkpoint, or another one in place of a stored one.
//!
//! Kept on the dispatcher, in the file `accepted` of the data directory. What must never happen here: an order that is
//! used twice. It is taken back once a checkpoint of the changed disk is committed.

use std::path::PathBuf;

use crate::disk_list::{DiskList, DiskListError};
use crate::ids::{AgentId, DiskId};

/// The disks whose next change is accepted.
#[derive(Debug)]
pub struct Accepted(DiskList);

impl Accepted {
    /// Reads the file; one that is not there accepts nothing.
    ///
    /// # Errors
    /// When it cannot be read or a line is malformed.
    pub fn load(path: PathBuf) -> Result<Self, DiskListError> {
        DiskList::load(path, "accepted").map(Self)
    }

    /// Whether a disk's change is accepted.
    pub fn contains(&self, agent: &AgentId, disk: &DiskId) -> bool {
        self.0.contains(agent, disk)
    }

    /// Accepts a disk's change, durably; false if it was accepted already.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&self, agent: &AgentId, disk: &DiskId) -> Result<bool, DiskListError> {
        self.set(agent, disk, true)
    }

    /// Uses an acceptance up, durably; false if there was none.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn take(&self, agent: &AgentId, disk: &DiskId) -> Result<bool, DiskListError> {
        self.set(agent, disk, false)
    }

    fn set(&self, agent: &AgentId, disk: &DiskId, accept: bool) -> Result<bool, DiskListError> {
        let changed = self.0.set([(agent.clone(), disk.clone())], accept)?;
        Ok(!changed.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_accepted_is_known_after_a_restart_until_it_is_used_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("accepted");
        let (agent, disk) = ("web1".parse().unwrap(), "sda".parse().unwrap());
        let accepted = Accepted::load(path.clone()).unwrap();
        assert!(!accepted.take(&agent, &disk).unwrap());
        assert!(accepted.add(&agent, &disk).unwrap());
        assert!(!accepted.add(&agent, &disk).unwrap());
        let accepted = Accepted::load(path.clone()).unwrap();
        assert!(accepted.contains(&agent, &disk));
        assert!(!accepted.contains(&agent, &"sdb".parse().unwrap()));
        assert!(accepted.take(&agent, &disk).unwrap());
        assert!(!Accepted::load(path.clone()).unwrap().contains(&agent, &disk));
        std::fs::write(&path, "web1\n").unwrap();
        let error = Accepted::load(path).unwrap_err().to_string();
        assert!(error.ends_with("then no disk is accepted"), "{error}");
    }
}
