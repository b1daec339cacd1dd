//! Every method: what reaches the role, what comes back, and what is refused.

use std::io::Read;

use blxrep_dbus::{ACTION_CHECKPOINT, ACTION_INSPECT, ACTION_PAUSE, ACTION_RESTORE, BOOT_CONSOLE_MAX_BYTES};
use zbus::wire::Variant;

use super::*;

/// Calls every method that takes options, with these.
async fn call_all(
    manager: &ManagerProxy<'_>,
    options: impl Fn() -> Options<'static>,
) -> Vec<(&'static str, zbus::Result<()>)> {
    vec![
        ("Show", manager.show("web1", options()).await.map(|_| ())),
        ("Restore", manager.restore("web1", "latest", "/t", options()).await.map(|_| ())),
        ("Pause", manager.pause("web1", options()).await.map(|_| ())),
        ("Resume", manager.resume("web1", options()).await.map(|_| ())),
        ("Sync", manager.sync("web1", options()).await.map(|_| ())),
        ("Verify", manager.verify("web1", "latest", options()).await.map(|_| ())),
        ("Accept", manager.accept("web1", options()).await),
        ("Mount", manager.mount("web1", "latest", null().into(), options()).await.map(|_| ())),
        ("Export", manager.export("web1", "latest", null().into(), options()).await.map(|_| ())),
        ("RecordBoot", manager.record_boot("web1", "latest", "passed", options()).await),
    ]
}

/// Some open file.
fn null() -> std::os::fd::OwnedFd {
    std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

fn with_disk() -> Options<'static> {
    Options::from([("disk", "sda".into())])
}

#[tokio::test]
async fn every_method_reaches_the_role_with_what_was_asked_for() {
    let world = World::start().await;
    let manager = world.manager().await;
    for (name, result) in call_all(&manager, with_disk).await {
        assert!(result.is_ok(), "{name}: {result:?}");
    }
    let asked = [
        "show web1 Some(\"sda\") None None",
        "restore web1 Some(\"sda\") latest /t false",
        "set_paused web1 Some(\"sda\") true",
        "set_paused web1 Some(\"sda\") false",
        "sync web1 Some(\"sda\") false",
        "verify web1 Some(\"sda\") Named([\"latest\"])",
        "accept web1 Some(\"sda\")",
        "mount web1 Some(\"sda\") latest -",
        "export web1 Some(\"sda\") latest -",
        "record_boot web1 Some(\"sda\") latest passed",
    ];
    assert_eq!(world.fake.take(), asked);
    let about = |checkpoint: &str, target: &str| About {
        agent: "web1".into(),
        disk: "sda".into(),
        checkpoint: checkpoint.into(),
        target: target.into(),
    };
    let expected = [
        (ACTION_INSPECT, about("", "")),
        (ACTION_RESTORE, about("latest", "/t")),
        (ACTION_PAUSE, about("", "")),
        (ACTION_PAUSE, about("", "")),
        (ACTION_CHECKPOINT, about("", "")),
        (ACTION_CHECKPOINT, about("latest", "")),
        (ACTION_CHECKPOINT, about("", "")),
        (ACTION_RESTORE, about("latest", "-")),
        (ACTION_RESTORE, about("latest", "-")),
        (ACTION_CHECKPOINT, about("latest", "")),
    ];
    assert_eq!(world.told.take(), expected.map(|(action, about)| (action.to_owned(), about)));
    let options = Options::from([("start", "202611212034".into()), ("end", "202611212035".into())]);
    manager.show("", options).await.unwrap();
    manager.sync("web1", Options::from([("compare", true.into())])).await.unwrap();
    let options = Options::from([("checkpoints", vec!["a", "b"].into())]);
    manager.verify("web1", "", options).await.unwrap();
    manager.verify("", "", none()).await.unwrap();
    let asked = [
        "show  None Some(202611212034) Some(202611212035)",
        "sync web1 None true",
        "verify web1 None Named([\"a\", \"b\"])",
        "verify  None Between(None, None)",
    ];
    assert_eq!(world.fake.take(), asked);
}

