//! The interface over peer-to-peer connections, with a role that only notes what it is asked.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod calls;
mod contract;
mod life;
mod objects;
mod system;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blxrep_dbus::problem::{Problem, ProblemKind};
use blxrep_dbus::proxy::{JobProxy, ManagerProxy, Options};
use blxrep_dbus::words::{DiskState, Role};
use futures_util::StreamExt;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zbus::connection::Builder;
use zbus::message::{Message, Type};
use zbus::wire::{OwnedObjectPath, OwnedVariant};
use zbus::{Connection, Guid, MatchRule, MessageStream};

use super::access::Access;
use super::control::{
    About, By, Control, Details, Failure, Planned, Progress, RestoreRequest, ServeRequest, Which, Work,
};
use super::manager::{Manager, named};
use super::{serve, set_up};
use crate::boot_test::BootTest;
use crate::checkpoint::Consistency;
use crate::dispatcher::scrub::{Course, LastPass, ScrubStatus};
use crate::ids::{AgentId, DiskId};
use crate::restore::{ShowRow, VerifyRequest, Wanted};
use crate::status::{AgentStatus, CheckpointAdded, DiskStatus, Newest};

/// Any bus is named so; peer to peer, nobody looks at it.
const PEER: &str = "org.blxrep.Peer";
/// Longer than anything takes that does come.
const PATIENCE: Duration = Duration::from_secs(20);

/// What access says, and what it was asked.
#[derive(Debug, Default)]
pub(super) struct Told {
    uid: AtomicU32,
    denies: AtomicBool,
    asked: Mutex<Vec<(String, About)>>,
}

impl Told {
    pub(super) fn uid(&self) -> u32 {
        self.uid.load(Ordering::Relaxed)
    }

    pub(super) fn check(&self, action: &str, about: &About) -> Result<(), Problem> {
        self.asked.lock().unwrap().push((action.to_owned(), about.clone()));
        if self.denies.load(Ordering::Relaxed) {
            return Err(Problem::new(ProblemKind::AccessDenied, format!("{action} is denied")));
        }
        Ok(())
    }

    fn take(&self) -> Vec<(String, About)> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// A role that does nothing, or what a test gives it to do.
#[derive(Default)]
struct Fake {
    asked: Mutex<Vec<String>>,
    refuses: Mutex<Option<Problem>>,
    work: Mutex<Option<Work>>,
    disks: Mutex<Vec<DiskStatus>>,
}

impl Fake {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn refuse(&self, kind: Option<ProblemKind>) {
        *self.refuses.lock().unwrap() = kind.map(|kind| Problem::new(kind, "as the test wants"));
    }

    fn will(&self, work: impl FnOnce(&Progress) -> Result<Details, Failure> + Send + 'static) {
        *self.work.lock().unwrap() = Some(Box::new(work));
    }

    fn note(&self, asked: String) -> Result<(), Problem> {
        self.asked.lock().unwrap().push(asked);
        self.refuses.lock().unwrap().clone().map_or(Ok(()), Err)
    }

    fn plan(&self, which: &Which, checkpoint: &str, target: &str) -> Planned {
        let about = About {
            agent: which.agent.clone(),
            disk: which.disk.clone().unwrap_or_default(),
            checkpoint: checkpoint.into(),
            target: target.into(),
        };
        let work = self.work.lock().unwrap().take().unwrap_or_else(|| Box::new(|_| Ok(Details::new())));
        Planned { about, work }
    }
}

impl Control for Fake {
    fn role(&self) -> Role {
        Role::Dispatcher
    }

    fn agents(&self) -> Vec<AgentStatus> {
        vec![AgentStatus {
            id: agent_id("web1"),
            connected: true,
            hostname: "web1.example".into(),
            version: "1.2.3".into(),
            address: "192.0.2.1:5".into(),
            last_seen_unix_ms: 1000,
            disks: 2,
            refused: "a copy".into(),
            unfinished: Vec::new(),
        }]
    }

    fn disks(&self) -> Vec<DiskStatus> {
        self.disks.lock().unwrap().clone()
    }

    fn scrub(&self) -> Option<ScrubStatus> {
        Some(ScrubStatus {
            every: Some(Duration::from_secs(60)),
            course: Some(Course { began_unix_ms: 5, total_bytes: 400, done_bytes: 100 }),
            last: Some(LastPass { began_unix_ms: 1, ended_unix_ms: 2 }),
            damaged: 3,
        })
    }

