//! A Debian's checkpoint starts in QEMU, and that is proven and kept; one whose boot loader or root was destroyed does not.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod bus;
    pub(crate) mod lab;
}

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use blxrep_dbus::proxy::Options;
use common::bus::Bus;
use common::lab::{BLXREP, Lab, Process, TestDisk, run, wait_for};
use serde_json::{Value, json};

/// A start takes a quarter of a minute where nothing else runs.
const BOOT_SECONDS: u64 = 300;

/// A `qemu-system-x86_64` in a directory of its own. It runs with its own libraries, not with the machine's.
fn qemu(lab: &Lab, root: &str) -> String {
    let dir = lab.path("bin");
    fs::create_dir(&dir).unwrap();
    let script = format!(
        "#!/bin/sh\nexport QEMU_MODULE_DIR={root}/usr/lib/x86_64-linux-gnu/qemu\n\
         exec {root}/lib64/ld-linux-x86-64.so.2 --library-path {root}/usr/lib/x86_64-linux-gnu \
         {root}/usr/bin/qemu-system-x86_64 -L {root}/usr/share/qemu -L {root}/usr/share/seabios \"$@\"\n"
    );
    let file = format!("{dir}/qemu-system-x86_64");
    fs::write(&file, script).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// A replicated disk, and `blxctl` beside its dispatcher.
struct World {
    /// Ends before the lab does, which removes its tracker.
    _process: Process,
    lab: Lab,
    bus: Bus,
    agent: String,
    disk: TestDisk,
    path: String,
}

impl World {
    fn blxctl(&self, args: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(Path::new(BLXREP).with_file_name("blxctl"))
            .args(args);
        command.env("DBUS_SYSTEM_BUS_ADDRESS", &self.bus.address).env("TMPDIR", self.lab.path("tmp"));
        command.env("PATH", &self.path);
        command
    }

    fn checkpoint(&self) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (result, details) = runtime.block_on(self.bus.sync(&self.agent, Options::new()));
        assert_eq!(result, "done", "{details:?}");
    }

    /// Overwrites a part of the disk with zeros.
    fn destroy(&self, from_sector: u64, sectors: u64) {
        let (of, seek, count) =
            (format!("of={}", self.disk.path), format!("seek={from_sector}"), format!("count={sectors}"));
        run("dd", &["if=/dev/zero", &of, "bs=512", &seek, &count, "conv=notrunc,fsync", "status=none"]);
    }

    /// Proves, or not, that the newest checkpoint boots.
    fn verify(&self) -> (Output, Value) {
        let seconds = BOOT_SECONDS.to_string();
        let args = [
            "--json",
            "verify",
            "--boot",
            "--agent",
            &self.agent,
            "--boot-timeout",
            &seconds,
            "--",
            "-accel",
            "tcg",
        ];
        let output = self.blxctl(&args).output().unwrap();
        let proof = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
        (output, proof)
    }

    /// What is stored of checkpoints, down to the time of each file's last change.
    fn stored(&self) -> Vec<String> {
        let of = |top: &str| {
            let dir = self.lab.path(&format!("data/{top}/{}", self.agent));
            let disks = fs::read_dir(dir).into_iter().flatten().map(|disk| disk.unwrap().path());
            let files: Vec<_> =
                disks.flat_map(|disk| fs::read_dir(disk).unwrap().map(|file| file.unwrap())).collect();
            files.into_iter().map(|file| {
                let meta = file.metadata().unwrap();
                format!("{:?} {} {}.{}", file.path(), meta.len(), meta.mtime(), meta.mtime_nsec())
            })
        };
        // The dispatcher tidies up behind a commit meanwhile.
        let is_whole = |file: &String| !file.contains(".part");
        let mut all: Vec<_> = of("snapshot").chain(of("incremental")).filter(is_whole).collect();
        all.sort();
        all
    }

    fn assert_nothing_is_left(&self) {
        assert_eq!(fs::read_dir(self.lab.path("tmp")).unwrap().count(), 0);
        wait_for("the exports to end", 20, || {
            let jobs = self.blxctl(&["--json", "jobs"]).output().unwrap().stdout;
            serde_json::from_slice::<Value>(&jobs).unwrap() == json!([])
        });
    }
}

