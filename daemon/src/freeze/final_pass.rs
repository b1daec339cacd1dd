//! The final pass: the last blocks of a checkpoint, read at one point in time.
//!
//! File systems are frozen only between [`Frost::freeze`] and [`Frost::thaw`]; what happens there is bounded by
//! the freeze's own deadline, touches no file and logs nothing.
//!
//! Blocks are not lost here, whatever happens: what [`Tracker::drain`] returns is in the tracker's pending set
//! from then on, and what the caller hands in stays the caller's until the dispatcher has committed the checkpoint.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::frost::Frost;
use super::hooks::{HookEnv, HookLimits, HookReport, Stage, run_hooks};
use super::memory::Memory;
use super::mountinfo::DeviceNumber;
use super::topology::{Topology, Unfreezable, file_systems_on, sync_all};
use super::verdict::Facts;
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::Consistency;
use crate::geometry::Geometry;
use crate::ids::{AgentId, CheckpointId};
use crate::reader::{BlockReader, Piece, ReadError, read_pieces};
use crate::tracker::{Tracker, TrackerError};

/// What a final pass needs to know.
#[derive(Debug, Clone)]
pub struct FinalPassJob {
    /// The agent, for hooks.
    pub agent: AgentId,
    /// The disk's path, for hooks.
    pub device_path: PathBuf,
    /// The disk's number.
    pub device: DeviceNumber,
    /// The disk's size and blocks.
    pub geometry: Geometry,
    /// Where hooks are, if anywhere.
    pub hooks_dir: Option<PathBuf>,
    /// How long each hook may take.
    pub hook_timeout: Duration,
    /// How long file systems may be frozen.
    pub freeze_timeout: Duration,
    /// The most that is read in a freeze, and held in memory.
    pub budget_bytes: u64,
    /// The newest checkpoint of this disk: the new one's id is greater.
    pub last: Option<CheckpointId>,
    /// Where a freeze is recorded.
    pub state_dir: PathBuf,
    /// The `blxrep` binary, which is the guard as well.
    pub guard_exe: PathBuf,
}

/// A final pass that has brought no checkpoint. Everything is thawed; all blocks are still pending.
#[derive(Debug, thiserror::Error)]
pub enum FinalPassError {
    /// The tracker failed.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// A block could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is no memory for the budget.
    #[error("there is not enough memory for the {0} bytes that a freeze may read: lower the budget")]
    Memory(u64),
}

/// What a final pass has brought.
#[derive(Debug)]
pub enum Outcome {
    /// Too much has changed for one freeze. Send `rest` first, and try again.
    TooMuch {
        /// What is to be sent: what was handed in and what has changed since.
        rest: BlockSet,
        /// What went wrong besides; may be empty.
        note: String,
    },
    /// The last blocks of a checkpoint.
    Taken(Taken),
}

/// The last blocks of a checkpoint, and what is known of it.
#[derive(Debug)]
pub struct Taken {
    /// Its id: the second of the freeze.
    pub id: CheckpointId,
    /// The moment of the freeze, in milliseconds since 1970.
    pub time_unix_ms: u64,
    /// How long file systems were frozen, in milliseconds; 0 if none was.
    pub freeze_ms: u32,
    /// How it was proven.
    pub consistency: Consistency,
    /// What a person should know; may be empty.
    pub note: String,
    /// The blocks, each extent at most 1 MiB, in ascending order.
    pub data: Vec<(Extent, Vec<u8>)>,
    /// The blocks that could not be read.
    pub unreadable: BlockSet,
    /// Blocks written since the first of `data` was read: they stay pending (`keep` of [`Tracker::commit`]).
    pub after: BlockSet,
}

impl Taken {
    /// All blocks that were to be read, whether they could be or not.
    pub fn blocks(&self) -> BlockSet {
        let mut blocks: BlockSet = self.data.iter().map(|(extent, _)| *extent).collect();
        blocks.union(&self.unreadable);
        blocks
    }
}

