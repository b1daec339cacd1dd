//! BLAKE3 of blocks of one length side by side: three times as fast as one after the other.
//!
//! A processor's vectors hold a word of up to 16 chunks of 1 KiB. A block of 4 KiB alone fills a quarter of them, and the tree
//! above its chunks less; so the same chunk of 16 blocks is hashed at once, then each level of their 16 trees (the BLAKE3 paper,
//! sections 2.4, 2.5 and 5.3). The crate's vector code is public, but not promised to stay as it is.
//!
//! What must never happen here: another hash than `blake3::hash` gives.

use blake3::platform::Platform;
use blake3::{CHUNK_LEN, IncrementCounter, OUT_LEN};

/// Blocks that are hashed together.
pub(super) const BLOCKS: usize = 16;
/// The fewest chunks of a block: one alone is its own root.
const CHUNKS_MIN: usize = 2;

/// The flags of the BLAKE3 paper, table 3.
mod flag {
    pub(super) const CHUNK_START: u8 = 1 << 0;
    pub(super) const CHUNK_END: u8 = 1 << 1;
    pub(super) const PARENT: u8 = 1 << 2;
    pub(super) const ROOT: u8 = 1 << 3;
}

/// The key of a hash without one: the same paper, table 1.
const IV: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// The hashes of [`BLOCKS`] blocks of `block_bytes` each; `None` if they are of another number or length, or no power of two of
/// chunks.
pub(super) fn hash_many(blocks: &[&[u8]], block_bytes: usize) -> Option<Vec<[u8; OUT_LEN]>> {
    let per_block = block_bytes / CHUNK_LEN;
    let is_even = block_bytes.is_power_of_two() && per_block >= CHUNKS_MIN;
    if !is_even || blocks.len() != BLOCKS || blocks.iter().any(|block| block.len() != block_bytes) {
        return None;
    }
    let platform = Platform::detect();
    // Of each block the values of its chunks, one behind the other.
    let mut values = vec![[0; OUT_LEN]; BLOCKS * per_block];
    let mut row = [[0; OUT_LEN]; BLOCKS];
    for at in 0..per_block {
        let chunks: Vec<&[u8; CHUNK_LEN]> =
            blocks.iter().filter_map(|block| block.as_chunks().0.get(at)).collect();
        let (start, end) = (flag::CHUNK_START, flag::CHUNK_END);
        let out = row.as_flattened_mut();
        platform.hash_many(&chunks, &IV, at as u64, IncrementCounter::No, 0, start, end, out);
        let slots = values.iter_mut().skip(at).step_by(per_block);
        slots.zip(row).for_each(|(slot, value)| *slot = value);
    }
    // Two neighbours are the input of what is above them.
    while values.len() > BLOCKS {
        let flags = flag::PARENT | if values.len() == 2 * BLOCKS { flag::ROOT } else { 0 };
        let pairs: Vec<&[u8; 2 * OUT_LEN]> = values.as_flattened().as_chunks().0.iter().collect();
        let mut above = vec![[0; OUT_LEN]; pairs.len()];
        platform.hash_many(&pairs, &IV, 0, IncrementCounter::No, flags, 0, 0, above.as_flattened_mut());
        values = above;
    }
    Some(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hashes_are_those_of_the_blocks_alone() {
        for shift in 9..=20 {
            let block_bytes = 1 << shift;
            let mut data = vec![0; BLOCKS * block_bytes];
            blake3::Hasher::new().update(&[shift]).finalize_xof().fill(&mut data);
            let blocks: Vec<&[u8]> = data.chunks(block_bytes).collect();
            let alone: Vec<_> = blocks.iter().map(|block| *blake3::hash(block).as_bytes()).collect();
            let together = hash_many(&blocks, block_bytes);
            assert_eq!(together, (shift >= 11).then_some(alone), "blocks of 2^{shift}");
        }
    }

    #[test]
    fn what_is_not_even_is_left_to_others() {
        let data = vec![7; BLOCKS * 4096];
        let blocks: Vec<&[u8]> = data.chunks(4096).collect();
        assert!(hash_many(&blocks, 4096).is_some());
        assert_eq!(hash_many(&blocks[1..], 4096), None);
        assert_eq!(hash_many(&blocks, 8192), None);
        let mut short = blocks.clone();
        short[15] = &data[..512];
        assert_eq!(hash_many(&short, 4096), None);
        let odd: Vec<&[u8]> = data.chunks(3072).take(BLOCKS).collect();
        assert_eq!(hash_many(&odd, 3072), None);
    }
}
