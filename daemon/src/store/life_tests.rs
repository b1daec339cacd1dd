//! A disk's life (copy, first commit, three deltas, of which the second is of a smaller disk and the third of a larger one)
//! cut at every operation, with and without loss, run full at every operation, and run with every single sync left out.

use super::disk_store::{DiskStore, Seal};
use super::handle::Dir;
use super::layout::Paths;
use super::simfiles::{Fault, Loss, SimFiles};
use super::{StoreError, cst};
use crate::bitmap::Extent;
use crate::checkpoint::{Consistency, chain};
use crate::geometry::Geometry;
use crate::hash::{GroupDigest, group_digest, hash_blocks};
use crate::ids::{CheckpointId, Epoch};
use crate::restore::verify;
use crate::run::Run;
use crate::tracker::Gap;

const COMMITS: usize = 4;

pub(crate) fn geometry() -> Geometry {
    geometry_of(0)
}

/// The disk's size at commit `n`: cut within block 17, then within block 16, then within block 35.
pub(crate) fn geometry_of(n: usize) -> Geometry {
    let size_bytes = [(17 << 16) + 512, (17 << 16) + 512, (16 << 16) + 512, (35 << 16) + 1024];
    Geometry::new(size_bytes[n.min(3)], 16).unwrap()
}

pub(crate) fn owner() -> Paths {
    Paths::new("agent1".parse().unwrap(), "disk0".parse().unwrap())
}

pub(crate) fn id(n: usize) -> CheckpointId {
    CheckpointId::next(1_795_293_296 + n as i64, None)
}

/// The disk at commit `n`: block 2 is A, B, A; block 3 is zeros now and then; the short last block changes. What the smaller
/// disk cut off is zeros on the larger one.
pub(crate) fn version(n: usize) -> Vec<u8> {
    let mut disk = vec![0u8; geometry_of(n).size_bytes() as usize];
    let mut fill = |block: usize, seed: u8| {
        let start = block << 16;
        let end = (start + (1 << 16)).min(disk.len());
        if start >= end {
            return;
        }
        for (i, b) in disk[start..end].iter_mut().enumerate() {
            *b = (i as u8).wrapping_mul(seed) ^ seed;
        }
    };
    fill(0, 1);
    fill(2, [5, 9, 5, 5][n]);
    fill(16, [1, 4, 7, 7][n]);
    fill(17, n as u8 + 7);
    if n.is_multiple_of(2) {
        fill(3, 77);
        fill(5, 78);
    }
    if n == 3 {
        fill(34, 3);
        fill(35, 4);
        // As when the smaller disk grew: nobody sends this block again.
        disk[geometry_of(2).size_bytes() as usize..18 << 16].fill(0);
    }
    disk
}

/// What is copied: not the state of any checkpoint, the delta must mend it. Block 16 stays: the fold finds it untouched.
fn copied() -> Vec<u8> {
    let mut disk = version(0);
    disk[17 << 16..].fill(10);
    disk[3 << 16..6 << 16].fill(0);
    disk
}

fn run_of(geometry: Geometry, disk: &[u8], extent: Extent) -> Run {
    let (offset, len) = geometry.range(extent.first, extent.count);
    let data = &disk[offset as usize..(offset + len) as usize];
    if data.iter().all(|b| *b == 0) {
        return Run::zeros(extent.first, extent.count as u32);
    }
    Run::pack(extent.first, hash_blocks(data, 1 << 16), data)
}

/// What the dispatcher was told is durable.
#[derive(Clone, Default, Debug)]
pub(crate) struct Acks {
    commits: usize,
    groups: u64,
    seq: u64,
    dropped: bool,
    reported: Vec<Extent>,
}

