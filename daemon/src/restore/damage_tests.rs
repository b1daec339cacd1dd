//! Every class of bytes of a store damaged in turn: a verify of the newest checkpoint finds it, no restore takes a
//! damaged byte for good, and every checkpoint that does not rest on the damaged place comes back exactly.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::chosen::Chosen;
use super::several::{Verification, VerifyRequest, Wanted};
use super::tests::{GO_ON, Tree};
use crate::bitmap::Extent;
use crate::checkpoint::Consistency;
use crate::geometry::Geometry;
use crate::hash::hash_blocks;
use crate::ids::{CheckpointId, Epoch};
use crate::run::Run;
use crate::store::StoreError;
use crate::store::disk_store::{DiskStore, Seal};
use crate::store::handle::Dir;
use crate::store::layout::{HEADER_BYTES, Paths};
use crate::store::simfiles::SimFiles;

const COMMITS: usize = 4;
const SHIFT: u8 = 14;
const PAGE: usize = 4096;

fn geometry() -> Geometry {
    Geometry::new((7 << SHIFT) + 512, SHIFT).unwrap()
}

fn id(n: usize) -> CheckpointId {
    CheckpointId::next(1_795_293_296 + n as i64, None)
}

fn paths(agent: &str, disk: &str) -> Paths {
    Paths::new(agent.parse().unwrap(), disk.parse().unwrap())
}

fn owner() -> Paths {
    paths("agent1", "disk0")
}

/// The disk at checkpoint `n`: blocks that compress and one that does not, zeros that come and go, a hole, a short last
/// block. Block 6 is zeros always, and unreadable at last.
fn version(n: usize) -> Vec<u8> {
    let mut disk = vec![0u8; geometry().size_bytes() as usize];
    let mut fill = |block: usize, seed: u8, noise: bool| {
        let end = ((block + 1) << SHIFT).min(disk.len());
        let bytes = &mut disk[block << SHIFT..end];
        if noise {
            blake3::Hasher::new().update(&[seed]).finalize_xof().fill(bytes);
        } else {
            bytes.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 64) as u8 ^ seed);
        }
    };
    fill(0, 1, false);
    fill(1, [5, 9, 5, 5][n], true);
    fill(7, n as u8 + 7, false);
    if n != 2 {
        fill(3, 30 + n as u8, false);
    }
    if n >= 2 {
        fill(5, 50, false);
    }
    disk
}

/// A whole life of one disk, told apart from others by `epoch` only.
fn life(tree: &mut Tree, owner: &Paths, epoch: u8) {
    let files = SimFiles::default();
    let mut store = DiskStore::open(files.arc(), owner.agent.clone(), owner.disk.clone()).unwrap();
    store.begin_copy(geometry(), "sda", Epoch([epoch; 16])).unwrap();
    let run = |disk: &[u8], first: u64, count: u64| {
        let (at, len) = geometry().range(first, count);
        let data = &disk[at as usize..(at + len) as usize];
        if data.iter().all(|b| *b == 0) {
            return Run::zeros(first, count as u32);
        }
        Run::pack(first, hash_blocks(data, 1 << SHIFT), data)
    };
    for n in 0..COMMITS {
        let (now, before) = (version(n), version(n.saturating_sub(1)));
        for block in 0..geometry().blocks() {
            if n == 0 {
                store.put_base(&run(&now, block, 1)).unwrap();
            } else if run(&now, block, 1) != run(&before, block, 1) {
                store.put_changed(&[Extent { first: block, count: 1 }]).unwrap();
                store.put_delta(block + 1, &run(&now, block, 1)).unwrap();
            }
        }
        if n + 1 == COMMITS {
            // It stays what it was: zeros.
            store.put_delta(20, &Run::unreadable(6, 1)).unwrap();
        }
        store
            .commit(Seal {
                id: id(n),
                device: "sda".into(),
                geometry: geometry(),
                consistency: Consistency::Filesystem,
                time_unix_ms: 1_795_293_296_000,
                freeze_ms: 12,
                epoch: Epoch([epoch; 16]),
                note: String::new(),
            })
            .unwrap();
    }
    store.put_changed(&[Extent { first: 5, count: 2 }]).unwrap();
    store.sync().unwrap();
    drop(store);
    tree.extend(files.dump());
}

/// The disk that is damaged, another disk of the same agent, and one of another agent.
pub(crate) fn tree() -> Tree {
    let mut tree = Tree::new();
    for (owner, epoch) in [(owner(), 7), (paths("agent1", "disk1"), 8), (paths("agent2", "disk0"), 9)] {
        life(&mut tree, &owner, epoch);
    }
    tree
}

fn lay(tree: &Tree) -> SimFiles {
    let files = SimFiles::default();
    tree.iter().for_each(|(path, bytes)| put(&files, path, Some(bytes)));
    files
}

fn put(files: &SimFiles, path: &Path, bytes: Option<&[u8]>) {
    let dir = Dir::new(files.arc());
    dir.remove(path).unwrap();
    if let Some(bytes) = bytes {
        dir.create(path).unwrap().write(bytes, 0).unwrap();
    }
}

