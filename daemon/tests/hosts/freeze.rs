//! A root that is frozen: how long, what goes on meanwhile, and who thaws it.

use super::hosts::Pair;
use super::lab::wait_for;

/// Stays in the freeze until it is killed or a file is there.
const STUCK: &str =
    "#!/bin/sh\n[ \"$1\" = frozen ] || exit 0\necho $BLXREP_DEVICE >/shared/frozen; exec sleep 600\n";

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

    let frozen = pair.shared.join("frozen");
    let froze = |disk: &str| std::fs::read_to_string(&frozen).is_ok_and(|text| text.trim() == disk);
    let writable = || agent.is("timeout 1 sh -c 'echo x >/var/tmp/probe'");
    // A hook that hangs.
    agent.put("/etc/blxrep/hooks/stuck", "755", STUCK);
    wait_for("the root to be frozen", 60, || froze(&pair.root.path));
    assert!(!writable(), "the root is not frozen");
    let began = std::time::Instant::now();
    wait_for("the root to be thawed", 20, writable);
    eprintln!("thawed {:.1} s after the hook hung", began.elapsed().as_secs_f64());
    // Stopping it.
    std::fs::remove_file(&frozen).unwrap();
    wait_for("the root to be frozen", 60, || froze(&pair.root.path));
    eprintln!("stopped in {:.1} s in a freeze", agent.seconds("systemctl stop blxrep-agent"));
    assert!(writable());
    // The agent dies; then the agent and its guard at once.
    for whom in ["main", "all"] {
        let _ = std::fs::remove_file(&frozen);
        agent.run("systemctl start blxrep-agent");
        wait_for("the root to be frozen", 60, || froze(&pair.root.path));
        assert!(!writable(), "the root is not frozen");
        let began = std::time::Instant::now();
        agent.run(&format!("systemctl kill -s KILL --kill-who {whom} blxrep-agent"));
        wait_for("the root to be thawed", 20, writable);
        eprintln!("{whom} killed: thawed after {:.1} s", began.elapsed().as_secs_f64());
    }
    agent.run("rm /etc/blxrep/hooks/stuck");
    eprintln!("{}", agent.journal("blxrep-agent"));
    pair.more_checkpoints(&pair.root, 2, 60);
}
