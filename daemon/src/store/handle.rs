//! [`Files`] with errors that say what failed, on which file.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::{Files, Space, StoreFile};
use super::{Damage, StoreError};

fn failed(what: &'static str, path: &Path, source: io::Error) -> StoreError {
    let file = path.display().to_string();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::NoSpace { file },
        io::ErrorKind::UnexpectedEof => StoreError::Damaged(Damage::new(file, "shorter than it should be")),
        _ => StoreError::Io { what, file, source },
    }
}

/// One open file of the store.
pub struct Handle {
    file: Box<dyn StoreFile>,
    path: PathBuf,
}

impl Handle {
    /// The path relative to the data directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path as text, for messages.
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Damage of this file.
    pub fn damaged(&self, what: impl Into<String>) -> StoreError {
        StoreError::damaged(self.name(), what)
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Damaged when the file is too short, else Io.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), StoreError> {
        self.file.read_exact_at(buf, offset).map_err(|e| failed("read", &self.path, e))
    }

    /// Reads `len` bytes from `offset`; `len` must be bounded by the caller.
    ///
    /// # Errors
    /// Damaged when the file is too short, else Io.
    pub fn read_vec(&self, len: usize, offset: u64) -> Result<Vec<u8>, StoreError> {
        let mut buf = vec![0; len];
        self.read(&mut buf, offset)?;
        Ok(buf)
    }

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn write(&self, buf: &[u8], offset: u64) -> Result<(), StoreError> {
        self.file.write_all_at(buf, offset).map_err(|e| failed("write", &self.path, e))
    }

    /// Makes a range read as zeros, durably with the next [`Self::sync`], whatever it reads as now.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn clear(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.file.punch(offset, len).map_err(|e| failed("clear a range", &self.path, e))
    }

    /// The next range that may hold data.
    ///
    /// # Errors
    /// Io.
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>, StoreError> {
        self.file.next_data(offset).map_err(|e| failed("look for data", &self.path, e))
    }

    /// Length in bytes.
    ///
    /// # Errors
    /// Io.
    pub fn len(&self) -> Result<u64, StoreError> {
        self.file.len().map_err(|e| failed("stat", &self.path, e))
    }

    /// Whether the file has no bytes.
    ///
    /// # Errors
    /// Io.
    pub fn is_empty(&self) -> Result<bool, StoreError> {
        Ok(self.len()? == 0)
    }

    /// Cuts or extends the file.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn set_len(&self, len: u64) -> Result<(), StoreError> {
        self.file.set_len(len).map_err(|e| failed("set the length", &self.path, e))
    }

    /// Makes content and length durable.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.file.sync().map_err(|e| failed("sync", &self.path, e))
    }
}

/// The data directory.
#[derive(Clone)]
pub struct Dir(Arc<dyn Files>);

impl Dir {
    /// The data directory behind `files`.
    pub fn new(files: Arc<dyn Files>) -> Self {
        Self(files)
    }

    /// Opens a file.
    ///
    /// # Errors
    /// Damaged when it is missing, else Io.
    pub fn open(&self, path: &Path, write: bool) -> Result<Handle, StoreError> {
        match self.0.open(path, write) {
            Ok(file) => Ok(Handle { file, path: path.to_owned() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::damaged(path.display().to_string(), "the file is missing"))
            }
            Err(e) => Err(failed("open", path, e)),
        }
    }

    /// Opens a file for reading, if there is one.
    ///
    /// # Errors
    /// Io.
    pub fn open_existing(&self, path: &Path, write: bool) -> Result<Option<Handle>, StoreError> {
        match self.0.open(path, write) {
            Ok(file) => Ok(Some(Handle { file, path: path.to_owned() })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("open", path, e)),
        }
    }

    /// Creates a file that must not exist.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn create(&self, path: &Path) -> Result<Handle, StoreError> {
        let file = self.0.create_new(path).map_err(|e| failed("create", path, e))?;
        Ok(Handle { file, path: path.to_owned() })
    }

    /// Renames a file.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<(), StoreError> {
        self.0.rename(from, to).map_err(|e| failed("rename", from, e))
    }

    /// Removes a file if it is there.
    ///
    /// # Errors
    /// Io.
    pub fn remove(&self, path: &Path) -> Result<(), StoreError> {
        match self.0.remove(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, e)),
            _ => Ok(()),
        }
    }

    /// Removes a file, durably, if it is there: what is begun under its name next must not meet it again after a power cut.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn forget(&self, path: &Path) -> Result<(), StoreError> {
        if !self.exists(path)? {
            return Ok(());
        }
        self.remove(path)?;
        self.sync_names(path)
    }

    /// Makes the names in a file's directory durable.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn sync_names(&self, file: &Path) -> Result<(), StoreError> {
        let dir = file.parent().unwrap_or(Path::new(""));
        self.0.sync_dir(dir).map_err(|e| failed("sync the directory", dir, e))
    }

    /// The names in a directory, sorted.
    ///
    /// # Errors
    /// Io.
    pub fn list(&self, dir: &Path) -> Result<Vec<String>, StoreError> {
        self.0.list(dir).map_err(|e| failed("list", dir, e))
    }

    /// Whether a file is there.
    ///
    /// # Errors
    /// Io.
    pub fn exists(&self, path: &Path) -> Result<bool, StoreError> {
        self.0.exists(path).map_err(|e| failed("look for", path, e))
    }

    /// How much still fits.
    ///
    /// # Errors
    /// Io.
    pub fn space(&self) -> Result<Space, StoreError> {
        self.0.space().map_err(|e| failed("look how much is free below", Path::new("."), e))
    }
}
