//! Blocks that an agent's disk cannot read: how many are borne, and what they are called. Pure.
//!
//! Such a block has a hash of its own ([`crate::hash::BlockHash::UNREADABLE`]) and zeros as its content. What must
//! never happen: that its zeros are taken for something that was read, without anybody being told.

use crate::bitmap::BlockSet;
use crate::geometry::Geometry;

/// A disk that cannot read more blocks than this is failing: what it still gives is no backup.
pub const UNREADABLE_MAX_BLOCKS: u64 = 4096;
/// The most ranges of sectors that a restore or a verify names.
pub const RANGES_MAX: usize = 256;

/// The sectors (of 512 bytes) of these blocks as ranges, such as `2048-2055, 4096-4103`; those behind the first
/// `ranges_max` are only counted. Empty if there is none.
pub fn sectors(blocks: &BlockSet, geometry: Geometry, ranges_max: usize) -> String {
    let mut text = String::new();
    let mut more = 0;
    for (at, extent) in blocks.extents(u64::MAX).enumerate() {
        if at >= ranges_max {
            more += 1;
            continue;
        }
        let (start, len) = geometry.range(extent.first, extent.count);
        let (first, last) = (start / 512, ((start + len) / 512).saturating_sub(1));
        let lead = if at == 0 { "" } else { ", " };
        text.push_str(&match first == last {
            true => format!("{lead}{first}"),
            false => format!("{lead}{first}-{last}"),
        });
    }
    match more {
        0 => text,
        1 => text + " and 1 more range",
        more => format!("{text} and {more} more ranges"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::Extent;

    #[test]
    fn sectors_are_named_in_ranges_and_the_rest_is_counted() {
        let geometry = Geometry::new((1 << 20) + 512, 12).unwrap();
        let set = |blocks: &[(u64, u64)]| -> BlockSet {
            blocks.iter().map(|(first, count)| Extent { first: *first, count: *count }).collect()
        };
        assert_eq!(sectors(&set(&[(1, 2), (5, 1)]), geometry, 9), "8-23, 40-47");
        assert_eq!(sectors(&set(&[(255, 2)]), geometry, 9), "2040-2048", "the last block is cut short");
        assert_eq!(sectors(&set(&[(256, 1)]), geometry, 9), "2048");
        assert_eq!(sectors(&set(&[(1, 1), (3, 1), (5, 1)]), geometry, 1), "8-15 and 2 more ranges");
        assert_eq!(sectors(&set(&[(1, 1), (3, 1)]), geometry, 1), "8-15 and 1 more range");
        assert_eq!(sectors(&set(&[]), geometry, 1), "");
    }
}
