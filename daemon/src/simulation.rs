//! Agent, network, dispatcher and disk in one thread under a seed: what every checkpoint holds is known, and must be
//! what comes back, whatever is cut, killed or overtaken.
//!
//! The real sessions of both sides, the real frames and the real store run here; the disk, the tracker, the freeze and
//! the file system are simulated. A failing seed is replayed with `BLXREP_SEED=N cargo test -p blxrep simulation`.

use std::collections::{HashMap, VecDeque};

use crate::agent::action::{Action, DrainFor, Input, Purpose, ReadResult};
use crate::agent::session::DiskSession as AgentSession;
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::{Checkpoint, Consistency, chain};
use crate::dispatcher::session::{DiskSession as DispatcherSession, Event};
use crate::freeze::final_pass::{Outcome, Taken};
use crate::geometry::Geometry;
use crate::hash::group_digest;
use crate::ids::{CheckpointId, Epoch};
use crate::reader::{hash_extent, pack, pack_differing};
use crate::restore::verify::view;
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::store::simfiles::{Loss, SimFiles};
use crate::tracker::sim::SimTracker;
use crate::tracker::{Gap, Tracker};
use crate::wire::Endpoint;
use crate::wire::frame::{decode_message, encode_data, encode_message};
use crate::wire::message::DiskUp;

const SEEDS: u64 = 300;
const FAULTY_STEPS: u32 = 4000;
const BUDGET_BYTES: u64 = 48 * 4096;

/// SplitMix64 (Steele, Lea, Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

struct World {
    random: Random,
    geometry: Geometry,
    disk: Vec<u8>,
    tracker: SimTracker,
    agent: AgentSession,
    dispatcher: DispatcherSession,
    files: SimFiles,
    linked: bool,
    paused: bool,
    ready: bool,
    ordered: bool,
    order_on_its_way: bool,
    up: [VecDeque<Vec<u8>>; 2],
    down: [VecDeque<Vec<u8>>; 2],
    seconds: i64,
    photo: Vec<u8>,
    photos: HashMap<CheckpointId, Vec<u8>>,
    acknowledged: Vec<Checkpoint>,
    dispatcher_lives: u8,
    /// Steps between faults, on average.
    calm_steps: u64,
}

fn slot(endpoint: Endpoint) -> usize {
    usize::from(endpoint == Endpoint::Live)
}

