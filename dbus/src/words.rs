//! The words that travel as strings on the bus: states, results and the like.

use std::fmt;
use std::str::FromStr;

/// Makes an enum of words, with both directions.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$word_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$word_doc])* $variant,)+
        }

        impl $name {
            /// Every word.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The word on the bus.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;
            fn from_str(text: &str) -> Result<Self, UnknownWord> {
                Self::ALL.iter().copied().find(|word| word.as_str() == text).ok_or(UnknownWord)
            }
        }
    };
}

/// A word of a newer version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownWord;

words! {
    /// The two daemons.
    Role {
        /// Tracks this host's disks and sends what changes.
        Agent = "agent",
        /// Receives and keeps.
        Dispatcher = "dispatcher",
    }
}

words! {
    /// What a disk is doing (`org.blxrep.Disk.State`).
    DiskState {
        /// Agent and dispatcher are not connected.
        Detached = "detached",
        /// It is paused: changes are tracked, nothing is sent.
        Paused = "paused",
        /// The full copy is under way.
        Copying = "copying",
        /// The whole disk is compared after a gap.
        Comparing = "comparing",
        /// A checkpoint is being taken.
        Syncing = "syncing",
        /// Nothing is under way; changes are watched.
        Idle = "idle",
        /// It is not replicated any more until a person has acted; `LastError` says why.
        Failed = "failed",
    }
}

words! {
    /// What came of starting a checkpoint in a virtual machine.
    BootResult {
        /// What was waited for came.
        Passed = "passed",
        /// It did not.
        Failed = "failed",
    }
}

words! {
    /// What a job does (`org.blxrep.Job.Type`).
    JobType {
        /// A checkpoint is taken.
        Sync = "sync",
        /// A checkpoint is brought back.
        Restore = "restore",
        /// A checkpoint is read and checked.
        Verify = "verify",
        /// A checkpoint is shown as files.
        Mount = "mount",
        /// A checkpoint is shown as a network block device.
        Export = "export",
    }
}

words! {
    /// How a job stands (`org.blxrep.Job.State`).
    JobState {
        /// It works.
        Running = "running",
        /// It was asked to end and cleans up.
        Canceling = "canceling",
    }
}

words! {
    /// How a job ended (third argument of `JobRemoved`).
    JobResult {
        /// It did all it was asked for.
        Done = "done",
        /// It was canceled; nothing half-done is left, except on a device that was being written.
        Canceled = "canceled",
        /// It failed; the details `error` (an error name) and `message` say why.
        Failed = "failed",
    }
}