    fn show(&self, which: &Which, start: Option<u64>, end: Option<u64>) -> Result<Vec<ShowRow>, Problem> {
        self.note(format!("show {} {:?} {start:?} {end:?}", which.agent, which.disk))?;
        Ok(vec![row()])
    }

    fn set_paused(&self, which: &Which, paused: bool) -> Result<Vec<(AgentId, DiskId)>, Problem> {
        self.note(format!("set_paused {} {:?} {paused}", which.agent, which.disk))?;
        Ok(vec![(agent_id("web1"), disk_id("5000-a"))])
    }

    fn sync(&self, which: &Which, compare: bool) -> Result<Planned, Problem> {
        self.note(format!("sync {} {:?} {compare}", which.agent, which.disk))?;
        Ok(self.plan(which, "", ""))
    }

    fn accept(&self, which: &Which) -> Result<(), Problem> {
        self.note(format!("accept {} {:?}", which.agent, which.disk))
    }

    fn restore(&self, request: RestoreRequest) -> Result<Planned, Problem> {
        let RestoreRequest { which, checkpoint, target, output, .. } = request;
        let target = target.to_str().unwrap();
        self.note(format!(
            "restore {} {:?} {checkpoint} {target} {}",
            which.agent,
            which.disk,
            output.is_some()
        ))?;
        if let Some(mut output) = output {
            self.will(move |_| {
                std::io::Write::write_all(&mut output, b"restored").unwrap();
                Ok(Details::new())
            });
        }
        Ok(self.plan(&which, &checkpoint, target))
    }

    fn verify(&self, request: VerifyRequest) -> Result<Planned, Problem> {
        let VerifyRequest { agent, disk, wanted } = request;
        let agent = agent.map_or_else(String::new, |agent| agent.to_string());
        self.note(format!("verify {agent} {disk:?} {wanted:?}"))?;
        let one = match wanted {
            Wanted::Named(mut names) if names.len() == 1 => names.pop(),
            _ => None,
        };
        Ok(self.plan(&Which { agent, disk }, &one.unwrap_or_default(), ""))
    }

    fn record_boot(&self, which: &Which, checkpoint: &str, test: &BootTest) -> Result<(), Problem> {
        self.note(format!("record_boot {} {:?} {checkpoint} {}", which.agent, which.disk, test.result))
    }

    fn serve(&self, request: ServeRequest) -> Result<(Planned, Details), Problem> {
        let ServeRequest { which, checkpoint, target, by } = request;
        let (what, fd) = match by {
            By::Mount(fd) => ("mount", fd),
            By::Export(fd, None) => ("export", fd),
            By::Export(fd, Some(_)) => ("export writable", fd),
        };
        self.note(format!("{what} {} {:?} {checkpoint} {target}", which.agent, which.disk))?;
        self.will(move |_| {
            std::io::Write::write_all(&mut std::fs::File::from(fd), b"served").unwrap();
            Ok(Details::new())
        });
        Ok((self.plan(&which, &checkpoint, &target), named([("disk", "sda".into())])))
    }
}

fn agent_id(text: &str) -> AgentId {
    text.parse().unwrap()
}

fn disk_id(text: &str) -> DiskId {
    text.parse().unwrap()
}

fn row() -> ShowRow {
    ShowRow {
        checkpoint: "20261121203456".into(),
        agent: "web1".into(),
        disk: "5000-a".into(),
        device: "sda".into(),
        time: "2026-11-21T20:34:56Z".into(),
        consistency: "crash".into(),
        size_bytes: 4096,
        delta_bytes: 512,
        stored_bytes: 100,
        parent: None,
        freeze_ms: 7,
        unreadable_blocks: 3,
        note: "a note".into(),
        boot: Some("passed".into()),
        boot_time: Some("2026-11-22T04:00:00Z".into()),
    }
}

fn disk(id: &str) -> DiskStatus {
    DiskStatus {
        agent: agent_id("web1"),
        disk: disk_id(id),
        device: "sda".into(),
        size_bytes: 1 << 30,
        state: DiskState::Idle,
        paused_by_agent: false,
        paused_by_dispatcher: false,
        progress: 0.0,
        dirty_bytes: 0,
        newest: Some(Newest {
            id: "20261121203456".parse().unwrap(),
            time_unix_ms: 1_795_293_296_000,
            consistency: Consistency::Crash,
        }),
        sync_every: Some(Duration::from_secs(60)),
        last_error: None,
        damage: Vec::new(),
    }
}

/// A client and a daemon, connected.
struct World {
    fake: Arc<Fake>,
    told: Arc<Told>,
    daemon: Manager,
    added: broadcast::Sender<CheckpointAdded>,
    client: Connection,
    serving: JoinHandle<()>,
}

impl World {
    async fn start() -> Self {
        Self::start_with(Arc::default()).await
    }

