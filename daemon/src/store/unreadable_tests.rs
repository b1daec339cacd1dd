//! Blocks that the agent's disk could not read: in the copy, in deltas, healed and come again; counted right over every
//! crash, and zeros wherever they are restored.

use super::StoreError;
use super::disk_store::{DiskStore, Seal};
use super::handle::Dir;
use super::layout::Paths;
use super::simfiles::{Loss, SimFiles};
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::{Consistency, chain};
use crate::geometry::Geometry;
use crate::hash::{BlockHash, hash_blocks};
use crate::ids::{CheckpointId, Epoch};
use crate::restore::verify;
use crate::run::Run;

/// What each checkpoint's disk cannot read: in the copy only; from the copy on and new; as before; healed and new; none.
pub(crate) const BAD: [&[u64]; 5] = [&[1, 2], &[2, 17], &[2, 17], &[5, 17], &[]];

pub(crate) fn geometry() -> Geometry {
    Geometry::new((1 << 20) + (64 << 10) + 512, 16).unwrap()
}

fn owner() -> Paths {
    Paths::new("agent1".parse().unwrap(), "disk0".parse().unwrap())
}

pub(crate) fn set(blocks: &[u64]) -> BlockSet {
    blocks.iter().map(|first| Extent { first: *first, count: 1 }).collect()
}

fn extent(first: u64, count: u64) -> Extent {
    Extent { first, count }
}

/// What is on the disk at checkpoint `n`, zeros for what cannot be read.
pub(crate) fn version(n: usize) -> Vec<u8> {
    let mut disk = vec![0u8; geometry().size_bytes() as usize];
    for (block, bytes) in disk.chunks_mut(1 << 16).enumerate() {
        if block % 3 != 0 && !BAD[n].contains(&(block as u64)) {
            bytes.fill(block as u8 + 1);
        }
    }
    disk
}

/// The disk's block at checkpoint `n` as an agent sends it.
fn run_of(n: usize, block: u64) -> Run {
    if BAD[n].contains(&block) {
        return Run::unreadable(block, 1);
    }
    let (offset, len) = geometry().range(block, 1);
    let data = &version(n)[offset as usize..(offset + len) as usize];
    Run::pack(block, hash_blocks(data, 1 << 16), data)
}

fn open(files: &SimFiles) -> Result<DiskStore, StoreError> {
    DiskStore::open(files.arc(), owner().agent, owner().disk)
}

pub(crate) fn id(n: usize) -> CheckpointId {
    CheckpointId::next(1_795_293_296 + n as i64, None)
}

/// The files of a whole life.
pub(crate) fn files() -> SimFiles {
    let files = SimFiles::default();
    live(&mut open(&files).unwrap()).unwrap();
    files
}

/// Lives on to the last checkpoint from whatever is there.
fn live(store: &mut DiskStore) -> Result<(), StoreError> {
    while store.chain().len() < BAD.len() {
        let n = store.chain().len();
        if n == 0 {
            if store.copy().is_none() {
                store.begin_copy(geometry(), "sda", Epoch([7; 16]))?;
            }
            for block in 0..geometry().blocks() {
                store.put_base(&run_of(0, block))?;
            }
        } else {
            // Only what differs, as after a compare.
            for group in 0..geometry().groups() {
                let (first, count) = geometry().group_extent(group);
                let theirs = store.hashes(group)?;
                for (block, theirs) in (first..first + count).zip(theirs) {
                    if run_of(n, block).hash(0) != theirs {
                        store.put_delta(store.last_seq() + 1, &run_of(n, block))?;
                        store.sync()?;
                    }
                }
            }
        }
        store.sync()?;
        assert_eq!(store.unreadable()?, set(BAD[n]), "before commit {n}");
        let checkpoint = store.commit(Seal {
            id: id(n),
            device: "sda".into(),
            geometry: geometry(),
            consistency: Consistency::Filesystem,
            time_unix_ms: 1_795_293_296_000 + n as u64 * 1000,
            freeze_ms: 12,
            epoch: Epoch([7; 16]),
            note: String::new(),
        })?;
        assert_eq!(checkpoint.unreadable_blocks as usize, BAD[n].len(), "commit {n}");
        assert_eq!(store.unreadable()?, set(BAD[n]), "after commit {n}");
    }
    Ok(())
}

