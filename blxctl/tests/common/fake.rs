//! The pretended daemon. What a job does is told by the checkpoint (or, of a sync, the disk) that is asked for.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use blxrep_dbus::problem::{Problem, ProblemKind};
use blxrep_dbus::proxy::Details;
use blxrep_dbus::{BUS_NAME_AGENT, BUS_NAME_DISPATCHER, PATH_MANAGER, PATH_ROOT, disk_path, job_path};
use tokio::sync::Notify;
use zbus::connection::Builder;
use zbus::fdo::ObjectManager;
use zbus::object_server::SignalEmitter;
use zbus::wire::{ObjectPath, OwnedFd, OwnedObjectPath, OwnedVariant, Variant};
use zbus::{Connection, ObjectServer, interface};

/// What a restore writes.
pub const CONTENT: &[u8] = b"every byte of the disk";

pub fn details(pairs: Vec<(&str, Variant<'_>)>) -> Details {
    pairs.into_iter().map(|(k, v)| (k.to_owned(), OwnedVariant::try_from(v).unwrap())).collect()
}

pub struct Disk {
    pub agent: &'static str,
    pub id: &'static str,
    pub state: &'static str,
    pub paused_by: Vec<String>,
    pub error: &'static str,
}

impl Disk {
    pub fn new(agent: &'static str, id: &'static str) -> Self {
        Self { agent, id, state: "idle", paused_by: Vec::new(), error: "" }
    }
}

#[interface(name = "org.blxrep.Disk")]
impl Disk {
    #[zbus(property)]
    fn agent(&self) -> String {
        self.agent.into()
    }
    #[zbus(property)]
    fn id(&self) -> String {
        self.id.into()
    }
    #[zbus(property)]
    fn device(&self) -> String {
        "sda".into()
    }
    #[zbus(property)]
    fn size_bytes(&self) -> u64 {
        1 << 30
    }
    #[zbus(property)]
    fn state(&self) -> String {
        self.state.into()
    }
    #[zbus(property)]
    fn paused(&self) -> bool {
        !self.paused_by.is_empty()
    }
    #[zbus(property)]
    fn paused_by(&self) -> Vec<String> {
        self.paused_by.clone()
    }
    #[zbus(property)]
    fn dirty_bytes(&self) -> u64 {
        4096
    }
    #[zbus(property)]
    fn last_checkpoint(&self) -> String {
        "20261121203456".into()
    }
    #[zbus(property, name = "LagUSec")]
    fn lag_usec(&self) -> u64 {
        200_000_000
    }
    #[zbus(property)]
    fn consistency(&self) -> String {
        "filesystem".into()
    }
    #[zbus(property, name = "SyncEveryUSec")]
    fn sync_every_usec(&self) -> u64 {
        300_000_000
    }
    #[zbus(property)]
    fn last_error(&self) -> String {
        self.error.into()
    }
}

struct Job {
    id: u32,
    kind: &'static str,
    canceled: Arc<Notify>,
}

#[interface(name = "org.blxrep.Job")]
impl Job {
    async fn cancel(&self) {
        self.canceled.notify_one();
    }
    #[zbus(property)]
    fn id(&self) -> u32 {
        self.id
    }
    #[zbus(property, name = "Type")]
    fn job_type(&self) -> String {
        self.kind.into()
    }
    #[zbus(property)]
    fn agent(&self) -> String {
        "web1".into()
    }
    #[zbus(property, name = "StartedByUID")]
    fn started_by_uid(&self) -> u32 {
        0
    }
    #[zbus(property)]
    fn state(&self) -> String {
        "running".into()
    }
    #[zbus(property)]
    fn progress(&self) -> f64 {
        0.25
    }
    #[zbus(property)]
    fn bytes_done(&self) -> u64 {
        1 << 28
    }
    #[zbus(property)]
    fn bytes_total(&self) -> u64 {
        1 << 30
    }
}

pub struct Manager {
    agents: Vec<&'static str>,
    next: AtomicU32,
    /// What came of starting checkpoints: agent, disk, checkpoint, result and console.
    pub booted: Vec<[String; 5]>,
}

fn no_such(agent: &str) -> Problem {
    Problem::new(ProblemKind::NoSuchAgent, format!("there is no agent {agent}"))
}

impl Manager {
    fn known(&self, agent: &str) -> Result<(), Problem> {
        if self.agents.contains(&agent) { Ok(()) } else { Err(no_such(agent)) }
    }

    /// Begins a job that goes as `plot` says.
    async fn begin(
        &self,
        kind: &'static str,
        plot: &str,
        output: Option<std::fs::File>,
        end: Details,
        bus: &Connection,
    ) -> Result<OwnedObjectPath, Problem> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let path = OwnedObjectPath::try_from(job_path(id)).unwrap();
        let canceled = Arc::new(Notify::new());
        let job = Job { id, kind, canceled: canceled.clone() };
        bus.object_server().at(&path, job).await.unwrap();
        let emitter = SignalEmitter::new(bus, PATH_MANAGER).unwrap().into_owned();
        Self::job_new(&emitter, id, path.as_ref()).await.unwrap();
        let (at, bus, plot) = (path.clone(), bus.clone(), plot.to_owned());
        let at_once = plot == "instant";
        let play = async move {
            if !at_once {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            if let Some(mut output) = output {
                output.write_all(CONTENT).unwrap();
            }
            let (result, end) = match plot.as_str() {
                "bad" => {
                    let why = details(vec![
                        ("error", "org.blxrep.Error.Damaged".into()),
                        ("message", "20261121203456 is damaged".into()),
                        ("damage", vec!["block 7 of x.bak"].into()),
                    ]);
                    ("failed", why)
                }
                "slow" => {
                    canceled.notified().await;
                    ("canceled", Details::new())
                }
                "stubborn" => std::future::pending().await,
                "die" => return bus.close().await.unwrap(),
                _ => ("done", end),
            };
            bus.object_server().remove::<Job, _>(&at).await.unwrap();
            Self::job_removed(&emitter, id, at.as_ref(), result, end).await.unwrap();
        };
        if at_once {
            play.await;
        } else {
            tokio::spawn(play);
        }
        Ok(path)
    }

    async fn set_paused(&self, agent: &str, by: Vec<String>, server: &ObjectServer) -> Vec<OwnedObjectPath> {
        let path = OwnedObjectPath::try_from(disk_path(agent, "one")).unwrap();
        let disk = server.interface::<_, Disk>(&path).await.unwrap();
        let mut disk = disk.get_mut().await;
        if disk.paused_by == by {
            return Vec::new();
        }
        disk.state = if by.is_empty() { "idle" } else { "paused" };
        disk.paused_by = by;
        vec![path]
    }
}

#[interface(name = "org.blxrep.Manager")]
impl Manager {
    async fn show(&self, agent: &str, options: Details) -> Result<Vec<Details>, Problem> {
        self.known(agent)?;
        let start = options.get("start").map(|v| v.downcast_ref::<String>().unwrap()).unwrap_or_default();
        Ok(vec![details(vec![
            ("checkpoint", "20261121203456".into()),
            ("agent", agent.into()),
            ("disk", "one".into()),
            ("time", "2026-11-21T20:34:56Z".into()),
            ("note", format!("from {start}").into()),
        ])])
    }

    async fn restore(
        &self,
        agent: &str,
        checkpoint: &str,
        target: &str,
        options: Details,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<OwnedObjectPath, Problem> {
        self.known(agent)?;
        if checkpoint == "secret" {
            return Err(Problem::new(ProblemKind::AccessDenied, "you may not"));
        }
        let output = options.get("output").map(|value| {
            let Variant::Fd(fd) = &**value else { panic!("output is no descriptor") };
            std::fs::File::from(std::os::fd::OwnedFd::try_from(fd.try_to_owned().unwrap()).unwrap())
        });
        let consistency = if checkpoint == "fuzzy" { "fuzzy" } else { "filesystem" };
        let end = details(vec![
            ("checkpoint", "20261121203456".into()),
            ("disk", "one".into()),
            ("consistency", consistency.into()),
            ("note", "".into()),
            ("output", target.into()),
            ("size_bytes", 22u64.into()),
            ("written_bytes", 22u64.into()),
        ]);
        self.begin("restore", checkpoint, output, end, bus).await
    }

    async fn verify(
        &self,
        agent: &str,
        checkpoint: &str,
        options: Details,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<OwnedObjectPath, Problem> {
        if checkpoint.is_empty() {
            // What was asked for, as if it were what was found.
            let mut asked: Vec<_> = options.keys().cloned().collect();
            asked.sort();
            let row = HashMap::from([
                ("agent", Variant::from(agent)),
                ("disk", asked.join("+").into()),
                ("checkpoints", 12u32.into()),
            ]);
            let end = details(vec![("damage", Vec::<&str>::new().into()), ("verified", vec![row].into())]);
            return self.begin("verify", "", None, end, bus).await;
        }
        self.known(agent)?;
        let damage: &[&str] = if checkpoint == "damaged" { &["block 7 of x.bak"] } else { &[] };
        let end = details(vec![
            ("checkpoint", checkpoint.into()),
            ("disk", "one".into()),
            ("damage", damage.to_vec().into()),
        ]);
        self.begin("verify", checkpoint, None, end, bus).await
    }

    async fn export(
        &self,
        agent: &str,
        checkpoint: &str,
        listener: OwnedFd,
        options: Details,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<(OwnedObjectPath, Details), Problem> {
        self.known(agent)?;
        assert!(matches!(&*options["overlay"], Variant::Fd(_)));
        drop(listener);
        let shown = details(vec![("checkpoint", "20261121203456".into()), ("disk", "one".into())]);
        assert_eq!(checkpoint, "latest");
        Ok((self.begin("export", "slow", None, Details::new(), bus).await?, shown))
    }

    async fn record_boot(
        &mut self,
        agent: String,
        checkpoint: String,
        result: String,
        options: Details,
    ) -> Result<(), Problem> {
        let [disk, console] = ["disk", "console"].map(|key| options[key].downcast_ref::<String>().unwrap());
        self.booted.push([agent, disk, checkpoint, result, console]);
        Ok(())
    }

    async fn sync(
        &self,
        agent: &str,
        options: Details,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<OwnedObjectPath, Problem> {
        self.known(agent)?;
        let compare = options.get("compare").is_some_and(|v| v.downcast_ref::<bool>().unwrap());
        let checkpoints = HashMap::from([("one", if compare { "20261121204056" } else { "20261121203956" })]);
        self.begin("sync", "", None, details(vec![("checkpoints", checkpoints.into())]), bus).await
    }

    async fn accept(&self, agent: &str, options: Details) -> Result<(), Problem> {
        self.known(agent)?;
        match options.get("disk").map(|v| v.downcast_ref::<String>().unwrap()).as_deref() {
            None | Some("sda") => Ok(()),
            Some(_) => Err(Problem::new(ProblemKind::NoSuchDisk, "there is no such disk")),
        }
    }

    async fn pause(
        &self,
        agent: &str,
        _options: Details,
        #[zbus(object_server)] server: &ObjectServer,
    ) -> Result<Vec<OwnedObjectPath>, Problem> {
        self.known(agent)?;
        Ok(self.set_paused(agent, vec!["dispatcher".into()], server).await)
    }

    async fn resume(
        &self,
        agent: &str,
        _options: Details,
        #[zbus(object_server)] server: &ObjectServer,
    ) -> Result<Vec<OwnedObjectPath>, Problem> {
        self.known(agent)?;
        Ok(self.set_paused(agent, Vec::new(), server).await)
    }

    #[zbus(signal)]
    async fn job_new(emitter: &SignalEmitter<'_>, id: u32, job: ObjectPath<'_>) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: ObjectPath<'_>,
        result: &str,
        details: Details,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub async fn checkpoint_added(
        emitter: &SignalEmitter<'_>,
        agent: &str,
        disk: &str,
        id: &str,
    ) -> zbus::Result<()>;

    #[zbus(property)]
    fn version(&self) -> String {
        "0.1.0".into()
    }

    #[zbus(property)]
    fn scrub(&self) -> Details {
        // An agent, which knows itself as nobody, checks nothing.
        if self.agents.contains(&"") {
            return Details::new();
        }
        details(vec![
            ("every_usec", 2_592_000_000_000u64.into()),
            ("progress", 0.439.into()),
            ("began_usec", 1_795_293_600_000_000u64.into()),
            ("last_ended_usec", 1_795_293_600_000_000u64.into()),
        ])
    }

    #[zbus(property)]
    fn agents(&self) -> Vec<Details> {
        let agent = |id: &&'static str| {
            details(vec![("id", (*id).into()), ("connected", true.into()), ("disks", 1u32.into())])
        };
        self.agents.iter().map(agent).collect()
    }
}

/// Starts a daemon with these disks; each disk's agent is one of its agents.
async fn start(address: &str, name: &'static str, disks: Vec<Disk>) -> Connection {
    let mut agents: Vec<_> = disks.iter().map(|disk| disk.agent).collect();
    if name == BUS_NAME_AGENT {
        agents.push("");
    }
    let mut builder = Builder::address(address)
        .serve_at(PATH_ROOT, ObjectManager)
        .serve_at(PATH_MANAGER, Manager { agents, next: AtomicU32::new(1), booted: Vec::new() });
    for disk in disks {
        builder = builder.serve_at(disk_path(disk.agent, disk.id), disk);
    }
    let bus = builder.build().await.unwrap();
    bus.request_name(name).await.expect("root may own the name: run these tests as root, 'sudo make test'");
    bus
}

pub async fn dispatcher(address: &str, disks: Vec<Disk>) -> Connection {
    start(address, BUS_NAME_DISPATCHER, disks).await
}

pub async fn agent(address: &str, disks: Vec<Disk>) -> Connection {
    start(address, BUS_NAME_AGENT, disks).await
}
