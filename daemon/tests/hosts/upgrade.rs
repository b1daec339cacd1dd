//! Another build of the package is installed on both hosts under running writes: tracking goes on.

use super::hosts::Pair;
use super::lab::wait_for;

#[test]
fn an_upgrade_under_running_writes_misses_nothing() {
    let pair = Pair::boot("upgrade");
    pair.configure();
    pair.write();
    pair.start();
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 1, 180);
    }
    let overhead = pair.overhead_bytes();
    pair.install();
    // The old programs run on, without a file: a freeze starts one more process of the agent's.
    for (host, unit) in [(&pair.agent, "blxrep-agent"), (&pair.dispatcher, "blxrep-dispatcher")] {
        let pid = host.unit(unit, "MainPID");
        assert!(host.run(&format!("readlink /proc/{pid}/exe")).ends_with(" (deleted)"));
    }
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 1, 60);
        pair.compare_newest(disk, 1);
    }
    // As a package's scripts do, one host after the other, and then the other way round.
    let (agent, dispatcher) = ((&pair.agent, "blxrep-agent"), (&pair.dispatcher, "blxrep-dispatcher"));
    for (host, unit) in [agent, dispatcher, dispatcher, agent] {
        host.run(&format!("systemctl try-restart {unit}"));
        let pid = host.unit(unit, "MainPID");
        assert_eq!(host.run(&format!("readlink /proc/{pid}/exe")), "/usr/bin/blxrep");
        for disk in pair.disks() {
            pair.more_checkpoints(disk, 1, 60);
            pair.compare_newest(disk, 1);
        }
    }
    wait_for("both disks to be tracked by the new agent", 30, || {
        pair.agent.journal("blxrep-agent").matches("is tracked").count() == 2
    });
    let journal = pair.agent.run("journalctl --no-pager -o cat -u blxrep-agent");
    assert_eq!(journal.matches("tracking began anew").count(), 2, "only at the first start: {journal}");
    pair.assert_no_copy_since(overhead, "an upgrade of both sides");
}
