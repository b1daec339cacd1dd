//! One NBD client, over whatever it is connected by.
//!
//! What must never happen here: more than a few MiB held for a client, a wait for one that keeps others waiting.

use std::io::{self, Read, Write};

use nix::errno::Errno;

use super::handshake::{
    Export, Handshake, HandshakeError, Next, OPTION_HEADER_BYTES, OPTION_MAX_BYTES, OPTIONS_MAX, greeting,
    option_header,
};
use super::image::Image;
use super::request::{
    Command, REQUEST_BYTES, Request, RequestError, data_chunk, last_chunk, simple, status_chunk,
};
use crate::geometry::GROUP_BYTES;
use crate::hash::is_zero;

/// Data is read and written in such parts.
const PART_MAX_BYTES: usize = 1 << 20;
/// The most MiB that one block status looks at.
const STATUS_MAX_MIB: usize = 1024;

/// Why a connection ended before the client left.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// It is gone, or too slow.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What it says before it asks for data.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// What it asks for.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// It goes on and on.
    #[error("it sends options without end")]
    Options,
    /// A read failed when a part of its data was sent already; the protocol has no other way to say so.
    #[error("a read of it failed in the middle")]
    Halfway,
}

/// One client. `agreed` is called when the negotiation is over.
pub(super) fn talk<S: Read + Write>(
    stream: &mut S,
    image: &Image,
    agreed: impl FnOnce(&S) -> io::Result<()>,
) -> Result<(), ClientError> {
    let block_bytes = u32::try_from(image.block_bytes()).unwrap_or(4096).max(4096);
    let export = Export { size_bytes: image.size_bytes(), block_bytes, is_writable: image.is_writable() };
    let Some(handshake) = negotiate(stream, export)? else { return Ok(()) };
    agreed(stream)?;
    let mut client = Client { stream, image, export, handshake, out: Vec::new() };
    while client.answer_one()? {}
    Ok(())
}

fn negotiate<S: Read + Write>(stream: &mut S, export: Export) -> Result<Option<Handshake>, ClientError> {
    stream.write_all(&greeting())?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let mut handshake = Handshake::new(export, flags)?;
    for _ in 0..OPTIONS_MAX {
        let mut header = [0; OPTION_HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let (option, len) = option_header(&header)?;
        let mut data = Vec::new();
        stream.take(u64::from(len)).take(OPTION_MAX_BYTES as u64).read_to_end(&mut data)?;
        let rest = u64::from(len) - data.len() as u64;
        let whole = if rest == 0 { Some(&*data) } else { None };
        if io::copy(&mut stream.take(rest), &mut io::sink())? < rest {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let (answer, next) = handshake.answer(option, whole)?;
        stream.write_all(&answer)?;
        match next {
            Next::Option => {}
            Next::Transmission => return Ok(Some(handshake)),
            Next::End => return Ok(None),
        }
    }
    Err(ClientError::Options)
}

struct Client<'a, S> {
    stream: &'a mut S,
    image: &'a Image,
    export: Export,
    handshake: Handshake,
    /// An answer, or a part of one, before it is sent.
    out: Vec<u8>,
}

impl<S: Read + Write> Client<'_, S> {
    /// Answers a request; `false` when the client leaves.
    fn answer_one(&mut self) -> Result<bool, ClientError> {
        let mut bytes = [0; REQUEST_BYTES];
        self.stream.read_exact(&mut bytes)?;
        let request = Request::decode(&bytes, self.export, self.handshake.has_context)?;
        let Request { command, offset, len, .. } = request;
        match command {
            Ok(Command::Disconnect) => return Ok(false),
            Ok(Command::Read) => self.read(&request)?,
            Ok(Command::Status { one }) => self.status(&request, one)?,
            Ok(Command::Write) | Err(_) => {
                let result = self.take_payload(&request)?;
                self.end(&request, result)?;
            }
            Ok(Command::Zero) => self.end(&request, self.image.write_zeros(offset, u64::from(len)))?,
            Ok(Command::Nothing) => self.end(&request, Ok(()))?,
        }
        Ok(true)
    }

    fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// Sends an answer without data.
    fn end(&mut self, request: &Request, result: Result<(), Errno>) -> io::Result<()> {
        if self.handshake.is_structured {
            last_chunk(request.cookie, result, &mut self.out);
        } else {
            simple(request.cookie, result, &mut self.out);
        }
        self.send()
    }

    /// Writes the data that follows a request, or throws it away if that is refused or fails.
    fn take_payload(&mut self, request: &Request) -> io::Result<Result<(), Errno>> {
        let mut result = request.command.map(|_| ());
        let (mut at, mut left) = (request.offset, request.payload_bytes as usize);
        let mut part = vec![0; left.min(PART_MAX_BYTES)];
        while left > 0 {
            part.truncate(left);
            self.stream.read_exact(&mut part)?;
            result = result.and_then(|()| self.image.write_at(at, &part));
            at = at.saturating_add(part.len() as u64);
            left -= part.len();
        }
        Ok(result)
    }

    fn read(&mut self, request: &Request) -> Result<(), ClientError> {
        let is_structured = self.handshake.is_structured;
        let end = request.offset + u64::from(request.len);
        let mut at = request.offset;
        let mut part = vec![0; PART_MAX_BYTES.min(request.len as usize)];
        while at < end {
            // Up to the border of a MiB, which is what the store reads at once.
            let in_mib = GROUP_BYTES - at % GROUP_BYTES;
            let len = in_mib.min(end - at).min(PART_MAX_BYTES as u64) as usize;
            let Some(data) = part.get_mut(..len) else { break };
            match self.image.read_at(at, data) {
                Err(errno) if is_structured || at == request.offset => {
                    return Ok(self.end(request, Err(errno))?);
                }
                Err(_) => return Err(ClientError::Halfway),
                Ok(()) if is_structured => data_chunk(request.cookie, at, data, is_zero(data), &mut self.out),
                Ok(()) => {
                    if at == request.offset {
                        simple(request.cookie, Ok(()), &mut self.out);
                    }
                    self.out.extend_from_slice(data);
                }
            }
            at += len as u64;
            if at == end && is_structured {
                last_chunk(request.cookie, Ok(()), &mut self.out);
            }
            self.send()?;
        }
        if request.len == 0 {
            self.end(request, Ok(()))?;
        }
        Ok(())
    }

    fn status(&mut self, request: &Request, one: bool) -> io::Result<()> {
        let end = request.offset + u64::from(request.len);
        let mut ranges: Vec<(u32, bool)> = Vec::new();
        let mut at = request.offset;
        for _ in 0..STATUS_MAX_MIB {
            if at >= end {
                break;
            }
            let len = (GROUP_BYTES - at % GROUP_BYTES).min(end - at) as u32;
            let is_zero = match self.image.is_zero_mib(at) {
                Ok(is_zero) => is_zero,
                Err(errno) if ranges.is_empty() => return self.end(request, Err(errno)),
                // Asked for again by itself, it is told.
                Err(_) => break,
            };
            match ranges.last_mut() {
                Some((last, kind)) if *kind == is_zero => *last += len,
                Some(_) if one => break,
                _ => ranges.push((len, is_zero)),
            }
            at += u64::from(len);
        }
        status_chunk(request.cookie, &ranges, &mut self.out);
        self.send()
    }
}
