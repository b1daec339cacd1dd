//! What a tracker says of itself in its pinned `meta` map: which tracker it is, since when its pending blocks are
//! complete, and which doubts were raised.
//!
//! What must never happen here: a doubt that is accounted for before it is raised, or a base stored after the pending
//! blocks it goes with. The process can be killed between any two stores.

use blxrep_ebpf::{meta as slot, state};

use super::audit::Reading;
use super::words::Words;
use super::{Claim, Gap, drain};
use crate::bitmap::BlockSet;
use crate::ids::{CheckpointId, Epoch};

/// Number of this layout of `meta` and of its meaning.
const LAYOUT: u64 = 1;
/// The slots of an identity.
const IDENTITY_SLOTS: usize = slot::IDENTITY_END - slot::IDENTITY;

/// Everything that must be the same for a pinned tracker to be taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) diskseq: u64,
    pub(super) size_bytes: u64,
    pub(super) block_shift: u8,
    pub(super) request_based: bool,
    pub(super) boot_id: u128,
    /// Of the object's bytes.
    pub(super) object_hash: u128,
}

impl Identity {
    fn words(&self) -> [u64; IDENTITY_SLOTS] {
        [
            LAYOUT,
            u64::from(self.major) << 32 | u64::from(self.minor),
            self.diskseq,
            self.size_bytes,
            self.block_shift.into(),
            self.request_based.into(),
            self.boot_id as u64,
            (self.boot_id >> 64) as u64,
            self.object_hash as u64,
            (self.object_hash >> 64) as u64,
        ]
    }
}

/// What was seen in one look at everything that may raise a doubt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) size_bytes: u64,
    pub(super) diskseq: u64,
    pub(super) state: [u64; state::SLOTS],
    /// Skipped runs of copy a and b, probe by probe.
    pub(super) misses: Vec<[u64; 2]>,
}

/// What a look brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Found {
    /// A gap was raised.
    pub(super) gap: bool,
    /// Copy a, which counts the sectors, was skipped: the audit's baseline is void.
    pub(super) uncounted: bool,
}

/// The words of the `meta` map.
pub(super) struct Meta<'a, W: Words + ?Sized>(pub(super) &'a W);

