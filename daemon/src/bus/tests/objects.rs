//! Disks, checkpoints that are told, and what the object manager lists.

use blxrep_dbus::{PATH_MANAGER, PATH_ROOT, disk_path};
use zbus::fdo::ObjectManagerProxy;

use super::*;
use crate::clock::unix_ms;

type Changes = (String, HashMap<String, OwnedVariant>, Vec<String>);

fn path(id: &str) -> String {
    disk_path("web1", id)
}

/// The objects below the root, and their interfaces.
async fn objects(world: &World) -> Vec<(String, Vec<String>)> {
    let builder = ObjectManagerProxy::builder(&world.client).destination(PEER);
    let manager = builder.path(PATH_ROOT).build().await.unwrap();
    let mut objects: Vec<_> = manager
        .get_managed_objects()
        .await
        .unwrap()
        .into_iter()
        .map(|(path, interfaces)| {
            let ours =
                interfaces.keys().map(|name| name.to_string()).filter(|name| name.starts_with("org.blxrep"));
            (path.to_string(), ours.collect::<Vec<_>>())
        })
        .filter(|(_, interfaces)| !interfaces.is_empty())
        .collect();
    objects.sort_unstable();
    objects
}

fn object(path: &str, interface: &str) -> (String, Vec<String>) {
    (path.to_owned(), vec![interface.to_owned()])
}

#[tokio::test]
async fn disks_appear_change_and_go_away() {
    let fake = Arc::<Fake>::default();
    *fake.disks.lock().unwrap() = vec![disk("a")];
    let world = World::start_with(fake.clone()).await;
    let mut signals = world.signals().await;
    assert_eq!(
        objects(&world).await,
        [object(PATH_MANAGER, "org.blxrep.Manager"), object(&path("a"), "org.blxrep.Disk")],
        "there from the very beginning"
    );

    fake.disks.lock().unwrap().push(disk("b"));
    let added = signals.next("InterfacesAdded").await;
    let (added, interfaces): (OwnedObjectPath, HashMap<String, HashMap<String, OwnedVariant>>) =
        added.body().deserialize().unwrap();
    assert_eq!(added.as_str(), path("b"));
    assert_eq!(text(&interfaces["org.blxrep.Disk"], "Id"), "b");

    fake.disks.lock().unwrap()[0] =
        DiskStatus { state: DiskState::Copying, progress: 0.5, paused_by_agent: true, ..disk("a") };
    let changed = signals.next("PropertiesChanged").await;
    assert_eq!(changed.header().path().unwrap().as_str(), path("a"));
    let (interface, values, invalidated): Changes = changed.body().deserialize().unwrap();
    let mut names: Vec<_> = values.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!((interface.as_str(), invalidated), ("org.blxrep.Disk", Vec::new()));
    assert_eq!(names, ["Paused", "PausedBy", "Progress", "State"], "only what changed, all at once");
    assert_eq!(text(&values, "State"), "copying");

    fake.disks.lock().unwrap().clear();
    for id in ["a", "b"] {
        let removed = signals.next("InterfacesRemoved").await;
        let (removed, interfaces): (OwnedObjectPath, Vec<String>) = removed.body().deserialize().unwrap();
        assert_eq!((removed.as_str(), interfaces), (path(id).as_str(), vec!["org.blxrep.Disk".to_owned()]));
    }
    assert_eq!(objects(&world).await, [object(PATH_MANAGER, "org.blxrep.Manager")]);
}

