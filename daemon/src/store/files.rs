//! The only way the store touches files.
//!
//! Everything the store writes goes through [`Files`], so that a test can stand in for the file system, lose
//! what was not synced, fill up, or stop at any operation. Paths are relative to the data directory.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The operations on one open file.
pub trait StoreFile: Send + Sync {
    /// Fills `buf` from `offset`; reading behind the end is an error (`UnexpectedEof`).
    ///
    /// # Errors
    /// What pread(2) says.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`. Not durable before [`Self::sync`].
    ///
    /// # Errors
    /// What pwrite(2) says, `StorageFull` among it.
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes `len` bytes from `offset` read as zeros, freeing their space where the file system can; the file does
    /// not grow.
    ///
    /// # Errors
    /// What fallocate(2) or pwrite(2) says.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The next range at or after `offset` that may hold data, as (start, end); `None` if only holes follow.
    ///
    /// # Errors
    /// What lseek(2) says.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>>;
    /// The file's length in bytes.
    ///
    /// # Errors
    /// What fstat(2) says.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file is empty.
    ///
    /// # Errors
    /// What fstat(2) says.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts the file or makes it longer with a hole.
    ///
    /// # Errors
    /// What ftruncate(2) says.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes content and length durable (fdatasync(2)).
    ///
    /// # Errors
    /// What fdatasync(2) says. After an error the file's content is not known: open it again and recover.
    fn sync(&self) -> io::Result<()>;
}

/// How much fits into the file system of the data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this process may still use.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// The operations on the data directory.
pub trait Files: Send + Sync {
    /// Opens an existing file, for reading only or for writing too.
    ///
    /// # Errors
    /// What open(2) says.
    fn open(&self, path: &Path, write: bool) -> io::Result<Box<dyn StoreFile>>;
    /// Creates a file that must not exist yet, and the directories above it, durably. The file's own name is durable
    /// after [`Self::sync_dir`].
    ///
    /// # Errors
    /// What open(2) and mkdir(2) say.
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StoreFile>>;
    /// Renames within the data directory, replacing what is there. Durable after [`Self::sync_dir`] of the
    /// directory (of both, if it moves).
    ///
    /// # Errors
    /// What rename(2) says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file. Durable after [`Self::sync_dir`].
    ///
    /// # Errors
    /// What unlink(2) says.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable (fsync(2) of the directory).
    ///
    /// # Errors
    /// What fsync(2) says.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// The names in a directory, sorted; empty if there is no such directory.
    ///
    /// # Errors
    /// What readdir(3) says.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Whether the file exists.
    ///
    /// # Errors
    /// What stat(2) says.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// How much still fits.
    ///
    /// # Errors
    /// What statvfs(3) says.
    fn space(&self) -> io::Result<Space>;
}

/// The real file system under a data directory.
#[derive(Debug, Clone)]
pub struct RealFiles {
    root: PathBuf,
}

impl RealFiles {
    /// Files below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn make_dirs(&self, dir: &Path) -> io::Result<()> {
        let mut made = self.root.clone();
        for part in dir.components() {
            let parent = made.clone();
            made.push(part);
            match fs::create_dir(&made) {
                Ok(()) => fs::File::open(&parent)?.sync_all()?,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Files for RealFiles {
    fn open(&self, path: &Path, write: bool) -> io::Result<Box<dyn StoreFile>> {
        let file = fs::OpenOptions::new().read(true).write(write).open(self.root.join(path))?;
        Ok(Box::new(RealFile(file)))
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        if let Some(dir) = path.parent() {
            self.make_dirs(dir)?;
        }
        let file =
            fs::OpenOptions::new().read(true).write(true).create_new(true).open(self.root.join(path))?;
        Ok(Box::new(RealFile(file)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(self.root.join(from), self.root.join(to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.root.join(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        fs::File::open(self.root.join(dir))?.sync_all()
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.root.join(dir)) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut names = Vec::new();
        for entry in entries {
            // A name that is not text is none of ours.
            names.extend(entry?.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.root.join(path).try_exists()
    }

    fn space(&self) -> io::Result<Space> {
        let stat = nix::sys::statvfs::statvfs(&self.root)?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
        Ok(Space { free_bytes: bytes(stat.blocks_available()), total_bytes: bytes(stat.blocks()) })
    }
}

struct RealFile(fs::File);

impl StoreFile for RealFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(buf, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, count) = (as_off(offset)?, as_off(len)?);
        match fallocate(&self.0, flags, start, count) {
            Err(nix::errno::Errno::EOPNOTSUPP) => self.write_zeros(offset, len),
            other => Ok(other?),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        use nix::errno::Errno;
        use nix::unistd::{Whence, lseek};
        let start = match lseek(&self.0, as_off(offset)?, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let end = lseek(&self.0, start, Whence::SeekHole)?;
        Ok(Some((start.unsigned_abs(), end.unsigned_abs())))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

impl RealFile {
    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = vec![0; 1 << 20];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(zeros.len() as u64);
            let (zeros, _) = zeros.split_at(usize::try_from(part).unwrap_or(zeros.len()));
            self.0.write_all_at(zeros, offset + done)?;
            done += part;
        }
        Ok(())
    }
}

fn as_off(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}
