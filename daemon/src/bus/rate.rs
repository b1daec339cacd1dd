//! Bytes a second, of late. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back is looked.
const WINDOW: Duration = Duration::from_secs(5);

/// What was done at some times, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Rate(VecDeque<(Instant, u64)>);

impl Rate {
    /// Adds what is done now; gives the bytes a second since the oldest time in the window.
    pub(super) fn add(&mut self, now: Instant, done_bytes: u64) -> u64 {
        self.0.push_back((now, done_bytes));
        while self.0.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > WINDOW) {
            self.0.pop_front();
        }
        let Some((at, before)) = self.0.front() else { return 0 };
        let millis = now.saturating_duration_since(*at).as_millis();
        let bytes = u128::from(done_bytes.saturating_sub(*before));
        (bytes * 1000).checked_div(millis).and_then(|rate| u64::try_from(rate).ok()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_rate_of_the_last_seconds_and_not_of_all() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut rate = Rate::default();
        assert_eq!(rate.add(start, 0), 0, "nothing is known yet");
        assert_eq!(rate.add(at(500), 1000), 2000);
        for (ms, done) in (1000..=10_000).step_by(500).zip((1100u64..).step_by(100)) {
            rate.add(at(ms), done);
        }
        assert_eq!(rate.add(at(10_500), 3000), 200, "the fast beginning is forgotten");
        assert!(rate.0.len() <= 12, "{}", rate.0.len());
        assert_eq!(rate.add(at(20_000), 3000), 0, "long silence is no rate");
    }

    #[test]
    fn work_that_begins_anew_and_great_numbers_do_no_harm() {
        let start = Instant::now();
        let mut rate = Rate::default();
        rate.add(start, u64::MAX);
        assert_eq!(rate.add(start + Duration::from_secs(1), 5), 0);
        let mut rate = Rate::default();
        rate.add(start, 0);
        assert_eq!(rate.add(start, 10), 0, "no time went by");
        assert_eq!(rate.add(start + Duration::from_secs(1), u64::MAX), u64::MAX);
    }
}
