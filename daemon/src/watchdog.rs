//! Feeds systemd's watchdog while everything that works is alive.
//!
//! Every loop that does work holds a [`Pulse`] and beats it each time round. `WATCHDOG=1` is sent only while no pulse is
//! late, so that one stuck loop has the whole daemon restarted (systemd.service(5), `WatchdogSec=`). Without a watchdog
//! nothing is counted.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tracing::error;

/// What may wait for a slow disk: writing all dirty pages back, a freeze with its hooks, recovering a store.
pub const SLOW_DISK_MAX: Duration = Duration::from_secs(15 * 60);

/// The pulses of one daemon.
#[derive(Debug)]
pub struct Watchdog {
    began: Instant,
    limit: Option<Duration>,
    pulses: Mutex<Vec<Weak<Pulse>>>,
}

/// One loop's sign of life. A loop that ends drops it.
#[derive(Debug)]
pub struct Pulse {
    name: String,
    began: Instant,
    limit_ms: u64,
    /// Milliseconds since `began` until which it counts as alive.
    alive_until_ms: AtomicU64,
}

impl Watchdog {
    /// What systemd asks for in `WATCHDOG_USEC`, if it does.
    pub fn from_env() -> Self {
        Self::new(sd_notify::watchdog_enabled())
    }

    /// A loop is late if it does not beat for `limit`.
    pub fn new(limit: Option<Duration>) -> Self {
        Self { began: Instant::now(), limit, pulses: Mutex::default() }
    }

    /// Begins watching a loop.
    pub fn pulse(&self, name: &str) -> Arc<Pulse> {
        let limit = self.limit.unwrap_or_default();
        let pulse = Arc::new(Pulse {
            name: name.to_owned(),
            began: self.began,
            limit_ms: millis(limit),
            alive_until_ms: AtomicU64::new(0),
        });
        pulse.beat();
        let mut pulses = self.pulses.lock().unwrap_or_else(PoisonError::into_inner);
        pulses.retain(|pulse| pulse.strong_count() > 0);
        pulses.push(Arc::downgrade(&pulse));
        pulse
    }

    /// The names of the loops that are late.
    fn late(&self) -> Vec<String> {
        let now_ms = millis(self.began.elapsed());
        let pulses = self.pulses.lock().unwrap_or_else(PoisonError::into_inner);
        let late = pulses.iter().filter_map(Weak::upgrade);
        late.filter(|pulse| pulse.alive_until_ms.load(Ordering::Relaxed) < now_ms)
            .map(|pulse| pulse.name.clone())
            .collect()
    }

    /// Feeds systemd as long as every loop is alive. Never ends.
    pub async fn feed(&self) -> Infallible {
        let Some(limit) = self.limit else { return std::future::pending().await };
        let mut late = self.late();
        while late.is_empty() {
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
            tokio::time::sleep(limit / 4).await;
            late = self.late();
        }
        error!("stuck: {}; systemd's watchdog will end this process", late.join(", "));
        std::future::pending().await
    }
}

impl Pulse {
    /// The loop went round.
    pub fn beat(&self) {
        self.allow(Duration::ZERO);
    }

    /// The loop begins something that may take this long.
    pub fn allow(&self, longest: Duration) {
        let until_ms = millis(self.began.elapsed()) + self.limit_ms + millis(longest);
        self.alive_until_ms.store(until_ms, Ordering::Relaxed);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_does_not_beat_is_late_until_it_ends() {
        let watchdog = Watchdog::new(Some(Duration::from_millis(30)));
        let (stuck, slow, ended) = (watchdog.pulse("stuck"), watchdog.pulse("slow"), watchdog.pulse("ended"));
        assert!(watchdog.late().is_empty());
        slow.allow(SLOW_DISK_MAX);
        drop(ended);
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(watchdog.late(), ["stuck"]);
        stuck.beat();
        slow.beat();
        assert!(watchdog.late().is_empty());
    }
}
