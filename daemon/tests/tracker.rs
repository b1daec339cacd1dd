//! The tracker under a real kernel, on loop devices (request-based) and zram (bio-based). Needs root, bpffs, BPF, loop
//! and zram; fails where they are missing.

// Clippy lets only functions marked #[test] panic; the helpers of tests are to panic as well.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

#[path = "common/disks.rs"]
mod disks;

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use blxrep::bitmap::{BlockSet, Extent};
use blxrep::device::{BlockDevice, DeviceError};
use blxrep::ids::CheckpointId;
use blxrep::tracker::{BpfTracker, Gap, Tracker, TrackerError, mount_bpffs_if_missing, remove};
use disks::{Aligned, LoopDisk, Mounted, Random, ZramDisk, open_direct, read_direct, run, write_direct};

const MIB: u64 = 1 << 20;

/// A pin directory of this test alone, gone when dropped.
struct Pins(PathBuf);

impl Pins {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        mount_bpffs_if_missing().expect("these tests need root and bpffs");
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(format!("/sys/fs/bpf/blxrep-test/{}-{nth}", process::id()).into())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = remove(&self.0);
        let _ = fs::remove_dir("/sys/fs/bpf/blxrep-test");
    }
}

fn open(disk: &Path, shift: u8, pins: &Pins) -> BpfTracker {
    let device = BlockDevice::open(disk).unwrap();
    BpfTracker::open(&device, shift, &pins.0).unwrap()
}

fn blocks_of(offset: u64, len: u64, shift: u8) -> Extent {
    let first = offset >> shift;
    Extent { first, count: ((offset + len - 1) >> shift) + 1 - first }
}

fn id(second: i64) -> CheckpointId {
    CheckpointId::next(second, None)
}

/// Every block that differs must have been drained.
fn assert_all_changes_seen(before: &[u8], after: &[u8], drained: &BlockSet) {
    let pairs = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    let changed: Vec<_> = pairs.filter(|(_, (a, b))| a != b).map(|(block, _)| block as u64).collect();
    assert!(!changed.is_empty(), "the test changed nothing");
    let lost: Vec<_> = changed.iter().filter(|block| !drained.contains(**block)).collect();
    assert!(lost.is_empty(), "{} of {} changed blocks lost: {lost:?}", lost.len(), changed.len());
}

/// Random O_DIRECT writes from `sector_bytes` to 1 MiB are marked, these blocks and no other.
fn random_writes(tracked: &Path, written: &Path, start_bytes: u64, sector_bytes: u64, shift: u8) {
    let pins = Pins::new();
    let mut tracker = open(tracked, shift, &pins);
    let disk = open_direct(written);
    let size = size_bytes(written);
    let mut random = Random(u64::from(shift) + sector_bytes);
    let mut announced = 0;
    for round in 0..20 {
        tracker.drain().unwrap();
        let mut expected = BlockSet::new();
        for _ in 0..10 {
            let len = (1 + random.below(MIB / sector_bytes)) * sector_bytes;
            let offset = random.below((size - len) / sector_bytes) * sector_bytes;
            write_direct(&disk, offset, len as usize, round);
            expected.insert(blocks_of(start_bytes + offset, len, shift));
        }
        let mut missing = expected.clone();
        let drained = tracker.drain().unwrap();
        missing.subtract(&drained);
        if missing.is_empty() {
            assert_eq!(drained, expected, "round {round}: more than was written");
        } else {
            assert_loss_is_announced(&mut tracker, &missing);
            announced += 1;
        }
    }
    assert!(announced <= 2, "{announced} of 20 rounds lost something");
    assert!(announced > 0 || tracker.claim().unwrap().gap == Some(Gap::NewTracker), "a gap without a loss");
    assert!(tracker.written_bytes() > 0);
}

/// Some kernels leave out BPF programs without counting it (seen: a virtual machine whose kernel runs none while the
/// process of its host's agent is interrupted). That may cost a compare; it must never be silent.
fn assert_loss_is_announced(tracker: &mut BpfTracker, missing: &BlockSet) {
    let gap = tracker.claim().unwrap().gap;
    let extents: Vec<_> = missing.extents(u64::MAX).collect();
    assert!(matches!(gap, Some(Gap::Audit | Gap::SkippedRuns)), "lost without a gap ({gap:?}): {extents:?}");
}

