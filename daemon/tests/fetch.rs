//! Checkpoints come back over `/ws/restore`: an agent's own, of any of its disks, and nobody else's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod lab;
    pub(crate) mod wire;
}

use std::fs::{self, OpenOptions};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use blxrep::agent::fetch::{FetchError, FetchRequest, fetch};
use blxrep::agent::link::Dial;
use blxrep::restore::{Output, Progress, RestoreReport};
use blxrep::wire::Endpoint;
use blxrep::wire::frame::{decode_message, encode_message};
use blxrep::wire::message::{Fetch, RestoreDown, RestoreUp};
use blxrep_dbus::problem::ProblemKind;
use common::lab::{BLXREP, Lab, TestDisk, run, wait_for};
use common::wire::{dial, next, send};
use tokio::runtime::Runtime;

const GO_ON: Progress<'_> = &|_, _| ControlFlow::Continue(());

fn fill(disk: &TestDisk, mib: u32) {
    let (of, count) = (format!("of={}", disk.path), format!("count={mib}"));
    run("dd", &["if=/dev/urandom", &of, "bs=1M", &count, "oflag=direct", "status=none"]);
}

/// Replicates a disk until it has two checkpoints, and gives its id. The dispatcher runs.
fn store(lab: &Lab, agent: &str, disk: &TestDisk) -> String {
    // A state directory of its own: where another session was since, the same one would be a copied machine's.
    let process = lab.start_agent_in(&format!("state-{}", disk.name), agent, &[&disk.path], &[]);
    let rows = lab.wait_checkpoints(agent, &disk.name, 2, 60);
    drop(process);
    rows[0]["disk"].as_str().unwrap().to_owned()
}

/// Somebody with the key of an agent, and nothing else: the worst day.
struct Rescue {
    dial: Dial,
    out: PathBuf,
}

impl Rescue {
    fn new(lab: &Lab, agent: &str) -> Self {
        let out = PathBuf::from(lab.path(&format!("out-{agent}")));
        fs::create_dir_all(&out).unwrap();
        Self { dial: dial(lab, agent), out }
    }

    fn fetch(
        &self,
        runtime: &Runtime,
        disk: Option<&str>,
        checkpoint: &str,
        progress: Progress<'_>,
    ) -> Result<RestoreReport, FetchError> {
        let request = request(disk, checkpoint, Output::Path(self.out.join("x.img")));
        let result = self.fetch_as(runtime, request, progress);
        let left = fs::read_dir(&self.out).unwrap().count();
        assert_eq!(left, usize::from(result.is_ok()), "left behind after {result:?}");
        result
    }

    fn fetch_as(
        &self,
        runtime: &Runtime,
        request: FetchRequest,
        progress: Progress<'_>,
    ) -> Result<RestoreReport, FetchError> {
        fetch(&self.dial, request, runtime.handle(), progress, &mut |_| Ok(()))
    }

    /// A fetch that must give these bytes.
    fn gives(&self, runtime: &Runtime, disk: Option<&str>, checkpoint: &str, bytes: &[u8]) -> RestoreReport {
        let report = self.fetch(runtime, disk, checkpoint, GO_ON).unwrap();
        assert!(
            fs::read(&report.output).unwrap() == bytes,
            "{disk:?} {checkpoint} came back as something else"
        );
        fs::remove_file(&report.output).unwrap();
        report
    }

    /// A fetch that the dispatcher must refuse.
    fn refused(
        &self,
        runtime: &Runtime,
        disk: Option<&str>,
        checkpoint: &str,
    ) -> (ProblemKind, String, Vec<String>) {
        match self.fetch(runtime, disk, checkpoint, GO_ON) {
            Err(FetchError::Refused { kind, reason, damage, .. }) => (kind, reason, damage),
            other => panic!("{disk:?} {checkpoint} must be refused: {other:?}"),
        }
    }
}

