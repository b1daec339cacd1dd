//! What `status` says in every state a disk can be in.

use insta::assert_snapshot;

use super::*;
use crate::render::tests::{disk, job};

fn report(role: Role, disks: Vec<Disk>) -> Report {
    let count = disks.len() as u64;
    let agent =
        Agent { id: "web1".into(), hostname: "web1.example".into(), disks: count, ..Agent::default() };
    Report { role, version: "0.1.0".into(), agents: vec![agent], scrub: None, disks, jobs: Vec::new() }
}

fn dispatcher(disks: Vec<Disk>) -> [Report; 1] {
    [report(Role::Dispatcher, disks)]
}

fn agent(disks: Vec<Disk>) -> [Report; 1] {
    let disks = disks.into_iter().map(|disk| Disk { sync_every_usec: 0, ..disk }).collect();
    [report(Role::Agent, disks)]
}

fn in_state(state: DiskState) -> Disk {
    Disk { state: state.as_str().into(), ..disk("web1", "sda") }
}

fn paused(by: &[&str]) -> Disk {
    let paused_by = by.iter().map(|s| (*s).to_owned()).collect();
    Disk { paused: true, paused_by, ..in_state(DiskState::Paused) }
}

#[test]
fn all_is_well() {
    let reports = dispatcher(vec![disk("db1", "vda"), disk("web1", "sda"), disk("web1", "sdb")]);
    assert_snapshot!(text(&reports), @r"
    3 of 3 disks protected

    AGENT  DISK  STATE     NEWEST    EXPOSED  CLASS
    db1    vda   idle   3 min ago  12.00 MiB  filesystem
    web1   sda   idle   3 min ago  12.00 MiB  filesystem
    web1   sdb   idle   3 min ago  12.00 MiB  filesystem
    ");
    assert_eq!(exit(&reports), None);
    let reports = agent(vec![disk("web1", "sda")]);
    assert_snapshot!(text(&reports), @r"
    1 of 1 disk protected

    AGENT  DISK  STATE     NEWEST    EXPOSED  CLASS
    web1   sda   idle   3 min ago  12.00 MiB  filesystem
    ");
    assert_eq!(exit(&reports), None);
}

#[test]
fn stored_data_that_is_damaged_protects_nobody() {
    let damage = vec!["x.bak is damaged: its content is not what it was sealed with".into(), "y".into()];
    let mut reports = dispatcher(vec![Disk { damage, ..disk("web1", "sda") }]);
    reports[0].scrub =
        Some(Scrub { every_usec: 1, began_usec: 1, progress: 0.5, damaged: 1, ..Scrub::default() });
    assert_snapshot!(text(&reports), @r"
    0 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE     NEWEST    EXPOSED  CLASS
    web1   sda   idle   3 min ago  12.00 MiB  filesystem

    scrub: 50 %, no full pass yet, damage in the files of 1 checkpoint

    to do:
      web1 sda: x.bak is damaged: its content is not what it was sealed with (and 1 more)
        'blxctl verify --agent web1 --disk 5000c500a1b2c3sda --all' says which checkpoints are sound; put the file back if there is a copy, and verify again
    ");
    assert_eq!(exit(&reports), Some(Exit::Attention));
    let json = json(&reports);
    let shown = &json["daemons"][0];
    assert_eq!(shown["disks"][0]["problems"][0]["kind"], "damaged");
    assert_eq!((&shown["disks"][0]["damage"][1], &shown["scrub"]["damaged"]), (&"y".into(), &1.into()));
    assert_eq!(shown["scrub"]["last_ended_usec"], Value::Null);
}

#[test]
fn an_agent_that_never_showed_a_disk_is_not_forgotten() {
    let mut reports = dispatcher(vec![disk("web1", "sda")]);
    reports[0].agents.push(Agent { id: "web2".into(), ..Agent::default() });
    assert_snapshot!(text(&reports), @r"
    1 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE     NEWEST    EXPOSED  CLASS
    web1   sda   idle   3 min ago  12.00 MiB  filesystem

    to do:
      web2: enrolled, and has never shown a disk
        'systemctl status blxrep-agent' on web2
    ");
    assert_eq!(exit(&reports), Some(Exit::Attention));
}

#[test]
fn a_machine_that_is_refused_and_the_right_one_beside_it() {
    let mut reports = dispatcher(vec![disk("web1", "sda")]);
    reports[0].agents[0].refused = "the machine at 192.0.2.9 is refused: it shows generation 5".into();
    assert_snapshot!(text(&reports), @r"
    1 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE     NEWEST    EXPOSED  CLASS
    web1   sda   idle   3 min ago  12.00 MiB  filesystem

    to do:
      web1: the machine at 192.0.2.9 is refused: it shows generation 5
        if it is the right one: 'blxctl accept web1'; if it is a copy: enroll it under a name of its own
    ");
    assert_eq!(exit(&reports), Some(Exit::Attention));
    assert_eq!(json(&reports)["daemons"][0]["agents_refused"][0]["agent"], "web1");
    let mut reports = agent(vec![disk("web1", "sda")]);
    reports[0].agents[0].refused = "this machine is refused: it shows generation 5".into();
    assert!(text(&reports).contains("'blxctl accept web1' on the dispatcher"));
}

#[test]
fn a_device_that_holds_a_part_of_a_restore() {
    let mut reports = agent(vec![disk("web1", "sda")]);
    reports[0].agents[0].unfinished = vec!["/dev/sdb holds only a part of it".into()];
    assert_snapshot!(text(&reports), @r"
    1 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE     NEWEST    EXPOSED  CLASS
    web1   sda   idle   3 min ago  12.00 MiB  filesystem

    to do:
      web1: /dev/sdb holds only a part of it
        restore it again: what it holds already is not sent once more
    ");
    assert_eq!(exit(&reports), Some(Exit::Attention));
    let told = &json(&reports)["daemons"][0]["targets_unfinished"][0];
    assert!(told["message"] == "/dev/sdb holds only a part of it" && told["agent"] == "web1", "{told}");
}

#[test]
fn a_disk_is_late_after_two_intervals_and_a_minute_and_not_before() {
    let aged = |lag| Disk { lag_usec: Some(lag), ..disk("web1", "sda") };
    assert!(is_protected(&aged(660_000_000)) && !is_protected(&aged(660_000_001)));
    let never = Disk { lag_usec: None, ..disk("web1", "sda") };
    assert!(!is_protected(&never));
    // An agent does not know the interval.
    let agents =
        |state: DiskState| Disk { sync_every_usec: 0, lag_usec: Some(u64::MAX - 1), ..in_state(state) };
    assert!(is_protected(&agents(DiskState::Idle)) && is_protected(&agents(DiskState::Comparing)));
    assert!(!is_protected(&agents(DiskState::Detached)) && !is_protected(&agents(DiskState::Failed)));
    assert!(!is_protected(&Disk { sync_every_usec: 0, ..paused(&["agent"]) }));
    // A wild interval is no reason to overflow.
    assert!(is_protected(&Disk { sync_every_usec: u64::MAX, ..aged(u64::MAX - 1) }));
}

#[test]
fn a_detached_disk() {
    let late = Disk { lag_usec: Some(10_000_000_000), ..in_state(DiskState::Detached) };
    let reports = dispatcher(vec![late.clone(), disk("web1", "sdb")]);
    assert_snapshot!(text(&reports), @r"
    1 of 2 disks protected, 1 needs attention

    AGENT  DISK  STATE        NEWEST    EXPOSED  CLASS
    web1   sda   detached    2 h ago  12.00 MiB  filesystem
    web1   sdb   idle      3 min ago  12.00 MiB  filesystem

    to do:
      web1 sda: detached: agent and dispatcher are not connected
        check the network and 'systemctl status blxrep-agent' on web1.example
    ");
    assert_eq!(exit(&reports), Some(Exit::Attention));
    assert_snapshot!(text(&agent(vec![late])), @r"
    0 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE      NEWEST    EXPOSED  CLASS
    web1   sda   detached  2 h ago  12.00 MiB  filesystem

    to do:
      web1 sda: detached: agent and dispatcher are not connected
        check the network and 'systemctl status blxrep-dispatcher' on the dispatcher
    ");
}

#[test]
fn a_disk_paused_by_each_side_as_each_side_sees_it() {
    assert_snapshot!(text(&dispatcher(vec![paused(&["agent"])])), @r"
    1 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE      NEWEST    EXPOSED  CLASS
    web1   sda   paused  3 min ago  12.00 MiB  filesystem

    to do:
      web1 sda: paused by the agent
        'blxctl resume --disk sda' on web1.example
    ");
    assert_snapshot!(text(&dispatcher(vec![paused(&["agent", "dispatcher"])])), @r"
    1 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE      NEWEST    EXPOSED  CLASS
    web1   sda   paused  3 min ago  12.00 MiB  filesystem

    to do:
      web1 sda: paused by the agent and the dispatcher
        'blxctl resume --disk sda' on web1.example and 'blxctl resume web1 --disk sda'
    ");
    assert_snapshot!(text(&agent(vec![paused(&["agent"])])), @r"
    0 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE      NEWEST    EXPOSED  CLASS
    web1   sda   paused  3 min ago  12.00 MiB  filesystem

    to do:
      web1 sda: paused by the agent
        'blxctl resume --disk sda'
    ");
    assert_snapshot!(text(&agent(vec![paused(&["dispatcher"])])), @r"
    0 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE      NEWEST    EXPOSED  CLASS
    web1   sda   paused  3 min ago  12.00 MiB  filesystem

    to do:
      web1 sda: paused by the dispatcher
        'blxctl resume web1 --disk sda' on the dispatcher
    ");
}

#[test]
fn the_first_copy_and_a_disk_without_a_checkpoint() {
    let none = |disk: Disk| Disk {
        lag_usec: None,
        last_checkpoint: String::new(),
        consistency: String::new(),
        ..disk
    };
    let copying = none(Disk { progress: 0.437, ..in_state(DiskState::Copying) });
    assert_snapshot!(text(&dispatcher(vec![copying])), @r"
    0 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE         NEWEST    EXPOSED  CLASS
    web1   sda   copying 43 %    none  12.00 MiB  -

    to do:
      web1 sda: no checkpoint yet: the first copy is at 43 %
        wait for it: 'blxctl watch'
    ");
    assert_snapshot!(text(&dispatcher(vec![none(in_state(DiskState::Idle))])), @r"
    0 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE  NEWEST    EXPOSED  CLASS
    web1   sda   idle     none  12.00 MiB  -

    to do:
      web1 sda: no checkpoint yet
        'blxctl sync web1 --disk sda'
    ");
}

#[test]
fn a_late_disk_that_idles_and_one_that_is_compared() {
    let late = |state| Disk { lag_usec: Some(7_300_000_000), ..in_state(state) };
    assert_snapshot!(text(&dispatcher(vec![late(DiskState::Idle)])), @r"
    0 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE   NEWEST    EXPOSED  CLASS
    web1   sda   idle   2 h ago  12.00 MiB  filesystem

    to do:
      web1 sda: late: the newest checkpoint is 2 h old, one is due every 5 min
        'blxctl sync web1 --disk sda', and if that fails 'journalctl -u blxrep-dispatcher.service'
    ");
    let comparing = Disk { progress: 0.5, ..late(DiskState::Comparing) };
    assert_snapshot!(text(&dispatcher(vec![comparing])), @r"
    0 of 1 disk protected, 1 needs attention

    AGENT  DISK  STATE            NEWEST    EXPOSED  CLASS
    web1   sda   comparing 50 %  2 h ago  12.00 MiB  filesystem

    to do:
      web1 sda: late: the newest checkpoint is 2 h old, one is due every 5 min; comparing now
        wait for it: 'blxctl watch'
    ");
}

#[test]
fn a_failed_disk_a_fuzzy_one_and_one_with_an_error() {
    let failed = Disk { last_error: "the disk grew: enroll it anew".into(), ..in_state(DiskState::Failed) };
    let fuzzy = Disk { consistency: "fuzzy".into(), ..disk("web1", "sdb") };
    let error = Disk { last_error: "the hook 10-pg failed".into(), ..disk("web1", "sdc") };
    let reports = dispatcher(vec![failed, fuzzy, error]);
    assert_snapshot!(text(&reports), @r"
    2 of 3 disks protected, 3 need attention

    AGENT  DISK  STATE      NEWEST    EXPOSED  CLASS
    web1   sda   failed  3 min ago  12.00 MiB  filesystem
    web1   sdb   idle    3 min ago  12.00 MiB  fuzzy
    web1   sdc   idle    3 min ago  12.00 MiB  filesystem

    to do:
      web1 sda: failed and not replicated any more: the disk grew: enroll it anew
        when that is put right, on web1.example: 'systemctl restart blxrep-agent'
      web1 sdb: the newest checkpoint is fuzzy: its blocks are of slightly different moments
        when the disk is less busy: 'blxctl sync web1 --disk sdb'
      web1 sdc: error: the hook 10-pg failed
        'journalctl -u blxrep-dispatcher.service'
    ");
    assert_eq!(exit(&reports), Some(Exit::Attention));
}

#[test]
fn what_runs_is_shown() {
    let mut reports = dispatcher(vec![disk("web1", "sda")]);
    reports[0].jobs = vec![job()];
    assert_snapshot!(text(&reports), @r"
    1 of 1 disk protected

    AGENT  DISK  STATE     NEWEST    EXPOSED  CLASS
    web1   sda   idle   3 min ago  12.00 MiB  filesystem

    running:
      job 7: restore of web1 sda to /srv/x.img, 43 %, 440.00 MiB of 1.00 GiB, 100.00 MiB/s, 5 s left
    ");
}

#[test]
fn nothing_to_protect_needs_attention() {
    let mut nobody = dispatcher(Vec::new());
    nobody[0].agents.clear();
    assert_snapshot!(text(&nobody), @r"
    no disks: nothing is protected

    to do:
      let an agent connect: 'blxrep enroll --help'
    ");
    assert_eq!(exit(&nobody), Some(Exit::Attention));
}

#[test]
fn both_roles_on_one_host_name_the_role_in_what_is_to_be_typed() {
    let [agent] = agent(vec![paused(&["agent"])]);
    let [dispatcher] = dispatcher(vec![Disk { agent: "db1".into(), ..disk("db1", "vda") }]);
    assert_snapshot!(text(&[dispatcher, agent]), @r"
    dispatcher: 1 of 1 disk protected; agent: 0 of 1 disk protected, 1 needs attention

    dispatcher:

    AGENT  DISK  STATE     NEWEST    EXPOSED  CLASS
    db1    vda   idle   3 min ago  12.00 MiB  filesystem

    agent:

    AGENT  DISK  STATE      NEWEST    EXPOSED  CLASS
    web1   sda   paused  3 min ago  12.00 MiB  filesystem

    to do:
      web1 sda: paused by the agent
        'blxctl --role agent resume --disk sda'
    ");
}

#[test]
fn for_programs() {
    let reports = dispatcher(vec![paused(&["agent"])]);
    assert_snapshot!(format!("{:#}", json(&reports)), @r#"
    {
      "daemons": [
        {
          "agents_refused": [],
          "agents_without_disks": [],
          "bus_name": "org.blxrep.Dispatcher",
          "disks": [
            {
              "agent": "web1",
              "consistency": "filesystem",
              "damage": [],
              "device": "sda",
              "dirty_bytes": 12582912,
              "disk": "5000c500a1b2c3sda",
              "lag_usec": 200000000,
              "last_checkpoint": "20261121203456",
              "last_error": null,
              "paused": true,
              "paused_by": [
                "agent"
              ],
              "problems": [
                {
                  "advice": "'blxctl resume --disk sda' on web1.example",
                  "kind": "paused",
                  "message": "paused by the agent"
                }
              ],
              "progress": 0.0,
              "protected": true,
              "size_bytes": 536870912000,
              "state": "paused",
              "sync_every_usec": 300000000
            }
          ],
          "disks_attention": 1,
          "disks_protected": 1,
          "disks_total": 1,
          "jobs": [],
          "role": "dispatcher",
          "scrub": null,
          "targets_unfinished": [],
          "version": "0.1.0"
        }
      ],
      "ok": false
    }
    "#);
}
