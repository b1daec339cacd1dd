//! What a checkpoint is: a point in time of one disk, how it was proven, and on which it builds.

pub mod chain;
pub mod select;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::geometry::Geometry;
use crate::ids::{AgentId, CheckpointId, DiskId, Epoch};

/// How it was proven that a checkpoint is a point in time. Ordered from the strongest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// Hooks ran and every file system on the disk was frozen.
    Application,
    /// Every file system on the disk was frozen.
    Filesystem,
    /// No write reached the disk during the final pass.
    Crash,
    /// None of these: blocks are from slightly different moments.
    Fuzzy,
}

impl Consistency {
    /// The number in files and messages: 1 to 4.
    pub fn code(self) -> u8 {
        match self {
            Self::Application => 1,
            Self::Filesystem => 2,
            Self::Crash => 3,
            Self::Fuzzy => 4,
        }
    }

    /// The class behind a number.
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Application),
            2 => Some(Self::Filesystem),
            3 => Some(Self::Crash),
            4 => Some(Self::Fuzzy),
            _ => None,
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Application => "application",
            Self::Filesystem => "filesystem",
            Self::Crash => "crash",
            Self::Fuzzy => "fuzzy",
        })
    }
}

/// Everything a committed checkpoint says of itself, besides its data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The id.
    pub id: CheckpointId,
    /// Whose it is.
    pub agent: AgentId,
    /// Of which disk.
    pub disk: DiskId,
    /// The device's name on the agent when it was taken, such as `sda`.
    pub device: String,
    /// Size and block size of the disk.
    pub geometry: Geometry,
    /// The checkpoint this one builds on; `None` for the base image.
    pub parent: Option<CheckpointId>,
    /// How it was proven.
    pub consistency: Consistency,
    /// When it was frozen, in milliseconds since 1970.
    pub time_unix_ms: u64,
    /// How long file systems were frozen, in milliseconds; 0 where none was.
    pub freeze_ms: u32,
    /// How many blocks of the disk could not be read: zeros stand for them. 2^32 - 1 if there are more.
    pub unreadable_blocks: u32,
    /// The tracker's life in which it was taken.
    pub epoch: Epoch,
    /// What a person should know: a hook that failed, a file system that could not be frozen. May be empty.
    pub note: String,
}
