//! `org.blxrep.Job`: one job under way.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use blxrep_dbus::problem::Problem;
use blxrep_dbus::words::{JobState, JobType};
use blxrep_dbus::{ACTION_CHECKPOINT, ACTION_RESTORE};
use zbus::Connection;
use zbus::message::Header;

use super::access::Access;
use super::control::{About, Progress};
use super::rate::Rate;

/// A job, shared between its thread, its object and the publisher.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: u32,
    pub(super) kind: JobType,
    pub(super) about: About,
    pub(super) started_by_uid: u32,
    pub(super) progress: Progress,
    rate: Mutex<Rate>,
    rate_bytes: AtomicU64,
}

impl Job {
    /// A job that has not begun.
    pub(super) fn new(id: u32, kind: JobType, about: About, started_by_uid: u32) -> Self {
        let (rate, rate_bytes) = (Mutex::default(), AtomicU64::new(0));
        Self { id, kind, about, started_by_uid, progress: Progress::default(), rate, rate_bytes }
    }

    /// Measures how fast it is.
    pub(super) fn measure(&self, now: Instant) {
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        self.rate_bytes.store(rate.add(now, self.progress.bytes().0), Ordering::Relaxed);
    }

    /// The polkit action that lets people begin such jobs.
    fn action(&self) -> &'static str {
        match self.kind {
            JobType::Sync | JobType::Verify => ACTION_CHECKPOINT,
            JobType::Restore | JobType::Mount | JobType::Export => ACTION_RESTORE,
        }
    }
}

/// A text for a log line's field: `None` leaves the field out.
pub(super) fn known(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// Writes a job's log line, with the fields that are known.
macro_rules! log_job {
    ($level:ident, $job:expr, $($text:tt)+) => {{
        let job = $job;
        let about = &job.about;
        tracing::$level!(
            AGENT = $crate::bus::job::known(&about.agent),
            DISK = $crate::bus::job::known(&about.disk),
            CHECKPOINT = $crate::bus::job::known(&about.checkpoint),
            JOB = job.id,
            $($text)+
        )
    }};
}
pub(super) use log_job;

/// The object on the bus.
#[derive(Clone)]
pub(super) struct JobObject {
    pub(super) job: Arc<Job>,
    pub(super) access: Access,
}

// No method takes `&mut self`: one that waits for a person would keep everybody from reading the properties.
#[zbus::interface(name = "org.blxrep.Job", introspection_docs = false)]
impl JobObject {
    async fn cancel(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), Problem> {
        let job = &self.job;
        let uid = self.access.caller_uid(connection, &header).await?;
        if uid != job.started_by_uid {
            self.access.check(connection, &header, uid, job.action(), &job.about).await?;
        }
        job.progress.cancel();
        log_job!(info, job, "job {}: uid {uid} asked it to end", job.id);
        Ok(())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> u32 {
        self.job.id
    }

    #[zbus(property(emits_changed_signal = "const"), name = "Type")]
    fn job_type(&self) -> &str {
        self.job.kind.as_str()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn agent(&self) -> &str {
        &self.job.about.agent
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn disk(&self) -> &str {
        &self.job.about.disk
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn checkpoint(&self) -> &str {
        &self.job.about.checkpoint
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn target(&self) -> &str {
        &self.job.about.target
    }

    #[zbus(property(emits_changed_signal = "const"), name = "StartedByUID")]
    fn started_by_uid(&self) -> u32 {
        self.job.started_by_uid
    }

    #[zbus(property)]
    fn state(&self) -> &str {
        let state = if self.job.progress.is_canceled() { JobState::Canceling } else { JobState::Running };
        state.as_str()
    }

    #[zbus(property)]
    fn progress(&self) -> f64 {
        match self.job.progress.bytes() {
            (_, 0) => 0.0,
            (done, total) => (done as f64 / total as f64).min(1.0),
        }
    }

    #[zbus(property)]
    fn bytes_done(&self) -> u64 {
        self.job.progress.bytes().0
    }

    #[zbus(property)]
    fn bytes_total(&self) -> u64 {
        self.job.progress.bytes().1
    }

    #[zbus(property)]
    fn rate_bytes(&self) -> u64 {
        self.job.rate_bytes.load(Ordering::Relaxed)
    }
}
