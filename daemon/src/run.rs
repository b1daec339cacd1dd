//! A run: consecutive blocks with their hashes, as one piece of data.
//!
//! The same bytes travel over the network and lie in a `.bak` file (`docs/FORMAT.md`, "Run"), so the dispatcher
//! stores what it received and checked without packing it again. All integers are little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | first block |
//! | 8 | 4 | number of blocks, at least 1 |
//! | 12 | 1 | encoding: 0 zeros, 1 raw, 2 zstd, 3 unreadable |
//! | 13 | 3 | zero |
//! | 16 | 4 | bytes of the payload; 0 for zeros and unreadable |
//! | 20 | 16 each | the hash of every block; none for zeros and unreadable |
//! | … | | the payload: the blocks' bytes (cut at the end of the disk), raw or as one zstd frame |

use std::borrow::Cow;

use crate::bitmap::Extent;
use crate::geometry::{GROUP_BYTES, Geometry};
use crate::hash::{BlockHash, HASH_BYTES, unsound};

/// Bytes before the hashes.
pub const RUN_HEADER_BYTES: usize = 20;
/// The longest run, encoded: 1 MiB of data in the smallest blocks.
pub const RUN_MAX_BYTES: usize = RUN_HEADER_BYTES + 2048 * HASH_BYTES + GROUP_BYTES as usize;
/// The zstd level: the fastest that the format has.
const ZSTD_LEVEL: i32 = 1;
/// Compressed data is kept only if it is at least 1/16 smaller: reading it back costs time as well.
const WORTH_IT: usize = 16;

/// How a run's payload is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Every block is zeros; no payload, no hashes.
    Zero,
    /// The payload is the data.
    Raw,
    /// The payload is one zstd frame.
    Zstd,
    /// The agent's disk could not read these blocks; no payload, no hashes. Zeros stand for them.
    Unreadable,
}

impl Encoding {
    fn code(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Raw => 1,
            Self::Zstd => 2,
            Self::Unreadable => 3,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Zero, Self::Raw, Self::Zstd, Self::Unreadable].into_iter().find(|e| e.code() == code)
    }

    /// The hash of every block of a run that carries neither hashes nor data; `None` if it carries both.
    fn only_hash(self) -> Option<BlockHash> {
        match self {
            Self::Zero => Some(BlockHash::ZERO),
            Self::Unreadable => Some(BlockHash::UNREADABLE),
            Self::Raw | Self::Zstd => None,
        }
    }

    /// The same of an encoding's number; `None` as well if there is no such encoding.
    pub fn only_hash_of(code: u8) -> Option<BlockHash> {
        Self::from_code(code).and_then(Self::only_hash)
    }
}

/// Bytes that are not a run, or whose data is not what its hashes say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// A length or field that is not possible.
    #[error("not a run: {0}")]
    Malformed(&'static str),
    /// The blocks do not lie on the disk.
    #[error("blocks {first}+{count} do not lie on a disk of {blocks} blocks")]
    OutOfRange {
        /// The first block.
        first: u64,
        /// The number of blocks.
        count: u64,
        /// The disk's blocks.
        blocks: u64,
    },
    /// The payload does not unpack to the blocks' length.
    #[error("the data of blocks {first}+{count} does not unpack")]
    Unpack {
        /// The first block.
        first: u64,
        /// The number of blocks.
        count: u64,
    },
    /// A block's data is not what its hash says.
    #[error("the data of block {block} does not have its hash")]
    Hash {
        /// The block.
        block: u64,
    },
}

/// Consecutive blocks with their hashes and data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    extent: Extent,
    encoding: Encoding,
    hashes: Vec<BlockHash>,
    payload: Vec<u8>,
}

impl Run {
    /// A run of zeros. At most 2^32 - 1 blocks.
    pub fn zeros(first: u64, count: u32) -> Self {
        let extent = Extent { first, count: u64::from(count) };
        Self { extent, encoding: Encoding::Zero, hashes: Vec::new(), payload: Vec::new() }
    }

    /// Blocks that could not be read. At most 2^32 - 1 of them.
    pub fn unreadable(first: u64, count: u32) -> Self {
        Self { encoding: Encoding::Unreadable, ..Self::zeros(first, count) }
    }

    /// Packs at most 1 MiB of consecutive blocks, hashed already.
    pub fn pack(first: u64, hashes: Vec<BlockHash>, data: &[u8]) -> Self {
        let extent = Extent { first, count: hashes.len() as u64 };
        let packed = zstd::bulk::compress(data, ZSTD_LEVEL).ok();
        match packed.filter(|p| p.len() + data.len() / WORTH_IT <= data.len()) {
            Some(payload) => Self { extent, encoding: Encoding::Zstd, hashes, payload },
            None => Self { extent, encoding: Encoding::Raw, hashes, payload: data.to_vec() },
        }
    }

