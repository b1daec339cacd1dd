//! Reading past the page cache (O_DIRECT).
//!
//! Offset, length and memory are widened to the disk's logical sector, whatever the block. The page cache is not
//! asked, because it can hold newer bytes than the disk (a mounted file system's metadata) as well as older ones.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{BlockReader, ReadError, checked_range};
use crate::bitmap::Extent;
use crate::geometry::{GROUP_BYTES, Geometry};

/// Buffers are aligned to at least this, as the page cache's own are: every driver takes that.
const ALIGN_MIN_BYTES: usize = 4096;
/// The largest logical sector believed: what the block layer itself allows today (64 KiB).
const SECTOR_MAX_BYTES: usize = 64 << 10;

nix::ioctl_read_bad!(
    /// BLKSSZGET of linux/fs.h: the logical sector in bytes.
    blk_ssz_get,
    nix::request_code_none!(0x12, 104),
    libc::c_int
);

/// Reads a block device, or a regular file on a file system that can do O_DIRECT.
#[derive(Debug)]
pub struct DirectReader {
    file: File,
    path: PathBuf,
    geometry: Geometry,
    sector_bytes: usize,
    /// Longer than what is used, so that an aligned part can be cut out of it.
    buffer: Vec<u8>,
    /// Where the aligned part begins.
    start: usize,
}

