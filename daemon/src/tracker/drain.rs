//! Moving marked blocks from `live` to `pending`, and out of `pending`.
//!
//! What must never happen here: a bit that is, for one instant, in neither bitmap. So `pending` gets it first, and
//! `live` loses only what `pending` has; being killed between any two instructions leaves it in one of them or both.

use std::iter;

use blxrep_ebpf::COARSE_GROUP_WORDS;

use super::words::Words;
use crate::bitmap::{BlockSet, Extent};

const WORD_BITS: u64 = u64::BITS as u64;

/// Moves everything in `live` and `coarse` into `pending` and returns it. `blocks` is how many there are.
pub fn drain<W: Words + ?Sized>(live: &W, coarse: &W, pending: &W, blocks: u64) -> BlockSet {
    let mut found = Runs::new(blocks);
    for word in 0..live.len() {
        let bits = live.load(word);
        if bits != 0 {
            pending.set(word, bits);
            live.clear(word, bits);
            found.add(word, bits);
        }
    }
    let mut set = found.finish();
    set.union(&drain_coarse(coarse, pending, blocks));
    set
}

fn drain_coarse<W: Words + ?Sized>(coarse: &W, pending: &W, blocks: u64) -> BlockSet {
    let mut found = Runs::new(blocks);
    for index in 0..coarse.len() {
        let groups = coarse.load(index);
        if groups == 0 {
            continue;
        }
        for bit in bits_of(groups) {
            let first = (index * WORD_BITS as usize + bit) * COARSE_GROUP_WORDS;
            for word in first..(first + COARSE_GROUP_WORDS).min(pending.len()) {
                pending.set(word, u64::MAX);
                found.add(word, u64::MAX);
            }
        }
        coarse.clear(index, groups);
    }
    found.finish()
}

/// The blocks of a bitmap. `blocks` is how many there are; bits behind the last count for nothing.
pub fn blocks_of<W: Words + ?Sized>(bitmap: &W, blocks: u64) -> BlockSet {
    let mut found = Runs::new(blocks);
    for word in 0..bitmap.len() {
        let bits = bitmap.load(word);
        if bits != 0 {
            found.add(word, bits);
        }
    }
    found.finish()
}

/// Makes a bitmap hold exactly `keep`, word by word: at every moment each word is the old or the new one.
pub fn replace<W: Words + ?Sized>(bitmap: &W, keep: &BlockSet) {
    let mut kept = keep.iter().peekable();
    for word in 0..bitmap.len() {
        let end = (word as u64 + 1) * WORD_BITS;
        let mut bits = 0;
        while let Some(block) = kept.next_if(|block| *block < end) {
            bits |= 1 << (block % WORD_BITS);
        }
        if bitmap.load(word) != bits {
            bitmap.store(word, bits);
        }
    }
}

fn bits_of(mut bits: u64) -> impl Iterator<Item = usize> {
    iter::from_fn(move || {
        let bit = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(bit)
    })
}

/// Collects the bits of ascending words as extents, joined across words.
struct Runs {
    set: BlockSet,
    open: Extent,
    blocks: u64,
}

impl Runs {
    fn new(blocks: u64) -> Self {
        Self { set: BlockSet::new(), open: Extent { first: 0, count: 0 }, blocks }
    }

    fn add(&mut self, word: usize, mut bits: u64) {
        let base = word as u64 * WORD_BITS;
        while bits != 0 {
            let start = bits.trailing_zeros();
            let count = (bits >> start).trailing_ones();
            self.push(Extent { first: base + u64::from(start), count: u64::from(count) });
            bits &= u64::MAX.checked_shl(start + count).unwrap_or(0);
        }
    }

    fn push(&mut self, extent: Extent) {
        if self.open.end() == extent.first {
            self.open.count += extent.count;
        } else {
            self.close();
            self.open = extent;
        }
    }

    fn close(&mut self) {
        let Extent { first, .. } = self.open;
        let count = self.open.end().min(self.blocks).saturating_sub(first);
        if count > 0 {
            self.set.insert(Extent { first, count });
        }
    }

    fn finish(mut self) -> BlockSet {
        self.close();
        self.set
    }
}

#[cfg(test)]
mod tests {
    use super::super::words::fake::{FakeWords, Life};
    use super::*;
    use proptest::prelude::*;

