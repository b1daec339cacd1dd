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
    pub(crate) mod world;
}

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use common::lab::{BLXREP, run, wait_for};
use common::store::{AGENT, PART1, PART2, PART3, SIZE_MIB, Umount};
use common::world::{World, done, held, names, refused, said};

const PARTS: [(&str, (usize, usize)); 3] = [("1", PART1), ("2", PART2), ("3", PART3)];

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
    let held = held(&device);
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
    // Of another partition, and of this one.
    let img = store.damage(PART3.0 + 8192);
    for partition in ["2", "3"] {
        world.refused(&target, &["--partition", partition], 4, &img);
    }
    assert_eq!(names(&dir), [""; 0]);
}

#[test]
fn a_device_that_holds_something_or_is_in_use_or_too_small_is_refused_by_every_way() {
    let world = World::with_agent("refused");
    let lab = &world.store.lab;
    let (mut device, other) = (lab.loop_disk(SIZE_MIB + 1), lab.loop_disk(SIZE_MIB));
    let path = device.path.clone();
    run("mkfs.ext4", &["-qF", "-L", "precious", &path]);
    world.refused_device(
        &device,
        &[],
        &format!("holds ext4 named precious: if that is to be overwritten, say --overwrite {path}"),
    );
    world.refused_device(&device, &["--overwrite", &other.path], "nothing was written");
    device.mount(lab, &path);
    world.refused_device(&device, &["--overwrite", &path], "in use");
    device.umount_all();
    run("wipefs", &["-aq", &path]);
    lab.partition(&device, "label: gpt\nstart=2048, size=8192\n");
    world.refused_device(&device, &[], "holds a partition table (gpt)");
    let part = device.part(1);
    device.mkfs_mount(lab, "ext4", &part);
    world.refused_device(&device, &["--overwrite", &path], "in use");
    device.umount_all();
    {
        let _other = File::options().read(true).custom_flags(libc::O_EXCL).open(&other.path).unwrap();
        world.refused_device(&other, &[], "in use");
    }
    let small = lab.loop_disk(SIZE_MIB - 1);
    world.refused_device(&small, &[], &format!("needs {}", SIZE_MIB << 20));
    let there = lab.path("there");
    fs::write(&there, "mine").unwrap();
    world.refused(&there, &[], 2, "there already");
    world.refused(&there, &["--overwrite", &there], 2, "there already");
    assert_eq!(fs::read(&there).unwrap(), b"mine");

    // What there is not.
    let new = lab.path("new");
    world.refused(&new, &["--disk", "sdz"], 5, "no disk sdz");
    for (agent, checkpoint, says) in
        [("web2", "latest", "nothing is stored of agent web2"), (AGENT, "209901010000", "no checkpoint")]
    {
        let data = &world.store.data;
        let mut offline = Command::new(BLXREP);
        offline.args([
            "dispatcher",
            "restore",
            "--agent",
            agent,
            "--checkpoint",
            checkpoint,
            "--data-dir",
            data,
            "--output",
            &new,
        ]);
        let mut online = world.blxctl(&["restore", "--agent", agent, checkpoint, &new]);
        for command in [&mut offline, &mut online] {
            refused(&command.output().unwrap(), 5, says);
        }
    }
    assert!(!Path::new(&new).exists());

    // Named twice it is overwritten, and empty it need not be.
    let disk = &world.store.disks[2];
    done(&world.restore(&["latest", &path, "--overwrite", &path]));
    assert!(held(&device)[..disk.len()] == *disk);
    world.refused_device(&device, &[], "holds a partition table (gpt)");
    done(&world.restore(&["latest", &other.path]));
    assert!(held(&other) == *disk);
    let offline = [world.store.args("restore", &world.store.ids[0]), vec!["--output", &other.path]].concat();
    run(BLXREP, &[offline, vec!["--overwrite", &other.path]].concat());
    assert!(held(&other) == world.store.disks[0]);
}

