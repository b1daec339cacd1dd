//! The checkpoint that is meant, and all it rests on.

use std::path::Path;

use super::verify::{Tick, verify_bytes, verify_settled, view};
use super::{Missing, RestoreError, find};
use crate::checkpoint::chain::{Chain, Member};
use crate::checkpoint::{Checkpoint, select};
use crate::ids::{AgentId, CheckpointId};
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::store::view::View;
use crate::store::{Damage, StoreError};

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

    /// Looks at all it rests on, once more if a commit changed the files meanwhile.
    ///
    /// # Errors
    /// Io, and what `tick` says; damage is the answer.
    pub(crate) fn damage(&self, tick: Tick<'_>) -> Result<Vec<Damage>, RestoreError> {
        let found = verify_settled(&self.dir, &self.owner, &self.chain, self.members().len(), tick)?.concat();
        let broken = self.chain.broken.iter().filter(|_| self.count.is_none());
        Ok(broken.map(|(damage, _)| damage.clone()).chain(found).collect())
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
