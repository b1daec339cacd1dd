//! Files that beat a pulse: as long as the file system answers, whoever works on them is alive.
//!
//! Recovering a store or folding a first copy takes as long as it takes; what must not happen unnoticed is one operation
//! that never ends.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::files::{Files, Space, StoreFile};
use crate::watchdog::{Pulse, SLOW_DISK_MAX};

/// See the module.
pub struct WatchedFiles {
    files: Arc<dyn Files>,
    pulse: Arc<Pulse>,
}

struct WatchedFile {
    file: Box<dyn StoreFile>,
    pulse: Arc<Pulse>,
}

impl WatchedFiles {
    /// The same files; `pulse` beats with every operation.
    pub fn new(files: Arc<dyn Files>, pulse: Arc<Pulse>) -> Self {
        Self { files, pulse }
    }

    fn watch(&self, file: Box<dyn StoreFile>) -> Box<dyn StoreFile> {
        Box::new(WatchedFile { file, pulse: self.pulse.clone() })
    }

    /// What waits until a disk has written all it was given.
    fn slow<T>(&self, done: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.pulse.allow(SLOW_DISK_MAX);
        let result = done();
        self.pulse.beat();
        result
    }
}

impl Files for WatchedFiles {
    fn open(&self, path: &Path, write: bool) -> io::Result<Box<dyn StoreFile>> {
        self.pulse.beat();
        Ok(self.watch(self.files.open(path, write)?))
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        Ok(self.watch(self.slow(|| self.files.create_new(path))?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.pulse.beat();
        self.files.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.slow(|| self.files.remove(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.slow(|| self.files.sync_dir(dir))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.pulse.beat();
        self.files.list(dir)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.pulse.beat();
        self.files.exists(path)
    }

    fn space(&self) -> io::Result<Space> {
        self.pulse.beat();
        self.files.space()
    }
}

impl StoreFile for WatchedFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.pulse.beat();
        self.file.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.pulse.beat();
        self.file.write_all_at(buf, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.pulse.beat();
        self.file.punch(offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.pulse.beat();
        self.file.next_data(offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.pulse.beat();
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.pulse.allow(SLOW_DISK_MAX);
        let result = self.file.sync();
        self.pulse.beat();
        result
    }
}