#[test]
fn a_qcow2_image_is_what_a_raw_restore_brings_back() {
    let world = World::new("qcow2");
    let store = &world.store;
    let dir = store.lab.path("out");
    fs::create_dir(&dir).unwrap();
    let target = format!("{dir}/web1.qcow2");
    for (n, id) in store.ids.iter().enumerate() {
        let raw = store.restored(n);
        let ended = done(&world.restore(&["--format", "qcow2", id, &target]));
        assert_eq!(
            (&ended["result"], &ended["checkpoint"]),
            (&"done".into(), &id.as_str().into()),
            "{ended}"
        );
        assert_eq!(
            (&ended["output"], &ended["size_bytes"]),
            (&target.as_str().into(), &(SIZE_MIB << 20).into())
        );
        assert_eq!(names(&dir), ["web1.qcow2"]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, &target]);
        run("qemu-img", &["check", "-f", "qcow2", &target]);
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o600);
        fs::remove_file(&target).unwrap();
    }
    world.is_clean();

    let device = store.lab.loop_disk(SIZE_MIB);
    let there = store.lab.path("there");
    fs::write(&there, "mine").unwrap();
    for (target, args, says) in [
        (&device.path, vec![], "is a device"),
        (&there, vec![], "there already"),
        (&target, vec!["--partition", "1"], "whole disk"),
        (&target, vec!["--overwrite", &target], "whole disk"),
        (&target, vec!["--no-wait"], "whole disk"),
    ] {
        refused(&world.restore(&[&["--format", "qcow2", "latest", target], &*args].concat()), 2, says);
    }
    refused(&world.restore(&["--format", "qcow2", "209901010000", &target]), 5, "no checkpoint");
    assert_eq!((names(&dir), fs::read(&there).unwrap()), (vec![], b"mine".to_vec()));
    world.is_clean();
}

#[test]
fn a_qcow2_image_that_is_not_finished_leaves_nothing() {
    let world = World::new("unfinished");
    let lab = &world.store.lab;
    let (out, bin) = (lab.path("out"), lab.path("bin"));
    for dir in [&out, &bin] {
        fs::create_dir(dir).unwrap();
    }
    let target = format!("{out}/web1.qcow2");
    let args = ["restore", "--agent", AGENT, "--format", "qcow2", "latest", &target];
    std::os::unix::fs::symlink(run("sh", &["-c", "command -v setpriv"]), format!("{bin}/setpriv")).unwrap();
    refused(&world.blxctl(&args).env("PATH", &bin).output().unwrap(), 1, "no qemu-img in PATH");
    assert_eq!(names(&out), [""; 0]);

    // It writes its pid beside itself and a part of the image, and goes on.
    let (converter, pid) = (format!("{bin}/qemu-img"), lab.path("pid"));
    let script = format!(
        "#!/bin/sh\nfor last; do :; done\necho part >\"$last\"\necho $$ >{pid}.new\nmv {pid}.new {pid}\nexec sleep 600\n"
    );
    fs::write(&converter, script).unwrap();
    run("chmod", &["755", &converter]);
    for signal in ["INT", "TERM", "HUP"] {
        let _ = fs::remove_file(&pid);
        // Not a pipe: one would stay open as long as a converter goes on.
        let heard = lab.path("heard");
        let mut command = world.blxctl(&args);
        command.env("PATH", format!("{bin}:/usr/bin:/bin"));
        let running = command.stdout(Stdio::null()).stderr(File::create(&heard).unwrap()).spawn();
        let mut running = running.unwrap();
        wait_for("the converter", 20, || Path::new(&pid).exists());
        assert_eq!(names(&out), [format!(".web1.qcow2.{}.part", running.id())]);
        let converting = format!("/proc/{}", fs::read_to_string(&pid).unwrap().trim());
        run("kill", &["-s", signal, &running.id().to_string()]);
        assert_eq!(running.wait().unwrap().code(), Some(1), "{signal}");
        assert!(fs::read_to_string(&heard).unwrap().contains("canceled"), "{signal}");
        assert!(!Path::new(&converting).exists(), "{signal}: the converter goes on");
        assert_eq!(names(&out), [""; 0]);
        world.is_clean();
    }

    // One that writes something else than it read.
    let wrong = "#!/bin/sh\nPATH=/usr/bin:/bin\nqemu-img \"$@\" || exit\n[ \"$1\" = compare ] || qemu-io -c 'write -P 0x77 3M 4k' \"$5\"\n";
    fs::write(&converter, wrong).unwrap();
    let path = format!("{bin}:/usr/bin:/bin");
    refused(&world.blxctl(&args).env("PATH", path).output().unwrap(), 1, "broke off");
    assert_eq!(names(&out), [""; 0]);

    // Not in zeros: those need not be read.
    let img = world.store.damage(PART3.0 + 8192);
    refused(&world.blxctl(&args).output().unwrap(), 1, "look for damage");
    let log = world.store.lab.dispatcher.as_ref().unwrap().log();
    assert!(log.contains(&img), "the log names the file: {log}");
    assert_eq!(names(&out), [""; 0]);
    world.is_clean();
}

