//! The freeze of one final pass: guard and record together, and what became of them.
//!
//! A freeze that fails is no reason to have no checkpoint: it costs the class, and the note says why.

use std::time::{Duration, Instant};

use super::final_pass::FinalPassJob;
use super::guard::{FreezeState, Guard, GuardError};
use super::record::Record;
use super::topology::Topology;

/// A freeze to come, that is on, or that is over.
#[derive(Default)]
pub(super) struct Frost {
    guard: Option<Guard>,
    record: Option<Record>,
    /// When a freeze that is on ends at the latest.
    until: Option<Instant>,
    /// How many file systems we froze.
    pub(super) frozen: usize,
    /// It ended before it should.
    pub(super) expired: bool,
    /// How long it was.
    pub(super) frozen_for: Duration,
}

impl Frost {
    /// Starts the guard and writes the record. Nothing is frozen yet, and nothing will be if `notes` says so.
    pub(super) fn prepare(job: &FinalPassJob, topology: &Topology, notes: &mut Vec<String>) -> Self {
        let mounts = topology.to_freeze();
        let mut frost = Self::default();
        if mounts.is_empty() {
            return frost;
        }
        match Guard::spawn(&job.guard_exe, &mounts) {
            Ok(guard) => frost.guard = Some(guard),
            Err(e) => notes.push(format!("not frozen: {e}")),
        }
        if frost.guard.is_some() {
            match Record::write(&job.state_dir, job.device, &mounts) {
                Ok(record) => frost.record = Some(record),
                Err(e) => {
                    // Without a record nobody would thaw after a double death.
                    frost.guard = None;
                    notes.push(format!("not frozen: {e}"));
                }
            }
        }
        frost
    }

    /// Freezes, if it was prepared.
    pub(super) fn freeze(&mut self, timeout: Duration, notes: &mut Vec<String>) {
        let Some(guard) = &mut self.guard else { return };
        let now = Instant::now();
        match guard.freeze(timeout) {
            Ok(report) => {
                self.until = now.checked_add(timeout);
                for (mount_point, state) in report.mounts {
                    let why = match state {
                        FreezeState::Frozen => {
                            self.frozen += 1;
                            continue;
                        }
                        FreezeState::FrozenByAnother => "was frozen already by something else",
                        FreezeState::NotSupported => "is of a type that cannot be frozen",
                    };
                    notes.push(format!("{} {why}", mount_point.display()));
                }
            }
            Err(e) => {
                self.expired = matches!(e, GuardError::Expired | GuardError::Gone);
                notes.push(format!("not frozen: {e}"));
            }
        }
    }

    /// When the freeze ends at the latest; `None` if nothing is frozen.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until.filter(|_| self.frozen > 0)
    }

    /// Looks whether what was frozen still is.
    pub(super) fn check(&mut self, notes: &mut Vec<String>) {
        let Some(guard) = self.guard.as_mut().filter(|_| self.frozen > 0) else { return };
        if !guard.still_frozen() {
            self.expired = true;
            notes.push("the freeze ended before the last block was read".to_owned());
        }
    }

    /// Thaws, if anything is frozen. The record stays until [`Self::finish`].
    pub(super) fn thaw(&mut self, notes: &mut Vec<String>) {
        let Some(guard) = &mut self.guard else { return };
        match guard.thaw() {
            Ok(report) if self.frozen > 0 => self.frozen_for = report.frozen_for,
            Ok(_) => {}
            Err(e) => {
                tracing::error!("{e}");
                notes.push(e.to_string());
                // It stays on disk, so that `blxrep thaw` and the next start know.
                self.record = None;
            }
        }
        self.until = None;
    }

    /// Ends the guard and removes the record.
    pub(super) fn finish(&mut self, notes: &mut Vec<String>) {
        self.guard = None;
        if let Some(Err(e)) = self.record.take().map(Record::remove) {
            notes.push(e.to_string());
        }
    }
}
