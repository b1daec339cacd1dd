//! Disks come back to other machines than they came from: by a rescue system that has only the program and a key, and by an agent
//! that the dispatcher lets.

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
    pub(crate) mod meter;
}

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use blxrep_dbus::proxy::{Details, JobProxy, ManagerProxy, Options};
use blxrep_dbus::{BUS_NAME_AGENT, BUS_NAME_DISPATCHER, STARTED_BY_AGENT_UID, job_path};
use common::bus::Bus;
use common::lab::{BLXREP, Lab, Process, TestDisk, run, wait_for};
use common::meter::Meter;
use futures_util::StreamExt;
use zbus::proxy::CacheProperties;

const MIB: u64 = 1 << 20;

fn fill(path: &str, mib: u64) {
    let (of, count) = (format!("of={path}"), format!("count={mib}"));
    run("dd", &["if=/dev/urandom", &of, "bs=1M", &count, "oflag=direct", "status=none"]);
}

/// The first bytes of a disk, as it holds them and not as memory does.
fn bytes(path: &str, len: u64) -> Vec<u8> {
    run("blockdev", &["--flushbufs", path]);
    let mut bytes = Vec::new();
    File::open(path).unwrap().take(len).read_to_end(&mut bytes).unwrap();
    bytes
}

/// `blxrep agent restore` as on a rescue system: nothing of a configuration, no state, no bus, not even a PATH of its own.
fn rescue_command(lab: &Lab, key_of: &str, port: u16, args: &[&str]) -> Command {
    let (addr, key) = (format!("127.0.0.1:{port}"), lab.path(&format!("{key_of}.key")));
    let empty = lab.path("empty");
    fs::create_dir_all(&empty).unwrap();
    let mut command = Command::new(BLXREP);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir(empty).stdin(Stdio::null());
    command.args(["agent", "restore", "--dispatcher-addr", &addr, "--key-file", &key]).args(args);
    command
}