fn paths() -> Paths {
    Paths::new("a".parse().unwrap(), "d".parse().unwrap())
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let geometry = Geometry::new((3 << 20) + 512 * (1 + random.below(7)), 12).unwrap();
        let files = SimFiles::default();
        let tracker = SimTracker::default();
        tracker.raise(Gap::NewTracker);
        let mut world = Self {
            geometry,
            disk: vec![0; geometry.size_bytes() as usize],
            tracker,
            agent: AgentSession::new(geometry, "sdx".into(), BUDGET_BYTES),
            dispatcher: dispatcher(&files, 0),
            files,
            linked: false,
            paused: false,
            ready: false,
            ordered: false,
            order_on_its_way: false,
            up: Default::default(),
            down: Default::default(),
            seconds: 1_795_000_000,
            photo: Vec::new(),
            photos: HashMap::new(),
            acknowledged: Vec::new(),
            dispatcher_lives: 0,
            calm_steps: 100 << random.below(5),
            random,
        };
        for _ in 0..40 {
            world.change_disk();
        }
        world
    }

    /// Changes some blocks on the disk.
    fn change_disk(&mut self) -> Extent {
        let blocks = self.geometry.blocks();
        let first = self.random.below(blocks);
        let most = if self.random.once_in(20) { 300 } else { 12 };
        let count = (1 + self.random.below(most)).min(blocks - first);
        let (start, len) = self.geometry.range(first, count);
        // Few different contents, so that blocks come back to what they were.
        let fill = self.random.below(4) as u8;
        self.disk[start as usize..(start + len) as usize].fill(fill);
        Extent { first, count }
    }

    fn write(&mut self) {
        let extent = self.change_disk();
        self.tracker.complete(extent);
    }

    fn bytes(&self, extent: Extent) -> Vec<u8> {
        let (start, len) = self.geometry.range(extent.first, extent.count);
        self.disk[start as usize..(start + len) as usize].to_vec()
    }

    /// The agent does one thing; false if it has nothing to do.
    fn act(&mut self) -> bool {
        let Some(action) = self.agent.poll() else { return false };
        match action {
            Action::Send(endpoint, message) => {
                if let DiskUp::Seal { id, consistency, .. } = &message
                    && *consistency != Consistency::Fuzzy
                {
                    self.photos.insert(*id, self.photo.clone());
                }
                self.up[slot(endpoint)].push_back(encode_message(&message).unwrap());
            }
            Action::SendData { endpoint, area, seq, run } => {
                self.up[slot(endpoint)].push_back(encode_data(area, seq, &run));
            }
            Action::Drain(drain) => {
                let blocks = self.tracker.drain().unwrap();
                if drain == DrainFor::Seal {
                    self.photo = self.disk.clone();
                }
                let time_unix_ms = self.seconds as u64 * 1000;
                self.agent.handle(Input::Drained { drain, blocks, time_unix_ms });
            }
            Action::LoadPending => {
                let pending = self.tracker.pending().unwrap();
                self.agent.handle(Input::Pending(pending));
            }
            Action::CheckClaim => {
                self.tracker.claim().unwrap();
                self.agent.handle(Input::Doubts(self.tracker.gap_count()));
            }
            Action::SyncFileSystems => {}
            Action::Read(extent, purpose) => {
                // What was asked for when the pause came may still be read.
                assert!(!self.paused || matches!(purpose, Purpose::Differing(_)), "read while paused");
                let data = self.bytes(extent);
                let result = match &purpose {
                    Purpose::Base | Purpose::Changed => ReadResult::Runs(pack(extent, &data, self.geometry)),
                    Purpose::Digest => ReadResult::Digest(group_digest(&hash_extent(&data, self.geometry))),
                    Purpose::Differing(known) => {
                        ReadResult::Runs(pack_differing(extent, &data, self.geometry, known))
                    }
                };
                self.agent.handle(Input::Read { extent, purpose, result: Ok(result) });
            }
            Action::FinalPass { to_send, last } => {
                assert!(!self.paused, "a freeze while paused");
                let outcome = self.final_pass(&to_send, last);
                self.tracker.claim().unwrap();
                self.agent.handle(Input::FinalPass(outcome, self.tracker.gap_count()));
            }
            Action::CommitTracker { id, keep, heals } => self.tracker.commit(id, &keep, heals).unwrap(),
            Action::DropLink { .. } => self.cut(),
            Action::Stop { reason } => panic!("refused for good: {reason}"),
        }
        true
    }

    fn final_pass(&mut self, to_send: &BlockSet, last: Option<CheckpointId>) -> Result<Outcome, String> {
        let mut rest = self.tracker.drain().unwrap();
        rest.union(to_send);
        if self.random.once_in(30) {
            return Err("a bad sector".into());
        }
        if rest.len() > BUDGET_BYTES / 4096 {
            return Ok(Outcome::TooMuch { rest, note: String::new() });
        }
        let data =
            rest.extents(self.geometry.group_blocks()).map(|extent| (extent, self.bytes(extent))).collect();
        self.photo = self.disk.clone();
        if self.random.once_in(8) {
            // Something writes around the freeze.
            self.write();
        }
        let after = self.tracker.drain().unwrap();
        let consistency = if after.is_empty() { Consistency::Filesystem } else { Consistency::Fuzzy };
        let id = CheckpointId::next(self.seconds, last);
        let (time_unix_ms, note) = (self.seconds as u64 * 1000, String::new());
        Ok(Outcome::Taken(Taken { id, time_unix_ms, freeze_ms: 1, consistency, note, data, after }))
    }

    fn cut(&mut self) {
        (self.linked, self.ready, self.ordered) = (false, false, false);
        self.up = Default::default();
        self.down = Default::default();
        self.agent.handle(Input::LinkDown);
        self.dispatcher.detach();
    }

    fn link(&mut self) {
        self.linked = true;
        let claim = self.tracker.claim().unwrap();
        self.agent.handle(Input::LinkUp(claim, self.tracker.gap_count()));
    }

    fn deliver_up(&mut self, endpoint: Endpoint) {
        let Some(bytes) = self.up[slot(endpoint)].pop_front() else { return };
        match self.dispatcher.frame(endpoint, &bytes) {
            Ok(events) => self.events(events),
            Err(error) => panic!("the dispatcher refuses: {error}"),
        }
    }

    fn events(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Answer(endpoint, message) => {
                    self.down[slot(endpoint)].push_back(encode_message(&message).unwrap());
                }
                Event::Ready => self.ready = true,
                Event::SyncFailed { .. } => self.ordered = false,
                Event::Tight(_) => {}
                Event::Committed(checkpoint) => {
                    self.ordered = false;
                    self.acknowledged.push(*checkpoint);
                    let newest = self.acknowledged.len();
                    self.check(newest - 1);
                }
            }
        }
    }

    fn deliver_down(&mut self, endpoint: Endpoint) {
        if let Some(bytes) = self.down[slot(endpoint)].pop_front() {
            self.agent.handle(Input::Message(endpoint, decode_message(&bytes).unwrap()));
        }
    }

    /// A checkpoint must be there and be what the disk was.
    fn check(&self, at: usize) {
        let id = self.acknowledged[at].id;
        let dir = Dir::new(self.files.arc());
        let chain = chain::load(&dir, &paths()).unwrap();
        let count =
            chain.members.iter().position(|m| m.checkpoint.id == id).expect("a checkpoint disappeared") + 1;
        let Some(photo) = self.photos.get(&id) else {
            assert_eq!(self.acknowledged[at].consistency, Consistency::Fuzzy);
            return;
        };
        let mut view = view(&dir, &paths(), &chain, count).unwrap();
        for group in 0..self.geometry.groups() {
            let (first, blocks) = self.geometry.group_extent(group);
            let (start, len) = self.geometry.range(first, blocks);
            let found = view.read_group(group).unwrap().map_or(vec![0; len as usize], |group| group.data);
            assert!(
                found == photo[start as usize..(start + len) as usize],
                "checkpoint {id} differs in group {group}"
            );
        }
    }

    fn fault(&mut self) {
        match self.random.below(6) {
            0 | 1 => self.cut(),
            2 => {
                self.cut();
                self.agent = AgentSession::new(self.geometry, "sdx".into(), BUDGET_BYTES);
                self.pause(self.paused);
            }
            3 | 4 => {
                let loss = match self.random.below(3) {
                    0 => Loss::Nothing,
                    1 => Loss::All,
                    _ => Loss::Seed(self.random.next()),
                };
                self.files.crash(loss);
                self.dispatcher_lives += 1;
                self.dispatcher = dispatcher(&self.files, self.dispatcher_lives);
                self.cut();
            }
            _ => {
                // A write that the tracker missed, but for which it knows that something was missed.
                self.change_disk();
                self.tracker.raise(Gap::Audit);
            }
        }
    }

    fn pause(&mut self, paused: bool) {
        self.paused = paused;
        self.agent.handle(Input::Paused(paused));
    }

    fn step(&mut self, faulty: bool) {
        self.seconds += i64::from(self.random.once_in(10));
        if faulty && self.random.once_in(self.calm_steps) {
            self.fault();
        }
        match self.random.below(20) {
            0 if faulty && self.random.once_in(3) => self.write(),
            1 => self.agent.handle(Input::Tick),
            2 if !self.linked => self.link(),
            3 if self.ready && !self.ordered => (self.ordered, self.order_on_its_way) = (true, true),
            4 if std::mem::take(&mut self.order_on_its_way) => self.agent.handle(Input::SyncOrdered),
            5 => {
                let events = self.dispatcher.flush().unwrap();
                self.events(events);
            }
            6 => self.deliver_up(Endpoint::Snapshot),
            7 => self.deliver_up(Endpoint::Live),
            8 => self.deliver_down(Endpoint::Snapshot),
            9 => self.deliver_down(Endpoint::Live),
            10 if faulty && self.random.once_in(30) => self.pause(!self.paused),
            _ => {
                self.act();
            }
        }
    }
}

