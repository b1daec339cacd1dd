//! A data directory that is full: what is taken and what waits, and that everything goes on when there is room.

use super::session::{DiskSession, Event, SessionError};
use crate::bitmap::Extent;
use crate::checkpoint::{Consistency, chain};
use crate::geometry::Geometry;
use crate::hash::hash_blocks;
use crate::ids::{CheckpointId, Epoch};
use crate::restore::verify;
use crate::run::Run;
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::store::simfiles::SimFiles;
use crate::tracker::{Claim, Gap};
use crate::wire::Endpoint;
use crate::wire::frame::{Area, encode_data, encode_message};
use crate::wire::message::{DiskDown, DiskUp, Plan};

const MIB: u64 = 1 << 20;
const GROUPS: u64 = 3;

fn geometry() -> Geometry {
    Geometry::new(GROUPS * MIB, 16).unwrap()
}

fn id(n: i64) -> CheckpointId {
    CheckpointId::next(1_795_293_296 + n, None)
}

/// Bytes that do not compress.
fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

struct Agent {
    files: SimFiles,
    session: DiskSession,
    seq: u64,
}

impl Agent {
    fn new(files: SimFiles) -> Self {
        let session = DiskSession::new(
            files.arc(),
            "agent1".parse().unwrap(),
            "disk0".parse().unwrap(),
            Epoch([1; 16]),
        );
        Self { files, session, seq: 0 }
    }

    fn say(&mut self, endpoint: Endpoint, message: &DiskUp) -> Result<Vec<Event>, SessionError> {
        let said = self.session.frame(endpoint, &encode_message(message).unwrap());
        self.after(said)
    }

    /// As the disk's thread does: an error ends the connection.
    fn after(&mut self, said: Result<Vec<Event>, SessionError>) -> Result<Vec<Event>, SessionError> {
        if said.is_err() {
            self.session.detach();
        }
        said
    }

    fn attach(&mut self, base: Option<CheckpointId>, gap: Option<Gap>) -> Result<Vec<Event>, SessionError> {
        let claim = Claim { epoch: Epoch([7; 16]), base, gap };
        let attach = DiskUp::Attach { device: "sda".into(), geometry: geometry(), claim };
        let events = self.say(Endpoint::Live, &attach)?;
        let Event::Answer(_, DiskDown::Attached { next_seq, .. }) = &events[0] else { panic!("{events:?}") };
        self.seq = *next_seq;
        Ok(events)
    }

    fn plan(events: &[Event]) -> Plan {
        let Event::Answer(_, DiskDown::Attached { plan, .. }) = &events[0] else { panic!("{events:?}") };
        *plan
    }

    fn data(&mut self, area: Area, first: u64, count: u64, data: &[u8]) -> Result<Vec<Event>, SessionError> {
        let run = if data.is_empty() {
            Run::zeros(first, count as u32)
        } else {
            Run::pack(first, hash_blocks(data, 1 << 16), data)
        };
        let endpoint = if area == Area::Base { Endpoint::Snapshot } else { Endpoint::Live };
        let said = self.session.frame(endpoint, &encode_data(area, self.seq, &run));
        self.seq += 1;
        let said = said.and_then(|_| self.session.flush());
        self.after(said)
    }

    fn changed(&mut self, first: u64) -> Result<Vec<Event>, SessionError> {
        let said = self.say(Endpoint::Live, &DiskUp::Changed(vec![Extent { first, count: 1 }]));
        let said = said.and_then(|_| self.session.flush());
        self.after(said)
    }

    fn seal(&mut self, n: i64) -> Result<Vec<Event>, SessionError> {
        self.say(
            Endpoint::Live,
            &DiskUp::Seal {
                id: id(n),
                consistency: Consistency::Filesystem,
                time_unix_ms: 1,
                freeze_ms: 1,
                note: String::new(),
            },
        )
    }

