//! Brings a checkpoint back: finds it, verifies all it rests on, writes it out and reads back what was written.
//!
//! Works on a data directory alone: no lock, no database, read-only, also while a dispatcher writes there. What must
//! never happen here: a byte reported good that was not checked, a file that looks like a whole image and is not,
//! an existing file overwritten.

pub mod verify;

pub(crate) use base_check::BaseCheck;
pub(crate) use chosen::Chosen;
pub use chosen::{Opened, open};
pub use occupied::check_empty;
pub use output::{RestoreOptions, RestoreReport, restore};
pub(crate) use part::Part;
pub use several::{DiskReport, DiskSummary, Verification, Verified, VerifyRequest, Wanted};
pub use show::{ShowRow, show};
pub use target::Output;
pub(crate) use target::Target;

mod base_check;
mod chosen;
#[cfg(test)]
pub(crate) mod damage_tests;
mod find;
#[cfg(test)]
mod job_tests;
mod occupied;
mod output;
mod part;
mod several;
#[cfg(test)]
pub(crate) mod several_tests;
mod show;
mod target;
#[cfg(test)]
pub(crate) mod tests;

use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use blxrep_dbus::problem::ProblemKind;

use crate::store::{Damage, StoreError};

/// What of an agent's is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Everything: nothing is stored of it.
    Agent,
    /// The disk.
    Disk,
    /// The checkpoint.
    Checkpoint,
}

/// Why nothing was shown or restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The request makes no sense.
    #[error("{0}")]
    Usage(String),
    /// There is no such agent, disk or checkpoint.
    #[error("{1}")]
    NotFound(Missing, String),
    /// The store is damaged; everything that was found.
    #[error("{}", DamageList(.0))]
    Damaged(Vec<Damage>),
    /// Reading the data directory failed.
    #[error("data directory: {0}")]
    Store(StoreError),
    /// Writing or reading back the output failed.
    #[error("{target}: cannot {what}: {source}{hint}")]
    Output {
        /// The output.
        target: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
        /// What to do, or what state the target is in.
        hint: &'static str,
    },
    /// What was written reads back as something else.
    #[error("{target}: block {block} reads back as something else than was written: the target is faulty")]
    ReadBack {
        /// The output.
        target: String,
        /// The first such block.
        block: u64,
    },
    /// It was told to end.
    #[error("canceled{hint}")]
    Canceled {
        /// What state the target is in, where that matters.
        hint: &'static str,
    },
}

/// Told the bytes done and the bytes in all, several times a second; answers whether to go on.
pub type Progress<'a> = &'a dyn Fn(u64, u64) -> ControlFlow<()>;

/// Counts what is done, for a [`Progress`].
pub(crate) struct Meter<'a> {
    progress: Progress<'a>,
    done: u64,
    total: u64,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(progress: Progress<'a>, total: u64) -> Self {
        Self { progress, done: 0, total }
    }

    /// What there is to do became known.
    pub(crate) fn expect(&mut self, total: u64) {
        self.total = total;
    }

    /// Bytes done, and bytes in all.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.done, self.total)
    }

    /// So much more is done; 0 only asks whether to go on.
    pub(crate) fn tick(&mut self, bytes: u64) -> Result<(), RestoreError> {
        self.done = self.done.saturating_add(bytes).min(self.total);
        match (self.progress)(self.done, self.total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(RestoreError::Canceled { hint: "" }),
        }
    }
}

struct DamageList<'a>(&'a [Damage]);

impl fmt::Display for DamageList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, damage) in self.0.iter().enumerate() {
            write!(f, "{}{damage}", if i == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl RestoreError {
    /// The damage that it tells of, also of a medium that does not give something back.
    ///
    /// # Errors
    /// Every other error.
    pub(crate) fn into_damage(self) -> Result<Vec<Damage>, Self> {
        match self {
            Self::Damaged(damage) => Ok(damage),
            Self::Store(error) => Ok(vec![error.into_damage()?]),
            other => Err(other),
        }
    }

    /// What kind of error it is.
    pub fn kind(&self) -> ProblemKind {
        match self {
            Self::Usage(_) => ProblemKind::InvalidArgument,
            Self::NotFound(Missing::Agent, _) => ProblemKind::NoSuchAgent,
            Self::NotFound(Missing::Disk, _) => ProblemKind::NoSuchDisk,
            Self::NotFound(Missing::Checkpoint, _) => ProblemKind::NoSuchCheckpoint,
            Self::Damaged(_) => ProblemKind::Damaged,
            Self::Canceled { .. } => ProblemKind::Canceled,
            Self::Store(_) | Self::Output { .. } | Self::ReadBack { .. } => ProblemKind::Failed,
        }
    }

    fn output(target: &Path, what: &'static str, source: io::Error) -> Self {
        let hint = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "; free some space or name another --output"
            }
            _ => "",
        };
        Self::Output { target: target.display().to_string(), what, source, hint }
    }
}

impl From<StoreError> for RestoreError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Damaged(damage) => Self::Damaged(vec![damage]),
            other => Self::Store(other),
        }
    }
}
