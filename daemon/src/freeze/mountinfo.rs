//! What `/proc/self/mountinfo` says (proc(5)): pure.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The number of a block device, or of a file system that has none of its own (major 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl DeviceNumber {
    /// Takes a `dev_t` apart, as stat(2) gives it.
    pub fn from_dev(dev: u64) -> Self {
        Self { major: libc::major(dev), minor: libc::minor(dev) }
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Text that is no `major:minor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a device number: major:minor")]
pub struct NotADeviceNumber;

impl FromStr for DeviceNumber {
    type Err = NotADeviceNumber;
    fn from_str(text: &str) -> Result<Self, NotADeviceNumber> {
        let (major, minor) = text.trim().split_once(':').ok_or(NotADeviceNumber)?;
        let number = |s: &str| s.parse::<u32>().map_err(|_| NotADeviceNumber);
        Ok(Self { major: number(major)?, minor: number(minor)? })
    }
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's id, as `/proc/self/fdinfo` names it too.
    pub mount_id: u64,
    /// The number of the file system (its super block).
    pub device: DeviceNumber,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// The type, such as `ext4`.
    pub fs_type: String,
    /// What was mounted: mostly a device's path.
    pub source: PathBuf,
    /// The file system (not only this mount of it) is read-only.
    pub read_only: bool,
}

/// All mounts; lines that are not understood are left out.
pub fn parse_mountinfo(text: &[u8]) -> Vec<MountEntry> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|b| *b == b' ');
    let text = |field: &[u8]| std::str::from_utf8(field).ok().map(str::to_owned);
    let mount_id = text(fields.next()?)?.parse().ok()?;
    let _parent = fields.next()?;
    let device = text(fields.next()?)?.parse().ok()?;
    let _root = fields.next()?;
    let mount_point = path(fields.next()?);
    let _mount_options = fields.next()?;
    // Any number of optional fields, up to a dash.
    fields.by_ref().find(|f| *f == b"-")?;
    let fs_type = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    let source = path(fields.next()?);
    let read_only = fields.next()?.split(|b| *b == b',').any(|option| option == b"ro");
    Some(MountEntry { mount_id, device, mount_point, fs_type, source, read_only })
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Undoes the kernel's octal escapes of blanks, tabs, newlines and backslashes (`\040`).
pub fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let digit = |i: usize| tail.get(i).filter(|d| (b'0'..=b'7').contains(d)).map(|d| u32::from(d - b'0'));
        let octal = match (digit(0), digit(1), digit(2)) {
            (Some(a), Some(b), Some(c)) if *first == b'\\' => u8::try_from(a * 64 + b * 8 + c).ok(),
            _ => None,
        };
        rest = match octal {
            Some(_) => tail.get(3..).unwrap_or_default(),
            None => tail,
        };
        out.push(octal.unwrap_or(*first));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    #[test]
    fn lines_of_every_shape_are_understood() {
        let text = b"36 35 98:0 /mnt1 /mnt\\0402\\134x rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
            37 35 0:44 /sub /b rw - btrfs /dev/loop\\0401 ro,space_cache\n\
            38 35 8:1048575 / /c ro,nosuid - xfs /dev/sda rw,ro_not,attr2\n\
            nonsense\n39 35 8:x / /c rw - xfs /dev/sda rw\n40 35 8:1 / /c rw shared:1\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].mount_point, Path::new("/mnt 2\\x"));
        assert_eq!((mounts[0].device, mounts[0].read_only), (DeviceNumber { major: 98, minor: 0 }, false));
        assert_eq!((mounts[1].fs_type.as_str(), mounts[1].read_only), ("btrfs", true));
        assert_eq!(mounts[1].source, Path::new("/dev/loop 1"));
        assert_eq!(
            (mounts[2].device.minor, mounts[2].read_only),
            (1_048_575, false),
            "only the mount is read-only"
        );
    }

    #[test]
    fn escapes_that_are_none_stay_as_they_are() {
        for (field, want) in
            [("\\04", "\\04"), ("\\", "\\"), ("\\999", "\\999"), ("a\\040", "a "), ("\\777", "\\777")]
        {
            assert_eq!(unescape(field.as_bytes()), want.as_bytes());
        }
    }

    proptest! {
        #[test]
        fn garbage_is_taken_without_a_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            parse_mountinfo(&text);
        }
    }
}
