//! Verifying several checkpoints at once: the verdict on each, and that no byte is read twice.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::damage_tests;
use super::tests::{GO_ON, Tree, tree};
use super::*;
use crate::ids::CheckpointId;
use crate::store::files::{Files, Space, StoreFile};
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::store::life_tests::{id, owner};
use crate::store::simfiles::SimFiles;

/// Called with the file and the number of bytes before each read, which fails if this does.
pub(crate) type OnRead = Arc<dyn Fn(&Path, usize) -> io::Result<()> + Send + Sync>;

/// Files that can only be read.
pub(crate) struct ReadFiles(pub(crate) Arc<dyn Files>, pub(crate) OnRead);

struct ReadFile(Box<dyn StoreFile>, PathBuf, OnRead);

/// Bytes read of each file.
#[derive(Clone, Default)]
pub(crate) struct Reads(Arc<Mutex<BTreeMap<PathBuf, u64>>>);

impl Reads {
    /// Counts.
    pub(crate) fn add(&self, path: &Path, bytes: usize) {
        *self.0.lock().unwrap().entry(path.to_owned()).or_default() += bytes as u64;
    }

    /// What was read since the last time.
    pub(crate) fn take(&self) -> BTreeMap<PathBuf, u64> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    /// Files that count what is read.
    pub(crate) fn of(&self, files: &SimFiles) -> Arc<ReadFiles> {
        let reads = self.clone();
        let count = move |path: &Path, bytes: usize| {
            reads.add(path, bytes);
            Ok(())
        };
        Arc::new(ReadFiles(files.arc(), Arc::new(count)))
    }
}

impl Files for ReadFiles {
    fn open(&self, path: &Path, write: bool) -> io::Result<Box<dyn StoreFile>> {
        assert!(!write, "a verify only reads");
        Ok(Box::new(ReadFile(self.0.open(path, false)?, path.to_owned(), self.1.clone())))
    }
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        panic!("a verify creates {}", path.display())
    }
    fn rename(&self, from: &Path, _: &Path) -> io::Result<()> {
        panic!("a verify renames {}", from.display())
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        panic!("a verify removes {}", path.display())
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        panic!("a verify syncs {}", dir.display())
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.0.list(dir)
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.0.exists(path)
    }
    fn space(&self) -> io::Result<Space> {
        self.0.space()
    }
}

impl StoreFile for ReadFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (self.2)(&self.1, buf.len())?;
        self.0.read_exact_at(buf, offset)
    }
    fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        panic!("a verify writes {}", self.1.display())
    }
    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        panic!("a verify punches {}", self.1.display())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.0.next_data(offset)
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        panic!("a verify cuts {}", self.1.display())
    }
    fn sync(&self) -> io::Result<()> {
        panic!("a verify syncs {}", self.1.display())
    }
}

/// Files in memory.
pub(crate) fn laid(tree: &Tree) -> SimFiles {
    let files = SimFiles::default();
    for (path, bytes) in tree {
        Dir::new(files.arc()).create(path).unwrap().write(bytes, 0).unwrap();
    }
    files
}

fn request(agent: Option<&str>, wanted: Wanted) -> VerifyRequest {
    VerifyRequest { agent: agent.map(|agent| agent.parse().unwrap()), disk: None, wanted }
}

fn all() -> VerifyRequest {
    request(None, Wanted::Between(None, None))
}

fn run(files: &SimFiles, request: &VerifyRequest) -> Result<Vec<DiskReport>, RestoreError> {
    Verification::plan_in(Dir::new(files.arc()), request)?.run(GO_ON)
}

fn verdicts(files: &SimFiles, request: &VerifyRequest) -> Vec<(CheckpointId, bool)> {
    let reports = run(files, request).unwrap();
    reports.iter().flat_map(|report| &report.verified).map(|v| (v.id, v.is_sound)).collect()
}

#[test]
fn some_all_and_those_of_a_time_are_verified() {
    let files = laid(&tree());
    let agent = owner().agent.to_string();
    let each = |ids: &[usize]| ids.iter().map(|n| (id(*n), true)).collect::<Vec<_>>();
    assert_eq!(verdicts(&files, &all()), each(&[0, 1, 2, 3]));
    assert_eq!(verdicts(&files, &request(Some(&agent), Wanted::Between(None, None))), each(&[0, 1, 2, 3]));
    let named = |names: &[&str]| {
        request(Some(&agent), Wanted::Named(names.iter().map(|name| (*name).to_owned()).collect()))
    };
    let (one, three) = (id(1).to_string(), id(3).to_string());
    assert_eq!(verdicts(&files, &named(&["latest", &one, &three])), each(&[1, 3]), "each once, in order");
    let minute = id(2).minute();
    let of_minute: Vec<_> = (0..4).filter(|n| id(*n).minute() == minute).collect();
    let between = |start, end| request(Some(&agent), Wanted::Between(start, end));
    assert_eq!(verdicts(&files, &between(Some(minute), Some(minute))), each(&of_minute));
    let kind = |request: &VerifyRequest| run(&files, request).unwrap_err().kind();
    assert_eq!(kind(&between(Some(minute + 1_000_000), None)), ProblemKind::NoSuchCheckpoint);
    assert_eq!(kind(&named(&["latest", "203011212034"])), ProblemKind::NoSuchCheckpoint);
    assert_eq!(kind(&named(&["latest", "newest"])), ProblemKind::InvalidArgument);
    assert_eq!(kind(&request(None, Wanted::Named(vec!["latest".into()]))), ProblemKind::InvalidArgument);
    assert_eq!(kind(&request(Some("nobody"), Wanted::Between(None, None))), ProblemKind::NoSuchAgent);
    assert_eq!(kind(&VerifyRequest { disk: Some("sda".into()), ..all() }), ProblemKind::InvalidArgument);
}

