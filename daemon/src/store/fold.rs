//! Folds the first, sealed delta into the full copy and makes the base checkpoint of both.
//!
//! Everything here may be cut off at any point and done again: untouched blocks are checked and left alone, touched
//! ones are written anew. What must never happen here: a `.sum` under its final name beside an image that is not
//! whole and durable.

use std::collections::BTreeSet;

use super::StoreError;
use super::bak;
use super::block_map::BlockMap;
use super::handle::{Dir, Handle};
use super::layout::{Header, Kind, Paths, SealHash};
use super::sum;
use crate::bitmap::Extent;
use crate::geometry::Geometry;
use crate::hash::unsound;
use crate::ids::CheckpointId;

struct Fold<'a> {
    geometry: Geometry,
    img: Handle,
    sum: Handle,
    delta: &'a Handle,
    map: &'a BlockMap,
}

/// Folds `delta` into the copy and gives the files the checkpoint's name. `closing` is the delta's closing header.
pub(super) fn fold(
    dir: &Dir,
    owner: &Paths,
    id: CheckpointId,
    closing: &Header,
    delta: &Handle,
    map: &BlockMap,
) -> Result<(Header, SealHash), StoreError> {
    // An earlier try may have come as far as the first of the two names.
    let renamed = dir.exists(&owner.img(id))?;
    let img = dir.open(&if renamed { owner.img(id) } else { owner.copy_img() }, true)?;
    let sum = dir.open(&owner.copy_sum(), true)?;
    let fold = Fold { geometry: closing.geometry, img, sum, delta, map };
    for group in fold.touched() {
        fold.group(group)?;
    }
    fold.img.sync()?;
    let header = Header {
        kind: Kind::Sum,
        content: sum::content_hash(&fold.sum, fold.geometry)?,
        index_hash: [0; 32],
        index_offset: 0,
        index_count: 0,
        ..closing.clone()
    };
    let bytes = header.encode();
    fold.sum.write(&bytes, 0)?;
    fold.sum.sync()?;
    if !renamed {
        dir.rename(&owner.copy_img(), &owner.img(id))?;
    }
    dir.sync_names(&owner.img(id))?;
    dir.rename(&owner.copy_sum(), &owner.sum(id))?;
    dir.sync_names(&owner.sum(id))?;
    Ok((header, bytes.last_chunk().copied().unwrap_or_default()))
}

impl Fold<'_> {
    fn touched(&self) -> BTreeSet<u64> {
        let blocks = self.geometry.group_blocks();
        let groups = |e: Extent| e.first / blocks..=e.end().saturating_sub(1) / blocks;
        self.map.pieces().flat_map(|p| groups(p.extent)).collect()
    }

    fn group(&self, group: u64) -> Result<(), StoreError> {
        let (first, count) = self.geometry.group_extent(group);
        let (offset, len) = self.geometry.range(first, count);
        // The digest is not looked at: an earlier try may have been cut off within this record. The hashes of the
        // untouched blocks are the same before and after.
        let record = sum::read_record(&self.sum, self.geometry, group)?;
        let mut hashes = sum::hashes(self.geometry, group, &record);
        let old = self.img.read_vec(len as usize, offset)?;
        let bad = unsound(&old, &hashes, self.geometry.block_bytes())
            .map(|at| first + at)
            .find(|n| !self.map.touches(Extent { first: *n, count: 1 }));
        if let Some(n) = bad {
            return Err(self.img.damaged(format!("block {n} does not have its hash")));
        }
        for piece in self.map.within(Extent { first, count }) {
            let run = bak::read_run(self.delta, self.geometry, piece.record)?;
            let (at, bytes) = self.geometry.range(piece.extent.first, piece.extent.count);
            let skip = piece.skip << self.geometry.block_shift();
            match run.unpack(self.geometry)? {
                Some(data) => {
                    let part = data.get(skip as usize..(skip + bytes) as usize);
                    self.img
                        .write(part.ok_or_else(|| self.delta.damaged("its index points past a run"))?, at)?;
                }
                None => self.img.clear(at, bytes)?,
            }
            let slots = hashes.iter_mut().skip((piece.extent.first - first) as usize);
            for (slot, i) in slots.zip(0..piece.extent.count) {
                *slot = run.hash(piece.skip + i);
            }
        }
        self.sum.write(&sum::encode(self.geometry, &hashes), sum::record_offset(self.geometry, group))
    }
}
