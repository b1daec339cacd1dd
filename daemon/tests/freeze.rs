//! Freezing real file systems on loop disks, and everything that can die meanwhile. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/mounts.rs"]
mod mounts;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blxrep::freeze::guard::{FreezeState, Guard, GuardError};
use blxrep::freeze::mountinfo::{DeviceNumber, parse_mountinfo};
use blxrep::freeze::mounts::Mount;
use blxrep::freeze::record::{Record, thaw_leftovers};
use blxrep::freeze::topology::{Topology, file_systems_on, sync_all};
use mounts::{LoopDisk, is_frozen, run, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LONG: Duration = Duration::from_secs(120);

fn exe() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_blxrep"))
}

fn topology(disk: &LoopDisk) -> Topology {
    let DeviceNumber { major, minor } = disk.number();
    file_systems_on(major, minor).unwrap()
}

fn send(signal: Signal, process_id: u32) {
    kill(Pid::from_raw(process_id as i32), signal).unwrap();
}

/// Stops every thread of a process, and comes back when they stand.
fn stop(process_id: u32) {
    send(Signal::SIGSTOP, process_id);
    wait_until("the process stands still", || {
        let threads = fs::read_dir(format!("/proc/{process_id}/task")).unwrap();
        threads
            .map(|t| fs::read_to_string(t.unwrap().path().join("stat")).unwrap())
            .all(|s| s.contains(") T "))
    });
}

