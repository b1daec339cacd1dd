//! How a checkpoint comes about: rounds, the final pass, the seal.

use super::unreadable::failing;
use super::{DiskSession, PAUSED, Sealed};
use crate::agent::action::{Action, DrainFor, Purpose};
use crate::agent::read::unreadable as unreadable_run;
use crate::agent::scan::Scan;
use crate::agent::sync::{Phase, Sync};
use crate::checkpoint::Consistency;
use crate::freeze::final_pass::{Outcome, Taken};
use crate::ids::CheckpointId;
use crate::reader::pack;
use crate::run::Run;
use crate::status::Newest;
use crate::wire::Endpoint;
use crate::wire::frame::Area;
use crate::wire::message::{DiskUp, clean_text};

impl DiskSession {
    pub(super) fn sync_ordered(&mut self) {
        let scanning = self.scan.as_ref().is_some_and(|scan| !scan.is_done());
        if !self.attached || self.sync.is_some() || scanning {
            // Orders come on another connection: they may overtake the answer to the attach, the end of a scan, or the
            // news of a commit.
            self.order_waits = true;
            return;
        }
        if self.paused {
            let failed = DiskUp::SyncFailed { reason: PAUSED.to_owned(), paused: true };
            return self.outbox.push_back(Action::Send(Endpoint::Live, failed));
        }
        let (sync, retry) = (self.sync.insert(Sync::new()), self.unreadable.take_retry());
        match retry.is_empty() {
            true => self.begin_round(),
            false => sync.retry(retry),
        }
    }

    /// Begins the sync whose order came too early.
    pub(super) fn begin_what_waits(&mut self) {
        if std::mem::take(&mut self.order_waits) {
            self.sync_ordered();
        }
    }

    fn begin_round(&mut self) {
        self.outbox.push_back(Action::SyncFileSystems);
        self.outbox.push_back(Action::Drain(DrainFor::Round));
    }

    pub(super) fn plan_round(&mut self) {
        let Some(sync) = &mut self.sync else { return };
        if sync.worth_a_round(self.to_send.len(), self.budget_blocks) {
            sync.send(std::mem::take(&mut self.to_send));
        } else {
            sync.freeze();
        }
    }

    pub(super) fn final_pass(&mut self, outcome: Result<Outcome, String>, gap_count: u64) {
        let Some(sync) = &mut self.sync else { return };
        match outcome {
            Err(reason) => {
                // What the pass drained is pending, but not known here.
                self.forget_sent = true;
                self.fail_sync(reason);
                self.outbox.push_back(Action::LoadPending);
            }
            Ok(Outcome::TooMuch { rest, note }) => {
                self.to_send.union(&rest);
                if sync.try_again(note) {
                    sync.demand_round();
                    self.begin_round();
                } else {
                    sync.send_unfrozen(std::mem::take(&mut self.to_send));
                }
            }
            Ok(Outcome::Taken(taken))
                if taken.consistency == Consistency::Fuzzy && sync.try_again(String::new()) =>
            {
                self.to_send.union(&taken.blocks());
                self.to_send.union(&taken.after);
                self.begin_round();
            }
            Ok(Outcome::Taken(taken)) => {
                let blocks = taken.blocks();
                self.to_send.subtract(&blocks);
                let reason = match self.unreadable.is_too_much(taken.unreadable.extents(u64::MAX)) {
                    true => Some(failing()),
                    false if self.to_send.is_empty() => None,
                    false => Some("the final pass did not read everything that changed".to_owned()),
                };
                if let Some(reason) = reason {
                    self.to_send.union(&blocks);
                    self.to_send.union(&taken.after);
                    self.fail_sync(reason);
                } else {
                    self.to_send = taken.after.clone();
                    let runs: Vec<Run> = taken.unreadable.extents(u64::MAX).map(unreadable_run).collect();
                    sync.send_rest(taken);
                    runs.into_iter().for_each(|run| self.send_run(Endpoint::Live, Area::Delta, run));
                    self.outbox.extend(self.unreadable.to_name().map(Action::Locate));
                }
            }
        }
        self.doubts(gap_count);
    }

    pub(super) fn poll_sync(&mut self) -> Option<Action> {
        let sync = self.sync.as_mut()?;
        if let Some((extent, data)) = sync.next_of_rest() {
            for run in pack(extent, &data, self.geometry) {
                self.send_run(Endpoint::Live, Area::Delta, run);
            }
            return self.outbox.pop_front();
        }
        if let Some(taken) = sync.take_when_sent() {
            return Some(self.seal(taken));
        }
        if let Some(extent) = sync.next_to_read(self.geometry.group_blocks()) {
            return Some(Action::Read(extent, Purpose::Changed));
        }
        match sync.phase() {
            Phase::Freeze => {
                sync.freezing();
                Some(Action::FinalPass { to_send: self.to_send.clone(), last: self.newest.map(|n| n.id) })
            }
            Phase::RoundSent => {
                sync.next_round();
                self.begin_round();
                self.outbox.pop_front()
            }
            Phase::UnfrozenSent => {
                if let Some(blocks) = self.unreadable.to_name() {
                    return Some(Action::Locate(blocks));
                }
                sync.last_drain();
                Some(Action::Drain(DrainFor::Seal))
            }
            _ => None,
        }
    }

    pub(super) fn seal_unfrozen(&mut self, time_unix_ms: u64) {
        let Some(sync) = &mut self.sync else { return };
        // Everything else was sent: what is to be sent is what was drained since the sending began.
        let consistency = if self.to_send.is_empty() { Consistency::Crash } else { Consistency::Fuzzy };
        let seconds = i64::try_from(time_unix_ms / 1000).unwrap_or(0);
        let id = CheckpointId::next(seconds, self.newest.map(|n| n.id));
        let note = sync.unfrozen_note();
        sync.sealed();
        self.outbox.push_back(Action::CheckClaim);
        self.send_seal(Newest { id, time_unix_ms, consistency }, 0, note);
    }

    fn seal(&mut self, taken: Taken) -> Action {
        let Taken { id, time_unix_ms, freeze_ms, consistency, note, .. } = taken;
        self.send_seal(Newest { id, time_unix_ms, consistency }, freeze_ms, note);
        self.outbox.pop_front().unwrap_or(Action::CheckClaim)
    }

    fn send_seal(&mut self, newest: Newest, freeze_ms: u32, note: String) {
        let Newest { id, time_unix_ms, consistency } = newest;
        let scanned = self.scan.as_ref().is_some_and(Scan::is_done);
        self.sealed = Some(Sealed { newest, healed: scanned.then_some(self.scan_gap_count) });
        let parts = [self.unreadable.text(), &note];
        let note = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ");
        let seal = DiskUp::Seal { id, consistency, time_unix_ms, freeze_ms, note: clean_text(note) };
        self.outbox.push_back(Action::Send(Endpoint::Live, seal));
    }

    pub(super) fn fail_sync(&mut self, reason: String) {
        if let Some(sync) = self.sync.take() {
            self.order_waits = false;
            sync.give_back(&mut self.to_send);
            self.outbox.push_back(Action::Send(
                Endpoint::Live,
                DiskUp::SyncFailed { reason: clean_text(reason), paused: self.paused },
            ));
        }
    }
}
