//! A data directory whose dispatcher runs, and all the ways to restore of it on its own host.
#![allow(dead_code, unreachable_pub, reason = "every user takes another part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use super::bus::Bus;
use super::lab::{BLXREP, Process, TestDisk, run, wait_for};
use super::store::{AGENT, Store};

/// A store whose dispatcher runs, on a bus of its own.
pub struct World {
    pub store: Store,
    bus: Bus,
    /// An agent that may restore what is stored, and its disk.
    agent: Option<(String, Process, TestDisk)>,
}

impl World {
    pub fn new(name: &str) -> Self {
        let mut store = Store::new(name);
        let bus = Bus::start(&store.lab);
        store.lab.bus = Some(bus.address.clone());
        fs::create_dir(store.lab.path("tmp")).unwrap();
        store.lab.start_dispatcher(&["--scrub-every", "never"]);
        Self { store, bus, agent: None }
    }

    /// Has an agent as well.
    pub fn with_agent(name: &str) -> Self {
        let mut world = Self::new(name);
        let lab = &world.store.lab;
        let (agent, disk) = (lab.agent("new"), lab.loop_disk(4));
        let (agents, key, state) = (lab.path("agents"), lab.path("key"), lab.path("state"));
        let mut enroll = vec!["enroll", &agent, "--data-dir", &world.store.data];
        enroll.extend(["--agents-file", &agents, "--may-restore", AGENT]);
        fs::write(&key, run(BLXREP, &enroll)).unwrap();
        run("chmod", &["600", &key]);
        let addr = format!("127.0.0.1:{}", lab.port);
        let mut args = vec!["start", "--mode", "agent", "--id", &agent, "--dispatcher-addr", &addr];
        args.extend(["--key-file", &key, "--state-dir", &state, "--device", &disk.path]);
        let process = Process::start(&args, Path::new(&lab.path("agent.log")), lab.bus.as_deref());
        lab.wait_checkpoints(&agent, &disk.name, 1, 60);
        world.agent = Some((agent, process, disk));
        world
    }

    /// `blxctl`, killed when the test ends.
    pub fn blxctl(&self, args: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(Path::new(BLXREP).with_file_name("blxctl"));
        command.args(args).env("DBUS_SYSTEM_BUS_ADDRESS", &self.bus.address);
        command.env("TMPDIR", self.store.lab.path("tmp"));
        command
    }

    /// No job and no temporary file is left.
    pub fn is_clean(&self) {
        wait_for("the jobs to end", 20, || {
            self.blxctl(&["jobs", "--json"]).output().unwrap().stdout.starts_with(b"[]")
        });
        assert_eq!(names(&self.store.lab.path("tmp")), [""; 0]);
    }

    pub fn restore(&self, args: &[&str]) -> Output {
        self.blxctl(&[&["--json", "restore", "--agent", AGENT], args].concat()).output().unwrap()
    }

    /// A restore by every way, of the newest checkpoint, that must be refused with this exit code and say this.
    pub fn refused(&self, target: &str, args: &[&str], code: i32, says: &str) {
        let offline =
            [self.store.args("restore", "latest"), vec!["--output", target], args.to_vec()].concat();
        refused(&Command::new(BLXREP).args(&offline).output().unwrap(), code, says);
        let online = [&["latest", target], args].concat();
        refused(&self.restore(&online), code, says);
        if self.agent.is_some() {
            refused(&self.restore(&[&["--role", "agent"], &*online].concat()), code, says);
        }
    }

    /// The same of a device, which must stay what it is.
    pub fn refused_device(&self, device: &TestDisk, args: &[&str], says: &str) {
        let before = held(device);
        self.refused(&device.path, args, 2, says);
        assert!(held(device) == before, "{says}: something was written");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some((agent, process, _disk)) = self.agent.take() {
            drop(process);
            let _ = Command::new(BLXREP).args(["untrack", "--id", &agent]).output();
        }
    }
}

/// What a device holds, as the disk has it and not as memory does.
pub fn held(device: &TestDisk) -> Vec<u8> {
    run("blockdev", &["--flushbufs", &device.path]);
    fs::read(&device.path).unwrap()
}

pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn refused(output: &Output, code: i32, says: &str) {
    assert!(output.status.code() == Some(code) && said(output).contains(says), "{says}: {output:?}");
}

pub fn done(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What is in the directory, hidden files too.
pub fn names(dir: &str) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