/// Lives on from whatever the store holds to checkpoint `COMMITS`, as agent and dispatcher would.
pub(crate) fn live(store: &mut DiskStore, acks: &mut Acks) -> Result<(), StoreError> {
    while store.chain().len() < COMMITS {
        let n = store.chain().len();
        if n == 0 {
            copy(store, acks)?;
        }
        round(store, acks, n)?;
        store.commit(Seal {
            id: id(n),
            device: "sda".into(),
            geometry: geometry_of(n),
            consistency: Consistency::Filesystem,
            time_unix_ms: 1_795_293_296_000 + n as u64 * 1000,
            freeze_ms: 12,
            epoch: Epoch([7; 16]),
            note: String::new(),
        })?;
        *acks = Acks { commits: n + 1, ..Acks::default() };
    }
    Ok(())
}

fn copy(store: &mut DiskStore, acks: &mut Acks) -> Result<(), StoreError> {
    if store.copy().is_none() {
        store.begin_copy(geometry(), "sda", Epoch([7; 16]))?;
    }
    for group in 0..geometry().groups() {
        if store.digests(group, 1)? == [GroupDigest::MISSING] {
            let (first, count) = geometry().group_extent(group);
            let half = count.div_ceil(2);
            for extent in [Extent { first, count: half }, Extent { first: first + half, count: count - half }]
            {
                if extent.count > 0 {
                    store.put_base(&run_of(geometry(), &copied(), extent))?;
                }
            }
            store.sync()?;
            acks.groups = store.copy().unwrap().groups_present;
        }
    }
    Ok(())
}

fn round(store: &mut DiskStore, acks: &mut Acks, n: usize) -> Result<(), StoreError> {
    let (target, geometry) = (version(n), geometry_of(n));
    resize(store, acks, geometry)?;
    if n == 2 {
        let run = run_of(geometry, &version(1), Extent { first: 0, count: 4 });
        store.put_delta(store.last_seq() + 1, &run)?;
        store.sync()?;
        acks.seq = store.last_seq();
        store.put_changed(&[Extent { first: 2, count: 1 }])?;
        store.sync()?;
        acks.reported = vec![Extent { first: 2, count: 1 }];
        acks.seq = 0;
        store.drop_delta()?;
        acks.dropped = true;
    }
    if n == 1 {
        store.put_changed(&[Extent { first: 9, count: 1 }])?;
        store.put_gap(Gap::SkippedRuns)?;
    }
    store.put_changed(&[Extent { first: 4, count: 1 }])?;
    store.sync()?;
    acks.reported = vec![Extent { first: 4, count: 1 }];
    // Sent in any case, as a block that was reported is: first an older state, then the real one.
    for (state, seq) in [(version((n + 1) % 4), 1), (target.clone(), 2)] {
        acks.dropped = false;
        let seq = store.last_seq() + seq;
        store.put_delta(seq, &run_of(geometry, &state, Extent { first: 2, count: 3 }))?;
        store.sync()?;
        acks.seq = seq;
    }
    let mut seq = acks.seq;
    for group in 0..geometry.groups() {
        let (first, count) = geometry.group_extent(group);
        let (offset, len) = geometry.range(first, count);
        let mine = hash_blocks(&target[offset as usize..(offset + len) as usize], 1 << 16);
        if store.digests(group, 1)? == [group_digest(&mine)] {
            continue;
        }
        for ((theirs, mine), block) in store.hashes(group)?.iter().zip(&mine).zip(first..) {
            if theirs != mine {
                seq += 1;
                store.put_delta(seq, &run_of(geometry, &target, Extent { first: block, count: 1 }))?;
            }
        }
    }
    Ok(())
}

