//! Checkpoints mounted and exported from a data directory: what other programs read is what a restore brings back.
//! Needs root for the loop devices, /dev/fuse, and nbdcopy, nbdinfo and qemu-img.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod chain;
    pub(crate) mod lab;
}

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::chain::Chain;
use common::lab::{BLXREP, Lab, Process, run, wait_for};

const AGENT: &str = "web1";
const SIZE_MIB: u64 = 48;
const PART1: (usize, usize) = (1 << 20, 16 << 20);
const PART2: (usize, usize) = (20 << 20, 20 << 20);

/// A disk with two partitions, and three checkpoints of it: the first one's ext4 holds another file than the others'.
struct Store {
    lab: Lab,
    data: String,
    ids: Vec<String>,
    disks: Vec<Vec<u8>>,
}

impl Store {
    fn new(name: &str) -> Self {
        let lab = Lab::new(name);
        let data = lab.path("data");
        let mut first = partitioned(&lab);
        noise(&mut first[PART2.0..PART2.0 + (3 << 20)], 1);
        put_ext4(&lab, &mut first, "one");
        let mut second = first.clone();
        put_ext4(&lab, &mut second, "two");
        let mut third = second.clone();
        noise(&mut third[PART2.0 + 4096..PART2.0 + (2 << 20) + 8192], 2);
        third[PART2.0 + (2 << 20) + 8192..PART2.0 + (3 << 20)].fill(0);
        let (agent, disk) = (AGENT.parse().unwrap(), "disk0".parse().unwrap());
        let mib = |group: u64| first[(group << 20) as usize..][..1 << 20].to_vec();
        let mut chain = Chain::new(Path::new(&data), &agent, &disk, SIZE_MIB << 20, mib);
        chain.commit(changes(&first, &second));
        chain.commit(changes(&second, &third));
        let ids = chain.ids.iter().map(ToString::to_string).collect();
        Self { lab, data, ids, disks: vec![first, second, third] }
    }

    /// The arguments that name a checkpoint.
    fn args<'a>(&'a self, verb: &'a str, id: &'a str) -> Vec<&'a str> {
        vec!["dispatcher", verb, "--agent", AGENT, "--data-dir", &self.data, "--checkpoint", id]
    }

    /// A checkpoint that was restored the usual way.
    fn restored(&self, n: usize) -> String {
        let output = self.lab.path(&format!("restored-{n}.img"));
        run(BLXREP, &[self.args("restore", &self.ids[n]), vec!["--output", &output]].concat());
        assert!(fs::read(&output).unwrap() == self.disks[n], "restore of {n}");
        output
    }

    fn start(&self, args: &[&str], says: &str) -> Process {
        let log = PathBuf::from(self.lab.path(&format!("log-{}", std::process::id())));
        let _ = fs::remove_file(&log);
        let process = Process::start(args, &log, None);
        wait_for(says, 20, || process.log().contains(says));
        process
    }

    /// An export on a unix socket, and its URI.
    fn export(&self, n: usize, more: &[&str]) -> (Process, String, PathBuf) {
        let socket = self.lab.path("nbd.sock");
        let args = [self.args("export", &self.ids[n]), vec!["--socket", &socket], more.to_vec()].concat();
        (self.start(&args, "is exported"), format!("nbd+unix:///?socket={socket}"), socket.into())
    }
}

fn noise(bytes: &mut [u8], seed: u64) {
    let mut state = seed;
    for byte in bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 33) as u8;
    }
}

fn partitioned(lab: &Lab) -> Vec<u8> {
    let path = lab.path("table.raw");
    fs::File::create(&path).unwrap().set_len(SIZE_MIB << 20).unwrap();
    let mut sfdisk = Command::new("sfdisk").args(["-q", &path]).stdin(Stdio::piped()).spawn().unwrap();
    let script = "label: gpt\nstart=2048, size=32768\nstart=40960, size=40960\n";
    sfdisk.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    fs::read(path).unwrap()
}

fn put_ext4(lab: &Lab, disk: &mut [u8], content: &str) {
    let (files, part) = (lab.path("files"), lab.path("part.raw"));
    fs::create_dir_all(&files).unwrap();
    fs::write(Path::new(&files).join("which"), content).unwrap();
    let _ = fs::remove_file(&part);
    run("mkfs.ext4", &["-q", "-d", &files, &part, &format!("{}k", PART1.1 >> 10)]);
    disk[PART1.0..PART1.0 + PART1.1].copy_from_slice(&fs::read(&part).unwrap());
}

