//! The checkpoint that is meant, and all it rests on.

use std::path::Path;

use super::verify::{Tick, verify, verify_bytes, verify_open_journal, view};
use super::{Meter, Missing, Progress, RestoreError, find};
use crate::checkpoint::chain::{self, Chain, Member};
use crate::checkpoint::{Checkpoint, select};
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::store::view::View;
use crate::store::{Damage, StoreError};
use crate::unreadable::{RANGES_MAX, sectors};

/// A checkpoint there are files of, in the chain of its disk.
pub(crate) struct Chosen {
    dir: Dir,
    chain: Chain,
    /// How many members of the chain it rests on, itself the last; `None` if the chain breaks before it.
    count: Option<usize>,
    /// Whose disk.
    pub(crate) owner: Paths,
    /// Its id.
    pub(crate) id: CheckpointId,
}

impl Chosen {
    /// Finds what a person means: an agent's disk (its id or device name, or the only one), and of it an id,
    /// `YYYYMMDDHHMM` or `latest`.
    ///
    /// # Errors
    /// NotFound, Usage, Io.
    pub(crate) fn find(
        data_dir: &Path,
        agent: &AgentId,
        disk: Option<&str>,
        checkpoint: &str,
    ) -> Result<Self, RestoreError> {
        Self::find_in(find::data_dir(data_dir)?, agent, disk, checkpoint)
    }

    /// As [`Self::find`], in a data directory that is open.
    ///
    /// # Errors
    /// NotFound, Usage, Io.
    pub(crate) fn find_in(
        dir: Dir,
        agent: &AgentId,
        disk: Option<&str>,
        checkpoint: &str,
    ) -> Result<Self, RestoreError> {
        let find::Found { owner, chain } = find::disk(&dir, agent, disk)?;
        let id = select::select(&chain.ids(), checkpoint).map_err(|e| match e {
            select::SelectError::Form(_) => RestoreError::Usage(e.to_string()),
            select::SelectError::None { .. } => RestoreError::NotFound(Missing::Checkpoint, e.to_string()),
        })?;
        let count = chain.members.iter().position(|m| m.checkpoint.id == id).map(|at| at + 1);
        Ok(Self { dir, chain, count, owner, id })
    }

    fn members(&self) -> &[Member] {
        let count = self.count.unwrap_or(self.chain.members.len());
        self.chain.members.get(..count).unwrap_or_default()
    }

    /// What it says of itself; `None` if the chain breaks before it, and [`Self::damage`] says where.
    pub(crate) fn checkpoint(&self) -> Option<&Checkpoint> {
        self.count.and(self.members().last()).map(|m| &m.checkpoint)
    }

    /// The checkpoint whose image the chain begins with.
    pub(crate) fn base(&self) -> Option<CheckpointId> {
        self.members().first().map(|m| m.checkpoint.id)
    }

    /// All checkpoints of the disk, also those that a break in the chain keeps from being restored.
    pub(crate) fn all_ids(&self) -> Vec<CheckpointId> {
        self.chain.ids()
    }

    /// The bytes [`Self::damage`] will report to its `tick`.
    ///
    /// # Errors
    /// Io.
    pub(crate) fn verify_bytes(&self) -> Result<u64, StoreError> {
        verify_bytes(&self.dir, &self.owner, self.members())
    }

    /// Whether it is the newest, and so what the open journal builds on.
    fn is_newest(&self) -> bool {
        self.count == Some(self.chain.members.len()) && self.chain.broken.is_none()
    }

    /// Looks at all it rests on, once more if a commit changed the files meanwhile.
    ///
    /// # Errors
    /// Io, and what `tick` says; damage is the answer.
    pub(crate) fn damage(&self, tick: Tick<'_>) -> Result<Vec<Damage>, RestoreError> {
        let count = self.members().len();
        let found = verify(&self.dir, &self.owner, &self.chain, count, tick)?;
        if self.count.is_none() {
            let broken = self.chain.broken.iter().map(|(damage, _)| damage.clone());
            return Ok(broken.chain(found).collect());
        }
        if found.is_empty() {
            return Ok(found);
        }
        let again = chain::load(&self.dir, &self.owner)?;
        let moved = again.newest().map(|m| m.link) != self.chain.newest().map(|m| m.link);
        if moved { verify(&self.dir, &self.owner, &again, count, tick) } else { Ok(found) }
    }