impl<W: Words + ?Sized> Meta<'_, W> {
    /// Fills everything but the magic for a new tracker.
    pub(super) fn begin(&self, identity: &Identity, epoch: Epoch, pin_ids: &[u64]) {
        self.0.store(slot::MAGIC, 0);
        for (index, word) in (slot::IDENTITY..).zip(identity.words()) {
            self.0.store(index, word);
        }
        let epoch = u128::from_le_bytes(epoch.0);
        self.0.store(slot::EPOCH_LOW, epoch as u64);
        self.0.store(slot::EPOCH_HIGH, (epoch >> 64) as u64);
        self.0.store(slot::SEEN_SIZE, identity.size_bytes);
        self.0.store(slot::SEEN_DISKSEQ, identity.diskseq);
        for (index, id) in (slot::PIN_IDS..slot::ENTRIES).zip(pin_ids) {
            self.0.store(index, *id);
        }
        self.raise(Gap::NewTracker);
    }

    /// The last store of a creation: from now on the tracker is whole.
    pub(super) fn finish(&self) {
        self.0.store(slot::MAGIC, slot::MAGIC_VALUE);
    }

    /// Whether this is a whole tracker with this identity, made of these maps and programs.
    pub(super) fn is(&self, identity: &Identity, pin_ids: &[u64]) -> bool {
        self.0.load(slot::MAGIC) == slot::MAGIC_VALUE
            && (slot::IDENTITY..).zip(identity.words()).all(|(index, word)| self.0.load(index) == word)
            && (slot::PIN_IDS..).zip(pin_ids).all(|(index, id)| self.0.load(index) == *id)
    }

    pub(super) fn epoch(&self) -> Epoch {
        let (low, high) = (self.0.load(slot::EPOCH_LOW), self.0.load(slot::EPOCH_HIGH));
        Epoch((u128::from(low) | u128::from(high) << 64).to_le_bytes())
    }

    pub(super) fn claim(&self) -> Claim {
        let base = CheckpointId::from_u64(self.0.load(slot::BASE));
        Claim { epoch: self.epoch(), base, gap: Gap::from_code(self.0.load(slot::GAP)) }
    }

    pub(super) fn gap_count(&self) -> u64 {
        self.0.load(slot::GAP_COUNT)
    }

    pub(super) fn raise(&self, gap: Gap) {
        self.0.store(slot::GAP, gap.code());
        self.0.store(slot::GAP_COUNT, self.gap_count().wrapping_add(1));
    }

    /// Raises a gap for everything new in a look, and only then remembers it as seen. `before` are the skipped runs of the
    /// look before, empty for the first.
    pub(super) fn account(&self, look: &Look, before: &[[u64; 2]]) -> Found {
        let mut found = Found::default();
        let mut news = |index: usize, now: u64, gap: Option<Gap>| {
            let is_new = self.0.load(index) != now;
            if let Some(gap) = gap.filter(|_| is_new) {
                self.raise(gap);
                found.gap = true;
            }
            is_new
        };
        let mut seen = Vec::new();
        let alone = [
            (slot::SEEN_SIZE, look.size_bytes, Gap::Resized),
            (slot::SEEN_DISKSEQ, look.diskseq, Gap::MediumChanged),
        ];
        let state = look.state.iter().enumerate().map(|(i, n)| (slot::SEEN_STATE + i, *n, gap_of_state(i)));
        for (index, now, gap) in alone.into_iter().chain(state) {
            if news(index, now, Some(gap)) {
                seen.push((index, now));
            }
        }
        let mut uncounted = false;
        for (nth, (index, [a, b])) in (slot::SEEN_MISSES..).step_by(2).zip(&look.misses).enumerate() {
            // A write is lost only if both copies were skipped for it, and then both counts rose.
            let a_rose = news(index, *a, None);
            let b_rose = news(index + 1, *b, a_rose.then_some(Gap::SkippedRuns));
            uncounted |= a_rose;
            // One count that rose alone is forgotten a look later: the other may be about to follow.
            let settled = if a_rose && b_rose { Some(&[*a, *b]) } else { before.get(nth) };
            if let Some([a, b]) = settled {
                seen.extend([(index, *a), (index + 1, *b)]);
            }
        }
        for (index, now) in seen {
            self.0.store(index, now);
        }
        Found { uncounted, ..found }
    }

    /// The audit's readings.
    pub(super) fn readings(&self) -> Vec<Reading> {
        let count = usize::try_from(self.0.load(slot::AUDIT_VALID)).unwrap_or(0).min(slot::AUDIT_READINGS);
        let words = |nth: usize| std::array::from_fn(|word| self.0.load(reading_slot(nth) + word));
        (0..count).map(|nth| Reading::from_words(words(nth))).collect()
    }

    /// Keeps a reading in place of the oldest.
    pub(super) fn keep_reading(&self, reading: Reading) {
        let count = self.0.load(slot::AUDIT_VALID);
        let next = usize::try_from(self.0.load(slot::AUDIT_NEXT)).unwrap_or(0) % slot::AUDIT_READINGS;
        // While it is half written there are too few to judge by.
        self.forget_readings();
        for (index, word) in (reading_slot(next)..).zip(reading.to_words()) {
            self.0.store(index, word);
        }
        self.0.store(slot::AUDIT_NEXT, (next as u64 + 1) % slot::AUDIT_READINGS as u64);
        self.0.store(slot::AUDIT_VALID, (count + 1).min(slot::AUDIT_READINGS as u64));
    }

    /// The probe did not count something: no reading before this is worth anything.
    pub(super) fn forget_readings(&self) {
        self.0.store(slot::AUDIT_VALID, 0);
    }

    /// Stores that the dispatcher has committed `id`. The base comes first: killed after it, pending is more than what
    /// changed since the base, never less.
    pub(super) fn commit(&self, pending: &W, id: CheckpointId, keep: &BlockSet, heals: bool) {
        self.0.store(slot::BASE, id.to_u64());
        drain::replace(pending, keep);
        if heals {
            self.0.store(slot::GAP, 0);
        }
    }
}

