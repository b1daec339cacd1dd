//! The disk of a simulated machine: what every block holds, by one number a block.

use crate::bitmap::{BlockSet, Extent};
use crate::geometry::Geometry;
use crate::reader::{BlockReader, ReadError};

/// What a disk holds at one moment: a photograph is a copy of it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct ModelDisk {
    pub(super) geometry: Geometry,
    /// The byte that fills each block.
    fills: Vec<u8>,
}

impl ModelDisk {
    pub(super) fn new(geometry: Geometry) -> Self {
        Self { geometry, fills: vec![0; geometry.blocks() as usize] }
    }

    /// What is cut off is gone; what is new is zeros.
    pub(super) fn resize(&mut self, geometry: Geometry) {
        self.geometry = geometry;
        self.fills.resize(geometry.blocks() as usize, 0);
    }

    pub(super) fn write(&mut self, extent: Extent, fill: u8) {
        self.part_mut(extent).fill(fill);
    }

    /// Puts back what blocks held before, as a volatile cache does that loses its power.
    pub(super) fn put_back(&mut self, extent: Extent, fills: &[u8]) {
        self.part_mut(extent).copy_from_slice(fills);
    }

    pub(super) fn fills(&self, extent: Extent) -> &[u8] {
        &self.fills[extent.first as usize..extent.end() as usize]
    }

    fn part_mut(&mut self, extent: Extent) -> &mut [u8] {
        &mut self.fills[extent.first as usize..extent.end() as usize]
    }

    /// The bytes of an extent, cut at the end of the disk.
    pub(super) fn bytes(&self, extent: Extent) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.geometry.range(extent.first, extent.count).1 as usize);
        for (fill, block) in self.fills(extent).iter().zip(extent.first..) {
            let end = bytes.len() + self.geometry.range(block, 1).1 as usize;
            bytes.resize(end, *fill);
        }
        bytes
    }
}

/// Reads a disk, but for its bad blocks.
pub(super) struct ModelReader<'a> {
    pub(super) disk: &'a ModelDisk,
    pub(super) bad: &'a BlockSet,
    pub(super) buffer: Vec<u8>,
}

impl BlockReader for ModelReader<'_> {
    fn read(&mut self, extent: Extent) -> Result<&[u8], ReadError> {
        let Extent { first, count } = extent;
        if (first..extent.end()).any(|block| self.bad.contains(block)) {
            let source = std::io::Error::from_raw_os_error(libc::EIO);
            return Err(ReadError::Unreadable { device: "/dev/sdx".into(), first, count, source });
        }
        self.buffer = self.disk.bytes(extent);
        Ok(&self.buffer)
    }
}