    /// The full copy of a disk of zeros, and the first checkpoint.
    fn copy(&mut self) {
        self.attach(None, Some(Gap::NewTracker)).unwrap();
        for group in 0..GROUPS {
            let (first, count) = geometry().group_extent(group);
            self.data(Area::Base, first, count, &[]).unwrap();
        }
        self.say(Endpoint::Snapshot, &DiskUp::ScanDone).unwrap();
        self.seal(0).unwrap();
    }

    /// So much is free from now on, of a file system of 100 times the reserve of 1 MiB.
    fn free(&self, bytes: u64) {
        self.files.set_free(bytes, 100 * MIB);
    }

    /// Every checkpoint that is there can be read whole; gives their number.
    fn readable(&self) -> usize {
        let owner = Paths::new("agent1".parse().unwrap(), "disk0".parse().unwrap());
        let dir = Dir::new(self.files.arc());
        let chain = chain::load(&dir, &owner).unwrap();
        assert!(chain.broken.is_none(), "{:?}", chain.broken);
        let count = chain.members.len();
        if count > 0 {
            assert_eq!(verify::verify(&dir, &owner, &chain, count, &mut |_| Ok(())).unwrap(), []);
            let view = verify::view(&dir, &owner, &chain, count).unwrap();
            (0..GROUPS).for_each(|group| drop(view.read_group(group).unwrap()));
        }
        count
    }
}

fn is_full<T: std::fmt::Debug>(result: Result<T, SessionError>) -> String {
    match result {
        Err(error @ SessionError::Full(_)) => {
            let DiskDown::Refused { lasting, .. } = error.to_message() else { panic!("{error}") };
            assert!(!lasting, "the agent is to come again");
            error.to_string()
        }
        other => panic!("there was room: {other:?}"),
    }
}

#[test]
fn a_sync_stops_at_the_reserve_and_goes_on_with_what_was_stored() {
    let mut agent = Agent::new(SimFiles::default());
    agent.copy();
    agent.changed(2).unwrap();
    agent.changed(3).unwrap();
    agent.free(MIB + (96 << 10));
    let (one, two) = (noise(1 << 16, 1), noise(1 << 16, 2));
    agent.data(Area::Delta, 2, 1, &one).unwrap();
    agent.data(Area::Delta, 3, 1, &two).unwrap();
    let said = is_full(agent.data(Area::Delta, 4, 1, &one));
    assert!(said.contains("no space: up to 0 MiB are needed") && said.contains("0 MiB are free"), "{said}");
    assert_eq!(agent.readable(), 1);

    // Attached again, it reports what changes, and no data is taken: the dispatcher does not ask for any.
    let events = agent.attach(Some(id(0)), None).unwrap();
    assert!(Agent::plan(&events) == Plan::Continue && events.contains(&Event::Ready { scanned: false }));
    agent.changed(9).unwrap();
    let short = agent.session.shortage().unwrap().unwrap();
    assert_eq!(short.needed_bytes, 1 << 16, "what was stored is not needed again");
    is_full(agent.data(Area::Delta, 9, 1, &one));

    // Room for what is needed and no more.
    agent.attach(Some(id(0)), None).unwrap();
    agent.free(MIB + (64 << 10));
    assert!(agent.session.shortage().unwrap().is_some());
    agent.free(MIB + (68 << 10));
    assert_eq!(agent.session.shortage().unwrap(), None);
    agent.data(Area::Delta, 9, 1, &one).unwrap();
    // The seal is taken out of the reserve.
    agent.free(MIB - (8 << 10));
    let events = agent.seal(1).unwrap();
    assert!(matches!(events[..], [.., Event::Committed(_)]), "{events:?}");
    assert_eq!(agent.readable(), 2);
}

