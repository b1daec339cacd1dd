//! When a disk's next checkpoint is due. Pure.

use std::time::Duration;

/// A sync that failed is tried again after this time, or after `sync-freq` if that is shorter.
const RETRY: Duration = Duration::from_secs(30);

/// The times of one disk's syncs. Times are durations on any clock that only goes forward.
#[derive(Debug)]
pub struct Schedule {
    every: Duration,
    due: Duration,
    ordered: bool,
}

impl Schedule {
    /// A disk whose first sync is due at once.
    pub fn new(every: Duration) -> Self {
        Self { every, due: Duration::ZERO, ordered: false }
    }

    /// Whether a sync is to be ordered now; it is then taken as ordered.
    pub fn take_due(&mut self, now: Duration) -> bool {
        let due = !self.ordered && now >= self.due;
        self.ordered |= due;
        due
    }

    /// Makes the next sync due at once.
    pub fn hurry(&mut self) {
        self.due = Duration::ZERO;
    }

    /// Whether a sync is under way.
    pub fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// The ordered sync was committed: the next one is due one period after this one was.
    pub fn committed(&mut self, now: Duration) {
        let next = self.due + self.every;
        self.due = if next > now { next } else { now + self.every };
        self.ordered = false;
    }

    /// The ordered sync failed.
    pub fn failed(&mut self, now: Duration) {
        self.due = now + self.every.min(RETRY);
        self.ordered = false;
    }

    /// The connection broke: whatever was ordered is due again when the disk is back.
    pub fn detached(&mut self) {
        self.ordered = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn syncs_keep_their_rhythm_and_one_at_a_time() {
        let mut schedule = Schedule::new(10 * SECOND);
        assert!(schedule.take_due(100 * SECOND));
        assert!(!schedule.take_due(100 * SECOND), "one at a time");
        schedule.committed(103 * SECOND);
        assert!(!schedule.take_due(112 * SECOND));
        assert!(schedule.take_due(113 * SECOND), "the first one sets the rhythm");
        schedule.committed(115 * SECOND);
        assert!(!schedule.take_due(122 * SECOND));
        assert!(schedule.take_due(123 * SECOND), "how long a sync takes does not shift it");
        schedule.failed(124 * SECOND);
        assert!(schedule.take_due(134 * SECOND));
        schedule.detached();
        assert!(schedule.take_due(135 * SECOND));
    }
}
