//! How a disk is cut into blocks and groups.
//!
//! A *block* is the unit of tracking, hashing and deltas. A *group* is the unit of comparing and of the `.sum`
//! file: the blocks of one MiB.

use serde::{Deserialize, Serialize};

/// log2 of the bytes of a group, 1 MiB.
pub const GROUP_SHIFT: u8 = 20;
/// Bytes of a group, and the most data one run may hold.
pub const GROUP_BYTES: u64 = 1 << GROUP_SHIFT;
/// The largest disk, in bytes: 2^60 (1 EiB). Keeps every offset computation far from overflow.
pub const SIZE_MAX_BYTES: u64 = 1 << 60;
/// The most blocks of a disk: 64 TiB in blocks of 4 KiB. Bounds the memory that a set of blocks takes, whatever an agent
/// reports: 16 MiB for a disk that changed whole.
pub const BLOCKS_MAX: u64 = 1 << 34;
/// log2 of the default block, 4 KiB.
pub const BLOCK_SHIFT_DEFAULT: u8 = 12;

/// A geometry that is not possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Blocks are powers of two from 512 B to 1 MiB.
    #[error("a block of 2^{0} bytes is not possible: powers of two from 512 bytes to 1 MiB are")]
    Block(u8),
    /// Sizes are multiples of 512 bytes, above 0, at most 1 EiB.
    #[error("a disk of {0} bytes is not possible: a multiple of 512 from 512 to 2^60 is")]
    Size(u64),
    /// More blocks than a set of them may hold.
    #[error(
        "a disk of {size_bytes} bytes has more than 2^34 blocks of 2^{block_shift} bytes: set a larger 'block-size'"
    )]
    Blocks {
        /// The disk's bytes.
        size_bytes: u64,
        /// log2 of a block's bytes.
        block_shift: u8,
    },
}

/// Size of a disk and of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "(u64, u8)", into = "(u64, u8)")]
pub struct Geometry {
    size_bytes: u64,
    block_shift: u8,
}

impl Geometry {
    /// Checks and keeps a disk's size in bytes and log2 of its block's bytes.
    ///
    /// # Errors
    /// When the block is not from 512 B to 1 MiB, the size is 0, no multiple of 512 or above 1 EiB, or there are more
    /// than [`BLOCKS_MAX`] blocks.
    pub fn new(size_bytes: u64, block_shift: u8) -> Result<Self, GeometryError> {
        if !(9..=GROUP_SHIFT).contains(&block_shift) {
            return Err(GeometryError::Block(block_shift));
        }
        if size_bytes == 0 || !size_bytes.is_multiple_of(512) || size_bytes > SIZE_MAX_BYTES {
            return Err(GeometryError::Size(size_bytes));
        }
        if size_bytes.div_ceil(1 << block_shift) > BLOCKS_MAX {
            return Err(GeometryError::Blocks { size_bytes, block_shift });
        }
        Ok(Self { size_bytes, block_shift })
    }

    /// The disk's size in bytes.
    pub fn size_bytes(self) -> u64 {
        self.size_bytes
    }

    /// log2 of the bytes of a block.
    pub fn block_shift(self) -> u8 {
        self.block_shift
    }

    /// Bytes of a block (the last one of a disk may be cut short, see [`Self::range`]).
    pub fn block_bytes(self) -> usize {
        1 << self.block_shift
    }

    /// The number of blocks, the last one counted even if it is cut short.
    pub fn blocks(self) -> u64 {
        self.size_bytes.div_ceil(1 << self.block_shift)
    }

    /// Offset and length in bytes of `count` blocks from `first` on, cut at the end of the disk.
    pub fn range(self, first: u64, count: u64) -> (u64, u64) {
        let start = first.saturating_mul(1 << self.block_shift).min(self.size_bytes);
        let end = first.saturating_add(count).saturating_mul(1 << self.block_shift).min(self.size_bytes);
        (start, end - start)
    }

    /// Blocks in a whole group: 1 MiB by the block's size.
    pub fn group_blocks(self) -> u64 {
        1 << (GROUP_SHIFT - self.block_shift)
    }

    /// The number of groups, the last one counted even if it is cut short.
    pub fn groups(self) -> u64 {
        self.size_bytes.div_ceil(GROUP_BYTES)
    }

    /// First block and number of blocks of a group; the number is 0 behind the end of the disk.
    pub fn group_extent(self, group: u64) -> (u64, u64) {
        let first = group.saturating_mul(self.group_blocks()).min(self.blocks());
        (first, self.group_blocks().min(self.blocks() - first))
    }
}

impl TryFrom<(u64, u8)> for Geometry {
    type Error = GeometryError;
    fn try_from((size_bytes, block_shift): (u64, u8)) -> Result<Self, GeometryError> {
        Self::new(size_bytes, block_shift)
    }
}

impl From<Geometry> for (u64, u8) {
    fn from(g: Geometry) -> (u64, u8) {
        (g.size_bytes, g.block_shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_no_multiple_of_a_block_ends_in_a_short_block_and_group() {
        let g = Geometry::new((3 << 20) + 4096 + 512, 12).unwrap();
        assert_eq!(g.blocks(), 3 * 256 + 2);
        assert_eq!(g.groups(), 4);
        assert_eq!(g.group_extent(3), (768, 2));
        assert_eq!(g.group_extent(4), (770, 0));
        assert_eq!(g.range(769, 1), ((3 << 20) + 4096, 512));
        assert_eq!(g.range(0, 2), (0, 8192));
    }

    #[test]
    fn impossible_geometries_are_refused() {
        assert!(Geometry::new(0, 12).is_err());
        assert!(Geometry::new(513, 12).is_err());
        assert!(Geometry::new(1 << 61, 12).is_err());
        assert!(Geometry::new(4096, 8).is_err());
        assert!(Geometry::new(4096, 21).is_err());
        assert!(Geometry::new(BLOCKS_MAX << 9, 9).is_ok());
        assert!(Geometry::new((BLOCKS_MAX << 9) + 512, 9).is_err());
    }
}
