//! The hashes beside a base image (`docs/FORMAT.md`, "`.sum`"): for every group the hashes of its blocks and their
//! digest. A record of zeros stands for a group that never arrived.

use super::StoreError;
use super::handle::Handle;
use super::layout::HEADER_BYTES;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, GroupDigest, HASH_BYTES, group_digest};

/// Bytes of one group's record.
pub fn record_bytes(geometry: Geometry) -> u64 {
    (geometry.group_blocks() + 1) * HASH_BYTES as u64
}

/// Where a group's record begins.
pub fn record_offset(geometry: Geometry, group: u64) -> u64 {
    HEADER_BYTES as u64 + group * record_bytes(geometry)
}

/// The length of a whole `.sum`.
pub fn file_bytes(geometry: Geometry) -> u64 {
    record_offset(geometry, geometry.groups())
}

/// The record of a group with these hashes.
pub fn encode(geometry: Geometry, hashes: &[BlockHash]) -> Vec<u8> {
    let len = record_bytes(geometry) as usize;
    let mut out = Vec::with_capacity(len);
    hashes.iter().for_each(|h| out.extend(h.0));
    out.resize(len - HASH_BYTES, 0);
    out.extend(group_digest(hashes).0);
    out
}

/// A group's hashes as they lie in a record, without looking at the digest.
pub fn hashes(geometry: Geometry, group: u64, record: &[u8]) -> Vec<BlockHash> {
    let blocks = geometry.group_extent(group).1 as usize;
    record.as_chunks::<HASH_BYTES>().0.iter().take(blocks).map(|h| BlockHash(*h)).collect()
}

/// A group's hashes if the record is whole; `None` if it is missing or damaged.
pub fn decode(geometry: Geometry, group: u64, record: &[u8]) -> Option<Vec<BlockHash>> {
    let hashes = hashes(geometry, group, record);
    (encode(geometry, &hashes) == record).then_some(hashes)
}

/// Reads a group's record as it lies there.
///
/// # Errors
/// What [`Handle::read`] says.
pub fn read_record(file: &Handle, geometry: Geometry, group: u64) -> Result<Vec<u8>, StoreError> {
    file.read_vec(record_bytes(geometry) as usize, record_offset(geometry, group))
}

/// Reads a group's hashes.
///
/// # Errors
/// Damaged if the record is not whole.
pub fn read(file: &Handle, geometry: Geometry, group: u64) -> Result<Vec<BlockHash>, StoreError> {
    let record = read_record(file, geometry, group)?;
    decode(geometry, group, &record)
        .ok_or_else(|| file.damaged(format!("the hashes of group {group} do not have their digest")))
}

/// Reads a group's hashes for a disk that was given another size since: behind the stored end there are zeros, and what is
/// behind the new end is left out.
///
/// # Errors
/// What [`read`] says.
pub fn read_resized(
    file: &Handle,
    stored: Geometry,
    now: Geometry,
    group: u64,
) -> Result<Vec<BlockHash>, StoreError> {
    let mut hashes = if group < stored.groups() { read(file, stored, group)? } else { Vec::new() };
    hashes.resize(now.group_extent(group).1 as usize, BlockHash::ZERO);
    Ok(hashes)
}

/// Reads only a group's digest.
///
/// # Errors
/// What [`Handle::read`] says.
pub fn read_digest(file: &Handle, geometry: Geometry, group: u64) -> Result<GroupDigest, StoreError> {
    let mut digest = [0; HASH_BYTES];
    file.read(&mut digest, record_offset(geometry, group + 1) - HASH_BYTES as u64)?;
    Ok(GroupDigest(digest))
}

/// The hash over all records.
///
/// # Errors
/// What [`Handle::read`] says.
pub fn content_hash(file: &Handle, geometry: Geometry) -> Result<[u8; 32], StoreError> {
    let mut hasher = blake3::Hasher::new();
    for group in 0..geometry.groups() {
        hasher.update(&read_record(file, geometry, group)?);
    }
    Ok(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_gives_back_what_was_encoded(shift in 9u8..=20, fill in proptest::collection::vec(any::<u8>(), 1..40)) {
            let geometry = Geometry::new((1 << 20) + 4096 + 512, shift).unwrap();
            for group in 0..2 {
                let blocks = geometry.group_extent(group).1 as usize;
                let hashes: Vec<_> = (0..blocks).map(|i| BlockHash([fill[i % fill.len()]; 16])).collect();
                let record = encode(geometry, &hashes);
                prop_assert_eq!(record.len() as u64, record_bytes(geometry));
                prop_assert_eq!(decode(geometry, group, &record), Some(hashes));
                let at = fill[0] as usize * 7 % record.len();
                let mut bad = record.clone();
                bad[at] ^= 1;
                prop_assert_eq!(decode(geometry, group, &bad), None);
            }
        }
    }

    #[test]
    fn a_missing_group_is_not_whole() {
        let geometry = Geometry::new(2 << 20, 12).unwrap();
        assert_eq!(decode(geometry, 0, &vec![0; record_bytes(geometry) as usize]), None);
    }
}
