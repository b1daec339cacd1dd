//! What sectors that cannot be read are called: in which partition and on which file system they lie.
//!
//! Asks sysfs and procfs only. What cannot be found out is left out: a disk that fails is said in any case.

use std::fs;
use std::path::Path;

use super::devices::{entries, read_number};
use super::mountinfo::DeviceNumber;
use super::topology::file_systems_on;
use crate::bitmap::{BlockSet, Extent};
use crate::geometry::Geometry;
use crate::unreadable::sectors;

/// The most ranges of sectors, and places, that are named: all of it must fit into a checkpoint's note.
const RANGES_NAMED_MAX: usize = 6;
const PLACES_NAMED_MAX: usize = 2;
/// The longest mount point that is named whole, in characters.
const MOUNT_POINT_MAX_CHARS: usize = 48;

/// A partition and what is mounted from it.
struct Partition {
    name: String,
    first_sector: u64,
    sectors: u64,
    number: DeviceNumber,
}

/// One sentence for these blocks of a disk, which could not be read.
pub fn describe(name: &str, disk: DeviceNumber, geometry: Geometry, blocks: &BlockSet) -> String {
    let places = places(Path::new("/sys"), name, disk, geometry, blocks);
    sentence(name, &sectors(blocks, geometry, RANGES_NAMED_MAX), &places)
}

fn sentence(name: &str, sectors: &str, places: &[String]) -> String {
    let mut text = format!("sectors {sectors} of {} could not be read: zeros", path(name));
    if let Some((last, others)) = places.split_last() {
        let lead = if others.is_empty() { String::new() } else { format!("{} and ", others.join(", ")) };
        text.push_str(&format!("; in {lead}{last}"));
    }
    text
}

/// Where such blocks lie, such as `/dev/sda1, ext4 on /srv`; the disk itself only if something is mounted from it.
fn places(sys: &Path, name: &str, disk: DeviceNumber, geometry: Geometry, blocks: &BlockSet) -> Vec<String> {
    let hit: Vec<Partition> = partitions(sys, disk)
        .into_iter()
        .filter(|part| blocks.extents(u64::MAX).any(|extent| part.holds(extent, geometry)))
        .collect();
    let mut places: Vec<String> = match hit.is_empty() {
        true => mounted_from(disk).map(|mounted| format!("{}{mounted}", path(name))).into_iter().collect(),
        false => hit
            .iter()
            .map(|part| format!("{}{}", path(&part.name), mounted_from(part.number).unwrap_or_default()))
            .collect(),
    };
    if let more @ 1.. = places.len().saturating_sub(PLACES_NAMED_MAX) {
        places.truncate(PLACES_NAMED_MAX);
        places.push(format!("{more} more"));
    }
    places
}

/// A device's path; sysfs writes `!` where its name has a slash.
fn path(name: &str) -> String {
    format!("/dev/{}", name.replace('!', "/"))
}

impl Partition {
    fn holds(&self, extent: Extent, geometry: Geometry) -> bool {
        let (start, len) = geometry.range(extent.first, extent.count);
        let end = self.first_sector.saturating_add(self.sectors);
        start / 512 < end && (start + len) / 512 > self.first_sector
    }
}

fn partitions(sys: &Path, disk: DeviceNumber) -> Vec<Partition> {
    let dir = sys.join("dev/block").join(disk.to_string());
    let read = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let partition = |dir: &Path| {
        dir.join("partition").exists().then_some(())?;
        Some(Partition {
            name: dir.file_name()?.to_string_lossy().into_owned(),
            first_sector: read(&dir.join("start"))?,
            sectors: read(&dir.join("size"))?,
            number: read_number(dir)?,
        })
    };
    let mut found: Vec<Partition> =
        entries(&dir).unwrap_or_default().iter().filter_map(|dir| partition(dir)).collect();
    found.sort_by_key(|part| part.first_sector);
    found
}

/// The first file system mounted from a device, directly or through LVM, md, crypt or loop.
fn mounted_from(number: DeviceNumber) -> Option<String> {
    let topology = file_systems_on(number.major, number.minor).ok()?;
    let mount = topology.mounts.first()?;
    let point: String = mount.mount_point.to_string_lossy().chars().take(MOUNT_POINT_MAX_CHARS).collect();
    Some(format!(", {} on {point}", mount.fs_type))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with a disk of two partitions: sectors 2048-4095 and 4096-8191.
    fn sysfs() -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let dir = sys.path().join("dev/block/4000:0");
        for (name, minor, start, size) in [("sdx1", 1, 2048, 2048), ("sdx2", 2, 4096, 4096)] {
            let dir = dir.join(name);
            fs::create_dir_all(&dir).unwrap();
            for (file, value) in [("partition", minor), ("start", start), ("size", size)] {
                fs::write(dir.join(file), format!("{value}\n")).unwrap();
            }
            fs::write(dir.join("dev"), format!("4000:{minor}\n")).unwrap();
        }
        fs::create_dir_all(dir.join("queue")).unwrap();
        sys
    }

    fn places_of(blocks: &[(u64, u64)]) -> Vec<String> {
        let (sys, geometry) = (sysfs(), Geometry::new(8 << 20, 12).unwrap());
        let blocks = blocks.iter().map(|(first, count)| Extent { first: *first, count: *count }).collect();
        places(sys.path(), "sdx", DeviceNumber { major: 4000, minor: 0 }, geometry, &blocks)
    }

    #[test]
    fn the_partitions_of_bad_blocks_are_named() {
        assert_eq!(places_of(&[(256, 1)]), ["/dev/sdx1"], "sectors 2048-2055");
        assert_eq!(places_of(&[(511, 1)]), ["/dev/sdx1"]);
        assert_eq!(places_of(&[(511, 2)]), ["/dev/sdx1", "/dev/sdx2"]);
        assert_eq!(places_of(&[(1023, 1)]), ["/dev/sdx2"]);
        assert!(places_of(&[(255, 1), (1024, 1)]).is_empty(), "before and behind all partitions");
    }

    #[test]
    fn a_sentence_names_all_that_is_known() {
        let places = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            sentence("sda", "2048-2055", &places(&["/dev/sda1, ext4 on /srv"])),
            "sectors 2048-2055 of /dev/sda could not be read: zeros; in /dev/sda1, ext4 on /srv"
        );
        let two = sentence("cciss!c0d0", "7", &places(&["/dev/a", "/dev/b", "3 more"]));
        assert_eq!(
            two,
            "sectors 7 of /dev/cciss/c0d0 could not be read: zeros; in /dev/a, /dev/b and 3 more"
        );
        assert_eq!(sentence("sda", "7", &[]), "sectors 7 of /dev/sda could not be read: zeros");
    }
}
