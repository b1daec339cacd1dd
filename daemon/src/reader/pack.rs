//! Making runs of the bytes that were read: pure.

use crate::bitmap::{BlockSet, Extent};
use crate::geometry::Geometry;
use crate::hash::{BlockHash, hash_blocks};
use crate::run::{Encoding, Run};

/// The hashes of consecutive blocks as they were read; the last one may be cut by the end of the disk.
pub fn hash_extent(data: &[u8], geometry: Geometry) -> Vec<BlockHash> {
    hash_blocks(data, geometry.block_bytes())
}

/// Makes runs of the blocks of `extent`, whose bytes are `data` (exactly: see [`Geometry::range`]). Zeros become
/// zero runs; a single zero block between data stays with the data where that takes fewer bytes. No run covers
/// more than 1 MiB.
pub fn pack(extent: Extent, data: &[u8], geometry: Geometry) -> Vec<Run> {
    debug_assert_eq!(geometry.range(extent.first, extent.count).1, data.len() as u64, "data of {extent:?}");
    let mut runs = Vec::new();
    let group_bytes = geometry.block_bytes() << (crate::geometry::GROUP_SHIFT - geometry.block_shift());
    let firsts = (extent.first..).step_by(usize::try_from(geometry.group_blocks()).unwrap_or(usize::MAX));
    for (first, part) in firsts.zip(data.chunks(group_bytes)) {
        pack_group(first, part, geometry, &mut runs);
    }
    runs
}

/// Makes runs of the blocks whose hash is not the one in `known`; blocks without a known hash count as different.
pub fn pack_differing(extent: Extent, data: &[u8], geometry: Geometry, known: &[BlockHash]) -> Vec<Run> {
    let found = hash_extent(data, geometry);
    let differs =
        (extent.first..).zip(found.iter().enumerate()).filter(|(_, (i, hash))| known.get(*i) != Some(*hash));
    let blocks: BlockSet = differs.map(|(block, _)| Extent { first: block, count: 1 }).collect();
    let part = |differing: Extent| {
        let (start, len) = geometry.range(differing.first, differing.count);
        let at = usize::try_from(start - geometry.range(extent.first, 0).0).ok()?;
        let data = data.get(at..at + usize::try_from(len).ok()?)?;
        Some(pack(differing, data, geometry))
    };
    blocks.extents(geometry.group_blocks()).filter_map(part).flatten().collect()
}

/// Packs at most 1 MiB.
fn pack_group(first: u64, data: &[u8], geometry: Geometry, runs: &mut Vec<Run>) {
    let hashes = hash_extent(data, geometry);
    let piece = Piece { first, hashes: &hashes, data, block_bytes: geometry.block_bytes() };
    for part in piece.split(2) {
        if part.is_zero() {
            runs.push(part.to_run());
            continue;
        }
        let whole = part.to_run();
        let pieces = part.split(1);
        // Split, the zeros of a raw run are saved; a compressed one with them inside needs fewer headers.
        if pieces.len() > 1 {
            let apart: Vec<Run> = pieces.iter().map(|p| p.to_run()).collect();
            let apart_bytes: usize = apart.iter().map(Run::encoded_len).sum();
            if whole.encoding() == Encoding::Raw || apart_bytes <= whole.encoded_len() {
                runs.extend(apart);
                continue;
            }
        }
        runs.push(whole);
    }
}

/// Consecutive blocks, hashed.
#[derive(Clone, Copy)]
struct Piece<'a> {
    first: u64,
    hashes: &'a [BlockHash],
    data: &'a [u8],
    block_bytes: usize,
}

impl<'a> Piece<'a> {
    fn is_zero(self) -> bool {
        self.hashes.iter().all(|h| *h == BlockHash::ZERO)
    }

    fn to_run(self) -> Run {
        match u32::try_from(self.hashes.len()) {
            Ok(count) if self.is_zero() => Run::zeros(self.first, count),
            _ => Run::pack(self.first, self.hashes.to_vec(), self.data),
        }
    }

