//! A disk as of one checkpoint: the base image with deltas laid over it. Reads only.
//!
//! What must never happen here: a block returned that was not checked against its hash.

use super::bak;
use super::block_map::{BlockMap, Piece};
use super::handle::{Dir, Handle};
use super::layout::Paths;
use super::{StoreError, sum};
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::Checkpoint;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, insert_unreadable};
use crate::ids::CheckpointId;

/// Deltas kept open at the same time.
const OPEN_MAX: usize = 64;

struct Layer {
    id: CheckpointId,
    geometry: Geometry,
    file: Option<Handle>,
}

/// Committed deltas, opened when they are needed.
#[derive(Default)]
pub struct Layers {
    layers: Vec<Layer>,
    open: usize,
}

impl Layers {
    /// Adds the next delta of the chain; returns its layer number.
    pub fn push(&mut self, id: CheckpointId, geometry: Geometry) -> u32 {
        self.layers.push(Layer { id, geometry, file: None });
        (self.layers.len() - 1) as u32
    }

    /// The file of a layer, and the size its disk had.
    ///
    /// # Errors
    /// Damaged if it is missing; Io.
    pub fn file(&mut self, dir: &Dir, owner: &Paths, layer: u32) -> Result<(&Handle, Geometry), StoreError> {
        let at = layer as usize;
        if self.open >= OPEN_MAX && self.layers.get(at).is_some_and(|l| l.file.is_none()) {
            self.layers.iter_mut().for_each(|l| l.file = None);
            self.open = 0;
        }
        let missing = || StoreError::Refused(format!("there is no layer {layer}"));
        let slot = self.layers.get_mut(at).ok_or_else(missing)?;
        let file = match slot.file.take() {
            Some(file) => file,
            None => {
                self.open += 1;
                dir.open(&owner.bak(slot.id), false)?
            }
        };
        Ok((slot.file.insert(file), slot.geometry))
    }

    /// Lays the hashes of one piece over those of its group, whose first block is `first`.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn overlay(
        &mut self,
        dir: &Dir,
        owner: &Paths,
        piece: &Piece,
        first: u64,
        hashes: &mut [BlockHash],
    ) -> Result<(), StoreError> {
        if !piece.is_behind_the_end() {
            return overlay(self.file(dir, owner, piece.layer)?.0, piece, first, hashes);
        }
        let slots = hashes.iter_mut().skip((piece.extent.first - first) as usize);
        slots.take(piece.extent.count as usize).for_each(|slot| *slot = BlockHash::ZERO);
        Ok(())
    }
}

/// Lays the hashes of one piece over those of its group, whose first block is `first`.
///
/// # Errors
/// Damaged; Io.
pub fn overlay(file: &Handle, piece: &Piece, first: u64, hashes: &mut [BlockHash]) -> Result<(), StoreError> {
    let new = bak::read_hashes(file, piece.record, piece.skip, piece.extent.count)?;
    let slots = hashes.iter_mut().skip((piece.extent.first - first) as usize);
    slots.zip(new).for_each(|(slot, hash)| *slot = hash);
    Ok(())
}

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
    /// The run read last: neighbouring pieces often lie in one.
    last: Option<(u32, u64, Option<Vec<u8>>)>,
}

