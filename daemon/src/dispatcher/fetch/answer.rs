//! Answers one fetch: verifies all it rests on, then gives digests and blocks as the agent asks for them.
//!
//! Nothing of the target is overwritten for a checkpoint that turns out damaged, and damage that no single block's hash shows
//! (a file of another life) is found as well. Every block is checked again as it is read.

use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use blxrep_dbus::problem::{Problem, ProblemKind};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::warn;

use super::{HEARS, Refusal};
use crate::bitmap::{BlockSet, Extent};
use crate::bus::control::{About, Details, Planned, Progress};
use crate::hash::{BlockHash, group_digest};
use crate::ids::AgentId;
use crate::restore::{Chosen, Part, RestoreError};
use crate::run::Run;
use crate::wire::frame::{Area, encode_data, encode_message};
use crate::wire::message::{
    DIGESTS_MAX, Fetch, NAME_MAX_BYTES, RestoreDown, RestoreUp, UNREADABLE_MAX_EXTENTS, clean_text,
};

/// How often the agent is told how far the verifying is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// How often the job looks how far it is, and a wait for the agent whether it is to end.
const POLL: Duration = Duration::from_millis(200);

/// One fetch, on a thread of its own.
pub(super) struct Answering {
    agent: AgentId,
    asked: mpsc::Receiver<RestoreUp>,
    out: mpsc::Sender<Vec<u8>>,
    /// How far the agent is, and whether a person here ended it.
    progress: Arc<Progress>,
    /// Tells the job of the end.
    ended: SyncSender<Result<(), Problem>>,
    /// The job's side of it, until there is one.
    end: Option<Receiver<Result<(), Problem>>>,
}

impl Answering {
    pub(super) fn new(agent: AgentId, asked: mpsc::Receiver<RestoreUp>, out: mpsc::Sender<Vec<u8>>) -> Self {
        let (ended, end) = sync_channel(1);
        Self { agent, asked, out, progress: Arc::default(), ended, end: Some(end) }
    }

    /// Tells the agent and the job of the end.
    pub(super) fn end(self, result: Result<(), Refusal>) {
        let Self { agent, out, ended, progress, .. } = self;
        let gone =
            || Refusal::new(ProblemKind::Failed, "the connection ended before the agent had everything");
        let is_gone = out.is_closed() && !progress.is_canceled();
        let result = result.map_err(|refusal| if is_gone { gone() } else { refusal });
        if let Err(Refusal { kind, reason, damage }) = &result {
            let lines: String = damage.iter().map(|line| format!("\n{line}")).collect();
            warn!(AGENT = %agent, "a fetch ended early: {reason}{lines}");
            let (kind, reason, damage) = (*kind, clean_text(reason.as_str()), damage.clone());
            let last = RestoreDown::Refused { kind, reason, damage };
            // An agent that is gone, or reads nothing, does not hear it.
            let told = out.send(encode_message(&last).unwrap_or_default());
            let _ = Handle::current().block_on(async { timeout(HEARS, told).await });
        }
        // Nobody may look.
        let _ = ended.try_send(result.map_err(|refusal| Problem::new(refusal.kind, refusal.reason)));
    }

