//! `blxctl boot` and `verify --boot` with a pretended daemon, and a QEMU that is a script.
//!
//! These tests need root and `dbus-daemon`, and fail where one of them is missing.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use blxrep_dbus::PATH_MANAGER;
use insta::assert_snapshot;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use zbus::Connection;

use self::common::fake::{Disk, Manager, dispatcher};
use self::common::{Bus, Said};

/// A bus with a dispatcher, and a QEMU.
struct World {
    bus: Bus,
    daemon: Connection,
}

impl World {
    async fn start(qemu: &str) -> Self {
        let bus = Bus::start();
        let daemon = dispatcher(&bus.address, vec![Disk::new("web1", "one")]).await;
        for dir in ["bin", "tmp"] {
            fs::create_dir(bus.dir.path().join(dir)).unwrap();
        }
        let (program, pid) = (bus.dir.path().join("bin/qemu-system-x86_64"), bus.dir.path().join("pid"));
        fs::write(&program, format!("#!/bin/sh\necho $$ >{}\n{qemu}\n", pid.display())).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { bus, daemon }
    }

    fn command(&self, args: &[&str]) -> Command {
        let dir = self.bus.dir.path();
        let mut command = self.bus.command(args);
        command
            .env("PATH", format!("{}:/usr/bin:/bin", dir.join("bin").display()))
            .env("TMPDIR", dir.join("tmp"));
        command
    }

    fn blxctl(&self, args: &[&str]) -> Said {
        Said::new(self.command(args).output().unwrap())
    }

    /// Waits until QEMU runs.
    fn wait_for_qemu(&self) {
        let began = Instant::now();
        while !fs::read_to_string(self.bus.dir.path().join("pid")).is_ok_and(|pid| pid.ends_with('\n')) {
            assert!(began.elapsed() < Duration::from_secs(20), "QEMU was not started");
        }
    }

    /// What the dispatcher was given to keep; neither a machine, nor a job, nor a file is left.
    async fn left(&self) -> Vec<[String; 5]> {
        if let Ok(pid) = fs::read_to_string(self.bus.dir.path().join("pid")) {
            assert!(!Path::new("/proc").join(pid.trim()).exists());
        }
        assert_eq!(fs::read_dir(self.bus.dir.path().join("tmp")).unwrap().count(), 0);
        let began = Instant::now();
        while !self.bus.blxctl(&["jobs", "--json"]).json().as_array().unwrap().is_empty() {
            assert!(began.elapsed() < Duration::from_secs(20), "an export is left");
        }
        let manager = self.daemon.object_server().interface::<_, Manager>(PATH_MANAGER).await.unwrap();
        manager.get().await.booted.clone()
    }
}

fn stop(child: &Child) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
}

fn kept(result: &str, console: &str) -> Vec<[String; 5]> {
    vec![["web1", "one", "20261121203456", result, console].map(str::to_owned)]
}

const VERIFY: [&str; 4] = ["verify", "--boot", "--boot-timeout", "60"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_prompt_proves_it() {
    let world = World::start("printf 'GRUB\\r\\n\\033[0mweb1 lo'; printf 'gin: '; exec sleep 1000").await;
    let said = world.blxctl(&VERIFY);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.out.starts_with("checkpoint 20261121203456 of web1's one: boots, in "), "{said:?}");
    assert_eq!(world.left().await, kept("passed", "GRUB\nweb1 login:\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_come_up_is_told_at_once_with_the_consoles_end() {
    let world =
        World::start("printf '[ 1.0] Kernel panic - not syncing'; printf ': VFS\\r\\n'; exec sleep 1000")
            .await;
    let said = world.blxctl(&VERIFY);
    assert_eq!((said.code, said.out.as_str()), (Some(4), ""));
    assert_snapshot!(said.err, @r"
    blxctl: checkpoint 20261121203456 of web1's one does not boot: the kernel panicked
        [ 1.0] Kernel panic - not syncing: VFS
    ");
    assert_eq!(world.left().await, kept("failed", "[ 1.0] Kernel panic - not syncing: VFS\n"));
    let json = world.blxctl(&[&VERIFY[..], &["--json", "latest"]].concat()).json();
    assert_eq!((&json["boot"], &json["reason"]), (&"failed".into(), &"the kernel panicked".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_and_the_machine_may_end_before_it_is_up() {
    let world = World::start("printf 'web1 login: '; exec sleep 1000").await;
    let said = world.blxctl(&["verify", "--boot", "--probe", "--boot-timeout", "1"]);
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(said.err.contains("does not boot: 1 s were over"), "{said:?}");
    assert_eq!(world.left().await, kept("failed", "web1 login:\n"));

    let world = World::start("echo bye").await;
    let said = world.blxctl(&VERIFY);
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(said.err.contains("the machine restarted or was switched off"), "{said:?}");
    assert_eq!(world.left().await, kept("failed", "bye\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_qemu_cannot_be_run_nothing_is_said_of_the_checkpoint() {
    let world = World::start("echo 'no such option' >&2; exit 1").await;
    let said = world.blxctl(&VERIFY);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.err.starts_with("no such option\nblxctl: qemu-system-x86_64 broke off"), "{said:?}");
    assert_eq!(world.left().await, kept("", "")[1..]);

    fs::remove_file(world.bus.dir.path().join("bin/qemu-system-x86_64")).unwrap();
    for command in [&VERIFY[..], &["boot", "web1", "latest"]] {
        let said = world.command(command).env("PATH", "/nonexistent").output().map(Said::new).unwrap();
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.err.contains("install QEMU"), "{said:?}");
        assert_eq!(world.left().await.len(), 0);
    }
    assert_eq!(world.blxctl(&["boot", "db1", "latest"]).code, Some(5));
    assert_eq!(world.blxctl(&["verify", "--boot", "latest", "20261121203456"]).code, Some(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_asked_to_end_leaves_nothing() {
    for command in [&VERIFY[..], &["boot", "web1", "latest"]] {
        let world = World::start("exec sleep 1000").await;
        let child = world.command(command).spawn().unwrap();
        world.wait_for_qemu();
        stop(&child);
        let said = Said::new(child.wait_with_output().unwrap());
        assert_eq!(said.code, Some(i32::from(command.len() > 3)), "{said:?}");
        assert_eq!(world.left().await.len(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_has_the_console_and_the_last_word() {
    let world = World::start("echo \"$@\"").await;
    let said = world.blxctl(&["boot", "web1", "latest", "--", "-m", "8G"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.out.contains(" -serial mon:stdio ") && said.out.ends_with(" -m 8G\n"), "{said:?}");
    assert!(
        said.out.contains(" -nic none ") && said.err.contains("20261121203456 of web1's one"),
        "{said:?}"
    );
    assert_eq!(world.left().await.len(), 0);
}
