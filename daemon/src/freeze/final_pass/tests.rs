//! The final pass of a disk that the kernel does not know, so that nothing is frozen: what happens to blocks.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::tracker::sim::SimTracker;

const BLOCK_BYTES: usize = 4096;

/// A reader that gives each block its number, and does something at each read.
struct SimReader<F> {
    geometry: Geometry,
    buffer: Vec<u8>,
    at_read: F,
}

impl<F: FnMut(Extent) -> Result<(), ReadError> + Send> BlockReader for SimReader<F> {
    fn read(&mut self, extent: Extent) -> Result<&[u8], ReadError> {
        (self.at_read)(extent)?;
        let (_, len) = self.geometry.range(extent.first, extent.count);
        self.buffer = (extent.first..extent.end()).flat_map(|b| [b as u8; BLOCK_BYTES]).collect();
        self.buffer.truncate(len as usize);
        Ok(&self.buffer)
    }
}

fn reader<F: FnMut(Extent) -> Result<(), ReadError> + Send>(at_read: F) -> SimReader<F> {
    SimReader { geometry: geometry(), buffer: Vec::new(), at_read }
}

fn geometry() -> Geometry {
    Geometry::new((8 << 20) + 512, 12).unwrap()
}

fn job(dir: &std::path::Path) -> FinalPassJob {
    FinalPassJob {
        agent: "a1".parse().unwrap(),
        device_path: "/dev/nothing".into(),
        device: DeviceNumber { major: 4000, minor: 0 },
        geometry: geometry(),
        hooks_dir: None,
        hook_timeout: Duration::from_secs(20),
        freeze_timeout: Duration::from_secs(20),
        budget_bytes: 2 << 20,
        last: None,
        state_dir: dir.join("state"),
        guard_exe: "/nonexistent".into(),
    }
}

fn extent(first: u64, count: u64) -> Extent {
    Extent { first, count }
}

fn set(extents: &[Extent]) -> BlockSet {
    extents.iter().copied().collect()
}

fn taken(outcome: Outcome) -> Taken {
    match outcome {
        Outcome::Taken(taken) => taken,
        Outcome::TooMuch { rest, .. } => panic!("too much: {}", rest.len()),
    }
}

#[test]
fn what_was_handed_in_and_what_was_drained_is_read_once_in_order_and_the_last_block_short() {
    let dir = tempfile::tempdir().unwrap();
    let mut tracker = SimTracker::default();
    tracker.complete(extent(2000, 49));
    tracker.complete(extent(4, 2));
    let outcome = final_pass(
        &job(dir.path()),
        &mut tracker.clone(),
        &mut reader(|_| Ok(())),
        &set(&[extent(3, 2), extent(250, 10)]),
    );
    let taken = taken(outcome.unwrap());
    let want = [extent(3, 3), extent(250, 6), extent(256, 4), extent(2000, 48), extent(2048, 1)];
    assert_eq!(taken.data.iter().map(|d| d.0).collect::<Vec<_>>(), want);
    for (extent, data) in &taken.data {
        assert_eq!(data.len() as u64, geometry().range(extent.first, extent.count).1);
        assert!(data.chunks(BLOCK_BYTES).zip(extent.first..).all(|(d, b)| d.iter().all(|x| *x == b as u8)));
    }
    // The disk is unknown: nothing was frozen, nothing written.
    assert_eq!((taken.consistency, taken.freeze_ms), (Consistency::Crash, 0));
    assert!(taken.note.contains("4000:0"), "{}", taken.note);
    assert!(taken.after.is_empty());
    assert_eq!(tracker.pending().unwrap().len(), 49 + 2, "nothing leaves pending without a commit");
}

#[test]
fn a_write_during_the_pass_makes_it_fuzzy_and_stays_pending() {
    let dir = tempfile::tempdir().unwrap();
    let tracker = SimTracker::default();
    let writer = tracker.clone();
    let mut reader = reader(move |_| {
        writer.complete(extent(77, 1));
        Ok(())
    });
    let outcome = final_pass(&job(dir.path()), &mut tracker.clone(), &mut reader, &set(&[extent(1, 1)]));
    let taken = taken(outcome.unwrap());
    assert_eq!(taken.consistency, Consistency::Fuzzy);
    assert_eq!(taken.after, set(&[extent(77, 1)]));
    assert_eq!(tracker.clone().pending().unwrap(), set(&[extent(77, 1)]));
}

#[test]
fn more_than_the_budget_is_given_back_unread() {
    let dir = tempfile::tempdir().unwrap();
    let tracker = SimTracker::default();
    tracker.complete(extent(600, 1));
    let mut reader = reader(|_| panic!("read although it is too much"));
    let outcome =
        final_pass(&job(dir.path()), &mut tracker.clone(), &mut reader, &set(&[extent(0, 512)])).unwrap();
    let Outcome::TooMuch { rest, .. } = outcome else { panic!("taken") };
    assert_eq!(rest, set(&[extent(0, 512), extent(600, 1)]));
    let exact = final_pass(
        &job(dir.path()),
        &mut SimTracker::default(),
        &mut self::reader(|_| Ok(())),
        &set(&[extent(0, 512)]),
    );
    assert_eq!(taken(exact.unwrap()).data.len(), 2);
}