    fn bitmap(name: &'static str, words: usize, blocks: &[u64], life: &Life) -> FakeWords {
        let mut out = vec![0; words];
        for block in blocks {
            out[(block / 64) as usize] |= 1 << (block % 64);
        }
        FakeWords::new(name, out, life)
    }

    fn set(blocks: impl IntoIterator<Item = u64>) -> BlockSet {
        blocks.into_iter().map(|first| Extent { first, count: 1 }).collect()
    }

    #[test]
    fn a_drain_killed_after_any_write_loses_nothing() {
        let (marked, before) = ([1, 63, 64, 65, 700, 9000], [2, 64]);
        let whole: BlockSet = [Extent { first: 4096, count: 4096 }].into_iter().collect();
        let mut all = set(marked.into_iter().chain(before));
        all.union(&whole);
        for budget in 0..200 {
            let life = Life::until(budget);
            let live = bitmap("live", 141, &marked, &life);
            let coarse = bitmap("coarse", 1, &[1], &life);
            let pending = bitmap("pending", 141, &before, &life);
            drain(&live, &coarse, &pending, 9010);
            let life = Life::default();
            let again = |w: &FakeWords| FakeWords::new(w.name, w.words.borrow().clone(), &life);
            let (live, coarse, pending) = (again(&live), again(&coarse), again(&pending));
            drain(&live, &coarse, &pending, 9010);
            assert_eq!(blocks_of(&pending, 9010), all, "killed after {budget} writes");
            assert!(drain(&live, &coarse, &pending, 9010).is_empty());
        }
    }

    #[test]
    fn the_last_group_and_word_end_where_the_disk_does() {
        let life = Life::default();
        let live = bitmap("live", 66, &[4200], &life);
        let coarse = bitmap("coarse", 1, &[0, 1], &life);
        let pending = bitmap("pending", 66, &[], &life);
        let drained = drain(&live, &coarse, &pending, 4201);
        assert_eq!(drained.extents(u64::MAX).collect::<Vec<_>>(), [Extent { first: 0, count: 4201 }]);
        assert_eq!(blocks_of(&pending, 4201), drained);
    }

    /// A live bitmap into which the probe sets another bit of a word just before that word is cleared.
    struct Racing(FakeWords);

    impl Words for Racing {
        fn len(&self) -> usize {
            self.0.len()
        }
        fn load(&self, index: usize) -> u64 {
            self.0.load(index)
        }
        fn store(&self, index: usize, value: u64) {
            self.0.store(index, value);
        }
        fn set(&self, index: usize, bits: u64) {
            self.0.set(index, bits);
        }
        fn clear(&self, index: usize, bits: u64) {
            if self.0.name == "live" || self.0.name == "coarse" {
                self.0.set(index, 1 << 9);
            }
            self.0.clear(index, bits);
        }
    }

    #[test]
    fn a_bit_set_while_its_word_is_drained_stays_for_the_next_drain() {
        let life = Life::default();
        let live = Racing(bitmap("live", 1000, &[1], &life));
        let coarse = Racing(bitmap("coarse", 1, &[1], &life));
        let pending = Racing(bitmap("pending", 1000, &[], &life));
        assert!(!drain(&live, &coarse, &pending, 64_000).contains(9));
        let drained = drain(&live, &coarse, &pending, 64_000);
        assert!(drained.contains(9), "set in live");
        assert!(drained.contains(9 * 4096), "set in coarse");
    }

    proptest! {
        #[test]
        fn drained_is_what_was_marked(marked in proptest::collection::btree_set(0u64..5000, 0..300), before in proptest::collection::btree_set(0u64..5000, 0..300)) {
            let life = Life::default();
            let live = bitmap("live", 79, &marked.iter().copied().collect::<Vec<_>>(), &life);
            let coarse = bitmap("coarse", 1, &[], &life);
            let pending = bitmap("pending", 79, &before.iter().copied().collect::<Vec<_>>(), &life);
            prop_assert_eq!(drain(&live, &coarse, &pending, 5000), set(marked.iter().copied()));
            prop_assert_eq!(blocks_of(&pending, 5000), set(marked.union(&before).copied()));
            prop_assert!(blocks_of(&live, 5000).is_empty());
            replace(&pending, &set(before.iter().copied()));
            prop_assert_eq!(blocks_of(&pending, 5000), set(before));
        }
    }
}
