//! Where a restored image goes: a new file, or a block device.
//!
//! What must never happen here: a regular file overwritten, a device written that something else uses, a temporary
//! file left behind.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::RestoreError;

/// The output under way.
pub(super) struct Target {
    file: File,
    /// What the person named.
    path: PathBuf,
    /// The name it has until it is whole; `None` for a device.
    temporary: Option<PathBuf>,
}

static COUNTER: AtomicU64 = AtomicU64::new(0);

impl Target {
    /// Opens a device for itself, or makes a new file beside the one that is to be.
    pub(super) fn open(path: &Path, size_bytes: u64) -> Result<Self, RestoreError> {
        match path.metadata() {
            Ok(meta) if meta.file_type().is_block_device() => Self::device(path, size_bytes),
            Ok(_) => Err(RestoreError::Usage(format!(
                "{} is there already and is not overwritten: name another --output or remove it",
                path.display()
            ))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Self::new_file(path, size_bytes),
            Err(e) => Err(RestoreError::output(path, "look at it", e)),
        }
    }

    fn device(path: &Path, size_bytes: u64) -> Result<Self, RestoreError> {
        let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
        let mut file = open.map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => RestoreError::Usage(format!(
                "{} is in use (mounted, or part of LVM, md or the like): free it first",
                path.display()
            )),
            _ => RestoreError::output(path, "open it", e),
        })?;
        let has = file.seek(SeekFrom::End(0)).map_err(|e| RestoreError::output(path, "ask its size", e))?;
        if has < size_bytes {
            let text = format!("{} has {has} bytes, the checkpoint needs {size_bytes}", path.display());
            return Err(RestoreError::Usage(text));
        }
        Ok(Self { file, path: path.to_owned(), temporary: None })
    }

    fn new_file(path: &Path, size_bytes: u64) -> Result<Self, RestoreError> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
        let name = name.ok_or_else(|| RestoreError::Usage(format!("{} names no file", path.display())))?;
        let unique =
            format!(".{name}.{}-{}.part", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let temporary = path.with_file_name(unique);
        let open = OpenOptions::new().read(true).write(true).create_new(true).open(&temporary);
        let file = open.map_err(|e| RestoreError::output(path, "create it", e))?;
        let target = Self { file, path: path.to_owned(), temporary: Some(temporary) };
        target.file.set_len(size_bytes).map_err(|e| target.failed("make it as long as the disk", e))?;
        Ok(target)
    }

    /// Whether blocks that are not written read as zeros.
    pub(super) fn begins_as_zeros(&self) -> bool {
        self.temporary.is_some()
    }

    /// Lets the file begin as a copy of `base` that shares its space, where the file system can. True if it did.
    pub(super) fn clone_from(&self, base: &Path) -> bool {
        let Ok(base) = File::open(base) else { return false };
        // SAFETY: FICLONE takes two open files by number and touches no memory of this process.
        self.temporary.is_some()
            && unsafe { libc::ioctl(self.file.as_raw_fd(), libc::FICLONE, base.as_raw_fd()) } == 0
    }

    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<(), RestoreError> {
        self.file.write_all_at(data, offset).map_err(|e| self.failed("write", e))
    }

    /// Makes all durable and forgets what memory holds of it, so that reading asks the disk.
    pub(super) fn sync(&self) -> Result<(), RestoreError> {
        use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
        self.file.sync_all().map_err(|e| self.failed("sync", e))?;
        // Only advice: what cannot be dropped is compared as memory has it.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        Ok(())
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), RestoreError> {
        self.file.read_exact_at(buf, offset).map_err(|e| self.failed("read back", e))
    }

    /// That a block reads back as something else.
    pub(super) fn faulty(&self, block: u64) -> RestoreError {
        RestoreError::ReadBack { target: self.path.display().to_string(), block }
    }

    /// Gives a new file its name, durably, if nothing has that name meanwhile.
    pub(super) fn finish(mut self) -> Result<(), RestoreError> {
        let Some(temporary) = self.temporary.clone() else { return Ok(()) };
        rename_new(&temporary, &self.path).map_err(|e| self.failed("give it its name", e))?;
        self.temporary = None;
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = File::open(parent).and_then(|dir| dir.sync_all());
        synced.map_err(|e| self.failed("sync its directory", e))
    }

    fn failed(&self, what: &'static str, source: io::Error) -> RestoreError {
        match RestoreError::output(&self.path, what, source) {
            RestoreError::Output { target, what, source, hint: "" } if self.temporary.is_none() => {
                RestoreError::Output { target, what, source, hint: "; the device holds only a part now" }
            }
            other => other,
        }
    }
}

fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use nix::errno::Errno;
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // A file system without that flag (NFS, some FUSE): a link refuses to replace as well.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        other => Ok(other?),
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = std::fs::remove_file(temporary);
        }
    }
}
