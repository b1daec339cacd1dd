//! The simulated dispatcher's process: what `dispatcher/disk.rs` does around the real session, with virtual time.

use std::time::Duration;

use crate::dispatcher::schedule::Schedule;
use crate::dispatcher::session::{Admission, DiskSession};
use crate::ids::Epoch;
use crate::store::layout::Paths;
use crate::store::simfiles::SimFiles;

/// The time between checkpoints.
const SYNC_EVERY: Duration = Duration::from_millis(1500);

pub(super) fn paths() -> Paths {
    Paths::new("a".parse().unwrap(), "d".parse().unwrap())
}

pub(super) struct Dispatcher {
    pub(super) session: DiskSession,
    pub(super) schedule: Schedule,
    /// Process number: what was meant for an earlier one is not for this one.
    pub(super) life: u8,
    pub(super) is_up: bool,
    /// The connection it goes by; frames of others are not looked at.
    pub(super) link: Option<u64>,
    pub(super) is_ready: bool,
    began_ms: u64,
}

impl Dispatcher {
    pub(super) fn new(files: &SimFiles, life: u8, now_ms: u64) -> Self {
        let Paths { agent, disk } = paths();
        let mut session = DiskSession::new(files.arc(), agent, disk, Epoch([life; 16]));
        // A person lets every disk shrink.
        session.admit(Admission { replaces: None, accepted: true });
        Self {
            session,
            schedule: Schedule::new(SYNC_EVERY),
            life,
            is_up: true,
            link: None,
            is_ready: false,
            began_ms: now_ms,
        }
    }

    /// The time as the schedule knows it.
    pub(super) fn elapsed(&self, now_ms: u64) -> Duration {
        Duration::from_millis(now_ms - self.began_ms)
    }

    pub(super) fn detach(&mut self) {
        (self.link, self.is_ready) = (None, false);
        self.session.detach();
        self.schedule.detached();
    }
}