fn size_bytes(path: &Path) -> u64 {
    run("blockdev", &["--getsize64", path.to_str().unwrap()]).parse().unwrap()
}

#[test]
fn direct_writes_are_marked_exactly() {
    let disk = LoopDisk::new(64 * MIB + 512);
    random_writes(&disk.path, &disk.path, 0, 512, 12);
    random_writes(&disk.path, &disk.path, 0, 512, 9);
    let disk = ZramDisk::new(64 * MIB);
    random_writes(&disk.path, &disk.path, 0, 4096, 12);
    random_writes(&disk.path, &disk.path, 0, 4096, 16);
}

#[test]
fn writes_to_a_partition_are_marked_on_the_disk() {
    let disk = LoopDisk::new(64 * MIB);
    let partition = disk.partition(2055, 65536);
    random_writes(&disk.path, &partition, 2055 * 512, 512, 12);
}

#[test]
fn buffered_writes_are_marked_when_they_reach_the_disk() {
    let disk = LoopDisk::new(64 * MIB);
    let pins = Pins::new();
    let mut tracker = open(&disk.path, 12, &pins);
    let before = fs::read(disk.file.path()).unwrap();
    let mut file = fs::OpenOptions::new().write(true).open(&disk.path).unwrap();
    for n in 0..200u64 {
        file.write_all_at(&[n as u8 + 1; 700], n * 300_001).unwrap();
    }
    file.flush().unwrap();
    file.sync_all().unwrap();
    assert_all_changes_seen(&before, &fs::read(disk.file.path()).unwrap(), &tracker.drain().unwrap());
}

/// A frozen file system, thawed when dropped.
struct Frozen<'a>(&'a Path);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = process::Command::new("fsfreeze").arg("-u").arg(self.0).status();
    }
}

/// A bit that is set while a write is on its way can be drained, and its block read, before the write has landed.
#[test]
fn a_write_is_not_marked_before_it_has_completed() {
    let outer = LoopDisk::new(64 * MIB);
    run("mkfs.ext4", &["-q", outer.name()]);
    let mounted = Mounted::new(&outer.path, "rw");
    let disk = LoopDisk::on(mounted.dir.path(), 16 * MIB);
    let pins = Pins::new();
    let mut tracker = open(&disk.path, 12, &pins);
    let before = tracker.drain().unwrap();
    assert!(before.is_empty(), "{before:?}");
    // What is written to the disk now waits below it.
    run("fsfreeze", &["-f", mounted.dir.path().to_str().unwrap()]);
    let frozen = Frozen(mounted.dir.path());
    let file = open_direct(&disk.path);
    let writer = thread::spawn(move || write_direct(&file, 5 * 4096, 4096, 7));
    let inflight = format!("/sys/block/{}/inflight", disk.path.file_name().unwrap().display());
    disks::wait_for("the write in flight", || {
        fs::read_to_string(&inflight).unwrap().split_whitespace().nth(1) == Some("1")
    });
    thread::sleep(Duration::from_millis(100));
    let on_its_way = tracker.drain().unwrap();
    drop(frozen);
    writer.join().unwrap();
    assert!(on_its_way.is_empty(), "marked while on its way: {on_its_way:?}");
    assert!(tracker.drain().unwrap().contains(5));
}

#[test]
fn discards_and_zeroes_are_marked() {
    let disk = LoopDisk::new(64 * MIB);
    let pins = Pins::new();
    let mut tracker = open(&disk.path, 12, &pins);
    for flags in [&[][..], &["-z"]] {
        for (offset, len) in [(4096, 4096), (8192, 20 * MIB), (MIB, 63 * MIB), (0, 64 * MIB)] {
            write_direct(&open_direct(&disk.path), offset, MIB as usize, 7);
            tracker.drain().unwrap();
            let (o, l) = (offset.to_string(), len.to_string());
            run("blkdiscard", &[&["-f", "-o", &o, "-l", &l], flags, &[disk.name()]].concat());
            let expected: BlockSet = [blocks_of(offset, len, 12)].into_iter().collect();
            assert_eq!(tracker.drain().unwrap(), expected, "{flags:?} {offset}+{len}");
        }
    }
    assert_eq!(tracker.claim().unwrap().gap, Some(Gap::NewTracker));
}

