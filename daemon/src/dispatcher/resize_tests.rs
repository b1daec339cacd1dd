//! What a session does with a disk of another size, or in the place of another one.

use super::session::{Admission, DiskSession, Event, SessionError};
use crate::geometry::Geometry;
use crate::hash::{BlockHash, group_digest};
use crate::ids::Epoch;
use crate::store::disk_store::DiskStore;
use crate::store::life_tests::{Acks, geometry_of, id, live, owner};
use crate::store::simfiles::SimFiles;
use crate::tracker::{Claim, Gap};
use crate::wire::Endpoint;
use crate::wire::frame::encode_message;
use crate::wire::message::{DiskDown, DiskUp, Plan};

/// A disk with four checkpoints, the newest in life 7.
pub(super) fn lived() -> (SimFiles, DiskSession) {
    let files = SimFiles::default();
    let mut store = DiskStore::open(files.arc(), owner().agent, owner().disk).unwrap();
    live(&mut store, &mut Acks::default()).unwrap();
    let session = session(&files);
    (files, session)
}

fn session(files: &SimFiles) -> DiskSession {
    DiskSession::new(files.arc(), owner().agent, owner().disk, Epoch([1; 16]))
}

fn of(size_bytes: u64) -> Geometry {
    Geometry::new(size_bytes, geometry_of(3).block_shift()).unwrap()
}

/// A claim that would go on, were it not for the size.
pub(super) fn sure() -> Claim {
    Claim { epoch: Epoch([7; 16]), base: Some(id(3)), gap: None }
}

pub(super) fn attach(
    session: &mut DiskSession,
    geometry: Geometry,
    claim: Claim,
) -> Result<(Plan, bool), SessionError> {
    session.detach();
    let attach = DiskUp::Attach { device: "sda".into(), geometry, claim };
    let events = session.frame(Endpoint::Live, &encode_message(&attach).unwrap())?;
    match events.first() {
        Some(Event::Answer(Endpoint::Live, DiskDown::Attached { plan, resumes, .. })) => {
            Ok((*plan, *resumes))
        }
        other => panic!("not attached: {other:?}"),
    }
}

fn refused(result: Result<(Plan, bool), SessionError>) -> String {
    match result {
        Err(SessionError::Lasting(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_shrunk_disk_is_refused_until_it_is_accepted_and_nothing_changes() {
    let (files, mut session) = lived();
    let before = files.dump();
    let small = of(geometry_of(3).size_bytes() - 512);
    assert!(refused(attach(&mut session, small, sure())).contains("shrank"));
    assert_eq!(files.dump(), before);
    assert_eq!(
        attach(&mut session, geometry_of(3), sure()).unwrap().0,
        Plan::Continue,
        "as it was it goes on"
    );
    session.admit(Admission { accepted: true, replaces: None });
    assert_eq!(attach(&mut session, small, sure()).unwrap(), (Plan::Compare, false));
    assert_eq!(session.size_bytes(), Some(small.size_bytes()));
}

#[test]
fn what_a_disk_grew_by_is_compared_with_zeros() {
    let (_, mut session) = lived();
    let grown = of(6 << 20);
    assert_eq!(attach(&mut session, grown, sure()).unwrap(), (Plan::Compare, false));
    let want = DiskUp::WantDigests { first_group: 3, count: 3 };
    let events = session.frame(Endpoint::Snapshot, &encode_message(&want).unwrap()).unwrap();
    let zeros = group_digest(&vec![BlockHash::ZERO; grown.group_blocks() as usize]);
    let digests = DiskDown::Digests { first_group: 3, digests: vec![zeros; 3] };
    assert_eq!(events, [Event::Answer(Endpoint::Snapshot, digests)]);
}

#[test]
fn a_compare_goes_on_only_for_the_size_that_it_began_with() {
    let (_, mut session) = lived();
    let begin = |session: &mut DiskSession| {
        session.frame(Endpoint::Live, &encode_message(&DiskUp::ScanBegins).unwrap()).unwrap();
    };
    assert_eq!(attach(&mut session, of(6 << 20), sure()).unwrap(), (Plan::Compare, false));
    begin(&mut session);
    assert_eq!(attach(&mut session, of(6 << 20), sure()).unwrap(), (Plan::Compare, true));
    assert_eq!(attach(&mut session, of(7 << 20), sure()).unwrap(), (Plan::Compare, false));
    begin(&mut session);
    assert_eq!(attach(&mut session, of(6 << 20), sure()).unwrap(), (Plan::Compare, false));
}

#[test]
fn a_copy_of_another_size_begins_anew() {
    let files = SimFiles::default();
    let mut session = session(&files);
    let fresh = Claim { epoch: Epoch([7; 16]), base: None, gap: Some(Gap::NewTracker) };
    for size_bytes in [2 << 20, 3 << 20, 1 << 20] {
        let (plan, _) = attach(&mut session, of(size_bytes), fresh).unwrap();
        assert_eq!(plan, Plan::Copy { compare: false });
        assert_eq!(session.copy_progress(), Some((0, size_bytes)));
        assert_eq!(files.dump()[&owner().copy_img()].len() as u64, size_bytes);
    }
}

#[test]
fn a_disk_in_the_place_of_another_is_copied_only_when_it_is_accepted() {
    let files = SimFiles::default();
    let mut session = session(&files);
    let fresh = Claim { epoch: Epoch([7; 16]), base: None, gap: Some(Gap::NewTracker) };
    session.admit(Admission { replaces: Some("old".parse().unwrap()), accepted: false });
    assert!(refused(attach(&mut session, of(1 << 20), fresh)).contains("in the place of old"));
    assert!(files.dump().is_empty(), "nothing is begun");
    session.admit(Admission { replaces: Some("old".parse().unwrap()), accepted: true });
    assert_eq!(attach(&mut session, of(1 << 20), fresh).unwrap().0, Plan::Copy { compare: false });
}

#[test]
fn other_blocks_are_refused() {
    let (files, mut session) = lived();
    let before = files.dump();
    session.admit(Admission { accepted: true, replaces: None });
    let other = Geometry::new(geometry_of(3).size_bytes(), 12).unwrap();
    assert!(refused(attach(&mut session, other, sure())).contains("blocks of 65536 bytes"));
    assert_eq!(files.dump(), before);
}
