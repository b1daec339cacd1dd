//! The units: what systemd makes of a wrong configuration, a restart, a stop and a death of either daemon.

use super::hosts::Pair;
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
    eprintln!("{}", agent.run("ls -l /run/credentials/blxrep-agent.service/; id"));
    eprintln!("{}", agent.run(&format!("systemctl status --no-pager {AGENT}")));
    agent.run(&format!("systemctl stop {AGENT}"));
}

#[test]
fn a_restart_or_a_death_of_either_daemon_misses_nothing() {
    let pair = Pair::boot("services");
    pair.configure();
    pair.configure_agent("read-rate-mib: 40");
    let (agent, dispatcher) = (&pair.agent, &pair.dispatcher);
    pair.start();
    wait_for("the full copy to begin", 30, || agent.sent_bytes() > 20 << 20);
    // During the full copy.
    let seconds = |what: &str, host: &super::hosts::Host, unit: &str| {
        let taken = host.seconds(&format!("systemctl stop {unit}"));
        eprintln!("{unit} stopped in {taken:.1} s {what}");
        assert!(taken < 10.0, "{unit} took {taken:.1} s to stop {what}");
        assert_eq!(host.unit(unit, "Result"), "success");
        host.run(&format!("systemctl start {unit}"));
    };
    seconds("in the full copy", agent, AGENT);
    std::thread::sleep(std::time::Duration::from_secs(1));
    seconds("in the full copy", dispatcher, DISPATCHER);
    pair.configure_agent("");
    agent.run(&format!("systemctl restart {AGENT}"));
    pair.write();
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 1, 120);
    }
    seconds("between syncs", agent, AGENT);
    assert_eq!(agent.journal(AGENT).matches("tracked on, nothing was missed").count() % 2, 0);
    let sent = agent.sent_bytes();
    for (host, unit) in [(agent, AGENT), (dispatcher, DISPATCHER)] {
        host.run(&format!("systemctl kill -s KILL {unit}"));
        wait_for("systemd to restart it", 30, || {
            host.unit(unit, "NRestarts") == "1" && host.unit(unit, "ActiveState") == "active"
        });
        for disk in pair.disks() {
            pair.more_checkpoints(disk, 2, 60);
        }
    }
    let journal = agent.journal(AGENT);
    eprintln!("{journal}\nsent {} MiB", (agent.sent_bytes() - sent) >> 20);
    agent.run("systemctl stop writers");
    for disk in pair.disks() {
        pair.compare_newest(disk, 2);
    }
}
