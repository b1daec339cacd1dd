//! What the store must not take, and that nothing changes when it does not.

use super::StoreError;
use super::disk_store::{DiskStore, Seal};
use super::life_tests::{Acks, geometry, geometry_of, id, live, owner};
use super::simfiles::{Fault, SimFiles};
use crate::bitmap::Extent;
use crate::checkpoint::Consistency;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, GroupDigest, hash_blocks};
use crate::ids::Epoch;
use crate::run::{Run, RunError};
use crate::tracker::Gap;

fn open(files: &SimFiles) -> DiskStore {
    DiskStore::open(files.arc(), owner().agent, owner().disk).unwrap()
}

fn lived() -> (SimFiles, DiskStore) {
    let files = SimFiles::default();
    let mut store = open(&files);
    live(&mut store, &mut Acks::default()).unwrap();
    (files, store)
}

fn seal(n: usize) -> Seal {
    Seal {
        id: id(n),
        device: "sda".into(),
        geometry: geometry_of(n),
        consistency: Consistency::Crash,
        time_unix_ms: 0,
        freeze_ms: 0,
        epoch: Epoch([7; 16]),
        note: String::new(),
    }
}

fn block(first: u64, fill: u8) -> Run {
    let data = vec![fill; 1 << 16];
    Run::pack(first, hash_blocks(&data, 1 << 16), &data)
}

fn refused<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    match result {
        Err(StoreError::Refused(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_block_that_was_reported_changed_and_did_not_arrive_stops_the_commit() {
    let (files, mut store) = lived();
    store.put_changed(&[Extent { first: 3, count: 2 }]).unwrap();
    store.put_delta(1, &block(3, 8)).unwrap();
    store.sync().unwrap();
    let before = files.dump();
    assert_eq!(store.exposed_blocks(), 1);
    assert!(refused(store.commit(seal(4))).contains("1 blocks"));
    assert_eq!(files.dump(), before);
    // The report outlives the process.
    let mut store = open(&files);
    refused(store.commit(seal(4)));
    store.put_delta(2, &block(4, 8)).unwrap();
    assert_eq!(store.commit(seal(4)).unwrap().id, id(4));
    // After a gap a compare of the whole disk follows: reports from before count no more.
    store.put_changed(&[Extent { first: 3, count: 2 }]).unwrap();
    store.put_gap(Gap::Audit).unwrap();
    assert_eq!(store.commit(seal(5)).unwrap().parent, Some(id(4)));
}

#[test]
fn commits_that_do_not_fit_are_refused_and_change_nothing() {
    let (files, mut store) = lived();
    let before = files.dump();
    assert!(refused(store.commit(seal(3))).contains("not later"));
    let larger = Geometry::new(2 << 20, 16).unwrap();
    assert!(refused(store.commit(Seal { geometry: larger, ..seal(4) })).contains("agreed on"));
    refused(store.commit(Seal { device: "a\u{1b}[2J".into(), ..seal(4) }));
    refused(store.begin_copy(geometry(), "sda", Epoch([1; 16])));
    refused(store.put_base(&block(0, 1)));
    refused(store.put_delta(1, &Run::zeros(35, 2)));
    refused(store.put_changed(&[Extent { first: u64::MAX, count: 2 }]));
    assert_eq!(files.dump(), before);
    assert_eq!(store.commit(seal(4)).unwrap().id, id(4));
}

#[test]
fn data_without_its_hash_is_refused_and_not_stored() {
    let (files, mut store) = lived();
    let before = files.dump();
    let wrong = Run::pack(1, vec![BlockHash([3; 16])], &vec![7; 1 << 16]);
    assert!(matches!(store.put_delta(1, &wrong), Err(StoreError::Run(RunError::Hash { block: 1 }))));
    assert_eq!(files.dump(), before);

    let files = SimFiles::default();
    let mut store = open(&files);
    store.begin_copy(geometry(), "sda", Epoch([7; 16])).unwrap();
    let before = files.dump();
    assert!(matches!(store.put_base(&wrong), Err(StoreError::Run(_))));
    assert_eq!(files.dump(), before);
}

#[test]
fn a_copy_that_is_not_complete_is_no_checkpoint_and_groups_are_copied_once() {
    let mut store = open(&SimFiles::default());
    refused(store.put_delta(1, &block(0, 1)));
    refused(store.put_changed(&[Extent { first: 0, count: 1 }]));
    refused(store.digests(0, 1));
    store.begin_copy(geometry(), "sda", Epoch([7; 16])).unwrap();
    assert!(refused(store.put_base(&Run::zeros(15, 2))).contains("border"));
    store.put_base(&Run::zeros(0, 15)).unwrap();
    assert_eq!(store.digests(0, 9).unwrap(), [GroupDigest::MISSING; 2], "a group counts when it is whole");
    store.put_base(&block(15, 3)).unwrap();
    assert!(store.digests(0, 1).unwrap() != [GroupDigest::MISSING]);
    store.put_base(&block(15, 3)).unwrap();
    assert!(refused(store.put_base(&block(15, 4))).contains("belongs into the delta"));
    assert!(refused(store.commit(seal(0))).contains("1 of 2 MiB"));
    store.put_base(&Run::zeros(16, 2)).unwrap();
    assert_eq!(store.commit(seal(0)).unwrap().parent, None);
}

#[test]
fn stale_data_of_an_earlier_try_does_not_show_through_zeros() {
    let files = SimFiles::default();
    let mut store = open(&files);
    store.begin_copy(geometry(), "sda", Epoch([7; 16])).unwrap();
    store.put_base(&block(5, 9)).unwrap();
    store.sync().unwrap();
    // The group had not arrived whole; the agent sends it anew, and the block is zeros by now.
    let mut store = open(&files);
    store.put_base(&Run::zeros(0, 16)).unwrap();
    store.put_base(&Run::zeros(16, 2)).unwrap();
    store.commit(seal(0)).unwrap();
    assert!(files.dump()[&owner().img(id(0))].iter().all(|b| *b == 0));
}

#[test]
fn after_an_error_of_the_file_system_everything_is_refused_until_it_is_opened_again() {
    let (files, mut store) = lived();
    files.set_fault(Some(Fault::Full(0)));
    assert!(matches!(store.put_delta(1, &block(1, 1)), Err(StoreError::NoSpace { .. })));
    files.set_fault(None);
    assert!(matches!(store.put_delta(1, &block(1, 1)), Err(StoreError::Poisoned)));
    assert!(matches!(store.commit(seal(4)), Err(StoreError::Poisoned)));
    drop(store);
    assert_eq!(open(&files).commit(seal(4)).unwrap().id, id(4));
}
