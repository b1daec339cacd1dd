//! A data directory with three checkpoints of a partitioned disk, made without an agent.
#![allow(dead_code, unreachable_pub, reason = "every user takes another part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::chain::Chain;
use super::lab::{BLXREP, Lab, Process, run, wait_for};

pub const AGENT: &str = "web1";
pub const SIZE_MIB: u64 = 48;
/// Where the partitions begin, and their sizes in bytes. The first has an ext4, the third ends within a block.
pub const PART1: (usize, usize) = (1 << 20, 16 << 20);
pub const PART2: (usize, usize) = (20 << 20, 20 << 20);
pub const PART3: (usize, usize) = (40 << 20, 4097 * 512);

/// A disk with three partitions, and three checkpoints of it: the first one's ext4 holds another file than the others'.
pub struct Store {
    pub lab: Lab,
    pub data: String,
    pub ids: Vec<String>,
    pub disks: Vec<Vec<u8>>,
}

impl Store {
    pub fn new(name: &str) -> Self {
        let lab = Lab::new(name);
        let data = lab.path("data");
        let mut first = partitioned(&lab);
        noise(&mut first[PART2.0..PART2.0 + (3 << 20)], 1);
        noise(&mut first[PART3.0..PART3.0 + PART3.1 + 4096], 3);
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
    pub fn args<'a>(&'a self, verb: &'a str, id: &'a str) -> Vec<&'a str> {
        vec!["dispatcher", verb, "--agent", AGENT, "--data-dir", &self.data, "--checkpoint", id]
    }

    /// A checkpoint that was restored the usual way.
    pub fn restored(&self, n: usize) -> String {
        let output = self.lab.path(&format!("restored-{n}.img"));
        run(BLXREP, &[self.args("restore", &self.ids[n]), vec!["--output", &output]].concat());
        assert!(fs::read(&output).unwrap() == self.disks[n], "restore of {n}");
        output
    }

    /// Flips a bit of the base image, in a byte of the disk that no delta has. Gives the file's name.
    pub fn damage(&self, at: usize) -> String {
        let dir = fs::read_dir(Path::new(&self.data).join("snapshot/web1/disk0")).unwrap();
        let mut paths = dir.map(|entry| entry.unwrap().path());
        let img = paths.find(|path| path.extension().is_some_and(|e| e == "img")).unwrap();
        let mut bytes = fs::read(&img).unwrap();
        bytes[at] ^= 1;
        fs::write(&img, bytes).unwrap();
        img.file_name().unwrap().to_str().unwrap().to_owned()
    }

    pub fn start(&self, args: &[&str], says: &str) -> Process {
        let log = PathBuf::from(self.lab.path(&format!("log-{}", std::process::id())));
        let _ = fs::remove_file(&log);
        let process = Process::start(args, &log, None);
        wait_for(says, 20, || process.log().contains(says));
        process
    }

    /// An export on a unix socket, and its URI.
    pub fn export(&self, n: usize, more: &[&str]) -> (Process, String, PathBuf) {
        let socket = self.lab.path("nbd.sock");
        let args = [self.args("export", &self.ids[n]), vec!["--socket", &socket], more.to_vec()].concat();
        (self.start(&args, "is exported"), format!("nbd+unix:///?socket={socket}"), socket.into())
    }
}

/// Bytes that do not compress.
pub fn noise(bytes: &mut [u8], seed: u64) {
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
    let script = "label: gpt\nstart=2048, size=32768\nstart=40960, size=40960\nstart=81920, size=4097\n";
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

/// Unmounts what a test that failed left.
pub struct Umount<'a>(pub &'a str);

impl Drop for Umount<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = Command::new("umount").args(["--lazy", self.0]).status();
        }
    }
}
