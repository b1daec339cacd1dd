//! What of a stored disk is brought back: all of it, or one of its partitions, in blocks and groups of its own.
//!
//! What must never happen here: bytes given out that were not checked against the store's hashes.

use crate::bitmap::BlockSet;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, hash_block, insert_unreadable};
use crate::partitions::{Partition, PartitionsError, partitions};
use crate::store::StoreError;
use crate::store::view::{Checked, View};

use super::RestoreError;

/// See the module.
pub(crate) struct Part {
    view: View,
    /// Where it begins, in blocks of the disk.
    first_block: u64,
    geometry: Geometry,
}

/// Blocks of one group of the disk.
struct Piece {
    group: u64,
    skip: usize,
    count: usize,
}

impl Part {
    /// All of the disk, or the partition of this number.
    ///
    /// # Errors
    /// Usage if there is no such partition or it does not begin at a block; Damaged; Io.
    pub(crate) fn new(view: View, partition: Option<u32>) -> Result<Self, RestoreError> {
        let disk = view.geometry();
        let Some(number) = partition else { return Ok(Self { view, first_block: 0, geometry: disk }) };
        let usage = |text: String| Err(RestoreError::Usage(text));
        let found = match partitions(|offset, into| read(&view, offset, into), disk.size_bytes()) {
            Ok(found) => found,
            Err(PartitionsError::Read(error)) => return Err(error.into()),
            Err(error @ PartitionsError::Damaged) => return usage(error.to_string()),
        };
        let Some(found) = found.iter().find(|p| p.number == number) else {
            let there: Vec<String> =
                found.iter().map(|Partition { number, .. }| number.to_string()).collect();
            let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
            return usage(format!("the disk has no partition {number}; there is: {there}"));
        };
        let block_bytes = disk.block_bytes() as u64;
        match Geometry::new(found.size_bytes, disk.block_shift()) {
            Ok(geometry) if found.first_byte.is_multiple_of(block_bytes) => {
                Ok(Self { view, first_block: found.first_byte / block_bytes, geometry })
            }
            _ => usage(format!(
                "partition {number} does not begin at a block of {block_bytes} bytes: restore the whole disk"
            )),
        }
    }

    /// Size and block size.
    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether any of a group's blocks may be in a delta rather than in the base image.
    pub(super) fn is_overlaid(&self, group: u64) -> bool {
        self.pieces(group).iter().any(|piece| self.view.is_overlaid(piece.group))
    }

    /// Where a group's blocks are found.
    fn pieces(&self, group: u64) -> Vec<Piece> {
        let (first, count) = self.geometry.group_extent(group);
        let (mut at, end) = (self.first_block + first, self.first_block + first + count);
        let per_group = self.geometry.group_blocks();
        let mut pieces = Vec::new();
        while at < end {
            let (group, skip) = (at / per_group, at % per_group);
            let count = (per_group - skip).min(end - at);
            pieces.push(Piece { group, skip: skip as usize, count: count as usize });
            at += count;
        }
        pieces
    }

    /// Whether the last block of a group is cut where the disk's own is not: it has another hash then.
    fn is_cut(&self, group: u64) -> bool {
        let cut = !self.geometry.size_bytes().is_multiple_of(self.geometry.block_bytes() as u64);
        cut && group + 1 == self.geometry.groups() && self.geometry != self.view.geometry()
    }

    /// The hashes of a group's blocks.
    ///
    /// # Errors
    /// Damaged; Io.
    pub(crate) fn hashes(&self, group: u64) -> Result<Vec<BlockHash>, StoreError> {
        if self.is_cut(group) {
            let count = self.geometry.group_extent(group).1 as usize;
            return Ok(self.read(group)?.map_or(vec![BlockHash::ZERO; count], |found| found.hashes));
        }
        let mut hashes = Vec::new();
        for Piece { group, skip, count } in self.pieces(group) {
            hashes.extend(self.view.hashes(group)?.into_iter().skip(skip).take(count));
        }
        Ok(hashes)
    }

