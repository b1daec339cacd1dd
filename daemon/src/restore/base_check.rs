//! Looks at the image of a base: block by block against the hashes beside it, and these against what was sealed.

use std::panic::resume_unwind;
use std::thread;

use super::RestoreError;
use super::verify::{Tick, damaged};
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::chain::Member;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, unsound};
use crate::store::handle::{Dir, Handle};
use crate::store::layout::Paths;
use crate::store::{Damage, StoreError, sum};

/// Groups of a base that are looked at together, by two threads.
const BATCH_GROUPS: u64 = 16;

/// A base image and its hashes, looked at in groups from the first one to the last.
pub(crate) struct BaseCheck {
    geometry: Geometry,
    img: Handle,
    sum: Handle,
    /// What the records are to hash to, and do so far.
    content: [u8; 32],
    hasher: blake3::Hasher,
    sum_is_whole: bool,
    next: u64,
}

impl BaseCheck {
    /// Begins at a group; the hashes of those before are read (`tick` hears of their bytes), and not looked at. Gives the
    /// damage that shows already.
    ///
    /// # Errors
    /// Damaged if nothing can be looked at; Io; what `tick` says.
    pub(crate) fn open(
        dir: &Dir,
        owner: &Paths,
        member: &Member,
        from_group: u64,
        tick: Tick<'_>,
    ) -> Result<(Self, Option<Damage>), RestoreError> {
        let (id, geometry) = (member.checkpoint.id, member.checkpoint.geometry);
        let img = dir.open(&owner.img(id), false)?;
        let sum = dir.open(&owner.sum(id), false)?;
        let (img_bytes, sum_bytes) = (img.len()?, sum.len()?);
        let wrong_size = (img_bytes != geometry.size_bytes()).then(|| {
            let what = format!("it has {img_bytes} bytes, the disk {}", geometry.size_bytes());
            Damage::new(img.name(), what)
        });
        if sum_bytes != sum::file_bytes(geometry) {
            let what = format!("it has {sum_bytes} bytes, not {}", sum::file_bytes(geometry));
            let damage = wrong_size.into_iter().chain([Damage::new(sum.name(), what)]);
            return Err(RestoreError::Damaged(damage.collect()));
        }
        let mut hasher = blake3::Hasher::new();
        for group in 0..from_group.min(geometry.groups()) {
            hasher.update(&sum::read_record(&sum, geometry, group)?);
            tick(sum::record_bytes(geometry))?;
        }
        let content = member.header.content;
        Ok((Self { geometry, img, sum, content, hasher, sum_is_whole: true, next: from_group }, wrong_size))
    }

    /// Looks at the next `count` groups, as far as there are so many. `tick` hears of the bytes of the image.
    ///
    /// # Errors
    /// Damaged if the hashes cannot be looked at; Io; what `tick` says.
    pub(crate) fn groups(&mut self, count: u64, tick: Tick<'_>) -> Result<Vec<Damage>, RestoreError> {
        let geometry = self.geometry;
        let (mut bad_img, mut bad_sum) = (BlockSet::new(), BlockSet::new());
        let end = self.next.saturating_add(count).min(geometry.groups());
        while self.next < end {
            let batch = self.next..end.min(self.next + BATCH_GROUPS);
            let mut known = Vec::new();
            for group in batch.clone() {
                let record = sum::read_record(&self.sum, geometry, group)?;
                self.hasher.update(&record);
                let (first, count) = geometry.group_extent(group);
                match sum::decode(geometry, group, &record) {
                    Some(hashes) => known.push((group, hashes)),
                    None => bad_sum.insert(Extent { first, count }),
                }
            }
            bad_img.union(&bad_blocks(&self.img, geometry, &known)?);
            self.next = batch.end;
            for group in batch {
                let (first, count) = geometry.group_extent(group);
                tick(geometry.range(first, count).1)?;
            }
        }
        let mut found = Vec::new();
        if !bad_img.is_empty() {
            found.push(damaged(&self.img, "blocks do not have their hash", &bad_img));
        }
        if !bad_sum.is_empty() {
            self.sum_is_whole = false;
            found.push(damaged(&self.sum, "the hashes of groups do not have their digest", &bad_sum));
        }
        Ok(found)
    }

    /// The group that is looked at next.
    pub(crate) fn next_group(&self) -> u64 {
        self.next
    }

    /// Leaves out a group that cannot be looked at.
    pub(crate) fn skip(&mut self) {
        self.next += 1;
        self.sum_is_whole = false;
    }

    /// Whether all groups were looked at.
    pub(crate) fn is_done(&self) -> bool {
        self.next >= self.geometry.groups()
    }

    /// What only shows when all were: whether the hashes are those that were sealed.
    pub(crate) fn finish(self) -> Option<Damage> {
        let differ = *self.hasher.finalize().as_bytes() != self.content;
        (self.sum_is_whole && differ)
            .then(|| Damage::new(self.sum.name(), "its records are not those it was sealed with"))
    }
}

/// The blocks of these groups that do not have their hash; a second thread looks at half of them.
fn bad_blocks(
    img: &Handle,
    geometry: Geometry,
    groups: &[(u64, Vec<BlockHash>)],
) -> Result<BlockSet, StoreError> {
    let look = |part: &[(u64, Vec<BlockHash>)]| {
        let mut bad = BlockSet::new();
        for (group, hashes) in part {
            bad_in_group(img, geometry, *group, hashes, &mut bad)?;
        }
        Ok::<_, StoreError>(bad)
    };
    let (here, there) = groups.split_at(groups.len().div_ceil(2));
    if there.is_empty() {
        return look(here);
    }
    thread::scope(|scope| {
        let helper = thread::Builder::new().name("verify".to_owned()).spawn_scoped(scope, || look(there));
        let mut bad = look(here)?;
        bad.union(&match helper {
            Ok(helper) => helper.join().unwrap_or_else(|panic| resume_unwind(panic))?,
            // The system gives no thread.
            Err(_) => look(there)?,
        });
        Ok(bad)
    })
}

fn bad_in_group(
    img: &Handle,
    geometry: Geometry,
    group: u64,
    hashes: &[BlockHash],
    bad: &mut BlockSet,
) -> Result<(), StoreError> {
    let (first, count) = geometry.group_extent(group);
    let (offset, len) = geometry.range(first, count);
    let readable = img.len()?.saturating_sub(offset).min(len);
    let hole = img.next_data(offset)?.is_none_or(|(start, _)| start >= offset + len);
    if hole && readable == len && hashes.iter().all(|h| *h == BlockHash::ZERO) {
        return Ok(());
    }
    let mut data = img.read_vec(readable as usize, offset)?;
    if readable < len {
        // A block that is cut short is none, whatever is left of it.
        data.truncate(data.len() - data.len() % geometry.block_bytes());
    }
    let found = unsound(&data, hashes, geometry.block_bytes());
    found.for_each(|at| bad.insert(Extent { first: first + at, count: 1 }));
    Ok(())
}
