//! Who holds a connection to `/ws/restore` or a session, how many of them, and how long: against an agent that speaks by hand.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod bus;
    pub(crate) mod chain;
    pub(crate) mod lab;
    pub(crate) mod wire;
}

use std::fs;
use std::path::Path;
use std::time::Duration;

use blxrep::agent::link::Dial;
use blxrep::geometry::Geometry;
use blxrep::wire::Endpoint;
use blxrep::wire::frame::{decode_message, encode_message};
use blxrep::wire::message::{Fetch, RestoreDown, RestoreUp};
use blxrep::wire::socket::{ClientSocket, ConnectError};
use blxrep_dbus::problem::ProblemKind;
use blxrep_dbus::proxy::JobProxy;
use blxrep_dbus::{BUS_NAME_DISPATCHER, job_path};
use common::bus::Bus;
use common::chain::Chain;
use common::lab::{BLXREP, Lab, run};
use common::wire::{dial, next, send, session};
use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt};
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::{Bytes, Message};
use zbus::proxy::CacheProperties;

/// More than the dispatcher takes for anything that is to end: it looks every 2 s, and waits for 15 s.
const PATIENCE: Duration = Duration::from_secs(40);
const GROUPS: u64 = 32;

/// An enrolled agent of which a checkpoint is stored, that does not compress.
fn stored(lab: &Lab) -> String {
    let agent = lab.agent("web1");
    lab.enroll(&agent);
    let noise = |group: u64| {
        let mut mib = vec![0; 1 << 20];
        blake3::Hasher::new().update(&group.to_le_bytes()).finalize_xof().fill(&mut mib);
        mib
    };
    let (id, disk) = (agent.parse().unwrap(), "disk0".parse().unwrap());
    drop(Chain::new(Path::new(&lab.path("data")), &id, &disk, GROUPS << 20, noise));
    agent
}

async fn connect(dial: &Dial) -> ClientSocket {
    dial.open(Endpoint::Restore, &dial.headers()).await.unwrap()
}

async fn tell(socket: &mut ClientSocket, message: &RestoreUp) {
    send(socket, encode_message(message).unwrap()).await;
}

async fn hear(socket: &mut ClientSocket) -> Option<RestoreDown> {
    let bytes = timeout(PATIENCE, next(socket)).await.expect("only pings come")?;
    Some(decode_message(&bytes).unwrap())
}

/// Asks for the newest checkpoint of an agent.
async fn ask(socket: &mut ClientSocket, of: &str) {
    let (agent, checkpoint) = (of.parse().unwrap(), "latest".to_owned());
    tell(socket, &RestoreUp::Fetch(Fetch { agent, disk: None, checkpoint, partition: None, resumes: false }))
        .await;
}

/// Begins a restore, up to where the agent is to say what it wants.
async fn begin(dial: &Dial, of: &str) -> ClientSocket {
    let mut socket = connect(dial).await;
    ask(&mut socket, of).await;
    loop {
        match hear(&mut socket).await.unwrap() {
            RestoreDown::Begin { .. } | RestoreDown::Verifying { .. } => {}
            RestoreDown::Verified { .. } => return socket,
            other => panic!("{other:?}"),
        }
    }
}

/// Waits for the end of a connection, and answers pings until then.
async fn ends(socket: &mut ClientSocket) {
    while next(socket).await.is_some() {}
}

