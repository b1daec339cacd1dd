//! Where a restored image goes: a new file, a block device, or a file that somebody opened for it.
//!
//! What must never happen here: a regular file overwritten, a device written that something else uses, a temporary
//! file left behind, a part that looks like a whole image.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};
use tracing::info;

use super::RestoreError;
use super::verify::Tick;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, hash_blocks, is_zero};
use crate::reader::ahead::HashesAhead;
use crate::reader::{BlockReader, DirectReader};

/// Zeros are left out in pieces of this size: the block of most file systems.
const HOLE_BYTES: usize = 4096;
/// When so much is written, its way to the disk is begun, and that of as much before it is waited for: the disk is never idle, and
/// nobody who cancels waits for more than twice this.
const WRITE_BEHIND_BYTES: u64 = 32 << 20;
const PART: &str = "; the device holds only a part now: restore it again";

/// Where an image is to go.
#[derive(Debug)]
pub enum Output {
    /// A new file, or a block device that is not in use.
    Path(PathBuf),
    /// What the caller opened for reading and writing: an empty file, to be named by the caller when it is whole, or a
    /// block device, which the caller took for itself (`O_EXCL`).
    Open {
        /// The file.
        file: File,
        /// What it is called in messages.
        name: PathBuf,
    },
}

enum Kind {
    /// A block device.
    Device,
    /// A file of our own, under this name until it is whole.
    New(PathBuf),
    /// Somebody's file that was empty.
    Given,
}

/// The output under way.
pub(crate) struct Target {
    file: File,
    /// What the person named.
    path: PathBuf,
    kind: Kind,
    /// Whether blocks that are not written read as zeros.
    zeros: bool,
    /// Whether anything was written.
    touched: bool,
    /// Written, and not on its way to the disk.
    unsynced_bytes: u64,
    /// On its way, and not waited for: from the first of these bytes to before the second.
    behind: Range<u64>,
    finished: bool,
}

static COUNTER: AtomicU64 = AtomicU64::new(0);

impl Output {
    /// What the person named.
    pub(super) fn name(&self) -> &Path {
        match self {
            Self::Path(path) => path,
            Self::Open { name, .. } => name,
        }
    }

    /// Takes the output for an image of this size; nothing is written yet.
    ///
    /// # Errors
    /// Usage where it cannot be one, Io.
    pub(crate) fn open(self, size_bytes: u64) -> Result<Target, RestoreError> {
        match self {
            Self::Open { file, name } => Target::given(file, name, size_bytes),
            // A link to nowhere is not found, but has the name.
            Self::Path(path) => match path.metadata().or_else(|e| path.symlink_metadata().map_err(|_| e)) {
                Ok(meta) if meta.file_type().is_block_device() => Target::device(path, size_bytes),
                Ok(_) => Err(RestoreError::Usage(format!(
                    "{} is there already and is not overwritten: name another --output or remove it",
                    path.display()
                ))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Target::new_file(path, size_bytes),
                Err(e) => Err(RestoreError::output(&path, "look at it", e)),
            },
        }
    }
}

impl Target {
    fn new(file: File, path: PathBuf, kind: Kind) -> Self {
        let zeros = !matches!(kind, Kind::Device);
        Self { file, path, kind, zeros, touched: false, unsynced_bytes: 0, behind: 0..0, finished: false }
    }

