//! Which file systems and other users are found on real disks. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/mounts.rs"]
mod mounts;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use blxrep::freeze::guard::Guard;
use blxrep::freeze::mountinfo::DeviceNumber;
use blxrep::freeze::topology::{Topology, file_systems_on, sync_all};
use mounts::{LoopDisk, is_frozen, run};

fn topology(disk: &LoopDisk) -> Topology {
    let DeviceNumber { major, minor } = disk.number();
    file_systems_on(major, minor).unwrap()
}

#[test]
fn a_disk_that_nobody_uses_holds_nothing() {
    let disk = LoopDisk::new(64, &[20, 20]);
    assert_eq!(topology(&disk), Topology::default());
}

#[test]
fn bind_mounts_count_once_and_a_covered_mount_point_is_avoided() {
    let mut disk = LoopDisk::new(64, &[]);
    let first = disk.mkfs("ext4", &disk.path.clone());
    let second = disk.mount(&["--bind", first.to_str().unwrap()]);
    assert_eq!(topology(&disk).mounts.len(), 1);
    disk.mount_on(&["-t", "tmpfs", "none"], &first);
    let found = topology(&disk);
    assert_eq!(found.mounts.len(), 1);
    assert_eq!(found.mounts[0].mount_point, second, "the first one leads to the tmpfs now");
    assert!(found.unfreezable.is_empty(), "{found:?}");
}

#[test]
fn read_only_file_systems_need_no_freeze() {
    let mut disk = LoopDisk::new(64, &[]);
    let point = disk.mkfs("ext4", &disk.path.clone());
    run("mount", &["-o", "remount,ro", point.to_str().unwrap()]);
    let found = topology(&disk);
    assert!(found.mounts[0].read_only && found.to_freeze().is_empty());
}

#[test]
fn a_btrfs_of_two_disks_is_on_both_and_its_subvolumes_count_once() {
    let mut one = LoopDisk::new(160, &[]);
    let two = LoopDisk::new(160, &[]);
    let path = |disk: &LoopDisk| disk.path.to_str().unwrap().to_owned();
    run("mkfs.btrfs", &["-q", "-f", &path(&one), &path(&two)]);
    let device = path(&one);
    let options = format!("device={},device={}", path(&one), path(&two));
    let point = one.mount(&["-t", "btrfs", "-o", &options, &device]);
    run("btrfs", &["-q", "subvolume", "create", point.join("sub").to_str().unwrap()]);
    one.mount(&["-t", "btrfs", "-o", "subvol=sub", &device]);
    let (found, other) = (topology(&one), topology(&two));
    assert_eq!((found.mounts.len(), found.unfreezable.len()), (1, 0), "{found:?}");
    assert_eq!(found, other);
    let mut guard = Guard::spawn(Path::new(env!("CARGO_BIN_EXE_blxrep")), &found.to_freeze()).unwrap();
    guard.freeze(Duration::from_secs(60)).unwrap();
    assert!(is_frozen(&found.mounts[0]));
    guard.thaw().unwrap();
    drop(guard);
    // Unmounted before its second disk goes away.
    drop(one);
}

#[test]
fn a_disk_in_a_file_on_the_disk_is_frozen_first() {
    let mut disk = LoopDisk::new(160, &[]);
    let point = disk.mkfs("ext4", &disk.path.clone());
    let mut inner = LoopDisk::at(&point.join("image"), &disk.dir.join("."), 64, &[], &[]);
    inner.dir = disk.dir.join("inner");
    std::fs::create_dir(&inner.dir).unwrap();
    let upper = inner.mkfs("ext4", &inner.path.clone());
    std::fs::write(upper.join("dirty"), vec![1; 8 << 20]).unwrap();
    let found = topology(&disk);
    let points: Vec<_> = found.mounts.iter().map(|m| m.mount_point.clone()).collect();
    assert_eq!(points, [upper, point], "upper layers first");
    // In the wrong order the second freeze would wait for the first one: the guard survives even that.
    let mut mounts = found.to_freeze();
    mounts.reverse();
    let mut guard = Guard::spawn(Path::new(env!("CARGO_BIN_EXE_blxrep")), &mounts).unwrap();
    assert!(guard.freeze(Duration::from_millis(800)).is_err());
    assert!(
        !found.mounts.iter().any(is_frozen),
        "what was caught last is thawed as well, by the living guard"
    );
    drop(guard);

    sync_all(&found).unwrap();
    let mut guard = Guard::spawn(Path::new(env!("CARGO_BIN_EXE_blxrep")), &found.to_freeze()).unwrap();
    guard.freeze(Duration::from_secs(60)).unwrap();
    assert!(found.mounts.iter().all(is_frozen));
    guard.thaw().unwrap();
    drop(guard);
    drop(inner);
}

#[test]
fn swap_and_unknown_users_cannot_be_frozen_and_are_named() {
    let mut disk = LoopDisk::new(96, &[20, 20, 20]);
    disk.swap_on(&disk.part(1));
    let holder = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(disk.part(3)).unwrap();
    let found = topology(&disk);
    let name = |index| disk.part(index).file_name().unwrap().to_string_lossy().into_owned();
    let who: Vec<_> = found.unfreezable.iter().map(|u| u.device.clone()).collect();
    assert!(found.unfreezable[0].reason.contains("swap"), "{found:?}");
    assert!(who.contains(&name(1)) && who.contains(&name(3)) && !who.contains(&name(2)), "{found:?}");
    drop(holder);
    assert!(topology(&disk).unfreezable.iter().all(|u| u.device != name(3)));
}