#[test]
fn a_discard_of_a_huge_disk_marks_all_of_it() {
    let disk = LoopDisk::new(64 << 30);
    for shift in [12, 9] {
        let pins = Pins::new();
        let mut tracker = open(&disk.path, shift, &pins);
        run("blkdiscard", &["-f", disk.name()]);
        let drained = tracker.drain().unwrap();
        assert_eq!(drained.extents(u64::MAX).collect::<Vec<_>>(), [blocks_of(0, 64 << 30, shift)]);
        assert_eq!(tracker.pending().unwrap(), drained);
        assert!(tracker.drain().unwrap().is_empty());
        assert_eq!(tracker.claim().unwrap().gap, Some(Gap::NewTracker));
    }
}

#[test]
fn everything_a_file_system_does_is_marked() {
    let disk = LoopDisk::new(128 * MIB);
    run("mkfs.ext4", &["-q", "-F", disk.name()]);
    let pins = Pins::new();
    let mut tracker = open(&disk.path, 12, &pins);
    let mut before = fs::read(disk.file.path()).unwrap();
    let mut step = |tracker: &mut BpfTracker, mounted: &Mounted| {
        run("sync", &["-f", mounted.dir.path().to_str().unwrap()]);
        let after = fs::read(disk.file.path()).unwrap();
        assert_all_changes_seen(&before, &after, &tracker.drain().unwrap());
        before = after;
    };
    let mounted = Mounted::new(&disk.path, "rw");
    let path = |name: &str| mounted.dir.path().join(name);
    for n in 0..50 {
        fs::write(path(&n.to_string()), vec![n; 300_000]).unwrap();
    }
    step(&mut tracker, &mounted);
    run("fallocate", &["-p", "-o", "8192", "-l", "200000", path("1").to_str().unwrap()]);
    (10..40).for_each(|n| fs::remove_file(path(&n.to_string())).unwrap());
    step(&mut tracker, &mounted);
    run("fstrim", &[mounted.dir.path().to_str().unwrap()]);
    step(&mut tracker, &mounted);
    assert_eq!(tracker.claim().unwrap().gap, Some(Gap::NewTracker));
}

#[test]
fn tracking_goes_on_while_nobody_has_it_open() {
    for bio_based in [false, true] {
        let (disk, zram) = (LoopDisk::new(16 * MIB), bio_based.then(|| ZramDisk::new(16 * MIB)));
        let path = zram.as_ref().map_or(&disk.path, |zram| &zram.path);
        let pins = Pins::new();
        let file = open_direct(path);
        let mut tracker = open(path, 12, &pins);
        assert!(!tracker.is_resumed());
        let epoch = tracker.claim().unwrap().epoch;
        write_direct(&file, 0, 4096, 1);
        write_direct(&file, 40960, 4096, 1);
        tracker.drain().unwrap();
        let count = tracker.gap_count();
        let keep = [Extent { first: 10, count: 1 }].into_iter().collect();
        tracker.commit(id(50), &keep, Some(tracker.gap_count())).unwrap();
        drop(tracker);
        write_direct(&file, 81920, 8192, 2);
        let mut tracker = open(path, 12, &pins);
        assert!(tracker.is_resumed());
        let claim = tracker.claim().unwrap();
        assert_eq!((claim.epoch, claim.base, claim.gap), (epoch, Some(id(50)), None));
        assert_eq!(tracker.gap_count(), count);
        assert_eq!(tracker.pending().unwrap(), keep);
        assert_eq!(tracker.drain().unwrap(), [Extent { first: 20, count: 2 }].into_iter().collect());
        assert_eq!(tracker.pending().unwrap().len(), 3);
    }
}

#[test]
fn a_gap_stays_until_it_is_healed() {
    let disk = LoopDisk::new(16 * MIB);
    let pins = Pins::new();
    let mut tracker = open(&disk.path, 12, &pins);
    tracker.commit(id(50), &BlockSet::new(), None).unwrap();
    assert_eq!(tracker.claim().unwrap().gap, Some(Gap::NewTracker));
    let compared = tracker.gap_count();
    tracker.order_compare().unwrap();
    tracker.commit(id(60), &BlockSet::new(), Some(compared)).unwrap();
    assert_eq!(tracker.claim().unwrap().gap, Some(Gap::Ordered), "raised behind the compare");
    tracker.commit(id(70), &BlockSet::new(), Some(tracker.gap_count())).unwrap();
    assert_eq!(tracker.claim().unwrap().gap, None);
}

