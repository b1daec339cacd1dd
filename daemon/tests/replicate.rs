//! Real disks, real file systems, running writers: every checkpoint is what the disk was while it was frozen.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod lab;
    pub(crate) mod writers;
}

use std::fs;

use common::lab::{Lab, PHOTOGRAPH, TRIM, mortal, run};
use common::writers::Writer;

/// One file system over a whole disk, written in every way at once.
fn file_system_under_writers(fs_type: &str, size_mib: u64, zram: bool) {
    let mut lab = Lab::new(fs_type);
    let mut disk = if zram { lab.zram_disk(size_mib) } else { lab.loop_disk(size_mib) };
    let path = disk.path.clone();
    let mount = disk.mkfs_mount(&lab, fs_type, &path);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.trimming_camera(&agent);
    lab.start_dispatcher(&["--sync-freq", "2s"]);
    let mut writers = vec![Writer::files(&mount)];
    for (engine, direct) in [("sync", false), ("libaio", true), ("mmap", false), ("io_uring", false)] {
        writers.push(Writer::fio(&mount, engine, direct));
    }
    let process = lab.start_agent(&agent, &[&path], &["--hooks-dir", &hooks]);
    lab.wait_checkpoints(&agent, &disk.name, 8, 120);
    assert!(writers.iter_mut().skip(1).all(|w| w.0.try_wait().unwrap().is_none()), "a writer died");
    drop(writers);
    drop(process);
    let rows = lab.show(&agent, Some(&disk.name));
    assert!(rows.iter().all(|row| row["consistency"] == "application"), "{rows:?}");
    assert!(lab.compare_all(&agent, &disk.name) >= 8);
}

#[test]
fn ext4() {
    file_system_under_writers("ext4", 256, false);
}

#[test]
fn xfs() {
    file_system_under_writers("xfs", 320, false);
}

#[test]
fn btrfs() {
    file_system_under_writers("btrfs", 320, false);
}

#[test]
fn zram_is_bio_based() {
    file_system_under_writers("ext4", 192, true);
}

/// Pauses raw writers around the freeze: a raw disk has nothing that could be frozen.
const PAUSE: &str = r#"case $1 in
pre-freeze) touch "$PHOTOS/pause"; for i in $(seq 200); do [ -e "$PHOTOS/paused" ] && exit 0; sleep 0.02; done; exit 1 ;;
post-thaw) rm -f "$PHOTOS/pause" "$PHOTOS/paused" ;;
esac"#;

#[test]
fn a_partitioned_disk_with_two_file_systems_and_a_raw_partition() {
    let mut lab = Lab::new("parts");
    let mut disk = lab.loop_disk(560);
    lab.partition(&disk, "label: gpt\n,100M\n,320M\n,\n");
    let (ext4, xfs, raw) = (disk.part(1), disk.part(2), disk.part(3));
    let ext4 = disk.mkfs_mount(&lab, "ext4", &ext4);
    let xfs = disk.mkfs_mount(&lab, "xfs", &xfs);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.hooks(&agent, &format!("{PAUSE}\n{TRIM}\n{PHOTOGRAPH}"));
    lab.start_dispatcher(&["--sync-freq", "2s"]);
    // 512 B writes, discards and write-zeroes on the raw partition, between the pauses.
    let script = r#"i=0; while :; do i=$((i+1)); if [ -e "$1/pause" ]; then : > "$1/paused"; sleep 0.02; continue; fi
dd if=/dev/urandom of="$0" bs=512 count=1 seek=$((i*7919%120000)) oflag=direct conv=notrunc status=none
dd if=/dev/urandom of="$0" bs=64k count=1 seek=$((i*31%900)) oflag=direct conv=notrunc status=none
[ $((i%5)) = 0 ] && blkdiscard -o $((i*37%60*1048576)) -l 524288 "$0"
[ $((i%7)) = 0 ] && blkdiscard -z -o $((i*13%60*1048576+4096)) -l 262144 "$0"; done"#;
    let raw_writer = mortal("sh").args(["-c", script, &raw, &lab.path("photos")]).spawn().unwrap();
    let writers =
        [Writer(raw_writer), Writer::files(&ext4), Writer::files(&xfs), Writer::fio(&xfs, "libaio", true)];
    let process = lab.start_agent(&agent, &[&disk.path], &["--hooks-dir", &hooks]);
    lab.wait_checkpoints(&agent, &disk.name, 8, 120);
    drop(process);
    drop(writers);
    assert!(lab.compare_all(&agent, &disk.name) >= 8);
    let id = lab.show(&agent, None)[0]["disk"].as_str().unwrap().to_owned();
    assert!(id.starts_with("gpt-"), "a disk with a GPT is named by it: {id}");
}

