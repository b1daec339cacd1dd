//! Brings a checkpoint back from the dispatcher, over `/ws/restore`.
//!
//! One blocking thread writes and reads the target; a task moves frames from the socket into a bounded queue before it.
//! The dispatcher is believed nothing: blocks must have their hashes and come whole and in order, and what was written
//! is read back. What must never happen here: success reported before that, a part left that looks like a whole image.

#[cfg(test)]
mod tests;

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use blxrep_dbus::problem::ProblemKind;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::link::Dial;
use crate::bitmap::BlockSet;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, GroupDigest, group_digest, insert_unreadable};
use crate::ids::CheckpointId;
use crate::restore::{Meter, Output, Progress, RestoreError, RestoreReport, Target};
use crate::run::Run;
use crate::unreadable::{RANGES_MAX, sectors};
use crate::wire::frame::{Area, Frame, FrameError, decode, decode_message, encode_message};
use crate::wire::key::hex;
use crate::wire::message::{DAMAGE_MAX_LINES, NAME_MAX_BYTES, RestoreDown, RestoreUp, clean_text};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, PumpEnd, pump};
use crate::wire::socket::ConnectError;
use crate::wire::{Endpoint, header};

/// How often a wait for the network looks whether it is to end.
const POLL: Duration = Duration::from_millis(200);

/// What to fetch, and where to.
#[derive(Debug)]
pub struct FetchRequest {
    /// A disk stored under this agent's id: its id or device name; not needed where there is one.
    pub disk: Option<String>,
    /// An id, `YYYYMMDDHHMM` or `latest`.
    pub checkpoint: String,
    /// Where to.
    pub output: Output,
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
    /// The connection ended too early, or something came over it that must not.
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

