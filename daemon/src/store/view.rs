//! A disk as of one checkpoint: the base image with deltas laid over it. Reads only, from any number of threads, in
//! bounded memory.
//!
//! What must never happen here: a block returned that was not checked against its hash.

use std::borrow::Cow;
use std::num::NonZeroUsize;
use std::sync::Arc;

use super::bak;
use super::block_map::{BlockMap, Piece};
use super::handle::{Dir, Handle};
use super::layers::Layers;
use super::layout::Paths;
use super::recent::Recent;
use super::{StoreError, sum};
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::Checkpoint;
use crate::geometry::{GROUP_SHIFT, Geometry};
use crate::hash::{BlockHash, insert_unreadable, unsound};

/// How much is kept of the base's hashes: of 8 GiB with the usual blocks.
const HASHES_MAX_BYTES: u64 = 32 << 20;

/// Runs kept unpacked, of at most 1 MiB each: neighbouring pieces often lie in one.
const RUNS_MAX: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// A disk as of one checkpoint.
pub struct View {
    dir: Dir,
    owner: Paths,
    geometry: Geometry,
    /// The size the disk had when the base was taken.
    base: Geometry,
    img: Handle,
    sum: Handle,
    layers: Layers,
    map: BlockMap,
    base_hashes: Recent<u64, Vec<BlockHash>>,
    /// By layer and record; `None` for zeros.
    runs: Recent<(u32, u64), Option<Vec<u8>>>,
}

/// Data and the hashes it was checked against.
pub struct Checked {
    /// The bytes, cut at the end of the disk.
    pub data: Vec<u8>,
    /// The blocks' hashes.
    pub hashes: Vec<BlockHash>,
}

impl View {
    /// A disk of this size: the base `base` with these layers over it; `map` says which layer holds which block.
    ///
    /// # Errors
    /// Damaged if a file of the base is missing; Io.
    pub fn new(
        dir: Dir,
        owner: Paths,
        geometry: Geometry,
        base: &Checkpoint,
        layers: Layers,
        map: BlockMap,
    ) -> Result<Self, StoreError> {
        let img = dir.open(&owner.img(base.id), false)?;
        let sum = dir.open(&owner.sum(base.id), false)?;
        let groups = HASHES_MAX_BYTES / sum::record_bytes(geometry);
        let groups = NonZeroUsize::new(groups as usize).unwrap_or(NonZeroUsize::MIN);
        let (base_hashes, runs) = (Recent::new(groups), Recent::new(RUNS_MAX));
        Ok(Self { dir, owner, geometry, base: base.geometry, img, sum, layers, map, base_hashes, runs })
    }

    /// Size and block size.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The blocks of a group.
    fn group(&self, group: u64) -> Extent {
        let (first, count) = self.geometry.group_extent(group);
        Extent { first, count }
    }

    /// Whether a delta holds blocks of this group.
    pub fn is_overlaid(&self, group: u64) -> bool {
        self.map.touches(self.group(group))
    }

