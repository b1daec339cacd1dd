//! Which mounted file systems live on a disk, and what else uses it.
//!
//! What must never happen here: a user of the disk overlooked, so that a checkpoint claims more than is true.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::devices::{Device, Devices, entries, loops, read_number};
use super::mountinfo::{DeviceNumber, MountEntry, parse_mountinfo, unescape};
use super::mounts::{self, Mount};

/// A disk whose users could not be found out, or a file system that could not be synced.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct TopologyError {
    /// What was tried, and on what.
    pub what: String,
    /// What the kernel said.
    pub source: io::Error,
}

/// Something that uses the disk and cannot be frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfreezable {
    /// The device's name, such as `sda3`.
    pub device: String,
    /// Who uses it, or why that is not known.
    pub reason: String,
}

/// What lives on a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// The mounted file systems, each once, upper layers first: the order to freeze in.
    pub mounts: Vec<Mount>,
    /// Other users of the disk.
    pub unfreezable: Vec<Unfreezable>,
}

impl Topology {
    /// The file systems that are to be frozen, in this order: all that are not read-only.
    pub fn to_freeze(&self) -> Vec<Mount> {
        self.mounts.iter().filter(|m| !m.read_only).cloned().collect()
    }
}

/// What the kernel says about devices and mounts, read once.
struct Seen {
    sys: PathBuf,
    entries: Vec<MountEntry>,
    /// The devices of each mounted btrfs, with its UUID.
    btrfs: Vec<(String, BTreeSet<DeviceNumber>)>,
}

/// Every mounted file system on the whole disk `major:minor`: directly, on partitions, and through LVM, md, crypt and loop
/// devices; and what else uses the disk.
///
/// Only mounts of the caller's mount namespace can be seen; a file system mounted in another one only is in
/// `unfreezable`. To find users that sysfs does not name, devices that nobody seems to use are opened with O_EXCL
/// for an instant.
///
/// # Errors
/// When there is no such disk, or sysfs or procfs cannot be read.
pub fn file_systems_on(major: u32, minor: u32) -> Result<Topology, TopologyError> {
    let disk = DeviceNumber { major, minor };
    let failed = |source| TopologyError {
        what: format!("the file systems on disk {disk} cannot be found out"),
        source,
    };
    let seen = Seen::read().map_err(failed)?;
    let mut devices = Devices::on(&seen.sys, disk).map_err(failed)?;
    seen.add_loops(&mut devices).map_err(failed)?;
    let mut topology = seen.mounts_on(&devices);
    topology.unfreezable.extend(swaps_on(&devices, &topology.mounts, &seen.entries).map_err(failed)?);
    topology.unfreezable.extend(seen.other_users(&devices));
    Ok(topology)
}

/// Writes everything of every file system to the disk, as far as possible before a freeze.
///
/// # Errors
/// When a file system cannot be reached or written; the others are synced all the same.
pub fn sync_all(topology: &Topology) -> Result<(), TopologyError> {
    let mut result = Ok(());
    for mount in topology.mounts.iter().filter(|m| !m.read_only) {
        let synced = mount.open().and_then(|fd| Ok(mounts::sync(fd)?));
        if let Err(source) = synced {
            result = Err(TopologyError {
                what: format!("{} cannot be synced", mount.mount_point.display()),
                source,
            });
        }
    }
    result
}

impl Seen {
    fn read() -> io::Result<Self> {
        let sys = PathBuf::from("/sys");
        let entries = parse_mountinfo(&fs::read("/proc/self/mountinfo")?);
        let btrfs = btrfs_devices(&sys)?;
        Ok(Self { sys, entries, btrfs })
    }

    /// The block devices of a mount's file system.
    fn devices_of(&self, entry: &MountEntry) -> BTreeSet<DeviceNumber> {
        if entry.device.major != 0 {
            return BTreeSet::from([entry.device]);
        }
        // A file system of several devices (btrfs, bcachefs) has an anonymous number: its source says where it is.
        let source = entry.source.to_string_lossy();
        let paths = source.split(':').filter(|path| path.starts_with("/dev/"));
        let named: BTreeSet<DeviceNumber> = paths.filter_map(|path| block_number(Path::new(path))).collect();
        let all =
            self.btrfs.iter().filter(|(_, devices)| entry.fs_type == "btrfs" && !devices.is_disjoint(&named));
        named.iter().copied().chain(all.flat_map(|(_, devices)| devices.iter().copied())).collect()
    }

