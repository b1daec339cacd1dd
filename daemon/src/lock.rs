//! One process at a time in a directory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A lock that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("{0} is held by another blxrep: stop that one first")]
    Held(PathBuf),
    /// The file cannot be made.
    #[error("{path}: {source}")]
    File {
        /// The lock file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A held lock; given back when dropped, and by the kernel when the process dies.
#[derive(Debug)]
pub struct DirLock(#[expect(dead_code, reason = "holds the lock")] File);

impl DirLock {
    /// Takes the lock `name` in `dir` (flock(2)); the file stays behind, empty.
    ///
    /// # Errors
    /// When another process holds it, or the file cannot be made.
    pub fn take(dir: &Path, name: &str) -> Result<Self, LockError> {
        let path = dir.join(name);
        let options = OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(&path);
        let file = options.map_err(|source| LockError::File { path: path.clone(), source })?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(std::fs::TryLockError::WouldBlock) => Err(LockError::Held(path)),
            Err(std::fs::TryLockError::Error(source)) => Err(LockError::File { path, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_once_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let lock = DirLock::take(dir.path(), "x").unwrap();
        assert!(matches!(DirLock::take(dir.path(), "x"), Err(LockError::Held(_))));
        drop(lock);
        DirLock::take(dir.path(), "x").unwrap();
    }
}