#[tokio::test]
async fn what_comes_back_is_what_the_contract_says() {
    let world = World::start().await;
    let manager = world.manager().await;
    let rows = manager.show("web1", none()).await.unwrap();
    let [shown] = rows.as_slice() else { panic!("{rows:?}") };
    assert_eq!(*shown, {
        let row = row();
        named([
            ("checkpoint", row.checkpoint.into()),
            ("agent", row.agent.into()),
            ("disk", row.disk.into()),
            ("device", row.device.into()),
            ("time", row.time.into()),
            ("consistency", row.consistency.into()),
            ("size_bytes", 4096u64.into()),
            ("delta_bytes", 512u64.into()),
            ("stored_bytes", 100u64.into()),
            ("parent", "".into()),
            ("freeze_ms", 7u32.into()),
            ("unreadable_blocks", 3u32.into()),
            ("note", row.note.into()),
            ("boot", row.boot.unwrap().into()),
            ("boot_time", row.boot_time.unwrap().into()),
        ])
    });
    for paths in [manager.pause("web1", none()).await.unwrap(), manager.resume("web1", none()).await.unwrap()]
    {
        assert_eq!(
            paths.iter().map(|path| path.as_str()).collect::<Vec<_>>(),
            ["/org/blxrep/disk/web1/_35000_2da"]
        );
    }
    assert_eq!(manager.sync("web1", none()).await.unwrap().as_str(), "/org/blxrep/job/1");
    assert_eq!(manager.verify("web1", "latest", none()).await.unwrap().as_str(), "/org/blxrep/job/2");
    assert_eq!(manager.role().await.unwrap(), "dispatcher");
    assert_eq!(manager.version().await.unwrap(), env!("CARGO_PKG_VERSION"));
    let agents = manager.agents().await.unwrap();
    let expected = named([
        ("id", "web1".into()),
        ("connected", true.into()),
        ("hostname", "web1.example".into()),
        ("version", "1.2.3".into()),
        ("address", "192.0.2.1:5".into()),
        ("last_seen_usec", 1_000_000u64.into()),
        ("disks", 2u32.into()),
        ("refused", "a copy".into()),
        ("unfinished", Vec::<String>::new().into()),
    ]);
    assert_eq!(agents, [expected]);
}

#[tokio::test]
async fn every_kind_of_error_arrives_as_itself() {
    let world = World::start().await;
    let manager = world.manager().await;
    for wanted in ProblemKind::ALL {
        world.fake.refuse(Some(wanted));
        for (name, result) in call_all(&manager, none).await {
            let problem = Problem::of(&result.unwrap_err()).unwrap();
            assert_eq!((problem.kind, problem.message.as_str()), (wanted, "as the test wants"), "{name}");
        }
    }
    let mut signals = world.signals().await;
    world.fake.refuse(None);
    manager.sync("web1", none()).await.unwrap();
    assert_eq!(signals.removed().await.id, 1, "what was refused was no job");
}

#[tokio::test]
async fn an_option_that_is_not_known_or_of_another_type_is_refused_before_anything_is_asked() {
    let world = World::start().await;
    let manager = world.manager().await;
    for (name, result) in call_all(&manager, || Options::from([("dsik", "sda".into())])).await {
        let problem = Problem::of(&result.unwrap_err()).unwrap();
        assert_eq!(problem.kind, ProblemKind::UnknownOption, "{name}");
        assert!(problem.message.contains("dsik") && problem.message.contains("disk"), "{name}: {problem}");
    }
    for (name, result) in call_all(&manager, || Options::from([("disk", 5u32.into())])).await {
        let problem = Problem::of(&result.unwrap_err()).unwrap();
        assert_eq!(problem.kind, ProblemKind::InvalidArgument, "{name}");
        assert!(problem.message.contains("disk"), "{name}: {problem}");
    }
    for (key, value) in [("start", Variant::from(202_611_212_034u64)), ("end", "yesterday".into())] {
        assert_eq!(
            kind(manager.show("web1", Options::from([(key, value)])).await),
            ProblemKind::InvalidArgument
        );
    }
    let compare = Options::from([("compare", "yes".into())]);
    assert_eq!(kind(manager.sync("web1", compare).await), ProblemKind::InvalidArgument);
    let output = Options::from([("output", "/dev/sda".into())]);
    assert_eq!(kind(manager.restore("web1", "latest", "/t", output).await), ProblemKind::InvalidArgument);
    for (agent, checkpoint, target) in
        [("../x", "latest", "/t"), ("web1", "a b", "/t"), ("web1", "", "/t"), ("web1", "latest", "relative")]
    {
        assert_eq!(
            kind(manager.restore(agent, checkpoint, target, none()).await),
            ProblemKind::InvalidArgument
        );
    }
    assert_eq!(kind(manager.verify("web1", "a\nb", none()).await), ProblemKind::InvalidArgument);
    assert_eq!(world.fake.take(), Vec::<String>::new());
}

