//! A disk that grows, shrinks or is another one: each checkpoint has its own size, history is never overwritten, and what a
//! person must accept waits for that.

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

use blxrep::accept::Accepted;
use common::lab::{Lab, Process, TestDisk, run, wait_for};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A loop disk whose file can be given another size.
struct Elastic {
    disk: TestDisk,
    file: fs::File,
}

impl Elastic {
    fn new(lab: &Lab, size_mib: u64) -> Self {
        let (disk, file) = lab.loop_disk_on_file(size_mib);
        Self { disk, file }
    }

    fn resize(&self, size_bytes: u64) {
        self.file.set_len(size_bytes).unwrap();
        run("losetup", &["-c", &self.disk.path]);
        assert_eq!(run("blockdev", &["--getsize64", &self.disk.path]), size_bytes.to_string());
    }

    fn write(&self, mib: u64, seek_mib: u64) {
        let (of, seek) = (format!("of={}", self.disk.path), format!("seek={seek_mib}"));
        let count = format!("count={mib}");
        run(
            "dd",
            &["if=/dev/urandom", &of, "bs=1M", &count, &seek, "oflag=direct", "conv=notrunc", "status=none"],
        );
    }
}

fn sizes(rows: &[Value]) -> Vec<u64> {
    rows.iter().map(|row| row["size_bytes"].as_u64().unwrap()).collect()
}

/// Waits for `more` checkpoints of this size and gives all.
fn wait_size(lab: &Lab, agent: &str, disk: &str, size_bytes: u64, more: usize) -> Vec<Value> {
    let of_size = |rows: &[Value]| sizes(rows).into_iter().filter(|size| *size == size_bytes).count();
    let had = of_size(&lab.show(agent, Some(disk)));
    let mut rows = Vec::new();
    wait_for(&format!("{more} checkpoints of {size_bytes} bytes"), 60, || {
        rows = lab.show(agent, Some(disk));
        of_size(&rows) >= had + more
    });
    rows
}

/// Accepts a disk's change as an order would, while no dispatcher runs, and starts one.
fn accept(lab: &mut Lab, agent: &str, disk: &str) {
    lab.dispatcher = None;
    let accepted = Accepted::load(lab.path("data/accepted").into()).unwrap();
    assert!(accepted.add(&agent.parse().unwrap(), &disk.parse().unwrap()).unwrap());
    lab.start_dispatcher(&["--sync-freq", "1s"]);
}

fn stop(process: Process) {
    process.signal("TERM");
    let mut process = process;
    assert_eq!(process.exit_code(20), 0);
}

