//! `org.blxrep.Manager`: what can be asked and ordered.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use blxrep_dbus::problem::{Problem, ProblemKind};
use blxrep_dbus::words::JobType;
use blxrep_dbus::{ACTION_CHECKPOINT, ACTION_INSPECT, ACTION_PAUSE, ACTION_RESTORE, disk_path};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tracing::{error, info};
use zbus::Connection;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::wire::{OwnedFd, OwnedObjectPath, OwnedVariant, Variant};

use super::access::Access;
use super::control::{About, By, Control, Details, Planned, RestoreRequest, ServeRequest, Which};
use super::jobs::Jobs;
use super::options::{Options, boot_test, file, name, target, wanted, which};
use super::outcome::{SHOW_ROWS_MAX, too_many_rows};
use crate::dispatcher::scrub::ScrubStatus;
use crate::restore::{ShowRow, VerifyRequest};
use crate::status::AgentStatus;

/// Calls that are carried out at once; more wait.
const CALLS_MAX: usize = 8;

type RawOptions = HashMap<String, OwnedVariant>;

/// What a daemon serves, on whichever connection.
#[derive(Clone)]
pub(super) struct Manager {
    pub(super) control: Arc<dyn Control>,
    pub(super) access: Access,
    pub(super) jobs: Arc<Jobs>,
    /// As they were last looked at: a property that had to wait would hold up every other call.
    pub(super) agents: Arc<Mutex<Vec<AgentStatus>>>,
    /// Likewise.
    pub(super) scrub: Arc<Mutex<Option<ScrubStatus>>>,
    calls: Arc<Semaphore>,
}

impl Manager {
    /// No jobs and no agents yet.
    pub(super) fn new(control: Arc<dyn Control>, access: Access) -> Self {
        let jobs = Arc::new(Jobs::new(access.clone()));
        let calls = Arc::new(Semaphore::new(CALLS_MAX));
        Self { control, access, jobs, agents: Arc::default(), scrub: Arc::default(), calls }
    }

    /// Lets a call pass, or not. Gives the user it comes from.
    async fn admit(&self, call: &Call<'_>, action: &str, about: &About) -> Result<u32, Problem> {
        let uid = self.access.caller_uid(call.connection, call.header).await?;
        self.access.check(call.connection, call.header, uid, action, about).await?;
        Ok(uid)
    }

    /// Asks the role, on a thread that may block.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn Control) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let _permit = self.calls.acquire().await;
        self.ask_now(question).await
    }

    /// The same without waiting for others, for what must not.
    async fn ask_now<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn Control) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let control = self.control.clone();
        spawn_blocking(move || question(&*control)).await.unwrap_or_else(|fault| {
            error!("a call from the bus broke off: {fault}");
            let message = "the call broke off by a fault of the program: the journal says where";
            Err(Problem::new(ProblemKind::Failed, message))
        })
    }

    async fn set_paused(
        &self,
        call: &Call<'_>,
        agent: &str,
        options: RawOptions,
        paused: bool,
    ) -> Result<Vec<OwnedObjectPath>, Problem> {
        let mut options = Options::new(options, &["disk"])?;
        let which = which(agent, &mut options)?;
        self.admit(call, ACTION_PAUSE, &about(&which, "", "")).await?;
        let changed = self.ask_now(move |control| control.set_paused(&which, paused)).await?;
        let paths = changed.iter().map(|(agent, disk)| disk_path(agent.as_str(), disk.as_str()));
        paths.map(|path| OwnedObjectPath::try_from(path).map_err(no_path)).collect()
    }

    /// Begins a job for a caller who was let pass.
    async fn begin(
        &self,
        kind: JobType,
        uid: u32,
        plan: impl FnOnce(&dyn Control) -> Result<Planned, Problem> + Send + 'static,
    ) -> Result<OwnedObjectPath, Problem> {
        let slot = self.jobs.slot()?;
        let planned = self.ask(plan).await?;
        self.jobs.begin(slot, kind, uid, planned).await
    }

    /// Shows a checkpoint, by what a caller opened.
    async fn serve(
        &self,
        call: &Call<'_>,
        (kind, by): (JobType, By),
        (agent, checkpoint): (&str, &str),
        mut options: Options,
    ) -> Result<(OwnedObjectPath, Details), Problem> {
        let which = which(agent, &mut options)?;
        name("checkpoint", checkpoint)?;
        let target = options.text("target")?.unwrap_or_else(|| "-".to_owned());
        self::target(&target, true)?;
        let uid = self.admit(call, ACTION_RESTORE, &about(&which, checkpoint, &target)).await?;
        let slot = self.jobs.slot()?;
        let request = ServeRequest { which, checkpoint: checkpoint.to_owned(), target, by };
        let (planned, shown) = self.ask(move |control| control.serve(request)).await?;
        Ok((self.jobs.begin(slot, kind, uid, planned).await?, shown))
    }
}