#[tokio::test]
async fn what_access_denies_never_reaches_the_role() {
    let world = World::start().await;
    let manager = world.manager().await;
    world.told.denies.store(true, Ordering::Relaxed);
    for (name, result) in call_all(&manager, with_disk).await {
        assert_eq!(kind(result), ProblemKind::AccessDenied, "{name}");
    }
    assert_eq!(world.told.take().len(), 10);
    assert_eq!(world.fake.take(), Vec::<String>::new());
}

#[tokio::test]
async fn what_booting_showed_is_a_word_and_clean_text_of_bounded_length() {
    let world = World::start().await;
    let manager = world.manager().await;
    let long = "x".repeat(BOOT_CONSOLE_MAX_BYTES + 1);
    for (result, console) in [("well", ""), ("passed", "\x1b[2J"), ("failed", &*long)] {
        let options = Options::from([("console", console.into())]);
        let answer = manager.record_boot("web1", "latest", result, options).await;
        assert_eq!(kind(answer), ProblemKind::InvalidArgument, "{result}");
    }
    assert_eq!(world.fake.take(), Vec::<String>::new());
}

#[tokio::test]
async fn a_role_that_breaks_off_is_an_error_and_not_silence() {
    struct Broken;
    impl Control for Broken {
        fn role(&self) -> Role {
            Role::Agent
        }
        fn agents(&self) -> Vec<AgentStatus> {
            Vec::new()
        }
        fn disks(&self) -> Vec<DiskStatus> {
            Vec::new()
        }
        fn scrub(&self) -> Option<ScrubStatus> {
            None
        }
        fn show(&self, _: &Which, _: Option<u64>, _: Option<u64>) -> Result<Vec<ShowRow>, Problem> {
            panic!("on purpose")
        }
        fn set_paused(&self, _: &Which, _: bool) -> Result<Vec<(AgentId, DiskId)>, Problem> {
            panic!("on purpose")
        }
        fn sync(&self, _: &Which, _: bool) -> Result<Planned, Problem> {
            panic!("on purpose")
        }
        fn accept(&self, _: &Which) -> Result<(), Problem> {
            panic!("on purpose")
        }
        fn restore(&self, _: RestoreRequest) -> Result<Planned, Problem> {
            panic!("on purpose")
        }
        fn verify(&self, _: VerifyRequest) -> Result<Planned, Problem> {
            panic!("on purpose")
        }
        fn record_boot(&self, _: &Which, _: &str, _: &BootTest) -> Result<(), Problem> {
            panic!("on purpose")
        }
        fn serve(&self, _: ServeRequest) -> Result<(Planned, Details), Problem> {
            panic!("on purpose")
        }
    }
    let daemon = Manager::new(Arc::new(Broken), Access::Told(Arc::default()));
    let (added, _) = broadcast::channel(4);
    let (client, serving) = connect(&daemon, added.subscribe()).await;
    let manager = ManagerProxy::builder(&client).destination(PEER).build().await.unwrap();
    // More often than places: none may be lost.
    for _ in 0..8 {
        for (name, result) in call_all(&manager, none).await {
            assert_eq!(kind(result), ProblemKind::Failed, "{name}");
        }
    }
    serving.abort();
}

#[tokio::test]
async fn an_open_file_is_written_to_by_the_job() {
    let world = World::start().await;
    let mut signals = world.signals().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let fd = std::os::fd::OwnedFd::from(file.reopen().unwrap());
    let options = Options::from([("output", Variant::Fd(fd.into()))]);
    world.manager().await.restore("web1", "latest", "my image", options).await.unwrap();
    assert_eq!(signals.removed().await.result, "done");
    assert_eq!(world.fake.take(), ["restore web1 None latest my image true"]);
    let mut text = String::new();
    file.reopen().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "restored");
}

#[tokio::test]
async fn what_a_checkpoint_is_shown_by_reaches_the_job_and_what_is_shown_the_caller() {
    let world = World::start().await;
    let manager = world.manager().await;
    let mut signals = world.signals().await;
    for writable in [false, true] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let listener = std::os::fd::OwnedFd::from(file.reopen().unwrap());
        let mut options = Options::from([("target", "/run/x".into())]);
        if writable {
            options.insert("overlay", Variant::Fd(null().into()));
        }
        let (job, shown) = manager.export("web1", "latest", listener.into(), options).await.unwrap();
        assert_eq!((text(&shown, "disk").as_str(), signals.removed().await.path), ("sda", job));
        assert_eq!(std::fs::read(file.path()).unwrap(), b"served");
    }
    assert_eq!(
        world.fake.take(),
        ["export web1 None latest /run/x", "export writable web1 None latest /run/x"]
    );
}
