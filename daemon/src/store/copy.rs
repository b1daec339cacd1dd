//! A full copy under way: `copy.img.part` and `copy.sum.part`.
//!
//! A group counts as present once its record is in the `.sum`, and the record is written only when all its blocks
//! are in the image and durable there: what must never happen is a record that is true of no image.

use std::collections::BTreeMap;

use super::StoreError;
use super::handle::{Dir, Handle};
use super::layout::{HEADER_BYTES, Header, Kind, Paths};
use super::sum;
use crate::bitmap::{BlockSet, Extent};
use crate::geometry::Geometry;
use crate::hash::{BlockHash, insert_unreadable};
use crate::run::Run;

/// Groups of which some blocks have arrived and others have not; an agent sends one after the other.
const ARRIVING_MAX: usize = 64;

/// The files of a copy under way, opened for writing.
pub(super) struct Copy {
    pub(super) header: Header,
    img: Handle,
    sum: Handle,
    /// Groups whose record is in the file.
    present: BlockSet,
    /// Blocks of groups that are there which could not be read.
    unreadable: BlockSet,
    /// Groups that have not arrived whole: the hashes so far.
    arriving: BTreeMap<u64, Vec<Option<BlockHash>>>,
    /// Groups whose record waits until the image is durable.
    waiting: BTreeMap<u64, Vec<BlockHash>>,
    /// Made by this object: where it has no data it never had any.
    is_new: bool,
    img_dirty: bool,
    sum_dirty: bool,
    named: bool,
}

impl Copy {
    /// Begins a copy; nothing is durable before [`Self::sync`].
    pub(super) fn create(dir: &Dir, owner: &Paths, header: Header) -> Result<Self, StoreError> {
        let img = dir.create(&owner.copy_img())?;
        img.set_len(header.geometry.size_bytes())?;
        let sum = dir.create(&owner.copy_sum())?;
        sum.set_len(sum::file_bytes(header.geometry))?;
        sum.write(&header.encode(), 0)?;
        Ok(Self::over(header, img, sum, BlockSet::new(), true))
    }

    fn over(header: Header, img: Handle, sum: Handle, present: BlockSet, is_new: bool) -> Self {
        let (arriving, waiting) = (BTreeMap::new(), BTreeMap::new());
        Self {
            header,
            img,
            sum,
            present,
            unreadable: BlockSet::new(),
            arriving,
            waiting,
            is_new,
            img_dirty: is_new,
            sum_dirty: is_new,
            named: false,
        }
    }

    /// The file of the records.
    pub(super) fn sum(&self) -> &Handle {
        &self.sum
    }