    /// The blocks.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// How the payload is packed.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The hash of the block `index` blocks after the first.
    pub fn hash(&self, index: u64) -> BlockHash {
        let own = || usize::try_from(index).ok().and_then(|i| self.hashes.get(i)).copied();
        self.encoding.only_hash().or_else(own).unwrap_or(BlockHash::ZERO)
    }

    /// Whether it says of any block that it could not be read.
    pub fn has_unreadable(&self) -> bool {
        self.encoding == Encoding::Unreadable || self.hashes.contains(&BlockHash::UNREADABLE)
    }

    /// Unpacks and checks every block; `None` where zeros stand for all of them.
    ///
    /// # Errors
    /// When the payload does not unpack to exactly the blocks' bytes, or a block does not have its hash.
    pub fn unpack(&self, geometry: Geometry) -> Result<Option<Cow<'_, [u8]>>, RunError> {
        let Extent { first, count } = self.extent;
        let len =
            usize::try_from(geometry.range(first, count).1).map_err(|_| RunError::Unpack { first, count })?;
        let data = match self.encoding {
            Encoding::Zero | Encoding::Unreadable => return Ok(None),
            Encoding::Raw => Cow::Borrowed(&*self.payload),
            Encoding::Zstd => {
                let unpacked = zstd::bulk::decompress(&self.payload, len);
                Cow::Owned(unpacked.map_err(|_| RunError::Unpack { first, count })?)
            }
        };
        if data.len() != len {
            return Err(RunError::Unpack { first, count });
        }
        match unsound(&data, &self.hashes, geometry.block_bytes()).next() {
            Some(bad) => Err(RunError::Hash { block: first + bad }),
            None => Ok(Some(data)),
        }
    }

    /// The bytes that [`Self::encode`] appends.
    pub fn encoded_len(&self) -> usize {
        RUN_HEADER_BYTES + self.hashes.len() * HASH_BYTES + self.payload.len()
    }

    /// Appends the run's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(self.encoded_len());
        out.extend_from_slice(&self.extent.first.to_le_bytes());
        out.extend_from_slice(&(self.extent.count as u32).to_le_bytes());
        out.extend_from_slice(&[self.encoding.code(), 0, 0, 0]);
        out.extend_from_slice(&(self.payload.len() as u32).to_le_bytes());
        for hash in &self.hashes {
            out.extend_from_slice(&hash.0);
        }
        out.extend_from_slice(&self.payload);
    }

    /// Reads a run from exactly these bytes. The data is not checked yet: see [`Self::unpack`].
    ///
    /// # Errors
    /// When the bytes are no run, or its blocks are not on a disk of this geometry.
    pub fn decode(bytes: &[u8], geometry: Geometry) -> Result<Self, RunError> {
        let (header, rest) = bytes
            .split_first_chunk::<RUN_HEADER_BYTES>()
            .ok_or(RunError::Malformed("shorter than its header"))?;
        let [f0, f1, f2, f3, f4, f5, f6, f7, c0, c1, c2, c3, encoding, z0, z1, z2, p0, p1, p2, p3] = *header;
        let first = u64::from_le_bytes([f0, f1, f2, f3, f4, f5, f6, f7]);
        let count = u64::from(u32::from_le_bytes([c0, c1, c2, c3]));
        let payload_len = u32::from_le_bytes([p0, p1, p2, p3]) as usize;
        if [z0, z1, z2] != [0; 3] {
            return Err(RunError::Malformed("bytes that must be zero are not"));
        }
        let encoding =
            Encoding::from_code(encoding).ok_or(RunError::Malformed("an encoding that is not known"))?;
        let carries_data = encoding.only_hash().is_none();
        let blocks = geometry.blocks();
        if count == 0 || first.checked_add(count).is_none_or(|end| end > blocks) {
            return Err(RunError::OutOfRange { first, count, blocks });
        }
        if carries_data && count > geometry.group_blocks() {
            return Err(RunError::Malformed("more than 1 MiB of data"));
        }
        let hash_count = if carries_data { count as usize } else { 0 };
        let (hashes, payload) = rest
            .split_at_checked(hash_count * HASH_BYTES)
            .ok_or(RunError::Malformed("shorter than its hashes"))?;
        if payload.len() != payload_len || carries_data == payload.is_empty() {
            return Err(RunError::Malformed("a payload of another length"));
        }
        let hashes = hashes.as_chunks::<HASH_BYTES>().0.iter().map(|h| BlockHash(*h)).collect();
        Ok(Self { extent: Extent { first, count }, encoding, hashes, payload: payload.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::hash_blocks;
    use proptest::prelude::*;

    fn geometry() -> Geometry {
        Geometry::new((4 << 20) + 512, 12).unwrap()
    }

    fn sample() -> Run {
        let data: Vec<u8> = (0..8192u32).map(|i| (i / 100) as u8).collect();
        Run::pack(3, hash_blocks(&data, 4096), &data)
    }

    #[test]
    fn what_compresses_is_compressed_and_what_does_not_is_raw() {
        assert_eq!(sample().encoding(), Encoding::Zstd);
        let mut noise = vec![0; 8192];
        blake3::Hasher::new().update(b"x").finalize_xof().fill(&mut noise);
        let run = Run::pack(0, hash_blocks(&noise, 4096), &noise);
        assert_eq!(run.encoding(), Encoding::Raw);
        assert_eq!(run.unpack(geometry()).unwrap().unwrap(), noise);
    }

    #[test]
    fn the_last_block_may_be_short() {
        let data = vec![5; 4096 + 512];
        let run = Run::pack(1023, hash_blocks(&data, 4096), &data);
        assert_eq!(run.unpack(geometry()).unwrap().unwrap(), data);
        let run = Run::pack(1022, hash_blocks(&data, 4096), &data);
        assert!(matches!(run.unpack(geometry()), Err(RunError::Unpack { .. })), "in the middle it may not");
    }

    #[test]
    fn blocks_that_could_not_be_read_are_neither_zeros_nor_data() {
        let run = Run::unreadable(1020, 5);
        assert!((0..5).all(|i| run.hash(i) == BlockHash::UNREADABLE) && run.has_unreadable());
        assert_eq!(run.unpack(geometry()).unwrap(), None);
        assert!(!Run::zeros(1020, 5).has_unreadable() && !sample().has_unreadable());
        let mut bytes = Vec::new();
        run.encode(&mut bytes);
        assert_eq!((bytes.len(), bytes[12]), (RUN_HEADER_BYTES, 3));
        assert_eq!(Run::decode(&bytes, geometry()).unwrap(), run);
        assert_eq!(Encoding::only_hash_of(bytes[12]), Some(BlockHash::UNREADABLE));
        bytes.push(0);
        assert!(Run::decode(&bytes, geometry()).is_err(), "it carries no data");
    }

    #[test]
    fn among_data_only_zeros_stand_for_a_block_that_could_not_be_read() {
        let mut data = vec![7; 3 * 4096];
        data[4096..8192].fill(0);
        let mut hashes = hash_blocks(&data, 4096);
        hashes[1] = BlockHash::UNREADABLE;
        let run = Run::pack(5, hashes.clone(), &data);
        assert_eq!(run.unpack(geometry()).unwrap().unwrap(), data);
        assert!(run.has_unreadable());
        data[5000] = 1;
        let run = Run::pack(5, hashes, &data);
        assert_eq!(run.unpack(geometry()), Err(RunError::Hash { block: 6 }));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let mut bytes = Vec::new();
        sample().encode(&mut bytes);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            let seen = Run::decode(&bad, geometry()).and_then(|run| {
                let data = run.unpack(geometry())?.map(Cow::into_owned);
                Ok((run, data))
            });
            // The place of a run is not covered by its hashes (the frame and the file around it check that), and a
            // few bits of a zstd frame mean nothing. The data is right or refused.
            if let Ok((run, data)) = seen {
                let same = data.as_deref() == sample().unpack(geometry()).unwrap().as_deref();
                assert!(same || run.extent() != sample().extent(), "byte {at}");
            }
        }
    }

    proptest! {
        #[test]
        fn decoding_gives_back_what_was_encoded(first in 0u64..900, blocks in 1usize..100, fill in any::<u8>(), seed in any::<u64>()) {
            let mut data = vec![fill; blocks * 4096];
            for (i, b) in data.iter_mut().enumerate().filter(|(i, _)| i % 7 == 0) { *b = (seed >> (i % 64)) as u8; }
            let run = Run::pack(first, hash_blocks(&data, 4096), &data);
            let mut bytes = Vec::new();
            run.encode(&mut bytes);
            prop_assert_eq!(bytes.len(), run.encoded_len());
            let again = Run::decode(&bytes, geometry()).unwrap();
            prop_assert_eq!(&again, &run);
            prop_assert_eq!(again.unpack(geometry()).unwrap().unwrap(), data);
        }

        #[test]
        fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(run) = Run::decode(&bytes, geometry()) { let _ = run.unpack(geometry()); }
        }
    }
}