/// The disk's size has changed, while blocks were staged and reported.
fn resize(store: &mut DiskStore, acks: &mut Acks, geometry: Geometry) -> Result<(), StoreError> {
    let Some(before) = store.geometry().filter(|before| *before != geometry) else { return Ok(()) };
    let last = Extent { first: before.blocks() - 1, count: 1 };
    let run = run_of(before, &vec![9; before.size_bytes() as usize], last);
    store.put_delta(store.last_seq() + 1, &run)?;
    store.put_changed(&[last])?;
    store.sync()?;
    (acks.seq, acks.reported, acks.dropped) = (store.last_seq(), vec![last], false);
    store.put_delta(store.last_seq() + 1, &run)?;
    *acks = Acks { commits: acks.commits, ..Acks::default() };
    assert!(store.resize(geometry)? && !store.resize(geometry)?);
    store.put_gap(Gap::Resized)?;
    let pending = Extent { first: 3, count: 1 };
    store.put_changed(&[pending])?;
    store.sync()?;
    acks.reported = vec![pending];
    Ok(())
}

/// Reads every visible checkpoint as a restore would, without opening the store.
fn check_visible(files: &SimFiles, acks: &Acks) -> Result<usize, String> {
    let (dir, owner) = (Dir::new(files.arc()), owner());
    let found = chain::load(&dir, &owner).map_err(|e| e.to_string())?;
    if let Some((damage, _)) = &found.broken {
        return Err(format!("broken: {damage}"));
    }
    if found.members.len() < acks.commits {
        return Err(format!("{} commits were acknowledged, {} are there", acks.commits, found.members.len()));
    }
    for n in 0..found.members.len() {
        let damage =
            verify::verify(&dir, &owner, &found, n + 1, &mut |_| Ok(())).map_err(|e| e.to_string())?;
        if let Some(damage) = damage.first() {
            return Err(format!("checkpoint {n}: {damage}"));
        }
        if read(&dir, &found, n + 1)? != version(n) {
            return Err(format!("checkpoint {n} is not what was on the disk"));
        }
    }
    Ok(found.members.len())
}

fn read(dir: &Dir, found: &chain::Chain, count: usize) -> Result<Vec<u8>, String> {
    let view = verify::view(dir, &owner(), found, count).map_err(|e| e.to_string())?;
    let mut disk = vec![0; view.geometry().size_bytes() as usize];
    for group in 0..view.geometry().groups() {
        if let Some(data) = view.read_group(group).map_err(|e| e.to_string())? {
            disk[(group << 20) as usize..][..data.data.len()].copy_from_slice(&data.data);
        }
    }
    Ok(disk)
}

fn open(files: &SimFiles) -> Result<DiskStore, StoreError> {
    DiskStore::open(files.arc(), owner().agent, owner().disk)
}

/// Checks what was acknowledged of an open round.
fn check_open(store: &DiskStore, acks: &Acks) -> Result<(), String> {
    let chain = store.chain().len();
    if chain < acks.commits {
        return Err(format!("{} commits were acknowledged, open finds {chain}", acks.commits));
    }
    if chain > acks.commits {
        return Ok(());
    }
    if store.copy().map_or(0, |c| c.groups_present) < acks.groups && chain == 0 {
        return Err("an acknowledged group of the copy is gone".into());
    }
    if store.last_seq() < acks.seq || (acks.dropped && store.last_seq() > 0) {
        return Err(format!(
            "acknowledged up to {}, dropped {}, found {}",
            acks.seq,
            acks.dropped,
            store.last_seq()
        ));
    }
    let reported = store.journal.as_ref().map(|j| j.state().reported.clone()).unwrap_or_default();
    if acks.reported.iter().any(|e| !reported.contains(e.first)) {
        return Err("an acknowledged report of a changed block is gone".into());
    }
    Ok(())
}

