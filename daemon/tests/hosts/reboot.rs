//! A host that loses its power in mid-write, three times: what its kernel knew of changes is gone, and only what changed is sent.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::hosts::Pair;
use super::lab::wait_for;

#[test]
fn after_each_of_three_reboots_in_mid_write_only_what_changed_is_sent() {
    let mut pair = Pair::boot("reboot");
    pair.configure();
    pair.start();
    wait_for("the first checkpoints", 120, || {
        pair.disks().into_iter().all(|disk| !pair.checkpoints(disk).is_empty())
    });
    for reboot in 1..=3 {
        pair.write();
        for disk in pair.disks() {
            pair.more_checkpoints(disk, 1, 60);
        }
        pair.agent.power_cut();
        let before = pair.disks().map(|disk| pair.checkpoints(disk).len());
        let sent_before = pair.wire_bytes();
        pair.agent.boot();
        pair.mount_data();
        for (disk, before) in pair.disks().into_iter().zip(before) {
            wait_for("the checkpoint behind the reboot", 120, || pair.checkpoints(disk).len() > before);
        }
        // What is not committed yet counts as well, though nothing is known of it: nobody writes but the system itself.
        let sent_bytes = pair.wire_bytes() - sent_before;
        let (mut changed_bytes, mut size_bytes) = (0, 0);
        for (disk, before) in pair.disks().into_iter().zip(before) {
            let rows = pair.checkpoints(disk);
            let photos: Vec<_> = rows[before - 1..].iter().map(|row| pair.photo(disk, row)).collect();
            changed_bytes += photos.windows(2).map(|two| differing_bytes(&two[0], &two[1])).sum::<u64>();
            size_bytes += photos[0].metadata().unwrap().len();
            pair.compare_newest(disk, 1);
        }
        let most = changed_bytes + changed_bytes / 20 + size_bytes / 1000;
        eprintln!(
            "reboot {reboot}: {changed_bytes} bytes changed, {sent_bytes} crossed the wire, at most {most}"
        );
        assert!(changed_bytes > 1 << 20, "only {changed_bytes} bytes changed: the test tells nothing");
        assert!(sent_bytes <= most, "{changed_bytes} bytes changed, {sent_bytes} crossed the wire");
        let journal = pair.agent.journal("blxrep-agent");
        assert_eq!(journal.matches("tracking began anew").count(), 2, "{journal}");
    }
}

/// How much of two images of one size is in blocks of 4 KiB that differ.
fn differing_bytes(a: &Path, b: &Path) -> u64 {
    let (mut a, mut b) = (File::open(a).unwrap(), File::open(b).unwrap());
    let mut differing = 0;
    let (mut of_a, mut of_b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let len = a.read(&mut of_a).unwrap();
        b.read_exact(&mut of_b[..len]).unwrap();
        if len == 0 {
            return differing;
        }
        let blocks = of_a[..len].chunks(4096).zip(of_b[..len].chunks(4096));
        differing += blocks.filter(|(a, b)| a != b).map(|(a, _)| a.len() as u64).sum::<u64>();
    }
}
