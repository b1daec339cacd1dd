//! The dispatcher's start with a catalogue that is lost, cut or damaged: everything that is stored is there.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use redb::{Database, ReadableTable, TableDefinition};
use tokio::sync::{broadcast, watch};

use super::generations::Generations;
use super::registry::{House, Registry};
use crate::accept::Accepted;
use crate::ids::Epoch;
use crate::pause::Pauses;
use crate::store::catalogue::{Action, AgentEntry, Catalogue, FILE, Origin};
use crate::store::disk_store::DiskStore;
use crate::store::life_tests::{Acks, id, live, owner};
use crate::store::simfiles::SimFiles;
use crate::watchdog::Watchdog;

const AGENTS: TableDefinition<'_, &str, &str> = TableDefinition::new("xmdispatcher");

fn stored() -> SimFiles {
    let files = SimFiles::default();
    let mut store = DiskStore::open(files.arc(), owner().agent, owner().disk).unwrap();
    live(&mut store, &mut Acks::default()).unwrap();
    files
}

/// Starts as the dispatcher does; gives where the catalogue comes from and how many agents were entered.
fn start(files: &SimFiles, dir: &Path) -> (Registry, Origin, usize) {
    let (catalogue, origin) = Catalogue::open(dir).unwrap();
    let house = House {
        files: files.arc(),
        catalogue: Arc::new(catalogue),
        sync_every: watch::Sender::new(Duration::from_secs(60)),
        checkpoints: broadcast::Sender::new(4),
        watchdog: Watchdog::from_env(),
        accepted: Accepted::load(dir.join("accepted")).unwrap(),
        generations: Generations::open(dir).unwrap(),
        instance: Epoch([1; 16]),
    };
    let pauses = Pauses::load(dir.join("paused")).unwrap();
    let registry = Registry::new(Arc::new(house), dir.join("agents"), pauses);
    let entered = registry.survey().unwrap();
    (registry, origin, entered)
}

/// What must be there whatever became of the catalogue.
fn all_is_shown(registry: &Registry) {
    let [disk] = &*registry.disks() else { panic!("one disk is stored") };
    assert_eq!((&disk.agent, &disk.disk), (&owner().agent, &owner().disk));
    assert_eq!(disk.newest.unwrap().id, id(3));
    let seen = registry.seen().remove(&owner().agent).unwrap();
    assert!(seen.last_unix_ms >= 1_795_293_299_000, "{seen:?}");
    let (agents, damaged) = registry.house.catalogue.agents().unwrap();
    assert!(damaged.is_empty(), "{damaged:?}");
    let (_, entry) = agents.iter().find(|(agent, _)| *agent == owner().agent.to_string()).unwrap();
    assert_eq!(entry.first_seen_unix_ms, 1_795_293_296_000);
}

/// A catalogue that knows the agent.
fn catalogue(dir: &Path) {
    let (catalogue, _) = Catalogue::open(dir).unwrap();
    let entry = AgentEntry {
        footprint: serde_json::json!({"hostname": "web1.example"}),
        first_seen_unix_ms: 1_795_293_296_000,
        last_seen_unix_ms: 1_795_293_399_000,
    };
    catalogue.put_agent(&owner().agent, &entry).unwrap();
    let action = Action {
        kind: "copy".into(),
        state: "done".into(),
        done_bytes: 1,
        total_bytes: 1,
        started_unix_ms: 1,
        updated_unix_ms: 1,
    };
    catalogue.put_action(&owner().agent, &owner().disk, &action).unwrap();
}

#[test]
fn whatever_became_of_the_catalogue_everything_stored_is_shown() {
    let files = stored();
    let dir = tempfile::tempdir().unwrap();
    let (registry, origin, entered) = start(&files, dir.path());
    assert_eq!((origin, entered), (Origin::New, 1), "lost");
    all_is_shown(&registry);
    drop(registry);
    let (_, origin, entered) = start(&files, dir.path());
    assert_eq!((origin, entered), (Origin::Found, 0), "entered for good");

    let sound = {
        let dir = tempfile::tempdir().unwrap();
        catalogue(dir.path());
        let (registry, origin, entered) = start(&files, dir.path());
        assert_eq!((origin, entered), (Origin::Found, 0));
        assert_eq!(registry.seen()[&owner().agent].hostname, "web1.example");
        drop(registry);
        fs::read(dir.path().join(FILE)).unwrap()
    };
    let mut made_anew = 0;
    let mut try_with = |damaged: &[u8]| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), damaged).unwrap();
        let (registry, origin, entered) = start(&files, dir.path());
        all_is_shown(&registry);
        if let Origin::Damaged(aside) = origin {
            assert!(aside.exists() && entered == 1);
            made_anew += 1;
        }
    };
    for len in [0, 1, 63, 64, 512, 4096, 4097, sound.len() / 2, sound.len() - 1] {
        try_with(&sound[..len]);
    }
    let in_use: Vec<_> = (0..sound.len()).filter(|at| sound[*at] != 0).collect();
    for at in in_use.iter().step_by(in_use.len() / 60) {
        let mut damaged = sound.clone();
        damaged[*at] ^= 0x55;
        try_with(&damaged);
    }
    assert!(made_anew > 15, "{made_anew}");
}

#[test]
fn a_damaged_entry_hides_no_other() {
    let files = stored();
    let dir = tempfile::tempdir().unwrap();
    catalogue(dir.path());
    let database = Database::create(dir.path().join(FILE)).unwrap();
    let write = database.begin_write().unwrap();
    let mut table = write.open_table(AGENTS).unwrap();
    let other = table.get("agent1").unwrap().unwrap().value().to_owned();
    table.insert("web9", &*other).unwrap();
    table.insert("agent1", "{\"footprint\":").unwrap();
    drop(table);
    write.commit().unwrap();
    drop(database);
    let (registry, origin, entered) = start(&files, dir.path());
    assert_eq!((origin, entered), (Origin::Found, 1));
    all_is_shown(&registry);
    assert!(registry.seen().contains_key(&"web9".parse().unwrap()));
}
