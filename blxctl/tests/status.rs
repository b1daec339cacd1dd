//! `blxctl status` against a private system bus with the project's own bus policy.
//!
//! These tests need root and `dbus-daemon`, and fail where one of them is missing.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;
use zbus::Connection;
use zbus::connection::Builder;

const POLICY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../dbus/org.blxrep.conf");

/// A bus of its own; ends when dropped.
struct Bus {
    daemon: Child,
    address: String,
    _dir: TempDir,
}

impl Bus {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Another user connects to it in one of the tests.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let config = dir.path().join("bus.conf");
        let text = format!(
            r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={}/socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_sender="org.freedesktop.DBus"/>
  </policy>
  <include>{POLICY}</include>
</busconfig>"#,
            dir.path().display()
        );
        fs::write(&config, text).unwrap();
        let mut daemon = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--nopidfile", "--print-address=1"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon cannot be started: run tools/install-deps test");
        let mut address = String::new();
        BufReader::new(daemon.stdout.as_mut().unwrap()).read_line(&mut address).unwrap();
        assert!(
            address.starts_with("unix:"),
            "dbus-daemon refused its configuration (are these tests run as root?)"
        );
        Self { daemon, address: address.trim().to_owned(), _dir: dir }
    }

    async fn own(&self, name: &'static str) -> Connection {
        let connection = Builder::address(self.address.as_str()).build().await.unwrap();
        connection
            .request_name(name)
            .await
            .expect("root may own the name: run these tests as root, 'sudo make test'");
        connection
    }

    fn status(&self, args: &[&str]) -> Output {
        blxctl(&self.address, args)
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn blxctl(address: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blxctl"));
    command.arg("status").args(args).env("DBUS_SYSTEM_BUS_ADDRESS", address).output().unwrap()
}

fn objects(output: &Output) -> Vec<serde_json::Value> {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn without_a_daemon_it_says_so_and_exits_with_3() {
    let bus = Bus::start();
    let output = bus.status(&[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(text.contains("agent       no") && text.contains("dispatcher  no"), "{text}");
    let output = bus.status(&["--json"]);
    assert_eq!((objects(&output).len(), output.status.code()), (2, Some(3)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_owns_its_name_is_shown_with_its_process() {
    let bus = Bus::start();
    let owner = bus.own("org.blxrep.Dispatcher").await;
    let output = bus.status(&["--json"]);
    assert_eq!(output.status.code(), Some(0));
    let [agent, dispatcher] = objects(&output).try_into().unwrap();
    assert_eq!((&agent["role"], &agent["on_bus"]), (&"agent".into(), &false.into()));
    assert_eq!((&dispatcher["role"], &dispatcher["on_bus"]), (&"dispatcher".into(), &true.into()));
    assert_eq!(dispatcher["pid"], std::process::id());
    assert_eq!(dispatcher["unit"], serde_json::Value::Null, "no systemd is on this bus");

    let agent_only = bus.status(&["--role", "agent", "--json"]);
    assert_eq!((objects(&agent_only).len(), agent_only.status.code()), (1, Some(3)));
    assert_eq!(bus.status(&["--role", "dispatcher"]).status.code(), Some(0));

    owner.close().await.unwrap();
    assert_eq!(bus.status(&[]).status.code(), Some(3), "the name is free again");
}

#[test]
fn without_a_bus_it_says_what_to_do_and_exits_with_1() {
    let output = blxctl("unix:path=/nonexistent/socket", &[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text.contains("the system bus cannot be reached") && text.contains("systemctl start dbus"),
        "{text}"
    );
    assert!(output.stdout.is_empty());
}

#[test]
fn wrong_usage_exits_with_2() {
    assert_eq!(blxctl("unix:path=/nonexistent/socket", &["--role", "both"]).status.code(), Some(2));
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
