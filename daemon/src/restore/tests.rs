//! Restoring from real files: every byte flipped, files missing, cut and swapped, outputs that are in the way.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::checkpoint::chain;
use crate::store::Damage;
use crate::store::disk_store::DiskStore;
use crate::store::handle::Dir;
use crate::store::life_tests::{Acks, geometry, id, live, owner, version};
use crate::store::simfiles::SimFiles;
use crate::store::unreadable_tests as unreadable;
use crate::unreadable::sectors;

pub(crate) type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// The files of a whole life, and a report in the open journal.
pub(crate) fn tree() -> Tree {
    let files = SimFiles::default();
    let mut store = DiskStore::open(files.arc(), owner().agent, owner().disk).unwrap();
    live(&mut store, &mut Acks::default()).unwrap();
    store.put_changed(&[crate::bitmap::Extent { first: 5, count: 2 }]).unwrap();
    store.sync().unwrap();
    files.dump()
}

pub(super) fn lay(tree: &Tree) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, bytes) in tree {
        let path = dir.path().join("data").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

/// Checkpoint `n` of a whole life, opened, and what is on its disk.
pub(crate) fn laid_open(n: usize) -> (tempfile::TempDir, Opened, Vec<u8>) {
    let dir = lay(&tree());
    let opened = open(&dir.path().join("data"), &owner().agent, None, &id(n).to_string()).unwrap();
    (dir, opened, version(n))
}

pub(super) fn options(dir: &Path, checkpoint: &str) -> RestoreOptions {
    RestoreOptions {
        data_dir: dir.join("data"),
        agent: owner().agent,
        disk: None,
        checkpoint: checkpoint.to_owned(),
        partition: None,
        output: Some(Output::Path(dir.join("out.img"))),
    }
}

/// Never cancels.
pub(super) const GO_ON: Progress<'_> = &|_, _| ControlFlow::Continue(());

fn run(dir: &Path, checkpoint: &str) -> Result<RestoreReport, RestoreError> {
    let result = restore(options(dir, checkpoint), GO_ON);
    let left: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).filter(|n| n != "data").collect();
    assert_eq!(left.len(), usize::from(result.is_ok()), "left behind: {left:?}");
    if result.is_ok() {
        let restored = fs::read(dir.join("out.img")).unwrap();
        let mode = dir.join("out.img").metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "everybody's secrets are on a disk");
        fs::remove_file(dir.join("out.img")).unwrap();
        let n = (0..4).find(|n| id(*n) == result.as_ref().unwrap().checkpoint.id).unwrap();
        assert!(restored == version(n), "checkpoint {n} came back as something else");
    }
    result
}

fn damage(result: Result<RestoreReport, RestoreError>) -> Vec<Damage> {
    match result {
        Err(RestoreError::Damaged(damage)) => damage,
        other => panic!("damage was not found: {other:?}"),
    }
}

#[test]
fn blocks_that_could_not_be_read_come_back_as_zeros_and_are_named() {
    let dir = lay(&unreadable::files().dump());
    for (n, bad) in unreadable::BAD.into_iter().enumerate() {
        let (text, named) =
            (unreadable::id(n).to_string(), sectors(&unreadable::set(bad), unreadable::geometry(), 9));
        let report = restore(options(dir.path(), &text), GO_ON).unwrap();
        assert_eq!(
            (report.checkpoint.unreadable_blocks as usize, &report.unreadable_sectors),
            (bad.len(), &named)
        );
        assert!(fs::read(dir.path().join("out.img")).unwrap() == unreadable::version(n), "checkpoint {n}");
        fs::remove_file(dir.path().join("out.img")).unwrap();
        let wanted = Wanted::Named(vec![text.clone()]);
        let request = VerifyRequest { agent: Some(owner().agent), disk: None, wanted };
        let found = Verification::plan(&dir.path().join("data"), &request).unwrap().run(GO_ON).unwrap();
        let Verified { is_sound, unreadable_blocks, unreadable_sectors, .. } = &found[0].verified[0];
        assert_eq!((*is_sound, *unreadable_blocks as usize, unreadable_sectors), (true, bad.len(), &named));
        let rows = show(&dir.path().join("data"), &owner().agent, None, None, None).unwrap();
        assert_eq!(rows[n].unreadable_blocks as usize, bad.len());
    }
}