/// The names of the damaged files that a verify of the newest checkpoint names.
fn found(files: &SimFiles) -> Vec<String> {
    let wanted = Wanted::Named(vec!["latest".into()]);
    let request = VerifyRequest { agent: Some(owner().agent), disk: Some("disk0".into()), wanted };
    let found = Verification::plan_in(Dir::new(files.arc()), &request).unwrap().run(GO_ON).unwrap();
    let named = found[0].damage().map(|damage| damage.file.clone()).collect::<Vec<_>>();
    assert_eq!(found[0].verified[0].is_sound, named.is_empty());
    named
}

/// What a restore would write; `None` if it is refused before the first byte.
fn restored(files: &SimFiles, n: usize) -> Option<Vec<u8>> {
    let id = id(n).to_string();
    let chosen = Chosen::find_in(Dir::new(files.arc()), &owner().agent, Some("disk0"), &id).ok()?;
    chosen.checkpoint()?;
    chosen.verified(&mut |_| Ok(())).ok()?;
    Some(read(&chosen).expect("what was verified can be read"))
}

fn read(chosen: &Chosen) -> Result<Vec<u8>, StoreError> {
    let view = chosen.view()?;
    let mut disk = vec![0u8; geometry().size_bytes() as usize];
    for group in 0..geometry().groups() {
        let (first, count) = geometry().group_extent(group);
        let (at, len) = geometry().range(first, count);
        if let Some(group) = view.read_group(group)? {
            disk[at as usize..(at + len) as usize].copy_from_slice(&group.data);
        }
    }
    Ok(disk)
}

/// The first checkpoint that rests on a file; `COMMITS` if none does.
fn first_resting(path: &Path) -> usize {
    let owner = owner();
    let of = |n: &usize| [owner.bak(id(*n)), owner.cst(id(*n))].iter().any(|own| own == path);
    let base = path == owner.img(id(0)) || path == owner.sum(id(0));
    if base { 0 } else { (0..COMMITS).find(of).unwrap_or(COMMITS) }
}

#[derive(Default)]
struct Tried(BTreeMap<String, usize>);

impl Tried {
    /// One damage of these files is there: it is found, nothing wrong comes back, and what is sound does.
    fn damage(&mut self, files: &SimFiles, class: &str, damaged: &[&Path], every_checkpoint: bool) {
        let kind =
            damaged[0].extension().map_or_else(String::new, |kind| kind.to_string_lossy().into_owned());
        *self.0.entry(format!("{kind} {class}")).or_default() += 1;
        let first = damaged.iter().map(|path| first_resting(path)).min().unwrap();
        let names: Vec<_> = damaged.iter().map(|path| path.display().to_string()).collect();
        let found = found(files);
        // Which of two files that do not belong together is the wrong one, nobody can tell.
        let named = |file| names.contains(file) || class.starts_with("replaced");
        assert!(found.iter().any(named), "{class} of {names:?}: found {found:?}");
        for n in (0..COMMITS).filter(|n| every_checkpoint || *n + 1 == COMMITS) {
            match restored(files, n) {
                None => assert!(n >= first, "{class} of {names:?}: checkpoint {n} does not rest on it"),
                Some(disk) => {
                    assert!(n < first, "{class} of {names:?}: checkpoint {n} is reported good");
                    assert!(disk == version(n), "{class} of {names:?}: checkpoint {n} came back wrong");
                }
            }
        }
    }

    fn say(self, what: &str) {
        println!("{what}: {} damages tried, all found", self.0.values().sum::<usize>());
        self.0.iter().for_each(|(class, count)| println!("  {count:6} {class}"));
    }
}

/// The files of the disk that is damaged.
fn own_files(tree: &Tree) -> Vec<(&PathBuf, &Vec<u8>)> {
    let own = |path: &Path| {
        path.iter().nth(1) == Some("agent1".as_ref()) && path.iter().nth(2) == Some("disk0".as_ref())
    };
    tree.iter().filter(|(path, _)| own(path)).collect()
}

/// Offsets to damage: every byte of what has structure, and of long data a byte here and there.
fn offsets(path: &Path, len: usize) -> impl Iterator<Item = usize> {
    let edge = if path.extension() == Some("img".as_ref()) { 64 } else { HEADER_BYTES + 512 };
    (0..len).filter(move |at| *at < edge || *at + edge + 256 >= len || at % 41 == 0)
}

#[test]
fn an_undamaged_store_is_found_sound_and_comes_back() {
    let files = lay(&tree());
    assert_eq!(found(&files), Vec::<String>::new());
    (0..COMMITS).for_each(|n| assert!(restored(&files, n) == Some(version(n)), "{n}"));
}