    /// How many layers are below a mount on this disk; `None` if it is not on it.
    fn depth(&self, entry: &MountEntry, devices: &Devices) -> Option<u32> {
        self.devices_of(entry).into_iter().filter_map(|n| devices.get(n)).map(|d| d.depth).max()
    }

    /// Adds loop devices that show a device of the disk, or a file on a file system of the disk.
    fn add_loops(&self, devices: &mut Devices) -> io::Result<()> {
        let mut rest = loops(&self.sys)?;
        loop {
            let mut found = false;
            let mut other = Vec::new();
            for candidate in rest {
                match self.lower_of(&candidate.backing, devices) {
                    Some((depth, below)) => {
                        found = true;
                        below.into_iter().for_each(|number| devices.set_has_upper(number));
                        devices.add(&self.sys, candidate.number, depth + 1, false)?;
                    }
                    None => other.push(candidate),
                }
            }
            if !found {
                return Ok(());
            }
            rest = other;
        }
    }

    /// The layer that holds a loop device's backing file, and the device if it is one.
    fn lower_of(&self, backing: &Path, devices: &Devices) -> Option<(u32, Option<DeviceNumber>)> {
        if let Some(number) = block_number(backing) {
            return devices.get(number).map(|d| (d.depth, Some(number)));
        }
        let mount_id = mounts::open_path(backing).and_then(|file| mounts::mount_id_of(&file)).ok()?;
        let entry = self.entries.iter().find(|e| e.mount_id == mount_id)?;
        self.depth(entry, devices).map(|depth| (depth, None))
    }

    /// The mounts on these devices, one for each file system, upper layers first.
    fn mounts_on(&self, devices: &Devices) -> Topology {
        let mut found: Vec<(u32, &MountEntry)> =
            self.entries.iter().filter_map(|e| self.depth(e, devices).map(|depth| (depth, e))).collect();
        found.sort_by_key(|(depth, entry)| (std::cmp::Reverse(*depth), entry.device, entry.mount_id));
        let mut topology = Topology::default();
        for same in found.chunk_by(|(_, a), (_, b)| a.device == b.device) {
            match same.iter().map(|(_, entry)| mount_of(entry)).find(|mount| mount.open().is_ok()) {
                Some(mount) => topology.mounts.push(mount),
                None => topology.unfreezable.extend(same.first().map(|(_, entry)| Unfreezable {
                    device: entry.source.display().to_string(),
                    reason: format!("mounted on {}, which cannot be opened", entry.mount_point.display()),
                })),
            }
        }
        topology
    }

    /// Users that are no mounts of ours.
    fn other_users(&self, devices: &Devices) -> Vec<Unfreezable> {
        let mounted: BTreeSet<DeviceNumber> = self.entries.iter().flat_map(|e| self.devices_of(e)).collect();
        let on_disk = |all: &BTreeSet<DeviceNumber>| all.iter().find_map(|n| devices.get(*n));
        let hidden =
            self.btrfs.iter().filter(|(_, all)| all.is_disjoint(&mounted)).filter_map(|(uuid, all)| {
                let device = on_disk(all)?.name.clone();
                Some(Unfreezable {
                    device,
                    reason: format!("btrfs {uuid} is mounted where it cannot be seen"),
                })
            });
        let hidden_devices: BTreeSet<DeviceNumber> =
            self.btrfs.iter().flat_map(|(_, all)| all).filter(|n| !mounted.contains(n)).copied().collect();
        let whole_is_mounted = devices.iter().any(|(n, d)| d.depth == 0 && mounted.contains(&n));
        let claimed = devices
            .iter()
            .filter(|(n, d)| !d.has_upper && !mounted.contains(n) && !hidden_devices.contains(n))
            // The kernel counts a claim of the whole disk as one of each partition.
            .filter(|(_, d)| !(d.partition && whole_is_mounted))
            .filter_map(|(number, device)| exclusive_user(number, device));
        hidden.chain(claimed).collect()
    }
}

pub(super) fn mount_of(entry: &MountEntry) -> Mount {
    Mount {
        mount_id: entry.mount_id,
        device: entry.device,
        mount_point: entry.mount_point.clone(),
        fs_type: entry.fs_type.clone(),
        read_only: entry.read_only,
    }
}