/// The blocks that differ, each written by itself or with its neighbours.
fn changes(before: &[u8], after: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut found: Vec<(u64, Vec<u8>)> = Vec::new();
    for (block, (old, new)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
        let block = block as u64;
        match found.last_mut() {
            _ if old == new => {}
            Some((first, bytes))
                if *first + bytes.len() as u64 / 4096 == block
                    && bytes.len() < 1 << 20
                    && !block.is_multiple_of(256) =>
            {
                bytes.extend(new);
            }
            _ => found.push((block, new.to_vec())),
        }
    }
    found
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn every_export_is_what_a_restore_brings_back() {
    let store = Store::new("export");
    let copy = store.lab.path("copied.img");
    for n in 0..3 {
        let restored = store.restored(n);
        let (mut process, uri, socket) = store.export(n, &[]);
        assert_eq!(run("nbdinfo", &["--size", &uri]), (SIZE_MIB << 20).to_string());
        assert_eq!(run("nbdinfo", &["--is", "read-only", &uri]), "");
        run("nbdcopy", &[&uri, &copy]);
        assert!(fs::read(&copy).unwrap() == store.disks[n], "nbdcopy of {n}");
        fs::remove_file(&copy).unwrap();
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &restored]);
        let map = run("nbdinfo", &["--map", &uri]);
        assert!(map.contains("zero") && map.contains("data"), "{map}");
        process.signal("TERM");
        assert_eq!(process.exit_code(20), 0);
        assert!(!socket.exists(), "the socket is left behind");
    }
}

#[test]
fn an_export_can_be_converted_to_qcow2_and_written_to_without_a_trace() {
    let store = Store::new("writable");
    let (mut process, uri, socket) = store.export(2, &["--writable"]);
    let qcow2 = store.lab.path("web1.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, &qcow2]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, &qcow2]);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 0x77 5000 70000", "-c", "write -z 1M 64k", "-c", "flush", &uri],
    );
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x77 5000 70000", "-c", "read -P 0 1M 64k", &uri]);
    let differs =
        Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2", &uri, &qcow2]).output();
    assert_eq!(differs.unwrap().status.code(), Some(1));
    process.signal("INT");
    assert_eq!((process.exit_code(20), socket.exists()), (0, false));
    store.restored(2);
    run(BLXREP, &store.args("verify", "latest"));
}

#[test]
fn a_mount_has_the_disk_and_its_partitions_which_can_be_mounted() {
    let store = Store::new("mount");
    let (dir, part) = (store.lab.path("mnt"), store.lab.path("part"));
    fs::create_dir_all(&dir).unwrap();
    fs::create_dir_all(&part).unwrap();
    let _umount = Umount(&dir);
    for (n, content) in [(0, "one"), (1, "two"), (2, "two")] {
        let mut process =
            store.start(&[store.args("mount", &store.ids[n]), vec![&dir]].concat(), "is mounted");
        let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["disk.img", "part1.img", "part2.img"]);
        let disk = &store.disks[n];
        assert!(fs::read(format!("{dir}/disk.img")).unwrap() == *disk);
        for (name, (at, len)) in [("part1", PART1), ("part2", PART2)] {
            assert!(fs::read(format!("{dir}/{name}.img")).unwrap() == disk[at..at + len], "{name} of {n}");
        }
        assert!(fs::File::options().write(true).open(format!("{dir}/disk.img")).is_err());
        assert!(fs::write(format!("{dir}/new"), "x").is_err());

        run("mount", &["-o", "loop,ro", &format!("{dir}/part1.img"), &part]);
        let _umount = Umount(&part);
        assert_eq!(fs::read_to_string(format!("{part}/which")).unwrap(), content);
        process.signal("INT");
        wait_for("the mount to say that it is in use", 20, || process.log().contains("is in use"));
        assert_eq!(fs::read_to_string(format!("{part}/which")).unwrap(), content, "it goes on");
        run("umount", &[&part]);
        // The loop device is let go of a moment later.
        wait_for("the mount to end", 20, || {
            process.signal("INT");
            std::thread::sleep(Duration::from_millis(200));
            process.child.try_wait().unwrap().is_some()
        });
        assert_eq!(process.exit_code(1), 0);
        assert!(fs::read_dir(&dir).unwrap().next().is_none(), "still mounted");
    }
}

/// Unmounts what a test that failed left.
struct Umount<'a>(&'a str);

impl Drop for Umount<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = Command::new("umount").args(["--lazy", self.0]).status();
        }
    }
}