/// After a crash: looks, opens, opens again, lives on, looks.
fn survive(files: &SimFiles, acks: &Acks, loss: Loss) -> Result<(), String> {
    let mut acks = acks.clone();
    files.crash(loss);
    let visible = check_visible(files, &acks)?;
    let store = open(files).map_err(|e| format!("open: {e}"))?;
    check_open(&store, &acks)?;
    if store.chain().len() < visible {
        return Err("open lost a checkpoint that was visible".into());
    }
    acks.commits = acks.commits.max(store.chain().len());
    // What open reports is acknowledged as well: a power cut right behind it must take nothing back.
    let seen = Acks {
        commits: store.chain().len(),
        groups: store.copy().map_or(0, |c| c.groups_present),
        seq: store.last_seq(),
        dropped: false,
        reported: store.journal.as_ref().map(|j| j.state().reported.extents(1).collect()).unwrap_or_default(),
    };
    drop(store);
    files.crash(Loss::All);
    check_visible(files, &seen).map_err(|e| format!("after the second cut: {e}"))?;
    let mut store = open(files).map_err(|e| format!("open again: {e}"))?;
    check_open(&store, &seen).map_err(|e| format!("after the second cut: {e}"))?;
    live(&mut store, &mut acks).map_err(|e| format!("going on: {e}"))?;
    drop(store);
    files.crash(Loss::All);
    match check_visible(files, &acks)? {
        COMMITS => Ok(()),
        n => Err(format!("life ended with {n} checkpoints")),
    }
}

/// Begins a life under a fault, in files that may hold an earlier part of it.
fn run(files: &SimFiles, fault: Option<Fault>, stop: Option<u64>, acks: &mut Acks) -> Result<(), StoreError> {
    files.set_fault(fault);
    stop.into_iter().for_each(|at| files.stop_at(at));
    let mut store = open(files)?;
    live(&mut store, acks)
}

fn whole_life() -> (u64, u64) {
    let files = SimFiles::default();
    let mut acks = Acks::default();
    run(&files, None, None, &mut acks).unwrap();
    assert_eq!(acks.commits, COMMITS);
    let counts = files.counts();
    assert_eq!(check_visible(&files, &acks), Ok(COMMITS));
    counts
}

fn losses() -> impl Iterator<Item = Loss> {
    [Loss::Nothing, Loss::All].into_iter().chain((1..=4).map(Loss::Seed))
}

#[test]
fn a_life_cut_at_any_operation_keeps_what_was_acknowledged_and_ends_the_same() {
    let (ops, _) = whole_life();
    assert!(ops > 60, "{ops}");
    for at in 0..=ops {
        let files = SimFiles::default();
        let mut acks = Acks::default();
        let _ = run(&files, None, Some(at), &mut acks);
        for loss in losses() {
            let result = survive(&files.fork(), &acks, loss);
            assert_eq!(result, Ok(()), "cut at operation {at} of {ops}, {loss:?}, {acks:?}");
        }
    }
}

#[test]
fn a_disk_full_at_any_operation_leaves_nothing_half_visible_and_life_goes_on() {
    let (ops, _) = whole_life();
    for at in 0..ops {
        let files = SimFiles::default();
        let mut acks = Acks::default();
        match run(&files, Some(Fault::Full(at)), None, &mut acks) {
            Err(StoreError::NoSpace { .. }) | Ok(()) => {}
            Err(e) => panic!("full at operation {at}: {e}"),
        }
        for loss in [Loss::Nothing, Loss::Seed(at)] {
            assert_eq!(survive(&files.fork(), &acks, loss), Ok(()), "full at operation {at}, {loss:?}");
        }
    }
}

/// The process that met an error goes on, and what it reads may not be what is on the disk; then the power goes.
fn go_on_after_an_error(files: &SimFiles, acks: &mut Acks) -> Result<(), String> {
    open(files).and_then(|mut store| live(&mut store, acks)).map_err(|e| e.to_string())?;
    files.crash(Loss::All);
    match check_visible(files, acks)? {
        COMMITS => Ok(()),
        n => Err(format!("life ended with {n} checkpoints")),
    }
}

#[test]
fn an_io_error_at_any_operation_takes_nothing_back_that_is_acknowledged_later() {
    let (ops, _) = whole_life();
    for at in 0..ops {
        let files = SimFiles::default();
        let mut acks = Acks::default();
        files.fail_soon(at);
        let failed = open(&files).and_then(|mut store| live(&mut store, &mut acks));
        assert!(matches!(failed, Err(StoreError::Io { .. })), "at operation {at}: {failed:?}");
        assert_eq!(go_on_after_an_error(&files, &mut acks), Ok(()), "an error at operation {at} of {ops}");
    }
}

