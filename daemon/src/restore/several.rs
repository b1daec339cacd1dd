//! Verifies one checkpoint, some, or all there are. Every file is read once, however many of them rest on it.

use std::path::Path;

use serde::Serialize;

use super::verify::{Tick, verify_bytes, verify_open_journal, verify_settled, view};
use super::{Meter, Missing, Progress, RestoreError, find};
use crate::checkpoint::chain::{self, Chain};
use crate::checkpoint::select::{SelectError, select};
use crate::ids::{AgentId, CheckpointId};
use crate::store::Damage;
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::unreadable::{RANGES_MAX, sectors};

/// Which checkpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// These of one disk, each as a person names it.
    Named(Vec<String>),
    /// All from minute `start` to minute `end` (`YYYYMMDDHHMM` as a number, both included).
    Between(Option<u64>, Option<u64>),
}

/// What is to be verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyRequest {
    /// Whose; everybody's without it.
    pub agent: Option<AgentId>,
    /// Of which disk, its id or its device's name.
    pub disk: Option<String>,
    /// Which of its checkpoints.
    pub wanted: Wanted,
}

/// A checkpoint that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Its id.
    pub id: CheckpointId,
    /// Whether everything it rests on is as it was written.
    pub is_sound: bool,
    /// How many blocks could not be read on the agent's disk: zeros stand for them. Not told of a damaged checkpoint.
    pub unreadable_blocks: u32,
    /// Their sectors, as [`sectors`] names them; only told where it is the only checkpoint that was wanted.
    pub unreadable_sectors: String,
}

/// What a verify found on one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskReport {
    /// Whose disk.
    pub owner: Paths,
    /// The checkpoints that were wanted, oldest first.
    pub verified: Vec<Verified>,
    /// Every checkpoint whose own files were looked at, oldest first, and what is damaged of them.
    pub looked: Vec<(CheckpointId, Vec<Damage>)>,
}

/// How the checkpoints of a disk are that were verified, in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskSummary {
    /// Whose disk.
    pub agent: String,
    /// Which.
    pub disk: String,
    /// The oldest checkpoint that was verified.
    pub oldest: String,
    /// The newest.
    pub newest: String,
    /// How many were verified.
    pub checkpoints: u32,
    /// How many of them are damaged.
    pub damaged: u32,
    /// The first one that is; all behind it are, because they rest on it.
    pub first_damaged: Option<String>,
    /// How many of those that are sound have zeros for blocks that could not be read.
    pub unreadable: u32,
}

impl DiskReport {
    /// The verdict in short.
    pub fn summary(&self) -> DiskSummary {
        let id = |verified: Option<&Verified>| verified.map(|v| v.id.to_string());
        let count = |of: fn(&&Verified) -> bool| {
            u32::try_from(self.verified.iter().filter(of).count()).unwrap_or(u32::MAX)
        };
        DiskSummary {
            agent: self.owner.agent.to_string(),
            disk: self.owner.disk.to_string(),
            oldest: id(self.verified.first()).unwrap_or_default(),
            newest: id(self.verified.last()).unwrap_or_default(),
            checkpoints: count(|_| true),
            damaged: count(|v| !v.is_sound),
            first_damaged: id(self.verified.iter().find(|v| !v.is_sound)),
            unreadable: count(|v| v.unreadable_blocks > 0),
        }
    }

    /// All damage.
    pub fn damage(&self) -> impl Iterator<Item = &Damage> {
        self.looked.iter().flat_map(|(_, damage)| damage)
    }
}

struct Part {
    owner: Paths,
    chain: Chain,
    /// Not empty, oldest first.
    ids: Vec<CheckpointId>,
}

/// Checkpoints that are there and are to be verified.
pub struct Verification {
    dir: Dir,
    parts: Vec<Part>,
}

impl Verification {
    /// Finds what is meant.
    ///
    /// # Errors
    /// NotFound, Usage, Io.
    pub fn plan(data_dir: &Path, request: &VerifyRequest) -> Result<Self, RestoreError> {
        Self::plan_in(find::data_dir(data_dir)?, request)
    }

    /// As [`Self::plan`], in a data directory that is open.
    ///
    /// # Errors
    /// NotFound, Usage, Io.
    pub(crate) fn plan_in(dir: Dir, request: &VerifyRequest) -> Result<Self, RestoreError> {
        let VerifyRequest { agent, disk, wanted } = request;
        let mut found = Vec::new();
        match (agent, wanted) {
            (Some(agent), Wanted::Named(_)) => found.push(find::disk(&dir, agent, disk.as_deref())?),
            (Some(agent), Wanted::Between(..)) => found = find::disks(&dir, agent, disk.as_deref())?,
            (None, Wanted::Between(..)) if disk.is_none() => {
                for agent in chain::agents(&dir)? {
                    match find::disks(&dir, &agent, None) {
                        Err(RestoreError::NotFound(..)) => {}
                        disks => found.extend(disks?),
                    }
                }
            }
            (None, _) => {
                let text = "a disk or a checkpoint is one of an agent's: name the agent";
                return Err(RestoreError::Usage(text.into()));
            }
        }
        let mut parts = Vec::new();
        for find::Found { owner, chain } in found {
            let ids = ids(&chain, wanted)?;
            if !ids.is_empty() {
                parts.push(Part { owner, chain, ids });
            }
        }
        if parts.is_empty() {
            let text = "there is no checkpoint of these times".to_owned();
            return Err(RestoreError::NotFound(Missing::Checkpoint, text));
        }
        Ok(Self { dir, parts })
    }

