//! The life of a job, and its end.

use std::sync::mpsc;
use std::thread::sleep;

use blxrep_dbus::words::JobType;
use blxrep_dbus::{JOBS_MAX, STARTED_BY_AGENT_UID};

use super::*;

fn canceled() -> Failure {
    Problem::new(ProblemKind::Canceled, "as asked").into()
}

/// Works until it is canceled; not for ever, so that a test that failed ends.
pub(super) fn until_canceled(progress: &Progress) -> Result<Details, Failure> {
    let begun = Instant::now();
    for step in 0u64.. {
        // Faster and faster, so that the rate changes as well.
        progress.report(step * step, 1 << 40);
        if progress.is_canceled() || begun.elapsed() > PATIENCE {
            break;
        }
        sleep(Duration::from_millis(2));
    }
    Err(canceled())
}

#[tokio::test]
async fn a_job_is_told_shown_and_told_again_when_it_ended() {
    let world = World::start().await;
    let manager = world.manager().await;
    let mut signals = world.signals().await;
    let (go, wait) = mpsc::channel::<()>();
    world.fake.will(move |progress| {
        progress.report(50, 200);
        wait.recv().unwrap();
        Ok(named([("checkpoint", "20261121203456".into()), ("damage", Vec::<String>::new().into())]))
    });
    world.told.uid.store(1000, Ordering::Relaxed);
    let path = manager.verify("web1", "latest", Options::from([("disk", "sda".into())])).await.unwrap();
    let (id, told): (u32, OwnedObjectPath) = signals.next("JobNew").await.body().deserialize().unwrap();
    assert_eq!((id, &told, path.as_str()), (1, &path, "/org/blxrep/job/1"));

    let job = world.job(&path).await;
    signals.next("PropertiesChanged").await;
    assert_eq!((job.id().await.unwrap(), job.job_type().await.unwrap().as_str()), (1, "verify"));
    assert_eq!((job.agent().await.unwrap().as_str(), job.disk().await.unwrap().as_str()), ("web1", "sda"));
    assert_eq!(
        (job.checkpoint().await.unwrap().as_str(), job.target().await.unwrap().as_str()),
        ("latest", "")
    );
    assert_eq!((job.started_by_uid().await.unwrap(), job.state().await.unwrap().as_str()), (1000, "running"));
    assert_eq!((job.bytes_done().await.unwrap(), job.bytes_total().await.unwrap()), (50, 200));
    assert_eq!((job.progress().await.unwrap(), job.rate_bytes().await.unwrap()), (0.25, 0));

    go.send(()).unwrap();
    let removed = signals.removed().await;
    assert_eq!((removed.id, &removed.path, removed.result.as_str()), (1, &path, "done"));
    assert_eq!(text(&removed.details, "checkpoint"), "20261121203456");
    assert_eq!(removed.details.len(), 2);
    assert!(job.id().await.is_err(), "the object is gone before its end is told");
}

#[tokio::test]
async fn progress_is_signalled_at_most_twice_a_second_and_all_at_once() {
    let world = World::start().await;
    let mut signals = world.signals().await;
    world.fake.will(until_canceled);
    let begun = Instant::now();
    let path = world.manager().await.sync("web1", none()).await.unwrap();
    let changes = signals.for_a_while(2200).await.into_iter();
    let changes: Vec<_> =
        changes.filter(|m| m.header().member().unwrap().as_str() == "PropertiesChanged").collect();
    let at_most = begun.elapsed().as_millis() / 500 + 1;
    assert!((2..=at_most).contains(&(changes.len() as u128)), "{} in {:?}", changes.len(), begun.elapsed());
    let last = changes.last().unwrap();
    assert_eq!(last.header().path().unwrap().as_str(), path.as_str());
    let body = last.body();
    let (interface, changed, invalidated): (String, HashMap<String, OwnedVariant>, Vec<String>) =
        body.deserialize().unwrap();
    let mut names: Vec<_> = changed.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!((interface.as_str(), invalidated), ("org.blxrep.Job", Vec::new()));
    assert_eq!(names, ["BytesDone", "Progress", "RateBytes"], "only what changed");
    world.job(&path).await.cancel().await.unwrap();
    assert_eq!(signals.removed().await.result, "canceled");
}