/// Takes a checkpoint's last blocks: `to_send` and what the tracker has seen change since.
///
/// A freeze that does not come about, or ends too early, is no error but costs the class; `note` says why. Hooks of
/// the stage `post-thaw` run in every case in which those of `pre-freeze` did.
///
/// # Errors
/// When the tracker or the reader fails, or there is no memory.
pub fn final_pass(
    job: &FinalPassJob,
    tracker: &mut dyn Tracker,
    reader: &mut dyn BlockReader,
    to_send: &BlockSet,
) -> Result<Outcome, FinalPassError> {
    let mut memory = Memory::take(job.budget_bytes).ok_or(FinalPassError::Memory(job.budget_bytes))?;
    let mut pass = Pass { job, notes: Vec::new(), hooks: HookReport::default(), prepared: 0 };
    let topology = pass.topology();
    let mut frost = Frost::prepare(job, &topology, &mut pass.notes);
    pass.hooks(Stage::PreFreeze, CheckpointId::next(now_unix_ms() / 1000, job.last), None);
    if let Err(e) = sync_all(&topology) {
        pass.notes.push(e.to_string());
    }

    frost.freeze(job.freeze_timeout, &mut pass.notes);
    let time_unix_ms = now_unix_ms();
    let id = CheckpointId::next(time_unix_ms / 1000, job.last);
    let read = pass.read(tracker, reader, to_send, &mut frost, &mut memory);
    if matches!(read, Ok(Read::All { .. })) {
        pass.hooks(Stage::Frozen, id, frost.until());
    }
    frost.thaw(&mut pass.notes);

    pass.hooks(Stage::PostThaw, id, None);
    frost.finish(&mut pass.notes);
    pass.log();
    let (after, unreadable) = match read? {
        Read::TooMuch(rest) => return Ok(Outcome::TooMuch { rest, note: pass.notes.join("; ") }),
        Read::All { after, unreadable } => (after, unreadable),
    };
    let consistency = pass.consistency(&topology, &frost, &after);
    Ok(Outcome::Taken(Taken {
        id,
        time_unix_ms: u64::try_from(time_unix_ms).unwrap_or(0),
        freeze_ms: u32::try_from(frost.frozen_for.as_millis()).unwrap_or(u32::MAX),
        consistency,
        note: pass.notes.join("; "),
        data: memory.into_pieces(),
        unreadable,
        after,
    }))
}

/// Milliseconds since 1970, by the wall clock.
fn now_unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(0)
}

/// How the reading went.
enum Read {
    /// It is more than the budget, or than can be read in the time: nothing is kept.
    TooMuch(BlockSet),
    /// Everything is in memory.
    All {
        /// These were written meanwhile.
        after: BlockSet,
        /// These cannot be read.
        unreadable: BlockSet,
    },
}

/// What comes together in the course of a pass.
struct Pass<'a> {
    job: &'a FinalPassJob,
    notes: Vec<String>,
    /// All stages together.
    hooks: HookReport,
    /// Hooks run before the last block was read or while it still was frozen: those that prepare.
    prepared: usize,
}