impl DirectReader {
    /// Opens the device at `path`, of which `geometry` says size and blocks.
    ///
    /// # Errors
    /// When it cannot be opened with O_DIRECT, or is smaller than the geometry says (larger is fine: a disk that
    /// has just grown).
    pub fn open(path: &Path, geometry: Geometry) -> Result<Self, ReadError> {
        let failed = |source| ReadError::Open { device: path.display().to_string(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(path)
            .map_err(failed)?;
        let found_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if found_bytes < geometry.size_bytes() {
            let expected_bytes = geometry.size_bytes();
            return Err(ReadError::Smaller {
                device: path.display().to_string(),
                found_bytes,
                expected_bytes,
            });
        }
        let sector_bytes = sector_bytes(&file).map_err(failed)?;
        let align = sector_bytes.max(ALIGN_MIN_BYTES);
        // A MiB that does not begin at a sector's border needs two more sectors.
        let buffer = vec![0; GROUP_BYTES as usize + 2 * sector_bytes + align];
        let start = buffer.as_ptr().align_offset(align).min(align);
        Ok(Self { file, path: path.to_owned(), geometry, sector_bytes, buffer, start })
    }

    /// Fills the aligned buffer and says at which byte of the whole buffer the wanted ones begin.
    fn fill(&mut self, offset: u64, len: usize) -> io::Result<usize> {
        let sector = self.sector_bytes as u64;
        let aligned = offset - offset % sector;
        let skip = (offset - aligned) as usize;
        let want = skip + len;
        let widened = want.next_multiple_of(self.sector_bytes);
        let buffer = self.buffer.get_mut(self.start..self.start + widened).ok_or(ErrorKind::InvalidInput)?;
        let mut done = 0;
        while done < want {
            let rest = buffer.get_mut(done..).unwrap_or_default();
            match self.file.read_at(rest, aligned + done as u64) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                // Only whole sectors count, unless it is the end: O_DIRECT cannot go on in the middle of one.
                Ok(n) if done + n >= want => break,
                Ok(n) if n < self.sector_bytes => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n - n % self.sector_bytes,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(self.start + skip)
    }

    fn failed(&self, extent: Extent, source: io::Error) -> ReadError {
        let (device, Extent { first, count }) = (self.path.display().to_string(), extent);
        if is_medium_error(&source) {
            ReadError::Unreadable { device, first, count, source }
        } else {
            ReadError::Failed { device, first, count, source }
        }
    }
}

/// Whether the kernel says that these sectors are bad (blk_errors in block/blk-core.c of Linux), and not the device as a
/// whole. Older kernels say EIO for an unplugged disk as well.
fn is_medium_error(error: &io::Error) -> bool {
    let medium = [libc::EIO, libc::ENODATA, libc::EILSEQ, libc::EBADMSG, libc::EREMOTEIO];
    error.raw_os_error().is_some_and(|code| medium.contains(&code))
}

impl BlockReader for DirectReader {
    fn read(&mut self, extent: Extent) -> Result<&[u8], ReadError> {
        let (offset, len) = checked_range(extent, self.geometry)?;
        match self.fill(offset, len) {
            Ok(at) => Ok(self.buffer.get(at..at + len).unwrap_or_default()),
            Err(e) => Err(self.failed(extent, e)),
        }
    }
}

fn sector_bytes(file: &File) -> io::Result<usize> {
    if !file.metadata()?.file_type().is_block_device() {
        return Ok(ALIGN_MIN_BYTES);
    }
    let mut sector: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int to the address given, which outlives the call; the descriptor is open.
    unsafe { blk_ssz_get(file.as_raw_fd(), &raw mut sector) }?;
    usize::try_from(sector)
        .ok()
        .filter(|s| s.is_power_of_two() && (512..=SECTOR_MAX_BYTES).contains(s))
        .ok_or_else(|| io::Error::other(format!("a logical sector of {sector} bytes is not supported")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file on disk (not on tmpfs: that has O_DIRECT only since Linux 6.6) with a different byte at every place.
    fn sample(len: usize) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut data = vec![0; len];
        blake3::Hasher::new().update(b"disk").finalize_xof().fill(&mut data);
        let path = dir.path().join("disk");
        std::fs::write(&path, &data).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        (dir, path, data)
    }

    #[test]
    fn every_extent_is_what_the_file_holds_for_every_block_size() {
        let size = (1 << 20) + 3 * 4096 + 512;
        let (_dir, path, data) = sample(size);
        for shift in [9, 10, 12, 16, 20] {
            let geometry = Geometry::new(size as u64, shift).unwrap();
            let mut reader = DirectReader::open(&path, geometry).unwrap();
            let most = geometry.group_blocks();
            for first in [0, 1, 3, geometry.blocks() / 2, geometry.blocks() - 1] {
                for count in [1, 2, 7, most] {
                    let count = count.min(geometry.blocks().saturating_sub(first)).min(most);
                    let Some(extent) = (count > 0).then_some(Extent { first, count }) else { continue };
                    let (offset, len) = geometry.range(first, count);
                    let want = &data[offset as usize..(offset + len) as usize];
                    assert!(reader.read(extent).unwrap() == want, "2^{shift} {extent:?}");
                }
            }
        }
    }

    #[test]
    fn extents_that_are_not_on_the_disk_or_too_long_are_refused() {
        let (_dir, path, _) = sample(2 << 20);
        let mut reader = DirectReader::open(&path, Geometry::new(2 << 20, 12).unwrap()).unwrap();
        for (first, count) in
            [(0, 0), (512, 1), (511, 2), (0, 257), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)]
        {
            let seen = reader.read(Extent { first, count });
            assert!(matches!(seen, Err(ReadError::Extent { .. })), "{first}+{count}");
        }
    }

    #[test]
    fn a_device_that_became_smaller_is_refused_and_has_no_bad_blocks() {
        let (_dir, path, _) = sample(1 << 20);
        let larger = Geometry::new((1 << 20) + 512, 12).unwrap();
        assert!(matches!(DirectReader::open(&path, larger), Err(ReadError::Smaller { .. })));
        let mut reader = DirectReader::open(&path, Geometry::new(1 << 20, 12).unwrap()).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(10 * 4096 + 100).unwrap();
        assert!(reader.read(Extent { first: 0, count: 10 }).is_ok());
        let seen = reader.read(Extent { first: 5, count: 100 });
        assert!(matches!(seen, Err(ReadError::Failed { first: 5, count: 100, .. })), "{seen:?}");
    }

    #[test]
    fn a_bad_sector_is_told_from_a_device_that_is_gone() {
        let is = |code| is_medium_error(&io::Error::from_raw_os_error(code));
        assert!(is(libc::EIO) && is(libc::ENODATA) && is(libc::EILSEQ) && is(libc::EBADMSG));
        assert!(!is(libc::ENODEV) && !is(libc::ENXIO) && !is(libc::EACCES) && !is(libc::ENOMEM));
        assert!(!is_medium_error(&ErrorKind::UnexpectedEof.into()));
    }
}