#[tokio::test]
async fn who_began_a_job_may_cancel_it_and_others_need_its_action() {
    let world = World::start().await;
    let manager = world.manager().await;
    let mut signals = world.signals().await;
    world.told.uid.store(1000, Ordering::Relaxed);
    for (action, owner) in [("org.blxrep.checkpoint", false), ("org.blxrep.restore", false), ("", true)] {
        world.fake.will(until_canceled);
        world.told.uid.store(1000, Ordering::Relaxed);
        let path = match action {
            "org.blxrep.restore" => manager.restore("web1", "latest", "/t", none()).await.unwrap(),
            _ => manager.sync("web1", none()).await.unwrap(),
        };
        world.told.take();
        world.told.denies.store(true, Ordering::Relaxed);
        let job = world.job(&path).await;
        if !owner {
            world.told.uid.store(1001, Ordering::Relaxed);
            assert_eq!(kind(job.cancel().await), ProblemKind::AccessDenied);
            assert_eq!(job.state().await.unwrap(), "running");
            let asked = world.told.take();
            assert_eq!((asked[0].0.as_str(), asked[0].1.agent.as_str()), (action, "web1"));
            world.told.denies.store(false, Ordering::Relaxed);
        }
        job.cancel().await.unwrap();
        world.told.denies.store(false, Ordering::Relaxed);
        let removed = signals.removed().await;
        assert_eq!((removed.result.as_str(), removed.details.len()), ("canceled", 0));
    }
}

#[tokio::test]
async fn a_job_that_was_asked_to_end_says_so_while_it_cleans_up() {
    let world = World::start().await;
    let mut signals = world.signals().await;
    let (go, wait) = mpsc::channel::<()>();
    world.fake.will(move |_| wait.recv().map_err(|_| canceled()).and(Err(canceled())));
    let path = world.manager().await.sync("web1", none()).await.unwrap();
    let job = world.job(&path).await;
    job.cancel().await.unwrap();
    job.cancel().await.unwrap();
    assert_eq!(job.state().await.unwrap(), "canceling");
    let changed: (String, HashMap<String, OwnedVariant>, Vec<String>) =
        signals.next("PropertiesChanged").await.body().deserialize().unwrap();
    assert_eq!(text(&changed.1, "State"), "canceling");
    go.send(()).unwrap();
    assert_eq!(signals.removed().await.result, "canceled");
}

#[tokio::test]
async fn a_job_that_fails_says_why_and_one_that_breaks_off_is_not_lost() {
    let world = World::start().await;
    let manager = world.manager().await;
    let mut signals = world.signals().await;
    world.fake.will(|_| {
        let problem = Problem::new(ProblemKind::Damaged, "2 blocks are damaged");
        Err(Failure { problem, damage: vec!["block 1".into(), "block 2".into()] })
    });
    manager.verify("web1", "latest", none()).await.unwrap();
    let removed = signals.removed().await;
    assert_eq!(removed.result, "failed");
    assert_eq!(text(&removed.details, "error"), "org.blxrep.Error.Damaged");
    assert_eq!(text(&removed.details, "message"), "2 blocks are damaged");
    let damage: Vec<String> = removed.details["damage"].clone().try_into().unwrap();
    assert_eq!(damage, ["block 1", "block 2"]);

    world.fake.will(|_| panic!("on purpose"));
    manager.verify("web1", "latest", none()).await.unwrap();
    let removed = signals.removed().await;
    assert_eq!((removed.id, removed.result.as_str()), (2, "failed"));
    assert_eq!(text(&removed.details, "error"), "org.blxrep.Error.Failed");
    assert!(!removed.details.contains_key("damage"));
}

