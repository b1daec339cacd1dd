//! The tracker of a real disk: a BPF program in the kernel that goes on while no agent runs.
//!
//! What must never happen here: a pinned tracker taken over that is not this very disk's, whole and attached.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::thread::sleep;
use std::time::{Duration, Instant};

use blxrep_ebpf::{OBJECT, meta as slot};

use super::audit::{self, Verdict};
use super::meta::{Found, Identity, Look, Meta};
use super::parts::{Parts, Sizes};
use super::pins::{PinDir, kernel};
use super::words::Words;
use super::{Claim, Gap, Tracker, TrackerError, drain, load, suitable};
use crate::bitmap::BlockSet;
use crate::device::{BlockDevice, DeviceError};
use crate::geometry::Geometry;
use crate::ids::{CheckpointId, Epoch};

/// How long a bio-based disk is given to be without a write in flight, in milliseconds.
const QUIET_WAIT_MS: u64 = 10_000;
/// Bytes of a sector in the kernel's counts.
const SECTOR_BYTES: u64 = 512;

/// A disk's tracker in the kernel. Dropping it leaves the tracker at work; [`remove`] ends it.
#[derive(Debug)]
pub struct BpfTracker {
    device: BlockDevice,
    geometry: Geometry,
    parts: Parts,
    resumed: bool,
    /// Skipped runs at the last look.
    misses: Vec<[u64; 2]>,
    /// Held for its lock: two drains of one tracker would take each other's blocks.
    _dir: PinDir,
}

impl BpfTracker {
    /// Takes over the tracker pinned in `pin_dir` if it is this disk's, whole and attached; else removes what is there
    /// and begins anew, with [`Gap::NewTracker`]. Locks the directory; `pin_dir` must lie in a bpffs. May take 10 s on a
    /// bio-based disk.
    ///
    /// # Errors
    /// When the disk is unsuitable, another process uses the tracker, the kernel refuses something, or a bio-based
    /// disk is never without a write in flight. A tracker that was just begun is then removed.
    pub fn open(device: &BlockDevice, block_shift: u8, pin_dir: &Path) -> Result<Self, TrackerError> {
        let geometry = suitable::check(device, block_shift)?;
        let identity = identity(device, geometry)?;
        let sizes = Sizes::of(geometry)?;
        let dir = PinDir::make(pin_dir)?;
        let whole = Parts::open(&dir, sizes, device.request_based)?
            .filter(|parts| Meta(&*parts.meta).is(&identity, &parts.ids));
        let resumed = whole.is_some();
        let parts = match whole {
            Some(parts) => parts,
            None => match begin(&dir, device, geometry, sizes, &identity) {
                Ok(parts) => parts,
                Err(error) => {
                    // What is left could only be removed by hand; the first error is the one to report.
                    let _ = dir.remove();
                    return Err(error);
                }
            },
        };
        let device = device.clone();
        let tracker = Self { device, geometry, parts, resumed, misses: Vec::new(), _dir: dir };
        // From here on a missed write is found, not only from the first claim on. No sooner: what the disk did before
        // a probe was there is not the probe's to count.
        tracker.audit()?;
        Ok(tracker)
    }

    /// Whether the tracker was there already when it was opened.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    fn meta(&self) -> Meta<'_, [AtomicU64]> {
        Meta(&self.parts.meta)
    }

    /// Looks at everything that raises a doubt, except the audit.
    fn look(&mut self) -> Result<Found, TrackerError> {
        let state: &[_] = &self.parts.state;
        let mut look = Look {
            size_bytes: self.device.size_bytes_now().map_err(of_device)?,
            diskseq: self.device.diskseq_now().map_err(of_device)?,
            state: std::array::from_fn(|slot| state.load(slot)),
            misses: Vec::new(),
        };
        for [a, b] in &self.parts.programs {
            look.misses.push([a.recursion_misses()?, b.recursion_misses()?]);
        }
        let found = self.meta().account(&look, &self.misses);
        self.misses = look.misses;
        if found.uncounted {
            self.meta().forget_readings();
        }
        Ok(found)
    }

    /// Compares the probe's count with the kernel's if the disk is quiet.
    fn audit(&self) -> Result<(), TrackerError> {
        let reading = audit::settled_reading(&self.device, || self.parts.counted()).map_err(of_device)?;
        let Some(now) = reading else { return Ok(()) };
        let history = self.meta().readings();
        if audit::judge_all(&history, now, self.device.request_based) == Verdict::Missed {
            self.meta().raise(Gap::Audit);
        }
        // New readings take the place of old ones: what the kernel left out until now (discards of zram) shall not
        // hide for ever what the probe misses later.
        self.meta().keep_reading(now);
        Ok(())
    }

    /// Whether size and medium are still those the bitmaps were made for. If not, only a new tracker can be whole.
    fn is_same_disk(&self) -> bool {
        let meta: &[_] = &self.parts.meta;
        meta.load(slot::SEEN_SIZE) == self.geometry.size_bytes()
            && meta.load(slot::SEEN_DISKSEQ) == self.device.diskseq
    }
}

