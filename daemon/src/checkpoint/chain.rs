//! The checkpoints of a disk as its files tell them: the base, and the deltas that build on it one after another.
//!
//! Needs no lock and no database, and changes nothing. What must never happen here: a delta taken into the chain
//! that does not name, by id and seal, the checkpoint before it.

use crate::checkpoint::Checkpoint;
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::store::handle::{Dir, Handle};
use crate::store::layout::{HEADER_BYTES, Header, Kind, Link, Paths, id_in_name};
use crate::store::{Damage, StoreError, bak};

/// One checkpoint and what its files say.
#[derive(Debug, Clone)]
pub struct Member {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// Its closing header.
    pub header: Header,
    /// What the next one must name as its parent.
    pub link: Link,
}

/// The checkpoints of a disk, base first.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    /// Those that hang together.
    pub members: Vec<Member>,
    /// The first place where the chain breaks, and the checkpoints that lie there and behind (by file name).
    pub broken: Option<(Damage, Vec<CheckpointId>)>,
}

impl Chain {
    /// The newest checkpoint that hangs together with the base.
    pub fn newest(&self) -> Option<&Member> {
        self.members.last()
    }

    /// Every id there is a file of, damaged or not, in order.
    pub fn ids(&self) -> Vec<CheckpointId> {
        let lost = self.broken.iter().flat_map(|(_, ids)| ids.iter().copied());
        self.members.iter().map(|m| m.checkpoint.id).chain(lost).collect()
    }
}

fn ids_in(dir: &Dir, path: &std::path::Path, extension: &str) -> Result<Vec<CheckpointId>, StoreError> {
    let mut ids: Vec<_> = dir.list(path)?.iter().filter_map(|n| id_in_name(n, extension)).collect();
    ids.sort();
    Ok(ids)
}

/// Checkpoints that have a sealed journal.
///
/// # Errors
/// Io.
pub fn journal_ids(dir: &Dir, owner: &Paths) -> Result<Vec<CheckpointId>, StoreError> {
    ids_in(dir, &owner.live_dir(), "cst")
}

/// Reads the chain of a disk.
///
/// # Errors
/// Io. Damage is part of the answer.
pub fn load(dir: &Dir, owner: &Paths) -> Result<Chain, StoreError> {
    load_with(dir, owner, |error| match error {
        StoreError::Damaged(damage) => Ok(damage),
        other => Err(other),
    })
}

/// As [`load`], for who only reads: what the medium does not give back is damage as well.
///
/// # Errors
/// Io.
pub fn load_readable(dir: &Dir, owner: &Paths) -> Result<Chain, StoreError> {
    load_with(dir, owner, StoreError::into_damage)
}

/// What of an error is damage.
type AsDamage = fn(StoreError) -> Result<Damage, StoreError>;

fn load_with(dir: &Dir, owner: &Paths, as_damage: AsDamage) -> Result<Chain, StoreError> {
    let mut chain = load_members(dir, owner, as_damage)?;
    if chain.broken.is_none() {
        let orphans = orphans(dir, owner, &chain)?;
        if let Some(first) = orphans.first() {
            if dir.exists(&owner.bak(*first))? || dir.exists(&owner.sum(*first))? {
                // Committed while this was reading.
                return load_members(dir, owner, as_damage);
            }
            let lost = if chain.members.is_empty() { owner.sum(*first) } else { owner.bak(*first) };
            let damage = Damage::new(
                lost.display().to_string(),
                "the file is missing, others of its checkpoint are there",
            );
            chain.broken = Some((damage, orphans));
        }
    }
    Ok(chain)
}

/// Checkpoints behind the chain of which only a sealed journal or an image is there, and no commit under way that
/// explains it.
fn orphans(dir: &Dir, owner: &Paths, chain: &Chain) -> Result<Vec<CheckpointId>, StoreError> {
    let newest = chain.newest().map(|m| m.checkpoint.id);
    let mut ids = journal_ids(dir, owner)?;
    ids.extend(ids_in(dir, &owner.snapshot_dir(), "img")?);
    ids.retain(|id| Some(*id) > newest);
    ids.sort();
    ids.dedup();
    if !ids.is_empty() && dir.exists(&owner.next_bak())? {
        ids.clear();
    }
    Ok(ids)
}

