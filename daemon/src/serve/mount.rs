//! A checkpoint as files, over FUSE: `disk.img`, and `partN.img` for every partition of its table.
//!
//! The kernel keeps what it has read; nothing of it can change. What must never happen here: a file longer than what
//! lies on the disk, a thread that waits for the mount it serves.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, MountOption, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, Request, Session, SessionACL,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::stat::{SFlag, fstat, major, minor};

use super::POLL;
use super::image::Image;
use crate::partitions::{PartitionsError, partitions};

/// Requests answered at the same time.
const THREADS: usize = 4;
/// The most bytes of one read: the kernel asks for no more than this.
const READ_MAX_BYTES: u32 = 1 << 20;
/// How long the kernel may keep names and sizes: they never change.
const KEEP: Duration = Duration::from_secs(86_400);
/// How long the kernel's first question may take, in milliseconds: it asks when it mounts.
const FIRST_MAX_MS: u16 = 2000;
/// `/dev/fuse`.
const FUSE_DEVICE: (u64, u64) = (10, 229);

/// A part of the disk that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    name: String,
    first_byte: u64,
    size_bytes: u64,
}

/// The directory: what the kernel asks.
struct Files {
    named: Vec<Named>,
    /// When the checkpoint was taken.
    time: SystemTime,
    /// `None` when it has ended; the kernel may not know that yet.
    image: Arc<RwLock<Option<Arc<Image>>>>,
}

/// A mount that can be served.
pub struct Mount {
    session: Session<Files>,
    image: Arc<RwLock<Option<Arc<Image>>>>,
    warnings: Vec<String>,
}

impl Mount {
    /// Mounts at `dir`, as root or through fusermount3.
    ///
    /// # Errors
    /// What mount(2) or fusermount3 says.
    pub fn at(dir: &Path, image: Image) -> io::Result<Self> {
        let (files, warnings) = Files::new(image);
        let (name, kind) = ("blxrep".to_owned(), "blxrep".to_owned());
        let mut config = config();
        config.mount_options = vec![
            MountOption::FSName(name),
            MountOption::Subtype(kind),
            MountOption::RO,
            MountOption::NoSuid,
            MountOption::NoDev,
        ];
        let image = files.image.clone();
        Ok(Self { session: Session::new(files, dir, &config)?, image, warnings })
    }

