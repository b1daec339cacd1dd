//! Which blocks of a disk changed.
//!
//! A [`Tracker`] marks every block whose write *completed* in a *live* set. [`Tracker::drain`] moves what is live
//! into a *pending* set, which is emptied only when the dispatcher has committed a checkpoint that holds those
//! blocks. Both sets outlive the agent. Where a tracker cannot be certain it has seen every write it says so with
//! a [`Gap`], which stays raised until a compare of the whole disk has been committed.
//!
//! What must never happen here: a completed write that is in neither set, without a gap.

pub mod audit;
pub mod bpf;
pub mod drain;
mod load;
mod mapping;
mod meta;
mod parts;
pub mod pins;
#[cfg(test)]
pub(crate) mod sim;
pub mod suitable;
pub mod words;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::bitmap::BlockSet;
use crate::ids::{CheckpointId, Epoch};

pub use bpf::{BpfTracker, remove};
pub use pins::{mount_bpffs_if_missing, pin_path};

/// Why a tracker cannot be certain that it has seen every write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Gap {
    /// Tracking began anew: first start, reboot, or the pinned tracker was not there or not this disk's.
    NewTracker,
    /// The disk changed its size while it was tracked.
    Resized,
    /// A passthrough command (SCSI or NVMe ioctl) sent data to the disk: what it wrote is not known.
    Passthrough,
    /// The kernel skipped every copy of the probe for some event (nested runs).
    SkippedRuns,
    /// The table of bios in flight was full.
    TableFull,
    /// A discard covered more ranges than the probe can walk.
    DiscardTooLong,
    /// The kernel counted more sectors written than the probe saw.
    Audit,
    /// Another medium or backing file is behind the device now (its `diskseq` changed).
    MediumChanged,
    /// A person ordered a compare: nothing is known to be missed.
    Ordered,
}

impl Gap {
    /// The number that stands for this gap in shared memory; never 0.
    pub fn code(self) -> u64 {
        match self {
            Self::NewTracker => 1,
            Self::Resized => 2,
            Self::Passthrough => 3,
            Self::SkippedRuns => 4,
            Self::TableFull => 5,
            Self::DiscardTooLong => 6,
            Self::Audit => 7,
            Self::MediumChanged => 8,
            Self::Ordered => 9,
        }
    }

    /// The gap behind a number; numbers that are not known (a newer version's) count as [`Gap::NewTracker`].
    pub fn from_code(code: u64) -> Option<Self> {
        match code {
            0 => None,
            2 => Some(Self::Resized),
            3 => Some(Self::Passthrough),
            4 => Some(Self::SkippedRuns),
            5 => Some(Self::TableFull),
            6 => Some(Self::DiscardTooLong),
            7 => Some(Self::Audit),
            8 => Some(Self::MediumChanged),
            9 => Some(Self::Ordered),
            _ => Some(Self::NewTracker),
        }
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NewTracker => "tracking began anew (first start, reboot, or the pinned tracker was gone)",
            Self::Resized => "the disk changed its size",
            Self::Passthrough => "a passthrough command wrote to the disk",
            Self::SkippedRuns => "the kernel skipped runs of the probe",
            Self::TableFull => "the table of bios in flight was full",
            Self::DiscardTooLong => "a discard had more ranges than the probe can walk",
            Self::Audit => "the kernel counted more sectors written than the probe saw",
            Self::MediumChanged => "another medium is in the device",
            Self::Ordered => "a compare was ordered",
        })
    }
}

/// What an agent can say of its pending set: which tracker it is from, and since which checkpoint it is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The tracker's life.
    pub epoch: Epoch,
    /// Pending holds every block changed since this checkpoint; `None`: since the epoch began.
    pub base: Option<CheckpointId>,
    /// A doubt that is not healed yet; then the claim is worth nothing.
    pub gap: Option<Gap>,
}

/// A tracker that failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// The disk cannot be tracked, and why.
    #[error("{device} cannot be tracked: {reason}")]
    Unsuitable {
        /// The device's name.
        device: String,
        /// Why not, and what can be done.
        reason: String,
    },
    /// The kernel refused something.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried, and on what.
        what: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It was closed.
    #[error("the tracker is closed")]
    Closed,
    /// The BPF object could not be loaded.
    #[error("the BPF object cannot be loaded: {0}")]
    Load(String),
}

/// The set of changed blocks of one disk. See the module for what it promises.
pub trait Tracker: Send {
    /// Moves what is live into pending and returns what was live. Blocks read after this call are newer than
    /// every write that is in the returned set.
    ///
    /// # Errors
    /// When the kernel's maps cannot be reached any more.
    fn drain(&mut self) -> Result<BlockSet, TrackerError>;

    /// All blocks that are pending (without those still live).
    ///
    /// # Errors
    /// When the kernel's maps cannot be reached any more.
    fn pending(&mut self) -> Result<BlockSet, TrackerError>;

    /// The dispatcher has committed `id`, which holds every pending block except `keep` (those drained after its
    /// last read). From now on pending is complete since `id` and is `keep`. `healed` says that this checkpoint
    /// follows a compare of the whole disk, and what [`Self::gap_count`] was when that began: a gap that was raised
    /// since, or that is only found now, stays.
    ///
    /// # Errors
    /// When the kernel's maps cannot be reached any more.
    fn commit(&mut self, id: CheckpointId, keep: &BlockSet, healed: Option<u64>) -> Result<(), TrackerError>;

    /// The claim as it stands, after looking for new doubts. The gap in it is the newest one.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn claim(&mut self) -> Result<Claim, TrackerError>;

    /// Raises [`Gap::Ordered`]: the whole disk is to be compared.
    ///
    /// # Errors
    /// When the kernel's maps cannot be reached any more.
    fn order_compare(&mut self) -> Result<(), TrackerError>;

    /// How often a gap was raised in this tracker's life.
    fn gap_count(&self) -> u64;

    /// Writes, in bytes, seen since tracking began; for reports only.
    fn written_bytes(&mut self) -> u64;
}

/// A tracker that was let go of: it fails whatever it is asked.
pub struct Closed;

impl Tracker for Closed {
    fn drain(&mut self) -> Result<BlockSet, TrackerError> {
        Err(TrackerError::Closed)
    }

    fn pending(&mut self) -> Result<BlockSet, TrackerError> {
        Err(TrackerError::Closed)
    }

    fn commit(&mut self, _: CheckpointId, _: &BlockSet, _: Option<u64>) -> Result<(), TrackerError> {
        Err(TrackerError::Closed)
    }

    fn order_compare(&mut self) -> Result<(), TrackerError> {
        Err(TrackerError::Closed)
    }

    fn claim(&mut self) -> Result<Claim, TrackerError> {
        Err(TrackerError::Closed)
    }

    fn gap_count(&self) -> u64 {
        0
    }

    fn written_bytes(&mut self) -> u64 {
        0
    }
}
