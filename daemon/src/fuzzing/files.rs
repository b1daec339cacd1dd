//! The files of the store: each decoder by itself, and then what opens, verifies and reads a disk one of whose files is
//! anything.
//!
//! The first byte of an input says whether its hashes are put right first, and where in the store it is laid.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use super::repair;
use crate::bitmap::Extent;
use crate::checkpoint::{Consistency, chain};
use crate::geometry::Geometry;
use crate::hash::hash_blocks;
use crate::ids::{CheckpointId, Epoch};
use crate::restore::verify;
use crate::run::Run;
use crate::store::disk_store::{DiskStore, Seal};
use crate::store::handle::{Dir, Handle};
use crate::store::layout::{HEADER_BYTES, Header, Kind, Paths};
use crate::store::simfiles::SimFiles;
use crate::store::{StoreError, bak, cst, sum};
use crate::tracker::Gap;

/// Set in the first byte: hashes are put right.
const PUT_RIGHT: u8 = 1;
/// Set in the first byte: the file is laid where a committed one is, not where the open one is.
const COMMITTED: u8 = 2;

fn owner() -> Paths {
    Paths::new("agent1".parse().unwrap(), "disk0".parse().unwrap())
}

fn geometry() -> Geometry {
    Geometry::new((5 << 16) + 512, 16).unwrap()
}

fn id(n: u64) -> CheckpointId {
    CheckpointId::next(1_795_293_296 + n as i64, None)
}

fn seal(n: u64) -> Seal {
    Seal {
        id: id(n),
        device: "sda".into(),
        geometry: geometry(),
        consistency: Consistency::Filesystem,
        time_unix_ms: 1_795_293_296_000,
        freeze_ms: 12,
        epoch: Epoch([7; 16]),
        note: "a note".into(),
    }
}

fn run_of(first: u64, count: u64, fill: u8) -> Run {
    let (_, len) = geometry().range(first, count);
    let data: Vec<u8> = (0..len).map(|i| (i / 1000) as u8 ^ fill).collect();
    Run::pack(first, hash_blocks(&data, geometry().block_bytes()), &data)
}

/// A disk with a base and two deltas, the second of which has not been renamed, and what is open behind them.
struct Store {
    /// The base and one delta.
    committed: SimFiles,
    /// And an open delta and journal.
    open: SimFiles,
    /// And these are sealed.
    sealed: SimFiles,
}

static STORE: LazyLock<Store> = LazyLock::new(|| {
    let files = SimFiles::default();
    let mut store = DiskStore::open(files.arc(), owner().agent, owner().disk).unwrap();
    store.begin_copy(geometry(), "sda", Epoch([7; 16])).unwrap();
    for group in 0..geometry().groups() {
        let (first, count) = geometry().group_extent(group);
        store.put_base(&run_of(first, count, 1)).unwrap();
    }
    store.put_delta(1, &Run::zeros(1, 2)).unwrap();
    store.commit(seal(0)).unwrap();
    store.put_changed(&[Extent { first: 2, count: 1 }]).unwrap();
    store.put_delta(2, &run_of(2, 2, 9)).unwrap();
    store.commit(seal(1)).unwrap();
    let committed = files.fork();
    store.put_changed(&[Extent { first: 1, count: 1 }]).unwrap();
    store.put_gap(Gap::SkippedRuns).unwrap();
    store.put_changed(&[Extent { first: 3, count: 2 }, Extent { first: 5, count: 1 }]).unwrap();
    for (seq, run) in
        [run_of(3, 1, 5), Run::zeros(3, 3), run_of(5, 1, 2), run_of(0, 4, 8), Run::unreadable(1, 2)]
            .iter()
            .enumerate()
    {
        store.put_delta(3 + seq as u64, run).unwrap();
    }
    store.sync().unwrap();
    let open = files.fork();
    store.commit(seal(2)).unwrap();
    Store { committed, open, sealed: files }
});

/// The bytes of a file of the store.
fn bytes_of(files: &SimFiles, path: &Path) -> Vec<u8> {
    files.dump().get(path).unwrap().clone()
}

/// A copy of `files` in which `bytes` are the file at `path`.
fn with(files: &SimFiles, path: &Path, bytes: &[u8]) -> (SimFiles, Handle) {
    let files = files.fork();
    let dir = Dir::new(files.arc());
    dir.remove(path).unwrap();
    let file = dir.create(path).unwrap();
    file.write(bytes, 0).unwrap();
    (files, file)
}

