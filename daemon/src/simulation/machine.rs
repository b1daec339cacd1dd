//! A simulated machine with an agent: disk, writes in flight, tracker, and the real session.

use std::collections::VecDeque;

use super::disk::{ModelDisk, ModelReader};
use super::random::Random;
use crate::agent::action::{Input, Purpose, ReadResult};
use crate::agent::read::read;
use crate::agent::session::DiskSession;
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::Consistency;
use crate::freeze::final_pass::{Outcome, Taken};
use crate::geometry::Geometry;
use crate::ids::CheckpointId;
use crate::reader::{Piece, read_pieces};
use crate::tracker::sim::SimTracker;
use crate::tracker::{Gap, Tracker};
use crate::wire::Endpoint;

/// The most blocks that are read in a freeze.
const BUDGET_BLOCKS: u64 = 48;
/// Writes whose content a power cut can take back.
const CACHE_MAX: usize = 12;

/// A write that was begun. Its content reaches the disk some time before it completes.
pub(super) struct Write {
    pub(super) number: u64,
    extent: Extent,
    fill: u8,
    landed: bool,
}

pub(super) struct Machine {
    pub(super) disk: ModelDisk,
    /// Blocks that cannot be read.
    pub(super) bad: BlockSet,
    /// Those that could not be at any time.
    ever_bad: BlockSet,
    pub(super) tracker: SimTracker,
    pub(super) session: DiskSession,
    /// The agent's process: what was meant for an earlier one is not for this one.
    pub(super) life: u32,
    pub(super) is_on: bool,
    pub(super) is_paused: bool,
    pub(super) link: Option<u64>,
    /// Data frames without an acknowledgement.
    pub(super) unacked: Vec<(Endpoint, u64, u64)>,
    pub(super) in_flight: Vec<Write>,
    /// What completed last, with what was there before.
    cache: VecDeque<(Extent, Vec<u8>)>,
    /// The disk at the newest seal, how that seal was proven, and blocks that were being written just then.
    pub(super) photo: Photo,
    next_write: u64,
    boots: u8,
}

/// What a checkpoint must hold.
#[derive(Clone)]
pub(super) struct Photo {
    pub(super) disk: ModelDisk,
    pub(super) consistency: Consistency,
    /// Not completed at that moment: a crash may show them or not.
    pub(super) unsure: BlockSet,
    /// Could not be read, then or at an earlier time.
    pub(super) ever_bad: BlockSet,
}

impl Machine {
    pub(super) fn new(geometry: Geometry) -> Self {
        let tracker = SimTracker::default();
        tracker.raise(Gap::NewTracker);
        let disk = ModelDisk::new(geometry);
        let photo = Photo {
            disk: disk.clone(),
            consistency: Consistency::Fuzzy,
            unsure: BlockSet::new(),
            ever_bad: BlockSet::new(),
        };
        Self {
            session: new_session(geometry),
            disk,
            bad: BlockSet::new(),
            ever_bad: BlockSet::new(),
            tracker,
            life: 0,
            is_on: true,
            is_paused: false,
            link: None,
            unacked: Vec::new(),
            in_flight: Vec::new(),
            cache: VecDeque::new(),
            photo,
            next_write: 0,
            boots: 7,
        }
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.disk.geometry
    }

    fn random_extent(&self, random: &mut Random) -> Extent {
        let blocks = self.geometry().blocks();
        let first = random.below(blocks);
        let most = if random.once_in(20) { 300 } else { 12 };
        Extent { first, count: random.between(1, most).min(blocks - first) }
    }

    /// Begins a write; gives its number.
    pub(super) fn begin_write(&mut self, random: &mut Random) -> u64 {
        let extent = self.random_extent(random);
        self.next_write += 1;
        // Few different contents, so that blocks come back to what they were.
        let fill = random.below(4) as u8;
        self.in_flight.push(Write { number: self.next_write, extent, fill, landed: false });
        self.next_write
    }

    /// The content of a write reaches the disk.
    pub(super) fn land(&mut self, number: u64) {
        let Some(write) = self.in_flight.iter_mut().find(|write| write.number == number) else { return };
        if !std::mem::replace(&mut write.landed, true) {
            let (extent, fill) = (write.extent, write.fill);
            if write.number.is_multiple_of(2) {
                // The disk puts others in the place of bad sectors that are written.
                self.bad.remove(extent);
            }
            self.cache.push_back((extent, self.disk.fills(extent).to_vec()));
            self.cache.drain(..self.cache.len().saturating_sub(CACHE_MAX));
            self.disk.write(extent, fill);
        }
    }

    /// A write completes: the kernel runs the probe. Gives the blocks.
    pub(super) fn complete(&mut self, number: u64) -> u64 {
        self.land(number);
        let Some(at) = self.in_flight.iter().position(|write| write.number == number) else { return 0 };
        let extent = self.in_flight.remove(at).extent;
        self.tracker.complete(extent);
        extent.count
    }

    /// A write of which the tracker only knows that it missed something. Gives the blocks.
    pub(super) fn write_unseen(&mut self, random: &mut Random) -> u64 {
        let extent = self.random_extent(random);
        self.disk.write(extent, random.below(4) as u8);
        self.tracker.raise(Gap::Audit);
        extent.count
    }

