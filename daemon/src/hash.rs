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

    /// Whether `block` is what is to be kept and restored under this hash.
    pub fn is_sound(self, block: &[u8], block_bytes: usize) -> bool {
        hash_block(block, block_bytes) == self.content()
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

/// Adds to `set` the blocks that could not be read, of consecutive ones from `first` on.
pub fn insert_unreadable(first: u64, hashes: &[BlockHash], set: &mut BlockSet) {
    let found = (first..).zip(hashes).filter(|(_, hash)| **hash == BlockHash::UNREADABLE);
    found.for_each(|(first, _)| set.insert(Extent { first, count: 1 }));
}

/// The digest of a group: of the hashes of its blocks, in order.
pub fn group_digest(hashes: &[BlockHash]) -> GroupDigest {
    let mut hasher = blake3::Hasher::new_derive_key("blxrep group digest v1");
    for hash in hashes {
        hasher.update(&hash.0);
    }
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
        assert!(BlockHash::UNREADABLE.is_sound(&[0; 4096], 4096));
        assert!(BlockHash::UNREADABLE.is_sound(&[0; 512], 4096));
        assert!(!BlockHash::UNREADABLE.is_sound(&[1; 4096], 4096));
        let hash = hash_block(&[1; 4096], 4096);
        assert!(hash.is_sound(&[1; 4096], 4096) && !hash.is_sound(&[0; 4096], 4096));
        assert!(!BlockHash::ZERO.is_sound(&[1; 4096], 4096));
        assert_ne!(group_digest(&[BlockHash::UNREADABLE; 256]), group_digest(&[BlockHash::ZERO; 256]));
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