fn rescue(lab: &Lab, key_of: &str, port: u16, args: &[&str]) -> Output {
    rescue_command(lab, key_of, port, args).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A rescue that must be refused with this exit code, and leave the target as it is.
fn refused(lab: &Lab, agent: &str, target: &TestDisk, args: &[&str], code: i32, says: &str) {
    let before = bytes(&target.path, 4 * MIB);
    let done = rescue(lab, agent, lab.port, &[&["--output", &target.path], args].concat());
    assert_eq!(done.status.code(), Some(code), "{args:?}: {}", said(&done));
    assert!(said(&done).contains(says), "{args:?} must say {says:?}: {}", said(&done));
    assert!(bytes(&target.path, 4 * MIB) == before, "{args:?} changed the target");
}

/// An agent whose disk has a partition with a file system and is filled; it has two checkpoints, and goes on.
fn source(lab: &Lab, mib: u64) -> (String, TestDisk, Process) {
    let (agent, disk) = (lab.agent("web1"), lab.loop_disk(mib));
    fill(&disk.path, mib);
    run("wipefs", &["-aq", &disk.path]);
    // The last partition ends within a block.
    lab.partition(&disk, "label: gpt\nstart=2048, size=16384\nstart=18432, size=8193\n");
    run("mkfs.ext4", &["-qF", "-E", "offset=1048576", &disk.path, "8M"]);
    lab.enroll(&agent);
    let process = lab.start_agent_in("state-web1", &agent, &[&disk.path], &[]);
    lab.wait_checkpoints(&agent, &disk.name, 2, 60);
    (agent, disk, process)
}

#[test]
fn a_machine_comes_back_with_only_the_program_and_a_key() {
    let mut lab = Lab::new("rescue");
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let (agent, disk, process) = source(&lab, 64);
    let new = lab.loop_disk(80);
    let latest = ["--checkpoint", "latest"];
    let restore = [&latest[..], &["--output", &new.path]].concat();
    let done = rescue(&lab, &agent, lab.port, &restore);
    assert!(done.status.success(), "{}", said(&done));
    let image = bytes(&disk.path, 64 * MIB);
    assert!(bytes(&new.path, 64 * MIB) == image);
    // The live agent of that name goes on beside it.
    let checkpoints = lab.show(&agent, None).len();
    wait_for("one more checkpoint", 30, || lab.show(&agent, None).len() > checkpoints);
    let log = lab.dispatcher.as_ref().unwrap().log();
    assert!(!log.contains("is gone") && !log.contains("refused"), "{log}");

    // One block in a hundred differs, all over the disk.
    let changed = OpenOptions::new().write(true).open(&new.path).unwrap();
    for at in (10..64 * 256).step_by(100) {
        changed.write_all_at(&[at as u8 ^ 0x55; 4096], at * 4096).unwrap();
    }
    changed.sync_all().unwrap();
    drop(changed);
    let before = bytes(&new.path, 64 * MIB);
    for (overwrite, says) in
        [(vec![], "--overwrite /dev/"), (vec!["--overwrite", &disk.path], "nothing was written")]
    {
        refused(&lab, &agent, &new, &[&latest[..], &overwrite].concat(), 2, says);
    }
    assert!(bytes(&new.path, 64 * MIB) == before);
    let meter = Meter::before(lab.port);
    let done = rescue(&lab, &agent, meter.port, &[&restore[..], &["--overwrite", &new.path]].concat());
    assert!(done.status.success(), "{}", said(&done));
    assert!(bytes(&new.path, 64 * MIB) == image);
    let share = meter.bytes() as f64 / (64 * MIB) as f64;
    eprintln!("1 % differs: {:.2} % sent", share * 100.0);
    assert!(share <= 0.02, "{} bytes sent", meter.bytes());

    // The new disk is larger: its table is put right as the README says.
    run("sfdisk", &["-q", "--relocate", "gpt-bak-std", "--no-reread", &new.path]);
    run("sfdisk", &["-q", "--verify", &new.path]);

    // One partition alone, onto a larger disk and into a file. The second one begins at a block and ends within one.
    for (number, start, size) in [("1", 1, 8 * MIB), ("2", 9, 8193 * 512)] {
        let (target, file) = (lab.loop_disk(10), lab.path(&format!("part{number}.img")));
        let wanted = &image[(start * MIB) as usize..(start * MIB + size) as usize];
        for output in [&target.path, &file] {
            let args = [&latest[..], &["--partition", number, "--output", output]].concat();
            let done = rescue(&lab, &agent, lab.port, &args);
            assert!(done.status.success(), "{}", said(&done));
            let mut found = Vec::new();
            File::open(output).unwrap().take(size).read_to_end(&mut found).unwrap();
            assert!(found == wanted, "partition {number} in {output}");
        }
        assert_eq!(fs::metadata(&file).unwrap().len(), size);
    }
    drop(process);
}

#[test]
fn wrong_use_harms_nothing() {
    let mut lab = Lab::new("wrong");
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let (agent, _disk, process) = source(&lab, 32);
    drop(process);
    let latest = ["--checkpoint", "latest"];
    let (mut mounted, small, empty) = (lab.loop_disk(40), lab.loop_disk(31), lab.loop_disk(40));
    let path = mounted.path.clone();
    mounted.mkfs_mount(&lab, "ext4", &path);
    let overwrite = [&latest[..], &["--overwrite", &path]].concat();
    refused(&lab, &agent, &mounted, &overwrite, 2, "in use");
    refused(&lab, &agent, &mounted, &latest, 2, "holds ext4");
    refused(&lab, &agent, &small, &latest, 2, "needs 33554432");
    let mut parted = lab.loop_disk(40);
    lab.partition(&parted, "label: gpt\nstart=2048, size=40960\n");
    let part = parted.part(1);
    parted.mkfs_mount(&lab, "ext4", &part);
    let overwrite = [&latest[..], &["--overwrite", &parted.path]].concat();
    refused(&lab, &agent, &parted, &overwrite, 2, "in use");
    {
        let _other = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&empty.path).unwrap();
        refused(&lab, &agent, &empty, &latest, 2, "in use");
    }
    for (args, code, says) in [
        (vec!["--checkpoint", "20200101000000"], 5, "no checkpoint"),
        (vec!["--checkpoint", "latest", "--partition", "3"], 2, "there is: 1, 2"),
        (vec!["--checkpoint", "latest", "--disk", "sdz"], 5, "no disk"),
        (vec!["--checkpoint", "latest", "--agent", "web2"], 3, "restores:web2"),
    ] {
        refused(&lab, &agent, &empty, &args, code, says);
    }
    let there = lab.path("there");
    fs::write(&there, "mine").unwrap();
    let done = rescue(&lab, &agent, lab.port, &[&latest[..], &["--output", &there]].concat());
    assert_eq!(done.status.code(), Some(2), "{}", said(&done));
    assert_eq!(fs::read_to_string(&there).unwrap(), "mine");

    // A key that is not enrolled any more, and another machine that was let restore what is this one's.
    let (data, agents) = (lab.path("data"), lab.path("agents"));
    let new = lab.agent("new");
    let enroll = ["enroll", &new, "--data-dir", &data, "--agents-file", &agents, "--may-restore", &agent];
    let key = lab.path(&format!("{new}.key"));
    fs::write(&key, run(BLXREP, &enroll)).unwrap();
    run("chmod", &["600", &key]);
    let args = ["--checkpoint", "latest", "--output", &empty.path];
    let done = rescue(&lab, &new, lab.port, &args);
    assert_eq!(done.status.code(), Some(5), "nothing is stored of it: {}", said(&done));
    let done = rescue(&lab, &new, lab.port, &[&args[..], &["--agent", &agent]].concat());
    assert!(done.status.success(), "{}", said(&done));
    fs::write(&agents, "").unwrap();
    refused(
        &lab,
        &new,
        &empty,
        &[&args[..2], &["--agent", &agent, "--overwrite", &empty.path]].concat(),
        3,
        "enroll",
    );
}