/// Whatever one file is: opening ends and does it again the same way, and what is found to be sound can be read.
fn use_store(files: &SimFiles) {
    let dir = Dir::new(files.arc());
    let chain = chain::load(&dir, &owner()).unwrap();
    let damage = verify::verify(&dir, &owner(), &chain, chain.members.len(), &mut |_| Ok(())).unwrap();
    if damage.is_empty() && !chain.members.is_empty() {
        let view = verify::view(&dir, &owner(), &chain, chain.members.len()).expect("what is sound opens");
        for group in 0..view.geometry().groups().min(8) {
            view.read_group(group).expect("what is sound can be read");
        }
    }
    if let Ok(mut store) = DiskStore::open(files.arc(), owner().agent, owner().disk) {
        let (chain, seq) = (store.chain().to_vec(), store.last_seq());
        let _ = store.digests(0, 4);
        let _ = store.hashes(0);
        drop(store);
        let again =
            DiskStore::open(files.arc(), owner().agent, owner().disk).expect("what opened opens again");
        assert_eq!((again.chain(), again.last_seq()), (chain.as_slice(), seq));
    }
}

fn header(kind: Kind, bytes: &[u8]) -> Option<Header> {
    let bytes = bytes.get(..HEADER_BYTES)?;
    let (header, seal) = Header::decode(kind, bytes).ok()?;
    assert_eq!(header.encode(), bytes, "a header has one encoding");
    assert_eq!(bytes.last_chunk(), Some(&seal));
    Some(header)
}

pub(super) fn check_bak(input: &[u8]) {
    let Some((how, bytes)) = input.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if how & PUT_RIGHT != 0 {
        repair::bak(&mut bytes);
    }
    header(Kind::Delta, &bytes);
    let path = if how & COMMITTED != 0 { owner().bak(id(2)) } else { owner().next_bak() };
    let (files, file) = with(&STORE.committed, &path, &bytes);
    let mut lens = Vec::new();
    let scan = bak::scan::<StoreError>(&file, &owner(), &mut |len| {
        lens.push(len);
        Ok(())
    });
    if let Ok(scan) = scan {
        scanned(&file, &scan, &lens, &bytes);
    }
    if let Ok((closing, _)) = bak::read_closing(&file)
        && let Ok(map) = bak::read_index(&file, &closing, 0)
    {
        for piece in map.pieces() {
            let _ = bak::read_hashes(&file, closing.geometry, piece.record, piece.skip, piece.extent.count);
            let run = bak::read_run(&file, closing.geometry, piece.record);
            let _ = run.map(|run| run.unpack(closing.geometry).is_ok());
        }
    }
    use_store(&files);
}

/// What a scan takes for valid is what [`bak::DeltaLog`] would have written.
fn scanned(file: &Handle, scan: &bak::Scan, lens: &[u64], bytes: &[u8]) {
    let geometry = scan.header.geometry;
    let empty = SimFiles::default();
    let dir = Dir::new(empty.arc());
    let mut log = bak::DeltaLog::create(&dir, &owner(), scan.header.clone()).unwrap();
    let mut at = HEADER_BYTES as u64;
    for len in lens {
        let seq = u64::from_le_bytes(bytes[at as usize + 8..at as usize + 16].try_into().unwrap());
        log.append(seq, &bak::read_run(file, geometry, at).expect("a record that was scanned")).unwrap();
        at += len;
    }
    assert_eq!(log.map(), &scan.map);
    if let Some((closing, _)) = &scan.sealed {
        let index = bak::read_index(file, closing, 0).expect("the index of a whole file");
        let places = |map: &crate::store::block_map::BlockMap| -> Vec<_> {
            map.pieces().map(|p| (p.extent, p.skip, p.record)).collect()
        };
        assert_eq!(places(&index), places(&scan.map));
        log.seal(&dir, closing.clone()).unwrap();
    }
    let written = bytes_of(&empty, &owner().next_bak());
    assert!(bytes.starts_with(&written), "a delta has one encoding");
    assert!(scan.sealed.is_none() || written.len() == bytes.len());
    for piece in scan.map.pieces() {
        let run = bak::read_run(file, geometry, piece.record).unwrap();
        assert!(piece.skip + piece.extent.count <= run.extent().count);
        if piece.extent.count <= geometry.group_blocks() {
            let hashes = bak::read_hashes(file, geometry, piece.record, piece.skip, piece.extent.count);
            let hashes = hashes.unwrap();
            assert!(hashes.iter().zip(piece.skip..).all(|(hash, i)| run.hash(i) == *hash));
        }
    }
}

