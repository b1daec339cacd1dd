//! What the dispatcher keeps: base images, deltas and journals of changed sectors, described byte by byte in
//! `docs/FORMAT.md`.
//!
//! [`disk_store`] is the writer of one disk. The files are the truth: each says whose it is, on what it builds and
//! carries checksums over every byte. [`catalogue`] is a convenience that can be thrown away.
//!
//! What must never happen here: a checkpoint that is visible but not whole, an acknowledged byte that a power cut
//! takes back, damage that is taken for data.

pub mod bak;
pub mod block_map;
pub mod catalogue;
mod codec;
mod commit;
mod copy;
pub mod cst;
pub mod disk_store;
pub mod files;
mod fold;
pub mod handle;
pub mod layers;
pub mod layout;
mod recent;
mod recover;
pub mod sum;
pub mod view;
pub mod watched_files;

#[cfg(test)]
mod catalogue_tests;
#[cfg(test)]
pub(crate) mod life_tests;
#[cfg(test)]
mod refusal_tests;
#[cfg(any(test, fuzzing))]
#[cfg_attr(not(test), allow(dead_code, reason = "fuzz targets need only a part of it"))]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends so")]
pub(crate) mod simfiles;
#[cfg(test)]
pub(crate) mod unreadable_tests;
#[cfg(test)]
mod view_tests;

use std::fmt;
use std::io;

use crate::bitmap::Extent;
use crate::run::RunError;

/// How many ranges of blocks are named before the rest is only counted.
const RANGES_SHOWN: usize = 48;

/// One place where the store is not what it says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file, relative to the data directory.
    pub file: String,
    /// What is wrong with it.
    pub what: String,
    /// The blocks of the disk that are affected; empty where that cannot be told or all are.
    pub blocks: Vec<Extent>,
}

impl Damage {
    /// Damage of a file as a whole.
    pub fn new(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self { file: file.into(), what: what.into(), blocks: Vec::new() }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is damaged: {}", self.file, self.what)?;
        for (i, extent) in self.blocks.iter().take(RANGES_SHOWN).enumerate() {
            let lead = if i == 0 { "; blocks " } else { ", " };
            match extent.count {
                1 => write!(f, "{lead}{}", extent.first)?,
                _ => write!(f, "{lead}{}-{}", extent.first, extent.end().saturating_sub(1))?,
            }
        }
        match self.blocks.len().saturating_sub(RANGES_SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more ranges"),
        }
    }
}

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system is full, or a quota is.
    #[error("{file}: no space left; free some in the data directory, nothing that was acknowledged is lost")]
    NoSpace {
        /// The file that could not grow, relative to the data directory.
        file: String,
    },
    /// The file system failed.
    #[error("{file}: cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file or directory, relative to the data directory.
        file: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is not what it says it is.
    #[error("{0}")]
    Damaged(Damage),
    /// The request does not fit the state of the disk; nothing was changed.
    #[error("refused: {0}")]
    Refused(String),
    /// The data that came is not what its hashes say; nothing was stored.
    #[error("data was refused: {0}")]
    Run(#[from] RunError),
    /// An earlier error left it open what is on disk.
    #[error("an earlier error of the file system left the disk's files in doubt: open the store again")]
    Poisoned,
}

impl StoreError {
    /// Damage of a file as a whole.
    pub fn damaged(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Damaged(Damage::new(file, what))
    }

    /// Damage, or what the medium does not give back: that is as good as damaged, and no reason not to look at the rest.
    ///
    /// # Errors
    /// Every other error.
    pub fn into_damage(self) -> Result<Damage, Self> {
        const MEDIUM: [i32; 4] = [libc::EIO, libc::ENODATA, libc::EUCLEAN, libc::EBADMSG];
        match self {
            Self::Damaged(damage) => Ok(damage),
            Self::Io { what, file, source }
                if source.raw_os_error().is_some_and(|errno| MEDIUM.contains(&errno)) =>
            {
                Ok(Damage::new(file, format!("the file system cannot {what} it: {source}")))
            }
            other => Err(other),
        }
    }

    /// Whether the state on disk is in doubt after this error of something that writes.
    pub fn poisons(&self) -> bool {
        !matches!(self, Self::Refused(_) | Self::Run(_))
    }
}