#[test]
fn every_checkpoint_comes_back_and_a_b_a_comes_back_as_a() {
    let dir = lay(&tree());
    for n in 0..4 {
        run(dir.path(), &id(n).to_string()).unwrap();
    }
    assert_eq!(run(dir.path(), "latest").unwrap().checkpoint.id, id(3));
    let block = 2 << 16..3 << 16;
    assert_eq!(version(0)[block.clone()], version(2)[block.clone()]);
    assert_ne!(version(0)[block.clone()], version(1)[block]);
    let rows = show(&dir.path().join("data"), &owner().agent, Some("/dev/sda"), None, None).unwrap();
    let sizes: Vec<_> = rows.iter().map(|row| row.size_bytes as usize).collect();
    assert_eq!(sizes, [0, 1, 2, 3].map(|n| version(n).len()), "each has the size that the disk had");
    assert_eq!(rows[1].parent.as_ref(), Some(&rows[0].checkpoint));
    assert!(rows[0].time.ends_with('Z') && rows.iter().all(|r| r.delta_bytes > 0));
}

/// All damage that stands in the way of the newest checkpoint, found in memory.
fn verified(files: &SimFiles) -> Vec<Damage> {
    let dir = Dir::new(files.arc());
    let chain = chain::load(&dir, &owner()).unwrap();
    let mut damage: Vec<_> = chain.broken.iter().map(|(damage, _)| damage.clone()).collect();
    damage.extend(verify::verify(&dir, &owner(), &chain, chain.members.len(), &mut |_| Ok(())).unwrap());
    damage.extend(verify::verify_open_journal(&dir, &owner(), &chain).unwrap());
    damage
}

#[test]
fn every_flipped_byte_is_found_and_its_file_named() {
    let tree = tree();
    let files = SimFiles::default();
    let mut handles = Vec::new();
    for (path, bytes) in &tree {
        let handle = Dir::new(files.arc()).create(path).unwrap();
        handle.write(bytes, 0).unwrap();
        handles.push(handle);
    }
    assert_eq!(verified(&files), []);
    for ((path, bytes), handle) in tree.iter().zip(&handles) {
        let name = path.display().to_string();
        // All of one file of each kind, samples of the others; the image at odd places.
        let whole = [owner().sum(id(0)), owner().bak(id(1)), owner().cst(id(1)), owner().next_cst()];
        let step = if whole.contains(path) { 1 } else { (bytes.len() / 200).max(1) | 1 };
        for at in (0..bytes.len()).step_by(step) {
            handle.write(&[bytes[at] ^ 1 << (at % 8)], at as u64).unwrap();
            let found = verified(&files);
            assert!(found.iter().any(|d| d.file == name), "byte {at} of {name}: {found:?}");
            handle.write(&bytes[at..=at], at as u64).unwrap();
        }
    }
    assert_eq!(verified(&files), []);
}

#[test]
fn nothing_is_restored_from_a_file_with_a_flipped_byte() {
    let tree = tree();
    let dir = lay(&tree);
    for (path, bytes) in tree.iter().filter(|(path, _)| **path != owner().next_cst()) {
        let real = dir.path().join("data").join(path);
        for at in (0..bytes.len()).step_by(bytes.len() / 7) {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&real, &bad).unwrap();
            let found = damage(run(dir.path(), "latest"));
            let name = path.display().to_string();
            assert!(found.iter().any(|d| d.file == name), "byte {at} of {name}: {found:?}");
        }
        fs::write(&real, bytes).unwrap();
    }
    run(dir.path(), "latest").unwrap();
}