#[test]
fn each_checkpoint_is_judged_by_what_it_rests_on() {
    let mut tree = tree();
    let damaged = owner().bak(id(2));
    tree.get_mut(&damaged).unwrap()[1500] ^= 1;
    let files = laid(&tree);
    let expected = [(id(0), true), (id(1), true), (id(2), false), (id(3), false)];
    assert_eq!(verdicts(&files, &all()), expected);
    let reports = run(&files, &all()).unwrap();
    let named: Vec<_> = reports[0].damage().map(|damage| damage.file.clone()).collect();
    assert_eq!(named, [damaged.display().to_string()], "once, and not with each checkpoint");
    let looked: Vec<_> = reports[0].looked.iter().map(|(id, damage)| (*id, damage.len())).collect();
    assert_eq!(looked, [(id(0), 0), (id(1), 0), (id(2), 1), (id(3), 0)]);
    // Without its header the chain breaks there.
    tree.get_mut(&damaged).unwrap().clear();
    assert_eq!(verdicts(&laid(&tree), &all()), expected);
    tree.remove(&owner().img(id(0)));
    assert_eq!(verdicts(&laid(&tree), &all()), (0..4).map(|n| (id(n), false)).collect::<Vec<_>>());
}

#[test]
fn another_agents_damage_is_its_own() {
    let mut tree = tree();
    let other = Paths::new("other".parse().unwrap(), owner().disk);
    tree.insert(other.sum(id(0)), tree[&owner().sum(id(0))].clone());
    let reports = run(&laid(&tree), &all()).unwrap();
    let sound: Vec<_> = reports.iter().map(|r| (r.owner.agent.as_str(), r.damage().count() == 0)).collect();
    let mut expected = [(owner().agent.to_string(), true), ("other".to_owned(), false)];
    expected.sort();
    assert_eq!(sound, expected.iter().map(|(agent, sound)| (agent.as_str(), *sound)).collect::<Vec<_>>());
}

/// A disk that dies does so file by file, and sector by sector.
#[test]
fn what_the_medium_does_not_give_back_is_damage_and_all_else_gets_its_verdict() {
    let tree = damage_tests::tree();
    let files = laid(&tree);
    for bad in tree.keys() {
        // At once, or behind a few reads.
        for good in [0, 3] {
            let (path, left) = (bad.clone(), AtomicUsize::new(good));
            let fails = move |at: &Path, _: usize| match at == path && left.load(Ordering::Relaxed) == 0 {
                true => Err(io::Error::from_raw_os_error(libc::EIO)),
                false => {
                    let _ = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                        left.checked_sub(usize::from(at == path))
                    });
                    Ok(())
                }
            };
            let dir = Dir::new(Arc::new(ReadFiles(files.arc(), Arc::new(fails))));
            let reports = Verification::plan_in(dir, &all()).unwrap().run(GO_ON).unwrap();
            let name = bad.display().to_string();
            assert_eq!(reports.len(), 3, "{name}");
            for report in reports {
                let own = bad.iter().any(|part| part == report.owner.agent.as_str())
                    && bad.iter().any(|part| part == report.owner.disk.as_str());
                let damage: Vec<_> = report.damage().collect();
                assert!(damage.iter().all(|damage| damage.file == name), "{name}: {damage:?}");
                // A file that is read in few pieces may be through.
                assert!(damage.is_empty() != own || good > 0 && damage.is_empty(), "{name}: {damage:?}");
            }
        }
    }
}

#[test]
fn all_checkpoints_are_verified_with_one_read_of_every_byte() {
    let tree = tree();
    let files = laid(&tree);
    let read = |wanted: Wanted| {
        let reads = Reads::default();
        let dir = Dir::new(reads.of(&files));
        let request = VerifyRequest { agent: Some(owner().agent), ..request(None, wanted) };
        Verification::plan_in(dir, &request).unwrap().run(GO_ON).unwrap();
        reads.take()
    };
    let newest = read(Wanted::Named(vec!["latest".into()]));
    assert_eq!(read(Wanted::Between(None, None)), newest, "as much as of the newest alone");
    for (path, bytes) in &tree {
        let read = newest.get(path).copied().unwrap_or(0);
        // Headers are read to find the chain, and the end of a delta to judge it.
        assert!(read < bytes.len() as u64 * 2 + 8192, "{}: {read} of {}", path.display(), bytes.len());
    }
}
