//! Brings a checkpoint back from the dispatcher, over `/ws/restore`.
//!
//! One blocking thread writes and reads the target; a task moves frames from the socket into a bounded queue before it. Only
//! what the target does not hold already is sent. A connection that breaks is made anew, and the fetch goes on where it was.
//! The dispatcher is believed nothing: blocks must have their hashes and come in order, groups must have their digests, and
//! what was written is read back. What must never happen here: success reported before that, a part left that looks like a
//! whole image.

mod line;
mod plan;
#[cfg(test)]
mod tests;
mod transfer;

use std::time::Duration;

use blxrep_dbus::problem::ProblemKind;
use tokio::runtime::Handle;
use tracing::warn;

use self::line::{Line, wait};
pub use self::transfer::BeforeWriting;
use self::transfer::Transfer;
use super::link::{Backoff, Dial};
use crate::checkpoint::Checkpoint;
use crate::geometry::Geometry;
use crate::ids::{AgentId, CheckpointId};
use crate::restore::{Meter, Output, Progress, RestoreError, RestoreReport, Target};
use crate::unreadable::{RANGES_MAX, sectors};
use crate::wire::frame::{FrameError, decode_message};
use crate::wire::message::{DAMAGE_MAX_LINES, Fetch, NAME_MAX_BYTES, RestoreDown, clean_text};
use crate::wire::socket::ConnectError;

/// For how long nothing may come of a fetch before it is given up, unless a caller has other ideas.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// What to fetch, and where to.
#[derive(Debug)]
pub struct FetchRequest {
    /// Whose disk; the own one without it.
    pub agent: Option<AgentId>,
    /// A disk stored under this agent's id: its id or device name; not needed where there is one.
    pub disk: Option<String>,
    /// An id, `YYYYMMDDHHMM` or `latest`.
    pub checkpoint: String,
    /// Only this partition, by its number.
    pub partition: Option<u32>,
    /// Where to.
    pub output: Output,
    /// For how long a connection that broke is tried again while nothing comes of it.
    pub patience: Duration,
}

/// Why nothing was fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The dispatcher cannot be reached or lets nobody in.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The dispatcher does not send it.
    #[error("{reason}{hint}")]
    Refused {
        /// Why, for programs.
        kind: ProblemKind,
        /// Why.
        reason: String,
        /// The damage that it found, one line each.
        damage: Vec<String>,
        /// What state the target is in, where that matters.
        hint: &'static str,
    },
    /// The connection ended too early.
    #[error("the connection ended before everything was sent: {reason}{hint}")]
    Cut {
        /// How.
        reason: String,
        /// What state the target is in, where that matters.
        hint: &'static str,
    },
    /// Something came that must not.
    #[error("{reason}{hint}")]
    Broken {
        /// What happened.
        reason: String,
        /// What state the target is in, where that matters.
        hint: &'static str,
    },
    /// The request, or the target; or it was canceled.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

impl FetchError {
    fn broken(reason: impl Into<String>) -> Self {
        Self::Broken { reason: reason.into(), hint: "" }
    }

    /// What kind of error it is, where that is known.
    pub fn kind(&self) -> Option<ProblemKind> {
        match self {
            Self::Refused { kind, .. } => Some(*kind),
            // It has too many connections, or one that ended is still held for alive.
            Self::Connect(ConnectError::Refused { status: 503, .. }) => Some(ProblemKind::Busy),
            Self::Connect(ConnectError::Refused { .. } | ConnectError::Fingerprint { .. }) => {
                Some(ProblemKind::AccessDenied)
            }
            Self::Restore(error) => Some(error.kind()),
            Self::Connect(_) | Self::Cut { .. } | Self::Broken { .. } => None,
        }
    }

    /// Whether it may be over when it is tried again.
    fn may_pass(&self) -> bool {
        match self {
            Self::Cut { .. } => true,
            Self::Connect(ConnectError::Refused { status, .. }) => *status >= 500,
            Self::Connect(ConnectError::Fingerprint { .. }) => false,
            Self::Connect(_) => true,
            // The connection before may still be held for alive.
            Self::Refused { kind, .. } => *kind == ProblemKind::Busy,
            Self::Broken { .. } | Self::Restore(_) => false,
        }
    }

    /// Adds what it leaves behind.
    fn explain(self, target: &Target) -> Self {
        let hint = target.hint();
        match self {
            Self::Refused { kind, reason, damage, .. } => Self::Refused { kind, reason, damage, hint },
            Self::Cut { reason, .. } => Self::Cut { reason, hint },
            Self::Broken { reason, .. } => Self::Broken { reason, hint },
            Self::Restore(error) => Self::Restore(target.explain(error)),
            Self::Connect(error) => Self::Connect(error),
        }
    }
}

impl From<FrameError> for FetchError {
    fn from(error: FrameError) -> Self {
        Self::broken(format!("the dispatcher sent what it must not: {error}"))
    }
}

/// What a dispatcher has begun to send.
#[derive(Debug)]
struct Begun {
    checkpoint: Checkpoint,
    part: Geometry,
    verify_bytes: u64,
}

