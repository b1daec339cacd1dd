//! Reads blocks for what they are needed for: runs to send, or a digest. Pure, over a [`BlockReader`].

use super::action::{Purpose, ReadResult};
use crate::bitmap::{BlockSet, Extent};
use crate::geometry::Geometry;
use crate::hash::{BlockHash, group_digest};
use crate::reader::{BlockReader, Piece, ReadError, hash_extent, pack, pack_differing, read_pieces};
use crate::run::Run;

/// Reads an extent; blocks that cannot be read are runs of their own, and have their hash in a digest. `go_on` as for
/// [`read_pieces`].
///
/// # Errors
/// As [`read_pieces`].
pub fn read(
    reader: &mut dyn BlockReader,
    extent: Extent,
    purpose: &Purpose,
    geometry: Geometry,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<ReadResult, ReadError> {
    let (mut runs, mut hashes) = (Vec::new(), Vec::new());
    read_pieces(reader, extent, go_on, &mut |piece| match (purpose, piece) {
        (Purpose::Base | Purpose::Changed, Piece::Data(part, data)) => {
            runs.extend(pack(part, data, geometry));
        }
        (Purpose::Base | Purpose::Changed, Piece::Unreadable(part)) => runs.push(unreadable(part)),
        (Purpose::Digest, Piece::Data(_, data)) => hashes.extend(hash_extent(data, geometry)),
        (Purpose::Digest, Piece::Unreadable(part)) => {
            hashes.extend((0..part.count).map(|_| BlockHash::UNREADABLE));
        }
        (Purpose::Differing(known), Piece::Data(part, data)) => {
            runs.extend(pack_differing(part, data, geometry, known_of(known, extent, part)));
        }
        (Purpose::Differing(known), Piece::Unreadable(part)) => {
            let known = known_of(known, extent, part);
            let news = (part.first..part.end())
                .enumerate()
                .filter(|(at, _)| known.get(*at) != Some(&BlockHash::UNREADABLE));
            let news: BlockSet = news.map(|(_, first)| Extent { first, count: 1 }).collect();
            runs.extend(news.extents(u64::MAX).map(unreadable));
        }
    })?;
    Ok(match purpose {
        Purpose::Digest => ReadResult::Digest(group_digest(&hashes)),
        _ => ReadResult::Runs(runs),
    })
}

/// A run of blocks that cannot be read, of at most 1 MiB.
pub fn unreadable(part: Extent) -> Run {
    Run::unreadable(part.first, u32::try_from(part.count).unwrap_or(u32::MAX))
}

/// The hashes that are known of a part of `extent`.
fn known_of(known: &[BlockHash], extent: Extent, part: Extent) -> &[BlockHash] {
    let skip = usize::try_from(part.first - extent.first).unwrap_or(usize::MAX);
    known.get(skip..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::hash_blocks;
    use crate::reader::patient_tests::BadDisk;
    use crate::run::Encoding;

    fn read_all(data: &[u8], bad: &BlockSet, purpose: &Purpose) -> ReadResult {
        let geometry = Geometry::new(data.len() as u64, 12).unwrap();
        let mut disk = BadDisk { data, block_bytes: 4096, bad, reads: 0 };
        let extent = Extent { first: 0, count: geometry.blocks() };
        read(&mut disk, extent, purpose, geometry, &mut || true).unwrap()
    }

    fn runs(result: ReadResult) -> Vec<Run> {
        match result {
            ReadResult::Runs(runs) => runs,
            ReadResult::Digest(_) => panic!("a digest"),
        }
    }

    #[test]
    fn a_digest_and_runs_tell_the_same_of_bad_blocks() {
        let data: Vec<u8> = (0..10 * 4096).map(|i| (i / 4096) as u8).collect();
        let bad: BlockSet =
            [Extent { first: 3, count: 2 }, Extent { first: 9, count: 1 }].into_iter().collect();
        let found = runs(read_all(&data, &bad, &Purpose::Changed));
        let mut hashes = Vec::new();
        for run in &found {
            assert_eq!(run.extent().first, hashes.len() as u64, "a hole");
            hashes.extend((0..run.extent().count).map(|at| run.hash(at)));
        }
        let is_bad = |at: usize| bad.contains(at as u64);
        let expected: Vec<BlockHash> = hash_blocks(&data, 4096)
            .into_iter()
            .enumerate()
            .map(|(at, hash)| if is_bad(at) { BlockHash::UNREADABLE } else { hash })
            .collect();
        assert_eq!(hashes, expected);
        let ReadResult::Digest(digest) = read_all(&data, &bad, &Purpose::Digest) else { panic!("runs") };
        assert_eq!(digest, group_digest(&expected));
        assert!(runs(read_all(&data, &bad, &Purpose::Differing(expected.clone()))).is_empty());
        // What was bad and is good now is sent, and what became bad; nothing else.
        let healed: BlockSet = [Extent { first: 4, count: 2 }].into_iter().collect();
        let news = runs(read_all(&data, &healed, &Purpose::Differing(expected)));
        let told: Vec<_> =
            news.iter().map(|run| (run.extent().first, run.encoding() == Encoding::Unreadable)).collect();
        assert_eq!(told, [(3, false), (5, true), (9, false)]);
    }
}
