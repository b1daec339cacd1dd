//! When a sync is ordered, and who hears what became of it.

use blxrep_dbus::problem::{Problem, ProblemKind};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::{SyncReply, Worker};
use crate::dispatcher::session::SessionError;
use crate::message_id::CHECKPOINT_FAILED;
use crate::wire::message::ConfigDown;

impl Worker {
    pub(super) fn sync_now(&mut self, reply: SyncReply, compare: bool) {
        let agent = &self.agent;
        let device = self.shown.status().device.clone();
        let (kind, reason) = if self.shown.pause.is_paused() {
            (ProblemKind::Paused, format!("{agent}'s {device} is paused: resume it first"))
        } else if !self.session.is_attached() {
            (ProblemKind::NotConnected, format!("{agent}'s {device} is not connected: see 'blxctl status'"))
        } else if !self.ready {
            let reason = "is still being copied or compared; a checkpoint follows by itself";
            (ProblemKind::Busy, format!("{agent}'s {device} {reason}"))
        } else if !compare {
            self.waiting.push(reply);
            return self.schedule.hurry();
        } else if self.order(true) {
            self.compared = false;
            return self.comparing.push(reply);
        } else {
            (ProblemKind::NotConnected, format!("{agent}'s {device} takes no orders now: try again"))
        };
        let _ = reply.send(Err(Problem::new(kind, reason)));
    }

    /// Tells the agent to sync. It compares by attaching anew, with a gap.
    fn order(&self, compare: bool) -> bool {
        let order = ConfigDown::Sync { disk: self.disk.clone(), compare };
        self.orders.as_ref().is_some_and(|orders| orders.try_send(order).is_ok())
    }

    /// Who waits for a compare waits over new connections of the disk, but not over a pause or the session's end.
    pub(super) fn end_compares(&mut self) {
        if self.comparing.is_empty() {
            return;
        }
        if self.shown.pause.is_paused() {
            for reply in self.comparing.drain(..) {
                let reason = format!("{}'s disk {} was paused: resume it first", self.agent, self.disk);
                let _ = reply.send(Err(Problem::new(ProblemKind::Paused, reason)));
            }
        } else if self.orders.as_ref().is_none_or(mpsc::Sender::is_closed) {
            self.comparing.clear();
        }
    }

    /// Those to whom the end of the ordered sync matters.
    pub(super) fn take_answered(&mut self) -> Vec<SyncReply> {
        let mut answered = std::mem::take(&mut self.ordered);
        if std::mem::take(&mut self.compared) {
            answered.append(&mut self.comparing);
        }
        answered
    }

    pub(super) fn order_if_due(&mut self) {
        if !self.ready || self.shown.pause.is_paused() {
            return;
        }
        let now = self.began.elapsed();
        if !self.schedule.is_due(now) || self.waits_for_room() || !self.schedule.take_due(now) {
            return;
        }
        let sent = self.order(false);
        debug!(AGENT = %self.agent, DISK = %self.disk, "a sync is ordered");
        self.ordered.append(&mut self.waiting);
        self.show();
        if !sent {
            self.ordered.clear();
            self.schedule.failed(self.began.elapsed());
        }
    }

    /// Whether a sync has to wait for room; who waits for a checkpoint hears it.
    fn waits_for_room(&mut self) -> bool {
        let error = match self.session.shortage() {
            Ok(None) => {
                self.say_space_again();
                return false;
            }
            Ok(Some(shortage)) => SessionError::Full(shortage),
            Err(error) => error.into(),
        };
        self.say_no_space(&error.to_string());
        let mut waiting = std::mem::take(&mut self.waiting);
        if std::mem::take(&mut self.compared) {
            waiting.append(&mut self.comparing);
        }
        for reply in waiting {
            let _ = reply.send(Err(Problem::new(ProblemKind::Failed, format!("no checkpoint: {error}"))));
        }
        true
    }

    pub(super) fn sync_failed(&mut self, reason: String, paused: bool) {
        self.schedule.failed(self.began.elapsed());
        let kind = if paused { ProblemKind::Paused } else { ProblemKind::Failed };
        for reply in self.take_answered() {
            let _ = reply.send(Err(Problem::new(kind, format!("no checkpoint: {reason}"))));
        }
        if paused {
            return info!(AGENT = %self.agent, DISK = %self.disk, "no checkpoint: {reason}");
        }
        warn!(
            MESSAGE_ID = CHECKPOINT_FAILED, AGENT = %self.agent, DISK = %self.disk, "no checkpoint: {reason}"
        );
        self.shown.status().last_error = Some(reason);
        self.show();
    }
}