    /// Goes on with a copy that was found, whose records are to be made durable; `None` if there is none that can be gone on with.
    pub(super) fn resume(dir: &Dir, owner: &Paths) -> Result<Option<Self>, StoreError> {
        let (Some(img), Some(sum)) =
            (dir.open_existing(&owner.copy_img(), true)?, dir.open_existing(&owner.copy_sum(), true)?)
        else {
            return Ok(None);
        };
        if sum.len()? < HEADER_BYTES as u64 {
            return Ok(None);
        }
        let Ok((header, _)) = Header::decode(Kind::Sum, &sum.read_vec(HEADER_BYTES, 0)?) else {
            return Ok(None);
        };
        let geometry = header.geometry;
        let sized = sum.len()? == sum::file_bytes(geometry) && img.len()? == geometry.size_bytes();
        if !sized || !header.is_of(owner) {
            return Ok(None);
        }
        let (mut present, mut unreadable) = (BlockSet::new(), BlockSet::new());
        let mut at = 0;
        while let Some((start, _)) = sum.next_data(at)? {
            // A record that a power cut tore is one that never arrived.
            let group = start.saturating_sub(HEADER_BYTES as u64) / sum::record_bytes(geometry);
            let group = group.max(at.saturating_sub(HEADER_BYTES as u64) / sum::record_bytes(geometry));
            if group >= geometry.groups() {
                break;
            }
            if let Some(hashes) = sum::decode(geometry, group, &sum::read_record(&sum, geometry, group)?) {
                present.insert(Extent { first: group, count: 1 });
                insert_unreadable(geometry.group_extent(group).0, &hashes, &mut unreadable);
            }
            at = sum::record_offset(geometry, group + 1);
        }
        Ok(Some(Self { unreadable, ..Self::over(header, img, sum, present, false) }))
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    pub(super) fn groups_present(&self) -> u64 {
        self.present.len() + self.waiting.len() as u64
    }

    /// Blocks that have arrived as ones that could not be read.
    pub(super) fn unreadable(&self) -> &BlockSet {
        &self.unreadable
    }

    pub(super) fn is_complete(&self) -> bool {
        self.groups_present() == self.geometry().groups()
    }

    /// The hashes of a group that is there.
    pub(super) fn hashes(&self, group: u64) -> Result<Option<Vec<BlockHash>>, StoreError> {
        if let Some(hashes) = self.waiting.get(&group) {
            return Ok(Some(hashes.clone()));
        }
        if !self.present.contains(group) {
            return Ok(None);
        }
        sum::read(&self.sum, self.geometry(), group).map(Some)
    }

    /// Takes in blocks of one group; `data` is the run's, unpacked and checked.
    pub(super) fn put(&mut self, run: &Run, data: Option<&[u8]>) -> Result<(), StoreError> {
        let (geometry, extent) = (self.geometry(), run.extent());
        let group = extent.first / geometry.group_blocks();
        let (first, blocks) = geometry.group_extent(group);
        if extent.end() > first + blocks {
            return Err(StoreError::Refused(format!(
                "blocks {}+{} cross the border of a group",
                extent.first, extent.count
            )));
        }
        let skip = extent.first - first;
        if let Some(known) = self.hashes(group)? {
            // A run that is sent again is no news; a changed block belongs into the delta.
            let same = (0..extent.count).all(|i| known.get((skip + i) as usize) == Some(&run.hash(i)));
            return same.then_some(()).ok_or_else(|| {
                StoreError::Refused(format!(
                    "group {group} is copied already; what changed belongs into the delta"
                ))
            });
        }
        let (offset, len) = geometry.range(extent.first, extent.count);
        if !self.arriving.contains_key(&group) && self.arriving.len() >= ARRIVING_MAX {
            return Err(StoreError::Refused("too many groups were begun and not finished".to_owned()));
        }
        match data {
            Some(data) => self.img.write(data, offset)?,
            None if self.is_new && self.is_hole(offset, len)? => {}
            None => self.img.clear(offset, len)?,
        }
        self.img_dirty = true;
        let hashes = self.arriving.entry(group).or_insert_with(|| vec![None; blocks as usize]);
        for (slot, i) in hashes.iter_mut().skip(skip as usize).zip(0..extent.count) {
            *slot = Some(run.hash(i));
        }
        if let Some(whole) = hashes.iter().copied().collect::<Option<Vec<_>>>() {
            self.arriving.remove(&group);
            insert_unreadable(first, &whole, &mut self.unreadable);
            self.waiting.insert(group, whole);
        }
        Ok(())
    }

    /// Takes back the records that are not known to be durable, after an error of the file system: their groups come again.
    pub(super) fn cut_back(&self) -> Result<(), StoreError> {
        let geometry = self.geometry();
        let none = vec![0; sum::record_bytes(geometry) as usize];
        self.waiting.keys().try_for_each(|group| self.sum.write(&none, sum::record_offset(geometry, *group)))
    }

    fn is_hole(&self, offset: u64, len: u64) -> Result<bool, StoreError> {
        Ok(self.img.next_data(offset)?.is_none_or(|(start, _)| start >= offset + len))
    }

    /// Makes the image durable, then the records that say so.
    pub(super) fn sync(&mut self, dir: &Dir) -> Result<(), StoreError> {
        if self.img_dirty {
            self.img.sync()?;
            self.img_dirty = false;
        }
        let geometry = self.geometry();
        for (group, hashes) in &self.waiting {
            self.sum.write(&sum::encode(geometry, hashes), sum::record_offset(geometry, *group))?;
            self.sum_dirty = true;
        }
        if self.sum_dirty {
            self.sum.sync()?;
            self.sum_dirty = false;
        }
        for group in std::mem::take(&mut self.waiting).into_keys() {
            self.present.insert(Extent { first: group, count: 1 });
        }
        if !self.named {
            dir.sync_names(self.sum.path())?;
            self.named = true;
        }
        Ok(())
    }
}
