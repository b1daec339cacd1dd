//! Checkpoints brought back to files and devices of the dispatcher's own host, by `blxctl` and from a bare data directory: whole
//! and by partition, and what is refused. Needs root for the loop devices.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod bus;
    pub(crate) mod chain;
    pub(crate) mod lab;
    pub(crate) mod store;
}

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

use common::bus::Bus;
use common::lab::{BLXREP, run};
use common::store::{AGENT, PART1, PART2, PART3, Store};
use serde_json::Value;

const PARTS: [(&str, (usize, usize)); 3] = [("1", PART1), ("2", PART2), ("3", PART3)];

/// A store whose dispatcher runs, on a bus of its own.
struct World {
    store: Store,
    bus: Bus,
}

impl World {
    fn new(name: &str) -> Self {
        let mut store = Store::new(name);
        let bus = Bus::start(&store.lab);
        store.lab.bus = Some(bus.address.clone());
        store.lab.start_dispatcher(&["--scrub-every", "never"]);
        Self { store, bus }
    }

    /// `blxctl`, killed when the test ends.
    fn blxctl(&self, args: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(Path::new(BLXREP).with_file_name("blxctl"));
        command.args(args).env("DBUS_SYSTEM_BUS_ADDRESS", &self.bus.address);
        command
    }

    fn restore(&self, args: &[&str]) -> Output {
        self.blxctl(&[&["--json", "restore", "--agent", AGENT], args].concat()).output().unwrap()
    }

    /// A restore by both ways, of the newest checkpoint, that must be refused with this exit code and say this.
    fn refused(&self, target: &str, args: &[&str], code: i32, says: &str) {
        let offline =
            [self.store.args("restore", "latest"), vec!["--output", target], args.to_vec()].concat();
        refused(&Command::new(BLXREP).args(&offline).output().unwrap(), code, says);
        refused(&self.restore(&[&["latest", target], args].concat()), code, says);
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn refused(output: &Output, code: i32, says: &str) {
    assert!(output.status.code() == Some(code) && said(output).contains(says), "{says}: {output:?}");
}

fn done(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What is in the directory, hidden files too.
fn names(dir: &str) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_partition_comes_back_by_itself() {
    let world = World::new("partition");
    let store = &world.store;
    let (dir, file) = (store.lab.path("out"), store.lab.path("out/part.img"));
    fs::create_dir(&dir).unwrap();
    for (id, disk) in store.ids.iter().zip(&store.disks) {
        for (number, (at, len)) in PARTS {
            let same = |what: &str| {
                assert!(fs::read(&file).unwrap() == disk[at..at + len], "{what}: {number} of {id}");
                fs::remove_file(&file).unwrap();
            };
            run(
                BLXREP,
                &[store.args("restore", id), vec!["--partition", number, "--output", &file]].concat(),
            );
            same("offline");
            let ended = done(&world.restore(&[id, &file, "--partition", number]));
            assert_eq!((&ended["size_bytes"], &ended["checkpoint"]), (&len.into(), &id.as_str().into()));
            same("by blxctl");
        }
    }

    // Holes stay holes, a device keeps what is behind the partition, and a file is named after what is in it.
    let disk = &store.disks[2];
    done(&world.restore(&["latest", &file, "--partition", "2"]));
    let allocated = fs::metadata(&file).unwrap().blocks() * 512;
    assert!(allocated <= 4 << 20, "{allocated} bytes for 3 MiB of data");
    let device = store.lab.loop_disk(3);
    run(
        "sh",
        &[
            "-c",
            &format!(
                "tr '\\0' x </dev/zero | dd of={} bs=1M count=3 iflag=fullblock status=none",
                device.path
            ),
        ],
    );
    done(&world.restore(&["latest", &device.path, "--partition", "3"]));
    let held = fs::read(&device.path).unwrap();
    assert!(held[..PART3.1] == disk[PART3.0..PART3.0 + PART3.1], "the partition");
    assert!(held[PART3.1..].iter().all(|byte| *byte == b'x'), "what is behind it");
    let unnamed = Command::new(BLXREP)
        .args([store.args("restore", "latest"), vec!["--partition", "1"]].concat())
        .current_dir(&dir)
        .output();
    assert!(unnamed.unwrap().status.success());
    assert_eq!(names(&dir), ["part.img".to_owned(), format!("web1-disk0-{}-part1.img", store.ids[2])]);
}

#[test]
fn a_partition_is_verified_as_the_disk_is() {
    let world = World::new("damaged");
    let store = &world.store;
    let dir = store.lab.path("out");
    fs::create_dir(&dir).unwrap();
    let target = format!("{dir}/part.img");
    world.refused(&target, &["--partition", "4"], 2, "no partition 4; there is: 1, 2, 3");
    world.refused(&target, &["--partition", "0"], 2, "no partition 0; there is: 1, 2, 3");
    let snapshots = Path::new(&store.data).join("snapshot/web1/disk0");
    let img = names(snapshots.to_str().unwrap()).into_iter().find(|name| name.ends_with(".img")).unwrap();
    let mut bytes = fs::read(snapshots.join(&img)).unwrap();
    bytes[PART2.0 + (10 << 20)] ^= 1;
    fs::write(snapshots.join(&img), bytes).unwrap();
    world.refused(&target, &["--partition", "2"], 4, &img);
    assert_eq!(names(&dir), [""; 0]);
}