    /// The one checkpoint and disk that is meant, if it is one.
    pub fn only(&self) -> Option<(&Paths, CheckpointId)> {
        match &*self.parts {
            [Part { owner, ids, .. }] if ids.len() == 1 => Some((owner, *ids.first()?)),
            _ => None,
        }
    }

    /// Reads and checks it all.
    ///
    /// # Errors
    /// Io, Canceled; damage is the answer.
    pub fn run(&self, progress: Progress<'_>) -> Result<Vec<DiskReport>, RestoreError> {
        let mut total = 0;
        for part in &self.parts {
            let members = part.chain.members.get(..part.count()).unwrap_or_default();
            total += verify_bytes(&self.dir, &part.owner, members)?;
        }
        let mut meter = Meter::new(progress, total);
        let mut reports = Vec::new();
        for part in &self.parts {
            reports.push(part.verify(&self.dir, self.only().is_some(), &mut |bytes| meter.tick(bytes))?);
        }
        Ok(reports)
    }
}

/// The checkpoints of a disk that are wanted.
fn ids(chain: &Chain, wanted: &Wanted) -> Result<Vec<CheckpointId>, RestoreError> {
    let there = chain.ids();
    let (start, end) = match wanted {
        Wanted::Between(start, end) => (start, end),
        Wanted::Named(names) => {
            let selected: Result<Vec<_>, _> = names.iter().map(|name| select(&there, name)).collect();
            let mut ids = selected.map_err(|e| match e {
                SelectError::Form(_) => RestoreError::Usage(e.to_string()),
                SelectError::None { .. } => RestoreError::NotFound(Missing::Checkpoint, e.to_string()),
            })?;
            ids.sort();
            ids.dedup();
            return Ok(ids);
        }
    };
    let within = |id: &CheckpointId| {
        start.is_none_or(|minute| id.minute() >= minute) && end.is_none_or(|minute| id.minute() <= minute)
    };
    Ok(there.into_iter().filter(within).collect())
}

impl Part {
    /// How many members of the chain the wanted ones rest on.
    fn count(&self) -> usize {
        let newest = self.ids.last();
        self.chain.members.iter().take_while(|m| Some(&m.checkpoint.id) <= newest).count()
    }

    /// Whether the newest is wanted, on which the open journal builds.
    fn has_newest(&self) -> bool {
        self.chain.broken.is_none() && self.count() == self.chain.members.len()
    }

    fn verify(&self, dir: &Dir, only: bool, tick: Tick<'_>) -> Result<DiskReport, RestoreError> {
        let found = verify_settled(dir, &self.owner, &self.chain, self.count(), tick)?;
        let members = self.chain.members.iter().map(|m| m.checkpoint.id);
        let mut looked: Vec<_> = members.zip(found).collect();
        if self.has_newest() {
            let open = verify_open_journal(dir, &self.owner, &self.chain)?;
            looked.last_mut().into_iter().for_each(|(_, damage)| damage.extend_from_slice(&open));
        }
        if let Some((damage, lost)) = &self.chain.broken {
            let wanted = lost.first().filter(|id| Some(*id) <= self.ids.last());
            looked.extend(wanted.map(|id| (*id, vec![damage.clone()])));
        }
        let mut verified = Vec::new();
        for id in &self.ids {
            // The chain's order is that of the ids.
            let is_sound = looked.iter().all(|(at, damage)| at > id || damage.is_empty());
            verified.push(self.verified(dir, *id, is_sound, only)?);
        }
        Ok(DiskReport { owner: self.owner.clone(), verified, looked })
    }

    fn verified(
        &self,
        dir: &Dir,
        id: CheckpointId,
        is_sound: bool,
        only: bool,
    ) -> Result<Verified, RestoreError> {
        let mut verified = Verified { id, is_sound, unreadable_blocks: 0, unreadable_sectors: String::new() };
        let at = self.chain.members.iter().position(|m| m.checkpoint.id == id);
        let Some((at, member)) =
            at.filter(|_| is_sound).and_then(|at| Some((at, self.chain.members.get(at)?)))
        else {
            return Ok(verified);
        };
        verified.unreadable_blocks = member.checkpoint.unreadable_blocks;
        if only && verified.unreadable_blocks > 0 {
            let blocks = view(dir, &self.owner, &self.chain, at + 1)?.unreadable()?;
            verified.unreadable_sectors = sectors(&blocks, member.checkpoint.geometry, RANGES_MAX);
        }
        Ok(verified)
    }
}