#[test]
fn missing_and_cut_files_are_found_and_named() {
    let tree = tree();
    let dir = lay(&tree);
    for (path, bytes) in &tree {
        let real = dir.path().join("data").join(path);
        let name = path.display().to_string();
        if name.ends_with("next.cst") {
            continue;
        }
        for keep in [None, Some(0), Some(bytes.len() / 2), Some(bytes.len() - 1)] {
            match keep {
                None => fs::remove_file(&real).unwrap(),
                Some(len) => fs::write(&real, &bytes[..len]).unwrap(),
            }
            let found = damage(run(dir.path(), "latest"));
            assert!(found.iter().any(|d| d.file == name), "{name} cut to {keep:?}: {found:?}");
            let rows = show(&dir.path().join("data"), &owner().agent, None, None, None).unwrap();
            assert_eq!(rows.len(), 4, "{name} cut to {keep:?} hides checkpoints");
        }
        fs::write(&real, bytes).unwrap();
    }
}

#[test]
fn swapped_files_are_found() {
    let tree = tree();
    let owner = owner();
    let pairs = [
        (owner.bak(id(1)), owner.bak(id(2))),
        (owner.bak(id(2)), owner.bak(id(3))),
        (owner.cst(id(1)), owner.cst(id(2))),
    ];
    for (a, b) in pairs {
        let mut swapped = tree.clone();
        swapped.insert(a.clone(), tree[&b].clone());
        swapped.insert(b.clone(), tree[&a].clone());
        let dir = lay(&swapped);
        assert!(!damage(run(dir.path(), "latest")).is_empty(), "{a:?}");
    }
    // Another life of the same disk with the same ids and data; only its first journal says something else, so that
    // nothing but the seals tells the two apart.
    let files = SimFiles::default();
    let mut store = DiskStore::open(files.arc(), owner.agent.clone(), owner.disk.clone()).unwrap();
    store.begin_copy(geometry(), "sda", crate::ids::Epoch([7; 16])).unwrap();
    store.put_gap(crate::tracker::Gap::Audit).unwrap();
    live(&mut store, &mut Acks::default()).unwrap();
    let other = files.dump();
    let base = [owner.img(id(0)), owner.sum(id(0)), owner.cst(id(0))];
    assert_eq!(other[&base[0]], tree[&base[0]]);
    for n in 0..4 {
        let delta = [owner.bak(id(n)), owner.cst(id(n))];
        let mut mixed = tree.clone();
        for path in if n == 0 { &base[..] } else { &delta[..] } {
            mixed.insert(path.clone(), other[path].clone());
        }
        assert_ne!(mixed, tree);
        let dir = lay(&mixed);
        assert!(!damage(run(dir.path(), "latest")).is_empty(), "checkpoint {n} of another life");
    }
}

#[test]
fn damage_in_a_newer_delta_does_not_keep_an_older_checkpoint_from_coming_back() {
    let mut tree = tree();
    tree.get_mut(&owner().bak(id(3))).unwrap()[1500] ^= 1;
    tree.get_mut(&owner().bak(id(2))).unwrap()[1500] ^= 1;
    let dir = lay(&tree);
    assert_eq!(damage(run(dir.path(), "latest")).len(), 2, "all damage is listed");
    run(dir.path(), &id(1).to_string()).unwrap();
}

#[test]
fn what_is_in_the_way_is_never_overwritten() {
    let dir = lay(&tree());
    fs::write(dir.path().join("out.img"), b"precious").unwrap();
    let error = restore(options(dir.path(), "latest"), GO_ON).unwrap_err();
    assert_eq!(error.kind(), ProblemKind::InvalidArgument);
    assert_eq!(fs::read(dir.path().join("out.img")).unwrap(), b"precious");
    fs::remove_file(dir.path().join("out.img")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("out.img")).unwrap();
    let error = restore(options(dir.path(), "latest"), GO_ON).unwrap_err();
    assert_eq!(error.kind(), ProblemKind::InvalidArgument, "{error}");
}