#[test]
fn of_two_restores_to_one_target_at_once_one_is_refused() {
    let world = World::new("two");
    let lab = &world.store.lab;
    let (dir, disk) = (lab.path("out"), &world.store.disks[2]);
    fs::create_dir(&dir).unwrap();
    for offline in [false, true] {
        let device = lab.loop_disk(SIZE_MIB);
        let file = format!("{dir}/web1.img");
        for target in [&device.path, &file] {
            let other = [world.store.args("restore", "latest"), vec!["--output", target]].concat();
            let mut other = if offline {
                let mut command = Command::new(BLXREP);
                command.args(other);
                command
            } else {
                world.blxctl(&["restore", "--agent", AGENT, "latest", target])
            };
            let other = other.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            let ended = [world.restore(&["latest", target]), other.wait_with_output().unwrap()];
            let good = ended.iter().filter(|output| output.status.success()).count();
            let failed = ended.iter().find(|output| !output.status.success());
            // In use, or done already; or somebody else was the first to give the name.
            let says = ["in use", "holds a partition table", "there already", "File exists", "is there"];
            assert!(good == 1 && says.iter().any(|says| said(failed.unwrap()).contains(says)), "{ended:?}");
        }
        assert!(held(&device) == *disk && fs::read(&file).unwrap() == *disk);
        assert_eq!(names(&dir), ["web1.img"]);
        fs::remove_file(&file).unwrap();
    }
    world.is_clean();
}

#[test]
fn a_mount_point_that_is_in_use_is_refused_and_goes_on_being_used() {
    let world = World::new("mounts");
    let dir = world.store.lab.path("mnt");
    fs::create_dir(&dir).unwrap();
    let mount = || world.blxctl(&["--json", "mount", AGENT, "latest", &dir]).output().unwrap();
    let umount = || world.blxctl(&["--json", "umount", &dir]).output().unwrap();
    let there = format!("{dir}/there");
    fs::write(&there, "mine").unwrap();
    refused(&mount(), 2, "not empty");
    refused(&umount(), 2, "no checkpoint is mounted there");
    assert_eq!(names(&dir), ["there"]);
    fs::remove_file(&there).unwrap();

    done(&mount());
    let mounted = Umount(&dir);
    refused(&mount(), 2, "not empty");
    let offline = [world.store.args("mount", "latest"), vec![&dir]].concat();
    refused(&Command::new(BLXREP).args(offline).output().unwrap(), 1, "not empty");
    let reading = File::open(format!("{dir}/disk.img")).unwrap();
    refused(&umount(), 1, "in use");
    drop(reading);
    assert!(fs::read(format!("{dir}/disk.img")).unwrap() == world.store.disks[2]);
    done(&umount());
    drop(mounted);
    assert_eq!(names(&dir), [""; 0]);
    world.is_clean();
}
