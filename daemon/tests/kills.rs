//! Daemons killed at random moments, machines that lose their trackers in mid-write: the next checkpoint is what the disk
//! was, and what did not change is not sent.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod lab;
    pub(crate) mod meter;
    pub(crate) mod writers;
}

use std::fs;
use std::time::Duration;

use common::lab::{Lab, run};
use common::meter::Meter;
use common::writers::Writer;

/// `BLXREP_KILLS=100` kills a hundred times (`make soak`).
fn kills() -> u64 {
    std::env::var("BLXREP_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(12)
}

/// A number below `limit`; the same ones in every run, though what they meet is not.
fn below(state: &mut u64, limit: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % limit
}

#[test]
fn after_every_kill_the_next_checkpoint_is_what_the_disk_was() {
    let mut lab = Lab::new("kills");
    let mut disk = lab.loop_disk(192);
    let path = disk.path.clone();
    let mount = disk.mkfs_mount(&lab, "ext4", &path);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.trimming_camera(&agent);
    let dispatcher_args = ["--sync-freq", "1s"];
    let agent_args = ["--hooks-dir", &hooks];
    lab.start_dispatcher(&dispatcher_args);
    let mut writers = vec![Writer::files(&mount)];
    writers.extend(["sync", "libaio", "mmap"].map(|engine| Writer::fio(&mount, engine, engine == "libaio")));
    let mut process = lab.start_agent(&agent, &[&path], &agent_args);
    lab.wait_checkpoints(&agent, &disk.name, 1, 60);
    let (mut random, mut compared) = (1, 0);
    for _ in 0..kills() {
        std::thread::sleep(Duration::from_millis(below(&mut random, 1500)));
        if below(&mut random, 2) == 0 {
            process.kill();
            std::thread::sleep(Duration::from_millis(below(&mut random, 300)));
            process = lab.start_agent(&agent, &[&path], &agent_args);
        } else {
            lab.dispatcher.as_mut().unwrap().kill();
            std::thread::sleep(Duration::from_millis(below(&mut random, 300)));
            lab.start_dispatcher(&dispatcher_args);
        }
        let before = lab.show(&agent, None).len();
        let rows = lab.wait_checkpoints(&agent, &disk.name, before + 1, 60);
        let newest = rows.last().unwrap();
        assert_ne!(newest["consistency"], "fuzzy", "{newest}");
        lab.compare(&agent, &disk.name, newest["checkpoint"].as_str().unwrap());
        compared += 1;
        forget_photos(&lab, &rows[..rows.len() - 1]);
    }
    drop(writers);
    drop(process);
    println!("{compared} kills, {compared} checkpoints behind them compared");
    let log = lab.dispatcher.as_ref().unwrap().log();
    assert_eq!(log.matches("attached: full copy").count(), 1, "a second full copy");
}

/// They take much room in a long run.
fn forget_photos(lab: &Lab, rows: &[serde_json::Value]) {
    for row in rows {
        let photo = lab.photo(row["device"].as_str().unwrap(), row["checkpoint"].as_str().unwrap());
        let _ = fs::remove_file(photo);
    }
}

/// Blocks of 4 KiB in which two images differ.
fn differing_blocks(a: &str, b: &str) -> u64 {
    let (a, b) = (fs::read(a).unwrap(), fs::read(b).unwrap());
    a.chunks(4096).zip(b.chunks(4096)).filter(|(a, b)| a != b).count() as u64
}

/// As a reboot: the agent is gone in mid-write, and with it what the kernel knew.
#[test]
fn after_a_reboot_in_mid_write_only_what_changed_crosses_the_wire() {
    const SIZE_MIB: u64 = 512;
    let mut lab = Lab::new("reboot");
    let mut disk = lab.loop_disk(SIZE_MIB);
    let path = disk.path.clone();
    let mount = disk.mkfs_mount(&lab, "ext4", &path);
    run(
        "dd",
        &["if=/dev/urandom", &format!("of={}/old", mount.display()), "bs=1M", "count=200", "status=none"],
    );
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.camera(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let meter = Meter::before(lab.port);
    lab.agents_port = meter.port;
    let args = ["--hooks-dir", &hooks];
    let mut process = lab.start_agent(&agent, &[&path], &args);
    lab.wait_checkpoints(&agent, &disk.name, 2, 120);
    for boot in 0..3 {
        let writers = ["sync", "libaio"].map(|engine| Writer::fio(&mount, engine, engine == "libaio"));
        let files = Writer::files(&mount);
        std::thread::sleep(Duration::from_secs(2));
        process.kill();
        // Nobody tracks what is written now.
        std::thread::sleep(Duration::from_secs(1));
        drop((writers, files));
        run("sync", &["-f", &mount.display().to_string()]);
        assert_eq!(run(common::lab::BLXREP, &["untrack", "--id", &agent]).lines().count(), 1);
        let rows = lab.show(&agent, None);
        let before = lab.photo(&disk.name, rows.last().unwrap()["checkpoint"].as_str().unwrap());
        let sent_before = meter.bytes();
        process = lab.start_agent(&agent, &[&path], &args);
        let rows = lab.wait_checkpoints(&agent, &disk.name, rows.len() + 1, 60);
        let sent = meter.bytes() - sent_before;
        let id = rows.last().unwrap()["checkpoint"].as_str().unwrap();
        let changed = differing_blocks(&before, &lab.photo(&disk.name, id)) * 4096;
        lab.compare(&agent, &disk.name, id);
        let most = changed as f64 * 1.05 + (SIZE_MIB << 20) as f64 / 1000.0;
        println!("boot {boot}: {changed} bytes changed, {sent} sent, at most {most:.0}");
        assert!(changed > 1 << 20, "only {changed} bytes changed: the test tells nothing");
        assert!(sent as f64 <= most, "{changed} bytes changed, {sent} were sent");
    }
    drop(process);
    let log = lab.dispatcher.as_ref().unwrap().log();
    assert_eq!(log.matches("attached: full copy").count(), 1, "a second full copy");
    assert!(log.matches("gap: tracking began anew").count() >= 3, "{log}");
}
