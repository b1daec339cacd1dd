//! The final pass on real disks, compared with a photograph taken in the freeze. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/mounts.rs"]
mod mounts;

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blxrep::bitmap::{BlockSet, Extent};
use blxrep::checkpoint::Consistency;
use blxrep::freeze::final_pass::{FinalPassJob, Outcome, Taken, final_pass};
use blxrep::freeze::topology::file_systems_on;
use blxrep::geometry::Geometry;
use blxrep::ids::{CheckpointId, Epoch};
use blxrep::reader::{BlockReader, DirectReader, ReadError};
use blxrep::tracker::{Claim, Tracker, TrackerError};
use mounts::{LoopDisk, is_frozen, run};

/// Says what changed before each drain, and nothing from then on.
struct Changes(VecDeque<BlockSet>);

impl Tracker for Changes {
    fn drain(&mut self) -> Result<BlockSet, TrackerError> {
        Ok(self.0.pop_front().unwrap_or_default())
    }
    fn pending(&mut self) -> Result<BlockSet, TrackerError> {
        unreachable!("the final pass does not ask")
    }
    fn commit(&mut self, _: CheckpointId, _: &BlockSet, _: Option<u64>) -> Result<(), TrackerError> {
        unreachable!("the final pass does not commit")
    }
    fn claim(&mut self) -> Result<Claim, TrackerError> {
        Ok(Claim { epoch: Epoch([1; 16]), base: None, gap: None })
    }
    fn order_compare(&mut self) -> Result<(), TrackerError> {
        Ok(())
    }

    fn gap_count(&self) -> u64 {
        0
    }
    fn written_bytes(&mut self) -> u64 {
        0
    }
}

/// Takes its time before the first block.
struct Slow(DirectReader, Option<Duration>);

impl BlockReader for Slow {
    fn read(&mut self, extent: Extent) -> Result<&[u8], ReadError> {
        thread::sleep(self.1.take().unwrap_or_default());
        self.0.read(extent)
    }
}

struct Scene {
    disk: LoopDisk,
    job: FinalPassJob,
    delay: Option<Duration>,
    /// What changes while the blocks are read.
    meanwhile: BlockSet,
}

impl Scene {
    fn new(disk: LoopDisk) -> Self {
        let size_bytes = fs::metadata(&disk.image).unwrap().len();
        let job = FinalPassJob {
            agent: "agent1".parse().unwrap(),
            device_path: disk.path.clone(),
            device: disk.number(),
            geometry: Geometry::new(size_bytes, 12).unwrap(),
            hooks_dir: None,
            hook_timeout: Duration::from_secs(60),
            freeze_timeout: Duration::from_secs(60),
            budget_bytes: size_bytes,
            last: None,
            state_dir: disk.dir.join("state"),
            guard_exe: env!("CARGO_BIN_EXE_blxrep").into(),
        };
        Self { disk, job, delay: None, meanwhile: BlockSet::new() }
    }

    fn ext4() -> (Self, PathBuf) {
        let mut disk = LoopDisk::new(32, &[]);
        let point = disk.mkfs("ext4", &disk.path.clone());
        (Self::new(disk), point)
    }

    /// A hook that does this in the stage `frozen`, and nothing in the others.
    fn frozen_hook(&mut self, body: &str) {
        let hooks = self.disk.dir.join("hooks");
        fs::create_dir(&hooks).unwrap();
        let path = hooks.join("50-test");
        let text = format!("#!/bin/sh\n[ \"$1\" = frozen ] || exit 0\n{body}\n");
        // By another process: otherwise a child of a test beside this one could hold it open for writing.
        run("sh", &["-c", "printf %s \"$1\" > \"$0\"", path.to_str().unwrap(), &text]);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self.job.hooks_dir = Some(hooks);
    }

    fn take(&self) -> Taken {
        let all = Extent { first: 0, count: self.job.geometry.blocks() };
        let mut tracker = Changes(VecDeque::from([[all].into_iter().collect(), self.meanwhile.clone()]));
        let mut reader = Slow(DirectReader::open(&self.disk.path, self.job.geometry).unwrap(), self.delay);
        match final_pass(&self.job, &mut tracker, &mut reader, &BlockSet::new()).unwrap() {
            Outcome::Taken(taken) => taken,
            Outcome::TooMuch { .. } => panic!("it was to fit"),
        }
    }

    /// Nothing is frozen and nothing recorded any more.
    fn assert_clean(&self) {
        let found = file_systems_on(self.job.device.major, self.job.device.minor).unwrap();
        assert!(!found.mounts.iter().any(is_frozen));
        if let Ok(left) = fs::read_dir(&self.job.state_dir) {
            assert_eq!(left.count(), 0, "a record is left");
        }
    }
}

