//! The directory in bpffs that keeps a tracker alive while no agent runs.
//!
//! What must never happen here: two processes at work in one directory, or a file left that keeps a probe attached.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::TrackerError;
use crate::ids::{AgentId, DiskId};

/// Where bpffs belongs.
const BPFFS: &str = "/sys/fs/bpf";
/// How long the end of another process (an agent being replaced) is waited for, in milliseconds.
const LOCK_WAIT_MS: u64 = 2000;

/// Mounts bpffs on `/sys/fs/bpf` if there is none; true if it did.
///
/// # Errors
/// What mount(2) says.
pub fn mount_bpffs_if_missing() -> Result<bool, TrackerError> {
    // Two that find none at the same time must not both mount: the second would hide the first one's pins.
    let _lock = lock_exclusively(Path::new(BPFFS))?;
    if is_bpffs(Path::new(BPFFS)) {
        return Ok(false);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=700"))
        .map_err(|e| kernel(format!("bpffs cannot be mounted on {BPFFS} (the agent must run as root)"), e))?;
    Ok(true)
}

/// Where a disk's tracker is pinned. bpffs refuses names with a `.`, so `:` stands for it (no id holds one).
pub fn pin_path(agent: &AgentId, disk: &DiskId) -> PathBuf {
    agent_pin_path(agent).join(pin_name(disk.as_str()))
}

/// The directory of an agent's trackers.
pub fn agent_pin_path(agent: &AgentId) -> PathBuf {
    Path::new(BPFFS).join("blxrep").join(pin_name(agent.as_str()))
}

fn pin_name(id: &str) -> String {
    id.replace('.', ":")
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

pub(crate) fn kernel(what: impl Into<String>, source: impl Into<io::Error>) -> TrackerError {
    TrackerError::Kernel { what: what.into(), source: source.into() }
}

fn lock_exclusively(path: &Path) -> Result<Flock<fs::File>, TrackerError> {
    let mut file =
        fs::File::open(path).map_err(|e| kernel(format!("{} cannot be opened", path.display()), e))?;
    let deadline = Instant::now() + Duration::from_millis(LOCK_WAIT_MS);
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((same, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = same,
            Err((_, Errno::EWOULDBLOCK)) => {
                let what = format!("the tracker in {} is in use by another process; stop it", path.display());
                return Err(kernel(what, Errno::EWOULDBLOCK));
            }
            Err((_, e)) => return Err(kernel(format!("{} cannot be locked", path.display()), e)),
        }
        sleep(Duration::from_millis(20));
    }
}

/// A pin directory, locked against every other process until it is dropped.
#[derive(Debug)]
pub(crate) struct PinDir {
    path: PathBuf,
    /// Held only for its lock.
    _lock: Flock<fs::File>,
}

impl PinDir {
    /// Makes the directory if it is missing, and locks it.
    pub(crate) fn make(path: &Path) -> Result<Self, TrackerError> {
        fs::create_dir_all(path).map_err(|e| kernel(format!("{} cannot be made", path.display()), e))?;
        if !is_bpffs(path) {
            let what = format!("{} is not in a bpffs; mount one on {BPFFS}", path.display());
            return Err(kernel(what, io::ErrorKind::Unsupported));
        }
        Self::lock(path)
    }

    /// Locks the directory; `None` if there is none.
    pub(crate) fn existing(path: &Path) -> Result<Option<Self>, TrackerError> {
        match fs::symlink_metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(kernel(format!("{} cannot be looked at", path.display()), e)),
            Ok(_) if !is_bpffs(path) => {
                let what = format!("{} is not in a bpffs, so nothing in it is removed", path.display());
                Err(kernel(what, io::ErrorKind::Unsupported))
            }
            Ok(_) => Self::lock(path).map(Some),
        }
    }

    fn lock(path: &Path) -> Result<Self, TrackerError> {
        Ok(Self { path: path.to_owned(), _lock: lock_exclusively(path)? })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes everything in the directory, which detaches what is pinned there.
    pub(crate) fn clear(&self) -> Result<(), TrackerError> {
        let failed = |path: &Path, e| kernel(format!("{} cannot be removed", path.display()), e);
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(|e| failed(&self.path, e))? {
            paths.push(entry.map_err(|e| failed(&self.path, e))?.path());
        }
        for path in paths {
            let is_dir = path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
            let gone = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            gone.map_err(|e| failed(&path, e))?;
        }
        Ok(())
    }

    /// Removes the directory with everything in it.
    pub(crate) fn remove(self) -> Result<(), TrackerError> {
        self.clear()?;
        fs::remove_dir(&self.path)
            .map_err(|e| kernel(format!("{} cannot be removed", self.path.display()), e))
    }

    /// Opens a pinned map, program or link; `None` if the file is missing or is none.
    ///
    /// # Errors
    /// When this process may not open it, or lacks memory or file descriptors: then nothing is known of the file.
    pub(crate) fn open(&self, name: &str) -> Result<Option<Pinned>, TrackerError> {
        let path = self.path.join(name);
        match bpf_obj_get(&path) {
            Ok(fd) => Pinned::new(fd).map(Some),
            Err(e @ (Errno::EPERM | Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)) => {
                Err(kernel(format!("the pinned {} cannot be opened", path.display()), e))
            }
            Err(_) => Ok(None),
        }
    }
}

/// BPF_OBJ_GET: opens what is pinned, whatever it is.
fn bpf_obj_get(path: &Path) -> Result<OwnedFd, Errno> {
    /// The head of `union bpf_attr` for BPF_OBJ_GET (linux/bpf.h); the kernel takes the rest as zeros.
    #[repr(C)]
    struct ObjGet {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    const BPF_OBJ_GET: libc::c_int = 7;
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let attr = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: attr is a valid head of bpf_attr of the given size and, like the path it points to, outlives the call;
    // the kernel only reads it.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attr, size_of::<ObjGet>()) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else has it. It is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An open map, program or link, and what the kernel says of it.
#[derive(Debug)]
pub(crate) struct Pinned {
    fd: OwnedFd,
    info: String,
}

impl Pinned {
    fn new(fd: OwnedFd) -> Result<Self, TrackerError> {
        let info = fd_info(fd.as_fd())?;
        Ok(Self { fd, info })
    }

    /// A number of the description, as of the opening.
    pub(crate) fn number(&self, key: &str) -> Option<u64> {
        number_in(&self.info, key)
    }

    /// How often the kernel skipped this program by now.
    pub(crate) fn recursion_misses(&self) -> Result<u64, TrackerError> {
        number_in(&fd_info(self.fd.as_fd())?, "recursion_misses").ok_or_else(|| {
            let what = "the kernel does not say how often it skipped the probe (recursion_misses in fdinfo)";
            kernel(what, io::ErrorKind::Unsupported)
        })
    }
}

impl AsFd for Pinned {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn fd_info(fd: BorrowedFd<'_>) -> Result<String, TrackerError> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    fs::read_to_string(&path).map_err(|e| kernel(format!("{path} cannot be read"), e))
}

fn number_in(info: &str, key: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_whole_key() {
        let info = "pos:\t0\nprog_type:\t26\nprog_id:\t36\nrecursion_misses:\t4\n";
        assert_eq!(number_in(info, "prog_id"), Some(36));
        assert_eq!(number_in(info, "recursion_misses"), Some(4));
        assert_eq!(number_in(info, "misses"), None);
        assert_eq!(number_in(info, "id"), None);
    }

    #[test]
    fn pin_paths_hold_no_dot_and_differ_where_ids_do() {
        let path = |a: &str, d: &str| pin_path(&a.parse().unwrap(), &d.parse().unwrap());
        assert_eq!(path("db.one", "wwn-1.2"), Path::new("/sys/fs/bpf/blxrep/db:one/wwn-1:2"));
        assert_ne!(path("a.b", "c"), path("a-b", "c"));
    }

    #[test]
    fn a_directory_outside_bpffs_is_refused_and_nothing_in_it_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "x").unwrap();
        assert!(PinDir::make(dir.path()).unwrap_err().to_string().contains("bpffs"));
        assert!(PinDir::existing(dir.path()).is_err());
        assert!(dir.path().join("mine").exists());
        assert!(PinDir::existing(&dir.path().join("none")).unwrap().is_none());
    }
}