#[test]
fn a_changed_size_is_a_gap_that_only_a_new_tracker_ends() {
    let disk = LoopDisk::new(16 * MIB);
    let pins = Pins::new();
    let mut tracker = open(&disk.path, 12, &pins);
    tracker.commit(id(50), &BlockSet::new(), Some(tracker.gap_count())).unwrap();
    let before = tracker.claim().unwrap();
    disk.file.as_file().set_len(32 * MIB).unwrap();
    run("losetup", &["-c", disk.name()]);
    let count = tracker.gap_count();
    assert_eq!(tracker.claim().unwrap().gap, Some(Gap::Resized));
    assert_eq!(tracker.gap_count(), count + 1);
    tracker.commit(id(60), &BlockSet::new(), Some(tracker.gap_count())).unwrap();
    assert_eq!(tracker.claim().unwrap().gap, Some(Gap::Resized), "the bitmap does not cover the new part");
    drop(tracker);
    let mut tracker = open(&disk.path, 12, &pins);
    let after = tracker.claim().unwrap();
    assert!(!tracker.is_resumed());
    assert_eq!((after.gap, after.base), (Some(Gap::NewTracker), None));
    assert_ne!(after.epoch, before.epoch);
}

#[test]
fn a_write_behind_the_old_end_is_a_gap_even_if_the_size_is_back() {
    let disk = LoopDisk::new(16 * MIB);
    let pins = Pins::new();
    let mut tracker = open(&disk.path, 12, &pins);
    tracker.commit(id(50), &BlockSet::new(), Some(tracker.gap_count())).unwrap();
    disk.file.as_file().set_len(32 * MIB).unwrap();
    run("losetup", &["-c", disk.name()]);
    write_direct(&open_direct(&disk.path), 20 * MIB, 4096, 1);
    disk.file.as_file().set_len(16 * MIB).unwrap();
    run("losetup", &["-c", disk.name()]);
    assert_eq!(tracker.claim().unwrap().gap, Some(Gap::Resized));
}

#[test]
fn another_medium_under_the_same_number_is_another_disk() {
    // Somebody else may take the number in between: then once more.
    for _ in 0..10 {
        let mut disk = LoopDisk::new(16 * MIB);
        let pins = Pins::new();
        let mut tracker = open(&disk.path, 12, &pins);
        tracker.commit(id(50), &BlockSet::new(), Some(tracker.gap_count())).unwrap();
        let before = tracker.claim().unwrap();
        let other = tempfile::NamedTempFile::new().unwrap();
        other.as_file().set_len(16 * MIB).unwrap();
        run("losetup", &["-d", disk.name()]);
        let again = process::Command::new("losetup").arg(&disk.path).arg(other.path()).status().unwrap();
        if !again.success() {
            // The device is not ours to detach any more.
            std::mem::forget(disk);
            continue;
        }
        disk.file = other;
        assert_eq!(tracker.claim().unwrap().gap, Some(Gap::MediumChanged), "while it is open");
        drop(tracker);
        let mut tracker = open(&disk.path, 12, &pins);
        assert!(!tracker.is_resumed());
        assert_ne!(tracker.claim().unwrap().epoch, before.epoch);
        return;
    }
    panic!("the loop device was taken by others ten times");
}

#[test]
fn other_block_size_is_another_tracker() {
    let disk = LoopDisk::new(16 * MIB);
    let pins = Pins::new();
    drop(open(&disk.path, 12, &pins));
    assert!(!open(&disk.path, 13, &pins).is_resumed());
    assert!(open(&disk.path, 13, &pins).is_resumed());
}

#[test]
fn a_tracker_that_lacks_any_part_begins_anew_and_works() {
    for bio_based in [false, true] {
        let (disk, zram) = (LoopDisk::new(16 * MIB), bio_based.then(|| ZramDisk::new(16 * MIB)));
        let path = zram.as_ref().map_or(&disk.path, |zram| &zram.path);
        let pins = Pins::new();
        let mut tracker = open(path, 12, &pins);
        let mut names: Vec<_> = fs::read_dir(&pins.0).unwrap().map(|e| e.unwrap().path()).collect();
        names.retain(|path| !path.ends_with("inflight"));
        assert_eq!(names.len(), if bio_based { 14 } else { 10 });
        for part in names {
            drop(tracker);
            fs::remove_file(&part).unwrap();
            tracker = open(path, 12, &pins);
            assert!(!tracker.is_resumed(), "{part:?}");
            write_direct(&open_direct(path), 4096, 4096, 1);
            assert_eq!(tracker.drain().unwrap(), [Extent { first: 1, count: 1 }].into_iter().collect());
        }
    }
}

