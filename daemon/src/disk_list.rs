//! Disks of which a person ordered something, kept in a small text file so that it outlives restarts and reboots. A line is
//! `<agent> <disk>`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ids::{AgentId, DiskId};
use crate::wire::key::write_private;

const FILE_MAX_BYTES: u64 = 4 << 20;

/// A list of disks that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskListError {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line is none.
    #[error(
        "{path}, line {line}: expected '<agent> <disk>'; put it right or remove the file: then no disk is {what}"
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the disks in it are.
        what: &'static str,
    },
}

/// What a list holds.
pub(crate) type Disks = BTreeSet<(AgentId, DiskId)>;

/// Disks in a file that is replaced with every change.
#[derive(Debug)]
pub struct DiskList {
    path: PathBuf,
    /// Held while the file is written; those who only look do not wait for a disk.
    writing: Mutex<()>,
    disks: Mutex<Disks>,
}

impl DiskList {
    /// Reads the file; one that is not there lists nothing. `what` the disks in it are (paused) is said where a line is
    /// malformed.
    ///
    /// # Errors
    /// When it cannot be read or a line is malformed: to go on would take back what somebody ordered.
    pub fn load(path: PathBuf, what: &'static str) -> Result<Self, DiskListError> {
        let text = match read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            other => other.map_err(|source| DiskListError::File { path: path.clone(), source })?,
        };
        let disks = parse(&text).map_err(|line| DiskListError::Line { path: path.clone(), line, what })?;
        Ok(Self { path, writing: Mutex::default(), disks: Mutex::new(disks) })
    }

    fn disks(&self) -> MutexGuard<'_, Disks> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a disk is listed.
    pub fn contains(&self, agent: &AgentId, disk: &DiskId) -> bool {
        self.disks().contains(&(agent.clone(), disk.clone()))
    }

    /// An agent's listed disks.
    pub fn of(&self, agent: &AgentId) -> Vec<DiskId> {
        self.disks().iter().filter(|(of, _)| of == agent).map(|(_, disk)| disk.clone()).collect()
    }

    /// Lists disks, or takes them out, durably before it returns; gives those that this changed.
    ///
    /// # Errors
    /// When the file cannot be written; then nothing is changed, before the next start at least.
    pub fn set(
        &self,
        disks: impl IntoIterator<Item = (AgentId, DiskId)>,
        listed: bool,
    ) -> Result<Vec<(AgentId, DiskId)>, DiskListError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = self.disks().clone();
        let changed: Vec<_> = disks.into_iter().filter(|disk| next.contains(disk) != listed).collect();
        if changed.is_empty() {
            return Ok(changed);
        }
        for disk in &changed {
            let _ = if listed { next.insert(disk.clone()) } else { next.remove(disk) };
        }
        write_private(&self.path, text(&next).as_bytes())
            .map_err(|source| DiskListError::File { path: self.path.clone(), source })?;
        *self.disks() = next;
        Ok(changed)
    }
}

fn read(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.len() > FILE_MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    fs::read_to_string(path)
}

pub(crate) fn parse(text: &str) -> Result<Disks, usize> {
    let mut disks = Disks::new();
    for (line, number) in text.lines().zip(1usize..) {
        let (agent, disk) = line.split_once(' ').ok_or(number)?;
        disks.insert((agent.parse().map_err(|_| number)?, disk.parse().map_err(|_| number)?));
    }
    Ok(disks)
}

/// The file's text: what [`parse`] reads.
pub(crate) fn text(disks: &Disks) -> String {
    disks.iter().map(|(agent, disk)| format!("{agent} {disk}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(agent: &str, disk: &str) -> (AgentId, DiskId) {
        (agent.parse().unwrap(), disk.parse().unwrap())
    }

    fn load(path: &Path) -> Result<DiskList, DiskListError> {
        DiskList::load(path.to_owned(), "paused")
    }

    #[test]
    fn what_is_listed_stays_so_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("paused");
        let list = load(&path).unwrap();
        let (a, b) = (disk("web1", "sda"), disk("web10", "sda"));
        assert_eq!(list.set([a.clone(), b.clone()], true).unwrap(), [a.clone(), b.clone()]);
        assert_eq!(list.set([a.clone()], true).unwrap(), [], "listed already");

        let list = load(&path).unwrap();
        assert!(list.contains(&a.0, &a.1));
        assert_eq!(list.of(&b.0), std::slice::from_ref(&b.1));
        assert_eq!(list.set([a.clone()], false).unwrap(), std::slice::from_ref(&a));
        let list = load(&path).unwrap();
        assert!(!list.contains(&a.0, &a.1) && list.contains(&b.0, &b.1));
    }

    #[test]
    fn a_file_that_cannot_be_written_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("paused");
        let list = load(&path).unwrap();
        fs::create_dir(path.with_extension("new")).unwrap();
        let a = disk("web1", "sda");
        assert!(list.set([a.clone()], true).is_err());
        assert!(!list.contains(&a.0, &a.1));
    }

    #[test]
    fn a_malformed_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("paused");
        for text in ["web1 sda\nweb1\n", "web1 sda\nweb1 ../x\n"] {
            fs::write(&path, text).unwrap();
            let error = load(&path).unwrap_err();
            assert!(matches!(error, DiskListError::Line { line: 2, .. }), "{error}");
            assert!(error.to_string().ends_with("then no disk is paused"), "{error}");
        }
    }
}