    /// Streams what is wanted; `begun` is told of the job once it is known what that is.
    pub(super) fn stream(
        &mut self,
        data_dir: &Path,
        wanted: &Fetch,
        begun: &mpsc::Sender<Planned>,
    ) -> Result<(), Refusal> {
        let is_name =
            |name: &String| name.len() <= NAME_MAX_BYTES && name.bytes().all(|b| b.is_ascii_graphic());
        if !is_name(&wanted.checkpoint) || !wanted.disk.iter().all(is_name) {
            return Err(Refusal::new(ProblemKind::InvalidArgument, "this names no disk or no checkpoint"));
        }
        let chosen = Chosen::find(data_dir, &wanted.agent, wanted.disk.as_deref(), &wanted.checkpoint)?;
        let Some(checkpoint) = chosen.checkpoint().cloned() else {
            let alive = &mut |_| go_on(&self.out, &self.progress);
            return Err(RestoreError::Damaged(chosen.damage(alive)?).into());
        };
        let about = About {
            agent: wanted.agent.to_string(),
            disk: chosen.owner.disk.to_string(),
            checkpoint: chosen.id.to_string(),
            target: format!("agent {}", self.agent),
        };
        if let Some(end) = self.end.take() {
            let _ = begun.try_send(job(about, self.progress.clone(), end));
        }
        let part = Part::new(chosen.view().map_err(RestoreError::from)?, wanted.partition)?;
        let verify_bytes =
            if wanted.resumes { 0 } else { chosen.verify_bytes().map_err(RestoreError::from)? };
        let marked = checkpoint.unreadable_blocks > 0;
        self.send(&RestoreDown::Begin { checkpoint, part: part.geometry(), verify_bytes })?;
        if !wanted.resumes {
            self.verify(&chosen, verify_bytes)?;
        }
        let unreadable =
            if marked { part.unreadable().map_err(RestoreError::from)? } else { BlockSet::new() };
        let unreadable = unreadable.extents(u64::MAX).take(UNREADABLE_MAX_EXTENTS).collect();
        self.send(&RestoreDown::Verified { unreadable })?;
        self.answer(&part)
    }

    /// Answers until the agent has everything.
    fn answer(&mut self, part: &Part) -> Result<(), Refusal> {
        let groups = part.geometry().groups();
        let odd = || Refusal::new(ProblemKind::InvalidArgument, "this was asked for out of turn");
        while let Some(message) = wait(&self.out, &self.progress, self.asked.recv())? {
            // It hangs up behind this, and may be gone already.
            if message == RestoreUp::Done {
                return Ok(());
            }
            go_on(&self.out, &self.progress)?;
            match message {
                RestoreUp::WantDigests { first_group, count }
                    if count <= DIGESTS_MAX
                        && first_group.checked_add(count.into()).is_some_and(|end| end <= groups) =>
                {
                    let mut digests = Vec::new();
                    for group in first_group..first_group + u64::from(count) {
                        digests.push(group_digest(&contents(part, group)?));
                    }
                    self.send(&RestoreDown::Digests { first_group, digests })?;
                }
                RestoreUp::WantGroup { group, holds } if group < groups => {
                    self.send_differing(part, group, &holds)?;
                    self.send(&RestoreDown::Sent { group })?;
                }
                RestoreUp::Progress { done_bytes, total_bytes } => {
                    self.progress.report(done_bytes.min(total_bytes), total_bytes);
                }
                _ => return Err(odd()),
            }
        }
        Err(RestoreError::Canceled { hint: "" }.into())
    }

    /// Sends the blocks of a group whose hashes are not those of `holds`.
    fn send_differing(&self, part: &Part, group: u64, holds: &[BlockHash]) -> Result<(), RestoreError> {
        let (first, _) = part.geometry().group_extent(group);
        let wanted = contents(part, group)?;
        let differs = (0..).zip(&wanted).filter(|(at, hash)| holds.get(*at as usize) != Some(hash));
        let differing: BlockSet = differs.map(|(at, _)| Extent { first: at, count: 1 }).collect();
        if differing.is_empty() {
            return Ok(());
        }
        let found = part.read(group)?;
        let block_bytes = part.geometry().block_bytes();
        for Extent { first: at, count } in differing.extents(u64::MAX) {
            let (from, to) = (at as usize, (at + count) as usize);
            let zeros = |hashes: &[BlockHash]| hashes.iter().all(|hash| *hash == BlockHash::ZERO);
            let run = match &found {
                Some(found) if !zeros(wanted.get(from..to).unwrap_or_default()) => {
                    let end = (to * block_bytes).min(found.data.len());
                    let data = found.data.get(from * block_bytes..end).unwrap_or_default();
                    Run::pack(first + at, found.hashes.get(from..to).unwrap_or_default().to_vec(), data)
                }
                _ => Run::zeros(first + at, u32::try_from(count).unwrap_or(u32::MAX)),
            };
            self.send_frame(encode_data(Area::Base, group + 1, &run))?;
        }
        Ok(())
    }

