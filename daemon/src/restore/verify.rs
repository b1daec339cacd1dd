//! Looks at every byte a checkpoint rests on: the base image against its hashes, every delta up to it, every journal.
//!
//! All damage is listed, not only the first. What must never happen here: damage passed over because something
//! before it was damaged too.

use super::RestoreError;
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::chain::{Chain, Member};
use crate::hash::BlockHash;
use crate::store::handle::{Dir, Handle};
use crate::store::layers::Layers;
use crate::store::layout::Paths;
use crate::store::view::View;
use crate::store::{Damage, StoreError, bak, block_map, cst, sum};

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
    let mut v = Verifier { dir, owner, damage: Vec::new() };
    let members = chain.members.iter().take(count);
    for (i, member) in members.enumerate() {
        let found = if i == 0 { v.base(member, tick) } else { v.delta(member, tick) };
        let blocks = v.note(found)?.flatten();
        let found = v.journal(member, blocks.as_ref());
        v.note(found)?;
        tick(0)?;
    }
    Ok(v.damage)
}

/// Damage of the open journal, on which no checkpoint rests: the next one will.
///
/// # Errors
/// Io; damage is the answer.
pub fn verify_open_journal(dir: &Dir, owner: &Paths, chain: &Chain) -> Result<Vec<Damage>, RestoreError> {
    let mut v = Verifier { dir, owner, damage: Vec::new() };
    let found = v.open_journal(chain);
    v.note(found)?;
    Ok(v.damage)
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
        let layer = layers.push(member.checkpoint.id, geometry);
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
            Err(RestoreError::Damaged(damage)) => {
                self.damage.extend(damage);
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    fn add(&mut self, file: &Handle, what: &str, blocks: &BlockSet) {
        let blocks: Vec<Extent> = blocks.extents(u64::MAX).collect();
        self.damage.push(Damage { file: file.name(), what: what.to_owned(), blocks });
    }

    fn base(&mut self, member: &Member, tick: Tick<'_>) -> Result<Option<BlockSet>, RestoreError> {
        let (id, geometry) = (member.checkpoint.id, member.checkpoint.geometry);
        let img = self.dir.open(&self.owner.img(id), false)?;
        let sum = self.dir.open(&self.owner.sum(id), false)?;
        if img.len()? != geometry.size_bytes() {
            let found =
                img.damaged(format!("it has {} bytes, the disk {}", img.len()?, geometry.size_bytes()));
            self.note::<(), _>(Err(found))?;
        }
        if sum.len()? != sum::file_bytes(geometry) {
            let what = format!("it has {} bytes, not {}", sum.len()?, sum::file_bytes(geometry));
            return Err(sum.damaged(what).into());
        }
        let (mut bad_img, mut bad_sum) = (BlockSet::new(), BlockSet::new());
        let mut hasher = blake3::Hasher::new();
        for group in 0..geometry.groups() {
            let (first, count) = geometry.group_extent(group);
            let record = sum::read_record(&sum, geometry, group)?;
            hasher.update(&record);
            match sum::decode(geometry, group, &record) {
                Some(hashes) => bad_blocks(&img, member, group, &hashes, &mut bad_img)?,
                None => bad_sum.insert(Extent { first, count }),
            }
            tick(geometry.range(first, count).1)?;
        }
        if !bad_img.is_empty() {
            self.add(&img, "blocks do not have their hash", &bad_img);
        }
        if !bad_sum.is_empty() {
            self.add(&sum, "the hashes of groups do not have their digest", &bad_sum);
        } else if *hasher.finalize().as_bytes() != member.header.content {
            return Err(sum.damaged("its records are not those it was sealed with").into());
        }
        Ok(None)
    }

    fn delta(&mut self, member: &Member, tick: Tick<'_>) -> Result<Option<BlockSet>, RestoreError> {
        let file = self.dir.open(&self.owner.bak(member.checkpoint.id), false)?;
        let mut left = file.len()?;
        let scan = bak::scan(&file, self.owner, &mut |bytes| {
            left = left.saturating_sub(bytes);
            tick(bytes)
        });
        tick(left)?;
        if let Ok(bak::Scan { sealed: Some((closing, seal)), map, .. }) = &scan
            && (closing, *seal) == (&member.header, member.link.seal)
        {
            return Ok(Some(map.blocks()));
        }
        if let Err(e) = scan
            && !matches!(e, RestoreError::Damaged(_))
        {
            return Err(e);
        }
        let blocks = self.bad_records(&file, member, tick)?;
        self.add(&file, "its content is not what it was sealed with", &blocks);
        Ok(None)
    }

    /// The blocks whose newest data lies in a record that is not whole.
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
        for piece in map.pieces() {
            tick(0)?;
            match bak::read_run(file, geometry, piece.record) {
                Ok(run) if run.unpack(geometry).is_ok() => {}
                Ok(_) | Err(StoreError::Damaged(_)) => bad.insert(piece.extent),
                Err(e) => return Err(e.into()),
            }
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
                self.add(&delta_file, "blocks that were reported changed are not in it", &left);
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

fn bad_blocks(
    img: &Handle,
    member: &Member,
    group: u64,
    hashes: &[BlockHash],
    bad: &mut BlockSet,
) -> Result<(), StoreError> {
    let geometry = member.checkpoint.geometry;
    let (first, count) = geometry.group_extent(group);
    let (offset, len) = geometry.range(first, count);
    let readable = img.len()?.saturating_sub(offset).min(len);
    let hole = img.next_data(offset)?.is_none_or(|(start, _)| start >= offset + len);
    if hole && readable == len && hashes.iter().all(|h| *h == BlockHash::ZERO) {
        return Ok(());
    }
    let data = img.read_vec(readable as usize, offset)?;
    let mut blocks = data.chunks(geometry.block_bytes());
    for (hash, n) in hashes.iter().zip(first..) {
        let whole = geometry.range(n, 1).1;
        let sound = blocks
            .next()
            .is_some_and(|block| block.len() as u64 == whole && hash.is_sound(block, geometry.block_bytes()));
        if !sound {
            bad.insert(Extent { first: n, count: 1 });
        }
    }
    Ok(())
}
