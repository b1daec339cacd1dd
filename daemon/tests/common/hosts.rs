//! Two hosts in containers, each with a systemd, bus, polkit and journal of its own, joined by one cable: a dispatcher, and an agent whose
//! root is a disk. Booted anew by every [`Pair`]; nothing of them is left, however the test ends.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses another part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use blxrep::bitmap::Extent;
use blxrep::geometry::Geometry;
use blxrep::reader::pack;
use serde_json::Value;

use super::janitor::Janitor;
use super::lab::{mortal, run, wait_for};
use super::stage::install;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Where the dispatcher listens.
pub const DISPATCHER_IP: &str = "10.99.0.1";
const AGENT_IP: &str = "10.99.0.2";
/// Whose data, and where, for the commands that work on it.
pub const DATA: &str = "--agent web1 --data-dir /var/lib/blxrep-dispatcher";
/// Files made, changed and removed on both of the agent's disks.
const WRITERS: &str = r#"for dir in /var/tmp /data; do (cd $dir; i=0; while :; do i=$((i+1)); n=$((i%20))
head -c $((n*20000+100)) /dev/urandom >f$n; mv f$n g$n; [ $((i%7)) = 0 ] && rm -f g$((n/2)); sync g$n 2>/dev/null; sleep 0.05; done) & done; wait"#;
/// The hook that photographs a disk while it is frozen.
pub const PHOTOGRAPH: &str = r#"#!/bin/sh
[ "$1" = frozen ] || exit 0
photo=/shared/$(basename "$BLXREP_DEVICE")-$BLXREP_CHECKPOINT
dd if="$BLXREP_DEVICE" of="$photo.part" bs=4M iflag=direct conv=sparse status=none
truncate -s "$(blockdev --getsize64 "$BLXREP_DEVICE")" "$photo.part" && mv "$photo.part" "$photo"
"#;