/// Hooks that write what they see into a file.
fn with_hooks(job: &mut FinalPassJob, dir: &std::path::Path, body: &str) -> PathBuf {
    let hooks = dir.join("hooks");
    fs::create_dir(&hooks).unwrap();
    let log = dir.join("log");
    let script = format!(
        "#!/bin/sh\necho \"$1 $BLXREP_AGENT $BLXREP_DEVICE $BLXREP_CHECKPOINT\" >> {}\n{body}\n",
        log.display()
    );
    crate::freeze::hooks::tests::write_program(&hooks.join("10-log"), &script);
    fs::set_permissions(hooks.join("10-log"), fs::Permissions::from_mode(0o755)).unwrap();
    job.hooks_dir = Some(hooks);
    log
}

#[test]
fn hooks_see_every_stage_and_the_id_is_behind_the_last_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    let log = with_hooks(&mut job, dir.path(), "");
    let future: CheckpointId = "29991231235958".parse().unwrap();
    job.last = Some(future);
    let outcome =
        final_pass(&job, &mut SimTracker::default(), &mut reader(|_| Ok(())), &set(&[extent(0, 1)]));
    assert_eq!(taken(outcome.unwrap()).id.to_string(), "29991231235958-2");
    let line = |stage| format!("{stage} a1 /dev/nothing 29991231235958-2\n");
    assert_eq!(fs::read_to_string(log).unwrap(), line("pre-freeze") + &line("frozen") + &line("post-thaw"));
}

#[test]
fn a_failed_read_loses_no_block_and_still_runs_the_post_thaw_hooks() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    let log = with_hooks(&mut job, dir.path(), "");
    let tracker = SimTracker::default();
    tracker.complete(extent(9, 1));
    let mut reader = reader(|e: Extent| {
        let source = io::Error::from_raw_os_error(libc::ENODEV);
        Err(ReadError::Failed { device: "/dev/nothing".into(), first: e.first, count: 1, source })
    });
    let error = final_pass(&job, &mut tracker.clone(), &mut reader, &BlockSet::new()).unwrap_err();
    assert!(error.to_string().contains("blocks 9+1"), "{error}");
    assert_eq!(tracker.clone().pending().unwrap(), set(&[extent(9, 1)]));
    let stages: Vec<String> =
        fs::read_to_string(log).unwrap().lines().map(|l| l.split(' ').next().unwrap().to_owned()).collect();
    assert_eq!(stages, ["pre-freeze", "post-thaw"]);
}

#[test]
fn a_tracker_that_fails_behind_the_last_read_costs_the_checkpoint_and_no_block() {
    let dir = tempfile::tempdir().unwrap();
    let tracker = SimTracker::default();
    tracker.complete(extent(9, 1));
    tracker.fail_once();
    let error = final_pass(&job(dir.path()), &mut tracker.clone(), &mut reader(|_| Ok(())), &BlockSet::new())
        .unwrap_err();
    assert!(matches!(error, FinalPassError::Tracker(_)), "{error}");
    assert_eq!(tracker.clone().pending().unwrap(), set(&[extent(9, 1)]));
}

/// Says of these blocks that the medium is bad there.
fn bad(blocks: BlockSet) -> impl FnMut(Extent) -> Result<(), ReadError> {
    move |e| match (e.first..e.end()).any(|block| blocks.contains(block)) {
        false => Ok(()),
        true => {
            let (source, device) = (io::Error::from_raw_os_error(libc::EIO), "/dev/nothing".into());
            Err(ReadError::Unreadable { device, first: e.first, count: e.count, source })
        }
    }
}

#[test]
fn bad_blocks_are_named_and_all_others_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let wanted = set(&[extent(3, 4), extent(300, 1)]);
    let mut reader = reader(bad(set(&[extent(4, 2), extent(300, 1), extent(900, 1)])));
    let taken =
        taken(final_pass(&job(dir.path()), &mut SimTracker::default(), &mut reader, &wanted).unwrap());
    assert_eq!(taken.unreadable, set(&[extent(4, 2), extent(300, 1)]));
    assert_eq!(taken.data.iter().map(|d| d.0).collect::<Vec<_>>(), [extent(3, 1), extent(6, 1)]);
    assert_eq!(taken.blocks(), wanted);
}

#[test]
fn looking_for_bad_blocks_ends_with_the_freeze_and_keeps_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.freeze_timeout = Duration::from_millis(200);
    let mut bad = bad(set(&[extent(0, 256)]));
    let mut reads = 0;
    let mut reader = reader(|e| {
        reads += 1;
        std::thread::sleep(Duration::from_millis(50));
        bad(e)
    });
    let outcome = final_pass(&job, &mut SimTracker::default(), &mut reader, &set(&[extent(0, 256)])).unwrap();
    let Outcome::TooMuch { rest, note } = outcome else { panic!("taken") };
    assert_eq!(rest, set(&[extent(0, 256)]));
    assert!(note.contains("bad blocks took too long"), "{note}");
    assert!(reads < 10, "{reads} reads of a dying disk while frozen");
}

#[test]
fn a_failed_hook_is_in_the_note() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    with_hooks(&mut job, dir.path(), "exit 3");
    let outcome = final_pass(&job, &mut SimTracker::default(), &mut reader(|_| Ok(())), &BlockSet::new());
    let note = taken(outcome.unwrap()).note;
    assert!(note.contains("10-log (pre-freeze): failed with exit status 3"), "{note}");
}