#[test]
fn discards_zeroes_and_a_block_that_comes_back() {
    let mut lab = Lab::new("raw");
    let disk = lab.loop_disk(64);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.camera(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let write = |byte: u8, offset_mib: u64| {
        let data = vec![byte; 4 << 20];
        let file = lab.path("data.bin");
        fs::write(&file, data).unwrap();
        let seek = format!("seek={offset_mib}");
        run(
            "dd",
            &[
                &format!("if={file}"),
                &format!("of={}", disk.path),
                "bs=1M",
                &seek,
                "oflag=direct",
                "status=none",
            ],
        );
    };
    write(b'A', 0);
    write(b'A', 32);
    let process = lab.start_agent(&agent, &[&disk.path], &["--hooks-dir", &hooks]);
    let mut count = 0;
    let mut next = || {
        // The second one from now began after everything that was written before.
        count = lab.show(&agent, Some(&disk.name)).len() + 2;
        lab.wait_checkpoints(&agent, &disk.name, count, 60);
    };
    next();
    write(b'B', 0);
    next();
    write(b'A', 0);
    next();
    run("blkdiscard", &["-o", "1048576", "-l", "2097152", &disk.path]);
    next();
    run("blkdiscard", &["-z", "-o", "34603008", "-l", "1052672", &disk.path]);
    next();
    run("blkdiscard", &[&disk.path]);
    next();
    drop(process);
    let rows = lab.show(&agent, Some(&disk.name));
    assert!(rows.iter().all(|row| row["consistency"] == "crash"), "{rows:?}");
    assert!(lab.compare_all(&agent, &disk.name) >= 12);
}

/// FITRIM takes no freeze protection (Linux, `ext4_trim_fs`, `xfs_ioc_trim`).
#[test]
fn a_trim_that_goes_through_a_freeze_is_in_the_next_checkpoint() {
    let mut lab = Lab::new("trim");
    let mut disk = lab.loop_disk(64);
    let path = disk.path.clone();
    let mount = disk.mkfs_mount(&lab, "ext4", &path);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let trim = format!(r#"[ "$1" != frozen ] || fstrim -v {} >>"$PHOTOS/trimmed""#, mount.display());
    let hooks = lab.hooks(&agent, &format!("{PHOTOGRAPH}\n{trim}"));
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let process = lab.start_agent(&agent, &[&path], &["--hooks-dir", &hooks]);
    let file = mount.join("file");
    for count in 1..5 {
        fs::write(&file, vec![b'x'; 4 << 20]).unwrap();
        run("sync", &["-f", mount.to_str().unwrap()]);
        fs::remove_file(&file).unwrap();
        lab.wait_checkpoints(&agent, &disk.name, count * 2, 60);
    }
    drop(process);
    let trimmed = fs::read_to_string(lab.path("photos/trimmed")).unwrap();
    assert!(trimmed.lines().filter(|line| !line.contains(": 0 B ")).count() >= 4, "{trimmed}");
    let rows = lab.show(&agent, None);
    assert!(rows.iter().all(|row| row["consistency"] == "application"), "{rows:?}");
    assert!(lab.compare_all(&agent, &disk.name) >= 8);
}

#[test]
fn two_agents_with_two_disks_each_at_once() {
    let mut lab = Lab::new("two");
    lab.start_dispatcher(&["--sync-freq", "2s"]);
    let mut disks = Vec::new();
    let mut processes = Vec::new();
    let mut writers = Vec::new();
    for name in ["agent1", "agent10"] {
        let agent = lab.agent(name);
        lab.enroll(&agent);
        let hooks = lab.camera(&agent);
        let mut pair = [lab.loop_disk(64), lab.loop_disk(64)];
        for disk in &mut pair {
            let path = disk.path.clone();
            writers.push(Writer::files(&disk.mkfs_mount(&lab, "ext4", &path)));
        }
        let paths = [pair[0].path.as_str(), pair[1].path.as_str()];
        processes.push(lab.start_agent(&agent, &paths, &["--hooks-dir", &hooks]));
        disks.extend(pair.map(|disk| (agent.clone(), disk)));
    }
    for (agent, disk) in &disks {
        lab.wait_checkpoints(agent, &disk.name, 3, 120);
    }
    drop((processes, writers));
    for (agent, disk) in &disks {
        assert!(lab.compare_all(agent, &disk.name) >= 3);
        assert!(lab.show(agent, None).iter().all(|row| row["agent"] == *agent));
    }
}