fn dispatcher(files: &SimFiles, life: u8) -> DispatcherSession {
    DispatcherSession::new(files.arc(), "a".parse().unwrap(), "d".parse().unwrap(), Epoch([life; 16]))
}

/// Returns the number of checkpoints.
fn run(seed: u64) -> usize {
    let mut world = World::new(seed);
    (0..FAULTY_STEPS).for_each(|_| world.step(true));
    world.pause(false);
    // Peace: a checkpoint of the disk as it is now must come.
    let arrived = |world: &World| {
        let last = world.acknowledged.last();
        last.is_some_and(|c| {
            c.consistency != Consistency::Fuzzy && world.photos.get(&c.id) == Some(&world.disk)
        })
    };
    let mut left = 60_000;
    while !arrived(&world) {
        world.step(false);
        left -= 1;
        assert!(left > 0, "after the faults no consistent checkpoint came");
    }
    (0..world.acknowledged.len()).for_each(|at| world.check(at));
    world.acknowledged.len()
}

#[test]
fn every_checkpoint_is_what_the_disk_was_whatever_breaks() {
    if let Some(seed) = std::env::var("BLXREP_SEED").ok().and_then(|seed| seed.parse().ok()) {
        run(seed);
        return;
    }
    let mut checkpoints = 0;
    for seed in 0..SEEDS {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(count) => checkpoints += count,
            Err(_) => panic!("seed {seed} failed: BLXREP_SEED={seed} cargo test -p blxrep simulation"),
        }
    }
    assert!(
        checkpoints as u64 > 2 * SEEDS,
        "only {checkpoints} checkpoints: the simulation does not get anywhere"
    );
}
