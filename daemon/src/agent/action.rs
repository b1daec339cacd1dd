//! What passes between a disk's session and its driver.

use crate::bitmap::{BlockSet, Extent};
use crate::freeze::final_pass::Outcome;
use crate::hash::{BlockHash, GroupDigest};
use crate::ids::CheckpointId;
use crate::run::Run;
use crate::tracker::Claim;
use crate::wire::Endpoint;
use crate::wire::frame::Area;
use crate::wire::message::{DiskDown, DiskUp};

/// Why blocks are read, and so what becomes of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// A group the dispatcher does not have: send all of it.
    Base,
    /// A group the dispatcher has: only its digest is wanted.
    Digest,
    /// A group that differs: send the blocks whose hash is not this.
    Differing(Vec<BlockHash>),
    /// Changed blocks: send them.
    Changed,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum Action {
    /// Send a message.
    Send(Endpoint, DiskUp),
    /// Send a run.
    SendData {
        /// On which connection.
        endpoint: Endpoint,
        /// Where it belongs.
        area: Area,
        /// Its number.
        seq: u64,
        /// The blocks.
        run: Run,
    },
    /// Drain the tracker; give [`Input::Drained`].
    Drain(DrainFor),
    /// Load the tracker's pending set; give [`Input::Pending`].
    LoadPending,
    /// Ask the tracker for new doubts; give [`Input::Doubts`].
    CheckClaim,
    /// Write dirty pages of the disk's file systems back.
    SyncFileSystems,
    /// Read; give [`Input::Read`].
    Read(Extent, Purpose),
    /// Find out where these blocks are, which cannot be read, and tell people; give [`Input::Located`]. None: all can be
    /// read again.
    Locate(BlockSet),
    /// Freeze, drain, read the rest, thaw; give [`Input::FinalPass`].
    FinalPass {
        /// What is known to be changed and not sent.
        to_send: BlockSet,
        /// The newest checkpoint.
        last: Option<CheckpointId>,
    },
    /// The dispatcher has committed: tell the tracker.
    CommitTracker {
        /// Which checkpoint.
        id: CheckpointId,
        /// What stays pending.
        keep: BlockSet,
        /// How many gaps had been raised when the compare that it follows began; `None` if it follows none.
        healed: Option<u64>,
    },
    /// Close both connections and attach again.
    DropLink {
        /// Why.
        reason: String,
    },
    /// The dispatcher refuses this disk until a person has acted: close both connections and do not attach again soon.
    Stop {
        /// Why.
        reason: String,
    },
}

/// What a drain is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrainFor {
    /// The beginning of a compare, which covers whatever changed before.
    Scan,
    /// Reporting what changed.
    Report,
    /// The next round of a sync.
    Round,
    /// The end of a sync without a freeze.
    Seal,
}

/// What a read gave.
#[derive(Debug)]
pub enum ReadResult {
    /// The blocks to send.
    Runs(Vec<Run>),
    /// The digest that was asked for.
    Digest(GroupDigest),
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Both connections are up; the claim was made just now.
    LinkUp(Claim, u64),
    /// A connection is gone.
    LinkDown,
    /// A message of the dispatcher.
    Message(Endpoint, DiskDown),
    /// The dispatcher orders a checkpoint.
    SyncOrdered,
    /// The disk is paused, or is not any more.
    Paused(bool),
    /// About a second has passed.
    Tick,
    /// The result of [`Action::Drain`], and the time.
    Drained {
        /// What for.
        drain: DrainFor,
        /// The drained blocks.
        blocks: BlockSet,
        /// Milliseconds since 1970.
        time_unix_ms: u64,
    },
    /// The result of [`Action::LoadPending`].
    Pending(BlockSet),
    /// The result of [`Action::CheckClaim`]: how many gaps were raised so far.
    Doubts(u64),
    /// The result of [`Action::Read`].
    Read {
        /// What was read.
        extent: Extent,
        /// What for.
        purpose: Purpose,
        /// What came of it.
        result: Result<ReadResult, String>,
    },
    /// The result of [`Action::Locate`]: the blocks, and what is to be said of them.
    Located(BlockSet, String),
    /// The result of [`Action::FinalPass`], and how many gaps were raised until then.
    FinalPass(Result<Outcome, String>, u64),
}