    /// The blocks `from..to` of this piece.
    fn part(&self, from: usize, to: usize) -> Self {
        let bytes =
            (from * self.block_bytes).min(self.data.len())..(to * self.block_bytes).min(self.data.len());
        Self {
            first: self.first + from as u64,
            hashes: self.hashes.get(from..to).unwrap_or_default(),
            data: self.data.get(bytes).unwrap_or_default(),
            block_bytes: self.block_bytes,
        }
    }

    /// Cuts into pieces of zeros and of data; zeros between data that are fewer than `zeros_min` blocks stay.
    fn split(&self, zeros_min: usize) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let mut data_from = 0;
        let mut at = 0;
        for same in self.hashes.chunk_by(|a, b| (*a == BlockHash::ZERO) == (*b == BlockHash::ZERO)) {
            let end = at + same.len();
            let inside = at > 0 && end < self.hashes.len();
            if same.first() == Some(&BlockHash::ZERO) && (!inside || same.len() >= zeros_min) {
                if at > data_from {
                    pieces.push(self.part(data_from, at));
                }
                pieces.push(self.part(at, end));
                data_from = end;
            }
            at = end;
        }
        if at > data_from {
            pieces.push(self.part(data_from, at));
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::GROUP_BYTES;
    use proptest::prelude::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut data);
        data
    }

    /// The bytes that runs stand for, and a check that they follow each other without a hole.
    fn unpack(runs: &[Run], first: u64, geometry: Geometry) -> Vec<u8> {
        let mut data = Vec::new();
        let mut next = first;
        for run in runs {
            let Extent { first, count } = run.extent();
            assert_eq!(first, next, "a hole or an overlap");
            let len = geometry.range(first, count).1;
            assert!(count > 0 && len <= GROUP_BYTES);
            data.extend_from_slice(
                &run.unpack(geometry).unwrap().unwrap_or_else(|| vec![0; len as usize].into()),
            );
            next = run.extent().end();
        }
        data
    }

    #[test]
    fn zeros_travel_as_ranges() {
        let geometry = Geometry::new(8 << 20, 12).unwrap();
        let runs = pack(Extent { first: 256, count: 256 }, &vec![0; 1 << 20], geometry);
        assert_eq!(runs, [Run::zeros(256, 256)]);
        let mut data = noise(1 << 20);
        data[4096..12288].fill(0);
        let runs = pack(Extent { first: 256, count: 256 }, &data, geometry);
        assert_eq!(runs.iter().map(|r| r.extent().count).collect::<Vec<_>>(), [1, 2, 253]);
        assert_eq!(runs[1].encoding(), Encoding::Zero);
    }

    #[test]
    fn one_zero_block_stays_inside_only_where_that_is_smaller() {
        let geometry = Geometry::new(8 << 20, 12).unwrap();
        let extent = Extent { first: 0, count: 3 };
        let mut data = noise(3 * 4096);
        data[4096..8192].fill(0);
        assert_eq!(pack(extent, &data, geometry).len(), 3, "noise does not compress: the zeros are cut out");
        let mut data = vec![b'a'; 3 * 4096];
        data[4096..8192].fill(0);
        assert_eq!(pack(extent, &data, geometry).len(), 1);
    }

    proptest! {
        #[test]
        fn runs_are_the_data_without_holes(
            kinds in proptest::collection::vec(0u8..4, 1..300), shift in 9u8..14, first in 0u64..50, cut in 0usize..8
        ) {
            let block = 1usize << shift;
            let mut data: Vec<u8> = Vec::new();
            for (i, kind) in kinds.iter().enumerate() {
                match kind {
                    0 | 1 => data.resize(data.len() + block, 0),
                    2 => data.resize(data.len() + block, i as u8 | 1),
                    _ => data.extend(noise(block)),
                }
            }
            let cut = (cut * 512).min(block - 512);
            data.truncate(data.len() - cut);
            let size = (first << shift) + data.len() as u64;
            let geometry = Geometry::new(size, shift).unwrap();
            let runs = pack(Extent { first, count: kinds.len() as u64 }, &data, geometry);
            prop_assert!(unpack(&runs, first, geometry) == data);
        }
    }
}