/// Fetches a checkpoint and gives it to its output when every byte was read back right. Blocks: for a thread that is not
/// one of `runtime`'s own. `progress` is told of the dispatcher's verifying, of writing and of reading back together;
/// `before_writing` is called once, before the first byte of a device is changed.
///
/// # Errors
/// See [`FetchError`]; then no file is left behind.
pub fn fetch(
    dial: &Dial,
    request: FetchRequest,
    runtime: &Handle,
    progress: Progress<'_>,
    before_writing: BeforeWriting<'_>,
) -> Result<RestoreReport, FetchError> {
    let FetchRequest { agent, disk, checkpoint, partition, output, patience } = request;
    if checkpoint.len() > NAME_MAX_BYTES || disk.as_ref().is_some_and(|disk| disk.len() > NAME_MAX_BYTES) {
        return Err(RestoreError::Usage("this names no disk or no checkpoint".to_owned()).into());
    }
    let agent = agent.unwrap_or_else(|| dial.key.agent.clone());
    let mut wanted = Fetch { agent, disk, checkpoint, partition, resumes: false };
    let mut meter = Meter::new(progress, 0);
    let mut backoff = Backoff::default();
    let (mut line, begun) = begin(dial, &wanted, runtime, &mut meter)?;
    let Begun { mut checkpoint, part, verify_bytes } = begun;
    // From here on nothing newer is meant.
    wanted.disk = Some(checkpoint.disk.to_string());
    wanted.checkpoint = checkpoint.id.to_string();
    let mut target = output.open(part.size_bytes())?;
    meter.expect(verify_bytes.saturating_add(2 * part.size_bytes()));
    let mut transfer =
        Transfer::new(&checkpoint, part, verify_bytes, &mut target, &mut meter, before_writing);
    let done = loop {
        match transfer.receive(&mut line) {
            Ok(()) => break transfer.read_back(&mut line),
            Err(cut) if cut.may_pass() && transfer.progressed().elapsed() < patience => {
                warn!("a fetch was interrupted and goes on: {cut}");
                wanted.resumes = transfer.is_verified();
                match reconnect(dial, &wanted, runtime, &mut transfer, patience, &mut backoff) {
                    Ok(again) => line = again,
                    Err(error) => break Err(error),
                }
            }
            Err(error) => break Err(error),
        }
    };
    let (unreadable, written_bytes) = done.map_err(|error| error.explain(&target))?;
    let output = target.finish()?;
    line.finish();
    checkpoint.unreadable_blocks = u32::try_from(unreadable.len()).unwrap_or(u32::MAX);
    checkpoint.geometry = part;
    let unreadable_sectors = sectors(&unreadable, part, RANGES_MAX);
    Ok(RestoreReport { checkpoint, output, unreadable_sectors, written_bytes })
}

/// Connects, and hears what will come.
fn begin(
    dial: &Dial,
    wanted: &Fetch,
    runtime: &Handle,
    meter: &mut Meter<'_>,
) -> Result<(Line, Begun), FetchError> {
    let mut line = Line::open(dial, wanted, runtime, meter)?;
    let mut begun = match decode_message(&line.frame(meter)?)? {
        RestoreDown::Begin { checkpoint, part, verify_bytes } => Begun { checkpoint, part, verify_bytes },
        other => return Err(unexpected(other)),
    };
    let Begun { checkpoint, part, .. } = &mut begun;
    if checkpoint.agent != wanted.agent {
        return Err(FetchError::broken("the dispatcher sent a checkpoint of another agent"));
    }
    if wanted.checkpoint.parse::<CheckpointId>().is_ok_and(|id| id != checkpoint.id) {
        return Err(FetchError::broken("the dispatcher sent another checkpoint than was asked for"));
    }
    let (part, whole) = (*part, checkpoint.geometry);
    let is_part = part.block_shift() == whole.block_shift() && part.size_bytes() <= whole.size_bytes();
    if if wanted.partition.is_some() { !is_part } else { part != whole } {
        return Err(FetchError::broken("the dispatcher sent another part of the disk than was asked for"));
    }
    checkpoint.note = clean_text(std::mem::take(&mut checkpoint.note));
    checkpoint.device = clean_text(std::mem::take(&mut checkpoint.device));
    Ok((line, begun))
}

/// Connects again, until it works or nothing has come of it for too long.
fn reconnect(
    dial: &Dial,
    wanted: &Fetch,
    runtime: &Handle,
    transfer: &mut Transfer<'_, '_>,
    patience: Duration,
    backoff: &mut Backoff,
) -> Result<Line, FetchError> {
    loop {
        wait(runtime, transfer.meter(), backoff.wait())?;
        backoff.begin();
        match begin(dial, wanted, runtime, transfer.meter()) {
            Ok((line, begun)) if transfer.is_of(&begun.checkpoint, begun.part) => return Ok(line),
            Ok(_) => return Err(FetchError::broken("the dispatcher goes on with another checkpoint")),
            Err(error) if error.may_pass() && transfer.progressed().elapsed() < patience => {}
            Err(error) => return Err(error),
        }
    }
}

/// A message that is not due: a refusal, or an error of the dispatcher.
fn unexpected(message: RestoreDown) -> FetchError {
    let what = match message {
        RestoreDown::Refused { kind, reason, mut damage } => {
            damage.truncate(DAMAGE_MAX_LINES);
            let damage = damage.into_iter().map(clean_text).collect();
            return FetchError::Refused { kind, reason: clean_text(reason), damage, hint: "" };
        }
        RestoreDown::Begin { .. } => "began twice",
        RestoreDown::Verifying { .. } | RestoreDown::Verified { .. } => "verifies out of turn",
        RestoreDown::Digests { .. } => "sent digests out of turn",
        RestoreDown::Sent { .. } => "sent the end of a group out of turn",
    };
    FetchError::broken(format!("the dispatcher {what}"))
}
