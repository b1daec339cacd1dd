//! The real `blxctl` against a pretended daemon on a private system bus with the project's own bus policy.
//!
//! These tests need root and `dbus-daemon`, and fail where one of them is missing.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use blxrep_dbus::{PATH_MANAGER, disk_path};
use insta::assert_snapshot;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use zbus::object_server::SignalEmitter;

use self::common::fake::{CONTENT, Disk, Manager, agent, dispatcher};
use self::common::{Bus, Said};

fn web1() -> Vec<Disk> {
    vec![Disk::new("web1", "one")]
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

fn wait(child: Child) -> Said {
    Said::new(child.wait_with_output().unwrap())
}

/// Waits until a job runs.
fn job_runs(bus: &Bus) {
    let begun = std::time::Instant::now();
    while bus.blxctl(&["jobs", "--json"]).json().as_array().unwrap().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20), "no job began");
    }
}

#[test]
fn without_a_daemon_it_says_so_and_exits_with_3() {
    let bus = Bus::start();
    for command in ["status", "disks", "watch"] {
        let said = bus.blxctl(&[command]);
        assert_eq!((said.code, said.out.as_str()), (Some(3), ""), "{command}");
        assert!(said.err.starts_with("blxctl: no blxrep daemon runs on this host\n"), "{said:?}");
    }
    let said = bus.blxctl(&["restore", "latest", "x.img"]);
    assert_eq!((said.code, bus.left()), (Some(3), vec![]));
}

