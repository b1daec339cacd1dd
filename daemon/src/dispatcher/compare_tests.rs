//! What a session takes while the disk is compared.

use super::resize_tests::{attach, lived, sure};
use super::session::{Event, SessionError};
use crate::checkpoint::Consistency;
use crate::store::life_tests::{geometry_of, id};
use crate::tracker::{Claim, Gap};
use crate::wire::Endpoint;
use crate::wire::frame::encode_message;
use crate::wire::message::{DiskUp, Plan};

#[test]
fn a_seal_that_overtakes_the_end_of_a_compare_makes_no_checkpoint() {
    let (_, mut session) = lived();
    let doubtful = Claim { gap: Some(Gap::Audit), ..sure() };
    let seal = DiskUp::Seal {
        id: id(9),
        consistency: Consistency::Filesystem,
        time_unix_ms: 1_795_000_000_000,
        freeze_ms: 1,
        note: String::new(),
    };
    let [begins, done, seal] =
        [DiskUp::ScanBegins, DiskUp::ScanDone, seal].map(|up| encode_message(&up).unwrap());
    assert_eq!(attach(&mut session, geometry_of(3), doubtful).unwrap().0, Plan::Compare);
    session.frame(Endpoint::Live, &begins).unwrap();
    let refused = session.frame(Endpoint::Live, &seal).unwrap_err();
    assert!(matches!(&refused, SessionError::Protocol(why) if why.contains("compared")), "{refused}");
    assert_eq!(session.newest().unwrap().id, id(3));

    attach(&mut session, geometry_of(3), doubtful).unwrap();
    session.frame(Endpoint::Live, &begins).unwrap();
    session.frame(Endpoint::Snapshot, &done).unwrap();
    let events = session.frame(Endpoint::Live, &seal).unwrap();
    assert!(
        matches!(events.last(), Some(Event::Committed(checkpoint)) if checkpoint.id == id(9)),
        "{events:?}"
    );
}
