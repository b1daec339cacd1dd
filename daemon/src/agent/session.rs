//! One disk on the agent: what to do next. Pure: results and messages in, [`Action`]s out.
//!
//! The driver ([`super::disk`]) asks [`DiskSession::poll`] for an action, carries it out, gives the result to
//! [`DiskSession::handle`], and asks again; where there is none it waits for a message or a tick.
//!
//! `to_send` holds every block the dispatcher does not hold yet. It is made anew from the tracker's pending set
//! whenever the dispatcher may have forgotten something, and a block leaves it only into the window of frames not
//! acknowledged, from which it comes back when the connection breaks. What must never happen here: a block of the
//! pending set that is neither in `to_send`, nor in the window, nor staged by the dispatcher.

mod agree;
#[cfg(test)]
mod scan_tests;
mod syncing;
mod unreadable;
#[cfg(test)]
mod unreadable_tests;

use std::collections::VecDeque;

use super::action::{Action, DrainFor, Input, Purpose, ReadResult};
use super::scan::{Scan, Step};
use super::sync::{Phase, Sync};
use crate::bitmap::{BlockSet, Extent};
use crate::geometry::Geometry;
use crate::ids::{CheckpointId, Epoch};
use crate::run::Run;
use crate::status::{DiskState, Newest};
use crate::tracker::Claim;
use crate::wire::Endpoint;
use crate::wire::frame::Area;
use crate::wire::message::{CHANGED_MAX_EXTENTS, DiskDown, DiskUp, clean_text};
use unreadable::{Unreadable, failing, unreadable_in};

/// Bytes of a data frame besides its run.
const FRAME_OVERHEAD_BYTES: u64 = 24;
/// Why a sync of a paused disk fails.
const PAUSED: &str = "the disk is paused";

struct Unacked {
    endpoint: Endpoint,
    area: Area,
    seq: u64,
    extent: Extent,
    bytes: u64,
}

/// One disk of an agent. See the module.
pub struct DiskSession {
    geometry: Geometry,
    device: String,
    budget_blocks: u64,
    outbox: VecDeque<Action>,
    attached: bool,
    claim: Option<Claim>,
    gap_count: u64,
    instance: Option<Epoch>,
    paused: bool,
    newest: Option<Newest>,
    adopt: Option<CheckpointId>,
    forget_sent: bool,
    order_waits: bool,
    window_bytes: u64,
    next_seq: u64,
    unacked: VecDeque<Unacked>,
    unacked_bytes: u64,
    to_send: BlockSet,
    reported: BlockSet,
    unreadable: Unreadable,
    scan: Option<Scan>,
    scan_gap_count: u64,
    sync: Option<Sync>,
    sealed: Option<Sealed>,
}

/// A checkpoint that was sealed and is not known to be committed.
struct Sealed {
    newest: Newest,
    /// How many gaps had been raised when the scan before it began.
    healed: Option<u64>,
}

impl DiskSession {
    /// A disk that was never attached. `budget_bytes` is how much may be read while file systems are frozen.
    pub fn new(geometry: Geometry, device: String, budget_bytes: u64) -> Self {
        Self {
            geometry,
            device,
            budget_blocks: (budget_bytes >> geometry.block_shift()).max(1),
            outbox: VecDeque::new(),
            attached: false,
            claim: None,
            gap_count: 0,
            instance: None,
            paused: false,
            newest: None,
            adopt: None,
            forget_sent: true,
            order_waits: false,
            window_bytes: 0,
            next_seq: 1,
            unacked: VecDeque::new(),
            unacked_bytes: 0,
            to_send: BlockSet::new(),
            reported: BlockSet::new(),
            unreadable: Unreadable::default(),
            scan: None,
            scan_gap_count: 0,
            sync: None,
            sealed: None,
        }
    }

    /// The next thing to do, if there is one now.
    pub fn poll(&mut self) -> Option<Action> {
        if let Some(action) = self.outbox.pop_front() {
            return Some(action);
        }
        if !self.attached || self.paused || self.unacked_bytes >= self.window_bytes {
            return None;
        }
        self.poll_sync().or_else(|| self.poll_scan())
    }

