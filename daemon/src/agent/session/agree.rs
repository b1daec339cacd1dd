//! How a session begins, ends and agrees with the dispatcher on what is committed.

use super::{DiskSession, Sealed};
use crate::agent::action::{Action, DrainFor};
use crate::agent::scan::Scan;
use crate::bitmap::BlockSet;
use crate::ids::{CheckpointId, Epoch};
use crate::status::Newest;
use crate::tracker::Claim;
use crate::wire::Endpoint;
use crate::wire::frame::Area;
use crate::wire::message::{DiskUp, Plan};

impl DiskSession {
    pub(super) fn link_up(&mut self, claim: Claim, gap_count: u64) {
        self.outbox.clear();
        (self.claim, self.gap_count) = (Some(claim), gap_count);
        let attach = DiskUp::Attach { device: self.device.clone(), geometry: self.geometry, claim };
        self.outbox.push_back(Action::Send(Endpoint::Live, attach));
    }

    pub(super) fn link_down(&mut self) {
        (self.attached, self.order_waits) = (false, false);
        self.outbox.clear();
        let sync = self.sync.take();
        sync.into_iter().for_each(|sync| sync.give_back(&mut self.to_send));
        for frame in self.unacked.drain(..) {
            match (frame.area, &mut self.scan) {
                (Area::Base, Some(scan)) => scan.rewind(frame.extent.first / self.geometry.group_blocks()),
                (Area::Base, None) => {}
                (Area::Delta, _) => self.to_send.insert(frame.extent),
            }
        }
        self.unacked_bytes = 0;
        if let Some(scan) = &mut self.scan {
            scan.disconnect();
        }
    }

    pub(super) fn attach(&mut self, plan: Plan, instance: Epoch, resumes: bool, newest: Option<Newest>) {
        let resumes = resumes && self.instance == Some(instance);
        (self.attached, self.instance, self.newest) = (true, Some(instance), newest);
        self.forget_sent |= !resumes;
        let base = self.claim.and_then(|claim| claim.base);
        self.adopt = newest.map(|n| n.id).filter(|id| plan == Plan::Continue && Some(*id) != base);
        match (plan, &mut self.scan) {
            (Plan::Continue, _) => self.scan = None,
            // A doubt that is newer than the scan is not healed by what it has read already.
            (_, Some(_)) if resumes && self.scan_gap_count == self.gap_count => {}
            (Plan::Copy { compare }, _) => self.scan = Some(Scan::new(self.geometry, compare)),
            (Plan::Compare, _) => self.scan = Some(Scan::new(self.geometry, true)),
        }
        self.scan_gap_count = self.gap_count;
        self.outbox.push_back(Action::LoadPending);
    }

    pub(super) fn pending(&mut self, pending: BlockSet) {
        let adopt = self.adopt.take();
        let healed =
            self.sealed.take_if(|sealed| adopt == Some(sealed.newest.id)).map(|sealed| sealed.healed);
        let knows_what_is_left = !self.forget_sent && (adopt.is_none() || healed.is_some());
        if !knows_what_is_left {
            // Blocks of a compare may be in it that are in no pending set.
            self.to_send.union(&pending);
        }
        self.forget_sent = false;
        let mut changed = pending;
        if let Some(id) = adopt {
            // The commit was made, its acknowledgement was lost. If it was sealed by this session, what changed since is
            // known; else everything pending stays pending: more than needed, never less.
            changed = self.to_send.clone();
            let doubtful = self.claim.is_some_and(|claim| claim.gap.is_some());
            let healed = healed.unwrap_or_else(|| doubtful.then_some(self.gap_count));
            self.outbox.push_front(Action::CommitTracker { id, keep: changed.clone(), healed });
        } else if knows_what_is_left {
            // What was sent has arrived. Of the rest it is not known whether it was heard of.
            changed = self.to_send.clone();
        }
        if self.scan.as_ref().is_some_and(Scan::covers_all_before) {
            (self.to_send, changed) = (BlockSet::new(), BlockSet::new());
            self.outbox.push_back(Action::Drain(DrainFor::Scan));
            self.outbox.push_back(Action::Send(Endpoint::Live, DiskUp::ScanBegins));
        }
        self.sealed = None;
        match knows_what_is_left && adopt.is_none() {
            true => self.reported.subtract(&changed),
            false => self.reported = BlockSet::new(),
        }
        self.report(&changed);
        self.begin_what_waits();
    }

    pub(super) fn committed(&mut self, id: CheckpointId) {
        let Some(Sealed { newest, healed }) = self.sealed.take_if(|sealed| sealed.newest.id == id) else {
            let reason = format!("the dispatcher committed {id}, which this agent did not seal");
            return self.outbox.push_back(Action::DropLink { reason });
        };
        (self.sync, self.scan, self.newest) = (None, None, Some(newest));
        self.unacked.clear();
        self.unacked_bytes = 0;
        // Behind the freeze, what is to be sent is exactly what was drained since.
        let keep = self.to_send.clone();
        // Before any drain that waits: what that one finds must stay pending.
        self.outbox.push_front(Action::CommitTracker { id, keep: keep.clone(), healed });
        self.reported = BlockSet::new();
        self.report(&keep);
        self.begin_what_waits();
    }
}
