//! A dispatcher, agents and disks on this machine, all gone again when the [`Lab`] is dropped.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses another part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

use std::cell::RefCell;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

pub const BLXREP: &str = env!("CARGO_BIN_EXE_blxrep");
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Runs a command and gives its standard output; panics with everything it said if it fails.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}; run tools/install-deps test"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A command that is killed when this test ends, even if the test is killed.
pub fn mortal(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// Waits until a condition is true.
pub fn wait_for(what: &str, seconds: u64, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < end, "waited {seconds} s for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A loop or zram disk, and what is mounted of it.
pub struct TestDisk {
    pub path: String,
    pub name: String,
    zram: bool,
    mounts: Vec<PathBuf>,
}

impl TestDisk {
    pub fn part(&self, number: u32) -> String {
        format!("{}p{number}", self.path)
    }

    /// Makes a file system on the disk or a part of it and mounts it.
    pub fn mkfs_mount(&mut self, lab: &Lab, fs_type: &str, device: &str) -> PathBuf {
        let force = if fs_type == "ext4" { "-F" } else { "-f" };
        run(&format!("mkfs.{fs_type}"), &["-q", force, device]);
        self.mount(lab, device)
    }

    pub fn mount(&mut self, lab: &Lab, device: &str) -> PathBuf {
        let dir = lab.dir.join(format!("mnt-{}", Path::new(device).file_name().unwrap().to_string_lossy()));
        fs::create_dir_all(&dir).unwrap();
        run("mount", &[device, dir.to_str().unwrap()]);
        self.mounts.push(dir.clone());
        dir
    }

    pub fn umount_all(&mut self) {
        for dir in self.mounts.drain(..).rev() {
            for _ in 0..50 {
                if Command::new("umount").arg(&dir).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
                {
                    break;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

impl Drop for TestDisk {
    fn drop(&mut self) {
        for dir in &self.mounts {
            let _ = Command::new("fsfreeze").arg("-u").arg(dir).stderr(Stdio::null()).status();
        }
        self.umount_all();
        if self.zram {
            let number = self.name.trim_start_matches("zram");
            let _ = fs::write(format!("/sys/block/{}/reset", self.name), "1");
            let _ = fs::write("/sys/class/zram-control/hot_remove", number);
        } else {
            let _ = Command::new("losetup").args(["-d", &self.path]).status();
        }
    }
}

/// A process that is killed when dropped.
pub struct Process {
    pub child: Child,
    pub log: PathBuf,
}

impl Process {
    /// On the bus of this address, if one is given.
    pub fn start(args: &[&str], log: &Path, bus: Option<&str>) -> Self {
        let file = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        let child = mortal(BLXREP)
            .args(args)
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .env("BLXREP_LOG", "debug,aya=info,aya_obj=info,rustls=info,tungstenite=info")
            .envs(bus.map(|address| ("DBUS_SYSTEM_BUS_ADDRESS", address)))
            .spawn()
            .unwrap();
        Self { child, log: log.to_owned() }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, signal: &str) {
        run("kill", &["-s", signal, &self.child.id().to_string()]);
    }

    /// Waits for its end and gives the exit code.
    pub fn exit_code(&mut self, seconds: u64) -> i32 {
        let end = Instant::now() + Duration::from_secs(seconds);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < end, "still running after {seconds} s:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- {} (last lines)", self.log.display());
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Everything one test needs.
pub struct Lab {
    pub dir: PathBuf,
    pub port: u16,
    /// Where agents connect to; the dispatcher's own port unless something stands before it.
    pub agents_port: u16,
    /// Distinguishes the agents of tests that run side by side: pins are named after them.
    pub tag: String,
    pub dispatcher: Option<Process>,
    /// The address of the dispatcher's bus, if it is to have one.
    pub bus: Option<String>,
    pub agents: RefCell<Vec<String>>,
}

impl Lab {
    pub fn new(name: &str) -> Self {
        assert!(nix::unistd::Uid::effective().is_root(), "this test needs root: run 'sudo make test'");
        let tag = format!("{name}-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new("/var/tmp").join(format!("blxrep-test-{tag}"));
        fs::create_dir_all(dir.join("photos")).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { dir, port, agents_port: port, tag, dispatcher: None, bus: None, agents: RefCell::default() }
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    pub fn loop_disk(&self, size_mib: u64) -> TestDisk {
        self.loop_disk_on_file(size_mib).0
    }

    /// A loop disk and the file behind it.
    pub fn loop_disk_on_file(&self, size_mib: u64) -> (TestDisk, fs::File) {
        let file = self.path(&format!("disk-{}.raw", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let open = fs::File::options().read(true).write(true).create_new(true).open(&file).unwrap();
        open.set_len(size_mib << 20).unwrap();
        let path = run("losetup", &["-P", "-f", "--show", &file]);
        // The name goes with the last user: the file needs none.
        fs::remove_file(&file).unwrap();
        let name = path.trim_start_matches("/dev/").to_owned();
        (TestDisk { path, name, zram: false, mounts: Vec::new() }, open)
    }

    pub fn zram_disk(&self, size_mib: u64) -> TestDisk {
        let _ = Command::new("modprobe").arg("zram").stderr(Stdio::null()).status();
        let number =
            fs::read_to_string("/sys/class/zram-control/hot_add").expect("zram is needed").trim().to_owned();
        let name = format!("zram{number}");
        fs::write(format!("/sys/block/{name}/disksize"), format!("{size_mib}M")).unwrap();
        let path = format!("/dev/{name}");
        if !Path::new(&path).exists() {
            let dev = fs::read_to_string(format!("/sys/block/{name}/dev")).unwrap();
            let (major, minor) = dev.trim().split_once(':').unwrap();
            run("mknod", &["-m", "600", &path, "b", major, minor]);
        }
        TestDisk { path, name, zram: true, mounts: Vec::new() }
    }

    /// Cuts a disk into partitions given in sfdisk's words.
    pub fn partition(&self, disk: &TestDisk, script: &str) {
        let mut child = Command::new("sfdisk")
            .args(["-q", "--no-reread", "--no-tell-kernel", &disk.path])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        run("partx", &["-u", &disk.path]);
    }

    pub fn agent(&self, name: &str) -> String {
        format!("{name}-{}", self.tag)
    }

    pub fn start_dispatcher(&mut self, args: &[&str]) {
        let (listen, data, agents) =
            (format!("127.0.0.1:{}", self.port), self.path("data"), self.path("agents"));
        let mut all = vec!["start", "--mode", "dispatcher", "--listen", &listen, "--data-dir", &data];
        all.extend(["--agents-file", &agents]);
        all.extend(args);
        let log = self.dir.join("dispatcher.log");
        let before = fs::read_to_string(&log).unwrap_or_default().matches("listens on").count();
        let process = Process::start(&all, &log, self.bus.as_deref());
        wait_for("the dispatcher to listen", 20, || process.log().matches("listens on").count() > before);
        self.dispatcher = Some(process);
    }

    /// Enrolls an agent and gives its key file.
    pub fn enroll(&self, agent: &str) -> String {
        let key = run(
            BLXREP,
            &["enroll", agent, "--data-dir", &self.path("data"), "--agents-file", &self.path("agents")],
        );
        let file = self.path(&format!("{agent}.key"));
        fs::write(&file, key).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        file
    }

    /// A hooks directory with one script, and `$PHOTOS` set in it.
    pub fn hooks(&self, agent: &str, script: &str) -> String {
        let dir = self.dir.join(format!("hooks-{agent}"));
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join("10-test");
        let photos = self.path("photos");
        fs::write(&file, format!("#!/bin/sh\nPHOTOS={photos}\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        dir.to_str().unwrap().to_owned()
    }

    /// The hook that photographs the disk while it is frozen.
    pub fn camera(&self, agent: &str) -> String {
        self.hooks(agent, PHOTOGRAPH)
    }

    /// The same, and what is free on the disk is told to it behind each freeze.
    pub fn trimming_camera(&self, agent: &str) -> String {
        self.hooks(agent, &format!("{TRIM}\n{PHOTOGRAPH}"))
    }

    pub fn start_agent(&self, agent: &str, devices: &[&str], args: &[&str]) -> Process {
        self.start_agent_in("state", agent, devices, args)
    }

    /// Starts an agent with a state directory of another name.
    pub fn start_agent_in(&self, state: &str, agent: &str, devices: &[&str], args: &[&str]) -> Process {
        self.agents.borrow_mut().push(agent.to_owned());
        let (addr, key) = (format!("127.0.0.1:{}", self.agents_port), self.path(&format!("{agent}.key")));
        let state = self.path(state);
        let mut all =
            vec!["start", "--mode", "agent", "--id", agent, "--dispatcher-addr", &addr, "--key-file", &key];
        all.extend(["--state-dir", &state]);
        for device in devices {
            all.extend(["--device", device]);
        }
        all.extend(args);
        Process::start(&all, &self.dir.join(format!("{agent}.log")), None)
    }

    pub fn show(&self, agent: &str, disk: Option<&str>) -> Vec<Value> {
        let data = self.path("data");
        let mut args = vec!["dispatcher", "show", "--json", "--agent", agent, "--data-dir", &data];
        args.extend(disk.iter().flat_map(|disk| ["--disk", disk]));
        let output = Command::new(BLXREP).args(&args).output().unwrap();
        if !output.status.success() {
            return Vec::new();
        }
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Waits until a disk has this many checkpoints and gives them all.
    pub fn wait_checkpoints(&self, agent: &str, disk: &str, count: usize, seconds: u64) -> Vec<Value> {
        let mut rows = Vec::new();
        wait_for(&format!("{count} checkpoints of {agent}'s {disk}"), seconds, || {
            rows = self.show(agent, Some(disk));
            rows.len() >= count
        });
        rows
    }

    pub fn restore(&self, agent: &str, disk: &str, id: &str, output: &str) -> Output {
        let data = self.path("data");
        let args = [
            "dispatcher",
            "restore",
            "--agent",
            agent,
            "--disk",
            disk,
            "--checkpoint",
            id,
            "--data-dir",
            &data,
        ];
        Command::new(BLXREP).args(args).args(["--output", output]).output().unwrap()
    }

    pub fn photo(&self, device: &str, id: &str) -> String {
        self.path(&format!("photos/{device}-{id}.img"))
    }

    /// Restores a checkpoint and compares it with its photograph, byte for byte.
    pub fn compare(&self, agent: &str, device: &str, id: &str) {
        let output = self.path(&format!("restored-{agent}-{device}-{id}.img"));
        let done = self.restore(agent, device, id, &output);
        assert!(done.status.success(), "restore of {id}: {}", String::from_utf8_lossy(&done.stderr));
        run("cmp", &[&output, &self.photo(device, id)]);
        fs::remove_file(&output).unwrap();
    }

    /// Compares every checkpoint of a disk; gives their number. None may be fuzzy.
    pub fn compare_all(&self, agent: &str, device: &str) -> usize {
        let rows = self.show(agent, Some(device));
        for row in &rows {
            let id = row["checkpoint"].as_str().unwrap();
            assert_ne!(row["consistency"], "fuzzy", "{row}");
            self.compare(agent, device, id);
        }
        rows.len()
    }
}

pub const PHOTOGRAPH: &str = r#"[ "$1" = frozen ] || exit 0
out=$PHOTOS/$(basename "$BLXREP_DEVICE")-$BLXREP_CHECKPOINT.img
dd if="$BLXREP_DEVICE" of="$out.part" bs=1M iflag=direct conv=sparse status=none
truncate -s "$(blockdev --getsize64 "$BLXREP_DEVICE")" "$out.part"
mv "$out.part" "$out""#;

/// Not by a writer that knows nothing of freezes: a trim goes through them, and a photograph would show a part of it.
pub const TRIM: &str = r#"[ "$1" != post-thaw ] ||
lsblk --noheadings --raw --output MOUNTPOINT "$BLXREP_DEVICE" | grep / | xargs --no-run-if-empty -n 1 fstrim"#;

impl Drop for Lab {
    fn drop(&mut self) {
        self.dispatcher = None;
        for agent in self.agents.borrow().iter() {
            let _ = Command::new(BLXREP).args(["untrack", "--id", agent]).output();
        }
        if std::env::var_os("BLXREP_TEST_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