#[test]
fn a_disk_that_grows_goes_on_with_its_new_size_and_old_checkpoints_keep_theirs() {
    let mut lab = Lab::new("grow");
    // No multiple of a block.
    let (small, large, larger) = (32 * MIB, 49 * MIB + 1536, 52 * MIB + 512);
    let mut elastic = Elastic::new(&lab, small / MIB);
    let path = elastic.disk.path.clone();
    let mount = elastic.disk.mkfs_mount(&lab, "ext4", &path);
    let name = elastic.disk.name.clone();
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.camera(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let mut process = lab.start_agent(&agent, &[&path], &["--hooks-dir", &hooks]);
    lab.wait_checkpoints(&agent, &name, 2, 30);
    run(
        "dd",
        &["if=/dev/urandom", &format!("of={}/one", mount.display()), "bs=1M", "count=8", "status=none"],
    );
    lab.wait_checkpoints(&agent, &name, 4, 30);

    elastic.resize(large);
    let rows = wait_size(&lab, &agent, &name, large, 1);
    assert!(process.log().contains(&format!("{name} has {large} bytes now and is tracked anew")));
    let first = rows.iter().find(|row| row["size_bytes"] == large).unwrap();
    assert!(first["delta_bytes"].as_u64().unwrap() < 4 * MIB, "only what differs is sent: {first}");
    // Behind the file system: to let it grow while it is mounted takes a right that a container may lack.
    elastic.write(2, 40);
    run(
        "dd",
        &["if=/dev/urandom", &format!("of={}/two", mount.display()), "bs=1M", "count=4", "status=none"],
    );
    let rows = wait_size(&lab, &agent, &name, large, 2);
    assert!(rows.iter().all(|row| row["consistency"] == "application"), "{rows:?}");
    assert_eq!(process.child.try_wait().unwrap(), None);

    // While no agent runs.
    stop(process);
    elastic.resize(larger);
    let mut process = lab.start_agent(&agent, &[&path], &["--hooks-dir", &hooks]);
    let rows = wait_size(&lab, &agent, &name, larger, 2);
    let first = rows.iter().find(|row| row["size_bytes"] == larger).unwrap();
    assert!(first["delta_bytes"].as_u64().unwrap() < 4 * MIB, "only what differs is sent: {first}");
    assert!(sizes(&rows).is_sorted() && sizes(&rows).starts_with(&[small]), "{rows:?}");
    assert_eq!(process.child.try_wait().unwrap(), None);
    stop(process);
    lab.compare_all(&agent, &name);
}

#[test]
fn a_disk_that_shrinks_waits_for_a_person_and_what_was_cut_off_does_not_come_back() {
    let mut lab = Lab::new("shrink");
    let (first, small, large) = (32 * MIB, 24 * MIB + 512, 40 * MIB + 1024);
    let elastic = Elastic::new(&lab, first / MIB);
    elastic.write(4, 0);
    elastic.write(9, 23);
    let (path, name) = (elastic.disk.path.clone(), elastic.disk.name.clone());
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.camera(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let mut process = lab.start_agent(&agent, &[&path], &["--hooks-dir", &hooks]);
    lab.wait_checkpoints(&agent, &name, 2, 30);

    elastic.resize(small);
    wait_for("the refusal", 30, || process.log().contains("shrank from"));
    let before = lab.show(&agent, Some(&name));
    elastic.write(1, 2);
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!(lab.show(&agent, Some(&name)), before, "nothing goes on before it is accepted");
    assert_eq!(process.child.try_wait().unwrap(), None);

    accept(&mut lab, &agent, &name);
    wait_size(&lab, &agent, &name, small, 2);
    let accepted = fs::read_to_string(lab.path("data/accepted")).unwrap();
    assert_eq!(accepted, "", "an order is used up by the checkpoint");
    elastic.resize(large);
    wait_size(&lab, &agent, &name, large, 1);
    elastic.write(2, 30);
    let rows = wait_size(&lab, &agent, &name, large, 2);
    assert_eq!(sizes(&rows).first(), Some(&first));
    // Once more: an order counts once.
    elastic.resize(small);
    let refusals = || process.log().matches("shrank from").count();
    let had = refusals();
    wait_for("the second refusal", 30, || refusals() > had);
    assert_eq!(process.child.try_wait().unwrap(), None);
    stop(process);
    lab.compare_all(&agent, &name);
}

#[test]
fn another_disk_in_place_of_a_stored_one_waits_for_a_person_and_both_are_kept() {
    let mut lab = Lab::new("replaced");
    let disk = lab.loop_disk(16);
    let label = |lab: &Lab, id: &str| lab.partition(&disk, &format!("label: gpt\nlabel-id: {id}\n,4M\n"));
    let (old, new) = ("11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee");
    label(&lab, old);
    let (old, new_id) = (format!("gpt-{old}"), format!("gpt-{new}"));
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.camera(&agent);
    let args = ["--hooks-dir", hooks.as_str()];
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let process = lab.start_agent(&agent, &[&disk.path], &args);
    lab.wait_checkpoints(&agent, &old, 2, 30);
    stop(process);
    let kept = lab.show(&agent, Some(&old));
    label(&lab, new);

    let mut process = lab.start_agent(&agent, &[&disk.path], &args);
    let refusal = format!("the disk {new_id} is in the place of {old}, whose checkpoints stay as they are");
    wait_for("the refusal", 30, || process.log().contains(&refusal));
    assert!(process.log().contains(&format!("'blxctl accept {agent} --disk {new_id}'")));
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert!(!fs::exists(lab.path(&format!("data/snapshot/{agent}/{new_id}"))).unwrap(), "nothing is copied");
    assert_eq!(process.child.try_wait().unwrap(), None);

    accept(&mut lab, &agent, &new_id);
    lab.wait_checkpoints(&agent, &new_id, 2, 30);
    assert_eq!(fs::read_to_string(lab.path("data/accepted")).unwrap(), "");
    assert_eq!(lab.show(&agent, Some(&old)), kept);
    // It is a stored one by now.
    stop(process);
    let process = lab.start_agent(&agent, &[&disk.path], &args);
    let had = lab.show(&agent, Some(&new_id)).len();
    lab.wait_checkpoints(&agent, &new_id, had + 1, 30);
    stop(process);
    for (id, rows) in [(&old, kept), (&new_id, lab.show(&agent, Some(&new_id)))] {
        for row in rows {
            let checkpoint = row["checkpoint"].as_str().unwrap();
            let output = lab.path("restored.img");
            assert!(lab.restore(&agent, id, checkpoint, &output).status.success());
            run("cmp", &[&output, &lab.photo(&disk.name, checkpoint)]);
            fs::remove_file(&output).unwrap();
        }
    }
}