impl Pass<'_> {
    fn topology(&mut self) -> Topology {
        let DeviceNumber { major, minor } = self.job.device;
        let topology = file_systems_on(major, minor).unwrap_or_else(|e| {
            let device = self.job.device_path.display().to_string();
            Topology { mounts: Vec::new(), unfreezable: vec![Unfreezable { device, reason: e.to_string() }] }
        });
        self.notes.extend(
            topology.unfreezable.iter().map(|u| format!("{} cannot be frozen: {}", u.device, u.reason)),
        );
        topology
    }

    fn hooks(&mut self, stage: Stage, id: CheckpointId, until: Option<Instant>) {
        let env = HookEnv {
            agent: self.job.agent.to_string(),
            device_path: self.job.device_path.clone(),
            checkpoint: id.to_string(),
        };
        let limits = HookLimits { each: self.job.hook_timeout, until };
        let report = run_hooks(self.job.hooks_dir.as_deref(), stage, &env, limits);
        if stage != Stage::PostThaw {
            self.prepared += report.ran;
        }
        for failed in report.failed {
            // One that is refused is so at every stage; once is enough.
            if !self.notes.contains(&failed) {
                self.notes.push(failed.clone());
                self.hooks.failed.push(failed);
            }
        }
        let named =
            report.output.into_iter().map(|(name, text)| (format!("{name} {}", stage.as_str()), text));
        self.hooks.output.extend(named);
    }

    /// What happens in the freeze, but for the hooks.
    fn read(
        &mut self,
        tracker: &mut dyn Tracker,
        reader: &mut dyn BlockReader,
        to_send: &BlockSet,
        frost: &mut Frost,
        memory: &mut Memory,
    ) -> Result<Read, FinalPassError> {
        let geometry = self.job.geometry;
        let mut rest = tracker.drain()?;
        rest.union(to_send);
        if rest.len().saturating_mul(geometry.block_bytes() as u64) > self.job.budget_bytes {
            return Ok(Read::TooMuch(rest));
        }
        let until = frost.until().unwrap_or_else(|| Instant::now() + self.job.freeze_timeout);
        let (mut fits, mut unreadable) = (true, BlockSet::new());
        for extent in rest.extents(geometry.group_blocks()) {
            let read =
                read_pieces(reader, extent, &mut || Instant::now() < until, &mut |piece| match piece {
                    Piece::Data(part, data) => fits = fits && memory.keep(part, data),
                    Piece::Unreadable(part) => unreadable.insert(part),
                });
            match read {
                Err(ReadError::GaveUp { .. }) => {
                    self.notes.push("bad blocks took too long to find while frozen".to_owned());
                    fits = false;
                }
                other => other?,
            }
            if !fits {
                break;
            }
        }
        if !fits {
            return Ok(Read::TooMuch(rest));
        }
        frost.check(&mut self.notes);
        let after = tracker.drain()?;
        // The disk is as quiet as it will ever be: the tracker's audit is exact now. What it finds, the caller sees in
        // the number of gaps before it seals anything.
        tracker.claim()?;
        Ok(Read::All { after, unreadable })
    }

    fn consistency(&mut self, topology: &Topology, frost: &Frost, after: &BlockSet) -> Consistency {
        let came = self.came_since(topology);
        if frost.frozen > 0 && !after.is_empty() {
            let text = "blocks changed while the file systems were frozen: a trim of free space, or a writer that goes past them";
            self.notes.push(text.to_owned());
        }
        Facts {
            mounted: topology.mounts.len(),
            writable: topology.to_freeze().len(),
            frozen: frost.frozen,
            expired: frost.expired,
            others: came || !topology.unfreezable.is_empty(),
            written: !after.is_empty(),
            hooked: self.prepared > 0 && self.hooks.failed.is_empty(),
        }
        .consistency()
    }

    /// Whether file systems were mounted, or other users came, while the pass was on.
    fn came_since(&mut self, before: &Topology) -> bool {
        let DeviceNumber { major, minor } = self.job.device;
        let Ok(now) = file_systems_on(major, minor) else { return true };
        let known = |m: &super::mounts::Mount| {
            before.mounts.iter().any(|b| b.device == m.device && b.read_only == m.read_only)
        };
        let came = now.mounts.iter().any(|m| !known(m)) || now.unfreezable.len() > before.unfreezable.len();
        if came {
            self.notes.push("file systems or other users of the disk came during the checkpoint".to_owned());
        }
        came
    }

    /// Only now, with everything thawed: a log can lie on a file system that was frozen.
    fn log(&self) {
        for (hook, text) in &self.hooks.output {
            tracing::info!(hook, "hook said: {text}");
        }
    }
}

#[cfg(test)]
mod tests;
