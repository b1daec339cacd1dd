//! The beginning of an NBD connection: what server and client agree on before data is asked for (the fixed newstyle
//! negotiation; the NBD project's `doc/proto.md`, section "Handshake phase"). Pure: bytes in, bytes out.
//!
//! Known are EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED_REPLY and LIST/SET_META_CONTEXT with `base:allocation`; there
//! is one export, the one without a name. Everything else is answered with "unsupported", as the protocol wants it.

/// The most bytes of one option that are read: names and queries are short.
pub(super) const OPTION_MAX_BYTES: usize = 4096;
/// The most options before the client must begin or leave.
pub(super) const OPTIONS_MAX: usize = 64;
/// The most bytes of one read or write.
pub(super) const PAYLOAD_MAX_BYTES: u32 = 32 << 20;
/// The number of `base:allocation` on this connection.
pub(super) const CONTEXT_ID: u32 = 1;
/// The bytes of an option's header.
pub(super) const OPTION_HEADER_BYTES: usize = 16;

const CONTEXT: &[u8] = b"base:allocation";
const NAMESPACE: &[u8] = b"base:";

const SERVER_MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Fixed newstyle, and no zeros behind the answer to EXPORT_NAME.
const SERVER_FLAGS: u16 = 0b11;
const NO_ZEROS: u32 = 0b10;
/// The zeros behind the answer to EXPORT_NAME, where the client wants them.
const ZEROS_BYTES: usize = 124;

mod option {
    pub(super) const EXPORT_NAME: u32 = 1;
    pub(super) const ABORT: u32 = 2;
    pub(super) const LIST: u32 = 3;
    pub(super) const INFO: u32 = 6;
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
    pub(super) const LIST_META_CONTEXT: u32 = 9;
    pub(super) const SET_META_CONTEXT: u32 = 10;
}

mod reply {
    pub(super) const ACK: u32 = 1;
    pub(super) const SERVER: u32 = 2;
    pub(super) const INFO: u32 = 3;
    pub(super) const META_CONTEXT: u32 = 4;
    pub(super) const UNSUPPORTED: u32 = (1 << 31) + 1;
    pub(super) const INVALID: u32 = (1 << 31) + 3;
    pub(super) const UNKNOWN: u32 = (1 << 31) + 6;
    pub(super) const TOO_BIG: u32 = (1 << 31) + 9;
}

mod info {
    pub(super) const EXPORT: u16 = 0;
    pub(super) const BLOCK_SIZE: u16 = 3;
}

mod flag {
    pub(super) const HAS_FLAGS: u16 = 1;
    pub(super) const READ_ONLY: u16 = 1 << 1;
    pub(super) const SEND_FLUSH: u16 = 1 << 2;
    pub(super) const SEND_FUA: u16 = 1 << 3;
    pub(super) const SEND_TRIM: u16 = 1 << 5;
    pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// What is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) size_bytes: u64,
    pub(super) block_bytes: u32,
    pub(super) is_writable: bool,
}

impl Export {
    /// All connections see one disk, and what one has written all others read: so `CAN_MULTI_CONN`.
    fn flags(self) -> u16 {
        let writable = flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES;
        let kind = if self.is_writable { writable } else { flag::READ_ONLY };
        flag::HAS_FLAGS | flag::CAN_MULTI_CONN | kind
    }
}

/// What a client does that ends its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum HandshakeError {
    /// It speaks something else.
    #[error("it does not speak the fixed newstyle NBD protocol")]
    NotNbd,
    /// There is one export, without a name.
    #[error("it asked for an export by a name; there is one, without")]
    NoSuchExport,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Another option.
    Option,
    /// Requests.
    Transmission,
    /// The client leaves.
    End,
}

/// What the server says first.
pub(super) fn greeting() -> Vec<u8> {
    [SERVER_MAGIC.as_slice(), OPTION_MAGIC, &SERVER_FLAGS.to_be_bytes()].concat()
}

/// An option's number and the bytes that follow.
pub(super) fn option_header(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<(u32, u32), HandshakeError> {
    let [magic @ .., a, b, c, d, e, f, g, h] = *bytes;
    if magic != *OPTION_MAGIC {
        return Err(HandshakeError::NotNbd);
    }
    Ok((u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h])))
}

/// What was agreed on so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Handshake {
    export: Export,
    no_zeros: bool,
    /// Whether answers are structured.
    pub(super) is_structured: bool,
    /// Whether the client may ask for `base:allocation`.
    pub(super) has_context: bool,
}