    /// Takes a `/dev/fuse` that somebody else has opened and mounted. The kernel, not this process, says who may read.
    ///
    /// # Errors
    /// InvalidInput if it is something else; what reading from it says.
    pub fn of(fuse: OwnedFd, image: Image) -> io::Result<Self> {
        let stat = fstat(fuse.as_fd())?;
        let is_fuse = SFlag::from_bits_truncate(stat.st_mode).contains(SFlag::S_IFCHR)
            && (major(stat.st_rdev), minor(stat.st_rdev)) == FUSE_DEVICE;
        if !is_fuse {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "this is no open /dev/fuse"));
        }
        // The threads would not sleep while there is no question.
        if OFlag::from_bits_truncate(fcntl(fuse.as_fd(), FcntlArg::F_GETFL)?).contains(OFlag::O_NONBLOCK) {
            let text = "this /dev/fuse was opened with O_NONBLOCK: open it without";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        // What has a mount has a first question.
        let mut fds = [PollFd::new(fuse.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, FIRST_MAX_MS)?;
        let [fd] = fds;
        if fd.revents() != Some(PollFlags::POLLIN) {
            let text = "this /dev/fuse is not mounted, or serves something already";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let (files, warnings) = Files::new(image);
        let image = files.image.clone();
        Ok(Self { session: Session::from_fd(files, fuse, SessionACL::All, config())?, image, warnings })
    }

    /// What a person should know: why there are no partitions.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Serves until it is unmounted, or `is_canceled`, which is asked several times a second. A canceled mount stays
    /// where it is, and every read of it fails, until it is unmounted.
    ///
    /// # Errors
    /// What the kernel says; Interrupted if it was canceled.
    pub fn serve(self, is_canceled: &dyn Fn() -> bool) -> io::Result<()> {
        let Self { session, image, .. } = self;
        let (ended, end) = channel();
        // It waits in read(2) for the kernel, from where nothing but the unmount or the end of the process wakes it.
        thread::spawn(move || ended.send(session.run()));
        loop {
            match end.recv_timeout(POLL) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the mount's thread broke off"));
                }
                Err(RecvTimeoutError::Timeout) if is_canceled() => {
                    *image.write().unwrap_or_else(PoisonError::into_inner) = None;
                    return Err(io::ErrorKind::Interrupted.into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

fn config() -> Config {
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    config
}

/// The disk and its partitions; and what is wrong with its table.
fn named(image: &Image) -> (Vec<Named>, Vec<String>) {
    let size_bytes = image.size_bytes();
    let mut found = vec![Named { name: "disk.img".to_owned(), first_byte: 0, size_bytes }];
    let mut warnings = Vec::new();
    match partitions(|offset, into| image.read_at(offset, into), size_bytes) {
        Ok(parts) => found.extend(parts.into_iter().map(|part| Named {
            name: format!("part{}.img", part.number),
            first_byte: part.first_byte,
            size_bytes: part.size_bytes,
        })),
        Err(PartitionsError::Read(e)) => {
            warnings.push(format!("no partitions are shown: their table cannot be read: {}", e.desc()));
        }
        Err(e @ PartitionsError::Damaged) => warnings.push(format!("no partitions are shown: {e}")),
    }
    (found, warnings)
}

impl Files {
    fn new(image: Image) -> (Self, Vec<String>) {
        let (named, warnings) = named(&image);
        let time = UNIX_EPOCH.checked_add(Duration::from_millis(image.checkpoint().time_unix_ms));
        let image = Arc::new(RwLock::new(Some(Arc::new(image))));
        (Self { named, time: time.unwrap_or(UNIX_EPOCH), image }, warnings)
    }

    /// The file behind a number. 1 is the directory, its files follow.
    fn file(&self, ino: INodeNo) -> Option<&Named> {
        let at = u64::from(ino).checked_sub(2)?;
        self.named.get(usize::try_from(at).ok()?)
    }

    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match self.file(ino) {
            Some(file) => (FileType::RegularFile, 0o444, file.size_bytes),
            None if ino == INodeNo::ROOT => (FileType::Directory, 0o555, 0),
            None => return None,
        };
        Some(FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: self.time,
            mtime: self.time,
            ctime: self.time,
            crtime: self.time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn data(&self, ino: INodeNo, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let file = self.file(ino).ok_or(Errno::EISDIR)?;
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Errno::ENODEV)?;
        let len = file.size_bytes.saturating_sub(offset).min(u64::from(size.min(READ_MAX_BYTES)));
        let mut data = vec![0; len as usize];
        image
            .read_at(file.first_byte.saturating_add(offset), &mut data)
            .map_err(|e| Errno::from_i32(e as i32))?;
        Ok(data)
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Nothing is ever written. What is more than the kernel allows is answered with what it does.
        let _ = config.set_max_write(READ_MAX_BYTES);
        Ok(())
    }

    fn lookup(&self, _: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.named.iter().zip(2..).find(|(file, _)| OsStr::new(&file.name) == name);
        match found.and_then(|(_, ino)| self.attr(INodeNo(ino))) {
            Some(attr) => reply.entry(&KEEP, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Some(attr) => reply.attr(&KEEP, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readdir(&self, _: &Request, _ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let own = [(INodeNo::ROOT, FileType::Directory, "."), (INodeNo::ROOT, FileType::Directory, "..")];
        let files =
            self.named.iter().zip(2..).map(|(f, ino)| (INodeNo(ino), FileType::RegularFile, f.name.as_str()));
        let entries =
            own.into_iter().chain(files).zip(1..).skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for ((ino, kind, name), next) in entries {
            if reply.add(ino, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn open(&self, _: &Request, _ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match flags.acc_mode() {
            OpenAccMode::O_RDONLY => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            _ => reply.error(Errno::EROFS),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.data(ino, offset, size) {
            Ok(data) => reply.data(&data),
            Err(e) => reply.error(e),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;
    use crate::restore::tests::laid_open;

    #[test]
    fn a_descriptor_that_cannot_be_served_is_refused() {
        let refused = |fd: OwnedFd| {
            let (_dir, opened, _) = laid_open(0);
            let error = Mount::of(fd, Image::read_only(opened)).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            error.to_string()
        };
        let fuse = |flags| {
            File::options().read(true).write(true).custom_flags(flags).open("/dev/fuse").unwrap().into()
        };
        assert!(refused(tempfile::tempfile().unwrap().into()).contains("no open /dev/fuse"));
        assert!(refused(fuse(0)).contains("not mounted"));
        assert!(refused(fuse(libc::O_NONBLOCK)).contains("O_NONBLOCK"));
    }
}