impl Tracker for BpfTracker {
    fn drain(&mut self) -> Result<BlockSet, TrackerError> {
        let parts = &self.parts;
        Ok(drain::drain::<[_]>(&parts.live, &parts.coarse, &parts.pending, self.geometry.blocks()))
    }

    fn pending(&mut self) -> Result<BlockSet, TrackerError> {
        Ok(drain::blocks_of::<[_]>(&self.parts.pending, self.geometry.blocks()))
    }

    fn commit(&mut self, id: CheckpointId, keep: &BlockSet, healed: Option<u64>) -> Result<(), TrackerError> {
        self.look()?;
        let heals = healed == Some(self.gap_count()) && self.is_same_disk();
        self.meta().commit(&self.parts.pending, id, keep, heals);
        Ok(())
    }

    fn claim(&mut self) -> Result<Claim, TrackerError> {
        self.look()?;
        self.audit()?;
        Ok(self.meta().claim())
    }

    fn order_compare(&mut self) -> Result<(), TrackerError> {
        self.meta().raise(Gap::Ordered);
        Ok(())
    }

    fn gap_count(&self) -> u64 {
        self.meta().gap_count()
    }

    fn written_bytes(&mut self) -> u64 {
        self.parts.counted().written.saturating_mul(SECTOR_BYTES)
    }
}

/// Ends the tracker pinned in a directory and removes the directory; false if there was none.
///
/// # Errors
/// When another process uses it, or the kernel refuses to remove something.
pub fn remove(pin_dir: &Path) -> Result<bool, TrackerError> {
    match PinDir::existing(pin_dir)? {
        Some(dir) => dir.remove().map(|()| true),
        None => Ok(false),
    }
}

fn begin(
    dir: &PinDir,
    device: &BlockDevice,
    geometry: Geometry,
    sizes: Sizes,
    identity: &Identity,
) -> Result<Parts, TrackerError> {
    let epoch =
        Epoch::random().map_err(|e| kernel("no random numbers", std::io::Error::other(e.to_string())))?;
    dir.clear()?;
    load::create(dir, device, geometry, sizes)?;
    let parts = Parts::open(dir, sizes, device.request_based)?.ok_or_else(|| {
        TrackerError::Load("what was just pinned is not there; is another process at it?".into())
    })?;
    Meta(&*parts.meta).begin(identity, epoch, &parts.ids);
    if !device.request_based {
        // Bios queued before the probe was there complete without an entry, so their ranges are not known.
        wait_until_quiet(device)?;
    }
    Meta(&*parts.meta).finish();
    Ok(parts)
}

fn wait_until_quiet(device: &BlockDevice) -> Result<(), TrackerError> {
    let deadline = Instant::now() + Duration::from_millis(QUIET_WAIT_MS);
    while !audit::is_quiet(device).map_err(of_device)? {
        if Instant::now() >= deadline {
            let seconds = QUIET_WAIT_MS / 1000;
            let reason = format!(
                "for {seconds} s there was never a moment without a write in flight, which tracking must begin with: try again when it is less busy"
            );
            return Err(TrackerError::Unsuitable { device: device.name.clone(), reason });
        }
        sleep(Duration::from_micros(200));
    }
    Ok(())
}

fn identity(device: &BlockDevice, geometry: Geometry) -> Result<Identity, TrackerError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let boot_id = fs::read_to_string(path).map_err(|e| kernel(format!("{path} cannot be read"), e))?;
    let boot_id = u128::from_str_radix(&boot_id.trim().replace('-', ""), 16)
        .map_err(|e| kernel(format!("{path} is not understood"), std::io::Error::other(e)))?;
    let hash = blake3::hash(OBJECT);
    let (object_hash, _) = hash.as_bytes().split_first_chunk().unwrap_or((&[0; 16], &[]));
    Ok(Identity {
        major: device.major,
        minor: device.minor,
        diskseq: device.diskseq,
        size_bytes: geometry.size_bytes(),
        block_shift: geometry.block_shift(),
        request_based: device.request_based,
        boot_id,
        object_hash: u128::from_le_bytes(*object_hash),
    })
}

fn of_device(error: DeviceError) -> TrackerError {
    kernel("the tracked disk cannot be looked at", std::io::Error::other(error))
}