    /// As [`Self::damage`]; of the newest, also of the journal that is open behind it.
    ///
    /// # Errors
    /// Io, and what `tick` says; damage is the answer.
    pub(crate) fn all_damage(&self, tick: Tick<'_>) -> Result<Vec<Damage>, RestoreError> {
        let mut found = self.damage(tick)?;
        if self.is_newest() {
            let open = verify_open_journal(&self.dir, &self.owner, &self.chain)?;
            if !open.is_empty() {
                // A commit meanwhile begins another one.
                let again = chain::load(&self.dir, &self.owner)?;
                found.extend(verify_open_journal(&self.dir, &self.owner, &again)?);
            }
        }
        Ok(found)
    }

    /// Fails if anything it rests on is damaged.
    ///
    /// # Errors
    /// Damaged, with all of it; Io, and what `tick` says.
    pub(crate) fn verified(&self, tick: Tick<'_>) -> Result<(), RestoreError> {
        let damage = self.damage(tick)?;
        if damage.is_empty() { Ok(()) } else { Err(RestoreError::Damaged(damage)) }
    }

    /// The disk as of this checkpoint.
    ///
    /// # Errors
    /// Damaged; Io.
    pub(crate) fn view(&self) -> Result<View, StoreError> {
        view(&self.dir, &self.owner, &self.chain, self.members().len())
    }

    /// The sectors of the checkpoint that could not be read, as [`sectors`] names them.
    ///
    /// # Errors
    /// Damaged; Io.
    pub(crate) fn unreadable_sectors(&self) -> Result<String, StoreError> {
        let marked = self.checkpoint().filter(|checkpoint| checkpoint.unreadable_blocks > 0);
        let Some(Checkpoint { geometry, .. }) = marked else { return Ok(String::new()) };
        Ok(sectors(&self.view()?.unreadable()?, *geometry, RANGES_MAX))
    }
}

/// A checkpoint, opened to be read at any place.
pub struct Opened {
    /// What it says of itself.
    pub checkpoint: Checkpoint,
    /// Its disk.
    pub view: View,
}

/// Opens a checkpoint, named as for a restore. Of its data nothing is read yet: every block is checked when it is.
///
/// # Errors
/// Usage, NotFound; Damaged if what says where the data is is not sound; Io.
pub fn open(
    data_dir: &Path,
    agent: &AgentId,
    disk: Option<&str>,
    checkpoint: &str,
) -> Result<Opened, RestoreError> {
    let chosen = Chosen::find(data_dir, agent, disk, checkpoint)?;
    match chosen.checkpoint() {
        Some(checkpoint) => Ok(Opened { checkpoint: checkpoint.clone(), view: chosen.view()? }),
        None => {
            Err(RestoreError::Damaged(chosen.chain.broken.iter().map(|(damage, _)| damage.clone()).collect()))
        }
    }
}

/// What a verify found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// Of which disk.
    pub disk: DiskId,
    /// The checkpoint.
    pub checkpoint: CheckpointId,
    /// All damage; none if it is sound.
    pub damage: Vec<Damage>,
    /// How many blocks could not be read on the agent's disk: zeros stand for them. Not told of a damaged checkpoint.
    pub unreadable_blocks: u32,
    /// Their sectors, as [`sectors`] names them.
    pub unreadable_sectors: String,
}

/// Reads everything a checkpoint rests on and checks it; of the newest, the journal behind it as well. The checkpoint is named as for a restore.
///
/// # Errors
/// Usage, NotFound, Io, Canceled; damage is the answer.
pub fn verify_checkpoint(
    data_dir: &Path,
    agent: &AgentId,
    disk: Option<&str>,
    checkpoint: &str,
    progress: Progress<'_>,
) -> Result<VerifyReport, RestoreError> {
    let chosen = Chosen::find(data_dir, agent, disk, checkpoint)?;
    let mut meter = Meter::new(progress, chosen.verify_bytes()?);
    let damage = chosen.all_damage(&mut |bytes| meter.tick(bytes))?;
    let (unreadable_blocks, unreadable_sectors) = match chosen.checkpoint() {
        Some(checkpoint) if damage.is_empty() => (checkpoint.unreadable_blocks, chosen.unreadable_sectors()?),
        _ => (0, String::new()),
    };
    Ok(VerifyReport {
        disk: chosen.owner.disk.clone(),
        checkpoint: chosen.id,
        damage,
        unreadable_blocks,
        unreadable_sectors,
    })
}