    /// Adds what it leaves behind.
    fn explain(self, target: &Target) -> Self {
        let hint = target.hint();
        match self {
            Self::Refused { kind, reason, damage, .. } => Self::Refused { kind, reason, damage, hint },
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

/// Fetches a checkpoint and gives it to its output when every byte was read back right. Blocks: for a thread that is not
/// one of `runtime`'s own. `progress` is told of the dispatcher's verifying, of writing and of reading back together.
///
/// # Errors
/// See [`FetchError`]; then no file is left behind.
pub fn fetch(
    dial: &Dial,
    session: [u8; 16],
    request: FetchRequest,
    runtime: &Handle,
    progress: Progress<'_>,
) -> Result<RestoreReport, FetchError> {
    let FetchRequest { disk, checkpoint, output } = request;
    if checkpoint.len() > NAME_MAX_BYTES || disk.as_ref().is_some_and(|disk| disk.len() > NAME_MAX_BYTES) {
        return Err(RestoreError::Usage("this names no disk or no checkpoint".to_owned()).into());
    }
    let wanted = checkpoint.parse::<CheckpointId>().ok();
    let meter = Meter::new(progress, 0);
    let mut line = Line::open(dial, session, &RestoreUp::Fetch { disk, checkpoint }, runtime, meter)?;
    let (mut checkpoint, verify_bytes) = match decode_message(&line.frame()?)? {
        RestoreDown::Begin { checkpoint, verify_bytes } => (checkpoint, verify_bytes),
        other => return Err(unexpected(other)),
    };
    if checkpoint.agent != dial.key.agent {
        return Err(FetchError::broken("the dispatcher sent a checkpoint of another agent"));
    }
    if wanted.is_some_and(|id| id != checkpoint.id) {
        return Err(FetchError::broken("the dispatcher sent another checkpoint than was asked for"));
    }
    checkpoint.note = clean_text(checkpoint.note);
    checkpoint.device = clean_text(checkpoint.device);
    let geometry = checkpoint.geometry;
    let mut target = output.open(geometry.size_bytes())?;
    line.meter.expect(verify_bytes.saturating_add(2 * geometry.size_bytes()));
    let received = line.receive(geometry, verify_bytes, &mut target);
    let read_back = received.and_then(|Received { digests, unreadable, written_bytes }| {
        let mut meter = line.close();
        let digest = |group: u64| usize::try_from(group).ok().and_then(|at| digests.get(at)).copied();
        target.read_back(geometry, &mut |bytes| meter.tick(bytes), |group, first, found| {
            Ok((digest(group) != Some(group_digest(found))).then_some(first))
        })?;
        Ok((unreadable, written_bytes))
    });
    let (unreadable, written_bytes) = read_back.map_err(|error| error.explain(&target))?;
    let output = target.finish()?;
    let unreadable_sectors = sectors(&unreadable, geometry, RANGES_MAX);
    Ok(RestoreReport { checkpoint, output, unreadable_sectors, written_bytes })
}

/// A message that is not due: a refusal, or an error of the dispatcher.
fn unexpected(message: RestoreDown) -> FetchError {
    match message {
        RestoreDown::Refused { kind, reason, mut damage } => {
            damage.truncate(DAMAGE_MAX_LINES);
            let damage = damage.into_iter().map(clean_text).collect();
            FetchError::Refused { kind, reason: clean_text(reason), damage, hint: "" }
        }
        RestoreDown::Begin { .. } => FetchError::broken("the dispatcher began twice"),
        RestoreDown::Verifying { .. } => FetchError::broken("the dispatcher verifies out of turn"),
        RestoreDown::End => FetchError::broken("the dispatcher ended before everything was sent"),
    }
}

/// What came.
struct Received {
    /// Of each group, what it must read back as.
    digests: Vec<GroupDigest>,
    unreadable: BlockSet,
    written_bytes: u64,
}

/// The connection of one fetch.
struct Line<'a> {
    runtime: &'a Handle,
    meter: Meter<'a>,
    inbound: mpsc::Receiver<Vec<u8>>,
    /// Moves the frames; ends when it is dropped.
    pumping: JoinSet<PumpEnd>,
    /// While this is there the connection stays open.
    _out: mpsc::Sender<Vec<u8>>,
}

impl<'a> Line<'a> {
    fn open(
        dial: &Dial,
        session: [u8; 16],
        fetch: &RestoreUp,
        runtime: &'a Handle,
        mut meter: Meter<'a>,
    ) -> Result<Self, FetchError> {
        let fetch = encode_message(fetch)?;
        let mut headers = dial.headers();
        headers.push((header::SESSION, hex(&session)));
        let socket = wait(runtime, &mut meter, dial.open(Endpoint::Restore, &headers))??;
        let (out, outbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
        let (inbox, inbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
        // The queue is new and empty.
        let _ = out.try_send(fetch);
        let deliver = move |frame| {
            let inbox = inbox.clone();
            async move { inbox.send(frame).await.is_ok() }
        };
        let mut pumping = JoinSet::new();
        pumping.spawn_on(pump(socket, outbound, deliver), runtime);
        Ok(Self { runtime, meter, inbound, pumping, _out: out })
    }

    /// Ends the connection.
    fn close(self) -> Meter<'a> {
        self.meter
    }

    fn frame(&mut self) -> Result<Vec<u8>, FetchError> {
        if let Some(frame) = wait(self.runtime, &mut self.meter, self.inbound.recv())? {
            return Ok(frame);
        }
        let end = wait(self.runtime, &mut self.meter, self.pumping.join_next())?;
        let end = end.and_then(Result::ok).map_or_else(|| "it broke".to_owned(), |end| end.to_string());
        Err(FetchError::broken(format!("the connection ended before everything was sent: {end}")))
    }

    /// Takes every group, one after another, and the end.
    fn receive(
        &mut self,
        geometry: Geometry,
        verify_bytes: u64,
        target: &mut Target,
    ) -> Result<Received, FetchError> {
        let mut received = Received { digests: Vec::new(), unreadable: BlockSet::new(), written_bytes: 0 };
        let mut verified = 0;
        for group in 0..geometry.groups() {
            let run = loop {
                match decode(&self.frame()?, geometry)? {
                    Frame::Data { area: Area::Base, seq, run } if seq == group + 1 => break run,
                    Frame::Data { .. } => {
                        return Err(FetchError::broken("the dispatcher sent blocks out of turn"));
                    }
                    Frame::Message(RestoreDown::Verifying { done_bytes })
                        if group == 0 && (verified + 1..=verify_bytes).contains(&done_bytes) =>
                    {
                        self.meter.tick(done_bytes - verified)?;
                        verified = done_bytes;
                    }
                    Frame::Message(other) => return Err(unexpected(other)),
                }
            };
            if group == 0 {
                self.meter.tick(verify_bytes.saturating_sub(verified))?;
            }
            let (offset, len) = geometry.range(run.extent().first, run.extent().count);
            let hashes = whole_group(geometry, group, &run)?;
            insert_unreadable(run.extent().first, &hashes, &mut received.unreadable);
            let contents: Vec<BlockHash> = hashes.into_iter().map(BlockHash::content).collect();
            received.digests.push(group_digest(&contents));
            let data = run.unpack(geometry).map_err(FrameError::from)?;
            received.written_bytes += target.put(offset, len, data.as_deref())?;
            self.meter.tick(len)?;
        }
        match decode_message(&self.frame()?)? {
            RestoreDown::End => Ok(received),
            other => Err(unexpected(other)),
        }
    }
}

/// The hashes of a run that must be exactly this group.
fn whole_group(geometry: Geometry, group: u64, run: &Run) -> Result<Vec<BlockHash>, FetchError> {
    let (first, count) = geometry.group_extent(group);
    if (run.extent().first, run.extent().count) != (first, count) {
        return Err(FetchError::broken("the dispatcher sent blocks out of turn"));
    }
    Ok((0..count).map(|at| run.hash(at)).collect())
}

/// Waits for something of the network's, and looks several times a second whether to end.
fn wait<T>(
    runtime: &Handle,
    meter: &mut Meter<'_>,
    future: impl Future<Output = T>,
) -> Result<T, RestoreError> {
    let mut future = pin!(future);
    loop {
        if let Ok(done) = runtime.block_on(async { timeout(POLL, future.as_mut()).await }) {
            return Ok(done);
        }
        meter.tick(0)?;
    }
}