#[test]
fn the_blocks_are_those_of_the_frozen_disk_while_writers_never_rest() {
    let mut disk = LoopDisk::new(400, &[32, 340]);
    let points = [disk.mkfs("ext4", &disk.part(1)), disk.mkfs("xfs", &disk.part(2))];
    let photo = disk.dir.join("photo");
    let mut scene = Scene::new(disk);
    scene.frozen_hook(&format!(
        "exec dd if=$BLXREP_DEVICE of='{}' bs=1M iflag=direct status=none",
        photo.display()
    ));
    let stop = Arc::new(AtomicBool::new(false));
    let writers = points.map(|point| {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            for round in 0u32.. {
                if stop.load(Ordering::SeqCst) {
                    return round;
                }
                let name = point.join(format!("file{}", round % 20));
                fs::write(name, vec![round as u8; 10_000]).unwrap();
            }
            0
        })
    });
    let taken = scene.take();
    stop.store(true, Ordering::SeqCst);
    assert!(writers.map(|w| w.join().unwrap()).iter().all(|rounds| *rounds > 0));
    assert_eq!((taken.consistency, taken.note.as_str()), (Consistency::Application, ""));
    let photo = fs::read(photo).unwrap();
    let mut end = 0;
    for (extent, data) in &taken.data {
        let (offset, len) = scene.job.geometry.range(extent.first, extent.count);
        assert_eq!((offset, len), (end, data.len() as u64));
        end = offset + len;
        assert!(photo[offset as usize..end as usize] == data[..], "{extent:?} differs from the photograph");
    }
    assert_eq!(end, photo.len() as u64);
    scene.assert_clean();
}

#[test]
fn without_hooks_the_class_is_filesystem() {
    let (scene, _) = Scene::ext4();
    let taken = scene.take();
    assert_eq!((taken.consistency, taken.note.as_str()), (Consistency::Filesystem, ""));
    scene.assert_clean();
}

#[test]
fn a_read_only_file_system_is_consistent_without_a_freeze() {
    let (mut scene, point) = Scene::ext4();
    run("mount", &["-o", "remount,ro", point.to_str().unwrap()]);
    scene.job.guard_exe = "/nonexistent".into();
    let taken = scene.take();
    assert_eq!((taken.consistency, taken.freeze_ms), (Consistency::Filesystem, 0));
}

#[test]
fn a_hook_that_hangs_or_writes_to_what_is_frozen_keeps_nothing_frozen() {
    for body in ["sleep 1000", "echo x > \"$(dirname \"$0\")/../mount 0/file\""] {
        let (mut scene, _) = Scene::ext4();
        scene.frozen_hook(body);
        scene.job.freeze_timeout = Duration::from_millis(3000);
        let begin = Instant::now();
        let taken = scene.take();
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
        assert!((2000..15_000).contains(&taken.freeze_ms), "{body}: {} ms", taken.freeze_ms);
        // The last block was read in time, so the file system is whole; the application has no word in it.
        assert_eq!(taken.consistency, Consistency::Filesystem, "{body}");
        assert!(taken.note.contains("50-test (frozen): "), "{}", taken.note);
        assert!(taken.note.contains("it did not end within"), "{}", taken.note);
        scene.assert_clean();
    }
}

#[test]
fn a_freeze_that_ends_before_the_last_block_is_fuzzy() {
    let (mut scene, _) = Scene::ext4();
    scene.job.freeze_timeout = Duration::from_millis(1000);
    scene.delay = Some(Duration::from_millis(2500));
    let taken = scene.take();
    assert_eq!(taken.consistency, Consistency::Fuzzy);
    assert!(taken.note.contains("ended before the last block"), "{}", taken.note);
    scene.assert_clean();
}

#[test]
fn blocks_that_change_while_frozen_make_it_fuzzy_and_are_said() {
    let (mut scene, _) = Scene::ext4();
    scene.meanwhile.insert(Extent { first: 7, count: 2 });
    let taken = scene.take();
    assert_eq!((taken.consistency, &taken.after), (Consistency::Fuzzy, &scene.meanwhile));
    assert!(taken.note.contains("while the file systems were frozen"), "{}", taken.note);
    scene.assert_clean();
}

#[test]
fn what_somebody_else_has_frozen_is_crash_and_stays_frozen() {
    let (scene, point) = Scene::ext4();
    run("fsfreeze", &["--freeze", point.to_str().unwrap()]);
    let taken = scene.take();
    assert_eq!((taken.consistency, taken.freeze_ms), (Consistency::Crash, 0));
    assert!(taken.note.contains("was frozen already"), "{}", taken.note);
    let found = file_systems_on(scene.job.device.major, scene.job.device.minor).unwrap();
    assert!(is_frozen(&found.mounts[0]));
}

#[test]
fn without_guard_or_record_nothing_is_frozen_and_the_note_says_so() {
    let (mut scene, _) = Scene::ext4();
    scene.job.guard_exe = "/bin/true".into();
    let taken = scene.take();
    assert_eq!((taken.consistency, taken.freeze_ms), (Consistency::Crash, 0));
    assert!(taken.note.contains("the freeze guard cannot be started"), "{}", taken.note);

    let (mut scene, _) = Scene::ext4();
    fs::write(scene.disk.dir.join("file"), b"").unwrap();
    scene.job.state_dir = Path::new(&scene.disk.dir).join("file/state");
    let taken = scene.take();
    assert_eq!((taken.consistency, taken.freeze_ms), (Consistency::Crash, 0));
    assert!(taken.note.contains("not frozen: the freeze record"), "{}", taken.note);
}

#[test]
fn the_record_may_lie_on_the_frozen_disk() {
    let (mut scene, point) = Scene::ext4();
    scene.job.state_dir = point.join("state");
    assert_eq!(scene.take().consistency, Consistency::Filesystem);
    scene.assert_clean();
}
