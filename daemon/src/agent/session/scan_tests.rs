//! What a session does at the end of a scan.

use super::unreadable_tests::Side;
use crate::agent::action::Input;
use crate::wire::Endpoint;
use crate::wire::message::{DiskDown, Plan};

#[test]
fn a_sync_waits_until_the_dispatcher_has_all_of_a_scan() {
    let mut side = Side::attached(Plan::Copy { compare: false }, &[]);
    side.settle();
    assert_eq!(side.sent.len() as u64, 32, "a run for each MiB of the disk");
    side.sync();
    assert!(side.done.is_empty(), "{:?}", side.done);
    side.input(Input::Message(Endpoint::Snapshot, DiskDown::ScanClosed));
    assert_eq!(side.done, ["freeze 0", "seal a hook"]);
}
