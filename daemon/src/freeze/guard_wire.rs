//! What the agent and its freeze guard say to each other: pure.
//!
//! One message is one packet of a Unix socket, its first byte says which. Integers are little-endian. Both ends are the
//! same program of the same version, so there is no version; what is not understood is still refused.

/// The most file systems one guard takes: keeps every message in a fixed buffer.
pub(super) const MOUNTS_MAX: usize = 1024;
/// The longest message.
pub(super) const MESSAGE_MAX_BYTES: usize = MOUNTS_MAX + 16;

/// Not touched yet, or being worked on.
pub(super) const STATE_OPEN: u8 = 0;
/// Frozen by this guard.
pub(super) const STATE_FROZEN: u8 = 1;
/// Was frozen already, by somebody else.
pub(super) const STATE_FOREIGN: u8 = 2;
/// Of a type that cannot be frozen.
pub(super) const STATE_UNSUPPORTED: u8 = 3;
/// The freeze failed.
pub(super) const STATE_FAILED: u8 = 4;
/// Was frozen by this guard and thawed.
pub(super) const STATE_THAWED: u8 = 5;

/// From the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// A file system to freeze; its descriptor travels with the message.
    Mount,
    /// Freeze all, and thaw after so many milliseconds whatever happens.
    Freeze { deadline_ms: u64 },
    /// Is everything still frozen?
    Still,
    /// Thaw all.
    Thaw,
}

impl Command {
    /// The message; how much of it counts is said.
    pub(super) fn encode(self) -> ([u8; 9], usize) {
        let mut out = [0; 9];
        let (tag, len) = match self {
            Self::Mount => (b'M', 1),
            Self::Freeze { .. } => (b'F', 9),
            Self::Still => (b'S', 1),
            Self::Thaw => (b'T', 1),
        };
        let [first, rest @ ..] = &mut out;
        *first = tag;
        if let Self::Freeze { deadline_ms } = self {
            *rest = deadline_ms.to_le_bytes();
        }
        (out, len)
    }

    pub(super) fn decode(message: &[u8]) -> Option<Self> {
        match message {
            b"M" => Some(Self::Mount),
            b"S" => Some(Self::Still),
            b"T" => Some(Self::Thaw),
            [b'F', rest @ ..] => {
                let bytes: [u8; 8] = rest.try_into().ok()?;
                Some(Self::Freeze { deadline_ms: u64::from_le_bytes(bytes) })
            }
            _ => None,
        }
    }
}

/// From the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply<'a> {
    /// Started, or not, and then the error number.
    Ready { errno: i32 },
    /// The freeze has ended; one state for each mount in the order they were sent.
    Freeze { expired: bool, errno: i32, states: &'a [u8] },
    /// Whether everything is still frozen.
    Still(bool),
    /// Nothing of this guard is frozen any more, but for an error number.
    Thaw { expired: bool, errno: i32, frozen_us: u64 },
}

impl<'a> Reply<'a> {
    /// Writes the message and says how long it is; without allocating, as file systems are frozen.
    pub(super) fn encode(self, out: &mut [u8; MESSAGE_MAX_BYTES]) -> usize {
        let mut len = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(to) = out.get_mut(len..len + bytes.len()) {
                to.copy_from_slice(bytes);
                len += bytes.len();
            }
        };
        match self {
            Self::Ready { errno } => {
                put(b"R");
                put(&errno.to_le_bytes());
            }
            Self::Freeze { expired, errno, states } => {
                put(&[b'F', u8::from(expired)]);
                put(&errno.to_le_bytes());
                put(states);
            }
            Self::Still(still) => put(&[b'S', u8::from(still)]),
            Self::Thaw { expired, errno, frozen_us } => {
                put(&[b'T', u8::from(expired)]);
                put(&errno.to_le_bytes());
                put(&frozen_us.to_le_bytes());
            }
        }
        len
    }

    pub(super) fn decode(message: &'a [u8]) -> Option<Self> {
        let (tag, rest) = message.split_first()?;
        let split_errno = |bytes: &'a [u8]| {
            bytes.split_first_chunk::<4>().map(|(errno, rest)| (i32::from_le_bytes(*errno), rest))
        };
        match tag {
            b'R' => {
                split_errno(rest).filter(|(_, rest)| rest.is_empty()).map(|(errno, _)| Self::Ready { errno })
            }
            b'S' => (rest.len() == 1).then(|| Self::Still(rest.first() == Some(&1))),
            b'F' => {
                let (expired, rest) = rest.split_first()?;
                let (errno, states) = split_errno(rest)?;
                Some(Self::Freeze { expired: *expired != 0, errno, states })
            }
            b'T' => {
                let (expired, rest) = rest.split_first()?;
                let (errno, rest) = split_errno(rest)?;
                let frozen_us = u64::from_le_bytes(rest.try_into().ok()?);
                Some(Self::Thaw { expired: *expired != 0, errno, frozen_us })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_said_is_understood() {
        for command in [
            Command::Mount,
            Command::Freeze { deadline_ms: 0x0102_0304_0506_0708 },
            Command::Still,
            Command::Thaw,
        ] {
            let (bytes, len) = command.encode();
            assert_eq!(Command::decode(&bytes[..len]), Some(command));
        }
        let states = [STATE_FROZEN; MOUNTS_MAX];
        for reply in [
            Reply::Ready { errno: -5 },
            Reply::Freeze { expired: true, errno: 16, states: &states },
            Reply::Freeze { expired: false, errno: 0, states: &[] },
            Reply::Still(true),
            Reply::Still(false),
            Reply::Thaw { expired: true, errno: 5, frozen_us: u64::MAX },
        ] {
            let mut buffer = [0; MESSAGE_MAX_BYTES];
            let len = reply.encode(&mut buffer);
            assert_eq!(Reply::decode(&buffer[..len]), Some(reply));
        }
    }

    proptest! {
        #[test]
        fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            Command::decode(&bytes);
            Reply::decode(&bytes);
        }
    }
}
