//! `/ws/restore`: streams a checkpoint of an agent's own to it: of any disk that is stored under its id, offered in this
//! session or not, for on the worst day the disk is a new one.
//!
//! All the checkpoint rests on is verified between Begin and the first data frame, as in a restore here: nothing of the
//! target is overwritten for a checkpoint that turns out damaged, and damage that no single block's hash shows (a file of
//! another life) is found as well. Every block is checked again as it is read. What must never happen here: a byte or
//! a name of another agent told.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blxrep_dbus::problem::ProblemKind;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::server::turned;
use crate::ids::AgentId;
use crate::restore::{Chosen, Missing, RestoreError};
use crate::run::Run;
use crate::wire::frame::{Area, decode_message, encode_data, encode_message};
use crate::wire::message::{DAMAGE_MAX_LINES, NAME_MAX_BYTES, RestoreDown, RestoreUp, clean_text};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, pump};
use crate::wire::socket::ServerSocket;

/// Restores of one agent at once: each keeps a thread and the disks busy.
const PER_AGENT_MAX: usize = 4;
/// How often the agent is told how far the verifying is.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// An agent on `/ws/restore`.
pub struct Restorer {
    /// Who.
    pub agent: AgentId,
    /// Whether the agents file lets it.
    pub may_restore: bool,
    /// Turns true when its session ends.
    pub cut: watch::Receiver<bool>,
}

/// The restores to agents that are under way.
#[derive(Default)]
pub struct Fetches(Mutex<HashMap<AgentId, Arc<Semaphore>>>);

impl Fetches {
    /// Serves one connection until it is closed, or the session is cut.
    pub async fn serve(&self, socket: ServerSocket, data_dir: PathBuf, restorer: Restorer) {
        let Restorer { agent, may_restore, mut cut } = restorer;
        let slots = self.slots(&agent);
        let (out, outbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
        let (asked, mut fetch) = mpsc::channel(1);
        let deliver = |frame: Vec<u8>| {
            // One fetch a connection: a second one, or anything else, ends it.
            let taken = decode_message(&frame).is_ok_and(|wanted: RestoreUp| asked.try_send(wanted).is_ok());
            async move { taken }
        };
        let streaming = async {
            if let Some(wanted) = fetch.recv().await {
                let agent = agent.clone();
                let work = move || {
                    let slot = slots.try_acquire();
                    let allowed = allowed(may_restore, slot.is_ok());
                    answer(&agent, &out, allowed.and_then(|()| stream(&data_dir, &agent, &wanted, &out)));
                };
                let _ = spawn_blocking(work).await;
            }
            // The queue is dropped: what is in it is sent, then the connection is closed.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            end = pump(socket, outbound, deliver) => info!(AGENT = %agent, "a fetch ended: {end}"),
            () = streaming => {}
            () = turned(&mut cut) => {}
        }
    }

    fn slots(&self, agent: &AgentId) -> Arc<Semaphore> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Semaphore::new(PER_AGENT_MAX));
        slots.entry(agent.clone()).or_insert_with(new).clone()
    }
}

/// Why a fetch ends before its end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) kind: ProblemKind,
    pub(super) reason: String,
    damage: Vec<String>,
}

impl Refusal {
    fn new(kind: ProblemKind, reason: impl Into<String>) -> Self {
        Self { kind, reason: reason.into(), damage: Vec::new() }
    }
}

impl From<RestoreError> for Refusal {
    /// What an agent may be told: nothing of other agents, and no path of the dispatcher's.
    fn from(error: RestoreError) -> Self {
        match (error.kind(), error) {
            (_, RestoreError::NotFound(Missing::Agent, _)) => {
                Self::new(ProblemKind::NoSuchAgent, "the dispatcher has stored nothing of this agent")
            }
            (_, RestoreError::NotFound(Missing::Disk, text)) => Self::new(ProblemKind::NoSuchDisk, text),
            (_, RestoreError::NotFound(Missing::Checkpoint, text)) => {
                Self::new(ProblemKind::NoSuchCheckpoint, text)
            }
            (_, RestoreError::Damaged(found)) => {
                let mut damage: Vec<String> =
                    found.iter().take(DAMAGE_MAX_LINES).map(|d| clean_text(d.to_string())).collect();
                if let (more @ 1.., Some(last)) =
                    (found.len().saturating_sub(DAMAGE_MAX_LINES), damage.last_mut())
                {
                    *last = format!("and {} more", more + 1);
                }
                let reason = "what the dispatcher has stored of this checkpoint is damaged: try an older one";
                Self { kind: ProblemKind::Damaged, reason: reason.to_owned(), damage }
            }
            (ProblemKind::InvalidArgument, error) => {
                Self::new(ProblemKind::InvalidArgument, error.to_string())
            }
            (_, error) => Self::new(ProblemKind::Failed, format!("the dispatcher failed: {error}")),
        }
    }
}

fn allowed(may_restore: bool, has_slot: bool) -> Result<(), Refusal> {
    if !may_restore {
        let reason = "the dispatcher's agents file does not let this agent restore: restore on the dispatcher, \
                      or take the word no-restore off its line there";
        return Err(Refusal::new(ProblemKind::Refused, reason));
    }
    if !has_slot {
        let reason = format!("{PER_AGENT_MAX} restores of this agent run already: wait for one to end");
        return Err(Refusal::new(ProblemKind::Failed, reason));
    }
    Ok(())
}

