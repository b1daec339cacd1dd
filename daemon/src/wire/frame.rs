//! The frame: one binary WebSocket message.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | protocol version, 4 |
//! | 1 | 1 | kind: 1 message, 2 data |
//! | 2 | 2 | zero |
//! | 4 | 4 | bytes of the body, little-endian; exactly what follows |
//! | 8 | | the body |
//!
//! The body of a data frame is one byte for the area (1 base, 2 delta), seven zero bytes, an eight-byte sequence
//! number and a run (`run.rs`). The body of a message is postcard (`message.rs`).

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::PROTOCOL_VERSION;
use crate::geometry::Geometry;
use crate::run::{RUN_MAX_BYTES, Run, RunError};

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 8;
const DATA_HEADER_BYTES: usize = 16;
/// The longest frame either side accepts.
pub const FRAME_MAX_BYTES: usize = FRAME_HEADER_BYTES + DATA_HEADER_BYTES + RUN_MAX_BYTES + 4096;

const KIND_MESSAGE: u8 = 1;
const KIND_DATA: u8 = 2;

/// Where a run belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// A part of the full copy that the dispatcher does not have yet.
    Base,
    /// Changed blocks, newer than the base and every run with a smaller sequence number.
    Delta,
}

/// What a frame holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<M> {
    /// A message.
    Message(M),
    /// Data.
    Data {
        /// Where it belongs.
        area: Area,
        /// Ever growing on one disk; the newest of two runs has the larger one.
        seq: u64,
        /// The blocks, not checked against their hashes yet.
        run: Run,
    },
}

/// Bytes that are not a frame this side accepts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The frame is longer than allowed.
    #[error("a frame of {0} bytes is too long: at most {FRAME_MAX_BYTES}")]
    TooLong(usize),
    /// The other side speaks another version.
    #[error(
        "protocol version {0}, but this side speaks version {PROTOCOL_VERSION}: install the same blxrep on both"
    )]
    Version(u8),
    /// Header and content do not fit.
    #[error("not a frame: {0}")]
    Malformed(&'static str),
    /// The body is not a message.
    #[error("not a message")]
    Message,
    /// The data is not a run.
    #[error(transparent)]
    Run(#[from] RunError),
}

fn header(kind: u8, body_bytes: usize) -> [u8; FRAME_HEADER_BYTES] {
    let [a, b, c, d] = (body_bytes as u32).to_le_bytes();
    [PROTOCOL_VERSION, kind, 0, 0, a, b, c, d]
}

/// The frame of a message.
///
/// # Errors
/// When the message does not fit into a frame.
pub fn encode_message<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let body = postcard::to_stdvec(message).map_err(|_| FrameError::Message)?;
    let len = FRAME_HEADER_BYTES + body.len();
    if len > FRAME_MAX_BYTES {
        return Err(FrameError::TooLong(len));
    }
    let mut out = Vec::with_capacity(len);
    out.extend_from_slice(&header(KIND_MESSAGE, body.len()));
    out.extend_from_slice(&body);
    Ok(out)
}

/// The frame of a run.
pub fn encode_data(area: Area, seq: u64, run: &Run) -> Vec<u8> {
    let body = DATA_HEADER_BYTES + run.encoded_len();
    let mut out = Vec::with_capacity(FRAME_HEADER_BYTES + body);
    out.extend_from_slice(&header(KIND_DATA, body));
    out.extend_from_slice(&[if area == Area::Base { 1 } else { 2 }, 0, 0, 0, 0, 0, 0, 0]);
    out.extend_from_slice(&seq.to_le_bytes());
    run.encode(&mut out);
    out
}