#[test]
fn damage_is_an_input_output_error_and_the_log_names_the_file() {
    let store = Store::new("served-damage");
    let img = fs::read_dir(Path::new(&store.data).join("snapshot/web1/disk0")).unwrap();
    let img =
        img.map(|e| e.unwrap().path()).find(|path| path.extension().is_some_and(|e| e == "img")).unwrap();
    let mut bytes = fs::read(&img).unwrap();
    bytes[PART2.0 + (10 << 20)] ^= 1;
    fs::write(&img, bytes).unwrap();
    let dir = store.lab.path("mnt");
    fs::create_dir_all(&dir).unwrap();
    let _umount = Umount(&dir);
    let mut process = store.start(&[store.args("mount", "latest"), vec![&dir]].concat(), "is mounted");
    let mut part = fs::File::open(format!("{dir}/part2.img")).unwrap();
    let error = std::io::copy(&mut part, &mut std::io::sink()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(fs::read(format!("{dir}/part1.img")).unwrap() == store.disks[2][PART1.0..PART1.0 + PART1.1]);
    let name = img.file_name().unwrap().to_str().unwrap();
    wait_for("the log to name the file", 10, || process.log().contains(name));
    drop(part);
    process.signal("INT");
    assert_eq!(process.exit_code(20), 0);
}

#[test]
fn wrong_use_is_refused_and_harms_nothing() {
    let store = Store::new("served-wrong");
    let refused = |args: &[&str], code: i32, says: &str| {
        let output = Command::new(BLXREP).args(args).output().unwrap();
        assert!(output.status.code() == Some(code) && said(&output).contains(says), "{args:?}: {output:?}");
    };
    let (dir, socket) = (store.lab.path("data"), store.lab.path("there.sock"));
    fs::write(&socket, "x").unwrap();
    refused(&[store.args("mount", "latest"), vec![&dir]].concat(), 1, "not empty");
    refused(&[store.args("mount", "latest"), vec![&store.lab.path("none")]].concat(), 1, "No such file");
    refused(&[store.args("export", "latest"), vec!["--socket", &socket]].concat(), 1, "there already");
    assert_eq!(fs::read(&socket).unwrap(), b"x");
    refused(&store.args("export", "latest"), 2, "--socket");
    let empty = store.lab.path("photos");
    for verb in ["mount", "export"] {
        let place: &[&str] = if verb == "mount" { &[&empty] } else { &["--socket", "/nowhere/x"] };
        refused(&[&*store.args(verb, "209901010000"), place].concat(), 5, "no checkpoint");
        let mut args = store.args(verb, "latest");
        args[3] = "web2";
        refused(&[&*args, place].concat(), 5, "nothing is stored of agent web2");
    }
}

#[test]
fn clients_that_send_garbage_or_nothing_are_no_trouble_for_others() {
    let store = Store::new("garbage");
    let (mut process, uri, socket) = store.export(0, &[]);
    let mut silent: Vec<_> = (0..15).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".as_slice(),
        &[0xff; 4096],
        b"\0\0\0\x03IHAVEOPT\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
        assert_eq!(run("nbdinfo", &["--size", &uri]), (SIZE_MIB << 20).to_string());
    }
    // One more than are let in.
    let _last = UnixStream::connect(&socket).unwrap();
    let mut more = UnixStream::connect(&socket).unwrap();
    more.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(more.read_to_end(&mut Vec::new()).unwrap(), 0, "17 clients");
    // Those that say nothing are let go of.
    let end = Instant::now() + Duration::from_secs(30);
    for stream in &mut silent {
        stream.set_read_timeout(Some(end - Instant::now())).unwrap();
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 18, "only the greeting");
    }
    process.signal("TERM");
    assert_eq!(process.exit_code(20), 0);
}

#[test]
fn an_export_without_a_thread_for_a_client_goes_on() {
    let store = Store::new("threads");
    let (mut process, uri, socket) = store.export(0, &[]);
    let pid = process.child.id().to_string();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let size_kib: u64 = size.trim().trim_end_matches(" kB").parse().unwrap();
    // Less than a thread's stack.
    run("prlimit", &["--pid", &pid, &format!("--as={}:unlimited", (size_kib + 1024) << 10)]);
    let mut client = UnixStream::connect(&socket).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0, "it is let go of");
    run("prlimit", &["--pid", &pid, "--as=unlimited:unlimited"]);
    assert_eq!(run("nbdinfo", &["--size", &uri]), (SIZE_MIB << 20).to_string());
    process.signal("TERM");
    assert_eq!(process.exit_code(20), 0);
}