    fn device(path: PathBuf, size_bytes: u64) -> Result<Self, RestoreError> {
        let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(&path);
        let file = open.map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => RestoreError::Usage(format!(
                "{} is in use (mounted, or part of LVM, md or the like): free it first",
                path.display()
            )),
            _ => RestoreError::output(&path, "open it", e),
        })?;
        // Asked of what is open: the name may mean something else by now.
        let kind = file.metadata().map_err(|e| RestoreError::output(&path, "look at it", e))?.file_type();
        if !kind.is_block_device() {
            return Err(RestoreError::Usage(format!("{} is no block device any more", path.display())));
        }
        Self::new(file, path, Kind::Device).large_enough(size_bytes)
    }

    fn large_enough(mut self, size_bytes: u64) -> Result<Self, RestoreError> {
        let has = self.file.seek(SeekFrom::End(0)).map_err(|e| self.failed("ask its size", e))?;
        if has < size_bytes {
            let text = format!("{} has {has} bytes, the checkpoint needs {size_bytes}", self.path.display());
            return Err(RestoreError::Usage(text));
        }
        Ok(self)
    }

    fn new_file(path: PathBuf, size_bytes: u64) -> Result<Self, RestoreError> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
        let name = name.ok_or_else(|| RestoreError::Usage(format!("{} names no file", path.display())))?;
        let unique =
            format!(".{name}.{}-{}.part", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let temporary = path.with_file_name(unique);
        let open = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&temporary);
        let file = open.map_err(|e| RestoreError::output(&path, "create it", e))?;
        Self::new(file, path, Kind::New(temporary)).make_long(size_bytes)
    }

    fn make_long(self, size_bytes: u64) -> Result<Self, RestoreError> {
        self.file.set_len(size_bytes).map_err(|e| self.failed("make it as long as the disk", e))?;
        Ok(self)
    }

    /// Nothing of it is changed before it is known to be one that may be.
    fn given(file: File, path: PathBuf, size_bytes: u64) -> Result<Self, RestoreError> {
        let refused = |why: &str| Err(RestoreError::Usage(format!("{} {why}", path.display())));
        let asked = fcntl(&file, FcntlArg::F_GETFL).map_err(io::Error::from);
        let asked = asked.and_then(|flags| Ok((OFlag::from_bits_retain(flags), file.metadata()?)));
        let (flags, meta) = asked.map_err(|e| RestoreError::output(&path, "look at it", e))?;
        let unfit = OFlag::O_APPEND | OFlag::O_DIRECT | OFlag::O_PATH;
        if flags & OFlag::O_ACCMODE != OFlag::O_RDWR || flags.intersects(unfit) {
            return refused("must be opened for reading and writing, without O_APPEND and O_DIRECT");
        }
        match meta.file_type() {
            kind if kind.is_block_device() => Self::new(file, path, Kind::Device).large_enough(size_bytes),
            kind if !kind.is_file() => refused("is neither a file nor a block device"),
            _ if meta.len() > 0 => refused("is not empty and is not overwritten: give an empty file"),
            _ => Self::new(file, path, Kind::Given).make_long(size_bytes),
        }
    }

    /// Lets the file begin as a copy of `base` that shares its space, where the file system can; `size_bytes` of it, with
    /// zeros behind it where it has less. True if it did.
    ///
    /// # Errors
    /// Io.
    pub(super) fn clone_from(&mut self, base: &Path, size_bytes: u64) -> Result<bool, RestoreError> {
        if !self.zeros {
            return Ok(false);
        }
        let Ok(base) = File::open(base) else { return Ok(false) };
        // SAFETY: FICLONE takes two open files by number and touches no memory of this process.
        let cloned = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::FICLONE, base.as_raw_fd()) } == 0;
        self.zeros = !cloned;
        // The base may be of a time when the disk had another size.
        self.file.set_len(size_bytes).map_err(|e| self.failed("make it as long as the disk", e))?;
        Ok(cloned)
    }

    /// Writes `data`, or `len` zeros without it; zeros where the target reads as zeros stay holes. Gives the bytes that
    /// were written.
    ///
    /// # Errors
    /// Io.
    pub(crate) fn put(&mut self, offset: u64, len: u64, data: Option<&[u8]>) -> Result<u64, RestoreError> {
        match data {
            None if self.zeros => Ok(0),
            None => self.write(&vec![0; len as usize], offset),
            Some(data) if !self.zeros => self.write(data, offset),
            Some(data) => {
                let pieces: Vec<&[u8]> = data.chunks(HOLE_BYTES).collect();
                let (mut at, mut written) = (0, 0);
                for same in pieces.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
                    let end = at + same.iter().map(|piece| piece.len()).sum::<usize>();
                    if let Some(part) = data.get(at..end).filter(|part| !is_zero(part)) {
                        written += self.write(part, offset + at as u64)?;
                    }
                    at = end;
                }
                Ok(written)
            }
        }
    }

    fn write(&mut self, data: &[u8], offset: u64) -> Result<u64, RestoreError> {
        self.touched = true;
        self.file.write_all_at(data, offset).map_err(|e| self.failed("write", e))?;
        let len = data.len() as u64;
        self.unsynced_bytes += len;
        if self.unsynced_bytes >= WRITE_BEHIND_BYTES {
            self.unsynced_bytes = 0;
            self.write_behind(offset + len).map_err(|e| self.failed("sync", e))?;
        }
        Ok(len)
    }

    /// Begins to bring to the disk what was written before `end`, and waits for what was begun the last time. What is written
    /// goes up, or begins anew after a cut: then the rest waits for the sync at the end.
    fn write_behind(&mut self, end: u64) -> io::Result<()> {
        let begun = self.behind.end.min(end)..end;
        sync_range(&self.file, &begun, libc::SYNC_FILE_RANGE_WRITE)?;
        let before = std::mem::replace(&mut self.behind, begun);
        let wait = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        sync_range(&self.file, &before, wait | libc::SYNC_FILE_RANGE_WRITE)?;
        // What is on its disk needs no memory: that is for what is written next, and for what else runs here.
        if let Some((offset, len)) = offset_and_len(&before) {
            let _ = posix_fadvise(&self.file, offset, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        Ok(())
    }

    /// Makes all durable, then reads these groups. `wrong` is given a group, its first block and the hashes of what
    /// it reads as, and names the first block that is not what it should be.
    ///
    /// # Errors
    /// ReadBack, Io; what `wrong` and `tick` say.
    pub(crate) fn read_back(
        &self,
        geometry: Geometry,
        groups: impl Iterator<Item = u64>,
        tick: Tick<'_>,
        mut wrong: impl FnMut(u64, u64, &[BlockHash]) -> Result<Option<u64>, RestoreError>,
    ) -> Result<(), RestoreError> {
        self.file.sync_all().map_err(|e| self.failed("sync", e))?;
        info!("{}: all is written, and is read back", self.path.display());
        // So that reading asks the disk, where it cannot go past the page cache. Only advice: what cannot be dropped is
        // compared as memory has it.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        let mut ahead = self.hashes_ahead(geometry);
        for group in groups {
            let (first, count) = geometry.group_extent(group);
            let found = match ahead.as_mut().and_then(|ahead| ahead.hashes(group)) {
                Some(found) => found,
                None => self.hashes(geometry, group)?,
            };
            if let Some(block) = wrong(group, first, &found)? {
                return Err(RestoreError::ReadBack { target: self.path.display().to_string(), block });
            }
            tick(geometry.range(first, count).1)?;
        }
        Ok(())
    }

    fn hashes(&self, geometry: Geometry, group: u64) -> Result<Vec<BlockHash>, RestoreError> {
        let (first, count) = geometry.group_extent(group);
        let (offset, len) = geometry.range(first, count);
        let mut data = vec![0; len as usize];
        self.file.read_exact_at(&mut data, offset).map_err(|e| self.failed("read back", e))?;
        Ok(hash_blocks(&data, geometry.block_bytes()))
    }

    /// Reads what the target holds as of now, past the page cache and a little ahead; `None` where that cannot be done.
    pub(crate) fn hashes_ahead(&self, geometry: Geometry) -> Option<HashesAhead> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        let reader = |_| Some(Box::new(DirectReader::open(&path, geometry).ok()?) as Box<dyn BlockReader>);
        HashesAhead::new((0..HashesAhead::readers()).map(reader).collect::<Option<_>>()?, geometry).ok()
    }

    /// Whether it is a device, which holds something already.
    pub(crate) fn is_device(&self) -> bool {
        matches!(self.kind, Kind::Device)
    }

    /// That it could not be noted that the device will hold only a part: then it is not written.
    pub(crate) fn not_noted(&self, source: io::Error) -> RestoreError {
        RestoreError::output(&self.path, "note that it will be written", source)
    }

    /// What a person must know of the target if the work ends here.
    pub(crate) fn hint(&self) -> &'static str {
        if self.is_device() && self.touched { PART } else { "" }
    }

    /// Adds to a cancel what it leaves behind.
    pub(crate) fn explain(&self, error: RestoreError) -> RestoreError {
        match error {
            RestoreError::Canceled { .. } => RestoreError::Canceled { hint: self.hint() },
            other => other,
        }
    }

    /// The image is whole. Gives a new file its name, durably, if nothing has that name meanwhile.
    ///
    /// # Errors
    /// Io.
    pub(crate) fn finish(mut self) -> Result<PathBuf, RestoreError> {
        if let Kind::New(temporary) = &self.kind {
            rename_new(temporary, &self.path).map_err(|e| self.failed("give it its name", e))?;
        }
        self.finished = true;
        if matches!(self.kind, Kind::New(_)) {
            let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let synced = File::open(parent).and_then(|dir| dir.sync_all());
            synced.map_err(|e| self.failed("sync its directory", e))?;
        }
        Ok(std::mem::take(&mut self.path))
    }

    fn failed(&self, what: &'static str, source: io::Error) -> RestoreError {
        match RestoreError::output(&self.path, what, source) {
            RestoreError::Output { target, what, source, hint: "" } => {
                RestoreError::Output { target, what, source, hint: self.hint() }
            }
            other => other,
        }
    }
}

/// As the kernel wants it; `None` where there is nothing, for a length of 0 means all there is.
fn offset_and_len(range: &Range<u64>) -> Option<(i64, i64)> {
    let len = i64::try_from(range.end - range.start).ok().filter(|len| *len > 0)?;
    Some((range.start.try_into().ok()?, len))
}

fn sync_range(file: &File, range: &Range<u64>, flags: libc::c_uint) -> io::Result<()> {
    let Some((offset, len)) = offset_and_len(range) else { return Ok(()) };
    // SAFETY: sync_file_range takes an open file by number and touches no memory of this process.
    nix::errno::Errno::result(unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, flags) })?;
    Ok(())
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
        let _ = match &self.kind {
            Kind::New(temporary) if !self.finished => std::fs::remove_file(temporary),
            Kind::Given if !self.finished => self.file.set_len(0),
            _ => Ok(()),
        };
    }
}
