//! Looks at every byte a checkpoint rests on: the base image against its hashes, every delta up to it, every journal.
//!
//! All damage is listed, not only the first. What must never happen here: damage passed over because something
//! before it was damaged too.

use std::collections::BTreeMap;

use super::RestoreError;
use super::base_check::BaseCheck;
use crate::bitmap::BlockSet;
use crate::checkpoint::chain::{self, Chain, Member};
use crate::store::handle::{Dir, Handle};
use crate::store::layers::Layers;
use crate::store::layout::Paths;
use crate::store::view::View;
use crate::store::{Damage, StoreError, bak, block_map, cst};

/// Told the bytes that were looked at or written since the last call; its error ends the work.
pub type Tick<'a> = &'a mut dyn FnMut(u64) -> Result<(), RestoreError>;

struct Verifier<'a> {
    dir: &'a Dir,
    owner: &'a Paths,
    damage: Vec<Damage>,
}

/// The bytes [`verify`] will report to its `tick`.
///
/// # Errors
/// Io.
pub fn verify_bytes(dir: &Dir, owner: &Paths, members: &[Member]) -> Result<u64, StoreError> {
    let mut bytes = 0;
    for (i, member) in members.iter().enumerate() {
        bytes += match dir.open_existing(&owner.bak(member.checkpoint.id), false)? {
            _ if i == 0 => member.checkpoint.geometry.size_bytes(),
            Some(file) => file.len()?,
            None => 0,
        };
    }
    Ok(bytes)
}

/// Verifies everything the first `count` members of the chain rest on.
///
/// # Errors
/// Io, and what `tick` says; damage is the answer.
pub fn verify(
    dir: &Dir,
    owner: &Paths,
    chain: &Chain,
    count: usize,
    tick: Tick<'_>,
) -> Result<Vec<Damage>, RestoreError> {
    Ok(verify_each(dir, owner, chain, count, tick)?.concat())
}

/// The same, and what is damaged of each member by itself.
///
/// # Errors
/// Io, and what `tick` says; damage is the answer.
pub fn verify_each(
    dir: &Dir,
    owner: &Paths,
    chain: &Chain,
    count: usize,
    tick: Tick<'_>,
) -> Result<Vec<Vec<Damage>>, RestoreError> {
    let mut each = Vec::new();
    for (i, member) in chain.members.iter().take(count).enumerate() {
        each.push(match i {
            0 => verify_base(dir, owner, member, tick)?,
            _ => verify_delta(dir, owner, member, tick)?,
        });
        tick(0)?;
    }
    Ok(each)
}

/// The same, once more if a commit changed the files meanwhile.
///
/// # Errors
/// Io, and what `tick` says; damage is the answer.
pub fn verify_settled(
    dir: &Dir,
    owner: &Paths,
    chain: &Chain,
    count: usize,
    tick: Tick<'_>,
) -> Result<Vec<Vec<Damage>>, RestoreError> {
    let found = verify_each(dir, owner, chain, count, tick)?;
    if found.iter().all(Vec::is_empty) {
        return Ok(found);
    }
    let again = chain::load_readable(dir, owner)?;
    let moved = again.newest().map(|m| m.link) != chain.newest().map(|m| m.link);
    if moved { verify_each(dir, owner, &again, count, tick) } else { Ok(found) }
}

/// Verifies what a base consists of: image, hashes and journal.
fn verify_base(
    dir: &Dir,
    owner: &Paths,
    member: &Member,
    tick: Tick<'_>,
) -> Result<Vec<Damage>, RestoreError> {
    let mut v = Verifier { dir, owner, damage: Vec::new() };
    let opened = BaseCheck::open(dir, owner, member, 0, tick);
    if let Some((mut check, wrong_size)) = v.note(opened)? {
        v.damage.extend(wrong_size);
        let found = check.groups(u64::MAX, tick);
        if let Some(found) = v.note(found)? {
            v.damage.extend(found);
            v.damage.extend(check.finish());
        }
    }
    v.damage.extend(verify_base_journal(dir, owner, member)?);
    Ok(v.damage)
}

/// Verifies the journal of a base.
///
/// # Errors
/// Io; damage is the answer.
pub fn verify_base_journal(dir: &Dir, owner: &Paths, member: &Member) -> Result<Vec<Damage>, RestoreError> {
    let mut v = Verifier { dir, owner, damage: Vec::new() };
    let found = v.journal(member, None);
    v.note(found)?;
    Ok(v.damage)
}

/// Verifies what a delta consists of: the `.bak` and its journal. `tick` hears of the bytes of the former.
///
/// # Errors
/// Io, and what `tick` says; damage is the answer.
pub fn verify_delta(
    dir: &Dir,
    owner: &Paths,
    member: &Member,
    tick: Tick<'_>,
) -> Result<Vec<Damage>, RestoreError> {
    let mut v = Verifier { dir, owner, damage: Vec::new() };
    let found = v.delta(member, tick);
    let blocks = v.note(found)?.flatten();
    let found = v.journal(member, blocks.as_ref());
    v.note(found)?;
    Ok(v.damage)
}

/// Damage of the open journal, on which no checkpoint rests: the next one will. Looks once more if there seems to be some: a
/// commit meanwhile begins another one.
///
/// # Errors
/// Io; damage is the answer.
pub fn verify_open_journal(dir: &Dir, owner: &Paths, chain: &Chain) -> Result<Vec<Damage>, RestoreError> {
    let look = |chain: &Chain| {
        let mut v = Verifier { dir, owner, damage: Vec::new() };
        let found = v.open_journal(chain);
        v.note(found)?;
        Ok(v.damage)
    };
    let found = look(chain)?;
    if found.is_empty() { Ok(found) } else { look(&chain::load_readable(dir, owner)?) }
}