/// Where a call comes from.
struct Call<'a> {
    connection: &'a Connection,
    header: &'a Header<'a>,
}

// No method takes `&mut self`: one that waits for a person would hold up all others.
#[zbus::interface(name = "org.blxrep.Manager", introspection_docs = false)]
impl Manager {
    #[zbus(out_args("checkpoints"))]
    async fn show(
        &self,
        agent: &str,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<Details>, Problem> {
        let mut options = Options::new(options, &["disk", "start", "end"])?;
        let which = which(agent, &mut options)?;
        let (start, end) = (options.minute("start")?, options.minute("end")?);
        let call = Call { connection, header: &header };
        self.admit(&call, ACTION_INSPECT, &about(&which, "", "")).await?;
        let rows = self.ask(move |control| control.show(&which, start, end)).await?;
        if rows.len() > SHOW_ROWS_MAX {
            return Err(too_many_rows(rows.len()));
        }
        Ok(rows.into_iter().map(row_details).collect())
    }

    #[zbus(out_args("job"))]
    async fn restore(
        &self,
        agent: &str,
        checkpoint: &str,
        target: &str,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Problem> {
        let mut options = Options::new(options, &["disk", "output", "partition", "overwrite"])?;
        let which = which(agent, &mut options)?;
        let (output, partition) = (options.file("output")?, options.number("partition")?);
        let overwrite = options.text("overwrite")?.map(PathBuf::from);
        name("checkpoint", checkpoint)?;
        self::target(target, output.is_some())?;
        let call = Call { connection, header: &header };
        let uid = self.admit(&call, ACTION_RESTORE, &about(&which, checkpoint, target)).await?;
        let (checkpoint, target) = (checkpoint.to_owned(), PathBuf::from(target));
        let request = RestoreRequest { which, checkpoint, target, output, partition, overwrite };
        self.begin(JobType::Restore, uid, move |control| control.restore(request)).await
    }

    #[zbus(out_args("changed"))]
    async fn pause(
        &self,
        agent: &str,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<OwnedObjectPath>, Problem> {
        self.set_paused(&Call { connection, header: &header }, agent, options, true).await
    }

    #[zbus(out_args("changed"))]
    async fn resume(
        &self,
        agent: &str,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<OwnedObjectPath>, Problem> {
        self.set_paused(&Call { connection, header: &header }, agent, options, false).await
    }

    #[zbus(out_args("job"))]
    async fn sync(
        &self,
        agent: &str,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Problem> {
        let mut options = Options::new(options, &["disk", "compare"])?;
        let which = which(agent, &mut options)?;
        let compare = options.flag("compare")?;
        let call = Call { connection, header: &header };
        let uid = self.admit(&call, ACTION_CHECKPOINT, &about(&which, "", "")).await?;
        self.begin(JobType::Sync, uid, move |control| control.sync(&which, compare)).await
    }

    async fn accept(
        &self,
        agent: &str,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), Problem> {
        let mut options = Options::new(options, &["disk"])?;
        let which = which(agent, &mut options)?;
        let call = Call { connection, header: &header };
        let uid = self.admit(&call, ACTION_CHECKPOINT, &about(&which, "", "")).await?;
        info!(AGENT = %which.agent, DISK = which.disk, "uid {uid} accepts what was refused");
        self.ask_now(move |control| control.accept(&which)).await
    }

    #[zbus(out_args("job"))]
    async fn verify(
        &self,
        agent: &str,
        checkpoint: &str,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, Problem> {
        let mut options = Options::new(options, &["disk", "checkpoints", "start", "end"])?;
        let which = which(agent, &mut options)?;
        let wanted = wanted(checkpoint, &mut options)?;
        let call = Call { connection, header: &header };
        let uid = self.admit(&call, ACTION_CHECKPOINT, &about(&which, checkpoint, "")).await?;
        let agent = if which.agent.is_empty() { None } else { Some(which.agent()?) };
        let request = VerifyRequest { agent, disk: which.disk, wanted };
        self.begin(JobType::Verify, uid, move |control| control.verify(request)).await
    }

    async fn record_boot(
        &self,
        agent: &str,
        checkpoint: &str,
        result: &str,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), Problem> {
        let mut options = Options::new(options, &["disk", "console"])?;
        let which = which(agent, &mut options)?;
        name("checkpoint", checkpoint)?;
        let test = boot_test(result, options.text("console")?.unwrap_or_default())?;
        let call = Call { connection, header: &header };
        self.admit(&call, ACTION_CHECKPOINT, &about(&which, checkpoint, "")).await?;
        let checkpoint = checkpoint.to_owned();
        self.ask(move |control| control.record_boot(&which, &checkpoint, &test)).await
    }

    #[zbus(out_args("job", "shown"))]
    async fn mount(
        &self,
        agent: &str,
        checkpoint: &str,
        fuse: OwnedFd,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedObjectPath, Details), Problem> {
        let options = Options::new(options, &["disk", "target"])?;
        let by = (JobType::Mount, By::Mount(file(fuse)?));
        self.serve(&Call { connection, header: &header }, by, (agent, checkpoint), options).await
    }

    #[zbus(out_args("job", "shown"))]
    async fn export(
        &self,
        agent: &str,
        checkpoint: &str,
        listener: OwnedFd,
        options: RawOptions,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedObjectPath, Details), Problem> {
        let mut options = Options::new(options, &["disk", "target", "overlay"])?;
        let by = (JobType::Export, By::Export(file(listener)?, options.file("overlay")?));
        self.serve(&Call { connection, header: &header }, by, (agent, checkpoint), options).await
    }

    #[zbus(signal)]
    pub(super) async fn job_new(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: OwnedObjectPath,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: OwnedObjectPath,
        result: &str,
        details: Details,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn checkpoint_added(
        emitter: &SignalEmitter<'_>,
        agent: &str,
        disk: &str,
        id: &str,
    ) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn role(&self) -> &str {
        self.control.role().as_str()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn agents(&self) -> Vec<Details> {
        let agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        agents.iter().map(agent_details).collect()
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn scrub(&self) -> Details {
        let scrub = *self.scrub.lock().unwrap_or_else(PoisonError::into_inner);
        scrub.as_ref().map(scrub_details).unwrap_or_default()
    }
}

fn about(which: &Which, checkpoint: &str, target: &str) -> About {
    About {
        agent: which.agent.clone(),
        disk: which.disk.clone().unwrap_or_default(),
        checkpoint: checkpoint.to_owned(),
        target: target.to_owned(),
    }
}

fn no_path(error: zbus::Error) -> Problem {
    Problem::new(ProblemKind::Failed, format!("a disk has no path: {error}"))
}

/// Named values for a message.
pub(super) fn named<'a>(values: impl IntoIterator<Item = (&'a str, Variant<'static>)>) -> Details {
    // Only a file could fail to become owned, and there is none.
    let owned = |(name, value)| Some((str::to_owned(name), OwnedVariant::try_from(value).ok()?));
    values.into_iter().filter_map(owned).collect()
}

fn row_details(row: ShowRow) -> Details {
    named([
        ("checkpoint", row.checkpoint.into()),
        ("agent", row.agent.into()),
        ("disk", row.disk.into()),
        ("device", row.device.into()),
        ("time", row.time.into()),
        ("consistency", row.consistency.into()),
        ("size_bytes", row.size_bytes.into()),
        ("delta_bytes", row.delta_bytes.into()),
        ("stored_bytes", row.stored_bytes.into()),
        ("parent", row.parent.unwrap_or_default().into()),
        ("freeze_ms", row.freeze_ms.into()),
        ("unreadable_blocks", row.unreadable_blocks.into()),
        ("note", row.note.into()),
        ("boot", row.boot.unwrap_or_default().into()),
        ("boot_time", row.boot_time.unwrap_or_default().into()),
    ])
}

fn scrub_details(scrub: &ScrubStatus) -> Details {
    let ScrubStatus { every, course, last, damaged } = *scrub;
    let usec = |unix_ms: Option<u64>| unix_ms.unwrap_or(0).saturating_mul(1000);
    let every_usec = every.unwrap_or_default().as_micros();
    named([
        ("every_usec", u64::try_from(every_usec).unwrap_or(u64::MAX).into()),
        ("progress", course.map_or(0.0, |course| course.progress()).into()),
        ("began_usec", usec(course.map(|course| course.began_unix_ms)).into()),
        ("last_began_usec", usec(last.map(|last| last.began_unix_ms)).into()),
        ("last_ended_usec", usec(last.map(|last| last.ended_unix_ms)).into()),
        ("damaged", u32::try_from(damaged).unwrap_or(u32::MAX).into()),
    ])
}

fn agent_details(agent: &AgentStatus) -> Details {
    named([
        ("id", agent.id.to_string().into()),
        ("connected", agent.connected.into()),
        ("hostname", agent.hostname.clone().into()),
        ("version", agent.version.clone().into()),
        ("address", agent.address.clone().into()),
        ("last_seen_usec", agent.last_seen_unix_ms.saturating_mul(1000).into()),
        ("disks", agent.disks.into()),
        ("refused", agent.refused.clone().into()),
        ("unfinished", agent.unfinished.clone().into()),
    ])
}
