//! What the dispatcher keeps beside the checkpoints: what came of starting one, and how far the scrub is.

use std::time::Duration;

use blxrep_dbus::BOOT_CONSOLE_MAX_BYTES;
use blxrep_dbus::words::BootResult;

use crate::boot_test::{BootTest, MAGIC};
use crate::dispatcher::scrub::Pace;
use crate::dispatcher::scrub::record::{Pass, Record};
use crate::ids::CheckpointId;
use crate::store::layout::Paths;
use crate::wire::key::hex;

fn owner() -> Paths {
    Paths::new("web1".parse().unwrap(), "sda".parse().unwrap())
}

fn id(second: i64) -> CheckpointId {
    CheckpointId::next(1_795_293_296 + second, None)
}

/// Puts the hash of what is below the first line right, where the first byte says so.
fn with_its_hash(bytes: &[u8]) -> Option<String> {
    let (first, rest) = bytes.split_first()?;
    let text = std::str::from_utf8(rest).ok()?;
    if first & 1 == 0 {
        return Some(text.to_owned());
    }
    let (_, body) = text.split_once('\n')?;
    Some(format!("{MAGIC} {}\n{body}", hex(blake3::hash(body.as_bytes()).as_bytes())))
}

pub(super) fn check_boot(bytes: &[u8]) {
    let Some(text) = with_its_hash(bytes) else { return };
    let Some(test) = BootTest::decode(&owner(), id(0), &text) else { return };
    assert_eq!(test.encode(&owner(), id(0)), text, "a test has one spelling");
    assert_eq!(BootTest::decode(&owner(), id(1), &text), None, "it is of one checkpoint");
    let (_, console) = text.split_once("\n\n").unwrap();
    assert!(console.len() <= BOOT_CONSOLE_MAX_BYTES);
    assert!(!console.contains(|c: char| c.is_control() && c != '\n' && c != '\t'));
}

pub(super) fn boot_seeds() -> Vec<Vec<u8>> {
    let test = |result, console: &str| {
        let test = BootTest::new(result, 1_795_293_300_000, console.to_owned()).unwrap();
        [&[1], test.encode(&owner(), id(0)).as_bytes()].concat()
    };
    vec![test(BootResult::Passed, "GRUB\n\n\tweb1 login: "), test(BootResult::Failed, "")]
}

pub(super) fn check_scrub(bytes: &[u8]) {
    let Ok(mut record) = serde_json::from_slice::<Record>(bytes) else { return };
    let again = serde_json::from_str(&serde_json::to_string(&record).unwrap());
    assert_eq!(again.ok().as_ref(), Some(&record), "a record is what it was when it is read again");
    let (owner, pace) = (owner(), Pace { every: Duration::from_secs(86_400), rate_bytes: 1 << 20 });
    if let Some(Pass { course, .. }) = &mut record.pass {
        assert!((0.0..=1.0).contains(&course.progress()));
        for now_unix_ms in [0, 1_795_293_296_000, u64::MAX] {
            course.settle(pace, now_unix_ms);
            let _ = pace.early(course, now_unix_ms);
        }
    }
    if let Some(last) = record.last {
        let _ = pace.early_for_next(last.began_unix_ms, 1_795_293_296_000);
    }
    record.pass.get_or_insert_default();
    record.enter(&owner, id(0));
    record.found(vec!["damaged".to_owned()]);
    assert!(record.damage().any(|(agent, disk, _)| (agent, disk) == (&owner.agent, &owner.disk)));
    record.look(&owner, id(0), Vec::new());
    record.leave();
    record.end_pass(&[], 1);
    assert_eq!((record.damage().count(), record.pass), (0, None));
}

pub(super) fn scrub_seeds() -> Vec<Vec<u8>> {
    let mut record = Record::default();
    record.pass = Some(Pass::default());
    record.enter(&owner(), id(0));
    record.found(vec!["incremental/web1/sda/20261121203456.bak is damaged".to_owned()]);
    record.look(&owner(), id(3), vec!["block 7".to_owned(), "block 9".to_owned()]);
    let passing = serde_json::to_vec(&record).unwrap();
    record.end_pass(&[owner()], 1_795_293_296_000);
    vec![passing, serde_json::to_vec(&record).unwrap(), serde_json::to_vec(&Record::default()).unwrap()]
}
