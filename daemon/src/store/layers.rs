//! The committed deltas of a chain, opened when they are needed.
//!
//! What must never happen here: another file taken for one of them because it has its name.

use std::num::NonZeroUsize;
use std::sync::Arc;

use super::block_map::Piece;
use super::handle::{Dir, Handle};
use super::layout::{Link, Paths};
use super::recent::Recent;
use super::{StoreError, bak};
use crate::geometry::Geometry;
use crate::hash::BlockHash;

/// Deltas kept open at the same time.
const OPEN_MAX: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// Committed deltas, oldest first.
pub struct Layers {
    layers: Vec<(Link, Geometry)>,
    open: Recent<u32, Handle>,
}

impl Default for Layers {
    fn default() -> Self {
        Self { layers: Vec::new(), open: Recent::new(OPEN_MAX) }
    }
}

impl Layers {
    /// Adds the next delta of the chain; returns its layer number.
    pub fn push(&mut self, link: Link, geometry: Geometry) -> u32 {
        self.layers.push((link, geometry));
        (self.layers.len() - 1) as u32
    }

    /// The file of a layer, and the size its disk had.
    ///
    /// # Errors
    /// Damaged if it is missing, or does not have the chain's seal; Io.
    pub fn file(&self, dir: &Dir, owner: &Paths, layer: u32) -> Result<(Arc<Handle>, Geometry), StoreError> {
        let missing = || StoreError::Refused(format!("there is no layer {layer}"));
        let (link, geometry) = self.layers.get(layer as usize).ok_or_else(missing)?;
        Ok((self.open.get(layer, || open(dir, owner, link))?, *geometry))
    }

    /// Lays the hashes of one piece over those of the blocks from `first` on.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn overlay(
        &self,
        dir: &Dir,
        owner: &Paths,
        piece: &Piece,
        first: u64,
        hashes: &mut [BlockHash],
    ) -> Result<(), StoreError> {
        if !piece.is_behind_the_end() {
            let (file, geometry) = self.file(dir, owner, piece.layer)?;
            return overlay(&file, geometry, piece, first, hashes);
        }
        let slots = hashes.iter_mut().skip((piece.extent.first - first) as usize);
        slots.take(piece.extent.count as usize).for_each(|slot| *slot = BlockHash::ZERO);
        Ok(())
    }
}

/// Opens a delta, which may have been replaced since it was open before. All its own hashes would fit then.
fn open(dir: &Dir, owner: &Paths, link: &Link) -> Result<Handle, StoreError> {
    let file = dir.open(&owner.bak(link.id), false)?;
    let (_, seal) = bak::read_closing(&file)?;
    if seal == link.seal { Ok(file) } else { Err(file.damaged("another file has taken its place")) }
}

/// Lays the hashes of one piece over those of the blocks from `first` on.
///
/// # Errors
/// Damaged; Io.
pub fn overlay(
    file: &Handle,
    geometry: Geometry,
    piece: &Piece,
    first: u64,
    hashes: &mut [BlockHash],
) -> Result<(), StoreError> {
    let new = bak::read_hashes(file, geometry, piece.record, piece.skip, piece.extent.count)?;
    let slots = hashes.iter_mut().skip((piece.extent.first - first) as usize);
    slots.zip(new).for_each(|(slot, hash)| *slot = hash);
    Ok(())
}
