//! What of a disk goes to the journal, to whoever asks for its status, and into the catalogue.

use tracing::{info, warn};

use super::Worker;
use crate::checkpoint::{Checkpoint, Consistency};
use crate::clock::unix_ms;
use crate::message_id::{CHECKPOINT_FUZZY, NO_SPACE, SECTORS_UNREADABLE};
use crate::status::{CheckpointAdded, DiskState, Newest};
use crate::store::catalogue::Action;

impl Worker {
    /// Says that there is too little space: in the journal once, until there is enough again.
    pub(super) fn say_no_space(&mut self, what: &str) {
        if !std::mem::replace(&mut self.no_space, true) {
            warn!(MESSAGE_ID = NO_SPACE, AGENT = %self.agent, DISK = %self.disk, "{what}");
        }
        self.shown.status().last_error = Some(what.to_owned());
    }

    pub(super) fn say_space_again(&mut self) {
        if self.no_space && !self.session.is_full() {
            self.no_space = false;
            info!(AGENT = %self.agent, DISK = %self.disk, "there is space again");
            self.shown.status().last_error = None;
        }
    }

    /// Says, once for a copy, that it may not fit.
    pub(super) fn say_tight(&mut self, what: &str) {
        if !std::mem::replace(&mut self.tight, true) {
            warn!(MESSAGE_ID = NO_SPACE, AGENT = %self.agent, DISK = %self.disk, "{what}");
        }
        self.shown.status().last_error = Some(what.to_owned());
    }

    pub(super) fn committed(&mut self, checkpoint: &Checkpoint) {
        self.schedule.committed(self.began.elapsed());
        let lacks = self.lacks(checkpoint);
        self.shown.status().last_error = lacks;
        self.tight = false;
        let Checkpoint { id, consistency, note, .. } = checkpoint;
        let (agent, disk) = (&self.agent, &self.disk);
        let note = if note.is_empty() { String::new() } else { format!(": {note}") };
        if *consistency == Consistency::Fuzzy {
            warn!(
                MESSAGE_ID = CHECKPOINT_FUZZY, AGENT = %agent, DISK = %disk, CHECKPOINT = %id,
                "checkpoint {id} is fuzzy{note}"
            );
        } else {
            info!(AGENT = %agent, DISK = %disk, CHECKPOINT = %id, "checkpoint {id} ({consistency}){note}");
        }
        self.show();
        if let Err(error) = self.house.accepted.take(agent, disk) {
            warn!(AGENT = %agent, DISK = %disk, "that its change was accepted is not taken back: {error}");
        }
        let added = CheckpointAdded { agent: agent.clone(), disk: disk.clone(), id: *id };
        let _ = self.house.checkpoints.send(added);
        for reply in self.take_answered() {
            let _ = reply.send(Ok(*id));
        }
    }

    /// What a checkpoint lacks, said in the journal if that is news.
    fn lacks(&mut self, checkpoint: &Checkpoint) -> Option<String> {
        let Checkpoint { id, unreadable_blocks: blocks, note, .. } = checkpoint;
        let was = std::mem::replace(&mut self.unreadable_blocks, *blocks);
        let text = format!("checkpoint {id} has zeros for {blocks} blocks that could not be read: {note}");
        if *blocks > 0 && *blocks != was {
            warn!(
                MESSAGE_ID = SECTORS_UNREADABLE, AGENT = %self.agent, DISK = %self.disk, CHECKPOINT = %id,
                "{text}"
            );
        }
        (*blocks > 0).then_some(text)
    }

    /// Keeps the progress of long work in the catalogue, once a tick.
    pub(super) fn note_action(&mut self) {
        let state = self.shown.status().state;
        let kind = match state {
            DiskState::Copying => "copy",
            DiskState::Comparing => "compare",
            DiskState::Syncing => "sync",
            _ => return self.close_action(state),
        };
        if self.action.as_ref().is_none_or(|action| action.kind != kind) {
            self.close_action(DiskState::Idle);
        }
        let (done_bytes, total_bytes) = self.session.copy_progress().unwrap_or_default();
        let now = unix_ms();
        let started_unix_ms = self.action.as_ref().map_or(now, |action| action.started_unix_ms);
        let (kind, state) = (kind.to_owned(), "running".to_owned());
        self.put_action(Action {
            kind,
            state,
            done_bytes,
            total_bytes,
            started_unix_ms,
            updated_unix_ms: now,
        });
    }

    fn close_action(&mut self, state: DiskState) {
        if let Some(action) = self.action.take() {
            let interrupted = matches!(state, DiskState::Detached | DiskState::Paused);
            let state = if interrupted { "interrupted" } else { "done" }.to_owned();
            self.put_action(Action { state, updated_unix_ms: unix_ms(), ..action });
            self.action = None;
        }
    }

    fn put_action(&mut self, action: Action) {
        let put = self.house.catalogue.put_action(&self.agent, &self.disk, &action);
        let failed_before = std::mem::replace(&mut self.catalogue_fails, put.is_err());
        if let (Err(error), false) = (put, failed_before) {
            warn!(AGENT = %self.agent, DISK = %self.disk, "{error}");
        }
        self.action = Some(action);
    }

    /// Shows how the disk is doing.
    pub(super) fn show(&self) {
        let copied = self.session.copy_progress().map(|(done, total)| done as f64 / total.max(1) as f64);
        let mut status = self.shown.status();
        status.state = match (self.session.is_attached(), self.ready, copied) {
            (false, ..) => DiskState::Detached,
            // A checkpoint that is sealed is still committed.
            (true, true, _) if self.schedule.is_ordered() => DiskState::Syncing,
            _ if self.shown.pause.is_paused() => DiskState::Paused,
            (true, false, Some(_)) => DiskState::Copying,
            (true, false, None) => DiskState::Comparing,
            (true, true, _) => DiskState::Idle,
        };
        status.size_bytes = self.session.size_bytes().unwrap_or(status.size_bytes);
        let scanning = !self.ready && self.session.is_attached();
        status.progress =
            if scanning { copied.unwrap_or_else(|| self.session.compare_progress()) } else { 0.0 };
        status.dirty_bytes = self.session.changed_bytes().unwrap_or(status.dirty_bytes);
        status.newest = self.session.newest().map(Newest::from).or(status.newest);
        status.sync_every = Some(*self.every.borrow());
    }
}
