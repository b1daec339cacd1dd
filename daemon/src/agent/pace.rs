//! Keeps reading below a rate.

use std::time::{Duration, Instant};

/// Spreads reads over time. Without a rate it never waits.
pub struct Pace {
    rate_bytes: Option<u64>,
    free_at: Instant,
}

impl Pace {
    /// At most `rate_bytes` in a second.
    pub fn new(rate_bytes: Option<u64>) -> Self {
        Self { rate_bytes, free_at: Instant::now() }
    }

    /// Waits until `bytes` may be read.
    pub fn wait_for(&mut self, bytes: u64) {
        let Some(rate) = self.rate_bytes else { return };
        let now = Instant::now();
        std::thread::sleep(self.free_at.saturating_duration_since(now));
        self.free_at = self.free_at.max(now) + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
    }
}