    /// Some blocks cannot be read any more. Gives how many.
    pub(super) fn spoil(&mut self, random: &mut Random) -> u64 {
        let extent = self.random_extent(random);
        self.bad.insert(extent);
        self.ever_bad.insert(extent);
        extent.count
    }

    /// The agent's process ends and another begins.
    pub(super) fn restart_agent(&mut self) {
        self.life += 1;
        self.session = new_session(self.geometry());
        self.session.handle(Input::Paused(self.is_paused));
    }

    /// The power goes: writes in flight may have landed, those completed last may be gone; the tracker is a new one.
    /// Gives how many blocks may have changed unseen.
    pub(super) fn lose_power(&mut self, random: &mut Random) -> u64 {
        let mut changed = 0;
        for write in std::mem::take(&mut self.in_flight) {
            if !write.landed && random.once_in(2) {
                self.disk.write(write.extent, write.fill);
            }
            changed += write.extent.count;
        }
        for (extent, before) in std::mem::take(&mut self.cache).into_iter().rev() {
            if random.once_in(3) {
                self.disk.put_back(extent, &before);
            }
            changed += extent.count;
        }
        self.boots += 1;
        self.tracker.reboot(self.boots);
        self.restart_agent();
        changed
    }

    /// The disk is given another size: the agent opens it anew, with a new tracker. Gives how many blocks were just
    /// written.
    pub(super) fn resize(&mut self, geometry: Geometry) -> u64 {
        let written = self.complete_all();
        self.flush_cache();
        self.disk.resize(geometry);
        self.boots += 1;
        self.tracker.reboot(self.boots);
        self.restart_agent();
        written
    }

    fn complete_all(&mut self) -> u64 {
        let numbers: Vec<u64> = self.in_flight.iter().map(|write| write.number).collect();
        numbers.into_iter().map(|number| self.complete(number)).sum()
    }

    /// All that is flushed is not taken back by a power cut any more.
    fn flush_cache(&mut self) {
        self.cache.clear();
    }

    /// Drains for the seal of a sync without a freeze: this moment is the checkpoint's.
    pub(super) fn take_unfrozen_photo(&mut self) {
        let unsure = self.in_flight.iter().map(|write| write.extent).collect();
        let disk = self.disk.clone();
        self.photo = Photo { disk, consistency: Consistency::Crash, unsure, ever_bad: self.ever_bad.clone() };
    }

    pub(super) fn read(&self, extent: Extent, purpose: &Purpose) -> ReadResult {
        read(&mut self.reader(), extent, purpose, self.geometry(), &mut || true).unwrap()
    }

    fn reader(&self) -> ModelReader<'_> {
        ModelReader { disk: &self.disk, bad: &self.bad, buffer: Vec::new() }
    }

    /// A freeze waits for what is in flight. Gives the blocks that so completed, and what came of the pass.
    pub(super) fn final_pass(
        &mut self,
        random: &mut Random,
        wall_ms: i64,
        to_send: &BlockSet,
        last: Option<CheckpointId>,
    ) -> (u64, Result<Outcome, String>) {
        let mut written = self.complete_all();
        self.flush_cache();
        let mut rest = self.tracker.drain().unwrap();
        rest.union(to_send);
        if random.once_in(30) {
            return (written, Err("a hook took the disk away".into()));
        }
        if rest.len() > BUDGET_BLOCKS {
            return (written, Ok(Outcome::TooMuch { rest, note: String::new() }));
        }
        // Something writes around the freeze, between two reads.
        let disturbed = random.once_in(8).then(|| random.below(rest.len() + 1));
        self.photo = Photo {
            disk: self.disk.clone(),
            consistency: Consistency::Filesystem,
            unsure: BlockSet::new(),
            ever_bad: self.ever_bad.clone(),
        };
        let (mut data, mut unreadable) = (Vec::new(), BlockSet::new());
        let mut read_blocks = 0;
        for extent in rest.extents(self.geometry().group_blocks()) {
            if disturbed.is_some_and(|at| (read_blocks..read_blocks + extent.count).contains(&at)) {
                let number = self.begin_write(random);
                written += self.complete(number);
            }
            read_blocks += extent.count;
            read_pieces(&mut self.reader(), extent, &mut || true, &mut |piece| match piece {
                Piece::Data(part, bytes) => data.push((part, bytes.to_vec())),
                Piece::Unreadable(part) => unreadable.insert(part),
            })
            .unwrap();
        }
        let after = self.tracker.drain().unwrap();
        let consistency = if after.is_empty() { Consistency::Filesystem } else { Consistency::Fuzzy };
        let id = CheckpointId::next(wall_ms / 1000, last);
        let (time_unix_ms, note) = (wall_ms as u64, String::new());
        let taken = Taken { id, time_unix_ms, freeze_ms: 1, consistency, note, data, unreadable, after };
        (written, Ok(Outcome::Taken(taken)))
    }
}

fn new_session(geometry: Geometry) -> DiskSession {
    DiskSession::new(geometry, "sdx".into(), BUDGET_BLOCKS << geometry.block_shift())
}