#[test]
fn without_a_bus_it_says_what_to_do_and_exits_with_1() {
    let output = Command::new(env!("CARGO_BIN_EXE_blxctl"))
        .arg("status")
        .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/socket")
        .output();
    let said = Said::new(output.unwrap());
    assert_eq!((said.code, said.out.as_str()), (Some(1), ""));
    assert!(said.err.contains("cannot be reached") && said.err.contains("systemctl start dbus"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_good_from_bad_by_its_exit_code() {
    let bus = Bus::start();
    let good = dispatcher(&bus.address, web1()).await;
    let said = bus.blxctl(&["status"]);
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
    assert_snapshot!(said.out, @r"
    1 of 1 disk protected

    AGENT  DISK  STATE     NEWEST   EXPOSED  CLASS
    web1   sda   idle   3 min ago  4.00 KiB  filesystem

    scrub: 43 %, last full pass 2026-11-21, no damage
    ");
    assert_eq!(bus.blxctl(&["--role", "agent", "status"]).code, Some(3));
    good.close().await.unwrap();

    let failed = Disk { state: "failed", error: "the disk grew", ..Disk::new("web1", "one") };
    let bad = dispatcher(&bus.address, vec![failed]).await;
    let said = bus.blxctl(&["status", "--json"]);
    assert_eq!(said.code, Some(6));
    let json = said.json();
    assert_eq!((&json["ok"], &json["daemons"][0]["disks_protected"]), (&false.into(), &0.into()));
    assert_eq!(json["daemons"][0]["disks"][0]["problems"][0]["kind"], "failed");

    let _both = agent(&bus.address, web1()).await;
    let said = bus.blxctl(&["status"]);
    assert!(said.out.starts_with("dispatcher: 0 of 1 disk protected; agent: 1 of 1"), "{said:?}");
    assert_eq!(said.out.matches("scrub: ").count(), 1, "an agent checks nothing: {said:?}");
    bad.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_agent_and_an_agents_own_id_may_be_left_out() {
    let bus = Bus::start();
    let one = dispatcher(&bus.address, web1()).await;
    let said = bus.blxctl(&["show", "--start", "202611210000", "--json"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    let shown = said.json();
    assert_eq!((&shown[0]["agent"], &shown[0]["note"]), (&"web1".into(), &"from 202611210000".into()));
    let said = bus.blxctl(&["show", "db1"]);
    assert_eq!((said.code, said.err.as_str()), (Some(5), "blxctl: there is no agent db1\n"));
    one.close().await.unwrap();

    let two = dispatcher(&bus.address, vec![Disk::new("web1", "one"), Disk::new("db1", "one")]).await;
    let said = bus.blxctl(&["pause"]);
    assert_eq!((said.code, said.err.as_str()), (Some(2), "blxctl: which agent? There are db1, web1\n"));
    two.close().await.unwrap();

    let _agent = agent(&bus.address, web1()).await;
    assert_eq!(bus.blxctl(&["sync"]).code, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accepting_and_comparing_reach_the_daemon() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    let said = bus.blxctl(&["accept", "web1"]);
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
    assert!(said.out.starts_with("web1: accepted"), "{said:?}");
    assert_eq!(bus.blxctl(&["accept", "web1", "--disk", "sda"]).out, "web1 sda: accepted\n");
    assert_eq!(bus.blxctl(&["accept", "web1", "--json"]).json()["accepted"], true);
    assert_eq!(bus.blxctl(&["accept", "web2"]).code, Some(5));
    assert_eq!(bus.blxctl(&["accept", "web1", "--disk", "sdz"]).code, Some(5));
    let said = bus.blxctl(&["sync", "web1", "--compare", "--json"]).json();
    assert_eq!(said["checkpoints"]["one"], "20261121204056");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pause_and_resume_tell_what_they_changed() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    assert_eq!(bus.blxctl(&["pause", "web1"]).out, "web1 sda: paused\n");
    let again = bus.blxctl(&["pause", "web1"]);
    assert_eq!((again.code, again.out.as_str()), (Some(0), "was paused already\n"));
    assert_eq!(bus.blxctl(&["status"]).code, Some(6));
    let resumed = bus.blxctl(&["resume", "web1", "--json"]).json();
    assert_eq!(resumed["changed"][0]["disk"], "one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_file_appears_whole_under_its_name() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    // As fast as a job can end: before the call that began it has its answer.
    for (checkpoint, file) in [("latest", "a.img"), ("instant", "b.img")] {
        let said = bus.blxctl(&["restore", checkpoint, file]);
        assert_eq!((said.code, said.err.as_str()), (Some(0), ""), "{said:?}");
        let path = bus.dir.path().join(file);
        assert_eq!(
            said.out,
            format!(
                "{}: checkpoint 20261121203456 of web1's one (filesystem), 22 B verified\n",
                path.display()
            )
        );
        assert_eq!(fs::read(&path).unwrap(), CONTENT);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(bus.left().len(), 2);
    let fuzzy = bus.blxctl(&["restore", "fuzzy", "c.img", "--json"]);
    assert!(fuzzy.err.starts_with("warning: this checkpoint is fuzzy"), "{fuzzy:?}");
    assert_eq!((fuzzy.code, &fuzzy.json()["result"]), (Some(0), &"done".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_fails_or_is_refused_leaves_nothing() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    let said = bus.blxctl(&["restore", "bad", "x.img"]);
    assert_eq!((said.code, said.out.as_str(), bus.left()), (Some(4), "", vec![]));
    assert_snapshot!(said.err, @r"
    blxctl: 20261121203456 is damaged
        block 7 of x.bak
    ");
    let said = bus.blxctl(&["restore", "secret", "x.img"]);
    assert_eq!((said.code, bus.left()), (Some(3), vec![]));
    assert!(said.err.contains("polkit action org.blxrep.restore"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_there_is_not_overwritten_and_the_daemon_not_asked() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    fs::write(bus.dir.path().join("x.img"), "precious").unwrap();
    for more in [&["--no-wait"][..], &[]] {
        let said = bus.blxctl(&[&["restore", "slow", "x.img"], more].concat());
        assert_eq!(said.code, Some(2));
        assert!(said.err.contains("is there already and is not overwritten"), "{said:?}");
    }
    assert_eq!(fs::read(bus.dir.path().join("x.img")).unwrap(), b"precious");
    assert_eq!(bus.blxctl(&["jobs"]).out, "no jobs run\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_is_written_in_place_and_refused_while_it_is_in_use() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    let image = bus.dir.path().join("device");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let device = LoopDevice::new(image.to_str().unwrap());
    let said = bus.blxctl(&["restore", "latest", &device.0]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(fs::metadata(&device.0).unwrap().file_type().is_block_device());
    let mut begin = vec![0; CONTENT.len()];
    fs::File::open(&device.0).unwrap().read_exact(&mut begin).unwrap();
    assert_eq!(begin, CONTENT);

    let exclusive = || fs::File::options().write(true).custom_flags(nix::libc::O_EXCL).open(&device.0);
    // The daemon may close what it was passed a moment behind the end of the job.
    let held = (0..200).find_map(|_| {
        let held = exclusive().ok();
        if held.is_none() {
            std::thread::sleep(Duration::from_millis(50));
        }
        held
    });
    let held = held.expect("nobody holds it any more");
    let said = bus.blxctl(&["restore", "latest", &device.0]);
    assert_eq!(said.code, Some(2));
    assert!(said.err.contains("is in use"), "{said:?}");
    drop(held);
}

struct LoopDevice(String);

impl LoopDevice {
    fn new(image: &str) -> Self {
        let output = Command::new("losetup").args(["--find", "--show", image]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupting_cancels_waits_and_cleans_up() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    for stop in [Signal::SIGINT, Signal::SIGTERM] {
        let child = bus.command(&["restore", "slow", "x.img"]).spawn().unwrap();
        job_runs(&bus);
        assert_eq!(bus.left().len(), 1, "the hidden file");
        signal(&child, stop);
        let said = wait(child);
        assert_eq!((said.code, said.out.as_str(), bus.left()), (Some(1), "", vec![]));
        let told = said.err.replace(|c: char| c.is_ascii_digit(), "N");
        assert_eq!(told, "blxctl: canceling ...; once more to leave it\nblxctl: job N was canceled\n");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_interrupt_leaves_a_job_that_does_not_end() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    let mut child = bus.command(&["restore", "stubborn", "x.img"]).spawn().unwrap();
    job_runs(&bus);
    signal(&child, Signal::SIGINT);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("canceling"));
    signal(&child, Signal::SIGINT);
    assert_eq!(lines.next().unwrap().unwrap(), "blxctl: left before the job had ended: see 'blxctl jobs'");
    assert_eq!((wait(child).code, bus.left()), (Some(1), vec![]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_goes_away_during_a_job_is_told() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    let said = bus.blxctl(&["restore", "die", "x.img"]);
    assert_eq!((said.code, bus.left()), (Some(1), vec![]));
    assert_snapshot!(said.err, @r"
    blxctl: the dispatcher went away during the job, which ended with it
      see 'journalctl -u blxrep-dispatcher.service', and begin again when 'blxctl status' shows it
    ");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_can_be_left_running_seen_and_canceled() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    let said = bus.blxctl(&["verify", "slow", "--no-wait"]);
    assert_eq!((said.code, said.out.as_str()), (Some(0), "job 1 (/org/blxrep/job/1)\n"));
    assert_eq!(bus.blxctl(&["sync", "--no-wait", "--json"]).json()["path"], "/org/blxrep/job/2");
    let listed = bus.blxctl(&["jobs", "--json"]).json();
    assert_eq!((&listed[0]["type"], &listed[0]["started_by"]), (&"verify".into(), &"root".into()));
    assert_eq!(bus.blxctl(&["cancel", "1"]).out, "job 1: canceling\n");
    let said = bus.blxctl(&["cancel", "77"]);
    assert_eq!((said.code, said.err.as_str()), (Some(5), "blxctl: no job 77 runs: see 'blxctl jobs'\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_lists_damage_and_exits_with_4() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    let sound = bus.blxctl(&["verify", "latest"]);
    assert_eq!((sound.code, sound.out.as_str()), (Some(0), "checkpoint latest of web1's one: sound\n"));
    let damaged = bus.blxctl(&["verify", "damaged", "--json"]);
    assert_eq!((damaged.code, &damaged.json()["damage"][0]), (Some(4), &"block 7 of x.bak".into()));
    assert_eq!(damaged.err, "blxctl: checkpoint damaged of one is damaged\n    block 7 of x.bak\n");
    let asked = |args: &[&str]| {
        let json = bus.blxctl(&[&["verify", "--json"], args].concat()).json();
        ["agent", "disk"].map(|key| json["verified"][0][key].as_str().unwrap().to_owned())
    };
    assert_eq!(asked(&["--all"]), ["", ""]);
    assert_eq!(asked(&["--agent", "web1", "--all", "--disk", "one"]), ["web1", "disk"]);
    assert_eq!(asked(&["--start", "202611212034", "--end", "202611212035"]), ["", "end+start"]);
    assert_eq!(asked(&["latest", "202611212034"]), ["web1", "checkpoints"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watch_prints_each_event_at_once_also_over_a_restart() {
    let bus = Bus::start();
    let daemon = dispatcher(&bus.address, web1()).await;
    let mut child = bus.command(&["watch", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || -> serde_json::Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    // It has no other sign that it listens: what is told before is not heard.
    let emitter = SignalEmitter::new(&daemon, PATH_MANAGER).unwrap().into_owned();
    let telling = tokio::spawn(async move {
        loop {
            let _ = Manager::checkpoint_added(&emitter, "web1", "one", "20261121203956").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let heard = next();
    assert_eq!((&heard["event"], &heard["checkpoint"]), (&"checkpoint".into(), &"20261121203956".into()));
    telling.abort();
    let mut until = |event: &str| loop {
        let heard = next();
        if heard["event"] == event {
            return heard;
        }
        assert_eq!(heard["event"], "checkpoint");
    };

    let disk = daemon.object_server().interface::<_, Disk>(disk_path("web1", "one")).await.unwrap();
    disk.get_mut().await.state = "syncing";
    disk.get().await.state_changed(disk.signal_emitter()).await.unwrap();
    assert_eq!(until("disk")["state"], "syncing");
    assert_eq!(bus.blxctl(&["verify", "latest"]).code, Some(0));
    assert_eq!(
        (until("job_began")["job"].as_u64(), until("job_ended")["result"].as_str()),
        (Some(1), Some("done"))
    );

    daemon.close().await.unwrap();
    assert_eq!(until("daemon_gone")["role"], "dispatcher");
    let _again = dispatcher(&bus.address, web1()).await;
    until("daemon_back");
    assert_eq!(until("disk")["state"], "idle", "what changed meanwhile is told");
    signal(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_has_seen_enough_is_no_failure() {
    let bus = Bus::start();
    let _daemon = dispatcher(&bus.address, web1()).await;
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let said = wait(bus.command(&["disks"]).stdout(Stdio::from(writer)).spawn().unwrap());
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
}

#[test]
fn man_pages_and_completions_have_their_installed_names() {
    let bus = Bus::start();
    assert_eq!(bus.blxctl(&["generate", "out"]).code, Some(0));
    let out = bus.dir.path().join("out");
    for file in ["man/man1/blxctl.1", "man/man1/blxctl-restore.1", "completions/bash/blxctl"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    assert!(
        out.join("completions/zsh/_blxctl").is_file() && out.join("completions/fish/blxctl.fish").is_file()
    );
    assert!(!out.join("man/man1/blxctl-generate.1").exists());
    let page = fs::read_to_string(out.join("man/man1/blxctl.1")).unwrap();
    for part in [".SH \"EXIT STATUS\"", ".SH EXAMPLES", ".SH ENVIRONMENT", ".SH FILES", "blxctl \\- "] {
        assert!(page.contains(part), "{part}");
    }
}

#[test]
fn the_policy_keeps_other_users_from_the_names() {
    let bus = Bus::start();
    for name in ["org.blxrep.Agent", "org.blxrep.Dispatcher"] {
        let request = |command: &mut Command| {
            command
                .arg(format!("--bus={}", bus.address))
                .args(["--print-reply", "--dest=org.freedesktop.DBus"]);
            command.args(["/org/freedesktop/DBus", "org.freedesktop.DBus.RequestName"]);
            command.arg(format!("string:{name}")).arg("uint32:4").output()
        };
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid=65534", "--regid=65534", "--clear-groups", "dbus-send"]);
        let refused = request(&mut setpriv).expect("setpriv cannot be run: run tools/install-deps test");
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            text.contains("org.freedesktop.DBus.Error.AccessDenied"),
            "{name}: {text} (these tests need root)"
        );
        let allowed =
            request(&mut Command::new("dbus-send")).expect("dbus-send: run tools/install-deps test");
        assert!(
            allowed.status.success(),
            "root may own {name}: {}",
            String::from_utf8_lossy(&allowed.stderr)
        );
    }
}