#[tokio::test]
async fn nothing_is_signalled_when_nothing_changes_and_never_more_than_twice_a_second() {
    let fake = Arc::<Fake>::default();
    *fake.disks.lock().unwrap() = vec![disk("a")];
    let world = World::start_with(fake.clone()).await;
    let mut signals = world.signals().await;
    let silence = signals.for_a_while(1300).await;
    assert!(silence.is_empty(), "the lag grows, but is not signalled: {silence:?}");
    let begun = Instant::now();
    let changing = fake.clone();
    let change = tokio::spawn(async move {
        for dirty_bytes in 1.. {
            changing.disks.lock().unwrap()[0].dirty_bytes = dirty_bytes;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let count = signals.for_a_while(1700).await.len() as u128;
    let at_most = begun.elapsed().as_millis() / 500 + 1;
    change.abort();
    assert!((2..=at_most).contains(&count), "{count} in {:?}", begun.elapsed());
}

#[tokio::test]
async fn a_running_job_is_listed_and_no_longer_than_it_runs() {
    let world = World::start().await;
    let mut signals = world.signals().await;
    let (go, wait) = std::sync::mpsc::channel::<()>();
    world.fake.will(move |_| {
        wait.recv().unwrap();
        Ok(Details::new())
    });
    let job = world.manager().await.sync("web1", none()).await.unwrap();
    let manager = object(PATH_MANAGER, "org.blxrep.Manager");
    assert_eq!(objects(&world).await, [manager.clone(), object(job.as_str(), "org.blxrep.Job")]);
    go.send(()).unwrap();
    signals.removed().await;
    assert_eq!(objects(&world).await, [manager]);
}

#[tokio::test]
async fn a_disk_shows_what_is_known_and_nothing_where_nothing_is() {
    let fake = Arc::<Fake>::default();
    let now_ms = unix_ms();
    let mut known = disk("a");
    known.newest.as_mut().unwrap().time_unix_ms = now_ms - 5000;
    known.paused_by_dispatcher = true;
    let unknown = DiskStatus { newest: None, sync_every: None, ..disk("b") };
    *fake.disks.lock().unwrap() = vec![known, unknown];
    let world = World::start_with(fake).await;
    let a = contract::disk_proxy(&world, &path("a")).await;
    assert_eq!(a.paused_by().await.unwrap(), ["dispatcher"]);
    assert!(a.paused().await.unwrap());
    assert_eq!(a.last_checkpoint().await.unwrap(), "20261121203456");
    assert_eq!(a.last_checkpoint_usec().await.unwrap(), (now_ms - 5000) * 1000);
    assert_eq!(a.consistency().await.unwrap(), "crash");
    assert_eq!(a.sync_every_usec().await.unwrap(), 60_000_000);
    let lag = a.lag_usec().await.unwrap();
    assert!((5_000_000..60_000_000).contains(&lag), "{lag}");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(a.lag_usec().await.unwrap() >= lag + 20_000, "computed when it is read");

    let b = contract::disk_proxy(&world, &path("b")).await;
    assert_eq!((b.last_checkpoint().await.unwrap(), b.consistency().await.unwrap()), Default::default());
    assert_eq!((b.last_checkpoint_usec().await.unwrap(), b.sync_every_usec().await.unwrap()), (0, 0));
    assert_eq!((b.lag_usec().await.unwrap(), b.last_error().await.unwrap()), (u64::MAX, String::new()));
}

#[tokio::test]
async fn checkpoints_are_told_also_after_too_many_at_once() {
    let world = World::start().await;
    let mut signals = world.signals().await;
    let added =
        |id: &str| CheckpointAdded { agent: agent_id("web1"), disk: disk_id("a"), id: id.parse().unwrap() };
    world.added.send(added("20261121203456")).unwrap();
    let told: (String, String, String) = signals.next("CheckpointAdded").await.body().deserialize().unwrap();
    assert_eq!(told, ("web1".into(), "a".into(), "20261121203456".into()));
    // The channel holds four: this many are too many, as nobody reads in between on this one thread.
    for second in 10..30 {
        world.added.send(added(&format!("202611212035{second}"))).unwrap();
    }
    let told: (String, String, String) = signals.next("CheckpointAdded").await.body().deserialize().unwrap();
    assert_eq!(told.2, "20261121203526", "the oldest that is left");
    for _ in 0..3 {
        signals.next("CheckpointAdded").await;
    }
    world.added.send(added("20261121203600")).unwrap();
    let told: (String, String, String) = signals.next("CheckpointAdded").await.body().deserialize().unwrap();
    assert_eq!(told.2, "20261121203600");
}

#[tokio::test]
async fn without_anybody_who_adds_checkpoints_the_rest_goes_on() {
    let mut world = World::start().await;
    world.added = broadcast::channel(1).0;
    let mut signals = world.signals().await;
    world.fake.disks.lock().unwrap().push(disk("a"));
    signals.next("InterfacesAdded").await;
}