/// Appends to a file, each time down to the disk, and counts.
struct Writer {
    count: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Writer {
    fn start(dir: &Path) -> Self {
        let (count, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let mut file = fs::File::create(dir.join("written")).unwrap();
        let shared = (Arc::clone(&count), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !shared.1.load(Ordering::SeqCst) {
                file.write_all(&[7; 5000]).unwrap();
                file.sync_data().unwrap();
                shared.0.fetch_add(1, Ordering::SeqCst);
            }
        });
        let writer = Self { count, stop, thread: Some(thread) };
        wait_until("the first write", || writer.count() > 0);
        writer
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

#[test]
fn a_writer_waits_from_freeze_to_thaw_and_goes_on() {
    for fs_type in ["ext4", "xfs", "btrfs"] {
        let mut disk = LoopDisk::new(320, &[]);
        let point = disk.mkfs(fs_type, &disk.path.clone());
        let found = topology(&disk);
        assert_eq!(found.mounts.len(), 1, "{fs_type}: {found:?}");
        assert_eq!((&found.mounts[0].mount_point, found.unfreezable.len()), (&point, 0), "{found:?}");
        sync_all(&found).unwrap();
        let writer = Writer::start(&point);
        let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
        assert!(!guard.still_frozen(), "nothing is frozen yet");
        let report = guard.freeze(LONG).unwrap();
        assert_eq!(report.mounts, [(point.clone(), FreezeState::Frozen)]);
        // One write may have been under way.
        thread::sleep(Duration::from_millis(20));
        let before = writer.count();
        thread::sleep(Duration::from_millis(300));
        assert_eq!(writer.count(), before, "{fs_type}: written while frozen");
        assert!(guard.still_frozen() && is_frozen(&found.mounts[0]));
        let report = guard.thaw().unwrap();
        assert!(!report.expired && report.frozen_for >= Duration::from_millis(320), "{report:?}");
        wait_until("the writer goes on", || writer.count() > before + 2);
        assert!(!guard.still_frozen());
    }
}

#[test]
fn the_guard_thaws_at_its_deadline_and_says_so() {
    let mut disk = LoopDisk::new(64, &[]);
    disk.mkfs("ext4", &disk.path.clone());
    let found = topology(&disk);
    let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
    let begin = Instant::now();
    guard.freeze(Duration::from_millis(1500)).unwrap();
    wait_until("the deadline", || !is_frozen(&found.mounts[0]));
    assert!(begin.elapsed() >= Duration::from_millis(1500));
    assert!(!guard.still_frozen());
    let report = guard.thaw().unwrap();
    assert!(report.expired && report.frozen_for >= Duration::from_millis(1500), "{report:?}");
}

#[test]
fn the_guard_thaws_on_sigterm() {
    let mut disk = LoopDisk::new(64, &[]);
    disk.mkfs("ext4", &disk.path.clone());
    let found = topology(&disk);
    let agent = Agent::freeze(&disk, &disk.dir.join("state"));
    // The agent stands still: it is not the one who thaws.
    stop(agent.child.id());
    send(Signal::SIGTERM, agent.guard_id);
    wait_until("the guard thaws", || !is_frozen(&found.mounts[0]));
}

#[test]
fn the_agent_thaws_when_the_guard_is_killed_or_stuck() {
    let mut disk = LoopDisk::new(64, &[]);
    disk.mkfs("ext4", &disk.path.clone());
    let found = topology(&disk);
    let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
    guard.freeze(LONG).unwrap();
    send(Signal::SIGKILL, guard.process_id().unwrap());
    wait_until("the agent thaws by itself", || !is_frozen(&found.mounts[0]));
    assert!(!guard.still_frozen());
    assert!(guard.thaw().unwrap().expired);
    drop(guard);

    let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
    guard.freeze(LONG).unwrap();
    stop(guard.process_id().unwrap());
    assert!(guard.thaw().unwrap().expired);
    assert!(!is_frozen(&found.mounts[0]));
}

#[test]
fn dropping_a_guard_thaws_and_leaves_no_process() {
    let mut disk = LoopDisk::new(64, &[]);
    disk.mkfs("ext4", &disk.path.clone());
    let found = topology(&disk);
    let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
    let process_id = guard.process_id().unwrap();
    guard.freeze(LONG).unwrap();
    drop(guard);
    assert!(!is_frozen(&found.mounts[0]));
    assert!(!Path::new(&format!("/proc/{process_id}")).exists());
}

#[test]
fn the_guard_is_in_its_own_session_with_locked_memory() {
    let mut disk = LoopDisk::new(64, &[]);
    disk.mkfs("ext4", &disk.path.clone());
    let guard = Guard::spawn(exe(), &topology(&disk).to_freeze()).unwrap();
    let id = guard.process_id().unwrap();
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let locked = status.lines().find_map(|l| l.strip_prefix("VmLck:")).unwrap();
    let locked_kib: u64 = locked.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(locked_kib > 1000, "{locked}");
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    let session = stat.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap();
    assert_eq!(session, id.to_string());
}

/// An agent in a process of its own, started by [`Agent::freeze`].
#[test]
#[ignore = "is started by other tests"]
fn helper_that_freezes_and_waits() {
    let var = |name: &str| PathBuf::from(std::env::var_os(name).expect("is started by other tests"));
    let disk: DeviceNumber = var("TEST_DISK").to_str().unwrap().parse().unwrap();
    let found = file_systems_on(disk.major, disk.minor).unwrap();
    let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
    Record::write(&var("TEST_STATE"), disk, &found.to_freeze()).unwrap();
    guard.freeze(LONG).unwrap();
    let ready = var("TEST_READY");
    fs::write(ready.with_extension("new"), guard.process_id().unwrap().to_string()).unwrap();
    fs::rename(ready.with_extension("new"), ready).unwrap();
    thread::sleep(LONG);
}

struct Agent {
    child: Child,
    guard_id: u32,
}

impl Agent {
    fn freeze(disk: &LoopDisk, state_dir: &Path) -> Self {
        let ready = disk.dir.join("ready");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "helper_that_freezes_and_waits"])
            .env("TEST_DISK", disk.number().to_string())
            .env("TEST_STATE", state_dir)
            .env("TEST_READY", &ready)
            .spawn()
            .unwrap();
        wait_until("the agent freezes", || ready.exists() || child.try_wait().unwrap().is_some());
        let guard_id = fs::read_to_string(ready).expect("the helper failed").parse().unwrap();
        Self { child, guard_id }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn the_guard_thaws_when_the_agent_is_killed() {
    let mut disk = LoopDisk::new(64, &[]);
    disk.mkfs("ext4", &disk.path.clone());
    let found = topology(&disk);
    let mut agent = Agent::freeze(&disk, &disk.dir.join("state"));
    assert!(is_frozen(&found.mounts[0]));
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    wait_until("the guard thaws", || !is_frozen(&found.mounts[0]));
    let guard = format!("/proc/{}/cmdline", agent.guard_id);
    wait_until("the guard ends", || !fs::read(&guard).is_ok_and(|line| line.ends_with(b"freeze-guard\0")));
}

#[test]
fn leftovers_of_a_double_death_are_thawed_even_if_the_record_is_on_the_frozen_disk() {
    let mut disk = LoopDisk::new(64, &[]);
    let state_dir = disk.mkfs("ext4", &disk.path.clone()).join("state");
    let found = topology(&disk);
    let agent = Agent::freeze(&disk, &state_dir);
    // Both stand still first, so that neither sees the other die.
    stop(agent.child.id());
    stop(agent.guard_id);
    for id in [agent.child.id(), agent.guard_id] {
        send(Signal::SIGKILL, id);
    }
    drop(agent);
    assert!(is_frozen(&found.mounts[0]), "the test is worth nothing if it is not frozen");
    // In a thread: what does not thaw would wait for ever for the removal of the record.
    let dir = state_dir.clone();
    let thawing = thread::spawn(move || thaw_leftovers(&dir));
    wait_until("the leftovers are thawed", || thawing.is_finished());
    assert_eq!(thawing.join().unwrap().unwrap(), [found.mounts[0].mount_point.clone()]);
    assert!(!is_frozen(&found.mounts[0]));
    assert_eq!(fs::read_dir(&state_dir).unwrap().count(), 0);
    assert!(thaw_leftovers(&state_dir).unwrap().is_empty());
}

#[test]
fn what_somebody_else_has_frozen_is_not_thawed() {
    let mut disk = LoopDisk::new(160, &[64, 64]);
    let points = [disk.mkfs("ext4", &disk.part(1)), disk.mkfs("ext4", &disk.part(2))];
    let found = topology(&disk);
    run("fsfreeze", &["--freeze", points[0].to_str().unwrap()]);
    let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
    let report = guard.freeze(LONG).unwrap();
    let state = |point: &PathBuf| report.mounts.iter().find(|m| m.0 == *point).unwrap().1;
    assert_eq!((state(&points[0]), state(&points[1])), (FreezeState::FrozenByAnother, FreezeState::Frozen));
    assert!(guard.still_frozen());
    assert!(!guard.thaw().unwrap().expired);
    drop(guard);
    let frozen: Vec<bool> = found.mounts.iter().map(is_frozen).collect();
    assert_eq!(frozen.iter().filter(|f| **f).count(), 1, "the other one's stays, ours is thawed");

    // The agent's own thaw after the guard's death knows it, too.
    let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
    guard.freeze(LONG).unwrap();
    send(Signal::SIGKILL, guard.process_id().unwrap());
    guard.thaw().unwrap();
    drop(guard);
    assert_eq!(found.mounts.iter().map(is_frozen).collect::<Vec<_>>(), frozen);
}

#[test]
fn a_freeze_that_somebody_else_has_ended_is_noticed() {
    let mut disk = LoopDisk::new(64, &[]);
    let point = disk.mkfs("ext4", &disk.path.clone());
    let found = topology(&disk);
    let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
    guard.freeze(LONG).unwrap();
    assert!(guard.still_frozen());
    run("fsfreeze", &["--unfreeze", point.to_str().unwrap()]);
    assert!(!guard.still_frozen());
    assert!(guard.thaw().unwrap().expired);
    assert!(!is_frozen(&found.mounts[0]));
}

#[test]
fn partitions_of_two_types_are_both_frozen_and_what_cannot_be_is_said() {
    let mut disk = LoopDisk::new(480, &[64, 320, 40]);
    disk.mkfs("ext4", &disk.part(1));
    disk.mkfs("xfs", &disk.part(2));
    let found = topology(&disk);
    assert_eq!((found.mounts.len(), found.unfreezable.len()), (2, 0), "{found:?}");
    let mut guard = Guard::spawn(exe(), &found.to_freeze()).unwrap();
    guard.freeze(LONG).unwrap();
    assert!(found.mounts.iter().all(is_frozen));
    guard.thaw().unwrap();
    assert!(!found.mounts.iter().any(is_frozen));
    drop(guard);

    // A tmpfs stands for vfat, which not every kernel has: neither can be frozen.
    let tmpfs = disk.mount(&["-t", "tmpfs", "none"]);
    let entries = parse_mountinfo(&fs::read("/proc/self/mountinfo").unwrap());
    let entry = entries.iter().find(|e| e.mount_point == tmpfs).unwrap();
    let mut mounts = found.to_freeze();
    mounts.insert(1, Mount { mount_id: entry.mount_id, mount_point: tmpfs.clone(), ..mounts[0].clone() });
    let mut guard = Guard::spawn(exe(), &mounts).unwrap();
    let report = guard.freeze(LONG).unwrap();
    assert!(report.mounts.contains(&(tmpfs, FreezeState::NotSupported)), "{report:?}");
    assert!(!guard.thaw().unwrap().expired);
    assert!(!found.mounts.iter().any(is_frozen));
}

#[test]
fn a_mount_point_that_leads_elsewhere_is_refused() {
    let mut disk = LoopDisk::new(64, &[]);
    let point = disk.mkfs("ext4", &disk.path.clone());
    let found = topology(&disk);
    disk.mount_on(&["-t", "tmpfs", "none"], &point);
    assert!(matches!(Guard::spawn(exe(), &found.to_freeze()), Err(GuardError::Open { .. })));
    let now = topology(&disk);
    assert!(now.mounts.is_empty() && now.unfreezable.len() == 1, "it is hidden: {now:?}");
}
