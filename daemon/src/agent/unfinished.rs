//! Devices of this host that hold a part of a restore: kept in a small file, because what began it may be killed, and the machine
//! may lose power.
//!
//! What must never happen here: a device whose first byte is changed before its record is durable.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::freeze::alone::Alone;
use crate::wire::key::write_private;

const FILE_MAX_BYTES: u64 = 1 << 20;

/// A device, and what was to be restored to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its path, symbolic links followed.
    pub target: PathBuf,
    /// Whose disk.
    pub agent: String,
    /// The disk's id.
    pub disk: String,
    /// The checkpoint's id.
    pub checkpoint: String,
}

impl Record {
    /// A device and what is to be restored to it.
    pub fn new(target: &Path, checkpoint: &Checkpoint) -> Self {
        Self {
            target: canonical(target),
            agent: checkpoint.agent.to_string(),
            disk: checkpoint.disk.to_string(),
            checkpoint: checkpoint.id.to_string(),
        }
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, agent, disk, checkpoint } = self;
        write!(f, "{} holds only a part of checkpoint {checkpoint} of {agent}'s {disk}", target.display())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Unfinished {
    path: PathBuf,
    records: Mutex<Vec<Record>>,
}

impl Unfinished {
    /// Reads the file; one that is not there names no device.
    ///
    /// # Errors
    /// When it cannot be read or is not such a file.
    pub fn load(path: PathBuf) -> io::Result<Self> {
        let records = match read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            other => other.map_err(|e| {
                let text = format!(
                    "{}: {e}; put it right or remove it: then no device counts as half restored",
                    path.display()
                );
                io::Error::new(e.kind(), text)
            })?,
        };
        Ok(Self { path, records: Mutex::new(records) })
    }

    /// The devices that hold a part only.
    pub fn all(&self) -> Vec<Record> {
        self.records().clone()
    }

    /// A device is about to be written: durable when this returns.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn begin(&self, record: Record) -> io::Result<()> {
        self.replace(&record.target.clone(), Some(record))
    }

    /// A device holds all of a restore.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn end(&self, target: &Path) -> io::Result<()> {
        self.replace(&canonical(target), None)
    }

    fn replace(&self, target: &Path, record: Option<Record>) -> io::Result<()> {
        // Also one at a time. Whoever only asks does not wait for a freeze.
        let _alone = Alone::take();
        let now = self.all();
        let others = now.iter().filter(|other| other.target != target).cloned();
        let next: Vec<Record> = others.chain(record).collect();
        if next != now {
            let text = serde_json::to_vec_pretty(&next).map_err(io::Error::other)?;
            write_private(&self.path, &text)?;
            *self.records() = next;
        }
        Ok(())
    }

    fn records(&self) -> MutexGuard<'_, Vec<Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn read(path: &Path) -> io::Result<Vec<Record>> {
    if fs::metadata(path)?.len() > FILE_MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    serde_json::from_slice(&fs::read(path)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_while_something_is_frozen_and_who_asks_does_not_wait() {
        let dir = tempfile::tempdir().unwrap();
        let unfinished = Unfinished::load(dir.path().join("x")).unwrap();
        let record =
            Record { target: "/dev/x".into(), agent: "a".into(), disk: "d".into(), checkpoint: "c".into() };
        let frozen = Alone::take();
        std::thread::scope(|scope| {
            let begun = scope.spawn(|| unfinished.begin(record.clone()));
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(unfinished.all().is_empty() && !dir.path().join("x").exists());
            drop(frozen);
            begun.join().unwrap().unwrap();
        });
        assert_eq!(unfinished.all(), [record]);
    }

    #[test]
    fn a_record_outlives_the_process_until_the_device_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target, link) = (dir.path().join("x"), dir.path().join("sdb"), dir.path().join("by-id"));
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let record = |target: &Path, checkpoint: &str| Record {
            target: canonical(target),
            agent: "web1".into(),
            disk: "sda".into(),
            checkpoint: checkpoint.into(),
        };
        let unfinished = Unfinished::load(path.clone()).unwrap();
        unfinished.begin(record(&link, "1")).unwrap();
        unfinished.begin(record(Path::new("/dev/other"), "1")).unwrap();
        unfinished.begin(record(&target, "2")).unwrap();
        let again = Unfinished::load(path.clone()).unwrap();
        assert_eq!(again.all(), [record(Path::new("/dev/other"), "1"), record(&target, "2")]);
        again.end(&link).unwrap();
        again.end(&link).unwrap();
        assert_eq!(Unfinished::load(path.clone()).unwrap().all().len(), 1);
        fs::write(&path, "[{}]").unwrap();
        let error = Unfinished::load(path).unwrap_err();
        assert!(error.to_string().contains("remove it"), "{error}");
    }
}