#[test]
fn what_is_not_there_is_said_with_what_is() {
    let dir = lay(&tree());
    let ask = |agent: &str, disk: Option<&str>, checkpoint: &str| {
        let disk = disk.map(str::to_owned);
        let o = RestoreOptions { agent: agent.parse().unwrap(), disk, ..options(dir.path(), checkpoint) };
        let error = restore(o, GO_ON).unwrap_err();
        (error.kind(), error.to_string())
    };
    let (class, text) = ask("agent10", None, "latest");
    assert!(class == ProblemKind::NoSuchAgent && text.contains("agent1"), "{text}");
    let (class, text) = ask("agent1", Some("sdb"), "latest");
    assert!(class == ProblemKind::NoSuchDisk && text.contains("disk0 (sda)"), "{text}");
    let (class, text) = ask("agent1", Some("sda"), "203011212034");
    assert!(class == ProblemKind::NoSuchCheckpoint && text.contains(&id(3).to_string()), "{text}");
    assert_eq!(ask("agent1", None, "yesterday").0, ProblemKind::InvalidArgument);
}

/// A loop device over a file, gone when dropped.
pub(crate) struct Loop(pub(crate) String);

impl Loop {
    pub(crate) fn over(file: &Path) -> Self {
        let out = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(out.status.success(), "this test needs root and loop devices: {out:?}");
        Self(String::from_utf8(out.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_device_gets_every_block_and_nothing_before_damage_was_looked_for() {
    let mut tree = tree();
    let dir = lay(&tree);
    let backing = dir.path().join("data/backing");
    let junk = vec![0xaa; version(3).len() + 4096];
    fs::write(&backing, &junk).unwrap();
    let device = Loop::over(&backing);
    let to_device = |dir: &Path| {
        let output = Some(Output::Path(PathBuf::from(&device.0)));
        restore(RestoreOptions { output, ..options(dir, "latest") }, GO_ON)
    };
    tree.get_mut(&owner().bak(id(3))).unwrap()[1500] ^= 1;
    let damaged = lay(&tree);
    damage(to_device(damaged.path()));
    assert!(fs::read(&device.0).unwrap() == junk, "written to before damage was looked for");
    to_device(dir.path()).unwrap();
    assert!(fs::read(&device.0).unwrap()[..version(3).len()] == version(3)[..]);
    let held = {
        use std::os::unix::fs::OpenOptionsExt;
        fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.0).unwrap()
    };
    let error = to_device(dir.path()).unwrap_err();
    assert!(error.kind() == ProblemKind::InvalidArgument && error.to_string().contains("in use"), "{error}");
    drop(held);
    drop(device);
    fs::write(&backing, vec![0; 1 << 20]).unwrap();
    let small = Loop::over(&backing);
    let output = Some(Output::Path(PathBuf::from(&small.0)));
    let error = restore(RestoreOptions { output, ..options(dir.path(), "latest") }, GO_ON).unwrap_err();
    assert!(error.kind() == ProblemKind::InvalidArgument && error.to_string().contains("needs"), "{error}");
}

/// There the image begins as a copy of the base, which is larger than one checkpoint and smaller than another.
#[test]
fn a_file_system_that_can_share_the_base_gives_images_of_the_right_size() {
    let files = tree();
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("xfs"), dir.path().join("mnt"));
    fs::File::create(&image).unwrap().set_len(320 << 20).unwrap();
    fs::create_dir(&at).unwrap();
    let ran = |command: &mut Command| assert!(command.status().is_ok_and(|s| s.success()), "{command:?}");
    ran(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image));
    ran(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at));
    let _mounted = Tmpfs(at.clone());
    for (path, bytes) in &files {
        let path = at.join("data").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    for n in 0..4 {
        run(&at, &id(n).to_string()).unwrap();
    }
}

/// A small file system, gone when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: PathBuf, size: &str) -> Self {
        fs::create_dir(&at).unwrap();
        let option = format!("size={size}");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(&at).status();
        assert!(status.is_ok_and(|s| s.success()), "this test needs root");
        Self(at)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_output_file_system_is_said_and_nothing_is_left() {
    let dir = lay(&tree());
    let tmpfs = Tmpfs::mount(dir.path().join("full"), "128k");
    let output = Some(Output::Path(tmpfs.0.join("out.img")));
    let error = restore(RestoreOptions { output, ..options(dir.path(), "latest") }, GO_ON).unwrap_err();
    assert!(error.kind() == ProblemKind::Failed && error.to_string().contains("free some space"), "{error}");
    assert_eq!(fs::read_dir(&tmpfs.0).unwrap().count(), 0);
}
