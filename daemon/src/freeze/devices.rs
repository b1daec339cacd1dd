//! The block devices that lie on a disk: its partitions, and what LVM, md, crypt and loop make of them (sysfs).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::mountinfo::DeviceNumber;

/// More layers than this are taken for an error.
const DEPTH_MAX: u32 = 32;

/// One block device on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    /// The kernel's name, such as `sda1` or `dm-3`.
    pub(super) name: String,
    /// How many layers are below it: 0 for the disk itself.
    pub(super) depth: u32,
    /// It is a partition.
    pub(super) partition: bool,
    /// Other devices lie on it.
    pub(super) has_upper: bool,
}

/// The devices on one disk, with the disk itself.
#[derive(Debug, Default)]
pub(super) struct Devices(BTreeMap<DeviceNumber, Device>);

impl Devices {
    /// Walks from the disk up. `sys` is `/sys`, but for tests.
    pub(super) fn on(sys: &Path, disk: DeviceNumber) -> io::Result<Self> {
        let mut devices = Self::default();
        devices.add(sys, disk, 0, false)?;
        Ok(devices)
    }

    /// Adds a device and all that lie on it. A device that is found twice keeps the greater depth.
    pub(super) fn add(
        &mut self,
        sys: &Path,
        number: DeviceNumber,
        depth: u32,
        partition: bool,
    ) -> io::Result<()> {
        if depth > DEPTH_MAX {
            return Err(io::Error::other(format!(
                "more than {DEPTH_MAX} block devices are stacked at {number}"
            )));
        }
        if self.0.get(&number).is_some_and(|known| known.depth >= depth) {
            return Ok(());
        }
        let link = sys.join("dev/block").join(number.to_string());
        let dir = fs::canonicalize(&link).map_err(|e| {
            io::Error::new(e.kind(), format!("{}: {e}: is there such a disk?", link.display()))
        })?;
        let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let upper = upper_devices(&dir)?;
        self.0.insert(number, Device { name, depth, partition, has_upper: !upper.is_empty() });
        for (upper, partition) in upper {
            self.add(sys, upper, depth + 1, partition)?;
        }
        Ok(())
    }

    /// The device of this number, if it lies on the disk.
    pub(super) fn get(&self, number: DeviceNumber) -> Option<&Device> {
        self.0.get(&number)
    }

    /// Notes that something (a loop device) lies on this device.
    pub(super) fn set_has_upper(&mut self, number: DeviceNumber) {
        if let Some(device) = self.0.get_mut(&number) {
            device.has_upper = true;
        }
    }

    /// All devices.
    pub(super) fn iter(&self) -> impl Iterator<Item = (DeviceNumber, &Device)> {
        self.0.iter().map(|(number, device)| (*number, device))
    }
}

/// Partitions and holders of the device whose sysfs directory this is; partitions with `true`.
fn upper_devices(dir: &Path) -> io::Result<Vec<(DeviceNumber, bool)>> {
    let mut upper = Vec::new();
    for path in entries(dir)? {
        if path.join("partition").exists() {
            upper.extend(read_number(&path).map(|n| (n, true)));
        }
    }
    for path in entries(&dir.join("holders"))? {
        // A holder that has gone since is no holder.
        upper.extend(read_number(&path).map(|n| (n, false)));
    }
    Ok(upper)
}

/// The number of the block device whose sysfs directory this is.
pub(super) fn read_number(dir: &Path) -> Option<DeviceNumber> {
    fs::read_to_string(dir.join("dev")).ok()?.parse().ok()
}

/// What is in a directory; nothing if it is not there.
pub(super) fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.map(|e| e.path())).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// A loop device and the file or device it shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Loop {
    /// The loop device.
    pub(super) number: DeviceNumber,
    /// The path when it was set up; may have gone since.
    pub(super) backing: PathBuf,
}

/// All loop devices in use.
pub(super) fn loops(sys: &Path) -> io::Result<Vec<Loop>> {
    let mut loops = Vec::new();
    for dir in entries(&sys.join("block"))? {
        let Ok(backing) = fs::read_to_string(dir.join("loop/backing_file")) else { continue };
        let backing = PathBuf::from(backing.trim_end_matches('\n'));
        loops.extend(read_number(&dir).map(|number| Loop { number, backing }));
    }
    Ok(loops)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn number(text: &str) -> DeviceNumber {
        text.parse().unwrap()
    }

    /// A sysfs with a disk `sda` of two partitions, an LV over both, and crypt on the LV.
    fn fake_sysfs() -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let root = sys.path();
        for (dir, dev) in [
            ("devices/sda", "8:0"),
            ("devices/sda/sda1", "8:1"),
            ("devices/sda/sda2", "8:2"),
            ("devices/dm-0", "253:0"),
            ("devices/dm-1", "253:1"),
            ("devices/sdb", "8:16"),
        ] {
            fs::create_dir_all(root.join(dir).join("holders")).unwrap();
            fs::write(root.join(dir).join("dev"), format!("{dev}\n")).unwrap();
            fs::create_dir_all(root.join("dev/block")).unwrap();
            symlink(root.join(dir), root.join("dev/block").join(dev)).unwrap();
        }
        for part in ["sda1", "sda2"] {
            fs::write(root.join("devices/sda").join(part).join("partition"), "1\n").unwrap();
            symlink(root.join("devices/dm-0"), root.join("devices/sda").join(part).join("holders/dm-0"))
                .unwrap();
        }
        symlink(root.join("devices/dm-1"), root.join("devices/dm-0/holders/dm-1")).unwrap();
        symlink(root.join("devices/gone"), root.join("devices/dm-1/holders/gone")).unwrap();
        sys
    }

    #[test]
    fn partitions_and_holders_are_found_through_all_layers() {
        let sys = fake_sysfs();
        let devices = Devices::on(sys.path(), number("8:0")).unwrap();
        let found: Vec<_> =
            devices.iter().map(|(n, d)| (n.to_string(), d.depth, d.partition, d.has_upper)).collect();
        let want = [("8:0", 0, false, true), ("8:1", 1, true, true), ("8:2", 1, true, true)];
        let want = want.into_iter().chain([("253:0", 2, false, true), ("253:1", 3, false, false)]);
        assert_eq!(found, want.map(|(n, d, p, u)| (n.to_owned(), d, p, u)).collect::<Vec<_>>());
    }

    #[test]
    fn a_ring_of_holders_ends_and_a_missing_disk_is_an_error() {
        let sys = fake_sysfs();
        symlink(sys.path().join("devices/dm-0"), sys.path().join("devices/dm-1/holders/dm-0")).unwrap();
        assert!(Devices::on(sys.path(), number("8:0")).is_err());
        assert!(Devices::on(sys.path(), number("8:32")).unwrap_err().to_string().contains("8:32"));
    }
}
