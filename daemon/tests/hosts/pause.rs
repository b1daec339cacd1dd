//! Pause and resume of one disk and of an agent, on either side, across restarts.

use std::thread::sleep;
use std::time::Duration;

use super::hosts::{Host, Pair};
use super::lab::wait_for;

const MIB: u64 = 1 << 20;

/// Bytes that the agent sends in three seconds, a second after now.
fn sent_while_paused(agent: &Host) -> u64 {
    sleep(Duration::from_secs(1));
    let before = agent.sent_bytes();
    sleep(Duration::from_secs(3));
    agent.sent_bytes() - before
}

#[test]
fn a_paused_disk_sends_nothing_and_goes_on_where_it_was() {
    let mut pair = Pair::boot("pause");
    pair.configure();
    pair.configure_agent("read-rate-mib: 40");
    let (agent, dispatcher) = (&pair.agent, &pair.dispatcher);
    pair.start();
    // In the middle of the full copy, by the dispatcher.
    wait_for("the full copy to be under way", 30, || agent.sent_bytes() > 30 * MIB);
    assert_eq!(dispatcher.run("blxctl pause web1 --json").matches("web1").count(), 2, "both disks");
    let idle = sent_while_paused(agent);
    assert!(idle < MIB / 4, "{idle} bytes were sent while paused");
    let before = agent.sent_bytes();
    for host in [dispatcher, agent] {
        wait_for("the pause to be shown", 5, || {
            let disks = host.run("blxctl disks --json");
            disks.matches("\"state\": \"paused\"").count() == 2 && disks.contains("\"dispatcher\"")
        });
        assert_eq!(host.try_run("blxctl status").status.code(), Some(6));
    }
    // It survives both sides.
    dispatcher.run("systemctl restart blxrep-dispatcher");
    agent.run("systemctl restart blxrep-agent");
    wait_for("both to be connected again", 60, || {
        dispatcher.run("blxctl disks --json").matches("\"state\": \"paused\"").count() == 2
    });
    let idle = sent_while_paused(agent);
    assert!(idle < MIB / 4, "{idle} bytes were sent while paused, after restarts");
    // Goes on where it was: nothing is sent twice.
    assert_eq!(dispatcher.run("blxctl resume web1 --json").matches("web1").count(), 2);
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 1, 120);
    }
    eprintln!("{} MiB before the pause", before / MIB);
    pair.assert_one_copy(agent.sent_bytes());

    one_disk_on_the_agent(&pair);
    assert!(!agent.journal("blxrep-agent").contains("with a gap"), "{}", agent.journal("blxrep-agent"));
    a_reboot(&mut pair);
}

/// One disk, on the agent: the other one goes on, and only what changed is sent afterwards.
fn one_disk_on_the_agent(pair: &Pair) {
    let (agent, dispatcher, data) = (&pair.agent, &pair.dispatcher, &pair.data.name);
    agent.run(&format!("blxctl pause --disk {data}"));
    assert!(
        agent.run(&format!("blxctl pause --disk {data} --json")).matches("web1").count() == 0,
        "nothing changed"
    );
    agent.run("dd if=/dev/urandom of=/data/while-paused bs=1M count=24 conv=fsync status=none");
    let count = pair.checkpoints(&pair.data).len();
    pair.more_checkpoints(&pair.root, 2, 60);
    assert_eq!(pair.checkpoints(&pair.data).len(), count, "the paused disk");
    wait_for("the dispatcher to show what is exposed", 10, || {
        let disks: serde_json::Value = serde_json::from_str(&dispatcher.run("blxctl disks --json")).unwrap();
        let disk = disks.as_array().unwrap().iter().find(|disk| disk["device"] == data.as_str()).unwrap();
        disk["paused_by"][0] == "agent" && disk["dirty_bytes"].as_u64().unwrap() >= 24 * MIB
    });
    // Only the side that paused it resumes it.
    assert!(
        dispatcher.run(&format!("blxctl resume web1 --disk {data} --json")).matches("web1/").count() == 0
    );
    assert_eq!(pair.checkpoints(&pair.data).len(), count);
    let before = agent.sent_bytes();
    agent.run(&format!("blxctl resume --disk {data}"));
    pair.more_checkpoints(&pair.data, 1, 30);
    let sent = agent.sent_bytes() - before;
    assert!((24 * MIB..40 * MIB).contains(&sent), "{} MiB for 24 MiB that changed", sent / MIB);
    pair.compare_newest(&pair.data, 1);
}

/// What was paused on the agent is so after a power cut.
fn a_reboot(pair: &mut Pair) {
    pair.agent.run("blxctl pause");
    pair.agent.power_cut();
    pair.agent.boot();
    pair.mount_data();
    let dispatcher = &pair.dispatcher;
    wait_for("the agent to be back, paused", 60, || {
        dispatcher.run("blxctl disks --json").matches("\"state\": \"paused\"").count() == 2
    });
    let idle = sent_while_paused(&pair.agent);
    assert!(idle < MIB / 4, "{idle} bytes were sent while paused, after a reboot");
    let overhead = pair.overhead_bytes();
    pair.agent.run("blxctl resume");
    pair.more_checkpoints(&pair.data, 1, 60);
    pair.assert_no_copy_since(overhead, "a compare behind a pause");
    pair.compare_newest(&pair.data, 1);
}
