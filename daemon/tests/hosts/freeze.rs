//! A root that is frozen: how long, what goes on meanwhile, and who thaws it.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::hosts::{PHOTOGRAPH, Pair};
use super::lab::wait_for;

/// Tells that it was called in the freeze, and stays there for so many seconds.
const LINGER: &str = r#"#!/bin/sh
[ "$1" = frozen ] || exit 0
echo "$BLXREP_DEVICE" >/shared/frozen
exec sleep SECONDS
"#;
/// Fails while the root is frozen. What writes to it then cannot even be killed, so it is not waited for.
const WRITABLE: &str = "rm -f /run/probe; (echo >/var/tmp/probe; touch /run/probe) >/dev/null 2>&1 & sleep 0.3; [ -e /run/probe ]";

#[test]
fn a_frozen_root_is_thawed_in_time_whatever_dies() {
    let pair = Pair::boot("freeze");
    pair.configure();
    let agent = &pair.agent;
    agent.run("mkdir -p /var/log/journal && systemctl restart systemd-journald && journalctl --flush");
    pair.write();
    pair.start();
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 3, 120);
    }
    assert!(agent.run("systemctl status blxrep-agent").contains("Status: \""));
    pair.compare_newest(&pair.root, 2);
    pair.compare_newest(&pair.data, 2);
    agent.run("rm /etc/blxrep/hooks/photograph");
    pair.more_checkpoints(&pair.root, 4, 60);
    let rows = pair.checkpoints(&pair.root);
    let freezes: Vec<u64> =
        rows[rows.len() - 3..].iter().map(|row| row["freeze_ms"].as_u64().unwrap()).collect();
    eprintln!("the root was frozen for {freezes:?} ms");
    assert!(freezes.iter().all(|ms| *ms < 1000), "{freezes:?} ms");

    agent.put("/etc/blxrep/hooks/linger", "755", &LINGER.replace("SECONDS", "600"));
    wait_frozen(&pair);
    let seconds = wait_thawed(&pair);
    assert!(seconds < 15.0, "a hook that hangs: thawed after {seconds:.1} s");
    // The agent dies; then the agent and its guard at once.
    for whom in ["main", "all"] {
        wait_frozen(&pair);
        // Long enough for the other disk to want a checkpoint, too.
        sleep(Duration::from_secs(4));
        agent.run(&format!("systemctl kill -s KILL --kill-who {whom} blxrep-agent"));
        let seconds = wait_thawed(&pair);
        assert!(seconds < 5.0, "{whom} killed: thawed after {seconds:.1} s");
        wait_for("systemd to start the agent again", 30, || {
            agent.unit("blxrep-agent", "ActiveState") == "active"
        });
    }
    agent.put("/etc/blxrep/hooks/linger", "755", &LINGER.replace("SECONDS", "2"));
    wait_frozen(&pair);
    let seconds = agent.seconds("systemctl stop blxrep-agent");
    assert!(seconds < 10.0, "stopped in {seconds:.1} s in a freeze");
    assert!(agent.is(WRITABLE), "frozen behind a stopped agent");
    assert_eq!(agent.unit("blxrep-agent", "Result"), "success");
    agent.run("rm /etc/blxrep/hooks/linger");
    agent.put("/etc/blxrep/hooks/photograph", "755", PHOTOGRAPH);
    agent.run("systemctl start blxrep-agent");
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 2, 60);
        pair.compare_newest(disk, 1);
    }
}

/// Waits until the hook holds the root frozen.
fn wait_frozen(pair: &Pair) {
    let told = pair.shared.join("frozen");
    let _ = fs::remove_file(&told);
    wait_for("the root to be frozen", 60, || {
        fs::read_to_string(&told).is_ok_and(|disk| disk.trim() == pair.root.path)
    });
    assert!(!pair.agent.is(WRITABLE), "the root is not frozen");
}

/// Waits until the root is thawed and gives how many seconds that took.
fn wait_thawed(pair: &Pair) -> f64 {
    let began = Instant::now();
    wait_for("the root to be thawed", 30, || pair.agent.is(WRITABLE));
    began.elapsed().as_secs_f64()
}