#[test]
fn a_restore_that_is_cut_three_times_finishes() {
    let mut lab = Lab::new("three");
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let (agent, disk, process) = source(&lab, 64);
    drop(process);
    let target = lab.loop_disk(64);
    let meter = Meter::cutting(lab.port, 3, 12 * MIB);
    let done = rescue(&lab, &agent, meter.port, &["--checkpoint", "latest", "--output", &target.path]);
    assert!(done.status.success(), "{}", said(&done));
    assert_eq!((meter.cuts_left(), said(&done).matches("goes on").count()), (0, 3), "{}", said(&done));
    assert!(bytes(&target.path, 64 * MIB) == bytes(&disk.path, 64 * MIB));
    // What was under way at each cut is sent once more, and nothing else.
    assert!(meter.bytes() < (64 + 3 * 18) * MIB, "{} bytes", meter.bytes());
}

/// An agent on the bus with a disk of its own, that may restore what is another one's.
fn start_new(lab: &Lab, new: &str, disk: &TestDisk, port: u16) -> Process {
    lab.agents.borrow_mut().push(new.to_owned());
    let (addr, key, state) =
        (format!("127.0.0.1:{port}"), lab.path(&format!("{new}.key")), lab.path("state-new"));
    let mut args = vec!["start", "--mode", "agent", "--id", new, "--dispatcher-addr", &addr];
    args.extend(["--key-file", &key, "--state-dir", &state, "--device", &disk.path]);
    Process::start(&args, Path::new(&lab.path("new.log")), lab.bus.as_deref())
}

async fn restore(
    manager: &ManagerProxy<'static>,
    of: &str,
    target: &str,
    options: Options<'_>,
) -> zbus::Result<impl Future<Output = (String, Details)> + use<>> {
    let mut removed = manager.receive_job_removed().await?;
    let job = manager.restore(of, "latest", target, options).await?;
    Ok(async move {
        loop {
            let signal = removed.next().await.unwrap();
            let args = signal.args().unwrap();
            if args.job.as_str() == job.as_str() {
                return (args.result.clone(), args.details.clone());
            }
        }
    })
}

