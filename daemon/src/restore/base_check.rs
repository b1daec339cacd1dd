//! Looks at the image of a base: block by block against the hashes beside it, and these against what was sealed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::resume_unwind;
use std::thread;

use super::RestoreError;
use super::verify::Tick;
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
    /// Io; what `tick` says. What the medium does not give back is damage.
    pub(crate) fn groups(&mut self, count: u64, tick: Tick<'_>) -> Result<Vec<Damage>, RestoreError> {
        let mut found = Found::default();
        let end = self.next.saturating_add(count).min(self.geometry.groups());
        while self.next < end {
            let batch = self.next..end.min(self.next + BATCH_GROUPS);
            let known = self.hashes(batch.clone(), &mut found)?;
            match bad_blocks(&self.img, self.geometry, &known) {
                Ok(bad) => found.bad_img.union(&bad),
                // Each by itself: what the medium gives back is looked at.
                Err(error) => {
                    error.into_damage()?;
                    for (group, hashes) in &known {
                        bad_in_group(&self.img, self.geometry, *group, hashes, &mut found.bad_img)
                            .or_else(|error| found.lose(error, extent(self.geometry, *group)))?;
                    }
                }
            }
            self.next = batch.end;
            for group in batch {
                let Extent { first, count } = extent(self.geometry, group);
                tick(self.geometry.range(first, count).1)?;
            }
        }
        Ok(found.into_damage(&self.img, &self.sum))
    }

    /// The hashes of these groups, of those that have their digest.
    fn hashes(
        &mut self,
        groups: Range<u64>,
        found: &mut Found,
    ) -> Result<Vec<(u64, Vec<BlockHash>)>, StoreError> {
        let mut known = Vec::new();
        for group in groups {
            let record = sum::read_record(&self.sum, self.geometry, group);
            let hashes = record.map(|record| {
                self.hasher.update(&record);
                sum::decode(self.geometry, group, &record)
            });
            self.sum_is_whole &= matches!(hashes, Ok(Some(_)));
            match hashes {
                Ok(Some(hashes)) => known.push((group, hashes)),
                Ok(None) => found.bad_sum.insert(extent(self.geometry, group)),
                Err(error) => found.lose(error, extent(self.geometry, group))?,
            }
        }
        Ok(known)
    }

    /// The group that is looked at next.
    pub(crate) fn next_group(&self) -> u64 {
        self.next
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

/// What is wrong with groups that were looked at.
#[derive(Default)]
struct Found {
    bad_img: BlockSet,
    bad_sum: BlockSet,
    /// What the medium does not give back, by file and what it says.
    lost: BTreeMap<(String, String), BlockSet>,
}

impl Found {
    /// Takes what is damage of an error that kept these blocks from being looked at.
    fn lose(&mut self, error: StoreError, blocks: Extent) -> Result<(), StoreError> {
        let Damage { file, what, .. } = error.into_damage()?;
        self.lost.entry((file, what)).or_default().insert(blocks);
        Ok(())
    }

    fn into_damage(self, img: &Handle, sum: &Handle) -> Vec<Damage> {
        let of = |file: &Handle, what: &str, blocks| ((file.name(), what.to_owned()), blocks);
        let bad = [
            of(img, "blocks do not have their hash", self.bad_img),
            of(sum, "the hashes of groups do not have their digest", self.bad_sum),
        ];
        let all = self.lost.into_iter().chain(bad).filter(|(_, blocks)| !blocks.is_empty());
        all.map(|((file, what), blocks)| Damage { file, what, blocks: blocks.extents(u64::MAX).collect() })
            .collect()
    }
}

fn extent(geometry: Geometry, group: u64) -> Extent {
    let (first, count) = geometry.group_extent(group);
    Extent { first, count }
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
