//! What clients wrote: whole blocks in a sparse file that lies over a checkpoint and is thrown away.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::bitmap::{BlockSet, Extent};
use crate::geometry::Geometry;
use crate::store::StoreError;
use crate::store::view::View;

/// The file's name in messages.
const NAME: &str = "the overlay";

/// Blocks that were written, over a checkpoint's.
pub(super) struct Overlay {
    file: File,
    geometry: Geometry,
    /// The blocks whose content is in the file, all of it. Held for writing while a block is half written.
    written: RwLock<BlockSet>,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> StoreError {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            StoreError::NoSpace { file: NAME.to_owned() }
        }
        _ => StoreError::Io { what, file: NAME.to_owned(), source },
    }
}

impl Overlay {
    /// Takes an empty regular file.
    pub(super) fn new(file: File, geometry: Geometry) -> io::Result<Self> {
        let meta = file.metadata()?;
        if !meta.is_file() || meta.len() > 0 {
            let text = "the overlay must be an empty regular file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        file.set_len(geometry.size_bytes())?;
        Ok(Self { file, geometry, written: RwLock::default() })
    }

    fn reading(&self) -> RwLockReadGuard<'_, BlockSet> {
        self.written.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> RwLockWriteGuard<'_, BlockSet> {
        self.written.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anything of this group was written.
    pub(super) fn holds(&self, group: u64) -> bool {
        let (first, count) = self.geometry.group_extent(group);
        let written = self.reading();
        (first..first + count).any(|block| written.contains(block))
    }

    /// Fills `buf` with what was written, and with the checkpoint's data where nothing was.
    pub(super) fn read_at(&self, view: &View, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let written = self.reading();
        let shift = self.geometry.block_shift();
        let (mut at, mut left) = (offset, buf);
        while !left.is_empty() {
            // As far as all blocks are of one kind.
            let is_written = written.contains(at >> shift);
            let mut end = ((at >> shift) + 1) << shift;
            while end - at < left.len() as u64 && written.contains(end >> shift) == is_written {
                end += 1 << shift;
            }
            let (part, rest) = left.split_at_mut((end - at).min(left.len() as u64) as usize);
            if is_written {
                self.file.read_exact_at(part, at).map_err(failed("read"))?;
            } else {
                view.read_at(at, part)?;
            }
            at += part.len() as u64;
            left = rest;
        }
        Ok(())
    }

    /// Keeps `data`.
    pub(super) fn write_at(&self, view: &View, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let put = || self.file.write_all_at(data, offset);
        self.change(view, offset, data.len() as u64, put)
    }

    /// Keeps zeros, which take no space.
    pub(super) fn write_zeros(&self, view: &View, offset: u64, len: u64) -> Result<(), StoreError> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let punch = || {
            let (start, count) =
                i64::try_from(offset).ok().zip(i64::try_from(len).ok()).ok_or(Errno::EINVAL)?;
            Ok(fallocate(&self.file, flags, start, count)?)
        };
        self.change(view, offset, len, punch)
    }

    /// Changes a range by `put`. The blocks at its ends are brought in whole first.
    fn change(
        &self,
        view: &View,
        offset: u64,
        len: u64,
        put: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), StoreError> {
        let size = self.geometry.size_bytes();
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let outside =
            || StoreError::Refused(format!("{len} bytes from {offset} are not on a disk of {size}"));
        let end = end.ok_or_else(outside)?;
        if len == 0 {
            return Ok(());
        }
        let shift = self.geometry.block_shift();
        let (first, last) = (offset >> shift, (end - 1) >> shift);
        let mut written = self.writing();
        for block in [first, last] {
            let (start, bytes) = self.geometry.range(block, 1);
            let is_whole = offset <= start && start + bytes <= end;
            if !is_whole && !written.contains(block) {
                let mut old = vec![0; bytes as usize];
                view.read_at(start, &mut old)?;
                self.file.write_all_at(&old, start).map_err(failed("write"))?;
                written.insert(Extent { first: block, count: 1 });
            }
        }
        put().map_err(failed("write"))?;
        written.insert(Extent { first, count: last - first + 1 });
        Ok(())
    }
}
