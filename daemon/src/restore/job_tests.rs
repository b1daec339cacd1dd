//! What a job does besides restoring: it is canceled, writes to a file that somebody opened, verifies.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::tests::{GO_ON, Loop, lay, options, tree};
use super::*;
use crate::ids::CheckpointId;
use crate::store::life_tests::{id, owner, version};

/// Cancels when it is called for the `n`-th time.
fn cancel_at(n: usize) -> impl Fn(u64, u64) -> ControlFlow<()> {
    let left = Cell::new(n);
    move |_, _| {
        left.set(left.get().saturating_sub(1));
        if left.get() == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// An empty file that was opened for reading and writing.
fn opened(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap()
}

fn into_open(dir: &Path, file: File, progress: Progress<'_>) -> Result<RestoreReport, RestoreError> {
    let output = Some(Output::Open { file, name: PathBuf::from("/somewhere/x.img") });
    restore(RestoreOptions { output, ..options(dir, "latest") }, progress)
}

/// How often a restore looks whether to go on.
fn looks(dir: &Path) -> usize {
    let (looks, last) = (Cell::new(0), Cell::new((0, 0)));
    let file = opened(&dir.join("data/counted"));
    into_open(dir, file, &|done, total| {
        let (done_before, total_before) = last.replace((done, total));
        assert!(done >= done_before && done <= total && (total_before == 0 || total == total_before));
        looks.set(looks.get() + 1);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(last.get().0, last.get().1, "all is done in the end");
    looks.get()
}

#[test]
fn a_restore_that_is_canceled_anywhere_leaves_nothing() {
    let dir = lay(&tree());
    let looks = looks(dir.path());
    assert!(looks > 10);
    for n in 1..=looks {
        let error = restore(options(dir.path(), "latest"), &cancel_at(n)).unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (ProblemKind::Canceled, "canceled"));
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["data"], "canceled at {n}");
        let given = dir.path().join("data/given");
        let error = into_open(dir.path(), opened(&given), &cancel_at(n)).unwrap_err();
        assert_eq!(error.kind(), ProblemKind::Canceled);
        assert_eq!(fs::metadata(&given).unwrap().len(), 0, "canceled at {n}");
    }
}

#[test]
fn a_device_of_a_canceled_restore_is_said_to_hold_a_part_if_it_does() {
    let dir = lay(&tree());
    let backing = dir.path().join("data/backing");
    let junk = vec![0xaa; version(3).len()];
    for n in 1..=looks(dir.path()) {
        fs::write(&backing, &junk).unwrap();
        let device = Loop::over(&backing);
        let output = Some(Output::Path(PathBuf::from(&device.0)));
        let options = RestoreOptions { output, ..options(dir.path(), "latest") };
        let error = restore(options, &cancel_at(n)).unwrap_err();
        assert_eq!(error.kind(), ProblemKind::Canceled);
        let part = fs::read(&device.0).unwrap() != junk;
        assert_eq!(error.to_string().contains("holds only a part"), part, "canceled at {n}: {error}");
    }
}

#[test]
fn an_open_file_gets_the_image_and_keeps_its_name() {
    let dir = lay(&tree());
    let path = dir.path().join("given");
    let report = into_open(dir.path(), opened(&path), GO_ON).unwrap();
    assert_eq!((report.checkpoint.id, report.output), (id(3), PathBuf::from("/somewhere/x.img")));
    assert!(fs::read(&path).unwrap() == version(3));
    assert!(report.written_bytes < version(3).len() as u64, "zeros stay holes");
}

#[test]
fn an_open_device_gets_the_image() {
    let dir = lay(&tree());
    let backing = dir.path().join("data/backing");
    fs::write(&backing, vec![0xaa; version(3).len()]).unwrap();
    let device = Loop::over(&backing);
    let open =
        || OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(&device.0).unwrap();
    into_open(dir.path(), open(), GO_ON).unwrap();
    assert!(fs::read(&device.0).unwrap() == version(3));
    drop(device);
    fs::write(&backing, vec![0; 1 << 20]).unwrap();
    let small = Loop::over(&backing);
    let file = OpenOptions::new().read(true).write(true).open(&small.0).unwrap();
    let error = into_open(dir.path(), file, GO_ON).unwrap_err();
    assert!(error.kind() == ProblemKind::InvalidArgument && error.to_string().contains("needs"), "{error}");
}

#[test]
fn an_open_file_that_is_no_target_is_refused_and_not_touched() {
    let dir = lay(&tree());
    let path = dir.path().join("given");
    let refused = |file: File, says: &str| {
        let error = into_open(dir.path(), file, GO_ON).unwrap_err();
        assert!(error.kind() == ProblemKind::InvalidArgument && error.to_string().contains(says), "{error}");
    };
    fs::write(&path, b"precious").unwrap();
    refused(OpenOptions::new().read(true).write(true).open(&path).unwrap(), "not empty");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::write(&path, b"").unwrap();
    let way = "for reading and writing";
    refused(File::open(&path).unwrap(), way);
    refused(OpenOptions::new().write(true).open(&path).unwrap(), way);
    refused(OpenOptions::new().read(true).append(true).open(&path).unwrap(), way);
    for flag in [libc::O_DIRECT, libc::O_PATH] {
        let open = OpenOptions::new().read(true).write(true).custom_flags(flag).open(&path);
        // tmpfs knows no O_DIRECT on older kernels.
        open.into_iter().for_each(|file| refused(file, way));
    }
    refused(File::open(dir.path()).unwrap(), way);
    let both = |path: &str| OpenOptions::new().read(true).write(true).open(path).unwrap();
    refused(both("/dev/null"), "neither");
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    refused(File::from(OwnedFd::from(socket)), "neither");
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused(both(fifo.to_str().unwrap()), "neither");
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
}

#[test]
fn an_open_file_is_empty_again_after_damage() {
    let mut tree = tree();
    tree.get_mut(&owner().bak(id(3))).unwrap()[1500] ^= 1;
    let dir = lay(&tree);
    let path = dir.path().join("given");
    let error = into_open(dir.path(), opened(&path), GO_ON).unwrap_err();
    assert_eq!(error.kind(), ProblemKind::Damaged);
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
}

fn request(checkpoint: &str) -> VerifyRequest {
    let wanted = Wanted::Named(vec![checkpoint.to_owned()]);
    VerifyRequest { agent: Some(owner().agent), disk: Some("sda".into()), wanted }
}

/// What a verify of one checkpoint finds: which it was, whether it is sound, and the damaged files.
fn verify(dir: &Path, checkpoint: &str) -> Result<(CheckpointId, bool, Vec<String>), RestoreError> {
    let reports = Verification::plan(&dir.join("data"), &request(checkpoint))?.run(GO_ON)?;
    let [report] = &*reports else { panic!("{reports:?}") };
    let [verified] = &*report.verified else { panic!("{report:?}") };
    Ok((verified.id, verified.is_sound, report.damage().map(|damage| damage.file.clone()).collect()))
}

#[test]
fn a_verify_finds_what_a_restore_finds() {
    let mut tree = tree();
    let dir = lay(&tree);
    let sound = |n: usize| (id(n), true, Vec::new());
    assert_eq!(verify(dir.path(), "latest").unwrap(), sound(3));
    assert_eq!(verify(dir.path(), &id(1).to_string()).unwrap(), sound(1));
    assert_eq!(verify(dir.path(), "203011212034").unwrap_err().kind(), ProblemKind::NoSuchCheckpoint);
    assert_eq!(verify(dir.path(), "newest").unwrap_err().kind(), ProblemKind::InvalidArgument);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is written");

    let name = |n: usize| owner().bak(id(n)).display().to_string();
    tree.get_mut(&owner().bak(id(3))).unwrap()[1500] ^= 1;
    tree.get_mut(&owner().bak(id(2))).unwrap()[1500] ^= 1;
    let damaged = lay(&tree);
    assert_eq!(verify(damaged.path(), "latest").unwrap(), (id(3), false, vec![name(2), name(3)]));
    assert_eq!(verify(damaged.path(), &id(1).to_string()).unwrap(), sound(1));

    // A chain that breaks: the checkpoints behind are known by name, and the break is the damage.
    tree.remove(&owner().bak(id(1)));
    let broken = lay(&tree);
    assert_eq!(verify(broken.path(), "latest").unwrap(), (id(3), false, vec![name(1)]));
    assert_eq!(verify(broken.path(), &id(0).to_string()).unwrap(), sound(0));
}

#[test]
fn a_verify_can_be_canceled_also_within_one_file() {
    let dir = lay(&tree());
    let looks = Cell::new(0);
    let count = |_, _| {
        looks.set(looks.get() + 1);
        ControlFlow::Continue(())
    };
    let data = dir.path().join("data");
    let all = Verification::plan(&data, &request("latest")).unwrap();
    all.run(&count).unwrap();
    assert!(looks.get() > 12, "more often than once a file: {}", looks.get());
    for n in 1..=looks.get() {
        let error = all.run(&cancel_at(n)).unwrap_err();
        assert_eq!(error.kind(), ProblemKind::Canceled);
    }
}
