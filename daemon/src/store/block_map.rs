//! Which record holds the newest data of which blocks. Pure.

use std::collections::BTreeMap;

use crate::bitmap::{BlockSet, Extent};

/// Consecutive blocks whose newest data lies in one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The blocks.
    pub extent: Extent,
    /// Blocks of the record's run before the first one.
    pub skip: u64,
    /// The delta the record is in: its place in the chain.
    pub layer: u32,
    /// The record's sequence number.
    pub seq: u64,
    /// Where the record begins in its file, in bytes; 0, where no record can be, for blocks that became zeros because
    /// the disk ended before them.
    pub record: u64,
}

impl Piece {
    /// Whether the blocks are zeros of which no record says so.
    pub fn is_behind_the_end(&self) -> bool {
        self.record == 0
    }

    fn rank(&self) -> (u32, u64, u64) {
        (self.layer, self.seq, self.record)
    }

    fn cut(&self, first: u64, end: u64) -> Self {
        let skip = self.skip + (first - self.extent.first);
        Self { extent: Extent { first, count: end - first }, skip, ..*self }
    }
}

/// For every block the piece with the highest (layer, sequence number, offset).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockMap(BTreeMap<u64, Piece>);

impl BlockMap {
    /// Adds a piece; it hides older ones and is hidden by newer ones.
    pub fn insert(&mut self, new: Piece) {
        let (start, end) = (new.extent.first, new.extent.end());
        let mut at = start;
        for old in self.overlapping(start, end) {
            self.0.remove(&old.extent.first);
            let (old_first, old_end) = (old.extent.first, old.extent.end());
            let (low, high) = (old_first.max(start), old_end.min(end));
            self.put(old.cut(old_first.min(low), low));
            self.put(new.cut(at, low));
            self.put(if new.rank() >= old.rank() { new.cut(low, high) } else { old.cut(low, high) });
            self.put(old.cut(high, old_end));
            at = high;
        }
        self.put(new.cut(at, end));
    }

    /// Lays the blocks of the next checkpoint, as layer `layer`, over those of the ones before. `end` is the number of its
    /// blocks, `end_before` that of the checkpoint before. What was behind the end of a disk does not come back when it
    /// grows again.
    pub fn lay(&mut self, layer: u32, map: &BlockMap, end_before: u64, end: u64) {
        if end < end_before {
            let extent = Extent { first: end, count: end_before - end };
            self.insert(Piece { extent, skip: 0, layer, seq: 0, record: 0 });
        }
        map.pieces().for_each(|piece| self.insert(Piece { layer, ..*piece }));
    }

    fn overlapping(&self, start: u64, end: u64) -> Vec<Piece> {
        let before = self.0.range(..start).next_back().map(|(_, p)| *p).filter(|p| p.extent.end() > start);
        before.into_iter().chain(self.0.range(start..end).map(|(_, p)| *p)).collect()
    }

    fn put(&mut self, piece: Piece) {
        if piece.extent.count == 0 {
            return;
        }
        if let Some((_, last)) = self.0.range_mut(..piece.extent.first).next_back()
            && last.extent.end() == piece.extent.first
            && last.rank() == piece.rank()
            && last.skip + last.extent.count == piece.skip
        {
            last.extent.count += piece.extent.count;
        } else {
            self.0.insert(piece.extent.first, piece);
        }
    }

    /// All pieces in ascending order.
    pub fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.0.values()
    }

    /// The pieces that lie in these blocks, cut to them.
    pub fn within(&self, extent: Extent) -> Vec<Piece> {
        let cut = |p: Piece| p.cut(p.extent.first.max(extent.first), p.extent.end().min(extent.end()));
        self.overlapping(extent.first, extent.end()).into_iter().map(cut).collect()
    }

    /// Whether any of these blocks is in the map.
    pub fn touches(&self, extent: Extent) -> bool {
        let before = self.0.range(..extent.end()).next_back();
        before.is_some_and(|(_, p)| p.extent.end() > extent.first)
    }

    /// The blocks in the map.
    pub fn blocks(&self) -> BlockSet {
        self.0.values().map(|p| p.extent).collect()
    }

    /// The number of pieces.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is in the map.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_block_is_in_the_newest_record_that_holds_it(
            runs in proptest::collection::vec((0u64..60, 1u64..20, 0u64..8), 0..40)
        ) {
            let mut map = BlockMap::default();
            let mut model: BTreeMap<u64, (u64, u64, u64)> = BTreeMap::new();
            for (offset, (first, count, seq)) in runs.into_iter().enumerate() {
                let record = offset as u64;
                map.insert(Piece { extent: Extent { first, count }, skip: 0, layer: 0, seq, record });
                for b in first..first + count {
                    let entry = model.entry(b).or_insert((seq, record, b - first));
                    if (seq, record) >= (entry.0, entry.1) { *entry = (seq, record, b - first); }
                }
            }
            let mut seen = BTreeMap::new();
            for p in map.pieces() {
                for i in 0..p.extent.count {
                    prop_assert!(seen.insert(p.extent.first + i, (p.seq, p.record, p.skip + i)).is_none());
                }
            }
            prop_assert_eq!(seen, model);
            let part = Extent { first: 10, count: 13 };
            let inside: u64 = map.within(part).iter().map(|p| p.extent.count).sum();
            prop_assert_eq!(inside, map.blocks().iter().filter(|b| (10..23).contains(b)).count() as u64);
            prop_assert_eq!(map.touches(part), inside > 0);
        }
    }

    #[test]
    fn what_a_smaller_disk_cut_off_stays_zeros_when_it_grows_again() {
        let piece = |first, count, record| {
            let mut map = BlockMap::default();
            map.insert(Piece { extent: Extent { first, count }, skip: 0, layer: 0, seq: 9, record });
            map
        };
        let mut map = BlockMap::default();
        map.lay(0, &piece(2, 8, 1024), 10, 10);
        map.lay(1, &piece(0, 1, 1024), 10, 4);
        map.lay(2, &piece(6, 1, 2048), 4, 12);
        let found: Vec<_> =
            map.pieces().map(|p| (p.extent.first, p.extent.count, p.layer, p.record)).collect();
        assert_eq!(found, [(0, 1, 1, 1024), (2, 2, 0, 1024), (4, 2, 1, 0), (6, 1, 2, 2048), (7, 3, 1, 0)]);
        assert!(map.within(Extent { first: 4, count: 2 }).iter().all(Piece::is_behind_the_end));
    }
}
