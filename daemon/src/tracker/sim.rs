//! A tracker in memory, for tests of what is above it.

use std::sync::{Arc, Mutex};

use super::{Claim, Gap, Tracker, TrackerError};
use crate::bitmap::{BlockSet, Extent};
use crate::ids::{CheckpointId, Epoch};

struct State {
    epoch: Epoch,
    live: BlockSet,
    pending: BlockSet,
    base: Option<CheckpointId>,
    gap: Option<Gap>,
    gap_count: u64,
    fails_once: bool,
    written_blocks: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            epoch: Epoch([7; 16]),
            live: BlockSet::new(),
            pending: BlockSet::new(),
            base: None,
            gap: None,
            gap_count: 0,
            fails_once: false,
            written_blocks: 0,
        }
    }
}

/// Clones share one state: keep one to write with while another is the tracker.
#[derive(Clone, Default)]
pub(crate) struct SimTracker(Arc<Mutex<State>>);

impl SimTracker {
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.0.lock().unwrap())
    }

    /// A write of these blocks has completed.
    pub(crate) fn complete(&self, extent: Extent) {
        self.with(|s| {
            s.live.insert(extent);
            s.written_blocks += extent.count;
        });
    }

    /// The next time it is asked for its claim, it fails.
    pub(crate) fn fail_once(&self) {
        self.with(|s| s.fails_once = true);
    }

    /// The tracker is not certain any more.
    pub(crate) fn raise(&self, gap: Gap) {
        self.with(|s| {
            s.gap = Some(gap);
            s.gap_count += 1;
        });
    }
}

impl SimTracker {
    /// The machine starts: tracking begins anew.
    pub(crate) fn reboot(&self, epoch: u8) {
        self.with(|s| *s = State { epoch: Epoch([epoch; 16]), ..State::default() });
        self.raise(Gap::NewTracker);
    }
}

impl Tracker for SimTracker {
    fn drain(&mut self) -> Result<BlockSet, TrackerError> {
        Ok(self.with(|s| {
            let live = std::mem::take(&mut s.live);
            s.pending.union(&live);
            live
        }))
    }

    fn pending(&mut self) -> Result<BlockSet, TrackerError> {
        Ok(self.with(|s| s.pending.clone()))
    }

    fn commit(&mut self, id: CheckpointId, keep: &BlockSet, healed: Option<u64>) -> Result<(), TrackerError> {
        self.with(|s| {
            s.pending = keep.clone();
            s.base = Some(id);
            s.gap = s.gap.filter(|_| healed != Some(s.gap_count));
        });
        Ok(())
    }

    fn claim(&mut self) -> Result<Claim, TrackerError> {
        self.with(|s| match std::mem::take(&mut s.fails_once) {
            true => Err(TrackerError::Closed),
            false => Ok(Claim { epoch: s.epoch, base: s.base, gap: s.gap }),
        })
    }

    fn order_compare(&mut self) -> Result<(), TrackerError> {
        self.raise(Gap::Ordered);
        Ok(())
    }

    fn gap_count(&self) -> u64 {
        self.with(|s| s.gap_count)
    }

    fn written_bytes(&mut self) -> u64 {
        self.with(|s| s.written_blocks * 4096)
    }
}

#[test]
fn pending_is_kept_until_the_commit_and_a_gap_until_it_is_healed() {
    let extent = Extent { first: 3, count: 2 };
    let mut tracker = SimTracker::default();
    tracker.complete(extent);
    assert!(tracker.pending().unwrap().is_empty());
    assert_eq!(tracker.drain().unwrap(), [extent].into_iter().collect());
    assert_eq!(tracker.pending().unwrap().len(), 2);
    tracker.raise(Gap::Audit);
    let keep: BlockSet = [Extent { first: 4, count: 1 }].into_iter().collect();
    let id = CheckpointId::next(1, None);
    tracker.commit(id, &keep, None).unwrap();
    assert_eq!(tracker.pending().unwrap(), keep);
    let claim = tracker.claim().unwrap();
    assert_eq!((claim.base, claim.gap, tracker.gap_count()), (Some(id), Some(Gap::Audit), 1));
    tracker.raise(Gap::Ordered);
    tracker.commit(id, &keep, Some(1)).unwrap();
    assert_eq!(tracker.claim().unwrap().gap, Some(Gap::Ordered), "raised behind the compare");
    tracker.commit(id, &keep, Some(2)).unwrap();
    assert_eq!(tracker.claim().unwrap().gap, None);
    assert_eq!(tracker.written_bytes(), 2 * 4096);
}
