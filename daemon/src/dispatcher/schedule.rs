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
    /// One more is wanted as soon as the ordered one has ended.
    again: bool,
}

impl Schedule {
    /// A disk whose first sync is due at once.
    pub fn new(every: Duration) -> Self {
        Self { every, due: Duration::ZERO, ordered: false, again: false }
    }

    /// Whether a sync is to be ordered now.
    pub fn is_due(&self, now: Duration) -> bool {
        !self.ordered && now >= self.due
    }

    /// Whether a sync is to be ordered now; it is then taken as ordered.
    pub fn take_due(&mut self, now: Duration) -> bool {
        let due = self.is_due(now);
        self.ordered |= due;
        due
    }

    /// Changes the time between syncs, from the next one on.
    pub fn set_every(&mut self, every: Duration) {
        self.due = self.due.min(self.due.saturating_sub(self.every) + every);
        self.every = every;
    }

    /// Makes a sync due at once; where one is under way, another behind it.
    pub fn hurry(&mut self) {
        self.due = Duration::ZERO;
        self.again = self.ordered;
    }

    /// Whether a sync is under way.
    pub fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// The ordered sync was committed: the next one is due one period after this one was.
    pub fn committed(&mut self, now: Duration) {
        let next = self.due + self.every;
        self.due = if next > now { next } else { now + self.every };
        self.ended(now);
    }

    /// The ordered sync failed.
    pub fn failed(&mut self, now: Duration) {
        self.due = now + self.every.min(RETRY);
        self.ended(now);
    }

    fn ended(&mut self, now: Duration) {
        self.ordered = false;
        if std::mem::take(&mut self.again) {
            self.due = now;
        }
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

    #[test]
    fn what_is_wanted_during_a_sync_comes_behind_it() {
        let mut schedule = Schedule::new(100 * SECOND);
        assert!(schedule.take_due(SECOND));
        schedule.hurry();
        assert!(!schedule.take_due(2 * SECOND));
        schedule.committed(3 * SECOND);
        assert!(schedule.take_due(3 * SECOND));
        schedule.committed(4 * SECOND);
        assert!(!schedule.take_due(5 * SECOND));
    }

    #[test]
    fn a_new_period_counts_from_the_last_sync() {
        let mut schedule = Schedule::new(100 * SECOND);
        assert!(schedule.take_due(SECOND));
        schedule.committed(SECOND);
        schedule.set_every(10 * SECOND);
        assert!(!schedule.take_due(9 * SECOND));
        assert!(schedule.take_due(10 * SECOND));
    }
}
