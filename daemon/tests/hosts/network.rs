//! Copies and checkpoints across a cable that is pulled, and a host that loses its power.

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::hosts::{Host, Pair};
use super::lab::wait_for;

const MIB: u64 = 1 << 20;

#[test]
fn a_pulled_cable_and_a_lost_tracker_cost_no_second_full_copy() {
    let mut pair = Pair::boot("network");
    pair.configure();
    pair.configure_agent("read-rate-mib: 40");
    pair.start();
    // In the middle of the full copy of the root.
    wait_for("the full copy to begin", 30, || pair.agent.sent_bytes() > 55 * MIB);
    pair.agent.link(false);
    let before = pair.agent.sent_bytes();
    minute_without(&pair);
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 1, 120);
    }
    let copied = pair.agent.sent_bytes();
    eprintln!("{} MiB before the cut", before / MIB);
    pair.assert_one_copy(copied);
    // In the middle of syncs.
    let overhead = pair.overhead_bytes();
    pair.write();
    pair.more_checkpoints(&pair.root, 1, 60);
    pair.agent.link(false);
    minute_without(&pair);
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 2, 60);
    }
    pair.assert_no_copy_since(overhead, "checkpoints across a cut");
    for disk in pair.disks() {
        pair.compare_newest(disk, 1);
    }

    // A reboot takes the tracker with it: it says so, and the disk is compared.
    let overhead = pair.overhead_bytes();
    pair.agent.power_cut();
    pair.agent.boot();
    pair.mount_data();
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 2, 120);
    }
    event(&pair.dispatcher, "5538cbccf1f3429db1be4ac787417fde", "gap");
    event(&pair.dispatcher, "4c381d228baf43e1a50039cd1109d031", "is gone");
    let journal = pair.agent.journal("blxrep-agent");
    assert_eq!(journal.matches("tracking began anew").count(), 2, "{journal}");
    pair.assert_no_copy_since(overhead, "a compare");
    for disk in pair.disks() {
        pair.compare_newest(disk, 1);
    }
}

/// Waits for a minute with the cable pulled; both sides must say so. Then it is plugged in.
fn minute_without(pair: &Pair) {
    let began = Instant::now();
    for host in [&pair.dispatcher, &pair.agent] {
        wait_for("status to tell of the cut", 45, || {
            let status = host.try_run("blxctl status");
            let text = String::from_utf8_lossy(&status.stdout).into_owned();
            status.status.code() == Some(6) && text.contains("detached")
        });
    }
    sleep(Duration::from_secs(60).saturating_sub(began.elapsed()));
    pair.agent.link(true);
}

/// An event is in the journal under its MESSAGE_ID, with its fields.
fn event(host: &Host, id: &str, says: &str) {
    let entries = host.run(&format!("journalctl -o json MESSAGE_ID={id}"));
    let entry: Value = serde_json::from_str(entries.lines().last().expect(says)).unwrap();
    assert!(entry["MESSAGE"].as_str().unwrap().contains(says), "{entry}");
    assert_eq!(entry["AGENT"], "web1", "{entry}");
}