#[test]
fn every_flipped_byte_of_every_class_is_found() {
    let tree = tree();
    let files = lay(&tree);
    let mut tried = Tried::default();
    for (path, bytes) in own_files(&tree) {
        let file = Dir::new(files.arc()).open(path, true).unwrap();
        for at in offsets(path, bytes.len()) {
            file.write(&[bytes[at] ^ 1 << (at % 8)], at as u64).unwrap();
            tried.damage(&files, "byte flipped", &[path], at % 16 == 0);
            file.write(&bytes[at..=at], at as u64).unwrap();
        }
        for page in (0..bytes.len()).step_by(PAGE) {
            let end = (page + PAGE).min(bytes.len());
            if bytes[page..end].iter().any(|b| *b != 0) {
                file.write(&vec![0; end - page], page as u64).unwrap();
                // Zeros to the end of an open journal are what a power cut leaves: nothing that was acknowledged is gone.
                if *path != owner().next_cst() {
                    tried.damage(&files, "page of zeros", &[path], true);
                }
                file.write(&bytes[page..end], page as u64).unwrap();
            }
        }
    }
    assert_eq!(found(&files), Vec::<String>::new());
    tried.say("flipped and zeroed");
}

#[test]
fn every_file_cut_extended_emptied_or_missing_is_found() {
    let tree = tree();
    let files = lay(&tree);
    let mut tried = Tried::default();
    // An open journal that ends early or is not there yet is no damage: what was not synced is not in it.
    for (path, bytes) in own_files(&tree).into_iter().filter(|(path, _)| **path != owner().next_cst()) {
        put(&files, path, None);
        tried.damage(&files, "missing", &[path], true);
        for len in offsets(path, bytes.len()).step_by(3) {
            put(&files, path, Some(&bytes[..len]));
            tried.damage(&files, if len == 0 { "emptied" } else { "cut" }, &[path], len % 32 == 0);
        }
        for more in [1, 16, 24, 512, HEADER_BYTES, PAGE] {
            put(&files, path, Some(&[bytes.as_slice(), &vec![0; more]].concat()));
            tried.damage(&files, "extended by zeros", &[path], true);
            let again = bytes[bytes.len().saturating_sub(more)..].to_vec();
            put(&files, path, Some(&[bytes.as_slice(), &again].concat()));
            tried.damage(&files, "extended by its end", &[path], true);
        }
        put(&files, path, Some(bytes));
    }
    assert_eq!(found(&files), Vec::<String>::new());
    tried.say("cut, extended, emptied, missing");
}

/// The file of the same kind in another place.
fn elsewhere(path: &Path, other: &Paths) -> PathBuf {
    let mut parts: Vec<_> = path.iter().collect();
    (parts[1], parts[2]) = (other.agent.as_str().as_ref(), other.disk.as_str().as_ref());
    parts.into_iter().collect()
}

#[test]
fn every_file_replaced_by_another_and_every_two_names_swapped_are_found() {
    let tree = tree();
    let files = lay(&tree);
    // The same disk in an older copy: same ids, same data, another life.
    let mut older = Tree::new();
    life(&mut older, &owner(), 6);
    let mut tried = Tried::default();
    let own = own_files(&tree);
    for (path, bytes) in &own {
        let foreign = [
            ("replaced by another disk's", &tree[&elsewhere(path, &paths("agent1", "disk1"))]),
            ("replaced by another agent's", &tree[&elsewhere(path, &paths("agent2", "disk0"))]),
            ("replaced by an older copy's", &older[*path]),
        ];
        for (class, other) in foreign.into_iter().filter(|(_, other)| other != bytes) {
            put(&files, path, Some(other));
            tried.damage(&files, class, &[path], true);
        }
        for (other_path, other) in own.iter().filter(|(other, _)| other > path) {
            if other_path.extension() == path.extension() {
                // In place of: a copy. Swapped: both names.
                put(&files, path, Some(other));
                tried.damage(&files, "replaced by another checkpoint's", &[path], true);
                put(&files, other_path, Some(bytes));
                tried.damage(&files, "names swapped", &[path, other_path], true);
                put(&files, other_path, Some(other));
            }
        }
        put(&files, path, Some(bytes));
    }
    assert_eq!(found(&files), Vec::<String>::new());
    tried.say("replaced and swapped");
}

#[test]
fn damage_that_comes_behind_the_verify_is_found_where_a_byte_is_read() {
    let tree = tree();
    let files = lay(&tree);
    let chosen = Chosen::find_in(Dir::new(files.arc()), &owner().agent, Some("disk0"), "latest").unwrap();
    chosen.verified(&mut |_| Ok(())).unwrap();
    let mut refused = 0;
    for (path, bytes) in own_files(&tree) {
        let file = Dir::new(files.arc()).open(path, true).unwrap();
        for at in (0..bytes.len()).step_by(53) {
            file.write(&[bytes[at] ^ 1 << (at % 8)], at as u64).unwrap();
            match read(&chosen) {
                Ok(disk) => assert!(disk == version(COMMITS - 1), "byte {at} of {}", path.display()),
                Err(_) => refused += 1,
            }
            file.write(&bytes[at..=at], at as u64).unwrap();
        }
    }
    assert!(refused > 500, "{refused} were read");
}
