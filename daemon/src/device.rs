//! A disk of this machine, as sysfs describes it.
//!
//! What must never happen here: a partition, a file or a missing path that passes for a disk.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

/// sysfs counts in sectors of 512 bytes, whatever the disk's own are.
const SECTOR_BYTES: u64 = 512;

/// A path that is not a usable disk.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Nothing can be found under this path.
    #[error("disk {path} cannot be opened: {source}; lsblk lists the disks there are")]
    Missing {
        /// The path as given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is something, but no block device.
    #[error("{path} is not a block device; give a disk such as /dev/sda")]
    NotBlock {
        /// The path as given.
        path: PathBuf,
    },
    /// It is a partition.
    #[error("{path} is a partition; give the whole disk, {whole}")]
    Partition {
        /// The path as given.
        path: PathBuf,
        /// The path of the disk it is part of.
        whole: PathBuf,
    },
    /// sysfs lacks an attribute, or it reads as nonsense.
    #[error("{path} cannot be read ({source}); was the disk removed, or is the kernel older than 5.15?")]
    Attribute {
        /// The attribute's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The kernel's counters of a disk, of those in `/sys/block/X/stat` that are used here
/// (Documentation/block/stat.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskStat {
    /// Sectors of 512 bytes written.
    pub sectors_written: u64,
    /// Sectors of 512 bytes discarded.
    pub sectors_discarded: u64,
}

/// Reads and writes (discards among them) that the kernel has begun and not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inflight {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// A whole disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// The kernel's name, such as `sda`; as in sysfs, so with `!` where the name has a `/`.
    pub name: String,
    /// The device node's path, symbolic links followed.
    pub path: PathBuf,
    /// The major number.
    pub major: u32,
    /// The first minor number.
    pub minor: u32,
    /// The kernel's number for this very medium, never used twice in one boot.
    pub diskseq: u64,
    /// The size in bytes when it was opened.
    pub size_bytes: u64,
    /// The smallest unit of I/O in bytes.
    pub logical_block_bytes: u32,
    /// Whether the disk has a request queue (SCSI, NVMe, virtio, loop); else it takes bios (dm, md, zram).
    pub request_based: bool,
    sysfs: PathBuf,
}

impl BlockDevice {
    /// Finds out what lies behind a path. Nothing is held open.
    ///
    /// # Errors
    /// When the path is missing, not a block device, a partition, or sysfs does not describe it.
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        let missing = |source| DeviceError::Missing { path: path.to_owned(), source };
        let real = fs::canonicalize(path).map_err(missing)?;
        let meta = fs::metadata(&real).map_err(missing)?;
        if !meta.file_type().is_block_device() {
            return Err(DeviceError::NotBlock { path: path.to_owned() });
        }
        let (major, minor) = (number(major(meta.rdev())), number(minor(meta.rdev())));
        let sysfs = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).map_err(missing)?;
        if sysfs.join("partition").exists() {
            let whole = sysfs.parent().map(base_name).unwrap_or_default();
            let whole = Path::new("/dev").join(whole.replace('!', "/"));
            return Err(DeviceError::Partition { path: path.to_owned(), whole });
        }
        let mut device = Self {
            name: base_name(&sysfs),
            path: real,
            major,
            minor,
            diskseq: 0,
            size_bytes: 0,
            logical_block_bytes: 0,
            request_based: sysfs.join("mq").is_dir(),
            sysfs,
        };
        device.diskseq = device.diskseq_now()?;
        device.size_bytes = device.size_bytes_now()?;
        device.logical_block_bytes = device.numbers::<1>("queue/logical_block_size")?[0] as u32;
        Ok(device)
    }

    /// The size in bytes as of now.
    ///
    /// # Errors
    /// When sysfs cannot be read.
    pub fn size_bytes_now(&self) -> Result<u64, DeviceError> {
        let [sectors] = self.numbers("size")?;
        Ok(sectors.saturating_mul(SECTOR_BYTES))
    }

    /// The number of the medium as of now.
    ///
    /// # Errors
    /// When sysfs cannot be read.
    pub fn diskseq_now(&self) -> Result<u64, DeviceError> {
        let [diskseq] = self.numbers("diskseq")?;
        Ok(diskseq)
    }

    /// What is in flight as of now.
    ///
    /// # Errors
    /// When sysfs cannot be read.
    pub fn inflight(&self) -> Result<Inflight, DeviceError> {
        let [reads, writes] = self.numbers("inflight")?;
        Ok(Inflight { reads, writes })
    }

    /// The kernel's counters as of now. They stand still while `queue/iostats` is 0.
    ///
    /// # Errors
    /// When sysfs cannot be read.
    pub fn stat(&self) -> Result<DiskStat, DeviceError> {
        let [.., sectors_written, _, _, _, _, _, _, sectors_discarded] = self.numbers::<14>("stat")?;
        Ok(DiskStat { sectors_written, sectors_discarded })
    }

    /// The text of an attribute such as `queue/zoned`, trimmed; `None` if this kernel or driver has none of that name.
    pub fn attribute(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.sysfs.join(name)).ok().map(|text| text.trim().to_owned())
    }

    /// The disk's directory in sysfs.
    pub fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    /// The first N numbers of an attribute.
    fn numbers<const N: usize>(&self, name: &str) -> Result<[u64; N], DeviceError> {
        let path = self.sysfs.join(name);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) => return Err(DeviceError::Attribute { path, source }),
        };
        parse_numbers(&text).ok_or_else(|| {
            let source = io::Error::new(io::ErrorKind::InvalidData, "not the numbers that should be there");
            DeviceError::Attribute { path, source }
        })
    }
}

fn parse_numbers<const N: usize>(text: &str) -> Option<[u64; N]> {
    let numbers: Option<Vec<u64>> = text.split_ascii_whitespace().take(N).map(|n| n.parse().ok()).collect();
    numbers?.try_into().ok()
}

fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Device numbers have at most 32 bits each (Linux uses 12 and 20).
fn number(part: u64) -> u32 {
    u32::try_from(part).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_disk_is_refused_with_the_reason() {
        let missing = BlockDevice::open(Path::new("/dev/no-such-disk")).unwrap_err().to_string();
        assert!(missing.contains("/dev/no-such-disk") && missing.contains("lsblk"), "{missing}");
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(BlockDevice::open(file.path()), Err(DeviceError::NotBlock { .. })));
        assert!(matches!(BlockDevice::open(Path::new("/dev/null")), Err(DeviceError::NotBlock { .. })));
    }

    #[test]
    fn attributes_are_numbers_or_an_error() {
        assert_eq!(parse_numbers::<2>("  3   4 5\n"), Some([3, 4]));
        assert_eq!(parse_numbers::<2>("3\n"), None);
        assert_eq!(parse_numbers::<1>("-3\n"), None);
        assert_eq!(parse_numbers::<1>("99999999999999999999\n"), None);
        assert_eq!(parse_numbers::<1>(""), None);
    }
}
