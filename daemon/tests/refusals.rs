//! Everything that must be refused is, with a clear message and an exit code, and nothing is written.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod lab;
    pub(crate) mod wire;
}

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use blxrep::geometry::Geometry;
use blxrep::ids::Epoch;
use blxrep::tracker::{Claim, Gap};
use blxrep::wire::frame::{FRAME_MAX_BYTES, decode_message, encode_message};
use blxrep::wire::message::{DiskDown, DiskUp};
use blxrep::wire::socket::ConnectError;
use blxrep::wire::{Endpoint, header};
use common::lab::{BLXREP, Lab, run, wait_for};
use common::wire::{dial, disk_headers, next, send, session};
use futures_util::SinkExt;
use tokio_tungstenite::tungstenite::{Bytes, Message};

fn blxrep(args: &[&str]) -> Output {
    Command::new(BLXREP).args(args).output().unwrap()
}

/// Runs blxrep; it must exit with this code and say this.
fn refused(args: &[&str], code: i32, says: &str) {
    let output = blxrep(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    assert!(error.contains(says), "{args:?} must say {says:?}: {error}");
}

/// Starts an agent that must give up with this code and say this.
fn agent_refused(lab: &Lab, agent: &str, devices: &[&str], code: i32, says: &str) {
    let mut process = lab.start_agent(agent, devices, &[]);
    let exit = process.exit_code(60);
    let log = process.log();
    assert_eq!(exit, code, "{log}");
    assert!(log.contains(says), "must say {says:?}: {log}");
}

fn files_below(dir: &str) -> Vec<String> {
    let list = run("find", &[dir, "-type", "f", "-not", "-name", "catalogue.redb"]);
    let mut files: Vec<String> = list.lines().map(str::to_owned).collect();
    files.sort();
    files
}

#[test]
fn keys_and_agents_that_are_not_right() {
    let mut lab = Lab::new("keys");
    let disk = lab.loop_disk(16);
    let agent = lab.agent("a");
    let key_file = lab.enroll(&agent);
    lab.start_dispatcher(&[]);
    let before = files_below(&lab.path("data"));
    let good = fs::read_to_string(&key_file).unwrap();
    let parts: Vec<&str> = good.split(':').collect();
    let with = |secret: &str, fingerprint: &str| {
        fs::write(&key_file, format!("blxrep1:{agent}:{secret}:{fingerprint}")).unwrap();
    };
    with(&"0".repeat(64), parts[3]);
    agent_refused(&lab, &agent, &[&disk.path], 3, "is not enrolled with this key");
    with(parts[2], &"0".repeat(64));
    agent_refused(&lab, &agent, &[&disk.path], 3, "another certificate");
    let stranger = lab.agent("stranger");
    fs::write(lab.path(&format!("{stranger}.key")), good.replace(&agent, &stranger)).unwrap();
    fs::set_permissions(lab.path(&format!("{stranger}.key")), fs::Permissions::from_mode(0o600)).unwrap();
    agent_refused(&lab, &stranger, &[&disk.path], 3, "is not enrolled with this key");
    assert_eq!(files_below(&lab.path("data")), before, "nothing is written for a stranger");
    let log = lab.dispatcher.as_ref().unwrap().log();
    assert!(log.contains("its secret is wrong") && log.contains("not in the agents file"), "{log}");
    assert!(!log.contains(parts[2]), "no secret in the log");
}

#[test]
fn an_agent_that_is_connected_already() {
    let mut lab = Lab::new("twice");
    let (one, two) = (lab.loop_disk(16), lab.loop_disk(16));
    let agent = lab.agent("a");
    lab.enroll(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let first = lab.start_agent(&agent, &[&one.path], &[]);
    lab.wait_checkpoints(&agent, &one.name, 1, 30);
    // The same state directory: found at once on one machine.
    agent_refused(&lab, &agent, &[&one.path], 1, "held by another blxrep");
    // Another machine has another state directory.
    let mut second = lab.start_agent_in("other-state", &agent, &[&two.path], &[]);
    let code = second.exit_code(60);
    assert_eq!(code, 3, "{}", second.log());
    assert!(second.log().contains("is connected already"), "{}", second.log());
    let count = lab.show(&agent, Some(&one.name)).len();
    lab.wait_checkpoints(&agent, &one.name, count + 1, 30);
    assert!(lab.show(&agent, Some(&two.name)).is_empty());
    drop(first);
}

#[test]
fn devices_that_are_not_whole_disks_and_a_disk_that_shrank() {
    let mut lab = Lab::new("devices");
    let disk = lab.loop_disk(32);
    lab.partition(&disk, "label: dos\n,8M\n");
    let agent = lab.agent("a");
    lab.enroll(&agent);
    let file = lab.path("file");
    fs::write(&file, [0; 4096]).unwrap();
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    agent_refused(&lab, &agent, &[&file], 1, "not a block device");
    agent_refused(&lab, &agent, &["/dev/blxrep-no-such-disk"], 1, "/dev/blxrep-no-such-disk");
    agent_refused(&lab, &agent, &[&disk.part(1)], 1, &disk.name);
    assert!(!Path::new(&lab.path(&format!("data/snapshot/{agent}"))).exists());
    let process = lab.start_agent(&agent, &[&disk.path], &[]);
    lab.wait_checkpoints(&agent, &disk.name, 1, 30);
    drop(process);
    let before = files_below(&lab.path("data"));
    let small = lab.path("small");
    fs::File::create(&small).unwrap().set_len(24 << 20).unwrap();
    run("losetup", &["-d", &disk.path]);
    // The same loop device, and so the same disk id, but smaller.
    wait_for("the loop device to be free", 5, || {
        Command::new("losetup").args([&disk.path, &small]).status().unwrap().success()
    });
    let mut process = lab.start_agent(&agent, &[&disk.path], &[]);
    wait_for("the refusal", 30, || process.log().contains("shrank from 33554432 to 25165824 bytes"));
    let log = process.log();
    assert!(log.contains(&format!("'blxctl accept {agent} --disk {}'", disk.name)), "{log}");
    // It is asked no more for now, and the agent waits for a person. The first refusal may come too late for one attempt more.
    let attempts = || lab.dispatcher.as_ref().unwrap().log().matches("shrank").count();
    std::thread::sleep(std::time::Duration::from_secs(1));
    let before_pause = attempts();
    std::thread::sleep(std::time::Duration::from_secs(4));
    assert_eq!(attempts(), before_pause);
    assert_eq!(process.child.try_wait().unwrap(), None, "the agent goes on");
    assert_eq!(files_below(&lab.path("data")), before);
}

#[test]
fn names_and_configurations() {
    let lab = Lab::new("names");
    let data = lab.path("data");
    fs::create_dir_all(lab.path("data/snapshot")).unwrap();
    let show = |agent: &str, disk: &str, code: i32, says: &str| {
        refused(&["dispatcher", "show", "--agent", agent, "--disk", disk, "--data-dir", &data], code, says);
    };
    show("../../x", "sda", 2, "not valid");
    show("nobody", "sda", 5, "nobody");
    let restore = ["dispatcher", "restore", "--agent", "nobody", "--disk", "../../x", "--data-dir", &data];
    refused(&[&restore[..], &["--checkpoint", "latest"]].concat(), 5, "nobody");
    refused(
        &["enroll", "../../x", "--data-dir", &data, "--agents-file", &lab.path("agents")],
        2,
        "not valid",
    );
    assert!(!Path::new(&lab.path("agents")).exists());
    let config = lab.path("config.yaml");
    let configured = |text: &str, says: &[&str]| {
        fs::write(&config, text).unwrap();
        says.iter().for_each(|says| refused(&["start", "--config", &config], 2, says));
    };
    configured("mode: agent\nsync-frequency: 5\n", &["sync-frequency", "line 2", &config]);
    configured("mode: agent\nid: ../../x\n", &["id", "../../x", "line 2", &config]);
    configured("mode: agent\nid: a\n", &["'device' is missing", &config]);
    configured("mode: dispatcher\n", &["'data-dir' is missing"]);
    configured("id: a\n", &["'mode' is missing"]);
    configured("mode: agent\nid: a\ndevice: /dev/x\ndispatcher-addr: ws://h:1\n", &["TLS only", "line 4"]);
    refused(&["start", "--config", "/nonexistent.yaml"], 2, "/nonexistent.yaml");
}

#[test]
fn a_configuration_is_checked_without_what_it_names() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.yaml").to_str().unwrap().to_owned();
    let check = ["check-config", "--config", &config];
    let agent =
        "id: a\ndispatcher-addr: h:1\ndevice: /dev/nosuch\nkey-file: /nosuch/key\nhooks-dir: /nosuch\n";
    // Both roles on one host have one file.
    fs::write(&config, format!("{agent}data-dir: /nosuch/data\nagents-file: /nosuch/agents\n")).unwrap();
    for mode in ["agent", "dispatcher"] {
        let output = blxrep(&[&check[..], &["--mode", mode]].concat());
        assert!(output.status.success(), "{mode}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(!Path::new("/nosuch").exists());
    }
    refused(&check, 2, "'mode' is missing");
    fs::write(&config, agent).unwrap();
    refused(&[&check[..], &["--mode", "dispatcher"]].concat(), 2, "'data-dir' is missing");
    fs::write(&config, format!("{agent}block-size: 1000\n")).unwrap();
    refused(&[&check[..], &["--mode", "agent"]].concat(), 2, "'block-size'");
    fs::write(&config, agent.replace("dispatcher-addr: h:1", "dispatcher-addr: h")).unwrap();
    refused(&[&check[..], &["--mode", "agent"]].concat(), 2, "dispatcher-addr");
    fs::write(&config, format!("{agent}sink-freq: 5\n")).unwrap();
    refused(&[&check[..], &["--mode", "agent"]].concat(), 2, "unknown field `sink-freq`");
}

#[test]
fn an_agents_file_that_the_system_makes_is_not_enrolled_in() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().to_str().unwrap();
    let script = format!(
        "mkdir {dir}/ro && mount -t tmpfs -o ro none {dir}/ro && exec {BLXREP} enroll a --data-dir {dir}/data --agents-file {dir}/ro/agents"
    );
    let output = Command::new("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("read-only") && error.contains("--agents-file"), "{error}");
    assert!(output.stdout.is_empty(), "no key that is of no use");
}

#[test]
fn a_restore_onto_a_full_disk_leaves_nothing() {
    let mut lab = Lab::new("full");
    let disk = lab.loop_disk(32);
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={}", disk.path),
            "bs=1M",
            "count=32",
            "oflag=direct",
            "status=none",
        ],
    );
    let agent = lab.agent("a");
    lab.enroll(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let process = lab.start_agent(&agent, &[&disk.path], &[]);
    lab.wait_checkpoints(&agent, &disk.name, 1, 30);
    drop(process);
    let mut small = lab.loop_disk(16);
    let path = small.path.clone();
    let mount = small.mkfs_mount(&lab, "ext4", &path);
    let output = lab.restore(&agent, &disk.name, "latest", mount.join("x.img").to_str().unwrap());
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("space"), "{output:?}");
    let left: Vec<_> = fs::read_dir(&mount).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["lost+found"]);
    let existing = lab.path("existing");
    fs::write(&existing, "mine").unwrap();
    let output = lab.restore(&agent, &disk.name, "latest", &existing);
    assert!(!output.status.success() && fs::read_to_string(&existing).unwrap() == "mine");
}

