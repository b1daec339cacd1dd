//! The jobs: from the order to `JobRemoved`. They outlive a connection to the bus.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blxrep_dbus::problem::{Problem, ProblemKind};
use blxrep_dbus::words::{JobResult, JobType};
use blxrep_dbus::{JOBS_MAX, PATH_MANAGER, STARTED_BY_AGENT_UID, job_path};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tracing::{debug, warn};
use zbus::Connection;
use zbus::object_server::SignalEmitter;
use zbus::wire::{OwnedObjectPath, Variant};

use super::access::Access;
use super::control::{Details, Failure, Planned, Work};
use super::job::{Job, JobObject, log_job};
use super::manager::{Manager, named};
use super::publish::Published;

/// How long the daemon's end waits for jobs that were asked to end.
const STOP_MAX: Duration = Duration::from_secs(10);

/// All jobs of a daemon.
pub(super) struct Jobs {
    access: Access,
    slots: Arc<Semaphore>,
    /// Held while something is told, so that everybody hears of a job's begin, changes and end in this order.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    connection: Option<Connection>,
    stopping: bool,
    last_id: u32,
    running: BTreeMap<u32, Running>,
}

struct Running {
    job: Arc<Job>,
    /// The object, while there is a connection.
    published: Option<Published<JobObject>>,
}

/// The right to begin one job.
pub(super) type Slot = OwnedSemaphorePermit;

impl Jobs {
    /// No jobs yet.
    pub(super) fn new(access: Access) -> Self {
        Self { access, slots: Arc::new(Semaphore::new(JOBS_MAX)), state: Mutex::default() }
    }

    /// A place for one more job, taken before it is planned: planning costs as well.
    pub(super) fn slot(&self) -> Result<Slot, Problem> {
        self.slots.clone().try_acquire_owned().map_err(|_| {
            Problem::new(
                ProblemKind::Busy,
                format!("{JOBS_MAX} jobs run, or the daemon stops: try again when one has ended"),
            )
        })
    }

    /// Begins a job: its object and `JobNew` are there when this returns.
    pub(super) async fn begin(
        self: &Arc<Self>,
        slot: Slot,
        kind: JobType,
        uid: u32,
        planned: Planned,
    ) -> Result<OwnedObjectPath, Problem> {
        let mut state = self.state.lock().await;
        let failed = |why: &str| Problem::new(ProblemKind::Failed, format!("the job did not begin: {why}"));
        if state.stopping {
            return Err(failed("the daemon stops"));
        }
        let connection = state.connection.clone().ok_or_else(|| failed("the bus went away"))?;
        state.last_id = state.last_id.wrapping_add(1);
        let id = state.last_id;
        let job = Arc::new(Job::new(id, kind, planned.about, uid));
        let path = job_path(id);
        let begun = async {
            let published = self.publish(&connection, &job).await?;
            let path = OwnedObjectPath::try_from(path)?;
            Manager::job_new(&manager_emitter(&connection)?, id, path.clone()).await?;
            Ok::<_, zbus::Error>((published, path))
        };
        let (published, path) = begun.await.map_err(|error| failed(&error.to_string()))?;
        state.running.insert(id, Running { job: job.clone(), published: Some(published) });
        log_job!(info, &job, "job {id} begins: {kind} for uid {uid}");
        tokio::spawn(self.clone().carry_out(job, planned.work, slot));
        Ok(path)
    }

    async fn carry_out(self: Arc<Self>, job: Arc<Job>, work: Work, slot: Slot) {
        let worker = job.clone();
        let outcome = spawn_blocking(move || work(&worker.progress)).await;
        let outcome = outcome.unwrap_or_else(|_| {
            let message = "the job broke off by a fault of the program: the journal says where".to_owned();
            Err(Problem::new(ProblemKind::Failed, message).into())
        });
        let (result, details) = ended(&job, outcome);
        let mut state = self.state.lock().await;
        let published = state.running.remove(&job.id).and_then(|running| running.published);
        if let Some((connection, published)) = state.connection.clone().zip(published) {
            let told = async {
                published.remove().await?;
                // Who hears of the end may begin the next one.
                drop(slot);
                let path = OwnedObjectPath::try_from(job_path(job.id))?;
                let emitter = manager_emitter(&connection)?;
                Manager::job_removed(&emitter, job.id, path, result.as_str(), details).await
            };
            if let Err(error) = told.await {
                debug!("the end of job {} was not told: {error}", job.id);
            }
        }
    }

    /// Serves the jobs on a connection from now on.
    pub(super) async fn attach(&self, connection: &Connection) -> zbus::Result<()> {
        let mut state = self.state.lock().await;
        for running in state.running.values_mut() {
            running.published = Some(self.publish(connection, &running.job).await?);
        }
        state.connection = Some(connection.clone());
        Ok(())
    }

    /// Lets go of the connection.
    pub(super) async fn detach(&self) {
        let mut state = self.state.lock().await;
        state.connection = None;
        state.running.values_mut().for_each(|running| running.published = None);
    }

    /// Tells how far the jobs are.
    pub(super) async fn signal_changes(&self) -> zbus::Result<()> {
        let mut state = self.state.lock().await;
        for running in state.running.values_mut() {
            running.job.measure(Instant::now());
            if let Some(published) = &mut running.published {
                published.signal_changes().await?;
            }
        }
        Ok(())
    }

    /// Asks the jobs to end, lets none begin, and waits for them, but not for ever. What an agent began is not canceled: that
    /// would be the end of it there. The role cuts its connection, and the agent goes on when the daemon is back.
    pub(super) async fn stop(&self) {
        let all_ended = async {
            let mut state = self.state.lock().await;
            state.stopping = true;
            let all = state.running.values().map(|running| &running.job);
            all.filter(|job| job.started_by_uid != STARTED_BY_AGENT_UID)
                .for_each(|job| job.progress.cancel());
            drop(state);
            let _all = self.slots.acquire_many(u32::try_from(JOBS_MAX).unwrap_or(u32::MAX)).await;
            // A slot is given back just before the end is told.
            drop(self.state.lock().await);
        };
        if timeout(STOP_MAX, all_ended).await.is_err() {
            warn!("jobs did not end within {} s of being asked to: they are abandoned", STOP_MAX.as_secs());
        }
    }

    async fn publish(&self, connection: &Connection, job: &Arc<Job>) -> zbus::Result<Published<JobObject>> {
        let object = JobObject { job: job.clone(), access: self.access.clone() };
        Published::add(connection, &job_path(job.id), object).await
    }
}

fn manager_emitter(connection: &Connection) -> zbus::Result<SignalEmitter<'static>> {
    SignalEmitter::new(connection, PATH_MANAGER)
}

/// How a job ended, as it is told; logs it too.
fn ended(job: &Job, outcome: Result<Details, Failure>) -> (JobResult, Details) {
    match outcome {
        Ok(details) => {
            log_job!(info, job, "job {} is done", job.id);
            (JobResult::Done, details)
        }
        Err(failure) if failure.problem.kind == ProblemKind::Canceled => {
            log_job!(info, job, "job {} was canceled", job.id);
            (JobResult::Canceled, Details::new())
        }
        Err(failure) => {
            log_job!(warn, job, "job {} failed: {}", job.id, failure.problem);
            (JobResult::Failed, failure_details(failure))
        }
    }
}

fn failure_details(failure: Failure) -> Details {
    let mut values = vec![
        ("error", Variant::from(failure.problem.kind.name())),
        ("message", failure.problem.message.into()),
    ];
    if !failure.damage.is_empty() {
        values.push(("damage", failure.damage.into()));
    }
    named(values)
}