impl Handshake {
    /// Begins, with the client's flags.
    ///
    /// # Errors
    /// NotNbd: it does not know the fixed newstyle, or wants what is not known here.
    pub(super) fn new(export: Export, client_flags: [u8; 4]) -> Result<Self, HandshakeError> {
        let flags = u32::from_be_bytes(client_flags);
        if flags & 1 == 0 || flags & !u32::from(SERVER_FLAGS) != 0 {
            return Err(HandshakeError::NotNbd);
        }
        Ok(Self { export, no_zeros: flags & NO_ZEROS != 0, is_structured: false, has_context: false })
    }

    /// Answers one option. `data` is `None` where it was more than [`OPTION_MAX_BYTES`].
    ///
    /// # Errors
    /// NoSuchExport, where the protocol has no other answer.
    pub(super) fn answer(
        &mut self,
        option: u32,
        data: Option<&[u8]>,
    ) -> Result<(Vec<u8>, Next), HandshakeError> {
        let one = |kind, next| Ok((answer(option, kind, &[]), next));
        let Some(data) = data else {
            let too_long = option == option::EXPORT_NAME;
            return if too_long {
                Err(HandshakeError::NoSuchExport)
            } else {
                one(reply::TOO_BIG, Next::Option)
            };
        };
        match option {
            option::EXPORT_NAME if data.is_empty() => Ok((self.export_name(), Next::Transmission)),
            option::EXPORT_NAME => Err(HandshakeError::NoSuchExport),
            option::ABORT => one(reply::ACK, Next::End),
            option::LIST | option::STRUCTURED_REPLY if !data.is_empty() => one(reply::INVALID, Next::Option),
            option::LIST => {
                let nameless = answer(option, reply::SERVER, &0u32.to_be_bytes());
                Ok(([nameless, answer(option, reply::ACK, &[])].concat(), Next::Option))
            }
            option::STRUCTURED_REPLY => {
                self.is_structured = true;
                one(reply::ACK, Next::Option)
            }
            option::INFO | option::GO => Ok(self.info(option, data)),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                Ok((self.context(option, data), Next::Option))
            }
            _ => one(reply::UNSUPPORTED, Next::Option),
        }
    }

    fn export_name(&self) -> Vec<u8> {
        let mut out = self.export.size_bytes.to_be_bytes().to_vec();
        out.extend(self.export.flags().to_be_bytes());
        if !self.no_zeros {
            out.resize(out.len() + ZEROS_BYTES, 0);
        }
        out
    }

    fn info(&self, option: u32, data: &[u8]) -> (Vec<u8>, Next) {
        let refuse = |kind| (answer(option, kind, &[]), Next::Option);
        let mut fields = Fields(data);
        let (Some(name), Some(count)) = (fields.text(), fields.u16()) else { return refuse(reply::INVALID) };
        let wanted: Option<Vec<u16>> = (0..count).map(|_| fields.u16()).collect();
        let Some(wanted) = wanted.filter(|_| fields.0.is_empty()) else { return refuse(reply::INVALID) };
        if !name.is_empty() {
            return refuse(reply::UNKNOWN);
        }
        let Export { size_bytes, block_bytes, .. } = self.export;
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend(size_bytes.to_be_bytes());
        export.extend(self.export.flags().to_be_bytes());
        let mut out = answer(option, reply::INFO, &export);
        if wanted.contains(&info::BLOCK_SIZE) {
            let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
            [1, block_bytes, PAYLOAD_MAX_BYTES].iter().for_each(|size| sizes.extend(size.to_be_bytes()));
            out.extend(answer(option, reply::INFO, &sizes));
        }
        out.extend(answer(option, reply::ACK, &[]));
        (out, if option == option::GO { Next::Transmission } else { Next::Option })
    }

    fn context(&mut self, option: u32, data: &[u8]) -> Vec<u8> {
        let mut fields = Fields(data);
        let (Some(name), Some(count)) = (fields.text(), fields.u32()) else {
            return answer(option, reply::INVALID, &[]);
        };
        // A query takes 4 bytes at least: there are no more than there is data.
        let queries: Option<Vec<&[u8]>> = (0..count).map(|_| fields.text()).collect();
        let Some(queries) = queries.filter(|_| fields.0.is_empty() && self.is_structured) else {
            return answer(option, reply::INVALID, &[]);
        };
        if !name.is_empty() {
            return answer(option, reply::UNKNOWN, &[]);
        }
        let is_list = option == option::LIST_META_CONTEXT;
        let is_wanted =
            queries.contains(&CONTEXT) || is_list && (queries.is_empty() || queries.contains(&NAMESPACE));
        if !is_list {
            self.has_context = is_wanted;
        }
        let mut out = Vec::new();
        if is_wanted {
            out = answer(option, reply::META_CONTEXT, &[&CONTEXT_ID.to_be_bytes(), CONTEXT].concat());
        }
        out.extend(answer(option, reply::ACK, &[]));
        out
    }
}

fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

/// The rest of an option's data.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (found, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*found)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// A text with its length before it.
    fn text(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        let (found, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(found)
    }
}
