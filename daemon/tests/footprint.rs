//! What is found out about a real disk. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/mounts.rs"]
mod mounts;

use blxrep::agent::disk_id::disk_id;
use blxrep::agent::footprint::collect;
use mounts::LoopDisk;

#[test]
fn partitions_file_systems_and_mount_points_are_found() {
    let mut disk = LoopDisk::new(64, &[30, 20]);
    let point = disk.mkfs("ext4", &disk.part(1));
    let print = collect();
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let found = print.disks.iter().find(|d| d.path == text(&disk.path));
    let found = found.unwrap_or_else(|| panic!("the disk is missing: {:?}", print.problems));
    assert_eq!((found.size_bytes, found.partition_table.as_deref()), (64 << 20, Some("gpt")));
    let part = found.children.iter().find(|d| d.path == text(&disk.part(1))).unwrap();
    assert_eq!((part.fs_type.as_deref(), part.size_bytes), (Some("ext4"), 30 << 20));
    assert_eq!(part.mount_points, [text(&point)]);
    assert!(part.uuid.as_ref().is_some_and(|uuid| uuid.len() == 36));
    let id = disk_id(disk.path.file_name().unwrap().to_str().unwrap(), &disk.path);
    assert_eq!(id.to_string(), format!("gpt-{}", found.partition_table_id.as_ref().unwrap().to_lowercase()));
}