    /// A group's data, every block checked. `None` if all of it is zeros that were read.
    ///
    /// # Errors
    /// Damaged; Io.
    pub(crate) fn read(&self, group: u64) -> Result<Option<Checked>, StoreError> {
        if self.geometry == self.view.geometry() {
            return self.view.read_group(group);
        }
        let block_bytes = self.geometry.block_bytes();
        let (first, count) = self.geometry.group_extent(group);
        let len = self.geometry.range(first, count).1 as usize;
        let (mut data, mut hashes) = (Vec::with_capacity(len), Vec::new());
        for Piece { group, skip, count } in self.pieces(group) {
            match self.view.read_group(group)? {
                Some(found) => {
                    let end = ((skip + count) * block_bytes).min(found.data.len());
                    data.extend_from_slice(found.data.get(skip * block_bytes..end).unwrap_or_default());
                    hashes.extend(found.hashes.into_iter().skip(skip).take(count));
                }
                None => {
                    data.resize(data.len() + count * block_bytes, 0);
                    hashes.resize(hashes.len() + count, BlockHash::ZERO);
                }
            }
        }
        data.truncate(len);
        if let Some(last) = hashes.last_mut()
            && *last != BlockHash::UNREADABLE
        {
            *last = hash_block(data.chunks(block_bytes).next_back().unwrap_or_default(), block_bytes);
        }
        let zeros = hashes.iter().all(|hash| *hash == BlockHash::ZERO);
        Ok((!zeros).then_some(Checked { data, hashes }))
    }

    /// The blocks that could not be read: looks at the hashes of all groups.
    ///
    /// # Errors
    /// Damaged; Io.
    pub(crate) fn unreadable(&self) -> Result<BlockSet, StoreError> {
        let mut found = BlockSet::new();
        for group in 0..self.geometry.groups() {
            insert_unreadable(self.geometry.group_extent(group).0, &self.hashes(group)?, &mut found);
        }
        Ok(found)
    }
}

/// Fills `into` from this byte of the disk on.
fn read(view: &View, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
    let geometry = view.geometry();
    let (mut at, mut rest) = (offset, into);
    while !rest.is_empty() {
        let group = at >> crate::geometry::GROUP_SHIFT;
        let (first, count) = geometry.group_extent(group);
        let (start, len) = geometry.range(first, count);
        let part = rest.len().min((start + len).saturating_sub(at) as usize);
        if part == 0 {
            return Err(StoreError::Refused(format!("byte {at} is not on the disk")));
        }
        let (now, later) = rest.split_at_mut(part);
        match view.read_group(group)? {
            Some(found) => {
                let bytes = found.data.iter().skip((at - start) as usize);
                now.iter_mut().zip(bytes).for_each(|(into, byte)| *into = *byte);
            }
            None => now.fill(0),
        }
        (at, rest) = (at + part as u64, later);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::hash_blocks;
    use crate::restore::Chosen;
    use crate::restore::tests::{lay, tree};
    use crate::store::life_tests::{owner, version};

    #[test]
    fn a_part_has_the_bytes_and_hashes_of_its_place() {
        let dir = lay(&tree());
        let chosen = Chosen::find(&dir.path().join("data"), &owner().agent, None, "latest").unwrap();
        let disk = chosen.view().unwrap().geometry();
        let whole = version(3);
        let (block, blocks) = (disk.block_bytes() as u64, disk.size_bytes() / disk.block_bytes() as u64);
        for first_block in [0, 1, blocks / 3, disk.group_blocks() - 1, disk.group_blocks()] {
            let rest = disk.size_bytes() - first_block * block;
            for size_bytes in [512, block, block + 512, rest / 2 / 512 * 512, rest] {
                let geometry = Geometry::new(size_bytes, disk.block_shift()).unwrap();
                let part = Part { view: chosen.view().unwrap(), first_block, geometry };
                let mut all = Vec::new();
                for group in 0..geometry.groups() {
                    let (first, count) = geometry.group_extent(group);
                    let hashes = part.hashes(group).unwrap();
                    let data = match part.read(group).unwrap() {
                        Some(found) => {
                            assert_eq!(found.hashes, hashes);
                            found.data
                        }
                        None => vec![0; geometry.range(first, count).1 as usize],
                    };
                    assert_eq!(hash_blocks(&data, block as usize), hashes, "{first_block}+{size_bytes}");
                    all.extend(data);
                }
                let start = (first_block * block) as usize;
                assert!(all == whole[start..start + size_bytes as usize], "{first_block}+{size_bytes}");
            }
        }
    }
}