#[test]
fn parts_of_another_tracker_are_not_taken_for_ours() {
    let (disk, other) = (LoopDisk::new(16 * MIB), LoopDisk::new(16 * MIB));
    let (pins, others) = (Pins::new(), Pins::new());
    drop(open(&disk.path, 12, &pins));
    drop(open(&other.path, 12, &others));
    for swap in
        [&["live"][..], &["meta"], &["pending"], &["rq_complete_a"], &["rq_complete_b", "rq_complete_b_link"]]
    {
        for name in swap {
            fs::remove_file(pins.0.join(name)).unwrap();
            fs::hard_link(others.0.join(name), pins.0.join(name)).unwrap();
        }
        assert!(!open(&disk.path, 12, &pins).is_resumed(), "{swap:?}");
        assert!(open(&disk.path, 12, &pins).is_resumed());
    }
    assert!(open(&other.path, 12, &others).is_resumed());
}

#[test]
fn garbage_in_the_pin_directory_is_removed() {
    let disk = LoopDisk::new(16 * MIB);
    let pins = Pins::new();
    fs::create_dir_all(pins.0.join("live/deep")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", pins.0.join("meta")).unwrap();
    let mut tracker = open(&disk.path, 12, &pins);
    assert_eq!(tracker.claim().unwrap().gap, Some(Gap::NewTracker));
    drop(tracker);
    assert!(open(&disk.path, 12, &pins).is_resumed());
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn a_tracker_has_one_user_and_can_be_removed() {
    let disk = LoopDisk::new(16 * MIB);
    let pins = Pins::new();
    let tracker = open(&disk.path, 12, &pins);
    let device = BlockDevice::open(&disk.path).unwrap();
    let second = BpfTracker::open(&device, 12, &pins.0).unwrap_err().to_string();
    assert!(second.contains("in use by another process"), "{second}");
    assert!(remove(&pins.0).is_err());
    drop(tracker);
    assert!(remove(&pins.0).unwrap());
    assert!(!pins.0.exists());
    assert!(!remove(&pins.0).unwrap());
}

#[test]
fn a_probe_that_is_gone_is_found_by_the_audit() {
    for bio_based in [false, true] {
        let (disk, zram) = (LoopDisk::new(16 * MIB), bio_based.then(|| ZramDisk::new(16 * MIB)));
        let path = zram.as_ref().map_or(&disk.path, |zram| &zram.path);
        let pins = Pins::new();
        let file = open_direct(path);
        let mut tracker = open(path, 12, &pins);
        tracker.commit(id(50), &BlockSet::new(), Some(tracker.gap_count())).unwrap();
        assert_eq!(tracker.claim().unwrap().gap, None);
        (0..100).for_each(|n| write_direct(&file, n * 4096, 4096, 3));
        run("blkdiscard", &["-f", "-o", "0", "-l", "1048576", path.to_str().unwrap()]);
        assert_eq!(tracker.claim().unwrap().gap, None, "all is counted");
        for entry in fs::read_dir(&pins.0).unwrap() {
            let pin = entry.unwrap().path();
            if pin.to_str().unwrap().ends_with("_link") {
                fs::remove_file(pin).unwrap();
            }
        }
        // The kernel detaches a moment after the last name is gone.
        thread::sleep(Duration::from_millis(500));
        tracker.drain().unwrap();
        write_direct(&file, 0, 4096, 4);
        assert!(tracker.drain().unwrap().is_empty(), "still attached");
        assert_eq!(tracker.claim().unwrap().gap, Some(Gap::Audit), "bio-based: {bio_based}");
        let count = tracker.gap_count();
        tracker.claim().unwrap();
        assert_eq!(tracker.gap_count(), count, "once");
    }
}

/// What is drained is read back afterwards. When the writers have stopped, the copy made that way is the disk. In many
/// short rounds: a write that was missed shows only if nothing is written over it.
fn copy_while_written(path: &Path) {
    const SIZE: u64 = 8 * MIB;
    let pins = Pins::new();
    let mut tracker = open(path, 12, &pins);
    let reader = open_direct(path);
    let mut copy = read_direct(&reader, 0, SIZE as usize).unwrap();
    let refresh = |tracker: &mut BpfTracker, copy: &mut [u8]| {
        for Extent { first, count } in tracker.drain().unwrap().extents(64) {
            let (start, len) = (first as usize * 4096, count as usize * 4096);
            copy[start..start + len].copy_from_slice(&read_direct(&reader, start as u64, len).unwrap());
        }
    };
    let mut announced = 0;
    for round in 0..30 {
        let writing = AtomicU64::new(2);
        thread::scope(|scope| {
            for writer in 0..2 {
                let writing = &writing;
                scope.spawn(move || {
                    write_noise(path, SIZE, round * 2 + writer + 1);
                    writing.fetch_sub(1, Ordering::SeqCst);
                });
            }
            while writing.load(Ordering::SeqCst) > 0 {
                refresh(&mut tracker, &mut copy);
            }
        });
        refresh(&mut tracker, &mut copy);
        let now = read_direct(&reader, 0, SIZE as usize).unwrap();
        let pairs = copy.chunks(4096).zip(now.chunks(4096)).zip(0..);
        let stale = pairs.filter(|((a, b), _)| a != b).map(|(_, first)| Extent { first, count: 1 });
        let missing: BlockSet = stale.collect();
        if !missing.is_empty() {
            assert_loss_is_announced(&mut tracker, &missing);
            announced += 1;
            copy = now;
        }
    }
    assert!(announced <= 2, "{announced} of 30 rounds lost something");
}

/// Thirty writes of up to 1 MiB. Noise, so that zram has to work on it: a write that takes time is caught in flight.
fn write_noise(path: &Path, size: u64, seed: u64) {
    let (disk, mut random) = (open_direct(path), Random(seed));
    let mut buffer = Aligned::new(256 * 4096);
    buffer.bytes().fill_with(|| random.below(256) as u8);
    for _ in 0..30 {
        let len = (1 + random.below(256)) * 4096;
        let offset = random.below((size - len) / 4096) * 4096;
        for block in buffer.bytes().chunks_mut(4096) {
            block[..8].copy_from_slice(&random.below(u64::MAX).to_le_bytes());
        }
        disk.write_all_at(&buffer.bytes()[..len as usize], offset).unwrap();
    }
}

#[test]
fn a_copy_made_from_drained_blocks_is_the_disk_request_based() {
    copy_while_written(&LoopDisk::new(8 * MIB).path);
}

#[test]
fn a_copy_made_from_drained_blocks_is_the_disk_bio_based() {
    copy_while_written(&ZramDisk::new(8 * MIB).path);
}

#[test]
fn writes_to_other_disks_are_not_marked() {
    let (disk, other) = (LoopDisk::new(16 * MIB), LoopDisk::new(16 * MIB));
    let pins = Pins::new();
    let mut tracker = open(&disk.path, 12, &pins);
    write_direct(&open_direct(&other.path), 0, 65536, 1);
    assert!(tracker.drain().unwrap().is_empty());
}

#[test]
fn what_is_no_whole_disk_is_refused() {
    let disk = LoopDisk::new(16 * MIB);
    let partition = disk.partition(2048, 8192);
    let refused = BlockDevice::open(&partition).unwrap_err();
    assert!(matches!(&refused, DeviceError::Partition { whole, .. } if *whole == disk.path), "{refused}");
    assert!(matches!(BlockDevice::open(disk.file.path()), Err(DeviceError::NotBlock { .. })));
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&disk.path, &link).unwrap();
    assert_eq!(BlockDevice::open(&link).unwrap(), BlockDevice::open(&disk.path).unwrap());
}

#[test]
fn blocks_smaller_than_sectors_are_refused() {
    let disk = ZramDisk::new(16 * MIB);
    let pins = Pins::new();
    let device = BlockDevice::open(&disk.path).unwrap();
    let refused = BpfTracker::open(&device, 9, &pins.0).unwrap_err();
    assert!(matches!(&refused, TrackerError::Unsuitable { reason, .. } if reason.contains("larger blocks")));
    assert!(!pins.0.exists());
}
