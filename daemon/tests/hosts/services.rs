//! The units: what systemd makes of a wrong configuration, a restart, a stop and a death of either daemon.

use std::thread::sleep;
use std::time::Duration;

use super::hosts::{Host, Pair};
use super::lab::wait_for;

const AGENT: &str = "blxrep-agent";
const DISPATCHER: &str = "blxrep-dispatcher";

#[test]
fn a_wrong_configuration_is_named_and_not_tried_again() {
    let pair = Pair::boot("config");
    pair.configure();
    let agent = &pair.agent;
    // Not enabled: a call to its name does not start it.
    let call = "busctl call org.blxrep.Agent /org/blxrep/Manager org.freedesktop.DBus.Peer Ping 2>&1";
    let answer = agent.run(&format!("{call} || true"));
    assert!(answer.contains("dbus-org.blxrep.Agent.service not found"), "{answer}");
    let fails = |what: &str| {
        assert!(!agent.is(&format!("systemctl start {AGENT}")), "it starts");
        assert_eq!(agent.unit(AGENT, "ActiveState"), "failed");
        assert_eq!(agent.unit(AGENT, "NRestarts"), "0");
        let status = agent.run(&format!("systemctl status --no-pager --full {AGENT} || true"));
        let lines: Vec<&str> = status.lines().filter(|line| line.contains("]: blxrep: ")).collect();
        assert!(lines.len() == 1 && lines[0].contains(what), "{status}");
    };
    pair.configure_agent("sink-freq: 5");
    fails("/etc/blxrep/config.yaml: unknown field `sink-freq`");
    pair.configure_agent("");
    agent.run("chmod 644 /etc/blxrep/key");
    fails("/etc/blxrep/key may be read by others");
    // A key that only systemd can read.
    agent.run("chmod 400 /etc/blxrep/key && mv /etc/blxrep/key /etc/blxrep/sealed");
    fails("/etc/blxrep/key: No such file");
    agent.put(
        "/etc/systemd/system/blxrep-agent.service.d/key.conf",
        "644",
        "[Service]\nLoadCredential=key:/etc/blxrep/sealed\n",
    );
    agent.run("sed -i 's#^key-file: .*#key-file: /run/credentials/blxrep-agent.service/key#' /etc/blxrep/config.yaml");
    agent.run(&format!("systemctl daemon-reload && systemctl start {AGENT}"));
    assert_eq!(agent.run("stat -c '%a %U' /run/credentials/blxrep-agent.service/key"), "400 root");
    pair.dispatcher.run(&format!("systemctl start {DISPATCHER}"));
    for (unit, threshold) in [(AGENT, 50), (DISPATCHER, 15)] {
        let unit = format!("{unit}.service");
        agent.run(&format!("systemd-analyze verify --man=no --recursive-errors=no {unit}"));
        agent.run(&format!("systemd-analyze security --no-pager --threshold={threshold} {unit}"));
    }
    wait_for("the agent to connect", 30, || agent.journal(AGENT).contains("connected to"));
    reloads(&pair);
    a_disk_comes_late(&pair);
}

/// A disk that is not there is waited for, however long: nobody has to start the agent again.
fn a_disk_comes_late(pair: &Pair) {
    let agent = &pair.agent;
    agent.run("sed -i 's#^id: .*#id: web1#; s#^device: .*#device: [/var/tmp/late]#' /etc/blxrep/config.yaml");
    assert!(!agent.is(&format!("systemctl restart {AGENT}")), "it starts without its disk");
    assert_eq!(agent.unit(AGENT, "StartLimitIntervalUSec"), "0");
    wait_for("two more tries", 60, || agent.unit(AGENT, "NRestarts").parse::<u32>().unwrap() >= 2);
    assert!(agent.journal(AGENT).contains("/var/tmp/late"), "{}", agent.journal(AGENT));
    agent.run(&format!("ln -s {} /var/tmp/late", pair.data.path));
    wait_for("the agent to start", 60, || agent.unit(AGENT, "ActiveState") == "active");
}