/// The number of the block device at a path; `None` if there is none.
fn block_number(path: &Path) -> Option<DeviceNumber> {
    let meta = fs::metadata(path).ok()?;
    meta.file_type().is_block_device().then(|| DeviceNumber::from_dev(meta.rdev()))
}

fn btrfs_devices(sys: &Path) -> io::Result<Vec<(String, BTreeSet<DeviceNumber>)>> {
    let mut found = Vec::new();
    for dir in entries(&sys.join("fs/btrfs"))? {
        let devices: BTreeSet<DeviceNumber> =
            entries(&dir.join("devices"))?.iter().filter_map(|device| read_number(device)).collect();
        if !devices.is_empty() {
            found.push((dir.file_name().unwrap_or_default().to_string_lossy().into_owned(), devices));
        }
    }
    Ok(found)
}

/// Who claims a device that seems to be free; `None` if nobody does.
fn exclusive_user(number: DeviceNumber, device: &Device) -> Option<Unfreezable> {
    let path = Path::new("/dev").join(device.name.replace('!', "/"));
    let user = |reason| Some(Unfreezable { device: device.name.clone(), reason });
    if block_number(&path) != Some(number) {
        return user(format!("{} is not there, so it is not known who uses it", path.display()));
    }
    let flags = libc::O_EXCL | libc::O_CLOEXEC | libc::O_NONBLOCK;
    match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
        Ok(_) => None,
        // No medium: nobody can write to it.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOMEDIUM | libc::ENXIO)) => None,
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            user("in use by something that is not a file system mounted here".to_owned())
        }
        Err(e) => user(format!("{}: {e}, so it is not known who uses it", path.display())),
    }
}

/// Swap partitions and swap files on the disk: the kernel writes to them whatever is frozen.
fn swaps_on(devices: &Devices, mounts: &[Mount], entries: &[MountEntry]) -> io::Result<Vec<Unfreezable>> {
    let text = match fs::read("/proc/swaps") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for path in swap_paths(&text) {
        let device = match block_number(&path) {
            Some(number) => devices.get(number).map(|d| d.name.clone()),
            None => mounts::open_path(&path)
                .and_then(|file| mounts::mount_id_of(&file))
                .ok()
                .and_then(|id| entries.iter().find(|e| e.mount_id == id))
                .filter(|entry| mounts.iter().any(|m| m.device == entry.device))
                .map(|entry| entry.source.display().to_string()),
        };
        found.extend(
            device.map(|device| Unfreezable { device, reason: format!("{} is swap", path.display()) }),
        );
    }
    Ok(found)
}

/// The paths in `/proc/swaps`: the first field of every line but the heading.
fn swap_paths(text: &[u8]) -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let lines = text.split(|b| *b == b'\n').skip(1);
    let fields =
        lines.filter_map(|line| line.split(u8::is_ascii_whitespace).next()).filter(|f| !f.is_empty());
    fields.map(|field| PathBuf::from(std::ffi::OsString::from_vec(unescape(field)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_files_with_blanks_are_found() {
        let text = b"Filename\t\t\t\tType\t\tSize\n/dev/sda3                               partition\t100\n/swap\\040file  file\t1\n";
        assert_eq!(swap_paths(text), [Path::new("/dev/sda3"), Path::new("/swap file")]);
        assert!(swap_paths(b"").is_empty());
    }

    #[test]
    fn a_disk_that_is_not_there_is_an_error_that_names_it() {
        let error = file_systems_on(4000, 9).unwrap_err().to_string();
        assert!(error.contains("4000:9"), "{error}");
    }

    #[test]
    fn several_devices_of_one_btrfs_and_mounts_without_a_device() {
        let number = |minor| DeviceNumber { major: 8, minor };
        let seen = Seen {
            sys: PathBuf::new(),
            entries: Vec::new(),
            btrfs: vec![("u".into(), [number(1), number(2)].into())],
        };
        let entry = |device, fs_type: &str, source: &str| MountEntry {
            mount_id: 1,
            device,
            mount_point: "/m".into(),
            fs_type: fs_type.into(),
            source: source.into(),
            read_only: false,
        };
        let anonymous = DeviceNumber { major: 0, minor: 50 };
        assert_eq!(seen.devices_of(&entry(number(7), "ext4", "/dev/nothing")), [number(7)].into());
        assert!(seen.devices_of(&entry(anonymous, "nfs", "host:/dev/null")).is_empty());
        assert!(seen.devices_of(&entry(anonymous, "proc", "proc")).is_empty());
    }
}