fn reading_slot(nth: usize) -> usize {
    slot::AUDIT_BASE + nth * slot::AUDIT_WORDS
}

fn gap_of_state(index: usize) -> Gap {
    match index {
        state::PASSTHROUGH => Gap::Passthrough,
        state::TABLE_FULL => Gap::TableFull,
        state::DISCARD_TOO_LONG => Gap::DiscardTooLong,
        state::BEYOND_END => Gap::Resized,
        _ => Gap::SkippedRuns,
    }
}

#[cfg(test)]
mod tests {
    use super::super::words::fake::{FakeWords, Life};
    use super::*;
    use crate::bitmap::Extent;

    const IDENTITY: Identity = Identity {
        major: 7,
        minor: 3,
        diskseq: 90,
        size_bytes: 1 << 30,
        block_shift: 12,
        request_based: true,
        boot_id: 1 << 100 | 5,
        object_hash: 77,
    };

    fn words(life: &Life) -> FakeWords {
        FakeWords::new("meta", vec![0; slot::ENTRIES], life)
    }

    fn begun(life: &Life) -> FakeWords {
        let words = words(life);
        Meta(&words).begin(&IDENTITY, Epoch([9; 16]), &[1, 2, 3]);
        Meta(&words).finish();
        words
    }

    fn look() -> Look {
        Look { size_bytes: 1 << 30, diskseq: 90, state: [0; state::SLOTS], misses: vec![[0, 0], [0, 0]] }
    }

    fn id(second: i64) -> CheckpointId {
        CheckpointId::next(second, None)
    }

    #[test]
    fn a_creation_killed_after_any_store_is_not_a_whole_tracker() {
        let whole = begun(&Life::default());
        let stores = whole.life.log().len() as u64;
        assert!(Meta(&whole).is(&IDENTITY, &[1, 2, 3]));
        assert_eq!(Meta(&whole).claim().gap, Some(Gap::NewTracker));
        assert_eq!(Meta(&whole).epoch(), Epoch([9; 16]));
        for budget in 0..stores {
            let part = begun(&Life::until(budget));
            assert!(!Meta(&part).is(&IDENTITY, &[1, 2, 3]), "killed after {budget} of {stores} stores");
        }
    }

    #[test]
    fn every_part_of_the_identity_counts() {
        let whole = begun(&Life::default());
        let meta = Meta(&whole);
        let others = [
            Identity { major: 8, ..IDENTITY },
            Identity { minor: 4, ..IDENTITY },
            Identity { diskseq: 91, ..IDENTITY },
            Identity { size_bytes: 512, ..IDENTITY },
            Identity { block_shift: 9, ..IDENTITY },
            Identity { request_based: false, ..IDENTITY },
            Identity { boot_id: 5, ..IDENTITY },
            Identity { boot_id: 1 << 100, ..IDENTITY },
            Identity { object_hash: 77 | 1 << 64, ..IDENTITY },
            Identity { object_hash: 78, ..IDENTITY },
        ];
        assert!(others.iter().all(|other| !meta.is(other, &[1, 2, 3])));
        assert!(!meta.is(&IDENTITY, &[1, 2, 4]), "a map of another tracker");
    }