    /// Takes in what happened.
    pub fn handle(&mut self, input: Input) {
        match input {
            Input::LinkUp(claim, gap_count) => self.link_up(claim, gap_count),
            Input::LinkDown => self.link_down(),
            Input::Message(endpoint, message) => self.message(endpoint, message),
            Input::SyncOrdered => self.sync_ordered(),
            Input::Paused(paused) => self.pause(paused),
            Input::Tick => self.tick(),
            Input::Drained { drain, blocks, time_unix_ms } => self.drained(drain, &blocks, time_unix_ms),
            Input::Pending(pending) => self.pending(pending),
            Input::Doubts(gap_count) => self.doubts(gap_count),
            Input::Read { extent, purpose, result } => self.read(extent, purpose, result),
            Input::Located(blocks, text) => self.unreadable.named(blocks, text),
            Input::FinalPass(outcome, gap_count) => self.final_pass(outcome, gap_count),
        }
    }

    /// What the disk is doing.
    pub fn state(&self) -> DiskState {
        match (&self.scan, &self.sync) {
            _ if !self.attached => DiskState::Detached,
            // A checkpoint that is sealed is still committed.
            (_, Some(_)) => DiskState::Syncing,
            _ if self.paused => DiskState::Paused,
            (Some(scan), _) if !scan.is_done() && self.newest.is_none() => DiskState::Copying,
            (Some(scan), _) if !scan.is_done() => DiskState::Comparing,
            _ => DiskState::Idle,
        }
    }

    /// How far a scan is, from 0 to 1.
    pub fn progress(&self) -> f64 {
        self.scan.as_ref().filter(|scan| !scan.is_done()).map_or(0.0, Scan::progress)
    }

    /// The newest checkpoint, as far as it was heard of.
    pub fn newest(&self) -> Option<Newest> {
        self.newest
    }

    /// Bytes changed since then; all of the disk if there is none.
    pub fn changed_bytes(&self) -> u64 {
        match self.newest {
            Some(_) => self.reported.len() << self.geometry.block_shift(),
            None => self.geometry.size_bytes(),
        }
    }

    /// What a person should know of blocks that cannot be read; empty if there is none.
    pub fn unreadable_text(&self) -> &str {
        self.unreadable.text()
    }

    /// Nothing is sent while paused: a sync that is not sealed yet is given up. Changes are reported on.
    fn pause(&mut self, paused: bool) {
        self.paused = paused;
        let sealed = self.sync.as_ref().is_some_and(|sync| sync.phase() == Phase::Sealed);
        if paused && self.sync.is_some() && !sealed {
            self.fail_sync(PAUSED.to_owned());
            // What was drained behind the freeze was not reported yet.
            self.outbox.push_back(Action::LoadPending);
        }
    }

    fn message(&mut self, endpoint: Endpoint, message: DiskDown) {
        match message {
            DiskDown::Attached { plan, instance, resumes, newest, next_seq, window_bytes, unreadable } => {
                self.unreadable.told(unreadable, self.geometry);
                self.window_bytes = u64::from(window_bytes);
                self.next_seq = next_seq.max(1);
                self.attach(plan, instance, resumes, newest);
            }
            DiskDown::Digests { first_group, digests } => {
                if let Some(scan) = &mut self.scan {
                    scan.digests(first_group, digests);
                }
            }
            DiskDown::Hashes { group, hashes } => {
                if self.scan.as_mut().is_some_and(|scan| scan.answered(group)) {
                    let (first, count) = self.geometry.group_extent(group);
                    self.outbox.push_back(Action::Read(Extent { first, count }, Purpose::Differing(hashes)));
                }
            }
            DiskDown::ScanClosed => {
                if let Some(scan) = &mut self.scan {
                    scan.close();
                }
                self.begin_what_waits();
            }
            DiskDown::Ack { seq } => self.acked(endpoint, seq),
            DiskDown::Committed { id } => self.committed(id),
            DiskDown::Refused { reason, lasting } => {
                let reason = clean_text(reason);
                self.outbox.push_back(match lasting {
                    true => Action::Stop { reason },
                    false => Action::DropLink { reason },
                });
            }
        }
    }

    fn acked(&mut self, endpoint: Endpoint, seq: u64) {
        let bytes = &mut self.unacked_bytes;
        self.unacked.retain(|frame| {
            let done = frame.endpoint == endpoint && frame.seq <= seq;
            *bytes -= if done { frame.bytes } else { 0 };
            !done
        });
    }

    fn tick(&mut self) {
        if self.attached && self.outbox.is_empty() {
            self.outbox.extend(self.unreadable.to_name().map(Action::Locate));
            self.outbox.push_back(Action::CheckClaim);
            self.outbox.push_back(Action::Drain(DrainFor::Report));
            if let Some(scan) = self.scan.as_ref().filter(|scan| !scan.is_done()) {
                let scanned = DiskUp::Scanned { groups: scan.groups_read() };
                self.outbox.push_back(Action::Send(Endpoint::Snapshot, scanned));
            }
        }
    }