fn split(bytes: &[u8]) -> Result<(u8, &[u8]), FrameError> {
    if bytes.len() > FRAME_MAX_BYTES {
        return Err(FrameError::TooLong(bytes.len()));
    }
    let (header, body) = bytes
        .split_first_chunk::<FRAME_HEADER_BYTES>()
        .ok_or(FrameError::Malformed("shorter than its header"))?;
    let [version, kind, z0, z1, a, b, c, d] = *header;
    if version != PROTOCOL_VERSION {
        return Err(FrameError::Version(version));
    }
    if (z0, z1) != (0, 0) || u32::from_le_bytes([a, b, c, d]) as usize != body.len() {
        return Err(FrameError::Malformed("the header does not fit the body"));
    }
    Ok((kind, body))
}

/// Reads a frame that must be a message.
///
/// # Errors
/// When the bytes are anything else, or something follows the message.
pub fn decode_message<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, FrameError> {
    match split(bytes)? {
        (KIND_MESSAGE, body) => match postcard::take_from_bytes(body) {
            Ok((message, [])) => Ok(message),
            _ => Err(FrameError::Message),
        },
        _ => Err(FrameError::Malformed("a message was expected")),
    }
}

/// Reads a frame that may be a message, or data of a disk of this geometry.
///
/// # Errors
/// When the bytes are neither.
pub fn decode<M: DeserializeOwned>(bytes: &[u8], geometry: Geometry) -> Result<Frame<M>, FrameError> {
    match split(bytes)? {
        (KIND_MESSAGE, _) => Ok(Frame::Message(decode_message(bytes)?)),
        (KIND_DATA, body) => {
            let (header, run) = body
                .split_first_chunk::<DATA_HEADER_BYTES>()
                .ok_or(FrameError::Malformed("shorter than a data header"))?;
            let [area, z @ .., s0, s1, s2, s3, s4, s5, s6, s7] = *header;
            let area = match area {
                1 => Area::Base,
                2 => Area::Delta,
                _ => return Err(FrameError::Malformed("an area that is not known")),
            };
            if z != [0; 7] {
                return Err(FrameError::Malformed("bytes that must be zero are not"));
            }
            let seq = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            Ok(Frame::Data { area, seq, run: Run::decode(run, geometry)? })
        }
        _ => Err(FrameError::Malformed("a kind that is not known")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::hash_blocks;
    use crate::wire::message::{DiskDown, DiskUp};
    use proptest::prelude::*;

    fn geometry() -> Geometry {
        Geometry::new(8 << 20, 9).unwrap()
    }

    #[test]
    fn the_longest_run_fits_into_a_frame() {
        let mut noise = vec![0; 1 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let run = Run::pack(2048, hash_blocks(&noise, 512), &noise);
        let bytes = encode_data(Area::Base, 7, &run);
        assert!(bytes.len() <= FRAME_MAX_BYTES);
        let again = decode::<DiskUp>(&bytes, geometry()).unwrap();
        assert_eq!(again, Frame::Data { area: Area::Base, seq: 7, run });
    }

    #[test]
    fn what_is_too_long_or_of_another_version_is_refused() {
        assert_eq!(
            decode_message::<DiskUp>(&vec![0; FRAME_MAX_BYTES + 1]),
            Err(FrameError::TooLong(FRAME_MAX_BYTES + 1))
        );
        let mut bytes = encode_message(&DiskUp::ScanDone).unwrap();
        assert_eq!(decode_message(&bytes), Ok(DiskUp::ScanDone));
        bytes.push(0);
        assert!(decode_message::<DiskUp>(&bytes).is_err(), "something behind the body");
        bytes.pop();
        bytes[0] = 9;
        assert_eq!(decode_message::<DiskUp>(&bytes), Err(FrameError::Version(9)));
    }

    proptest! {
        #[test]
        fn garbage_is_refused_without_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0u8..4) {
            let len = (bytes.len().saturating_sub(8) as u32).to_le_bytes();
            for (at, b) in [PROTOCOL_VERSION, kind, 0, 0].into_iter().chain(len).enumerate() {
                if let Some(slot) = bytes.get_mut(at) { *slot = b; }
            }
            let _ = decode::<DiskUp>(&bytes, geometry());
            let _ = decode::<DiskDown>(&bytes, geometry());
        }
    }
}