    async fn start_with(fake: Arc<Fake>) -> Self {
        let told = Arc::<Told>::default();
        let daemon = Manager::new(fake.clone(), Access::Told(told.clone()));
        let (added, _) = broadcast::channel(4);
        let (client, serving) = connect(&daemon, added.subscribe()).await;
        Self { fake, told, daemon, added, client, serving }
    }

    /// Takes the connection away, and makes a new one.
    async fn reconnect(&mut self) {
        self.serving.abort();
        self.daemon.jobs.detach().await;
        (self.client, self.serving) = connect(&self.daemon, self.added.subscribe()).await;
    }

    async fn manager(&self) -> ManagerProxy<'static> {
        ManagerProxy::builder(&self.client).destination(PEER).build().await.unwrap()
    }

    async fn job(&self, path: &OwnedObjectPath) -> JobProxy<'static> {
        let builder = JobProxy::builder(&self.client).destination(PEER).path(path.clone());
        builder.cache_properties(zbus::proxy::CacheProperties::No).build().await.unwrap()
    }

    async fn signals(&self) -> Signals {
        let rule = MatchRule::builder().msg_type(Type::Signal).build().unwrap();
        Signals(
            MessageStream::for_match_rule(rule, &self.client, std::num::NonZero::new(1000)).await.unwrap(),
        )
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn connect(
    daemon: &Manager,
    added: broadcast::Receiver<CheckpointAdded>,
) -> (Connection, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Builder::unix_stream(ours).server(Guid::generate()).p2p().build();
    let (server, client) = tokio::try_join!(server, Builder::unix_stream(theirs).p2p().build()).unwrap();
    let disks = set_up(daemon, &server).await.unwrap();
    let daemon = daemon.clone();
    let serving = tokio::spawn(async move {
        serve(&daemon, &server, disks, added, &mut mpsc::channel(1).1).await;
    });
    // What was signalled of the beginning is over when this is answered.
    let ping = client.call_method(None::<&str>, "/", Some("org.freedesktop.DBus.Peer"), "Ping", &());
    timeout(PATIENCE, ping).await.unwrap().unwrap();
    (client, serving)
}

/// Every signal that comes.
struct Signals(MessageStream);

impl Signals {
    /// The next one of a name; others are passed over.
    async fn next(&mut self, member: &str) -> Message {
        let found = async {
            loop {
                let message = self.0.next().await.expect("the connection is open").unwrap();
                if message.header().member().unwrap().as_str() == member {
                    return message;
                }
            }
        };
        timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("no {member} came"))
    }

    /// All that come for a while.
    async fn for_a_while(&mut self, millis: u64) -> Vec<Message> {
        let mut all = Vec::new();
        let end = Instant::now() + Duration::from_millis(millis);
        while let Ok(message) = timeout(end.saturating_duration_since(Instant::now()), self.0.next()).await {
            all.push(message.expect("the connection is open").unwrap());
        }
        all
    }

    async fn removed(&mut self) -> Removed {
        let message = self.next("JobRemoved").await;
        let (id, path, result, details) = message.body().deserialize().unwrap();
        Removed { id, path, result, details }
    }
}

#[derive(Debug)]
struct Removed {
    id: u32,
    path: OwnedObjectPath,
    result: String,
    details: HashMap<String, OwnedVariant>,
}

fn text(values: &HashMap<String, OwnedVariant>, key: &str) -> String {
    values.get(key).unwrap_or_else(|| panic!("no {key} in {values:?}")).clone().try_into().unwrap()
}

fn none() -> Options<'static> {
    Options::new()
}

fn kind<T: std::fmt::Debug>(result: zbus::Result<T>) -> ProblemKind {
    let error = result.unwrap_err();
    Problem::of(&error).unwrap_or_else(|| panic!("not of the contract: {error:?}")).kind
}