    fn doubts(&mut self, gap_count: u64) {
        if gap_count != self.gap_count {
            // Before anything that waits to be sent, above all a seal.
            let reason = "the tracker has a new gap: the disk must be compared".to_owned();
            self.outbox.push_front(Action::DropLink { reason });
        }
    }

    fn drained(&mut self, drain: DrainFor, blocks: &BlockSet, time_unix_ms: u64) {
        if drain == DrainFor::Scan {
            return;
        }
        self.to_send.union(blocks);
        // What changes behind the freeze belongs to the next checkpoint: reported when this one is committed.
        if !self.sync.as_ref().is_some_and(|sync| sync.phase().is_behind_freeze()) {
            self.report(blocks);
        }
        match drain {
            DrainFor::Scan | DrainFor::Report => {}
            DrainFor::Round => self.plan_round(),
            DrainFor::Seal => self.seal_unfrozen(time_unix_ms),
        }
    }

    fn report(&mut self, blocks: &BlockSet) {
        let mut new = blocks.clone();
        new.subtract(&self.reported);
        self.reported.union(&new);
        let extents: Vec<Extent> = new.extents(u64::MAX).collect();
        for part in extents.chunks(CHANGED_MAX_EXTENTS) {
            self.outbox.push_back(Action::Send(Endpoint::Live, DiskUp::Changed(part.to_vec())));
        }
    }

    fn poll_scan(&mut self) -> Option<Action> {
        match self.scan.as_mut()?.step()? {
            Step::Ask { first_group, count } => {
                Some(Action::Send(Endpoint::Snapshot, DiskUp::WantDigests { first_group, count }))
            }
            Step::Read { group, missing } => {
                let (first, count) = self.geometry.group_extent(group);
                let purpose = if missing { Purpose::Base } else { Purpose::Digest };
                Some(Action::Read(Extent { first, count }, purpose))
            }
            Step::Done => Some(Action::Send(Endpoint::Snapshot, DiskUp::ScanDone)),
        }
    }

    fn read(&mut self, extent: Extent, purpose: Purpose, result: Result<ReadResult, String>) {
        match (result, purpose) {
            (Err(reason), Purpose::Changed) => {
                self.to_send.insert(extent);
                self.fail_sync(reason);
            }
            (Err(reason), _) => self.outbox.push_back(Action::DropLink { reason }),
            (Ok(ReadResult::Digest(digest)), _) => {
                let group = extent.first / self.geometry.group_blocks();
                if self.scan.as_mut().is_some_and(|scan| scan.compare(group, digest)) {
                    self.outbox.push_back(Action::Send(Endpoint::Snapshot, DiskUp::WantHashes { group }));
                }
            }
            (Ok(ReadResult::Runs(runs)), purpose) if self.unreadable.is_too_much(unreadable_in(&runs)) => {
                self.read(extent, purpose, Err(failing()));
            }
            (Ok(ReadResult::Runs(runs)), purpose) => {
                self.retried(extent, &runs);
                if let (Some(scan), false) = (&mut self.scan, purpose == Purpose::Changed) {
                    scan.settled(extent.first / self.geometry.group_blocks());
                }
                let (endpoint, area) = match purpose {
                    Purpose::Base => (Endpoint::Snapshot, Area::Base),
                    Purpose::Changed => (Endpoint::Live, Area::Delta),
                    Purpose::Digest | Purpose::Differing(_) => (Endpoint::Snapshot, Area::Delta),
                };
                for run in runs {
                    if purpose != Purpose::Changed || self.unreadable.is_news(&run, &self.reported) {
                        self.send_run(endpoint, area, run);
                    }
                }
            }
        }
    }

    /// After a read in a retry.
    fn retried(&mut self, extent: Extent, runs: &[Run]) {
        let Some(sync) = self.sync.as_mut().filter(|sync| sync.phase() == Phase::Retry) else { return };
        // It was read later than it changed.
        self.to_send.remove(extent);
        if unreadable_in(runs).next().is_some() && sync.retry_failed() {
            self.unreadable.retried_to(extent.end());
        }
    }

    fn send_run(&mut self, endpoint: Endpoint, area: Area, run: Run) {
        let (seq, extent) = (self.next_seq, run.extent());
        let bytes = run.encoded_len() as u64 + FRAME_OVERHEAD_BYTES;
        self.next_seq += 1;
        self.unreadable.sent(&run);
        self.unacked_bytes += bytes;
        self.unacked.push_back(Unacked { endpoint, area, seq, extent, bytes });
        self.outbox.push_back(Action::SendData { endpoint, area, seq, run });
    }
}
