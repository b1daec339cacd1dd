//! Which disks are paused on this side, kept in a file so that it outlives restarts and reboots.
//!
//! Agent and dispatcher each keep their own file, and a disk is sent only if neither pauses it: as with DRBD's pause
//! flags (drbdsetup(8), `pause-sync`), each operator only takes back what was ordered on that side. A line of the file
//! is `<agent> <disk>`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ids::{AgentId, DiskId};
use crate::wire::key::write_private;

const FILE_MAX_BYTES: u64 = 4 << 20;

/// A file of pauses that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
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
        "{path}, line {line}: expected '<agent> <disk>'; put it right or remove the file: then nothing is paused"
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
}

/// All of one side.
pub(crate) type Paused = BTreeSet<(AgentId, DiskId)>;

/// The disks that are paused on this side.
#[derive(Debug)]
pub struct Pauses {
    path: PathBuf,
    /// Held while the file is written; those who only look do not wait for a disk.
    writing: Mutex<()>,
    paused: Mutex<Paused>,
}

impl Pauses {
    /// Reads the file; one that is not there pauses nothing.
    ///
    /// # Errors
    /// When it cannot be read or a line is malformed: to go on would resume what somebody paused.
    pub fn load(path: PathBuf) -> Result<Self, PauseError> {
        let text = match read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            other => other.map_err(|source| PauseError::File { path: path.clone(), source })?,
        };
        let paused = parse(&text).map_err(|line| PauseError::Line { path: path.clone(), line })?;
        Ok(Self { path, writing: Mutex::default(), paused: Mutex::new(paused) })
    }

    fn paused(&self) -> MutexGuard<'_, Paused> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a disk is paused on this side.
    pub fn contains(&self, agent: &AgentId, disk: &DiskId) -> bool {
        self.paused().contains(&(agent.clone(), disk.clone()))
    }

    /// An agent's paused disks.
    pub fn of(&self, agent: &AgentId) -> Vec<DiskId> {
        self.paused().iter().filter(|(of, _)| of == agent).map(|(_, disk)| disk.clone()).collect()
    }

    /// Pauses or resumes disks, durably before it returns; gives those that this changed.
    ///
    /// # Errors
    /// When the file cannot be written; then nothing is changed, before the next start at least.
    pub fn set(
        &self,
        disks: impl IntoIterator<Item = (AgentId, DiskId)>,
        pause: bool,
    ) -> Result<Vec<(AgentId, DiskId)>, PauseError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = self.paused().clone();
        let changed: Vec<_> = disks.into_iter().filter(|disk| next.contains(disk) != pause).collect();
        if changed.is_empty() {
            return Ok(changed);
        }
        for disk in &changed {
            let _ = if pause { next.insert(disk.clone()) } else { next.remove(disk) };
        }
        write_private(&self.path, text(&next).as_bytes())
            .map_err(|source| PauseError::File { path: self.path.clone(), source })?;
        *self.paused() = next;
        Ok(changed)
    }
}

fn read(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.len() > FILE_MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    fs::read_to_string(path)
}

pub(crate) fn parse(text: &str) -> Result<Paused, usize> {
    let mut paused = Paused::new();
    for (line, number) in text.lines().zip(1usize..) {
        let (agent, disk) = line.split_once(' ').ok_or(number)?;
        paused.insert((agent.parse().map_err(|_| number)?, disk.parse().map_err(|_| number)?));
    }
    Ok(paused)
}

/// The file's text: what [`parse`] reads.
pub(crate) fn text(paused: &Paused) -> String {
    paused.iter().map(|(agent, disk)| format!("{agent} {disk}\n")).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(agent: &str, disk: &str) -> (AgentId, DiskId) {
        (agent.parse().unwrap(), disk.parse().unwrap())
    }

    #[test]
    fn what_is_paused_stays_so_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("paused");
        let pauses = Pauses::load(path.clone()).unwrap();
        let (a, b) = (disk("web1", "sda"), disk("web10", "sda"));
        assert_eq!(pauses.set([a.clone(), b.clone()], true).unwrap(), [a.clone(), b.clone()]);
        assert_eq!(pauses.set([a.clone()], true).unwrap(), [], "paused already");

        let pauses = Pauses::load(path.clone()).unwrap();
        assert!(pauses.contains(&a.0, &a.1));
        assert_eq!(pauses.of(&b.0), std::slice::from_ref(&b.1));
        assert_eq!(pauses.set([a.clone()], false).unwrap(), std::slice::from_ref(&a));
        let pauses = Pauses::load(path).unwrap();
        assert!(!pauses.contains(&a.0, &a.1) && pauses.contains(&b.0, &b.1));
    }

    #[test]
    fn a_file_that_cannot_be_written_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("paused");
        let pauses = Pauses::load(path.clone()).unwrap();
        fs::create_dir(path.with_extension("new")).unwrap();
        let a = disk("web1", "sda");
        assert!(pauses.set([a.clone()], true).is_err());
        assert!(!pauses.contains(&a.0, &a.1));
    }

    #[test]
    fn a_malformed_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("paused");
        for text in ["web1 sda\nweb1\n", "web1 sda\nweb1 ../x\n"] {
            fs::write(&path, text).unwrap();
            let error = Pauses::load(path.clone()).unwrap_err();
            assert!(matches!(error, PauseError::Line { line: 2, .. }), "{error}");
        }
    }
}