#[tokio::test]
async fn one_job_too_many_is_refused_until_another_ends() {
    let world = World::start().await;
    let manager = world.manager().await;
    let mut signals = world.signals().await;
    let mut paths = Vec::new();
    for _ in 0..JOBS_MAX {
        world.fake.will(until_canceled);
        paths.push(manager.sync("web1", none()).await.unwrap());
    }
    world.fake.take();
    for result in [
        manager.sync("web1", none()).await,
        manager.restore("web1", "latest", "/t", none()).await,
        manager.verify("web1", "latest", none()).await,
    ] {
        assert_eq!(kind(result), ProblemKind::Busy);
    }
    assert_eq!(world.fake.take(), Vec::<String>::new(), "none of them was even planned");
    world.job(&paths[3]).await.cancel().await.unwrap();
    signals.removed().await;
    world.fake.will(until_canceled);
    manager.sync("web1", none()).await.unwrap();
    world.daemon.jobs.stop().await;
}

#[tokio::test]
async fn the_end_of_the_daemon_cancels_jobs_waits_for_them_and_lets_none_begin() {
    let world = World::start().await;
    let manager = world.manager().await;
    let mut signals = world.signals().await;
    for _ in 0..2 {
        world.fake.will(until_canceled);
        manager.sync("web1", none()).await.unwrap();
    }
    let stopped = Instant::now();
    world.daemon.jobs.stop().await;
    assert!(stopped.elapsed() < Duration::from_secs(8), "{:?}", stopped.elapsed());
    for _ in 0..2 {
        assert_eq!(signals.removed().await.result, "canceled");
    }
    assert_eq!(kind(manager.sync("web1", none()).await), ProblemKind::Failed);
}

#[tokio::test]
async fn the_end_of_the_daemon_waits_for_what_an_agent_began_and_does_not_cancel_it() {
    let world = World::start().await;
    let (manager, mut signals) = (world.manager().await, world.signals().await);
    let (go, wait) = mpsc::channel::<()>();
    let work = move |progress: &Progress| {
        wait.recv().map_err(|_| canceled())?;
        if progress.is_canceled() { Err(canceled()) } else { Ok(Details::new()) }
    };
    let (jobs, planned) =
        (world.daemon.jobs.clone(), Planned { about: About::default(), work: Box::new(work) });
    let slot = jobs.slot().unwrap();
    jobs.begin(slot, JobType::Restore, STARTED_BY_AGENT_UID, planned).await.unwrap();
    let stopping = tokio::spawn(async move { jobs.stop().await });
    // Jobs are asked to end before one is refused.
    while manager.sync("web1", none()).await.is_ok() {}
    assert!(!stopping.is_finished());
    go.send(()).unwrap();
    stopping.await.unwrap();
    let mut removed = signals.removed().await;
    while removed.id != 1 {
        removed = signals.removed().await;
    }
    assert_eq!(removed.result, "done");
}

#[tokio::test]
async fn jobs_outlive_the_connection() {
    let mut world = World::start().await;
    let (go, wait) = mpsc::channel::<()>();
    world.fake.will(move |_| wait.recv().map_err(|_| canceled()).map(|()| Details::new()));
    let path = world.manager().await.sync("web1", none()).await.unwrap();
    world.fake.will(|_| Ok(Details::new()));
    world.reconnect().await;
    let mut signals = world.signals().await;
    assert_eq!(world.job(&path).await.state().await.unwrap(), "running");
    world.manager().await.sync("web1", none()).await.unwrap();
    assert_eq!(signals.removed().await.id, 2, "numbers go on");
    go.send(()).unwrap();
    assert_eq!(signals.removed().await.path, path);
    world.reconnect().await;
    assert!(world.job(&path).await.state().await.is_err());
}