pub(super) fn check_sum(input: &[u8]) {
    let Some((how, bytes)) = input.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if how & PUT_RIGHT != 0 {
        repair::sum(&mut bytes);
    }
    let path = if how & COMMITTED != 0 { owner().sum(id(0)) } else { owner().copy_sum() };
    let (files, file) = with(&STORE.committed, &path, &bytes);
    if let Some(Header { geometry, .. }) = header(Kind::Sum, &bytes) {
        for group in 0..geometry.groups().min(4) {
            let Ok(hashes) = sum::read(&file, geometry, group) else { continue };
            assert_eq!(hashes.len() as u64, geometry.group_extent(group).1);
            assert_eq!(sum::encode(geometry, &hashes), sum::read_record(&file, geometry, group).unwrap());
            let digest = sum::read_digest(&file, geometry, group).unwrap();
            assert_eq!(digest, crate::hash::group_digest(&hashes));
        }
        let _ = sum::content_hash(&file, geometry);
    }
    if how & COMMITTED == 0 {
        // A copy that goes on: no checkpoint is there yet, and the image is as long as it should be.
        let copying = SimFiles::default();
        let dir = Dir::new(copying.arc());
        dir.create(&owner().copy_sum()).unwrap().write(&bytes, 0).unwrap();
        dir.create(&owner().copy_img()).unwrap().set_len(geometry().size_bytes()).unwrap();
        use_store(&copying);
    }
    use_store(&files);
}

pub(super) fn check_cst(input: &[u8]) {
    let Some((how, bytes)) = input.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if how & PUT_RIGHT != 0 {
        repair::cst(&mut bytes);
    }
    header(Kind::Journal, &bytes);
    let path = if how & COMMITTED != 0 { owner().cst(id(1)) } else { owner().next_cst() };
    let (files, file) = with(&STORE.committed, &path, &bytes);
    let _ = cst::read(&file, &owner(), Some(id(1)));
    if let Ok(Some(journal)) = cst::read(&file, &owner(), None) {
        goes_on(file, journal);
    }
    let (files_of_use, _) = with(&files, &path, &bytes);
    use_store(&files_of_use);
}

/// A journal that was read is gone on with: what it said it still says, and what is added is there.
fn goes_on(file: Handle, journal: cst::Journal) {
    let (reported, gap, geometry) = (journal.reported.clone(), journal.gap, journal.header.geometry);
    let files = SimFiles::default();
    let (dir, path) = (Dir::new(files.arc()), PathBuf::from("journal"));
    let all = file.read_vec(file.len().unwrap() as usize, 0).unwrap();
    dir.create(&path).unwrap().write(&all, 0).unwrap();
    let mut open = cst::OpenJournal::resume(dir.open(&path, true).unwrap(), journal).unwrap();
    let read = || cst::read(&dir.open(&path, false).unwrap(), &owner(), None).unwrap().expect("a journal");
    let same = read();
    assert_eq!((&same.reported, same.gap, same.sealed), (&reported, gap, None));
    let block = Extent { first: geometry.blocks() - 1, count: 1 };
    open.changed(&[block]);
    open.sync(&dir, &owner()).unwrap();
    let mut more = reported;
    more.insert(block);
    assert_eq!(read().reported, more);
}

fn inputs(files: [(&SimFiles, PathBuf); 3]) -> Vec<Vec<u8>> {
    let bytes = files.iter().map(|(files, path)| bytes_of(files, path));
    bytes.flat_map(|bytes| (0..4).map(move |how| [vec![how], bytes.clone()].concat())).collect()
}

pub(super) fn bak_seeds() -> Vec<Vec<u8>> {
    let s = &*STORE;
    inputs([(&s.open, owner().next_bak()), (&s.sealed, owner().bak(id(1))), (&s.sealed, owner().bak(id(2)))])
}

pub(super) fn sum_seeds() -> Vec<Vec<u8>> {
    let base = owner().sum(id(0));
    let copying = SimFiles::default();
    let mut store = DiskStore::open(copying.arc(), owner().agent, owner().disk).unwrap();
    store.begin_copy(geometry(), "sda", Epoch([7; 16])).unwrap();
    let begun = copying.fork();
    store.put_base(&run_of(0, 6, 1)).unwrap();
    store.sync().unwrap();
    inputs([(&STORE.sealed, base), (&begun, owner().copy_sum()), (&copying, owner().copy_sum())])
}

pub(super) fn cst_seeds() -> Vec<Vec<u8>> {
    let s = &*STORE;
    inputs([(&s.open, owner().next_cst()), (&s.sealed, owner().cst(id(1))), (&s.sealed, owner().cst(id(2)))])
}