    #[test]
    fn a_commit_killed_after_any_store_never_claims_too_little() {
        // Block 5 was committed with the new base, blocks 70 and 130 were drained after it.
        let keep: BlockSet =
            [Extent { first: 70, count: 1 }, Extent { first: 130, count: 1 }].into_iter().collect();
        for budget in 0..6 {
            let life = Life::default();
            let before = begun(&life).words.into_inner();
            let life = Life::until(budget);
            let meta = FakeWords::new("meta", before, &life);
            let pending = FakeWords::new("pending", vec![1 << 5, 1 << 6, 1 << 2], &life);
            Meta(&meta).commit(&pending, id(100), &keep, true);
            let left = drain::blocks_of(&pending, 192);
            assert!(left.contains(70) && left.contains(130));
            let claim = Meta(&meta).claim();
            assert!(left.contains(5) || claim.base == Some(id(100)), "killed after {budget} stores");
            assert!(claim.gap.is_some() || (claim.base == Some(id(100)) && left == keep));
        }
        let life = Life::default();
        let (meta, pending) = (words(&life), FakeWords::new("pending", vec![1 << 5, 0, 0], &life));
        Meta(&meta).commit(&pending, id(100), &keep, false);
        assert_eq!(life.log().first(), Some(&("meta", slot::BASE)));
    }

    #[test]
    fn a_doubt_survives_a_kill_between_any_two_stores() {
        let doubtful = Look { state: [0, 1, 0, 0, 0], ..look() };
        for budget in 0..5 {
            let before = begun(&Life::default()).words.into_inner();
            let meta = FakeWords::new("meta", before, &Life::until(budget));
            meta.words.borrow_mut()[slot::GAP] = 0;
            Meta(&meta).account(&doubtful, &[]);
            let meta = FakeWords::new("meta", meta.words.into_inner(), &Life::default());
            Meta(&meta).account(&doubtful, &[]);
            assert_eq!(Meta(&meta).claim().gap, Some(Gap::TableFull), "killed after {budget} stores");
        }
    }

    #[test]
    fn every_doubt_raises_its_gap_once() {
        let state = |slot: usize| {
            let mut look = look();
            look.state[slot] = 3;
            look
        };
        let cases = [
            (state(state::PASSTHROUGH), Gap::Passthrough),
            (state(state::TABLE_FULL), Gap::TableFull),
            (state(state::DISCARD_TOO_LONG), Gap::DiscardTooLong),
            (state(state::BEYOND_END), Gap::Resized),
            (state(state::LOST_COMPLETION), Gap::SkippedRuns),
            (Look { size_bytes: 512, ..look() }, Gap::Resized),
            (Look { diskseq: 91, ..look() }, Gap::MediumChanged),
            (Look { misses: vec![[0, 0], [2, 1]], ..look() }, Gap::SkippedRuns),
        ];
        for (doubtful, gap) in cases {
            let words = begun(&Life::default());
            let meta = Meta(&words);
            assert!(!meta.account(&look(), &[]).gap);
            assert!(meta.account(&doubtful, &[]).gap, "{gap:?}");
            assert_eq!((meta.claim().gap, meta.gap_count()), (Some(gap), 2));
            assert!(!meta.account(&doubtful, &[]).gap, "{gap:?} again");
        }
    }

    #[test]
    fn one_copy_skipped_is_no_gap_unless_the_other_follows() {
        let words = begun(&Life::default());
        let meta = Meta(&words);
        let at = |a, b| Look { misses: vec![[a, b]], ..look() };
        let found = meta.account(&at(1, 0), &[[0, 0]]);
        assert_eq!(found, Found { gap: false, uncounted: true });
        assert!(meta.account(&at(1, 1), &[[1, 0]]).gap, "b follows by the next look");
        assert!(!meta.account(&at(2, 1), &[[1, 1]]).gap);
        assert!(!meta.account(&at(2, 1), &[[2, 1]]).gap);
        assert_eq!(meta.account(&at(2, 2), &[[2, 1]]), Found::default(), "long after: another event");
    }
}