#[test]
fn damage_is_named_and_nothing_is_written() {
    let mut lab = Lab::new("damage");
    let disk = lab.loop_disk(24);
    let write = |seek: u32| {
        let (of, seek) = (format!("of={}", disk.path), format!("seek={seek}"));
        run(
            "dd",
            &[
                "if=/dev/urandom",
                &of,
                "bs=1M",
                "count=4",
                &seek,
                "oflag=direct",
                "conv=notrunc",
                "status=none",
            ],
        );
    };
    write(0);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let process = lab.start_agent(&agent, &[&disk.path], &[]);
    lab.wait_checkpoints(&agent, &disk.name, 1, 30);
    write(2);
    let count = lab.show(&agent, None).len();
    lab.wait_checkpoints(&agent, &disk.name, count + 2, 30);
    drop(process);
    lab.dispatcher = None;
    let files: Vec<String> = files_below(&lab.path("data"))
        .into_iter()
        .filter(|f| [".img", ".sum", ".bak", ".cst"].iter().any(|e| f.ends_with(e)))
        .collect();
    for extension in [".img", ".sum", ".bak", ".cst"] {
        assert!(files.iter().any(|f| f.ends_with(extension)), "{files:?}");
    }
    let output = lab.path("out.img");
    for file in &files {
        let good = fs::read(file).unwrap();
        for at in [0, good.len() / 3, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            fs::write(file, &bad).unwrap();
            let done = lab.restore(&agent, &disk.name, "latest", &output);
            let error = String::from_utf8_lossy(&done.stderr);
            let name = Path::new(file).file_name().unwrap().to_str().unwrap();
            assert_eq!(done.status.code(), Some(4), "byte {at} of {file}: {error}");
            assert!(error.contains(name), "byte {at} of {file}: {error}");
            assert!(!Path::new(&output).exists());
        }
        fs::write(file, &good).unwrap();
    }
    assert!(lab.restore(&agent, &disk.name, "latest", &output).status.success());
}

