//! What travels between agent and dispatcher. Described byte by byte in `docs/PROTOCOL.md`.
//!
//! [`frame`] and [`message`] are pure: bytes in, values out. [`tls`], [`key`] and [`socket`] touch files and
//! the network. Nothing that arrives is trusted: every length is bounded by [`frame::FRAME_MAX_BYTES`] before it
//! is read, every name is checked before it is used.

pub mod frame;
pub mod key;
pub mod message;
pub mod pump;
pub mod socket;
pub mod tls;

use std::fmt;
use std::str::FromStr;

/// The version of frames and messages. Both sides must speak the same one.
pub const PROTOCOL_VERSION: u8 = 4;

/// The WebSocket endpoints of the dispatcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// Hello, footprint, settings and orders; one connection an agent.
    Config,
    /// Full copy and verified compare; one connection a disk.
    Snapshot,
    /// Changed sectors as they happen, and their data in a sync; one connection a disk.
    Live,
    /// Data of checkpoints back to an agent; one connection a restore.
    Restore,
}

impl Endpoint {
    /// The path of the endpoint's URL.
    pub fn path(self) -> &'static str {
        match self {
            Self::Config => "/ws/config",
            Self::Snapshot => "/ws/snapshot",
            Self::Live => "/ws/live",
            Self::Restore => "/ws/restore",
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.path())
    }
}

impl FromStr for Endpoint {
    type Err = ();
    fn from_str(path: &str) -> Result<Self, ()> {
        [Self::Config, Self::Snapshot, Self::Live, Self::Restore]
            .into_iter()
            .find(|e| e.path() == path)
            .ok_or(())
    }
}

/// Names of the HTTP headers of an upgrade, besides `Authorization: Bearer <secret>`.
pub mod header {
    /// The agent's id. Every endpoint.
    pub const AGENT: &str = "x-blxrep-agent";
    /// The session the dispatcher gave in its welcome, 32 hexadecimal digits. Snapshot and live.
    pub const SESSION: &str = "x-blxrep-session";
    /// The disk's id. Snapshot and live.
    pub const DISK: &str = "x-blxrep-disk";
    /// A number chosen by the agent that pairs the snapshot and the live connection of one attachment.
    pub const LINK: &str = "x-blxrep-link";
    /// Why an upgrade was refused, a short sentence in the dispatcher's answer.
    pub const REASON: &str = "x-blxrep-reason";
}
