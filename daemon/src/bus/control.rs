//! What a role does for the bus. Every method may block; none is called on an async thread.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blxrep_dbus::problem::Problem;
use blxrep_dbus::words::Role;
use zbus::wire::OwnedVariant;

use crate::boot_test::BootTest;
use crate::dispatcher::scrub::ScrubStatus;
use crate::ids::{AgentId, DiskId};
use crate::restore::{ShowRow, VerifyRequest};
use crate::status::{AgentStatus, DiskStatus};

/// Whose disk is meant, as a person names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Which {
    /// The agent's id; on an agent it may be empty.
    pub agent: String,
    /// The disk's id or its device's name; all of the agent's disks, or its only one, without it.
    pub disk: Option<String>,
}

/// What to restore, and where to.
#[derive(Debug)]
pub struct RestoreRequest {
    /// Whose disk.
    pub which: Which,
    /// An id, `YYYYMMDDHHMM` or `latest`.
    pub checkpoint: String,
    /// A new file or a block device; only its name if there is an `output`.
    pub target: PathBuf,
    /// What the caller opened for it: an empty file or a block device.
    pub output: Option<File>,
    /// Only this partition, by its number.
    pub partition: Option<u32>,
    /// The target once more, if what a device holds is to be overwritten.
    pub overwrite: Option<PathBuf>,
}

/// Which checkpoint to show, and by what.
#[derive(Debug)]
pub struct ServeRequest {
    /// Whose disk.
    pub which: Which,
    /// An id, `YYYYMMDDHHMM` or `latest`.
    pub checkpoint: String,
    /// Where the caller shows it, for people to read.
    pub target: String,
    /// What the caller opened for it.
    pub by: By,
}

/// What a checkpoint is shown by.
#[derive(Debug)]
pub enum By {
    /// `/dev/fuse`, mounted.
    Mount(OwnedFd),
    /// A listening socket; and, if clients may write, an empty file for that.
    Export(OwnedFd, Option<File>),
}

/// What a job is about, as it is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct About {
    /// Whose disk.
    pub agent: String,
    /// Which; empty for several.
    pub disk: String,
    /// Which checkpoint, as far as it is known.
    pub checkpoint: String,
    /// Where a restore writes to, or where a checkpoint is shown.
    pub target: String,
}

/// Named values of a job's result, as `JobRemoved` carries them.
pub type Details = HashMap<String, OwnedVariant>;

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What happened.
    pub problem: Problem,
    /// All damage that was found, one line each.
    pub damage: Vec<String>,
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self { problem, damage: Vec::new() }
    }
}

/// How far a job is, and whether it is to end. Shared between the thread that works and the bus.
#[derive(Debug, Default)]
pub struct Progress {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    canceled: AtomicBool,
}

impl Progress {
    /// Tells how far it is.
    pub fn report(&self, done_bytes: u64, total_bytes: u64) {
        self.done_bytes.store(done_bytes, Ordering::Relaxed);
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    /// Bytes done, and bytes in all (0 while not known).
    pub fn bytes(&self) -> (u64, u64) {
        (self.done_bytes.load(Ordering::Relaxed), self.total_bytes.load(Ordering::Relaxed))
    }

    /// Asks the job to end.
    pub fn cancel(&self) {
        self.canceled.store(true, Ordering::Relaxed);
    }

    /// Whether the job is to end.
    pub fn is_canceled(&self) -> bool {
        self.canceled.load(Ordering::Relaxed)
    }
}

/// The work of a job. It looks at [`Progress::is_canceled`] several times a second.
pub type Work = Box<dyn FnOnce(&Progress) -> Result<Details, Failure> + Send>;

/// A job whose arguments were found to be good.
pub struct Planned {
    /// What it is about.
    pub about: About,
    /// What it will do.
    pub work: Work,
}

/// A role.
pub trait Control: Send + Sync + 'static {
    /// Which.
    fn role(&self) -> Role;

    /// The agents that are known. Cheap: asked twice a second.
    fn agents(&self) -> Vec<AgentStatus>;

    /// The disks that are known. Cheap: asked twice a second.
    fn disks(&self) -> Vec<DiskStatus>;

    /// How the check of everything stored is doing; `None` on an agent. Cheap: asked twice a second.
    fn scrub(&self) -> Option<ScrubStatus>;

    /// The checkpoints of an agent, from minute `start` to minute `end` (`YYYYMMDDHHMM` as a number).
    ///
    /// # Errors
    /// NoSuchAgent, NoSuchDisk, InvalidArgument, NotConnected, Refused, Damaged, Failed.
    fn show(&self, which: &Which, start: Option<u64>, end: Option<u64>) -> Result<Vec<ShowRow>, Problem>;

    /// Pauses or resumes on this side, durably. Gives the disks that this changed.
    ///
    /// # Errors
    /// NoSuchAgent, NoSuchDisk, InvalidArgument, Failed.
    fn set_paused(&self, which: &Which, paused: bool) -> Result<Vec<(AgentId, DiskId)>, Problem>;

    /// Plans a checkpoint now, or after a compare of the whole disk.
    ///
    /// # Errors
    /// NoSuchAgent, NoSuchDisk, InvalidArgument, NotConnected, Paused, Busy.
    fn sync(&self, which: &Which, compare: bool) -> Result<Planned, Problem>;

    /// Accepts the machine that was refused last under an agent's name or, where a disk is named, that it shrank or was
    /// replaced; durably.
    ///
    /// # Errors
    /// NoSuchAgent, NoSuchDisk, InvalidArgument, WrongRole, Failed.
    fn accept(&self, which: &Which) -> Result<(), Problem>;

    /// Plans a restore.
    ///
    /// # Errors
    /// NoSuchAgent, NoSuchDisk, NoSuchCheckpoint, InvalidArgument, NotConnected, Refused, Damaged, Failed.
    fn restore(&self, request: RestoreRequest) -> Result<Planned, Problem>;

    /// Plans a verify.
    ///
    /// # Errors
    /// NoSuchAgent, NoSuchDisk, NoSuchCheckpoint, InvalidArgument, WrongRole, Failed.
    fn verify(&self, request: VerifyRequest) -> Result<Planned, Problem>;

    /// Opens a checkpoint and plans to show it until that is canceled or unmounted. Gives also what is shown.
    ///
    /// # Errors
    /// NoSuchAgent, NoSuchDisk, NoSuchCheckpoint, InvalidArgument, WrongRole, Damaged, Failed.
    fn serve(&self, request: ServeRequest) -> Result<(Planned, Details), Problem>;

    /// Keeps what came of starting a checkpoint in a virtual machine.
    ///
    /// # Errors
    /// NoSuchAgent, NoSuchDisk, NoSuchCheckpoint, InvalidArgument, WrongRole, Failed.
    fn record_boot(&self, which: &Which, checkpoint: &str, test: &BootTest) -> Result<(), Problem>;
}