    /// Verifies and tells the agent how far it is.
    fn verify(&self, chosen: &Chosen, verify_bytes: u64) -> Result<(), RestoreError> {
        let (mut done_bytes, mut told, mut told_at) = (0, 0, Instant::now());
        chosen.verified(&mut |bytes| {
            done_bytes += bytes;
            go_on(&self.out, &self.progress)?;
            // Where a commit came between it verifies once more: no more than all is told.
            if told_at.elapsed() < TELL_EVERY || done_bytes <= told || done_bytes > verify_bytes {
                return Ok(());
            }
            (told, told_at) = (done_bytes, Instant::now());
            self.send(&RestoreDown::Verifying { done_bytes })
        })
    }

    fn send(&self, message: &RestoreDown) -> Result<(), RestoreError> {
        self.send_frame(encode_message(message).unwrap_or_default())
    }

    /// Fails if the agent is gone, or a person here ended it.
    fn send_frame(&self, frame: Vec<u8>) -> Result<(), RestoreError> {
        let sent = wait(&self.out, &self.progress, self.out.send(frame))?;
        sent.map_err(|_| RestoreError::Canceled { hint: "" })
    }
}

/// Fails if the agent is gone, or a person here ended it.
fn go_on(out: &mpsc::Sender<Vec<u8>>, progress: &Progress) -> Result<(), RestoreError> {
    let ends = out.is_closed() || progress.is_canceled();
    if ends { Err(RestoreError::Canceled { hint: " on the dispatcher" }) } else { Ok(()) }
}

/// Waits for the agent, and looks several times a second whether to go on: it may say nothing, or read nothing.
fn wait<T>(
    out: &mpsc::Sender<Vec<u8>>,
    progress: &Progress,
    future: impl Future<Output = T>,
) -> Result<T, RestoreError> {
    let mut future = pin!(future);
    loop {
        if let Ok(done) = Handle::current().block_on(async { timeout(POLL, future.as_mut()).await }) {
            return Ok(done);
        }
        go_on(out, progress)?;
    }
}

/// What a group's blocks are to hash as on the target.
fn contents(part: &Part, group: u64) -> Result<Vec<BlockHash>, RestoreError> {
    Ok(part.hashes(group)?.into_iter().map(BlockHash::content).collect())
}

/// A fetch as a job on the bus.
fn job(about: About, served: Arc<Progress>, end: Receiver<Result<(), Problem>>) -> Planned {
    let work = move |progress: &Progress| loop {
        let (done_bytes, total_bytes) = served.bytes();
        progress.report(done_bytes, total_bytes);
        if progress.is_canceled() {
            served.cancel();
        }
        match end.recv_timeout(POLL) {
            Ok(ended) => return ended.map(|()| Details::new()).map_err(Into::into),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Problem::new(ProblemKind::Failed, "it broke off: the journal says why").into());
            }
        }
    };
    Planned { about, work: Box::new(work) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused_before_anything_is_looked_for() {
        let agent: AgentId = "web1".parse().unwrap();
        for (disk, checkpoint) in [
            (None, "x".repeat(NAME_MAX_BYTES + 1)),
            (None, "latest\n".to_owned()),
            (Some("sd\u{e4}".to_owned()), "latest".to_owned()),
            (Some("s da".to_owned()), "latest".to_owned()),
        ] {
            let wanted = Fetch { agent: agent.clone(), disk, checkpoint, partition: None, resumes: false };
            let ((out, _outbound), (_inbox, asked)) = (mpsc::channel(1), mpsc::channel(1));
            let mut answering = Answering::new(agent.clone(), asked, out);
            let nowhere = Path::new("/nonexistent");
            let refusal = answering.stream(nowhere, &wanted, &mpsc::channel(1).0).unwrap_err();
            assert_eq!(refusal.kind, ProblemKind::InvalidArgument, "{wanted:?}");
        }
    }
}