fn refusal(message: Option<RestoreDown>) -> (ProblemKind, String) {
    match message {
        Some(RestoreDown::Refused { kind, reason, .. }) => (kind, reason),
        other => panic!("no refusal: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_key_or_a_grant_began_ends_with_it() {
    let mut lab = Lab::new("revoked");
    let agent = stored(&lab);
    let (other, data, agents) = (lab.agent("web2"), lab.path("data"), lab.path("agents"));
    lab.enroll(&other);
    let without = fs::read_to_string(&agents).unwrap();
    let granted = format!("{} restores:{agent}\n", without.trim_end());
    fs::write(&agents, &granted).unwrap();
    lab.start_dispatcher(&[]);

    // What counts is the file when a restore begins, not when its connection came.
    let of_other = dial(&lab, &other);
    let mut early = connect(&of_other).await;
    drop(begin(&of_other, &agent).await);
    fs::write(&agents, &without).unwrap();
    ask(&mut early, &agent).await;
    let (kind, reason) = refusal(hear(&mut early).await);
    assert!(kind == ProblemKind::Refused && reason.contains(&format!("restores:{agent}")), "{reason}");

    // A key is replaced: there is a line of the agent's at every moment.
    let old = dial(&lab, &agent);
    let (mut config, _) = session(&old, "disk1", Geometry::new(1 << 20, 12).unwrap()).await;
    let (mut fetching, mut idle) = (begin(&old, &agent).await, connect(&old).await);
    let anew = lab.path("anew");
    let key = run(BLXREP, &["enroll", &agent, "--data-dir", &data, "--agents-file", &anew]);
    fs::write(lab.path(&format!("{agent}.key")), key).unwrap();
    fs::copy(&anew, &agents).unwrap();
    ask(&mut idle, &agent).await;
    // Unless it was cut off before.
    if let Some(message) = hear(&mut idle).await {
        let (kind, reason) = refusal(Some(message));
        assert!(kind == ProblemKind::Refused && reason.contains("not enrolled"), "{reason}");
    }
    for socket in [&mut config, &mut fetching] {
        timeout(PATIENCE, ends(socket)).await.expect("the old key's connection goes on");
    }
    let refused = old.open(Endpoint::Restore, &old.headers()).await.err();
    assert!(matches!(refused, Some(ConnectError::Refused { status: 401, .. })), "{refused:?}");
    begin(&dial(&lab, &agent), &agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_holds_few_connections_and_none_in_silence() {
    let mut lab = Lab::new("few");
    let agent = stored(&lab);
    let other = lab.agent("web2");
    lab.enroll(&other);
    lab.start_dispatcher(&[]);
    let dial_as = dial(&lab, &agent);
    let mut asking = begin(&dial_as, &agent).await;
    let mut idle = Vec::new();
    for _ in 0..7 {
        idle.push(connect(&dial_as).await);
    }
    let refused = dial_as.open(Endpoint::Restore, &dial_as.headers()).await.err();
    assert!(matches!(refused, Some(ConnectError::Refused { status: 503, .. })), "{refused:?}");
    drop(connect(&dial(&lab, &other)).await);

    let digests = async {
        loop {
            tell(&mut asking, &RestoreUp::WantDigests { first_group: 0, count: 1 }).await;
            assert!(matches!(hear(&mut asking).await, Some(RestoreDown::Digests { .. })), "cut off");
            sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        ended = timeout(PATIENCE, join_all(idle.iter_mut().map(ends))) => drop(ended.expect("the silent stay")),
        () = digests => {}
    }
    begin(&dial_as, &agent).await;
    tell(&mut asking, &RestoreUp::Done).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_whose_agent_is_silent_or_deaf_can_be_canceled() {
    let mut lab = Lab::new("silent");
    let agent = stored(&lab);
    let bus = Bus::start(&lab);
    lab.bus = Some(bus.address.clone());
    lab.start_dispatcher(&[]);
    let dial = dial(&lab, &agent);
    let manager = bus.dispatcher().await;
    let mut removed = manager.receive_job_removed().await.unwrap();
    for id in [1, 2] {
        let mut socket = begin(&dial, &agent).await;
        if id == 2 {
            // More than fits on the way.
            for group in 0..GROUPS - 1 {
                tell(&mut socket, &RestoreUp::WantGroup { group, holds: Vec::new() }).await;
            }
        }
        let job = JobProxy::builder(manager.inner().connection());
        let job = job.destination(BUS_NAME_DISPATCHER).path(job_path(id));
        job.cache_properties(CacheProperties::No).build().await.unwrap().cancel().await.unwrap();
        if id == 1 {
            assert_eq!(refusal(hear(&mut socket).await).0, ProblemKind::Canceled);
        }
        // It is not dead: it says so, and reads nothing.
        let alive = async {
            while socket.send(Message::Ping(Bytes::new())).await.is_ok() {
                sleep(Duration::from_secs(1)).await;
            }
            std::future::pending().await
        };
        let ended = tokio::select! {
            ended = timeout(PATIENCE, removed.next()) => ended.expect("the job goes on").unwrap(),
            never = alive => never,
        };
        let args = ended.args().unwrap();
        assert_eq!((args.id, args.result.as_str()), (id, "canceled"));
    }

    // Nor does one hold up the dispatcher's end.
    let _silent = begin(&dial, &agent).await;
    let dispatcher = lab.dispatcher.as_mut().unwrap();
    dispatcher.signal("TERM");
    assert_eq!(dispatcher.exit_code(30), 0);
    let log = dispatcher.log();
    assert!(log.contains("job 3 begins") && !log.contains("abandoned"), "{log}");
}