/// Every visible checkpoint is sound, says how many blocks it lacks, and has zeros for them.
fn check(files: &SimFiles) -> usize {
    let (dir, owner) = (Dir::new(files.arc()), owner());
    let found = chain::load(&dir, &owner).unwrap();
    assert!(found.broken.is_none(), "{:?}", found.broken);
    for (n, member) in found.members.iter().enumerate() {
        assert_eq!(verify::verify(&dir, &owner, &found, n + 1, &mut |_| Ok(())).unwrap(), []);
        assert_eq!(member.checkpoint.unreadable_blocks as usize, BAD[n].len(), "checkpoint {n}");
        let view = verify::view(&dir, &owner, &found, n + 1).unwrap();
        assert_eq!(view.unreadable().unwrap(), set(BAD[n]), "checkpoint {n}");
        let mut disk = vec![0; geometry().size_bytes() as usize];
        for group in 0..geometry().groups() {
            if let Some(found) = view.read_group(group).unwrap() {
                disk[(group << 20) as usize..][..found.data.len()].copy_from_slice(&found.data);
            }
        }
        assert!(disk == version(n), "checkpoint {n}");
    }
    found.members.len()
}

#[test]
fn they_are_counted_right_and_zeros_over_every_crash() {
    let whole = files();
    assert_eq!(check(&whole), BAD.len());
    let (ops, _) = whole.counts();
    for at in 0..=ops {
        let files = SimFiles::default();
        files.stop_at(at);
        if let Ok(mut store) = open(&files) {
            let _ = live(&mut store);
        }
        for loss in [Loss::Nothing, Loss::All, Loss::Seed(at), Loss::Seed(at + 1000)] {
            let files = files.fork();
            files.crash(loss);
            check(&files);
            let mut store = open(&files).unwrap();
            live(&mut store).unwrap_or_else(|e| panic!("cut at {at} of {ops}: {e}"));
            assert_eq!(check(&files), BAD.len(), "cut at {at} of {ops}");
        }
    }
}

#[test]
fn of_an_open_delta_the_newest_run_of_a_block_counts_whatever_came_last() {
    let files = SimFiles::default();
    let mut store = open(&files).unwrap();
    store.begin_copy(geometry(), "sda", Epoch([7; 16])).unwrap();
    store.put_base(&Run::unreadable(0, 16)).unwrap();
    assert_eq!(store.unreadable().unwrap().len(), 16);
    store.put_base(&Run::zeros(16, 2)).unwrap();
    store.put_delta(9, &run_of(4, 1)).unwrap();
    // Overtaken on the other connection.
    store.put_delta(8, &Run::unreadable(0, 3)).unwrap();
    store.put_delta(10, &Run::unreadable(16, 1)).unwrap();
    let mut want = set(&(0..17).collect::<Vec<_>>());
    want.remove(extent(1, 1));
    assert_eq!(store.unreadable().unwrap(), want);
    store.sync().unwrap();
    assert_eq!(open(&files).unwrap().unreadable().unwrap(), want);
    store.drop_delta().unwrap();
    assert_eq!(store.unreadable().unwrap(), set(&(0..16).collect::<Vec<_>>()));
}

#[test]
fn a_run_of_data_can_hold_some_and_data_in_their_place_is_refused() {
    let files = SimFiles::default();
    let mut store = open(&files).unwrap();
    store.begin_copy(geometry(), "sda", Epoch([7; 16])).unwrap();
    let mut data = version(4)[..3 << 16].to_vec();
    let mut hashes = hash_blocks(&data, 1 << 16);
    hashes[1] = BlockHash::UNREADABLE;
    let lying = Run::pack(0, hashes.clone(), &data);
    assert!(matches!(store.put_delta(1, &lying), Err(StoreError::Run(_))));
    data[1 << 16..2 << 16].fill(0);
    store.put_delta(1, &Run::pack(0, hashes, &data)).unwrap();
    assert_eq!(store.unreadable().unwrap(), set(&[1]));
}

#[test]
fn bytes_in_the_image_where_there_should_be_zeros_are_damage() {
    let files = files();
    let (dir, owner) = (Dir::new(files.arc()), owner());
    let found = chain::load(&dir, &owner).unwrap();
    let img = dir.open(&owner.img(found.members[0].checkpoint.id), true).unwrap();
    img.write(&[1], (1 << 16) + 9).unwrap();
    let damage = verify::verify(&dir, &owner, &found, 1, &mut |_| Ok(())).unwrap();
    assert_eq!(damage.len(), 1, "{damage:?}");
    assert_eq!(damage[0].blocks, [extent(1, 1)]);
    assert!(verify::view(&dir, &owner, &found, 1).unwrap().read_group(0).is_err());
}