fn answer(agent: &AgentId, out: &mpsc::Sender<Vec<u8>>, result: Result<(), Refusal>) {
    if out.is_closed() {
        // Nobody hears it; that the connection ended is logged where it did.
        return;
    }
    let last = match result {
        Ok(()) => RestoreDown::End,
        Err(Refusal { kind, reason, damage }) => {
            let lines: String = damage.iter().map(|line| format!("\n{line}")).collect();
            warn!(AGENT = %agent, "a fetch was refused: {reason}{lines}");
            RestoreDown::Refused { kind, reason: clean_text(reason), damage }
        }
    };
    let _ = send(out, encode_message(&last).unwrap_or_default());
}

/// Fails if the agent is gone.
fn send(out: &mpsc::Sender<Vec<u8>>, frame: Vec<u8>) -> Result<(), RestoreError> {
    out.blocking_send(frame).map_err(|_| RestoreError::Canceled { hint: "" })
}

fn stream(
    data_dir: &Path,
    agent: &AgentId,
    wanted: &RestoreUp,
    out: &mpsc::Sender<Vec<u8>>,
) -> Result<(), Refusal> {
    let RestoreUp::Fetch { disk, checkpoint: text } = wanted;
    let is_name = |name: &String| name.len() <= NAME_MAX_BYTES && name.bytes().all(|b| b.is_ascii_graphic());
    if !is_name(text) || !disk.iter().all(is_name) {
        return Err(Refusal::new(ProblemKind::InvalidArgument, "this names no disk or no checkpoint"));
    }
    let chosen = Chosen::find(data_dir, agent, disk.as_deref(), text)?;
    let Some(checkpoint) = chosen.checkpoint().cloned() else {
        let alive = &mut |_| if out.is_closed() { Err(RestoreError::Canceled { hint: "" }) } else { Ok(()) };
        return Err(RestoreError::Damaged(chosen.damage(alive)?).into());
    };
    let geometry = checkpoint.geometry;
    let verify_bytes = chosen.verify_bytes().map_err(RestoreError::from)?;
    send(out, encode_message(&RestoreDown::Begin { checkpoint, verify_bytes }).unwrap_or_default())?;
    verify(&chosen, verify_bytes, out)?;
    let view = chosen.view().map_err(RestoreError::from)?;
    for group in 0..geometry.groups() {
        let (first, count) = geometry.group_extent(group);
        let run = match view.read_group(group).map_err(RestoreError::from)? {
            Some(data) => Run::pack(first, data.hashes, &data.data),
            None => Run::zeros(first, u32::try_from(count).unwrap_or(u32::MAX)),
        };
        send(out, encode_data(Area::Base, group + 1, &run))?;
    }
    Ok(())
}

/// Verifies and tells the agent how far it is.
fn verify(chosen: &Chosen, verify_bytes: u64, out: &mpsc::Sender<Vec<u8>>) -> Result<(), RestoreError> {
    let (mut done_bytes, mut told, mut told_at) = (0, 0, Instant::now());
    chosen.verified(&mut |bytes| {
        done_bytes += bytes;
        if out.is_closed() {
            return Err(RestoreError::Canceled { hint: "" });
        }
        // Where a commit came between it verifies once more: no more than all is told.
        if told_at.elapsed() < TELL_EVERY || done_bytes <= told || done_bytes > verify_bytes {
            return Ok(());
        }
        (told, told_at) = (done_bytes, Instant::now());
        send(out, encode_message(&RestoreDown::Verifying { done_bytes }).unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Damage;

    #[test]
    fn an_agent_is_told_nothing_of_others_and_no_path() {
        let found = RestoreError::NotFound(Missing::Agent, "nothing of web1; there is: web2 in /srv".into());
        let refusal = Refusal::from(found);
        assert_eq!(refusal.kind, ProblemKind::NoSuchAgent);
        assert!(!refusal.reason.contains("web2") && !refusal.reason.contains("/srv"), "{refusal:?}");
        let found = RestoreError::NotFound(Missing::Checkpoint, "there is no checkpoint x".into());
        assert_eq!(Refusal::from(found).kind, ProblemKind::NoSuchCheckpoint);
    }

    #[test]
    fn damage_is_listed_up_to_a_bound_and_fits_into_a_frame() {
        let damage = |count: usize| {
            let all = (0..count).map(|n| Damage::new(format!("{n}.bak"), "x".repeat(5000))).collect();
            Refusal::from(RestoreError::Damaged(all))
        };
        let all = damage(DAMAGE_MAX_LINES);
        assert_eq!((all.kind, all.damage.len()), (ProblemKind::Damaged, DAMAGE_MAX_LINES));
        assert!(all.damage.last().unwrap().starts_with("99.bak"));
        let Refusal { kind, reason, damage } = damage(DAMAGE_MAX_LINES + 50);
        assert_eq!((damage.len(), damage.last().unwrap().as_str()), (DAMAGE_MAX_LINES, "and 51 more"));
        assert!(encode_message(&RestoreDown::Refused { kind, reason, damage }).is_ok());
    }

    #[test]
    fn names_that_are_none_are_refused_before_anything_is_looked_for() {
        let (out, _outbound) = mpsc::channel(1);
        let agent = "web1".parse().unwrap();
        for (disk, checkpoint) in [
            (None, "x".repeat(NAME_MAX_BYTES + 1)),
            (None, "latest\n".to_owned()),
            (Some("sd\u{e4}".to_owned()), "latest".to_owned()),
            (Some("s da".to_owned()), "latest".to_owned()),
        ] {
            let wanted = RestoreUp::Fetch { disk, checkpoint };
            let refusal = stream(Path::new("/nonexistent"), &agent, &wanted, &out).unwrap_err();
            assert_eq!(refusal.kind, ProblemKind::InvalidArgument, "{wanted:?}");
        }
    }
}