/// Reads until a text comes.
fn read_until(child: &mut Child, text: &str) {
    let mut output = child.stdout.take().unwrap();
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    while !String::from_utf8_lossy(&seen).contains(text) {
        let count = output.read(&mut buffer).unwrap();
        assert!(count > 0, "it ended before {text:?}: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..count]);
    }
    child.stdout = Some(output);
}

fn boots(row: &Value) -> (&Value, bool) {
    (&row["boot"], row["boot_time"].is_string())
}

#[test]
fn a_debian_boots_and_one_without_boot_loader_or_root_does_not() {
    let mut lab = Lab::new("boot");
    let made = run(concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/boot-disk"), &[]);
    let (image, root) = made.split_once('\n').unwrap();
    let path = format!("{}:{}", qemu(&lab, root), std::env::var("PATH").unwrap());
    fs::create_dir(lab.path("tmp")).unwrap();
    let bus = Bus::start(&lab);
    lab.bus = Some(bus.address.clone());
    let (agent, mut disk) = (lab.agent("a"), lab.loop_disk(fs::metadata(image).unwrap().len() >> 20));
    let of = format!("of={}", disk.path);
    run("dd", &[&format!("if={image}"), &of, "bs=1M", "conv=sparse,notrunc,fsync", "status=none"]);
    run("partx", &["-u", &disk.path]);
    let device = disk.part(1);
    let mounted = disk.mount(&lab, &device);
    fs::write(mounted.join("etc/hostname"), "the-copy\n").unwrap();
    lab.enroll(&agent);
    lab.start_dispatcher(&["--sync-freq", "1h"]);
    let process = lab.start_agent(&agent, &[&disk.path], &[]);
    lab.wait_checkpoints(&agent, &disk.name, 1, 300);
    let mut world = World { _process: process, lab, bus, agent, disk, path };

    // For a person, who looks at it and cuts its power.
    let before = world.stored();
    let mut command = world.blxctl(&["boot", &world.agent, "latest", "--", "-accel", "tcg"]);
    let mut person = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    read_until(&mut person, "the-copy login:");
    person.stdin.as_mut().unwrap().write_all(b"\x01x").unwrap();
    assert_eq!(person.wait_with_output().unwrap().status.code(), Some(0));
    world.assert_nothing_is_left();
    assert_eq!(world.stored(), before, "nothing in the store changes");

    let (output, proof) = world.verify();
    assert_eq!((output.status.code(), &proof["boot"]), (Some(0), &json!("passed")), "{proof}");
    assert!(proof["console"].as_str().unwrap().contains("the-copy login:"), "{proof}");

    // The boot loader's first sector, and with it the partition table.
    world.disk.umount_all();
    world.destroy(0, 1);
    world.checkpoint();
    let (output, proof) = world.verify();
    assert_eq!((output.status.code(), &proof["boot"]), (Some(4), &json!("failed")), "{proof}");
    assert!(proof["reason"].as_str().unwrap().contains("nothing to boot"), "{proof}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not boot"), "{output:?}");

    // Back with it, and the file system's beginning.
    run("dd", &[&format!("if={image}"), &of, "bs=512", "count=1", "conv=notrunc,fsync", "status=none"]);
    world.destroy(2048, 65536);
    world.checkpoint();
    let (output, proof) = world.verify();
    assert_eq!((output.status.code(), &proof["boot"]), (Some(4), &json!("failed")), "{proof}");
    assert!(proof["reason"].as_str().unwrap().contains("boot loader"), "{proof}");
    world.assert_nothing_is_left();

    // It is kept with its checkpoint, and is in nobody's way.
    let rows = world.lab.show(&world.agent, None);
    let found: Vec<_> = rows.iter().map(boots).collect();
    assert_eq!(found, [(&json!("passed"), true), (&json!("failed"), true), (&json!("failed"), true)]);
    for row in &rows {
        let (id, disk) = (row["checkpoint"].as_str().unwrap(), row["disk"].as_str().unwrap());
        let file = world.lab.path(&format!("data/boot/{}/{disk}/{id}.boot", world.agent));
        assert!(fs::read_to_string(&file).unwrap().contains("SeaBIOS"), "{file}");
    }
    world.lab.dispatcher = None;
    world.lab.start_dispatcher(&["--sync-freq", "1h"]);
    let all = world.blxctl(&["verify", "--all"]).output().unwrap();
    assert_eq!(all.status.code(), Some(0), "{all:?}");
}