/// A group's data and the hashes it was checked against.
pub struct GroupData {
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
        Ok(Self { dir, owner, geometry, base: base.geometry, img, sum, layers, map, last: None })
    }

    /// Size and block size.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether a delta holds blocks of this group.
    pub fn is_overlaid(&self, group: u64) -> bool {
        let (first, count) = self.geometry.group_extent(group);
        self.map.touches(Extent { first, count })
    }

    /// The hashes of a group's blocks.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn hashes(&mut self, group: u64) -> Result<Vec<BlockHash>, StoreError> {
        let (first, count) = self.geometry.group_extent(group);
        let mut hashes = sum::read_resized(&self.sum, self.base, self.geometry, group)?;
        for piece in self.map.within(Extent { first, count }) {
            self.layers.overlay(&self.dir, &self.owner, &piece, first, &mut hashes)?;
        }
        Ok(hashes)
    }

    /// The blocks that could not be read: looks at the hashes of the whole disk.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn unreadable(&mut self) -> Result<BlockSet, StoreError> {
        let mut found = BlockSet::new();
        for group in 0..self.geometry.groups() {
            insert_unreadable(self.geometry.group_extent(group).0, &self.hashes(group)?, &mut found);
        }
        Ok(found)
    }

    /// Whether the base image has no data in this group.
    ///
    /// # Errors
    /// Io.
    pub fn base_is_hole(&self, group: u64) -> Result<bool, StoreError> {
        let (first, count) = self.geometry.group_extent(group);
        let (offset, len) = self.geometry.range(first, count);
        Ok(self.img.next_data(offset)?.is_none_or(|(start, _)| start >= offset + len))
    }

    /// A group's data, every block checked. `None` if all of it is zeros that were read.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn read_group(&mut self, group: u64) -> Result<Option<GroupData>, StoreError> {
        let hashes = self.hashes(group)?;
        let zeros = hashes.iter().all(|h| *h == BlockHash::ZERO);
        if zeros && !self.is_overlaid(group) && self.base_is_hole(group)? {
            return Ok(None);
        }
        let (first, count) = self.geometry.group_extent(group);
        let (offset, len) = self.geometry.range(first, count);
        let mut data = vec![0; len as usize];
        let pieces = self.map.within(Extent { first, count });
        // What the disk had then; a file that is shorter is damaged.
        let had = data.get_mut(..self.base.size_bytes().saturating_sub(offset).min(len) as usize);
        if let Some(had) = had.filter(|had| !had.is_empty())
            && pieces.iter().map(|p| p.extent.count).sum::<u64>() < count
        {
            self.img.read(had, offset)?;
        }
        for piece in &pieces {
            self.lay_piece(piece, offset, &mut data)?;
        }
        let block_bytes = self.geometry.block_bytes();
        for ((block, hash), n) in data.chunks(block_bytes).zip(&hashes).zip(first..) {
            if !hash.is_sound(block, block_bytes) {
                let file = match pieces.iter().find(|p| (p.extent.first..p.extent.end()).contains(&n)) {
                    Some(piece) => self.layers.file(&self.dir, &self.owner, piece.layer)?.0,
                    None => &self.img,
                };
                return Err(file.damaged(format!("block {n} does not have its hash")));
            }
        }
        Ok((!zeros).then_some(GroupData { data, hashes }))
    }

    fn lay_piece(&mut self, piece: &Piece, offset: u64, out: &mut [u8]) -> Result<(), StoreError> {
        let Extent { first, count } = piece.extent;
        let (at, len) = self.geometry.range(first, count);
        if piece.is_behind_the_end() {
            out.iter_mut().skip((at - offset) as usize).take(len as usize).for_each(|byte| *byte = 0);
            return Ok(());
        }
        let (file, geometry) = self.layers.file(&self.dir, &self.owner, piece.layer)?;
        let cached = self.last.take().filter(|(l, r, _)| (*l, *r) == (piece.layer, piece.record));
        let data = match cached {
            Some((_, _, data)) => data,
            None => {
                let unpacked = bak::read_run(file, geometry, piece.record)?.unpack(geometry);
                unpacked.map_err(|e| file.damaged(e.to_string()))?
            }
        };
        let skip = piece.skip << self.geometry.block_shift();
        let target = out.get_mut((at - offset) as usize..(at - offset + len) as usize);
        let target = target.ok_or_else(|| file.damaged("its index points past a group"))?;
        // The last block of the disk may have been shorter then: behind the end there are zeros.
        let had = len.min(geometry.range(first, count).1);
        let (target, behind) = target.split_at_mut(had as usize);
        behind.fill(0);
        match &data {
            Some(data) => {
                let part = data.get(skip as usize..(skip + had) as usize);
                target.copy_from_slice(part.ok_or_else(|| file.damaged("its index points past a run"))?);
            }
            None => target.fill(0),
        }
        self.last = Some((piece.layer, piece.record, data));
        Ok(())
    }
}
