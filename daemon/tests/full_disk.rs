//! A data directory on a small file system that runs full: nothing lost, nothing half visible, reading goes on, and so
//! does everything else when there is space.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod lab;
}

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::lab::{BLXREP, Lab, TestDisk, run, wait_for};

/// A lab whose data directory is on a small file system.
struct Small {
    mount: PathBuf,
    _store: TestDisk,
    lab: Lab,
}

impl Small {
    fn new(name: &str, size_mib: u64) -> Self {
        let lab = Lab::new(name);
        let mut store = lab.loop_disk(size_mib);
        let path = store.path.clone();
        let mount = store.mkfs_mount(&lab, "ext4", &path);
        std::os::unix::fs::symlink(&mount, lab.path("data")).unwrap();
        Self { mount, _store: store, lab }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Before its file system is unmounted, however the test ends.
        self.lab.dispatcher = None;
    }
}

fn write_random(path: &str, mib: u64, seek_mib: u64) {
    let (of, count, seek) = (format!("of={path}"), format!("count={mib}"), format!("seek={seek_mib}"));
    run(
        "dd",
        &["if=/dev/urandom", &of, "bs=1M", &count, &seek, "oflag=direct", "conv=notrunc", "status=none"],
    );
}

/// Takes all space but so much.
fn fill(mount: &Path, leave_mib: u64) {
    let free = nix::sys::statvfs::statvfs(mount).unwrap();
    let bytes = (free.blocks_available() * free.fragment_size()).saturating_sub(leave_mib << 20);
    let ballast = mount.join("ballast");
    run("fallocate", &["-l", &bytes.max(1).to_string(), ballast.to_str().unwrap()]);
}

/// Takes the last byte, root's part as well.
fn fill_whole(mount: &Path) {
    let of = format!("of={}", mount.join("ballast").display());
    let _ = Command::new("dd")
        .args(["if=/dev/zero", &of, "bs=64k", "oflag=append", "conv=notrunc", "status=none"])
        .output();
}

fn empty(mount: &Path) {
    let _ = fs::remove_file(mount.join("ballast"));
}

fn dispatcher_log(lab: &Lab) -> String {
    lab.dispatcher.as_ref().unwrap().log()
}

/// Everything can be read: listed, verified, and restored as it was.
fn readable(lab: &Lab, agent: &str, disk: &TestDisk, count: usize) {
    let rows = lab.show(agent, None);
    assert_eq!(rows.len(), count, "{rows:?}");
    assert!(rows.iter().all(|row| row["consistency"] != "damaged"), "{rows:?}");
    let data = lab.path("data");
    run(BLXREP, &["dispatcher", "verify", "--agent", agent, "--data-dir", &data, "--checkpoint", "latest"]);
    lab.compare(agent, &disk.name, rows.last().unwrap()["checkpoint"].as_str().unwrap());
}

#[test]
fn syncs_stop_at_the_reserve_and_go_on_by_themselves() {
    let mut small = Small::new("fullsync", 256);
    let (lab, mount) = (&mut small.lab, &small.mount);
    let disk = lab.loop_disk(64);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.camera(&agent);
    write_random(&disk.path, 32, 0);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let process = lab.start_agent(&agent, &[&disk.path], &["--hooks-dir", &hooks]);
    lab.wait_checkpoints(&agent, &disk.name, 2, 60);
    for round in 0..3 {
        fill(mount, 6);
        write_random(&disk.path, 16, 10 + round);
        wait_for("the full disk to be said", 60, || {
            dispatcher_log(lab).matches("no space: up to ").count() as u64 == round + 1
        });
        let count = lab.show(&agent, None).len();
        // Tried again, said once, and the reserve is not eaten.
        std::thread::sleep(Duration::from_secs(4));
        write_random(&disk.path, 1, 40 + round);
        readable(lab, &agent, &disk, count);
        let log = dispatcher_log(lab);
        assert_eq!(log.matches("no space: up to ").count() as u64, round + 1, "{log}");
        let left = nix::sys::statvfs::statvfs(mount).unwrap();
        assert!(left.blocks_available() * left.fragment_size() > 1 << 20, "{left:?}");
        empty(mount);
        lab.wait_checkpoints(&agent, &disk.name, count + 2, 60);
        assert_eq!(dispatcher_log(lab).matches("there is space again").count() as u64, round + 1);
    }
    drop(process);
    let log = dispatcher_log(lab);
    assert_eq!(log.matches("full copy").count(), 1, "{log}");
    assert!(!log.contains("gap"), "{log}");
    lab.compare_all(&agent, &disk.name);
}

#[test]
fn a_disk_without_a_byte_left_loses_nothing_even_over_a_restart() {
    let mut small = Small::new("fullbyte", 128);
    let (lab, mount) = (&mut small.lab, &small.mount);
    let disk = lab.loop_disk(32);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.camera(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let process = lab.start_agent(&agent, &[&disk.path], &["--hooks-dir", &hooks]);
    lab.wait_checkpoints(&agent, &disk.name, 1, 60);
    for round in 0..4 {
        let writer = disk.path.clone();
        let writing = std::thread::spawn(move || {
            (0..8).for_each(|n| write_random(&writer, 1, (round * 5 + n * 3) % 31));
        });
        std::thread::sleep(Duration::from_millis(300 * round));
        fill_whole(mount);
        writing.join().unwrap();
        wait_for("the full disk to be said", 60, || dispatcher_log(lab).contains("no space"));
        let count = lab.show(&agent, None).len();
        if round % 2 == 1 {
            lab.dispatcher.as_mut().unwrap().kill();
            lab.start_dispatcher(&["--sync-freq", "1s"]);
            std::thread::sleep(Duration::from_secs(1));
        }
        readable(lab, &agent, &disk, lab.show(&agent, None).len());
        empty(mount);
        lab.wait_checkpoints(&agent, &disk.name, count + 2, 60);
    }
    drop(process);
    lab.compare_all(&agent, &disk.name);
}

#[test]
fn a_full_copy_that_finds_no_space_goes_on_from_there() {
    let mut small = Small::new("fullcopy", 160);
    let (lab, mount) = (&mut small.lab, &small.mount);
    let disk = lab.loop_disk(64);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.camera(&agent);
    write_random(&disk.path, 60, 0);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    fill(mount, 30);
    let process = lab.start_agent(&agent, &[&disk.path], &["--hooks-dir", &hooks]);
    wait_for("the copy to be said not to fit", 30, || {
        dispatcher_log(lab).contains("the copy may not fit: up to 64 MiB are needed")
    });
    wait_for("the full disk to be said", 60, || dispatcher_log(lab).contains("no space: up to "));
    write_random(&disk.path, 2, 20);
    std::thread::sleep(Duration::from_secs(3));
    assert!(lab.show(&agent, None).is_empty(), "half a copy is no checkpoint");
    let part = fs::metadata(lab.path(&format!("data/snapshot/{agent}/{}/copy.img.part", disk.name))).unwrap();
    let copied = (std::os::unix::fs::MetadataExt::blocks(&part) * 512) >> 20;
    assert!((15..40).contains(&copied), "{copied} MiB");
    empty(mount);
    lab.wait_checkpoints(&agent, &disk.name, 2, 60);
    drop(process);
    let log = dispatcher_log(lab);
    assert_eq!(log.matches("no space: up to ").count(), 1, "{log}");
    assert!(!log.contains("gap"), "{log}");
    lab.compare_all(&agent, &disk.name);
}