#[test]
fn below_half_of_the_reserve_nothing_is_taken_and_nothing_is_lost() {
    let mut agent = Agent::new(SimFiles::default());
    agent.copy();
    agent.free(MIB / 2);
    is_full(agent.changed(2));
    let before = agent.files.dump();
    for _ in 0..3 {
        is_full(agent.attach(Some(id(0)), None));
    }
    assert!(agent.files.dump() == before, "a refused attach writes nothing");
    assert_eq!(agent.readable(), 1);
    agent.free(3 * MIB);
    agent.attach(Some(id(0)), None).unwrap();
    assert_eq!(agent.session.shortage().unwrap(), None);
    agent.changed(2).unwrap();
    agent.data(Area::Delta, 2, 1, &noise(1 << 16, 1)).unwrap();
    agent.seal(1).unwrap();
    assert_eq!(agent.readable(), 2);
}

#[test]
fn a_copy_that_may_not_fit_is_told_so_and_made_as_far_as_it_fits() {
    let mut agent = Agent::new(SimFiles::default());
    agent.free(MIB + MIB / 2);
    let events = agent.attach(None, Some(Gap::NewTracker)).unwrap();
    let Event::Tight(short) = &events[1] else { panic!("{events:?}") };
    assert_eq!((short.needed_bytes, short.free_bytes >> 20), (GROUPS * MIB, 1));
    // A disk of zeros fits.
    for group in 0..2 {
        let (first, count) = geometry().group_extent(group);
        agent.data(Area::Base, first, count, &[]).unwrap();
    }
    agent.data(Area::Delta, 1, 1, &noise(1 << 16, 1)).unwrap();
    agent.free(MIB - 1);
    let (first, count) = geometry().group_extent(2);
    is_full(agent.data(Area::Base, first, count, &noise(MIB, 2)));
    // It waits until the rest of it fits, and is not begun anew.
    let said = is_full(agent.attach(None, Some(Gap::NewTracker)));
    assert!(said.contains("up to 1 MiB are needed"), "{said}");
    agent.free(2 * MIB + (64 << 10));
    let events = agent.attach(None, Some(Gap::NewTracker)).unwrap();
    assert_eq!(Agent::plan(&events), Plan::Copy { compare: false });
    agent.data(Area::Base, first, count, &noise(MIB, 2)).unwrap();
    agent.say(Endpoint::Snapshot, &DiskUp::ScanDone).unwrap();
    agent.seal(0).unwrap();
    assert_eq!(agent.readable(), 1);
}

#[test]
fn neither_a_copy_nor_a_compare_is_begun_without_room() {
    let mut agent = Agent::new(SimFiles::default());
    agent.free(MIB);
    let said = is_full(agent.attach(None, Some(Gap::NewTracker)));
    assert!(said.contains("up to 3 MiB are needed"), "{said}");
    assert!(agent.files.dump().is_empty());
    agent.free(50 * MIB);
    agent.copy();
    agent.session.detach();
    agent.free(MIB);
    is_full(agent.attach(None, Some(Gap::Audit)));
    agent.free(3 * MIB);
    let events = agent.attach(None, Some(Gap::Audit)).unwrap();
    assert_eq!(Agent::plan(&events), Plan::Compare);
}

#[test]
fn a_write_that_finds_no_space_all_the_same_ends_the_connection_and_loses_nothing() {
    let mut agent = Agent::new(SimFiles::default());
    agent.copy();
    agent.changed(2).unwrap();
    // A quota, which nobody sees before.
    agent.files.set_fault(Some(crate::store::simfiles::Fault::Full(0)));
    let error = agent.data(Area::Delta, 2, 1, &noise(1 << 16, 1)).unwrap_err();
    assert!(error.is_no_space(), "{error}");
    assert_eq!(agent.readable(), 1);
    agent.files.set_fault(None);
    agent.attach(Some(id(0)), None).unwrap();
    agent.data(Area::Delta, 2, 1, &noise(1 << 16, 1)).unwrap();
    agent.seal(1).unwrap();
    assert_eq!(agent.readable(), 2);
}
