//! When a scrub may go on. Pure.
//!
//! A pass is spread evenly over the time it may take. What is late (the dispatcher was down, much has been added) is caught up
//! with, at no more than the rate.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a person set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// The time of a pass.
    pub every: Duration,
    /// The most bytes in a second; at least 1.
    pub rate_bytes: u64,
}

/// How far a pass is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Course {
    /// When it began, in milliseconds since 1970.
    pub began_unix_ms: u64,
    /// Bytes there were to check when it began.
    pub total_bytes: u64,
    /// Bytes that were checked.
    pub done_bytes: u64,
}

impl Course {
    /// From 0 to 1.
    pub fn progress(&self) -> f64 {
        self.done_bytes.min(self.total_bytes) as f64 / self.total_bytes.max(1) as f64
    }

    /// After the clock was put back, the pass goes on as if it were on time.
    pub fn settle(&mut self, pace: Pace, now_unix_ms: u64) {
        if now_unix_ms < self.began_unix_ms {
            self.began_unix_ms = now_unix_ms.saturating_sub(millis(pace.every.mul_f64(self.progress())));
        }
    }
}

impl Pace {
    /// How long to wait behind `bytes` that were just read.
    pub fn rest(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.rate_bytes.max(1) as f64)
    }

    /// How much too early it is for the next bytes of a pass.
    pub fn early(&self, course: &Course, now_unix_ms: u64) -> Duration {
        until(course.began_unix_ms.saturating_add(millis(self.every.mul_f64(course.progress()))), now_unix_ms)
    }

    /// How much too early it is for the pass behind one that is done.
    pub fn early_for_next(&self, began_unix_ms: u64, now_unix_ms: u64) -> Duration {
        // After the clock was put back, nobody can say.
        if now_unix_ms < began_unix_ms {
            return Duration::ZERO;
        }
        until(began_unix_ms.saturating_add(millis(self.every)), now_unix_ms)
    }
}

fn until(due_unix_ms: u64, now_unix_ms: u64) -> Duration {
    Duration::from_millis(due_unix_ms.saturating_sub(now_unix_ms))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_795_293_296_000;

    /// Runs a pass on a virtual clock, in pieces, each of which takes no time to read; gives when each was read.
    fn run(pace: Pace, mut course: Course, pieces: &[u64], now: &mut u64) -> Vec<(u64, u64)> {
        let mut read = Vec::new();
        for bytes in pieces {
            course.settle(pace, *now);
            *now += millis(pace.early(&course, *now));
            read.push((*now, *bytes));
            course.done_bytes += bytes;
            *now += pace.rest(*bytes).as_millis() as u64 + 1;
        }
        read
    }

    proptest! {
        #[test]
        fn a_pass_takes_its_time_and_no_more_unless_the_rate_forbids(
            pieces in proptest::collection::vec(1u64..1 << 21, 1..200),
            every_s in 1u64..10_000_000,
            rate_bytes in 1u64 << 16..1 << 32,
        ) {
            let pace = Pace { every: Duration::from_secs(every_s), rate_bytes };
            let total_bytes: u64 = pieces.iter().sum();
            let mut now = NOW;
            let course = Course { began_unix_ms: NOW, total_bytes, done_bytes: 0 };
            run(pace, course, &pieces, &mut now);
            let took_ms = now - NOW + millis(pace.early_for_next(NOW, now));
            let at_rate_ms = total_bytes * 1000 / rate_bytes + 2 * pieces.len() as u64;
            prop_assert!(took_ms >= every_s * 1000, "the next pass begins no sooner");
            prop_assert!(took_ms <= every_s * 1000 + at_rate_ms, "{took_ms} ms");
        }

        #[test]
        fn the_rate_is_kept_however_late_it_is(
            pieces in proptest::collection::vec(1u64..1 << 21, 2..200),
            late_s in 0u64..10_000_000,
            rate_bytes in 1u64 << 16..1 << 32,
        ) {
            let pace = Pace { every: Duration::from_secs(86_400), rate_bytes };
            let course =
                Course { began_unix_ms: NOW - late_s * 1000, total_bytes: pieces.iter().sum(), done_bytes: 0 };
            let read = run(pace, course, &pieces, &mut NOW.clone());
            for window in read.windows(2) {
                let [(from, bytes), (to, _)] = window else { unreachable!() };
                prop_assert!((to - from) * rate_bytes >= bytes * 1000, "{bytes} bytes in {} ms", to - from);
            }
        }

        #[test]
        fn a_clock_that_jumps_holds_up_no_longer_than_a_pass(
            back_ms in 0u64..NOW,
            done_bytes in 0u64..2000,
            every_s in 1u64..10_000_000,
        ) {
            let pace = Pace { every: Duration::from_secs(every_s), rate_bytes: 1 << 20 };
            let mut course = Course { began_unix_ms: NOW, total_bytes: 1000, done_bytes };
            course.settle(pace, NOW - back_ms);
            prop_assert!(pace.early(&course, NOW - back_ms) <= pace.every);
            prop_assert!(pace.early_for_next(NOW, NOW - back_ms) <= pace.every);
            prop_assert!(course.progress() <= 1.0);
        }
    }

    #[test]
    fn nothing_to_check_is_no_division_by_zero() {
        let pace = Pace { every: Duration::from_secs(60), rate_bytes: 0 };
        assert_eq!(pace.early(&Course { began_unix_ms: NOW, ..Course::default() }, NOW), Duration::ZERO);
        assert_eq!(pace.rest(3), Duration::from_secs(3));
    }
}
