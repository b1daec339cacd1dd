//! An open mount: what freezing, thawing and syncing need, and the only place that asks the kernel for them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::mountinfo::DeviceNumber;

nix::ioctl_readwrite!(
    /// FIFREEZE of linux/fs.h; the argument is not looked at.
    fi_freeze,
    b'X',
    119,
    libc::c_int
);
nix::ioctl_readwrite!(
    /// FITHAW of linux/fs.h; the argument is not looked at.
    fi_thaw,
    b'X',
    120,
    libc::c_int
);

/// A mounted file system, by one of its mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The mount's id in `/proc/self/mountinfo`.
    pub mount_id: u64,
    /// The number of the file system; major 0 where it has no block device of its own (btrfs).
    pub device: DeviceNumber,
    /// A mount point at which it can be reached.
    pub mount_point: PathBuf,
    /// The type, such as `ext4`.
    pub fs_type: String,
    /// The file system is read-only: nothing to freeze.
    pub read_only: bool,
}

impl Mount {
    /// Opens the mount point, and only if it still leads to this very mount.
    ///
    /// # Errors
    /// When it cannot be opened, is something other than a directory or file, or another file system has been mounted
    /// over it.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let kind = fs::metadata(&self.mount_point)?.file_type();
        // Opening a device or a FIFO can have effects or wait.
        if !kind.is_dir() && !kind.is_file() {
            return Err(io::Error::other("neither a directory nor a file"));
        }
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&self.mount_point)?;
        if mount_id_of(&file)? != self.mount_id {
            return Err(io::Error::other("another file system is mounted over it"));
        }
        Ok(file.into())
    }
}

/// The mount that an open file lies on.
///
/// # Errors
/// When `/proc/self/fdinfo` cannot be read.
pub(super) fn mount_id_of(file: &File) -> io::Result<u64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).and_then(|id| id.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("/proc/self/fdinfo names no mnt_id"))
}

/// A file found by its path only: neither read nor changed nor waited for.
///
/// # Errors
/// What open(2) says.
pub(super) fn open_path(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)
}

/// Freezes the file system of an open file: writers wait from now on, what was written is on the disk.
///
/// # Errors
/// EBUSY: it is frozen already. EOPNOTSUPP: this type cannot be frozen. Whatever else the file system says; then
/// it is not frozen.
pub fn freeze(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let mut unused: libc::c_int = 0;
    // SAFETY: the descriptor is open for the whole call and the kernel does not look at the argument.
    unsafe { fi_freeze(fd.as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Thaws the file system of an open file.
///
/// # Errors
/// EINVAL: it is not frozen. Whatever else the file system says; then it may still be frozen.
pub fn thaw(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let mut unused: libc::c_int = 0;
    // SAFETY: the descriptor is open for the whole call and the kernel does not look at the argument.
    unsafe { fi_thaw(fd.as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Writes everything of the file system of an open file to its disk, syncfs(2).
///
/// # Errors
/// What the file system says.
pub fn sync(fd: impl AsFd) -> nix::Result<()> {
    nix::unistd::syncfs(fd)
}