/// Of the own agent's disks; what is cut is not tried again.
fn request(disk: Option<&str>, checkpoint: &str, output: Output) -> FetchRequest {
    let (disk, checkpoint) = (disk.map(str::to_owned), checkpoint.to_owned());
    FetchRequest { agent: None, disk, checkpoint, partition: None, output, patience: Duration::ZERO }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn an_agent_gets_its_own_checkpoints_and_no_others() {
    let mut lab = Lab::new("own");
    let runtime = runtime();
    let (one, two, other) = (lab.loop_disk(16), lab.loop_disk(8), lab.loop_disk(8));
    [(&one, 6), (&two, 8), (&other, 8)].iter().for_each(|(disk, mib)| fill(disk, *mib));
    let (agent, stranger, newcomer) = (lab.agent("a"), lab.agent("b"), lab.agent("c"));
    [&agent, &stranger, &newcomer].iter().for_each(|agent| drop(lab.enroll(agent)));
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let one_id = store(&lab, &agent, &one);
    let own = Rescue::new(&lab, &agent);
    let bytes = fs::read(&one.path).unwrap();
    own.gives(&runtime, None, "latest", &bytes);
    drop(own);
    store(&lab, &agent, &two);
    let other_id = store(&lab, &stranger, &other);

    let own = Rescue::new(&lab, &agent);
    let first = lab.show(&agent, Some(&one.name))[0]["checkpoint"].as_str().unwrap().to_owned();
    for disk in [one_id.as_str(), &one.name, &one.path] {
        let report = own.gives(&runtime, Some(disk), "latest", &bytes);
        let checkpoint = report.checkpoint;
        assert_eq!((checkpoint.agent.as_str(), checkpoint.disk.as_str()), (agent.as_str(), one_id.as_str()));
        assert_eq!(checkpoint.device, one.name);
        let report = own.gives(&runtime, Some(disk), &first, &bytes);
        assert_eq!(report.checkpoint.id.to_string(), first);
    }
    own.gives(&runtime, Some(&two.name), "latest", &fs::read(&two.path).unwrap());
    let (kind, reason, _) = own.refused(&runtime, None, "latest");
    assert!(
        kind == ProblemKind::InvalidArgument && reason.contains(&one.name) && reason.contains(&two.name),
        "{reason}"
    );
    assert_eq!(own.refused(&runtime, Some(&one.name), "203011212034").0, ProblemKind::NoSuchCheckpoint);
    assert_eq!(own.refused(&runtime, Some(&one.name), "newest").0, ProblemKind::InvalidArgument);
    assert_eq!(own.refused(&runtime, Some("brandnew"), "latest").0, ProblemKind::NoSuchDisk);
    let up = format!("../{stranger}/{other_id}");
    for disk in [other_id.as_str(), &other.name, &up] {
        let (kind, reason, _) = own.refused(&runtime, Some(disk), "latest");
        assert_eq!(kind, ProblemKind::NoSuchDisk, "{reason}");
    }
    let theirs = Rescue::new(&lab, &stranger);
    theirs.gives(&runtime, None, "latest", &fs::read(&other.path).unwrap());
    assert_eq!(theirs.refused(&runtime, Some(&one_id), "latest").0, ProblemKind::NoSuchDisk);
    let nothing = Rescue::new(&lab, &newcomer);
    let (kind, reason, _) = nothing.refused(&runtime, None, "latest");
    assert!(kind == ProblemKind::NoSuchAgent && !reason.contains(&agent), "{reason}");
    // Another agent's checkpoints only where the agents file says so, and no others even then.
    let of_other = || FetchRequest {
        agent: Some(stranger.parse().unwrap()),
        ..request(None, "latest", Output::Path(own.out.join("y.img")))
    };
    let denied = own.fetch_as(&runtime, of_other(), GO_ON).unwrap_err();
    assert!(matches!(&denied, FetchError::Refused { kind: ProblemKind::Refused, .. }), "{denied}");
    assert!(denied.to_string().contains(&format!("restores:{stranger}")), "{denied}");
    let agents = lab.path("agents");
    let lines = fs::read_to_string(&agents).unwrap();
    let (line, rest) = lines.split_once('\n').unwrap();
    assert!(line.starts_with(&agent), "{lines}");
    fs::write(&agents, format!("{line} restores:{stranger}\n{rest}")).unwrap();
    let report = own.fetch_as(&runtime, of_other(), GO_ON).unwrap();
    assert!(fs::read(&report.output).unwrap() == fs::read(&other.path).unwrap());
    let of_third = FetchRequest { agent: Some(newcomer.parse().unwrap()), ..of_other() };
    let denied = own.fetch_as(&runtime, of_third, GO_ON).unwrap_err();
    assert!(matches!(&denied, FetchError::Refused { kind: ProblemKind::Refused, .. }), "{denied}");
}

#[test]
fn an_agent_that_may_not_restore_and_a_damaged_store() {
    let mut lab = Lab::new("may");
    let runtime = runtime();
    let disk = lab.loop_disk(8);
    fill(&disk, 8);
    let (agent, barred) = (lab.agent("a"), lab.agent("b"));
    lab.enroll(&agent);
    let (data, agents) = (lab.path("data"), lab.path("agents"));
    let key =
        run(BLXREP, &["enroll", &barred, "--data-dir", &data, "--agents-file", &agents, "--no-restore"]);
    let key_file = lab.path(&format!("{barred}.key"));
    fs::write(&key_file, key).unwrap();
    run("chmod", &["600", &key_file]);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    store(&lab, &agent, &disk);
    let session = Rescue::new(&lab, &agent);
    let bytes = fs::read(&disk.path).unwrap();
    session.gives(&runtime, None, "latest", &bytes);

    let other = Rescue::new(&lab, &barred);
    let (kind, reason, _) = other.refused(&runtime, None, "latest");
    assert!(kind == ProblemKind::Refused && reason.contains("no-restore"), "{reason}");
    // The line is read at every connection.
    let lines = fs::read_to_string(&agents).unwrap();
    let (line, rest) = lines.split_once('\n').unwrap();
    fs::write(&agents, format!("{line} no-restore\n{rest}")).unwrap();
    assert_eq!(session.refused(&runtime, None, "latest").0, ProblemKind::Refused);
    fs::write(&agents, &lines).unwrap();
    session.gives(&runtime, None, "latest", &bytes);

    let verify = |json: &[&str]| {
        let args = ["dispatcher", "verify", "--agent", &agent, "--data-dir", &data, "--checkpoint", "latest"];
        Command::new(BLXREP).args(args).args(json).output().unwrap()
    };
    assert_eq!(verify(&[]).status.code(), Some(0));
    let images = run("find", &[&data, "-name", "*.img"]);
    let image = Path::new(images.lines().next().unwrap());
    let name = image.file_name().unwrap().to_str().unwrap();
    let mut damaged = fs::read(image).unwrap();
    // In the last group: all before it is sound.
    let at = damaged.len() - 5000;
    damaged[at] ^= 1;
    fs::write(image, &damaged).unwrap();
    let (kind, reason, damage) = session.refused(&runtime, None, "latest");
    assert_eq!(kind, ProblemKind::Damaged, "{reason}");
    assert!(damage.len() == 1 && damage[0].contains(name), "{damage:?}");
    // All is looked at before the first byte is overwritten.
    let target = lab.loop_disk(8);
    fill(&target, 8);
    let before = fs::read(&target.path).unwrap();
    let output = Output::Path(PathBuf::from(&target.path));
    let error = session.fetch_as(&runtime, request(None, "latest", output), GO_ON).unwrap_err();
    assert!(matches!(error, FetchError::Refused { kind: ProblemKind::Damaged, .. }), "{error}");
    assert!(!error.to_string().contains("only a part") && fs::read(&target.path).unwrap() == before);
    let found = verify(&["--json"]);
    assert_eq!(found.status.code(), Some(4));
    let found: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap();
    assert!(found["damage"][0]["file"].as_str().unwrap().ends_with(name), "{found}");
    assert_eq!(found["damage"][0]["blocks"][0][0], at / 4096);
}

#[test]
fn a_fetch_that_is_cut_or_canceled_leaves_nothing() {
    let mut lab = Lab::new("cut");
    let runtime = runtime();
    let disk = lab.loop_disk(96);
    fill(&disk, 96);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let id = store(&lab, &agent, &disk);
    let size: u64 = 96 << 20;
    let writes = |done: u64, total: u64| total > 2 * size && done > total - 2 * size + (size >> 3);

    let session = Rescue::new(&lab, &agent);
    let cancel =
        |done, total| if writes(done, total) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let error = session.fetch(&runtime, None, "latest", &cancel).unwrap_err();
    assert!(matches!(&error, FetchError::Restore(e) if e.kind() == ProblemKind::Canceled), "{error}");
    // An open file is empty again, whatever ended it.
    let given = lab.path("given");
    let output = || {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&given).unwrap();
        Output::Open { file, name: "given".into() }
    };
    session.fetch_as(&runtime, request(None, "latest", output()), &cancel).unwrap_err();
    assert_eq!(fs::metadata(&given).unwrap().len(), 0);

    // Some that are not read from keep their place.
    let headers = session.dial.headers();
    let (agent_id, checkpoint) = (agent.parse().unwrap(), "latest".into());
    let wanted = Fetch { agent: agent_id, disk: Some(id), checkpoint, partition: None, resumes: false };
    let wanted = encode_message(&RestoreUp::Fetch(wanted)).unwrap();
    let mut idle = Vec::new();
    for _ in 0..4 {
        let mut socket = runtime.block_on(session.dial.open(Endpoint::Restore, &headers)).unwrap();
        runtime.block_on(send(&mut socket, wanted.clone()));
        let begun = decode_message(&runtime.block_on(next(&mut socket)).unwrap()).unwrap();
        assert!(matches!(begun, RestoreDown::Begin { .. }), "{begun:?}");
        idle.push(socket);
    }
    let (kind, reason, _) = session.refused(&runtime, None, "latest");
    assert!(kind == ProblemKind::Busy && reason.contains("4 restores"), "{reason}");
    // A second message ends a connection.
    runtime.block_on(async {
        let socket = idle.last_mut().unwrap();
        send(socket, wanted.clone()).await;
        while next(socket).await.is_some() {}
    });
    drop(idle);

    // An agent whose line is taken out of the agents file is cut off, and not tried again for ever.
    let agents = lab.path("agents");
    let lines = fs::read_to_string(&agents).unwrap();
    let cut_off = |done, total| {
        if writes(done, total) && fs::metadata(&agents).unwrap().len() > 0 {
            fs::write(&agents, "").unwrap();
            // No more is taken until that is seen.
            std::thread::sleep(Duration::from_secs(3));
        }
        ControlFlow::Continue(())
    };
    wait_for("a place for a fetch", 30, || {
        let result = session.fetch(&runtime, None, "latest", &cut_off);
        let error = result.unwrap_err();
        let busy = matches!(error, FetchError::Refused { kind: ProblemKind::Busy, .. });
        assert!(busy || matches!(error, FetchError::Cut { .. }), "{error}");
        !busy
    });
    fs::write(&agents, &lines).unwrap();

    let dispatcher = lab.dispatcher.as_ref().unwrap().child.id().to_string();
    let began = Instant::now();
    let kill = |done, total| {
        if writes(done, total) {
            let _ = Command::new("kill").args(["-s", "KILL", &dispatcher]).output();
        }
        ControlFlow::Continue(())
    };
    let error = session.fetch(&runtime, None, "latest", &kill).unwrap_err();
    assert!(error.to_string().contains("the connection ended"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(30));
    drop(session);
    for signal in ["INT", "TERM"] {
        interrupted(&lab, &agent, signal);
    }
}

/// A restore on the command line that is interrupted cleans up and says so.
fn interrupted(lab: &Lab, agent: &str, signal: &str) {
    let (data, out) = (lab.path("data"), lab.path("cli"));
    fs::create_dir_all(&out).unwrap();
    let output = format!("{out}/x.img");
    let child = Command::new(BLXREP)
        .args(["dispatcher", "restore", "--agent", agent, "--data-dir", &data, "--checkpoint", "latest"])
        .args(["--output", &output])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while fs::read_dir(&out).unwrap().count() == 0 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(2));
    }
    run("kill", &["-s", signal, &child.id().to_string()]);
    let done = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("canceled"), "{said}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "something is left");
}
