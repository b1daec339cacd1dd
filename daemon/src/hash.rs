//! Hashes of blocks and digests of groups.
//!
//! BLAKE3 (Aumasson, Neves, O'Connor, Wilcox-O'Hearn, 2020), cut to 128 bits: enough that two different blocks
//! never meet by accident, at 0.4 % of the data. A block of zeros has the hash of all zeros, so that it is known
//! without being hashed. A block that the agent's disk could not read has a hash of its own; wherever it is kept or
//! restored, zeros stand for it.
//!
//! What must never happen here: bytes taken for good that are not what their hash says. [`BlockHash::content`] is the
//! one place that knows what an unreadable block looks like.

use serde::{Deserialize, Serialize};

use crate::bitmap::{BlockSet, Extent};

/// Bytes of a hash.
pub const HASH_BYTES: usize = 16;

/// The hash of one block; a block cut short by the end of the disk is hashed as if filled up with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockHash(pub [u8; HASH_BYTES]);

impl BlockHash {
    /// The hash of a block of zeros.
    pub const ZERO: Self = Self([0; HASH_BYTES]);
    /// Stands for a block that the agent's disk could not read; no block of data has this hash.
    pub const UNREADABLE: Self = Self(*b"blxr unreadable\0");

    /// The hash of the bytes that are kept and restored: of zeros for a block that could not be read.
    pub fn content(self) -> Self {
        if self == Self::UNREADABLE { Self::ZERO } else { self }
    }
}

/// The digest of a group's block hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GroupDigest(pub [u8; HASH_BYTES]);

impl GroupDigest {
    /// Stands for a group that was never written; no group has this digest.
    pub const MISSING: Self = Self([0; HASH_BYTES]);
}

/// Whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<32>();
    words.iter().all(|w| w.iter().fold(0, |a, b| a | b) == 0) && rest.iter().all(|b| *b == 0)
}

fn cut(hash: blake3::Hash) -> [u8; HASH_BYTES] {
    let mut out = [0; HASH_BYTES];
    out.copy_from_slice(hash.as_bytes().split_at(HASH_BYTES).0);
    if out == BlockHash::ZERO.0 || out == BlockHash::UNREADABLE.0 {
        // These are taken; once in 2^127 blocks this costs one bit of difference.
        out = [0xff; HASH_BYTES];
    }
    out
}

/// The hash of one block of `block_bytes`; `data` may be shorter at the end of a disk.
pub fn hash_block(data: &[u8], block_bytes: usize) -> BlockHash {
    if is_zero(data) {
        return BlockHash::ZERO;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(data);
    if data.len() < block_bytes {
        hasher.update(&vec![0; block_bytes - data.len()]);
    }
    BlockHash(cut(hasher.finalize()))
}

/// The hashes of consecutive blocks.
pub fn hash_blocks(data: &[u8], block_bytes: usize) -> Vec<BlockHash> {
    data.chunks(block_bytes.max(1)).map(|block| hash_block(block, block_bytes)).collect()
}

/// Which of consecutive blocks, counted from 0, lack or are not what is to be kept and restored under their hash.
pub fn unsound<'a>(
    data: &[u8],
    hashes: &'a [BlockHash],
    block_bytes: usize,
) -> impl Iterator<Item = u64> + use<'a> {
    let found = hash_blocks(data, block_bytes);
    (0..)
        .zip(hashes)
        .filter(move |(at, hash)| found.get(*at) != Some(&hash.content()))
        .map(|(at, _)| at as u64)
}

/// Adds to `set` the blocks that could not be read, of consecutive ones from `first` on.
pub fn insert_unreadable(first: u64, hashes: &[BlockHash], set: &mut BlockSet) {
    let found = (first..).zip(hashes).filter(|(_, hash)| **hash == BlockHash::UNREADABLE);
    found.for_each(|(first, _)| set.insert(Extent { first, count: 1 }));
}

/// The digest of a group: of the hashes of its blocks, in order.
pub fn group_digest(hashes: &[BlockHash]) -> GroupDigest {
    let mut hasher = blake3::Hasher::new_derive_key("blxrep group digest v1");
    // In one piece: its chunks are hashed side by side then.
    let bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.0).collect();
    hasher.update(&bytes);
    GroupDigest(cut(hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_block_has_the_hash_of_the_block_filled_up() {
        let mut full = vec![7u8; 512];
        full.resize(4096, 0);
        assert_eq!(hash_block(&[7; 512], 4096), hash_block(&full, 4096));
        assert_eq!(hash_block(&[0; 512], 4096), BlockHash::ZERO);
        assert_ne!(hash_block(&[7; 513], 4096), hash_block(&full, 4096));
    }

    #[test]
    fn only_zeros_are_sound_for_a_block_that_could_not_be_read() {
        let is_sound = |hash, block: &[u8]| unsound(block, &[hash], 4096).next().is_none();
        assert!(is_sound(BlockHash::UNREADABLE, &[0; 4096]));
        assert!(is_sound(BlockHash::UNREADABLE, &[0; 512]));
        assert!(!is_sound(BlockHash::UNREADABLE, &[1; 4096]));
        let hash = hash_block(&[1; 4096], 4096);
        assert!(is_sound(hash, &[1; 4096]) && !is_sound(hash, &[0; 4096]));
        assert!(!is_sound(BlockHash::ZERO, &[1; 4096]));
        assert_ne!(group_digest(&[BlockHash::UNREADABLE; 256]), group_digest(&[BlockHash::ZERO; 256]));
    }

    #[test]
    fn every_block_that_is_wrong_or_lacks_is_unsound() {
        let mut data = vec![0; 40 * 4096];
        blake3::Hasher::new().finalize_xof().fill(&mut data);
        let hashes = hash_blocks(&data, 4096);
        assert_eq!(unsound(&data, &hashes, 4096).count(), 0);
        for at in [0, 15, 16, 31, 39] {
            data[at * 4096 + 77] ^= 1;
        }
        data.truncate(39 * 4096 - 1);
        assert_eq!(unsound(&data, &hashes, 4096).collect::<Vec<_>>(), [0, 15, 16, 31, 38, 39]);
    }

    #[test]
    fn zero_is_found_at_every_length_and_place() {
        for len in [0, 1, 31, 32, 33, 512, 4097] {
            let mut bytes = vec![0u8; len];
            assert!(is_zero(&bytes));
            for at in [0, len / 2, len.saturating_sub(1)] {
                if at < len {
                    bytes[at] = 1;
                    assert!(!is_zero(&bytes), "{len} {at}");
                    bytes[at] = 0;
                }
            }
        }
    }

    #[test]
    fn no_group_has_the_digest_of_a_missing_one() {
        assert_ne!(group_digest(&[]), GroupDigest::MISSING);
        assert_ne!(group_digest(&[BlockHash::ZERO; 256]), GroupDigest::MISSING);
    }
}