/// Waits until so many targets are said to hold a part only, and gives what is said. The daemon looks twice a second.
async fn unfinished(manager: &ManagerProxy<'static>, count: usize) -> Vec<String> {
    for _ in 0..100 {
        let agents = manager.agents().await.unwrap();
        let said: Vec<String> = agents[0]["unfinished"].clone().try_into().unwrap();
        if said.len() == count {
            return said;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("not {count} unfinished restores");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_says_what_is_half_restored_and_a_second_restore_repairs_it() {
    let mut lab = Lab::new("killed");
    let bus = Bus::start(&lab);
    lab.bus = Some(bus.address.clone());
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let (agent, disk, process) = source(&lab, 64);
    drop(process);
    let (new, own, target) = (lab.agent("new"), lab.loop_disk(4), lab.loop_disk(64));
    let (data, agents) = (lab.path("data"), lab.path("agents"));
    let enroll = ["enroll", &new, "--data-dir", &data, "--agents-file", &agents, "--may-restore", &agent];
    let key = lab.path(&format!("{new}.key"));
    fs::write(&key, run(BLXREP, &enroll)).unwrap();
    run("chmod", &["600", &key]);
    let meter = Meter::before(lab.port);
    let mut process = start_new(&lab, &new, &own, meter.port);
    lab.wait_checkpoints(&new, &own.name, 1, 60);

    // Held up in the middle, it is a job on both sides.
    let manager = bus.manager(BUS_NAME_AGENT).await;
    meter.hold_after(24 * MIB);
    let ended = restore(&manager, &agent, &target.path, Options::new()).await.unwrap();
    wait_for("the middle of the restore", 60, || meter.holds());
    let overwrite = || Options::from([("overwrite", target.path.as_str().into())]);
    let twice = restore(&manager, &agent, &target.path, overwrite()).await.err();
    let twice = twice.expect("two restores to one target").to_string();
    assert!(twice.contains("in use") || twice.contains("busy") || twice.contains("cannot open"), "{twice}");
    let on_dispatcher = bus.dispatcher().await;
    let bus_of = on_dispatcher.inner().connection();
    let job = JobProxy::builder(bus_of).destination(BUS_NAME_DISPATCHER).path(job_path(1));
    let job = job.cache_properties(CacheProperties::No).build().await.unwrap();
    assert_eq!(job.started_by_uid().await.unwrap(), STARTED_BY_AGENT_UID);
    assert_eq!(
        (job.agent().await.unwrap(), job.target().await.unwrap()),
        (agent.clone(), format!("agent {new}"))
    );
    let whole = unfinished(&manager, 1).await;
    assert!(whole[0].contains(&target.path) && whole[0].contains(&agent), "{whole:?}");
    drop(ended);

    process.kill();
    meter.hold_after(u64::MAX);
    assert!(bytes(&target.path, 64 * MIB) != bytes(&disk.path, 64 * MIB));
    let process = start_new(&lab, &new, &own, meter.port);
    wait_for("the agent on the bus", 30, || process.log().matches("on the bus as").count() == 2);
    let manager = bus.manager(BUS_NAME_AGENT).await;
    assert_eq!(unfinished(&manager, 1).await, whole, "it is known behind the kill");
    let before = meter.bytes();
    // It has a partition table by now.
    let refused = restore(&manager, &agent, &target.path, Options::new()).await.err().unwrap().to_string();
    assert!(refused.contains(&format!("--overwrite {}", target.path)), "{refused}");
    let (result, details) = restore(&manager, &agent, &target.path, overwrite()).await.unwrap().await;
    assert_eq!(result, "done", "{details:?}");
    assert!(bytes(&target.path, 64 * MIB) == bytes(&disk.path, 64 * MIB));
    unfinished(&manager, 0).await;
    assert!(meter.bytes() - before < 60 * MIB, "what was there was not sent again");
    drop(process);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_at_the_dispatcher_cancels_a_restore() {
    let mut lab = Lab::new("cancel");
    let bus = Bus::start(&lab);
    lab.bus = Some(bus.address.clone());
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let (agent, _disk, process) = source(&lab, 64);
    drop(process);
    let target = lab.loop_disk(64);
    let meter = Meter::before(lab.port);
    meter.hold_after(24 * MIB);
    let args = ["--checkpoint", "latest", "--output", &target.path];
    let mut command = rescue_command(&lab, &agent, meter.port, &args);
    let mut rescuing = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("the middle of the restore", 60, || meter.holds());
    let on_dispatcher = bus.dispatcher().await;
    let mut removed = on_dispatcher.receive_job_removed().await.unwrap();
    let bus_of = on_dispatcher.inner().connection();
    let job = JobProxy::builder(bus_of).destination(BUS_NAME_DISPATCHER).path(job_path(1));
    job.cache_properties(CacheProperties::No).build().await.unwrap().cancel().await.unwrap();
    // Not all at once: the dispatcher looks a few times a second whether it is to go on.
    while rescuing.try_wait().unwrap().is_none() {
        meter.hold_after(MIB);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let done = rescuing.wait_with_output().unwrap();
    let said = said(&done);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("canceled on the dispatcher") && said.contains("holds only a part"), "{said}");
    assert_eq!(removed.next().await.unwrap().args().unwrap().result, "canceled");
}