    /// The hashes of a group's blocks.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn hashes(&self, group: u64) -> Result<Vec<BlockHash>, StoreError> {
        self.hashes_of(self.group(group))
    }

    /// The hashes of blocks of one group.
    fn hashes_of(&self, extent: Extent) -> Result<Vec<BlockHash>, StoreError> {
        let group = extent.first / self.geometry.group_blocks();
        let read = || sum::read_resized(&self.sum, self.base, self.geometry, group);
        let base = self.base_hashes.get(group, read)?;
        let before = (extent.first - self.group(group).first) as usize;
        let mut hashes: Vec<_> = base.iter().skip(before).take(extent.count as usize).copied().collect();
        for piece in self.map.within(extent) {
            self.layers.overlay(&self.dir, &self.owner, &piece, extent.first, &mut hashes)?;
        }
        Ok(hashes)
    }

    /// The blocks that could not be read: looks at the hashes of the whole disk.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn unreadable(&self) -> Result<BlockSet, StoreError> {
        let mut found = BlockSet::new();
        for group in 0..self.geometry.groups() {
            insert_unreadable(self.group(group).first, &self.hashes(group)?, &mut found);
        }
        Ok(found)
    }

    /// Whether a group is all zeros, as its hashes say.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn is_zero(&self, group: u64) -> Result<bool, StoreError> {
        Ok(self.hashes(group)?.iter().all(|hash| hash.content() == BlockHash::ZERO))
    }

    /// Whether the base image has no data in these blocks.
    fn base_is_hole(&self, extent: Extent) -> Result<bool, StoreError> {
        let (offset, len) = self.geometry.range(extent.first, extent.count);
        Ok(self.img.next_data(offset)?.is_none_or(|(start, _)| start >= offset + len))
    }

    /// Fills `buf` with the disk's bytes from `offset`, every block checked.
    ///
    /// # Errors
    /// Refused if they are not all on the disk; Damaged; Io. What is in `buf` then means nothing.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let size = self.geometry.size_bytes();
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > size) {
            let what = format!("{} bytes from {offset} are not on a disk of {size}", buf.len());
            return Err(StoreError::Refused(what));
        }
        let (mut at, mut left) = (offset, buf);
        while !left.is_empty() {
            let in_group = (1 << GROUP_SHIFT) - (at & ((1 << GROUP_SHIFT) - 1));
            let (part, rest) = left.split_at_mut(in_group.min(left.len() as u64) as usize);
            self.read_within_group(at, part)?;
            at += part.len() as u64;
            left = rest;
        }
        Ok(())
    }

    fn read_within_group(&self, offset: u64, out: &mut [u8]) -> Result<(), StoreError> {
        let shift = self.geometry.block_shift();
        let first = offset >> shift;
        let end = (offset + out.len() as u64).div_ceil(1 << shift);
        match self.read(Extent { first, count: end - first })? {
            None => out.fill(0),
            Some(Checked { data, .. }) => {
                let wanted = data.iter().skip((offset - (first << shift)) as usize);
                out.iter_mut().zip(wanted).for_each(|(to, from)| *to = *from);
            }
        }
        Ok(())
    }

    /// A group's data, every block checked. `None` if all of it is zeros that were read.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn read_group(&self, group: u64) -> Result<Option<Checked>, StoreError> {
        self.read(self.group(group))
    }

    /// Blocks of one group, every one checked. `None` if all of them are zeros that were read.
    fn read(&self, extent: Extent) -> Result<Option<Checked>, StoreError> {
        let hashes = self.hashes_of(extent)?;
        let zeros = hashes.iter().all(|h| *h == BlockHash::ZERO);
        let pieces = self.map.within(extent);
        if zeros && pieces.is_empty() && self.base_is_hole(extent)? {
            return Ok(None);
        }
        let data = self.assemble(extent, &pieces)?;
        let bad = unsound(&data, &hashes, self.geometry.block_bytes()).next();
        if let Some(n) = bad.map(|at| extent.first + at) {
            let what = format!("block {n} does not have its hash");
            return Err(match pieces.iter().find(|p| (p.extent.first..p.extent.end()).contains(&n)) {
                Some(piece) => self.layers.file(&self.dir, &self.owner, piece.layer)?.0.damaged(what),
                None => self.img.damaged(what),
            });
        }
        Ok((!zeros).then_some(Checked { data, hashes }))
    }

    /// The bytes of blocks as the files have them, not checked.
    fn assemble(&self, extent: Extent, pieces: &[Piece]) -> Result<Vec<u8>, StoreError> {
        let (offset, len) = self.geometry.range(extent.first, extent.count);
        let mut data = vec![0; len as usize];
        // What the disk had then; a file that is shorter is damaged.
        let had = data.get_mut(..self.base.size_bytes().saturating_sub(offset).min(len) as usize);
        if let Some(had) = had.filter(|had| !had.is_empty())
            && pieces.iter().map(|p| p.extent.count).sum::<u64>() < extent.count
        {
            self.img.read(had, offset)?;
        }
        for piece in pieces {
            self.lay_piece(piece, offset, &mut data)?;
        }
        Ok(data)
    }

    /// The data of a record, unpacked and checked against the hashes beside it; `None` for zeros.
    fn run(
        &self,
        file: &Handle,
        geometry: Geometry,
        piece: &Piece,
    ) -> Result<Arc<Option<Vec<u8>>>, StoreError> {
        self.runs.get((piece.layer, piece.record), || {
            let run = bak::read_run(file, geometry, piece.record)?;
            let unpacked = run.unpack(geometry).map_err(|e| file.damaged(e.to_string()))?;
            Ok::<_, StoreError>(unpacked.map(Cow::into_owned))
        })
    }

    fn lay_piece(&self, piece: &Piece, offset: u64, out: &mut [u8]) -> Result<(), StoreError> {
        let Extent { first, count } = piece.extent;
        let (at, len) = self.geometry.range(first, count);
        if piece.is_behind_the_end() {
            out.iter_mut().skip((at - offset) as usize).take(len as usize).for_each(|byte| *byte = 0);
            return Ok(());
        }
        let (file, geometry) = self.layers.file(&self.dir, &self.owner, piece.layer)?;
        let skip = piece.skip << self.geometry.block_shift();
        let target = out.get_mut((at - offset) as usize..(at - offset + len) as usize);
        let target = target.ok_or_else(|| file.damaged("its index points past a group"))?;
        // The last block of the disk may have been shorter then: behind the end there are zeros.
        let had = len.min(geometry.range(first, count).1);
        let (target, behind) = target.split_at_mut(had as usize);
        behind.fill(0);
        match &*self.run(&file, geometry, piece)? {
            Some(data) => {
                let part = data.get(skip as usize..(skip + had) as usize);
                target.copy_from_slice(part.ok_or_else(|| file.damaged("its index points past a run"))?);
            }
            None => target.fill(0),
        }
        Ok(())
    }
}
