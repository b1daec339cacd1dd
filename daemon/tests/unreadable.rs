//! Bad sectors of a real device: named, marked, read around and tried again. Behind the end of its file a loop device
//! answers with an I/O error; when the file is long again, it does not.

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
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::lab::{BLXREP, Lab, Process, TestDisk, run};
use serde_json::Value;

/// Photographs a disk with zeros where it cannot be read.
const PHOTOGRAPH: &str = r#"[ "$1" = frozen ] || exit 0
out=$PHOTOS/$(basename "$BLXREP_DEVICE")-$BLXREP_CHECKPOINT.img
dd if="$BLXREP_DEVICE" of="$out.part" bs=4k iflag=direct conv=noerror,sync,sparse status=none 2>/dev/null
truncate -s "$(blockdev --getsize64 "$BLXREP_DEVICE")" "$out.part"
mv "$out.part" "$out""#;

/// A disk whose last bytes can go bad and come back as they were.
struct Bad {
    disk: TestDisk,
    file: fs::File,
    size_bytes: u64,
    /// What is there.
    tail: Vec<u8>,
}

impl Bad {
    fn new(lab: &Lab, size_mib: u64, tail_bytes: u64) -> Self {
        let (disk, file) = lab.loop_disk_on_file(size_mib);
        let tail: Vec<u8> = (0..tail_bytes).map(|at| (at / 512) as u8 | 1).collect();
        let bad = Self { disk, file, size_bytes: size_mib << 20, tail };
        bad.heal();
        bad
    }

    fn breaks(&self) {
        self.file.set_len(self.size_bytes - self.tail.len() as u64).unwrap();
    }

    /// The tracker sees nothing of this.
    fn heal(&self) {
        self.file.set_len(self.size_bytes).unwrap();
        self.file.write_all_at(&self.tail, self.size_bytes - self.tail.len() as u64).unwrap();
    }

    fn sectors(&self) -> String {
        format!("{}-{}", (self.size_bytes - self.tail.len() as u64) / 512, self.size_bytes / 512 - 1)
    }

    /// Writes what is there once more, so that the tracker sees it.
    fn rewrite_tail(&self, lab: &Lab) {
        let file = lab.path("tail.bin");
        fs::write(&file, &self.tail).unwrap();
        let seek = format!("seek={}", (self.size_bytes - self.tail.len() as u64) / 4096);
        let (from, to) = (format!("if={file}"), format!("of={}", self.disk.path));
        run("dd", &[&from, &to, "bs=4k", &seek, "oflag=direct", "conv=notrunc", "status=none"]);
    }
}

/// Waits for a checkpoint that began after now, and gives it.
fn next(lab: &Lab, agent: &str) -> Value {
    let count = lab.show(agent, None).len() + 2;
    let mut newest = None;
    common::lab::wait_for("two more checkpoints", 60, || {
        let rows = lab.show(agent, None);
        newest = rows.last().cloned();
        rows.len() >= count
    });
    newest.unwrap()
}

fn id(row: &Value) -> String {
    row["checkpoint"].as_str().unwrap().to_owned()
}

/// Restores a checkpoint, compares it, and gives what was said on standard error.
fn restored(lab: &Lab, agent: &str, disk: &str, id: &str) -> String {
    let output = lab.path(&format!("restored-{id}.img"));
    let done = lab.restore(agent, disk, id, &output);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    run("cmp", &[&output, &lab.photo(disk, id)]);
    fs::remove_file(&output).unwrap();
    String::from_utf8_lossy(&done.stderr).into_owned()
}

fn verified(lab: &Lab, agent: &str, id: &str) -> Value {
    let data = lab.path("data");
    let args = ["dispatcher", "verify", "--json", "--agent", agent, "--data-dir", &data, "--checkpoint", id];
    serde_json::from_str(&run(BLXREP, &args)).unwrap()
}

fn said(process: &Process, text: &str) -> usize {
    process.log().matches(text).count()
}

