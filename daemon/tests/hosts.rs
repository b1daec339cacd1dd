//! Two real hosts: an agent whose root is replicated, and a dispatcher, under systemd, as README tells a new user to run them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod hosts;
    pub(crate) mod lab;
}

use common::hosts::Pair;

/// Writes to root and to /data until the host is off.
const WRITERS: &str = r#"for dir in /var/tmp /data; do (cd $dir; i=0; while :; do i=$((i+1)); n=$((i%20))
head -c $((n*20000+100)) /dev/urandom >f$n; mv f$n g$n; [ $((i%7)) = 0 ] && rm -f g$((n/2)); sync g$n 2>/dev/null; sleep 0.05; done) & done; wait"#;

#[test]
fn a_root_and_another_disk_are_replicated_and_restored() {
    let pair = Pair::boot("first");
    pair.configure();
    let mut writers = pair.agent.spawn(WRITERS);
    pair.start();
    for disk in [&pair.root, &pair.data] {
        pair.more_checkpoints(disk, 3, 120);
    }
    assert!(pair.agent.run("systemctl status blxrep-agent").contains("Status: \""));
    let _ = writers.kill();
    let _ = writers.wait();
    for disk in [&pair.root, &pair.data] {
        eprintln!("{:#?}", pair.checkpoints(disk));
    }
    pair.agent.run("systemctl stop blxrep-agent");
    for disk in [&pair.root, &pair.data] {
        assert!(pair.compare(disk) >= 3);
    }
}