fn attach(geometry: Geometry) -> Vec<u8> {
    let claim = Claim { epoch: Epoch([9; 16]), base: None, gap: Some(Gap::NewTracker) };
    encode_message(&DiskUp::Attach { device: "sdx".into(), geometry, claim }).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_every_endpoint() {
    let mut lab = Lab::new("garbage");
    let agent = lab.agent("a");
    lab.enroll(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let dial = Arc::new(dial(&lab, &agent));
    let geometry = Geometry::new(8 << 20, 12).unwrap();
    let garbage =
        [vec![], vec![0xff; 40], vec![1, 1, 0, 0, 4, 0, 0, 0, 9, 9, 9, 9], vec![1, 2, 0, 0, 0, 0, 0, 0]];
    for bytes in &garbage {
        let mut config = dial.open(Endpoint::Config, &dial.headers()).await.unwrap();
        send(&mut config, bytes.clone()).await;
        assert_eq!(next(&mut config).await, None, "{bytes:?}");
        wait_for("the place to be free", 5, || {
            lab.dispatcher.as_ref().unwrap().log().contains("left before it was welcome")
        });
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let (_config, token) = session(&dial, "sdx", geometry).await;
    let headers = disk_headers(&dial, token, "sdx");
    for bad in ["../../x", "", "sdy"] {
        let mut headers = headers.clone();
        headers.retain(|(name, _)| *name != header::DISK);
        headers.push((header::DISK, bad.to_owned()));
        let error = dial.open(Endpoint::Live, &headers).await.unwrap_err();
        assert!(matches!(error, ConnectError::Refused { status: 400 | 403, .. }), "{bad}: {error}");
    }
    let mut without = headers.clone();
    without.retain(|(name, _)| *name != header::SESSION);
    assert!(dial.open(Endpoint::Live, &without).await.is_err(), "the session must be named");

    for bytes in garbage.iter().chain(&[vec![0; FRAME_MAX_BYTES + 1]]) {
        for endpoint in [Endpoint::Live, Endpoint::Snapshot, Endpoint::Restore] {
            let mut snapshot = dial.open(Endpoint::Snapshot, &headers).await.unwrap();
            let mut socket = dial.open(endpoint, &headers).await.unwrap();
            // Garbage may be cut off while it is still being sent.
            let _ = socket.send(Message::Binary(Bytes::from(bytes.clone()))).await;
            if endpoint != Endpoint::Snapshot {
                while let Some(frame) = next(&mut socket).await {
                    assert!(matches!(decode_message(&frame), Ok(DiskDown::Refused { .. })), "{endpoint}");
                }
            }
            drop((socket, snapshot.close(None).await));
        }
    }
    // Well-formed, but not allowed: data that lies, blocks that are not on the disk, a seal out of turn.
    let lies = [
        encode_message(&DiskUp::Changed(vec![blxrep::bitmap::Extent { first: 1 << 40, count: 1 }])).unwrap(),
        encode_message(&DiskUp::WantHashes { group: 9999 }).unwrap(),
        encode_message(&DiskUp::Seal {
            id: "20261121000000".parse().unwrap(),
            consistency: blxrep::checkpoint::Consistency::Application,
            time_unix_ms: 0,
            freeze_ms: 0,
            note: String::new(),
        })
        .unwrap(),
    ];
    for lie in lies {
        let headers = disk_headers(&dial, token, "sdx");
        let _snapshot = dial.open(Endpoint::Snapshot, &headers).await.unwrap();
        let mut live = dial.open(Endpoint::Live, &headers).await.unwrap();
        send(&mut live, attach(geometry)).await;
        let attached = decode_message(&next(&mut live).await.unwrap()).unwrap();
        assert!(matches!(attached, DiskDown::Attached { .. }), "{attached:?}");
        send(&mut live, lie).await;
        let refused = decode_message(&next(&mut live).await.unwrap()).unwrap();
        assert!(matches!(refused, DiskDown::Refused { .. }), "{refused:?}");
    }
    let rows = lab.show(&agent, None);
    assert!(rows.is_empty(), "no checkpoint came of it: {rows:?}");
}