/// A reload takes what can be taken; one that cannot be read changes nothing.
fn reloads(pair: &Pair) {
    let (agent, dispatcher) = (&pair.agent, &pair.dispatcher);
    let config = agent.run("cat /etc/blxrep/config.yaml");
    let reload = |text: &str, says: &str| {
        agent.put("/etc/blxrep/config.yaml", "644", text);
        agent.run(&format!("systemctl reload {AGENT}"));
        wait_for("the reload", 10, || agent.journal(AGENT).contains(says));
        assert_eq!(agent.unit(AGENT, "ActiveState"), "active");
    };
    reload(&format!("{config}\nread-rate-mib: 50\n"), "configuration read again: hooks-dir");
    reload(
        &format!("{config}\nread-rate: 50\n"),
        "all stays as it was: /etc/blxrep/config.yaml: unknown field",
    );
    reload(&config.replace("id: web1", "id: web2"), "other keys have changed and need a restart");
    dispatcher.run(&format!(
        "sed -i 's/^sync-freq: .*/sync-freq: 7s/' /etc/blxrep/config.yaml; systemctl reload {DISPATCHER}"
    ));
    wait_for("the dispatcher to take it", 10, || {
        dispatcher.run("blxctl disks --json").contains("\"sync_every_usec\": 7000000")
    });
}

#[test]
fn a_restart_a_stop_or_a_death_of_either_daemon_misses_nothing() {
    let pair = Pair::boot("services");
    pair.configure();
    pair.configure_agent("read-rate-mib: 40");
    let (agent, dispatcher) = (&pair.agent, &pair.dispatcher);
    pair.start();
    wait_for("the full copy to begin", 30, || agent.sent_bytes() > 20 << 20);
    stops_soon(agent, AGENT);
    sleep(Duration::from_secs(1));
    stops_soon(dispatcher, DISPATCHER);
    for (host, unit) in [(agent, AGENT), (dispatcher, DISPATCHER)] {
        sleep(Duration::from_secs(1));
        dies(host, unit);
    }
    assert!(pair.checkpoints(&pair.root).is_empty(), "the full copy was done before it was interrupted");
    pair.configure_agent("");
    agent.run(&format!("systemctl restart {AGENT}"));
    pair.write();
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 1, 120);
    }

    // Syncs are on most of the time now. A kernel that skips the probe at times (see ARCHITECTURE.md on the audit) leaves a gap of
    // its own, which is no loss of the tracker; not every time.
    let mut nothing_missed = 0;
    for _ in 0..3 {
        let overhead = pair.overhead_bytes();
        stops_soon(agent, AGENT);
        let journal = agent.journal(AGENT);
        assert_eq!(journal.matches("is tracked").count(), 2, "{journal}");
        assert!(!journal.contains("tracking began anew"), "{journal}");
        nothing_missed += journal.matches("tracked on, nothing was missed").count();
        for disk in pair.disks() {
            pair.more_checkpoints(disk, 1, 60);
        }
        pair.assert_no_copy_since(overhead, "a restart");
    }
    assert!(nothing_missed >= 3, "only {nothing_missed} of 6 times nothing was missed at a restart");
    stops_soon(dispatcher, DISPATCHER);
    for (host, unit) in [(agent, AGENT), (dispatcher, DISPATCHER)] {
        dies(host, unit);
        for disk in pair.disks() {
            pair.more_checkpoints(disk, 2, 60);
        }
    }
    agent.run(&format!("systemctl stop writers {AGENT}"));
    for disk in pair.disks() {
        pair.compare_newest(disk, 2);
    }
}

/// Kills a daemon; systemd must start it again.
fn dies(host: &Host, unit: &str) {
    let restarts = || host.unit(unit, "NRestarts").parse::<u32>().unwrap();
    let before = restarts();
    host.run(&format!("systemctl kill -s KILL {unit}"));
    wait_for("systemd to start it again", 30, || {
        restarts() == before + 1 && host.unit(unit, "ActiveState") == "active"
    });
}

/// Stops a unit, which must not take long, and starts it again.
fn stops_soon(host: &Host, unit: &str) {
    let seconds = host.seconds(&format!("systemctl stop {unit}"));
    assert!(seconds < 10.0, "{unit} took {seconds:.1} s to stop");
    assert_eq!(host.unit(unit, "Result"), "success");
    host.run(&format!("systemctl start {unit}"));
}
