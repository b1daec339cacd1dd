//! The requests of an NBD client and their answers (the NBD project's `doc/proto.md`, section "Transmission"). Pure.
//!
//! What must never happen here: a request let through that does not lie on the disk, or one whose payload is larger than
//! was agreed on.

use nix::errno::Errno;

use super::handshake::{CONTEXT_ID, Export, PAYLOAD_MAX_BYTES};

/// The bytes of a request, without the data of a write.
pub(super) const REQUEST_BYTES: usize = 28;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

mod command {
    pub(super) const READ: u16 = 0;
    pub(super) const WRITE: u16 = 1;
    pub(super) const DISC: u16 = 2;
    pub(super) const FLUSH: u16 = 3;
    pub(super) const TRIM: u16 = 4;
    pub(super) const WRITE_ZEROES: u16 = 6;
    pub(super) const BLOCK_STATUS: u16 = 7;
}

mod flag {
    pub(super) const FUA: u16 = 1;
    pub(super) const NO_HOLE: u16 = 1 << 1;
    pub(super) const REQ_ONE: u16 = 1 << 3;
}

mod chunk {
    pub(super) const DONE: u16 = 1;
    pub(super) const NONE: u16 = 0;
    pub(super) const DATA: u16 = 1;
    pub(super) const HOLE: u16 = 2;
    pub(super) const BLOCK_STATUS: u16 = 5;
    pub(super) const ERROR: u16 = (1 << 15) + 1;
}

/// Hole, and reads as zeros.
const ZERO: u32 = 0b11;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    /// The data follows the request.
    Write,
    Zero,
    /// Nothing is to be done: a flush of what is thrown away, or a trim.
    Nothing,
    /// Which ranges are zeros.
    Status {
        /// Only the first one.
        one: bool,
    },
    /// The client leaves.
    Disconnect,
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    /// What the client knows it by.
    pub(super) cookie: u64,
    /// What is asked for, or why it is refused.
    pub(super) command: Result<Command, Errno>,
    pub(super) offset: u64,
    pub(super) len: u32,
    /// Bytes of data that follow, whatever the answer will be.
    pub(super) payload_bytes: u32,
}

/// What a client does that ends its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum RequestError {
    /// It speaks something else.
    #[error("what it sends is no NBD request")]
    NotNbd,
    /// What follows cannot be taken.
    #[error("it wants to write {0} bytes at once; {PAYLOAD_MAX_BYTES} are the most")]
    Payload(u32),
}

impl Request {
    /// Reads a request. `has_context`: block status was agreed on.
    ///
    /// # Errors
    /// When nothing that follows can be understood.
    pub(super) fn decode(
        bytes: &[u8; REQUEST_BYTES],
        export: Export,
        has_context: bool,
    ) -> Result<Self, RequestError> {
        let [m0, m1, m2, m3, f0, f1, t0, t1, rest @ ..] = *bytes;
        let [c0, c1, c2, c3, c4, c5, c6, c7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        if u32::from_be_bytes([m0, m1, m2, m3]) != REQUEST_MAGIC {
            return Err(RequestError::NotNbd);
        }
        let (flags, kind) = (u16::from_be_bytes([f0, f1]), u16::from_be_bytes([t0, t1]));
        let cookie = u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]);
        let offset = u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        let payload_bytes = if kind == command::WRITE { len } else { 0 };
        if payload_bytes > PAYLOAD_MAX_BYTES {
            return Err(RequestError::Payload(payload_bytes));
        }
        let command = command(kind, flags, has_context)
            .and_then(|command| command.fits(offset, len, export).map(|()| command));
        Ok(Self { cookie, command, offset, len, payload_bytes })
    }
}

fn command(kind: u16, flags: u16, has_context: bool) -> Result<Command, Errno> {
    let (command, allowed) = match kind {
        command::READ => (Command::Read, 0),
        command::WRITE => (Command::Write, 0),
        command::DISC => (Command::Disconnect, 0),
        command::FLUSH | command::TRIM => (Command::Nothing, 0),
        command::WRITE_ZEROES => (Command::Zero, flag::NO_HOLE),
        command::BLOCK_STATUS if has_context => {
            (Command::Status { one: flags & flag::REQ_ONE != 0 }, flag::REQ_ONE)
        }
        _ => return Err(Errno::EINVAL),
    };
    // FUA is allowed with everything; what is thrown away is never durable.
    if flags & !(allowed | flag::FUA) == 0 { Ok(command) } else { Err(Errno::EINVAL) }
}

impl Command {
    /// Whether the range can be asked for.
    fn fits(self, offset: u64, len: u32, export: Export) -> Result<(), Errno> {
        let is_on_disk = offset.checked_add(u64::from(len)).is_some_and(|end| end <= export.size_bytes);
        match self {
            Self::Disconnect => Ok(()),
            Self::Write | Self::Zero if !export.is_writable => Err(Errno::EPERM),
            Self::Write | Self::Zero if !is_on_disk => Err(Errno::ENOSPC),
            Self::Read if len > PAYLOAD_MAX_BYTES => Err(Errno::EOVERFLOW),
            Self::Status { .. } if len == 0 => Err(Errno::EINVAL),
            _ if !is_on_disk => Err(Errno::EINVAL),
            _ => Ok(()),
        }
    }
}

/// The numbers the protocol has for errors.
fn number(errno: Errno) -> u32 {
    match errno {
        Errno::EPERM => 1,
        Errno::EINVAL => 22,
        Errno::ENOSPC => 28,
        Errno::EOVERFLOW => 75,
        _ => 5,
    }
}

/// A whole simple answer, or the beginning of one that data follows.
pub(super) fn simple(cookie: u64, result: Result<(), Errno>, out: &mut Vec<u8>) {
    out.extend(SIMPLE_MAGIC.to_be_bytes());
    out.extend(result.err().map_or(0, number).to_be_bytes());
    out.extend(cookie.to_be_bytes());
}

fn chunk(cookie: u64, flags: u16, kind: u16, len: usize, out: &mut Vec<u8>) {
    out.extend(CHUNK_MAGIC.to_be_bytes());
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend((len as u32).to_be_bytes());
}

/// A part of a read's data, as a chunk. Zeros are only named.
pub(super) fn data_chunk(cookie: u64, offset: u64, data: &[u8], is_zero: bool, out: &mut Vec<u8>) {
    if is_zero {
        chunk(cookie, 0, chunk::HOLE, 12, out);
        out.extend(offset.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
    } else {
        chunk(cookie, 0, chunk::DATA, 8 + data.len(), out);
        out.extend(offset.to_be_bytes());
        out.extend(data);
    }
}

/// The last chunk of an answer.
pub(super) fn last_chunk(cookie: u64, result: Result<(), Errno>, out: &mut Vec<u8>) {
    match result {
        Ok(()) => chunk(cookie, chunk::DONE, chunk::NONE, 0, out),
        Err(errno) => {
            chunk(cookie, chunk::DONE, chunk::ERROR, 6, out);
            out.extend(number(errno).to_be_bytes());
            out.extend(0u16.to_be_bytes());
        }
    }
}

/// The answer to a block status: ranges by length in bytes, and whether they are zeros.
pub(super) fn status_chunk(cookie: u64, ranges: &[(u32, bool)], out: &mut Vec<u8>) {
    chunk(cookie, chunk::DONE, chunk::BLOCK_STATUS, 4 + 8 * ranges.len(), out);
    out.extend(CONTEXT_ID.to_be_bytes());
    for (len, is_zero) in ranges {
        out.extend(len.to_be_bytes());
        out.extend(if *is_zero { ZERO } else { 0 }.to_be_bytes());
    }
}