fn load_members(dir: &Dir, owner: &Paths, as_damage: AsDamage) -> Result<Chain, StoreError> {
    let mut chain = Chain::default();
    // Deltas first: a base is there before the first of them, whatever is committed meanwhile.
    let deltas = ids_in(dir, &owner.incremental_dir(), "bak")?;
    let bases = ids_in(dir, &owner.snapshot_dir(), "sum")?;
    let mut all = bases.iter().map(|id| (*id, true)).chain(deltas.iter().map(|id| (*id, false)));
    let mut next = all.next();
    while let Some((id, is_base)) = next {
        match member(dir, owner, id, is_base, chain.newest()) {
            Ok(member) => chain.members.push(member),
            Err(error) => {
                let damage = as_damage(error)?;
                let mut lost: Vec<_> = std::iter::once(id).chain(all.map(|(id, _)| id)).collect();
                // One whose delta is gone still has its journal.
                lost.extend(journal_ids(dir, owner)?);
                let last = chain.newest().map(|m| m.checkpoint.id);
                lost.retain(|id| Some(*id) > last);
                lost.sort();
                lost.dedup();
                chain.broken = Some((damage, lost));
                return Ok(chain);
            }
        }
        next = all.next();
    }
    Ok(chain)
}

fn read_header(
    dir: &Dir,
    owner: &Paths,
    id: CheckpointId,
    is_base: bool,
) -> Result<(Handle, Header, Link), StoreError> {
    let file = dir.open(&if is_base { owner.sum(id) } else { owner.bak(id) }, false)?;
    let (header, seal) = if is_base {
        let decoded = Header::decode(Kind::Sum, &file.read_vec(HEADER_BYTES, 0)?);
        decoded.map_err(|what| file.damaged(what))?
    } else {
        bak::read_closing(&file)?
    };
    Ok((file, header, Link { id, seal }))
}

fn member(
    dir: &Dir,
    owner: &Paths,
    id: CheckpointId,
    is_base: bool,
    before: Option<&Member>,
) -> Result<Member, StoreError> {
    let (file, header, link) = read_header(dir, owner, id, is_base)?;
    if !header.is_of(owner) {
        return Err(file.damaged(format!("it belongs to {}/{}", header.agent, header.disk)));
    }
    let checkpoint = header.checkpoint().ok_or_else(|| file.damaged("it was never sealed"))?;
    if checkpoint.id != id {
        return Err(file.damaged(format!("it is checkpoint {}", checkpoint.id)));
    }
    match (header.parent, before) {
        (None, None) if is_base => {}
        (_, Some(_)) if is_base => return Err(file.damaged("it is a second base image of this disk")),
        (Some(parent), Some(before)) if parent == before.link => {}
        (Some(parent), Some(before)) if parent.id == before.link.id => {
            return Err(
                file.damaged(format!("it builds on another checkpoint {} than the one here", parent.id))
            );
        }
        (Some(parent), Some(before)) if parent.id < before.link.id => {
            return Err(file.damaged(format!("it builds on {}, not on {}", parent.id, before.link.id)));
        }
        (Some(parent), before) => {
            let missing = match before {
                Some(_) => owner.bak(parent.id),
                None => owner.sum(parent.id),
            };
            let what = format!("the file is missing ({} builds on it)", file.name());
            return Err(StoreError::damaged(missing.display().to_string(), what));
        }
        (None, _) => return Err(file.damaged("it does not say on what it builds")),
    }
    if before.is_some_and(|b| b.header.geometry.block_shift() != header.geometry.block_shift()) {
        return Err(file.damaged("its block size differs from that of the checkpoint before"));
    }
    if is_base && !dir.exists(&owner.img(id))? {
        return Err(StoreError::damaged(owner.img(id).display().to_string(), "the file is missing"));
    }
    Ok(Member { checkpoint, header, link })
}

/// The disks of an agent that there are files of.
///
/// # Errors
/// Io.
pub fn disks(dir: &Dir, agent: &AgentId) -> Result<Vec<DiskId>, StoreError> {
    let mut disks: Vec<DiskId> = Vec::new();
    for top in ["snapshot", "incremental", "live"] {
        let names = dir.list(&std::path::Path::new(top).join(agent.as_str()))?;
        disks.extend(names.iter().filter_map(|n| n.parse().ok()));
    }
    disks.sort();
    disks.dedup();
    Ok(disks)
}

/// The agents that there are files of.
///
/// # Errors
/// Io.
pub fn agents(dir: &Dir) -> Result<Vec<AgentId>, StoreError> {
    Ok(dir.list(std::path::Path::new("snapshot"))?.iter().filter_map(|n| n.parse().ok()).collect())
}
