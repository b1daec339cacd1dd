//! Reading blocks of a disk.
//!
//! A [`BlockReader`] brings the bytes of an extent as they are on the disk now, and [`pack`] makes runs of them.
//! What must never happen here: bytes from a cache that the disk does not hold yet, or a block that could not be
//! read taken for one that could.

pub mod ahead;
mod direct;
mod pack;
mod patient;

pub use direct::DirectReader;
pub use pack::{hash_extent, pack, pack_differing};
#[cfg(test)]
pub(crate) use patient::tests as patient_tests;
pub use patient::{Piece, read_pieces};

use crate::bitmap::Extent;
use crate::geometry::{GROUP_BYTES, Geometry};

/// Blocks that could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The device cannot be opened or asked for its sizes.
    #[error("{device} cannot be opened for reading: {source}")]
    Open {
        /// The device's path.
        device: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The device is smaller than the disk that is to be read.
    #[error(
        "{device} has {found_bytes} bytes and {expected_bytes} were expected: it was exchanged or made smaller"
    )]
    Smaller {
        /// The device's path.
        device: String,
        /// The bytes it has.
        found_bytes: u64,
        /// The bytes it should have.
        expected_bytes: u64,
    },
    /// The extent is empty, longer than 1 MiB or does not lie on the disk. An error of the caller.
    #[error(
        "blocks {first}+{count} cannot be read: at least 1 block, at most 1 MiB, all of the {blocks} of the disk"
    )]
    Extent {
        /// The first block.
        first: u64,
        /// The number of blocks.
        count: u64,
        /// The disk's blocks.
        blocks: u64,
    },
    /// The medium is bad at one or more of these blocks; others can be read.
    #[error(
        "blocks {first}+{count} of {device} cannot be read: {source}; look at the kernel's log and at the disk's health"
    )]
    Unreadable {
        /// The device's path.
        device: String,
        /// The first block that was to be read.
        first: u64,
        /// How many were.
        count: u64,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The device failed as a whole: it is gone, or has shrunk.
    #[error("{device} failed when blocks {first}+{count} were read: {source}; is it still there?")]
    Failed {
        /// The device's path.
        device: String,
        /// The first block that was to be read.
        first: u64,
        /// How many were.
        count: u64,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Finding the bad blocks took too long, or was not wanted any more.
    #[error("blocks {first}+{count} were not read: looking for bad blocks before them took too long")]
    GaveUp {
        /// The first block that was not read.
        first: u64,
        /// How many were not.
        count: u64,
    },
}

/// Reads blocks of one disk.
pub trait BlockReader: Send {
    /// The bytes of at most 1 MiB of blocks; the last block of a disk is cut at the disk's end.
    ///
    /// # Errors
    /// Extent when it does not lie on the disk or is too long; Unreadable when the medium is bad at a block of it (which
    /// one is not said: see [`read_pieces`]); Failed.
    fn read(&mut self, extent: Extent) -> Result<&[u8], ReadError>;
}

/// Offset and length in bytes of an extent that may be read at once.
fn checked_range(extent: Extent, geometry: Geometry) -> Result<(u64, usize), ReadError> {
    let Extent { first, count } = extent;
    let blocks = geometry.blocks();
    let fits = first.checked_add(count).is_some_and(|end| end <= blocks);
    let (offset, len) = geometry.range(first, count);
    match usize::try_from(len) {
        Ok(len_bytes) if fits && count > 0 && len <= GROUP_BYTES => Ok((offset, len_bytes)),
        _ => Err(ReadError::Extent { first, count, blocks }),
    }
}