#[test]
fn an_io_error_while_the_store_is_opened_takes_nothing_back_that_is_acknowledged_later() {
    let (ops, _) = whole_life();
    for at in 0..=ops {
        let killed = SimFiles::default();
        let mut acks = Acks::default();
        let _ = run(&killed, None, Some(at), &mut acks);
        killed.crash(Loss::Nothing);
        for fails in 0.. {
            let files = killed.fork();
            files.fail_soon(fails);
            if open(&files).is_ok() {
                break;
            }
            let result = go_on_after_an_error(&files, &mut acks.clone());
            assert_eq!(
                result,
                Ok(()),
                "killed at operation {at} of {ops}, then an error at operation {fails}"
            );
        }
    }
}

#[test]
fn an_io_error_behind_an_open_takes_nothing_back_that_was_acknowledged_before() {
    let (ops, _) = whole_life();
    for at in 0..=ops {
        let killed = SimFiles::default();
        let mut acks = Acks::default();
        let _ = run(&killed, None, Some(at), &mut acks);
        killed.crash(Loss::Nothing);
        for fails in 0..4 {
            let files = killed.fork();
            let mut store = open(&files).unwrap();
            files.fail_soon(fails);
            let _ = store.sync();
            drop(store);
            files.never_fail();
            let found = open(&files).map_err(|e| e.to_string()).and_then(|store| check_open(&store, &acks));
            assert_eq!(
                found,
                Ok(()),
                "killed at operation {at} of {ops}, then an error at operation {fails}"
            );
        }
    }
}

/// Whether leaving out the sync number `skip` is noticed at some cut.
fn is_noticed(skip: u64, ops: u64) -> bool {
    (skip..=ops).any(|at| {
        let files = SimFiles::default();
        let mut acks = Acks::default();
        let _ = run(&files, Some(Fault::SkipSync(skip)), Some(at), &mut acks);
        files.counts().1 > skip && losses().any(|loss| survive(&files.fork(), &acks, loss).is_err())
    })
}

#[test]
fn leaving_out_any_single_sync_is_noticed() {
    let (ops, syncs) = whole_life();
    assert!(syncs > 20, "{syncs}");
    let unnoticed: Vec<u64> = (0..syncs).filter(|skip| !is_noticed(*skip, ops)).collect();
    assert!(unnoticed.is_empty(), "of {syncs} syncs these could be left out: {unnoticed:?}");
}

#[test]
fn a_torn_tail_is_taken_for_one_and_a_flip_is_not() {
    let files = SimFiles::default();
    let mut store = open(&files).unwrap();
    copy(&mut store, &mut Acks::default()).unwrap();
    for n in 0..3 {
        store.put_changed(&[Extent { first: n, count: 1 }, Extent { first: 10, count: 2 }]).unwrap();
        store.sync().unwrap();
    }
    let path = owner().next_cst();
    let bytes = files.dump()[&path].clone();
    let read = |bytes: &[u8]| {
        let files = SimFiles::default();
        let dir = Dir::new(files.arc());
        dir.create(&path).unwrap().write(bytes, 0).unwrap();
        cst::read(&dir.open(&path, false).unwrap(), &owner(), None)
    };
    for cut in 0..bytes.len() {
        assert!(read(&bytes[..cut]).is_ok(), "cut at {cut}");
        let mut bad = bytes.clone();
        bad[cut] ^= 4;
        assert!(matches!(read(&bad), Err(StoreError::Damaged(_))), "flip at {cut}");
        let mut torn = bytes.clone();
        let from = cut.next_multiple_of(512).min(torn.len());
        torn[from..].fill(0);
        if torn.len() - from >= 16 {
            assert!(read(&torn).is_ok(), "zeros from {from}");
        }
    }
}