/// The disk as of the last of the first `count` members.
///
/// # Errors
/// Damaged; Io.
pub fn view(dir: &Dir, owner: &Paths, chain: &Chain, count: usize) -> Result<View, StoreError> {
    let (mut layers, mut map) = (Layers::default(), block_map::BlockMap::default());
    let mut members = chain.members.iter().take(count);
    let base = members.next().ok_or_else(|| StoreError::Refused("there is no base image".into()))?;
    let mut geometry = base.checkpoint.geometry;
    for member in members {
        let before = std::mem::replace(&mut geometry, member.checkpoint.geometry);
        let layer = layers.push(member.link, geometry);
        let pieces = bak::read_index(&layers.file(dir, owner, layer)?.0, &member.header, layer)?;
        map.lay(layer, &pieces, before.blocks(), geometry.blocks());
    }
    View::new(dir.clone(), owner.clone(), geometry, &base.checkpoint, layers, map)
}

impl Verifier<'_> {
    /// Keeps damage and lets other errors through.
    fn note<T, E: Into<RestoreError>>(&mut self, result: Result<T, E>) -> Result<Option<T>, RestoreError> {
        match result.map_err(Into::into) {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                self.damage.extend(error.into_damage()?);
                Ok(None)
            }
        }
    }

    fn delta(&mut self, member: &Member, tick: Tick<'_>) -> Result<Option<BlockSet>, RestoreError> {
        let file = self.dir.open(&self.owner.bak(member.checkpoint.id), false)?;
        let mut left = file.len()?;
        let scan = bak::scan(&file, self.owner, &mut |bytes| {
            left = left.saturating_sub(bytes);
            tick(bytes)
        });
        if let Ok(bak::Scan { sealed: Some((closing, seal)), map, .. }) = &scan
            && (closing, *seal) == (&member.header, member.link.seal)
        {
            tick(left)?;
            return Ok(Some(map.blocks()));
        }
        let what = match scan {
            Err(RestoreError::Store(error)) => error.into_damage()?.what,
            Err(error) if !matches!(error, RestoreError::Damaged(_)) => return Err(error),
            _ => "its content is not what it was sealed with".to_owned(),
        };
        let blocks = self.bad_records(&file, member, &mut |bytes| {
            let untold = bytes.min(left);
            left -= untold;
            tick(untold)
        })?;
        tick(left)?;
        self.damage.push(damaged(&file, &what, &blocks));
        Ok(None)
    }

    /// The blocks whose newest data lies in a record that is not whole. `tick` hears of the bytes of those that are.
    fn bad_records(
        &mut self,
        file: &Handle,
        member: &Member,
        tick: Tick<'_>,
    ) -> Result<BlockSet, RestoreError> {
        let geometry = member.checkpoint.geometry;
        let mut bad = BlockSet::new();
        let index = bak::read_index(file, &member.header, 0);
        let Some(map) = self.note(index)? else { return Ok(bad) };
        let mut by_record = BTreeMap::<u64, BlockSet>::new();
        for piece in map.pieces() {
            by_record.entry(piece.record).or_default().insert(piece.extent);
        }
        for (record, blocks) in by_record {
            let mut read_bytes = 0;
            let sound = match bak::read_run(file, geometry, record) {
                Ok(run) => {
                    read_bytes = run.encoded_len() as u64;
                    run.unpack(geometry).is_ok()
                }
                Err(error) => {
                    error.into_damage()?;
                    false
                }
            };
            if !sound {
                bad.union(&blocks);
            }
            tick(read_bytes)?;
        }
        Ok(bad)
    }

    fn journal(&mut self, member: &Member, delta: Option<&BlockSet>) -> Result<(), StoreError> {
        let id = member.checkpoint.id;
        let file = self.dir.open(&self.owner.cst(id), false)?;
        let journal = cst::read(&file, self.owner, Some(id))?;
        let journal = journal.ok_or_else(|| file.damaged("it is empty"))?;
        let sealed = journal.sealed.map(|(_, total)| total) == Some(member.header.journal);
        if !sealed || journal.header.parent != member.header.parent {
            return Err(file.damaged(format!("it is not the journal that checkpoint {id} was sealed with")));
        }
        if let Some(delta) = delta {
            let mut left = journal.reported;
            left.subtract(delta);
            if !left.is_empty() {
                let delta_file = self.dir.open(&self.owner.bak(id), false)?;
                let what = "blocks that were reported changed are not in it";
                self.damage.push(damaged(&delta_file, what, &left));
            }
        }
        Ok(())
    }

    fn open_journal(&mut self, chain: &Chain) -> Result<(), StoreError> {
        let Some(file) = self.dir.open_existing(&self.owner.next_cst(), false)? else { return Ok(()) };
        let Some(journal) = cst::read(&file, self.owner, None)? else { return Ok(()) };
        if journal.header.parent != chain.newest().map(|m| m.link) {
            return Err(file.damaged("it does not build on the newest checkpoint"));
        }
        Ok(())
    }
}

fn damaged(file: &Handle, what: &str, blocks: &BlockSet) -> Damage {
    Damage { file: file.name(), what: what.to_owned(), blocks: blocks.extents(u64::MAX).collect() }
}