#[test]
fn bad_sectors_from_the_first_copy_on_are_marked_and_named_until_they_can_be_read() {
    let mut lab = Lab::new("bad");
    let mut bad = Bad::new(&lab, 48, 64 * 4096);
    lab.partition(&bad.disk, "label: dos\n2048,,\n");
    let part = bad.disk.part(1);
    let mount = bad.disk.mkfs_mount(&lab, "ext4", &part);
    run("sync", &[]);
    bad.heal();
    bad.breaks();
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.hooks(&agent, PHOTOGRAPH);
    lab.start_dispatcher(&["--sync-freq", "2s"]);
    let process = lab.start_agent(&agent, &[&bad.disk.path], &["--hooks-dir", &hooks]);
    let name = bad.disk.name.clone();
    lab.wait_checkpoints(&agent, &name, 2, 60);
    fs::write(mount.join("new"), vec![7; 100_000]).unwrap();
    let marked = next(&lab, &agent);
    for row in lab.show(&agent, None) {
        assert_eq!((&row["unreadable_blocks"], &row["consistency"]), (&64.into(), &"application".into()));
        let note = row["note"].as_str().unwrap();
        let place = format!(
            "sectors {} of /dev/{name} could not be read: zeros; in {part}, ext4 on {}",
            bad.sectors(),
            mount.display().to_string().chars().take(48).collect::<String>()
        );
        assert!(note.starts_with(&place), "{note}");
        let warned = restored(&lab, &agent, &name, &id(&row));
        assert!(
            warned.contains(&format!(
                "64 blocks could not be read on the agent's disk and are zeros here: sectors {}",
                bad.sectors()
            )),
            "{warned}"
        );
    }
    let verify = verified(&lab, &agent, &id(&marked));
    assert_eq!(verify["damage"].as_array().unwrap().len(), 0);
    assert_eq!(
        (&verify["unreadable_blocks"], &verify["unreadable_sectors"]),
        (&64.into(), &bad.sectors().into())
    );
    // What is tried again in vain is not sent again.
    let idle = next(&lab, &agent);
    assert!(idle["delta_bytes"].as_u64().unwrap() < 64 * 4096, "{idle}");

    bad.heal();
    let healed = next(&lab, &agent);
    assert_eq!(healed["unreadable_blocks"], 0, "{healed}");
    assert!(!healed["note"].as_str().unwrap().contains("sectors"), "{healed}");
    let photo = fs::read(lab.photo(&name, &id(&healed))).unwrap();
    assert!(photo.ends_with(&bad.tail), "the sectors hold what they held");
    assert!(!restored(&lab, &agent, &name, &id(&healed)).contains("warning"));
    assert!(restored(&lab, &agent, &name, &id(&marked)).contains("64 blocks"), "the older one stays marked");

    assert_eq!(
        said(&process, "they are tried again at every checkpoint"),
        1,
        "said once, not at every retry"
    );
    assert_eq!(said(&process, "can be read again"), 1);
    assert_eq!(said(&process, "connecting again"), 0, "no connection was dropped for it");
    let dispatcher = lab.dispatcher.as_ref().unwrap();
    assert_eq!(said(dispatcher, "attached: "), 1);
    assert_eq!(said(dispatcher, "blocks that could not be read"), 1);
}

#[test]
fn changed_blocks_that_cannot_be_read_are_marked_over_restarts_and_a_compare_and_heal() {
    let mut lab = Lab::new("badsync");
    let bad = Bad::new(&lab, 32, 40 * 4096);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.hooks(&agent, PHOTOGRAPH);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let start = |lab: &Lab| lab.start_agent(&agent, &[&bad.disk.path], &["--hooks-dir", &hooks]);
    let process = start(&lab);
    let name = bad.disk.name.clone();
    let whole = lab.wait_checkpoints(&agent, &name, 1, 60);
    assert_eq!(whole[0]["unreadable_blocks"], 0);
    drop(process);
    bad.rewrite_tail(&lab);
    bad.breaks();
    let process = start(&lab);
    let marked = next(&lab, &agent);
    assert_eq!(
        (&marked["unreadable_blocks"], &marked["consistency"]),
        (&40.into(), &"crash".into()),
        "{marked}"
    );
    assert_eq!(said(&process, "connecting again"), 0);
    drop(process);

    // Nothing is known any more but by the dispatcher: the disk is compared, and what is bad is known to be.
    run(BLXREP, &["untrack", "--id", &agent]);
    let process = start(&lab);
    let compared = next(&lab, &agent);
    assert_eq!(compared["unreadable_blocks"], 40);
    assert!(
        lab.show(&agent, None).iter().skip(2).map(|row| row["delta_bytes"].as_u64().unwrap()).sum::<u64>()
            <= 40 * 4096
    );
    assert_eq!(
        said(lab.dispatcher.as_ref().unwrap(), "the whole disk is compared"),
        2,
        "a gap, and an attach"
    );
    drop(process);

    // It works again while no agent runs: the dispatcher tells the next one what is to be tried.
    bad.heal();
    let process = start(&lab);
    let healed = next(&lab, &agent);
    assert_eq!(healed["unreadable_blocks"], 0);
    assert!(fs::read(lab.photo(&name, &id(&healed))).unwrap().ends_with(&bad.tail));
    drop(process);
    for row in lab.show(&agent, None) {
        restored(&lab, &agent, &name, &id(&row));
    }
    assert_eq!(lab.show(&agent, None)[0]["unreadable_blocks"], 0, "a checkpoint from before is not marked");
}

#[test]
fn a_failing_disk_is_no_endless_loop_and_goes_on_when_it_can_be_read() {
    let mut lab = Lab::new("failing");
    // 5120 blocks: more than are borne.
    let bad = Bad::new(&lab, 32, 20 << 20);
    bad.breaks();
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let hooks = lab.hooks(&agent, PHOTOGRAPH);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let process = lab.start_agent(&agent, &[&bad.disk.path], &["--hooks-dir", &hooks]);
    common::lab::wait_for("the disk to be called failing", 60, || said(&process, "the disk is failing") > 0);
    let before = said(&process, "connecting again");
    std::thread::sleep(Duration::from_secs(10));
    let tries = said(&process, "connecting again") - before;
    assert!(tries <= 6, "{tries} connections in 10 s");
    assert!(lab.show(&agent, None).is_empty(), "no checkpoint of a disk that is mostly gone");
    bad.heal();
    let name = bad.disk.name.clone();
    let rows = lab.wait_checkpoints(&agent, &name, 1, 60);
    let last = if rows[0]["unreadable_blocks"] == 0 { rows[0].clone() } else { next(&lab, &agent) };
    assert_eq!(last["unreadable_blocks"], 0, "{last}");
    restored(&lab, &agent, &name, &id(&last));
}
