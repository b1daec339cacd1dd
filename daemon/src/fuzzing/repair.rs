//! Puts the hashes of a mutated file right: behind a wrong one no decoder reads on, and nothing behind it would be
//! tried.

use crate::geometry::Geometry;
use crate::hash::BlockHash;
use crate::store::layout::{HEADER_BYTES, Header, Kind};
use crate::store::{bak, cst, sum};

const CHECKSUM_AT: usize = HEADER_BYTES - 32;

/// The first `N` bytes of the hash.
fn cut<const N: usize>(bytes: &[u8]) -> [u8; N] {
    blake3::hash(bytes).as_bytes()[..N].try_into().unwrap()
}

fn header(bytes: &mut [u8], at: usize) {
    if let Some(header) = bytes.get_mut(at..at + HEADER_BYTES) {
        let sum = cut::<32>(&header[..CHECKSUM_AT]);
        header[CHECKSUM_AT..].copy_from_slice(&sum);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
}

/// The hash behind what is between `at` and `end`, which covers the 16 bytes before, too. Gives the place behind it.
fn chained(bytes: &mut [u8], at: usize, end: usize) -> Option<usize> {
    bytes.get(end..end.checked_add(16)?)?;
    let hash = cut::<16>(&bytes[at - 16..end]);
    bytes[end..end + 16].copy_from_slice(&hash);
    Some(end + 16)
}

pub(super) fn bak(bytes: &mut [u8]) {
    header(bytes, 0);
    let mut at = HEADER_BYTES;
    while bytes.get(at..at + 4) == Some(b"BLXr".as_slice()) {
        let next = u32_at(bytes, at + 4)
            .and_then(|len| at.checked_add(bak::RECORD_HEADER_BYTES + len))
            .and_then(|end| chained(bytes, at, end));
        match next {
            Some(next) => at = next,
            None => return,
        }
    }
    let Some(closing) = bytes.len().checked_sub(HEADER_BYTES).filter(|closing| *closing >= at) else {
        return;
    };
    if Header::decode(Kind::DeltaEnd, &bytes[closing..]).is_ok() || bytes[closing..].starts_with(b"BLXRend\n")
    {
        let (index, content) = (cut::<32>(&bytes[at..closing]), cut::<32>(&bytes[..closing]));
        bytes[closing + 112..closing + 144].copy_from_slice(&content);
        bytes[closing + 144..closing + 176].copy_from_slice(&index);
        header(bytes, closing);
    }
}

pub(super) fn cst(bytes: &mut [u8]) {
    header(bytes, 0);
    let mut at = HEADER_BYTES;
    while let Some(len) = u32_at(bytes, at + 4) {
        let Some(end) = at.checked_add(cst::RECORD_HEADER_BYTES + len) else { return };
        if end.checked_add(16).is_none_or(|end| end > bytes.len()) {
            return;
        }
        let own = cut::<8>(&bytes[at..at + 8]);
        bytes[at + 8..at + 16].copy_from_slice(&own);
        if bytes[at] == 3 && len == 40 {
            let total = cut::<32>(&bytes[..at]);
            bytes[end - 32..end].copy_from_slice(&total);
        }
        match chained(bytes, at, end) {
            Some(next) => at = next,
            None => return,
        }
    }
}

pub(super) fn sum(bytes: &mut [u8]) {
    header(bytes, 0);
    let Some(Ok((head, _))) = bytes.get(..HEADER_BYTES).map(|head| Header::decode(Kind::Sum, head)) else {
        return;
    };
    for group in 0..head.geometry.groups().min(64) {
        let Some(record) = record(bytes, head.geometry, group) else { return };
        let hashes: Vec<BlockHash> = sum::hashes(head.geometry, group, record);
        let right = sum::encode(head.geometry, &hashes);
        record.copy_from_slice(&right);
    }
    let content = cut::<32>(&bytes[HEADER_BYTES..]);
    bytes[112..144].copy_from_slice(&content);
    header(bytes, 0);
}

fn record(bytes: &mut [u8], geometry: Geometry, group: u64) -> Option<&mut [u8]> {
    let at = usize::try_from(sum::record_offset(geometry, group)).ok()?;
    bytes.get_mut(at..at.checked_add(sum::record_bytes(geometry) as usize)?)
}