/// A program of `tools/`.
fn tool(name: &str) -> String {
    format!("{}/../tools/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A network namespace that is there while this is.
struct Netns(File);

impl Netns {
    fn new() -> Self {
        // A thread that has changed its namespace is of no other use.
        let file = std::thread::spawn(|| {
            // SAFETY: takes no memory; only this thread is affected.
            let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(done, 0, "a network namespace: {}", std::io::Error::last_os_error());
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(file.join().unwrap())
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    fn ip(&self, args: &str) -> String {
        let args: Vec<&str> = args.split(' ').collect();
        run("nsenter", &[&[&format!("--net={}", self.path()), "ip"], &args[..]].concat())
    }
}

/// A loop disk that the kernel takes away when nobody has it open any more, this process above all.
pub struct Disk {
    pub path: String,
    pub name: String,
    _open: File,
}

impl Disk {
    pub fn over(file: &Path) -> Self {
        let path = run("losetup", &["--find", "--show", file.to_str().unwrap()]);
        let open = File::open(&path).unwrap();
        // Carried out at the last close.
        run("losetup", &["--detach", &path]);
        Self { name: path.trim_start_matches("/dev/").to_owned(), path, _open: open }
    }

    pub fn new(file: &Path, size_mib: u64) -> Self {
        File::create(file).unwrap().set_len(size_mib << 20).unwrap();
        Self::over(file)
    }
}

/// A machine: its disk and network stay when it is off.
pub struct Host {
    name: String,
    root: String,
    dir: PathBuf,
    netns: Netns,
    /// `tools/test-host`, and the host's first process.
    running: Option<(Child, String)>,
    disks: Vec<String>,
}

impl Host {
    fn new(name: String, root: String, dir: &Path) -> Self {
        let dir = dir.join(name.split('-').next().unwrap());
        fs::create_dir_all(&dir).unwrap();
        Self { name, root, dir, netns: Netns::new(), running: None, disks: Vec::new() }
    }

    /// Switches it on and waits until it has booted.
    pub fn boot(&mut self) {
        let console = self.dir.join("console.log");
        let log = fs::OpenOptions::new().create(true).append(true).open(&console).unwrap();
        // Not to be interrupted with this process: the end of its standard input tells it to clean up.
        let mut child = Command::new("setsid")
            .args([
                &tool("test-host"),
                &self.name,
                &self.root,
                self.dir.to_str().unwrap(),
                &self.netns.path(),
            ])
            .args(&self.disks)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut leader = None;
        wait_for("the host's first process", 30, || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "{}: {ended:?}\n{}", self.name, fs::read_to_string(&console).unwrap());
            leader = leader_of(&self.name);
            leader.is_some()
        });
        let leader = leader.unwrap();
        self.running = Some((child, leader));
        wait_for("the host to boot", 60, || {
            let state = self.try_run("systemctl is-system-running --wait");
            ["running", "degraded"].contains(&String::from_utf8_lossy(&state.stdout).trim())
        });
    }

    fn enter(&self) -> Command {
        let (_, leader) = self.running.as_ref().expect("the host is off");
        let mut command = mortal("nsenter");
        command.args(["-t", leader, "-a", "env", "-i", "HOME=/root", "LC_ALL=C.UTF-8"]);
        command.arg("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null());
        command
    }

    /// Runs a script as root; works even while the host's disks are frozen.
    pub fn try_run(&self, script: &str) -> Output {
        self.enter().args(["sh", "-c", script]).output().unwrap()
    }

    /// The same, and gives what it printed; the test fails if it fails.
    pub fn run(&self, script: &str) -> String {
        let output = self.try_run(script);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}: {script}: {}\n{out}{err}", self.name, output.status);
        out.trim().to_owned()
    }

    /// Runs a script as another user, as a unit of the host's systemd.
    pub fn run_as(&self, user: &str, script: &str) -> Output {
        let args =
            ["systemd-run", "--pipe", "--wait", "--quiet", "--collect", "--uid", user, "sh", "-c", script];
        self.enter().args(args).output().unwrap()
    }

    /// A script as a unit, `name`, that runs until it is stopped or the host is off.
    pub fn background(&self, name: &str, script: &str) {
        let file = format!("/run/{name}");
        self.put(&file, "755", &format!("#!/bin/sh\n{script}\n"));
        self.run(&format!("systemd-run --quiet --collect --unit {name} {file}"));
    }

    /// How long a command takes, in seconds.
    pub fn seconds(&self, script: &str) -> f64 {
        let began = Instant::now();
        self.run(script);
        began.elapsed().as_secs_f64()
    }

    /// Writes a file.
    pub fn put(&self, path: &str, mode: &str, content: &str) {
        use std::io::Write;
        let script = format!("mkdir -p \"$(dirname {path})\" && cat >{path} && chmod {mode} {path}");
        let mut child = self.enter().args(["sh", "-c", &script]).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(content.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{path}");
    }

    /// Makes a disk's device node, which only disks the host was booted with have.
    pub fn node(&self, disk: &Disk) {
        let number = fs::read_to_string(format!("/sys/class/block/{}/dev", disk.name)).unwrap();
        self.run(&format!("rm -f {0}; mknod -m 600 {0} b {1}", disk.path, number.trim().replace(':', " ")));
    }

    /// Whether the script's exit code is 0.
    pub fn is(&self, script: &str) -> bool {
        self.try_run(script).status.success()
    }

    /// The processes of a unit, as this machine numbers them.
    pub fn processes(&self, unit: &str) -> Vec<u32> {
        let groups = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let pids = groups.map(|group| {
            let file = format!("{group}/{}/payload/system.slice/{unit}.service/cgroup.procs", self.name);
            fs::read_to_string(file)
        });
        pids.into_iter()
            .flatten()
            .flat_map(|pids| pids.lines().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
            .collect()
    }

    /// A unit's property.
    pub fn unit(&self, unit: &str, property: &str) -> String {
        self.run(&format!("systemctl show --value -p {property} {unit}"))
    }

    /// What a unit has written to the journal since it was started last.
    pub fn journal(&self, unit: &str) -> String {
        let id = self.unit(unit, "InvocationID");
        self.run(&format!("journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID={id}"))
    }

    /// Pulls the cable or plugs it in.
    pub fn link(&self, up: bool) {
        self.netns.ip(&format!("link set eth0 {}", if up { "up" } else { "down" }));
    }

    /// Bytes sent to the other host so far.
    pub fn sent_bytes(&self) -> u64 {
        let text = self.netns.ip("-s -j link show eth0");
        let json: Value = serde_json::from_str(&text).unwrap();
        json[0]["stats64"]["tx"]["bytes"].as_u64().unwrap()
    }

    /// `systemctl poweroff`, and waits for it.
    pub fn power_off(&mut self) {
        self.run("systemctl poweroff --no-block");
        let (mut child, _) = self.running.take().unwrap();
        wait_for("the host to power off", 120, || child.try_wait().unwrap().is_some());
    }

    /// Pulls the plug. What was written and not yet on the disk gets there all the same: only its programs feel it.
    pub fn power_cut(&mut self) {
        if let Some((mut child, _)) = self.running.take() {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

/// The first process of a host, when it runs.
fn leader_of(name: &str) -> Option<String> {
    let procs = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(|group| fs::read_to_string(format!("{group}/{name}/payload/init.scope/cgroup.procs")));
    procs.into_iter().flatten().find_map(|pids| pids.lines().next().map(str::to_owned))
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() && self.running.is_some() {
            let journal = self.try_run("journalctl --no-pager -o short-precise -n 60");
            eprintln!("--- {} (last lines)\n{}", self.name, String::from_utf8_lossy(&journal.stdout));
        }
        self.power_cut();
    }
}

/// Both hosts, with blxrep installed and nothing configured.
pub struct Pair {
    pub dispatcher: Host,
    pub agent: Host,
    /// The agent's root.
    pub root: Disk,
    /// The agent's other disk, with an xfs on `/data`.
    pub data: Disk,
    /// `/shared` in both hosts: on neither's disk.
    pub shared: PathBuf,
    // The last to go.
    _janitor: Janitor,
}

impl Pair {
    pub fn boot(name: &str) -> Self {
        Self::boot_with(name, &[])
    }

    /// Hosts with more of Debian's packages.
    pub fn boot_with(name: &str, packages: &[&str]) -> Self {
        assert!(nix::unistd::Uid::effective().is_root(), "this test needs root: run 'sudo make test'");
        let began = Instant::now();
        let base = run(&tool("hosts-root"), packages);
        let tag = format!("{name}-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new("/var/tmp").join(format!("blxrep-hosts-{tag}"));
        let shared = dir.join("shared");
        fs::create_dir_all(&shared).unwrap();
        let (dispatcher, agent) = (format!("dispatcher-{tag}"), format!("agent-{tag}"));
        let janitor = Janitor::new(&dir);
        let image = dir.join("root.img");
        run("cp", &["--sparse=always", &format!("{base}.ext4"), image.to_str().unwrap()]);
        let (root, data) = (Disk::over(&image), Disk::new(&dir.join("data.img"), 320));
        run("mkfs.xfs", &["-q", &data.path]);
        let mut dispatcher = Host::new(dispatcher, base, &dir);
        let mut agent = Host::new(agent, root.path.clone(), &dir);
        agent.disks = vec![data.path.clone()];
        plug(&dispatcher.netns, &agent.netns);
        dispatcher.boot();
        agent.boot();
        let pair = Self { dispatcher, agent, root, data, shared, _janitor: janitor };
        pair.install();
        pair.mount_data();
        eprintln!("{name}: both hosts are up after {:.1} s", began.elapsed().as_secs_f64());
        pair
    }

    /// As a package would. What runs is replaced under its feet, and runs on until it is restarted.
    pub fn install(&self) {
        let stage = self.shared.join("stage");
        install(&stage);
        for host in [&self.dispatcher, &self.agent] {
            host.run(
                "cp -a --no-preserve=ownership --remove-destination /shared/stage/. / && systemd-sysusers",
            );
            host.run("systemd-tmpfiles --create blxrep.conf && systemctl daemon-reload");
            host.run("systemctl reload dbus");
        }
        fs::remove_dir_all(stage).unwrap();
    }

    /// What README tells a new user to do, but for starting the services.
    pub fn configure(&self) {
        let (dispatcher, agent) = (&self.dispatcher, &self.agent);
        dispatcher.run("cp /usr/share/doc/blxrep/config.example.yaml /etc/blxrep/config.yaml");
        dispatcher.run("sed -i 's/^sync-freq: .*/sync-freq: 3s/' /etc/blxrep/config.yaml");
        let key = dispatcher.run("runuser -u blxrep -- blxrep enroll web1");
        agent.put("/etc/blxrep/key", "600", &key);
        self.configure_agent("");
        agent.put("/etc/blxrep/hooks/photograph", "755", PHOTOGRAPH);
    }

    /// The agent's configuration, with the root disk first.
    pub fn configure_agent(&self, more: &str) {
        self.configure_disks(&self.disks(), more);
    }

    /// The agent's configuration, with these disks.
    pub fn configure_disks(&self, disks: &[&Disk], more: &str) {
        let devices: Vec<&str> = disks.iter().map(|disk| disk.path.as_str()).collect();
        let text = format!(
            "id: web1\ndispatcher-addr: {DISPATCHER_IP}:8080\ndevice: [{}]\nkey-file: /etc/blxrep/key\n\
             hooks-dir: /etc/blxrep/hooks\n{more}\n",
            devices.join(", ")
        );
        self.agent.put("/etc/blxrep/config.yaml", "644", &text);
    }

    /// Writes to the agent's root and to /data from now on.
    pub fn write(&self) {
        self.agent.background("writers", WRITERS);
    }

    /// Both disks.
    pub fn disks(&self) -> [&Disk; 2] {
        [&self.root, &self.data]
    }

    /// Starts both services for good.
    pub fn start(&self) {
        self.dispatcher.run("systemctl enable --now --quiet blxrep-dispatcher");
        self.agent.run("systemctl enable --now --quiet blxrep-agent");
    }

    /// A disk's checkpoints, as the dispatcher shows them.
    pub fn checkpoints(&self, disk: &Disk) -> Vec<Value> {
        let command = format!("blxrep dispatcher show --json {DATA} --disk {}", disk.name);
        let output = self.dispatcher.try_run(&command);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Bytes the agent has sent beyond what changed in later checkpoints than the first: copies, compares, and what was sent
    /// twice. A full copy of the root is about 85 MiB.
    pub fn overhead_bytes(&self) -> i64 {
        let rows = self.disks().into_iter().flat_map(|disk| self.checkpoints(disk).into_iter().skip(1));
        let changed: u64 = rows.map(|row| row["stored_bytes"].as_u64().unwrap()).sum();
        self.agent.sent_bytes() as i64 - changed as i64
    }

    /// Fails if as much as a full copy was sent since the overhead was so much.
    pub fn assert_no_copy_since(&self, overhead_bytes: i64, what: &str) {
        let more = (self.overhead_bytes() - overhead_bytes) >> 20;
        eprintln!("{what}: {more} MiB more than changed");
        assert!(more < 50, "{what}: {more} MiB more than changed");
    }

    /// Bytes that one full copy of both disks takes on the wire.
    pub fn copy_bytes(&self) -> u64 {
        let copy_of = |disk: &Disk| {
            let first = self.checkpoints(disk)[0]["checkpoint"].as_str().unwrap().to_owned();
            let restore =
                format!("blxrep dispatcher restore {DATA} --disk {} --checkpoint {first}", disk.name);
            self.dispatcher.run(&format!("{restore} --output /shared/first.img"));
            let path = self.shared.join("first.img");
            let image = fs::read(&path).unwrap();
            fs::remove_file(path).unwrap();
            let geometry = Geometry::new(image.len() as u64, 12).unwrap();
            let groups = (0..geometry.groups()).map(|group| geometry.group_extent(group));
            let runs = groups.flat_map(|(first, count)| {
                let (offset, len) = geometry.range(first, count);
                pack(Extent { first, count }, &image[offset as usize..(offset + len) as usize], geometry)
            });
            runs.map(|run| run.encoded_len() as u64).sum::<u64>()
        };
        self.disks().into_iter().map(copy_of).sum()
    }

    /// Fails if more was sent than one full copy takes.
    pub fn assert_one_copy(&self, sent_bytes: u64) {
        let copy_bytes = self.copy_bytes();
        eprintln!("{} MiB were sent, one copy takes {} MiB", sent_bytes >> 20, copy_bytes >> 20);
        assert!(
            sent_bytes < copy_bytes + copy_bytes / 8 + (6 << 20),
            "{sent_bytes} bytes for a copy of {copy_bytes}"
        );
    }

    /// Waits until a disk has so many checkpoints more than now.
    pub fn more_checkpoints(&self, disk: &Disk, more: usize, seconds: u64) {
        let now = self.checkpoints(disk).len();
        let what = format!("{more} checkpoints more than {now} of {}", disk.name);
        wait_for(&what, seconds, || self.checkpoints(disk).len() >= now + more);
    }

    /// What the hook saw at a checkpoint.
    pub fn photo(&self, disk: &Disk, row: &Value) -> PathBuf {
        self.shared.join(format!("{}-{}", disk.name, row["checkpoint"].as_str().unwrap()))
    }

    /// Bytes sent between the hosts so far, either way.
    pub fn wire_bytes(&self) -> u64 {
        self.agent.sent_bytes() + self.dispatcher.sent_bytes()
    }

    /// Restores a disk's newest checkpoints and compares each with the photograph of its moment.
    pub fn compare_newest(&self, disk: &Disk, count: usize) {
        let rows = self.checkpoints(disk);
        assert!(rows.len() >= count, "{} checkpoints", rows.len());
        for row in &rows[rows.len() - count..] {
            let id = row["checkpoint"].as_str().unwrap();
            assert_eq!(row["consistency"], "application", "{row}");
            let restore = format!("blxrep dispatcher restore {DATA} --disk {} --checkpoint {id}", disk.name);
            self.dispatcher.run(&format!("{restore} --output /shared/restored.img"));
            let photo = self.photo(disk, row);
            let restored = self.shared.join("restored.img");
            run("cmp", &[restored.to_str().unwrap(), photo.to_str().unwrap()]);
            fs::remove_file(restored).unwrap();
        }
    }

    /// Mounts the agent's other disk; anew after every boot.
    pub fn mount_data(&self) {
        self.agent.run(&format!("mkdir -p /data && mount {} /data", self.data.path));
    }
}

/// One cable between two hosts.
fn plug(dispatcher: &Netns, agent: &Netns) {
    dispatcher.ip(&format!("link add eth0 type veth peer name eth0 netns {}", agent.path()));
    for (netns, ip) in [(dispatcher, DISPATCHER_IP), (agent, AGENT_IP)] {
        netns.ip(&format!("addr add {ip}/24 dev eth0"));
        netns.ip("link set eth0 up");
    }
}
