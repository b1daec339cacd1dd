//! Copies and checkpoints across a cable that is pulled, and a host that loses its power.

use std::thread::sleep;
use std::time::Duration;

use super::hosts::Pair;
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
    sleep(Duration::from_secs(22));
    pair.agent.link(true);
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 1, 120);
    }
    let copied = pair.agent.sent_bytes();
    eprintln!("full copy: {} MiB before the cut, {} MiB after it", before / MIB, (copied - before) / MIB);
    assert!(copied - before < before, "{before} bytes, and {} after the cut", copied - before);
    // In the middle of syncs.
    pair.write();
    pair.more_checkpoints(&pair.root, 1, 60);
    pair.agent.link(false);
    sleep(Duration::from_secs(22));
    pair.agent.link(true);
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 2, 60);
    }
    let synced = pair.agent.sent_bytes() - copied;
    eprintln!("syncs across a cut: {} MiB", synced / MIB);
    for disk in pair.disks() {
        pair.compare_newest(disk, 1);
    }
    // A reboot takes the tracker with it.
    pair.agent.power_cut();
    pair.agent.boot();
    pair.mount_data();
    let before = pair.agent.sent_bytes();
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 1, 120);
    }
    eprintln!("{}", pair.agent.journal("blxrep-agent"));
    eprintln!("compare after the reboot: {} MiB", (pair.agent.sent_bytes() - before) / MIB);
    for disk in pair.disks() {
        pair.compare_newest(disk, 1);
    }
}
