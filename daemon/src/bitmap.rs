//! Sets of blocks and the extents they are made of.

use roaring::RoaringTreemap;
use serde::{Deserialize, Serialize};

/// Consecutive blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// The first block.
    pub first: u64,
    /// How many; never 0 in what this crate makes.
    pub count: u64,
}

impl Extent {
    /// The block behind the last; saturates on nonsense from outside.
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// A set of blocks, small where it is sparse or made of long runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BlockSet(RoaringTreemap);

impl BlockSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an extent.
    pub fn insert(&mut self, extent: Extent) {
        self.0.insert_range(extent.first..extent.end());
    }

    /// Takes an extent out.
    pub fn remove(&mut self, extent: Extent) {
        self.0.remove_range(extent.first..extent.end());
    }

    /// Adds all blocks of another set.
    pub fn union(&mut self, other: &Self) {
        self.0 |= &other.0;
    }

    /// Takes all blocks of another set out.
    pub fn subtract(&mut self, other: &Self) {
        self.0 -= &other.0;
    }

    /// Whether the block is in the set.
    pub fn contains(&self, block: u64) -> bool {
        self.0.contains(block)
    }

    /// The number of blocks.
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether there is no block.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The blocks as extents in ascending order, none longer than `max` blocks and none crossing a multiple of
    /// `max` (pass `u64::MAX` for whole runs).
    pub fn extents(&self, max: u64) -> impl Iterator<Item = Extent> + '_ {
        let max = max.max(1);
        let mut blocks = self.0.iter().peekable();
        std::iter::from_fn(move || {
            let first = blocks.next()?;
            let border = (first / max).saturating_add(1).saturating_mul(max);
            let mut end = first + 1;
            while end < border && blocks.next_if_eq(&end).is_some() {
                end += 1;
            }
            Some(Extent { first, count: end - first })
        })
    }

    /// The first extent of at most `max` blocks that crosses no multiple of `max`.
    pub fn first_extent(&self, max: u64) -> Option<Extent> {
        self.extents(max).next()
    }

    /// The blocks in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter()
    }
}

impl FromIterator<Extent> for BlockSet {
    fn from_iter<T: IntoIterator<Item = Extent>>(extents: T) -> Self {
        let mut set = Self::new();
        extents.into_iter().for_each(|e| set.insert(e));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(first: u64, count: u64) -> Extent {
        Extent { first, count }
    }

    #[test]
    fn extents_are_cut_at_borders() {
        let set: BlockSet = [extent(2, 9), extent(20, 1)].into_iter().collect();
        assert_eq!(
            set.extents(4).collect::<Vec<_>>(),
            [extent(2, 2), extent(4, 4), extent(8, 3), extent(20, 1)]
        );
        assert_eq!(set.extents(u64::MAX).collect::<Vec<_>>(), [extent(2, 9), extent(20, 1)]);
        assert_eq!(set.len(), 10);
    }

    proptest! {
        #[test]
        fn a_set_is_the_union_of_its_extents(blocks in proptest::collection::btree_set(0u64..5000, 0..200), max in 1u64..300) {
            let set: BlockSet = blocks.iter().map(|b| extent(*b, 1)).collect();
            let again: BlockSet = set.extents(max).collect();
            prop_assert_eq!(&set, &again);
            prop_assert!(set.extents(max).all(|e| e.count <= max && e.first / max == (e.end() - 1) / max));
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), blocks.into_iter().collect::<Vec<_>>());
        }
    }
}
