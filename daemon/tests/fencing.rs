//! Two machines with one key, old images and old copies are told apart; a compare can be ordered.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod bus;
    pub(crate) mod lab;
    pub(crate) mod wire;
}

use std::fs;
use std::os::unix::fs::FileExt;

use blxrep::generation::Generation;
use blxrep::geometry::Geometry;
use blxrep::wire::frame::encode_message;
use blxrep::wire::message::{ConfigDown, ConfigUp};
use blxrep_dbus::problem::{Problem, ProblemKind};
use blxrep_dbus::proxy::Options;
use common::bus::Bus;
use common::lab::{Lab, Process, run, wait_for};
use common::wire::{dial, hello, next, send};

fn stop(agent: &mut Process) {
    agent.signal("TERM");
    assert_eq!(agent.exit_code(30), 0, "{}", agent.log());
}

fn text(details: &blxrep_dbus::proxy::Details, key: &str) -> String {
    details.get(key).unwrap().downcast_ref::<&str>().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_cloned_machine_one_goes_on_until_a_person_decides() {
    let mut lab = Lab::new("clone");
    let bus = Bus::start(&lab);
    lab.bus = Some(bus.address.clone());
    let (one, two) = (lab.loop_disk(16), lab.loop_disk(16));
    let agent = lab.agent("a");
    lab.enroll(&agent);
    lab.start_dispatcher(&["--sync-freq", "1s"]);
    let nothing = bus.dispatcher().await.accept(&agent, Options::new()).await.unwrap_err();
    assert_eq!(Problem::of(&nothing).unwrap().kind, ProblemKind::Failed);
    assert!(nothing.to_string().contains("nothing to accept"), "{nothing}");

    let mut first = lab.start_agent_in("state", &agent, &[&one.path], &[]);
    lab.wait_checkpoints(&agent, &one.name, 1, 30);
    stop(&mut first);
    run("cp", &["-a", &lab.path("state"), &lab.path("copied-state")]);
    let mut first = lab.start_agent_in("state", &agent, &[&one.path], &[]);
    let count = lab.show(&agent, Some(&one.name)).len();
    lab.wait_checkpoints(&agent, &one.name, count + 1, 30);
    stop(&mut first);

    // Both write to one log.
    let mut copy = lab.start_agent_in("copied-state", &agent, &[&two.path], &[]);
    wait_for("the copy to be refused", 20, || copy.log().contains("refuses this machine"));
    let mut first = lab.start_agent_in("state", &agent, &[&one.path], &[]);
    let count = lab.show(&agent, Some(&one.name)).len();
    lab.wait_checkpoints(&agent, &one.name, count + 1, 30);
    assert!(copy.child.try_wait().unwrap().is_none(), "it tracks on");
    assert!(lab.show(&agent, Some(&two.name)).is_empty(), "nothing of the copy is taken");
    let log = copy.log();
    assert!(log.contains("is a copy of the machine") && log.contains("blxctl accept"), "{log}");
    let shown = bus.dispatcher().await.agents().await.unwrap();
    assert!(text(&shown[0], "refused").contains("the machine at 127.0.0.1 is refused"), "{shown:?}");
    assert!(lab.dispatcher.as_ref().unwrap().log().contains("blxctl accept"));

    bus.dispatcher().await.accept(&agent, Options::new()).await.unwrap();
    wait_for("the other one to be refused", 20, || first.log().matches("refuses this machine").count() == 2);
    stop(&mut copy);
    let _copy = lab.start_agent_in("copied-state", &agent, &[&two.path], &[]);
    lab.wait_checkpoints(&agent, &two.name, 1, 30);
    let count = lab.show(&agent, Some(&one.name)).len();
    assert!(first.child.try_wait().unwrap().is_none());
    assert_eq!(
        lab.show(&agent, Some(&one.name)).len(),
        count,
        "history is not written on by the refused one"
    );
    let again = bus.dispatcher().await.accept("nobody", Options::new()).await.unwrap_err();
    assert!(again.to_string().contains("nothing to accept"), "{again}");
}

#[tokio::test]
async fn every_step_of_a_hello_may_be_the_last() {
    let mut lab = Lab::new("hello");
    let agent = lab.agent("a");
    lab.enroll(&agent);
    lab.start_dispatcher(&[]);
    let dial = dial(&lab, &agent);
    let geometry = Geometry::new(1 << 20, 12).unwrap();
    let offered = async |shown| {
        let (config, answer) = hello(&dial, "sdx", geometry, shown).await;
        let ConfigDown::Offer(offer) = answer else { panic!("{answer:?}") };
        (config, offer)
    };
    let refused = async |shown, says: &str| {
        let (mut config, answer) = hello(&dial, "sdx", geometry, Some(shown)).await;
        let ConfigDown::Fenced { reason } = answer else { panic!("{answer:?}") };
        assert!(reason.contains(says), "{reason}");
        // It may not go on as if nothing had been said.
        send(&mut config, encode_message(&ConfigUp::Holds(shown)).unwrap()).await;
        assert_eq!(next(&mut config).await, None);
    };
    let (_, first) = offered(None).await;
    // Kept, but nobody heard so.
    let (_, second) = offered(Some(first)).await;
    // Not kept.
    let (mut config, third) = offered(Some(first)).await;
    for early in [ConfigUp::Paused(Vec::new()), ConfigUp::Holds(second)] {
        send(&mut config, encode_message(&early).unwrap()).await;
        assert_eq!(next(&mut config).await, None, "{early:?}");
        config = offered(Some(first)).await.0;
    }
    drop(config);
    refused(second, "is a copy of the machine").await;
    refused(third, "is a copy of the machine").await;
    let (_, newest) = offered(Some(first)).await;
    refused(Generation { token: [7; 16], ..newest }, "two machines").await;
    offered(Some(newest)).await;
    // The dispatcher's data are an old copy, or the agent's state is lost: nobody is kept out.
    offered(Some(Generation { number: 99, token: [7; 16] })).await;
    offered(None).await;
    let log = lab.dispatcher.as_ref().unwrap().log();
    assert!(
        log.contains("this data directory is an old copy") && log.contains("its state directory is new"),
        "{log}"
    );
    let ledger = fs::read_to_string(lab.path(&format!("data/generations/{agent}"))).unwrap();
    assert!(ledger.starts_with("101 99:"), "{ledger}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordered_compare_finds_what_no_tracker_saw() {
    let mut lab = Lab::new("compare");
    let bus = Bus::start(&lab);
    lab.bus = Some(bus.address.clone());
    let (disk, behind) = lab.loop_disk_on_file(64);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    lab.start_dispatcher(&["--sync-freq", "1h"]);
    let camera = lab.camera(&agent);
    let mut process = lab.start_agent(&agent, &[&disk.path], &["--hooks-dir", &camera]);
    lab.wait_checkpoints(&agent, &disk.name, 1, 30);

    behind.write_all_at(&[7; 8192], 40 << 20).unwrap();
    behind.sync_all().unwrap();
    let byte = |id: &str| {
        let output = lab.path("restored.img");
        assert!(lab.restore(&agent, &disk.name, id, &output).status.success());
        let mut byte = [0];
        fs::File::open(&output).unwrap().read_exact_at(&mut byte, 40 << 20).unwrap();
        fs::remove_file(&output).unwrap();
        byte[0]
    };
    let (result, details) = bus.sync(&agent, Options::new()).await;
    assert_eq!(result, "done", "{details:?}");
    assert_eq!(byte("latest"), 0, "the tracker cannot know");
    let (result, details) = bus.sync(&agent, Options::from([("compare", true.into())])).await;
    assert_eq!(result, "done", "{details:?}");
    assert_eq!(byte("latest"), 7);
    let rows = lab.show(&agent, Some(&disk.name));
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[2]["delta_bytes"], 8192, "only what differs");
    lab.compare(&agent, &disk.name, rows[2]["checkpoint"].as_str().unwrap());
    let log = lab.dispatcher.as_ref().unwrap().log();
    assert!(log.contains("compared, as ordered") && !log.contains("gap:"), "{log}");

    stop(&mut process);
    let process = lab.start_agent(&agent, &[&disk.path], &["--hooks-dir", &camera]);
    let goes_on =
        || lab.dispatcher.as_ref().unwrap().log().matches("goes on from the last checkpoint").count();
    wait_for("the disk to go on", 30, || goes_on() > 0);
    assert!(process.log().contains("nothing was missed"), "healed: {}", process.log());

    bus.dispatcher().await.pause(&agent, Options::new()).await.unwrap();
    let paused = bus.dispatcher().await.sync(&agent, Options::from([("compare", true.into())])).await;
    assert_eq!(Problem::of(&paused.unwrap_err()).unwrap().kind, ProblemKind::Paused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_waits_for_a_compare_sees_how_far_it_is_and_hears_when_it_cannot_come() {
    let mut lab = Lab::new("waiting");
    let bus = Bus::start(&lab);
    lab.bus = Some(bus.address.clone());
    let disk = lab.loop_disk(24);
    let agent = lab.agent("a");
    lab.enroll(&agent);
    lab.start_dispatcher(&["--sync-freq", "1h"]);
    let slow = ["--read-rate-mib", "4"];
    let mut process = lab.start_agent(&agent, &[&disk.path], &slow);
    lab.wait_checkpoints(&agent, &disk.name, 1, 60);
    let manager = bus.dispatcher().await;
    let compare = || Options::from([("compare", true.into())]);
    let kind = |error: zbus::Error| Problem::of(&error).unwrap().kind;

    let far = async {
        let mut far = (0, 0);
        for _ in 0..100 {
            if far.0 > 0 {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            far = bus.job_bytes().await.unwrap_or_default();
        }
        let busy = manager.sync(&agent, compare()).await.unwrap_err();
        (far, kind(busy))
    };
    let ((result, details), (far, busy)) = tokio::join!(bus.sync(&agent, compare()), far);
    assert_eq!(result, "done", "{details:?}");
    assert!(far.0 < far.1 && far.1 == 24 << 20, "{far:?}");
    assert_eq!(busy, ProblemKind::Busy);
    assert_eq!(lab.show(&agent, Some(&disk.name)).len(), 2);

    let paused = async {
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        manager.pause(&agent, Options::new()).await.unwrap();
    };
    let ((result, details), ()) = tokio::join!(bus.sync(&agent, compare()), paused);
    assert_eq!((result.as_str(), text(&details, "error").as_str()), ("failed", ProblemKind::Paused.name()));
    manager.resume(&agent, Options::new()).await.unwrap();
    // The compare goes on by itself, and the checkpoint behind it comes.
    lab.wait_checkpoints(&agent, &disk.name, 3, 60);

    let killed = async {
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        process.kill();
    };
    let ((result, details), ()) = tokio::join!(bus.sync(&agent, compare()), killed);
    assert_eq!(
        (result.as_str(), text(&details, "error").as_str()),
        ("failed", ProblemKind::NotConnected.name())
    );
}
