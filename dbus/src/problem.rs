//! The errors of the interfaces: a name below [`crate::ERROR_PREFIX`] and a sentence that says what to do.

use std::fmt;

use serde::{Deserialize, Serialize};
use zbus::DBusError;
use zbus::message::{Header, Message};
use zbus::names::ErrorName;

/// What kind of error it is; the last part of its name on the bus. Between agent and dispatcher it travels by its place
/// in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProblemKind {
    /// `org.freedesktop.DBus.Error.AccessDenied`: the caller may not do this.
    AccessDenied,
    /// An argument or an option's value makes no sense.
    InvalidArgument,
    /// An option that this method does not have.
    UnknownOption,
    /// No such agent.
    NoSuchAgent,
    /// The agent has no such disk.
    NoSuchDisk,
    /// The disk has no such checkpoint.
    NoSuchCheckpoint,
    /// Agent and dispatcher are not connected.
    NotConnected,
    /// The disk is paused.
    Paused,
    /// The disk has a full copy or a compare to do first, or too many jobs run.
    Busy,
    /// Only the other role can do this.
    WrongRole,
    /// The dispatcher does not let this agent do that.
    Refused,
    /// Stored data is damaged.
    Damaged,
    /// The job was canceled.
    Canceled,
    /// Anything else that went wrong.
    Failed,
}

impl ProblemKind {
    /// Every kind.
    pub const ALL: [Self; 14] = [
        Self::AccessDenied,
        Self::InvalidArgument,
        Self::UnknownOption,
        Self::NoSuchAgent,
        Self::NoSuchDisk,
        Self::NoSuchCheckpoint,
        Self::NotConnected,
        Self::Paused,
        Self::Busy,
        Self::WrongRole,
        Self::Refused,
        Self::Damaged,
        Self::Canceled,
        Self::Failed,
    ];

    /// The error's name on the bus.
    pub fn name(self) -> &'static str {
        match self {
            Self::AccessDenied => "org.freedesktop.DBus.Error.AccessDenied",
            Self::InvalidArgument => "org.blxrep.Error.InvalidArgument",
            Self::UnknownOption => "org.blxrep.Error.UnknownOption",
            Self::NoSuchAgent => "org.blxrep.Error.NoSuchAgent",
            Self::NoSuchDisk => "org.blxrep.Error.NoSuchDisk",
            Self::NoSuchCheckpoint => "org.blxrep.Error.NoSuchCheckpoint",
            Self::NotConnected => "org.blxrep.Error.NotConnected",
            Self::Paused => "org.blxrep.Error.Paused",
            Self::Busy => "org.blxrep.Error.Busy",
            Self::WrongRole => "org.blxrep.Error.WrongRole",
            Self::Refused => "org.blxrep.Error.Refused",
            Self::Damaged => "org.blxrep.Error.Damaged",
            Self::Canceled => "org.blxrep.Error.Canceled",
            Self::Failed => "org.blxrep.Error.Failed",
        }
    }

    /// The kind of a name; `None` for the names of others.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// An error of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What kind.
    pub kind: ProblemKind,
    /// What happened, to what, and what to do.
    pub message: String,
}

impl Problem {
    /// An error of a kind.
    pub fn new(kind: ProblemKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// What a failed call says, if it is an error of this contract.
    pub fn of(error: &zbus::Error) -> Option<Self> {
        let (kind, message) = match error {
            zbus::Error::MethodError(name, message, _) => {
                (ProblemKind::from_name(name.as_str()), message.clone())
            }
            zbus::Error::FDO(error) => {
                (ProblemKind::from_name(error.name().as_str()), error.description().map(str::to_owned))
            }
            _ => return None,
        };
        Some(Self::new(kind?, message.unwrap_or_default()))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Problem {}

impl DBusError for Problem {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.kind.name()).build(&(self.message.as_str(),))
    }

    fn name(&self) -> ErrorName<'_> {
        ErrorName::from_static_str_unchecked(self.kind.name())
    }

    fn description(&self) -> Option<&str> {
        Some(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_valid_name_of_its_own() {
        for kind in ProblemKind::ALL {
            assert_eq!(ProblemKind::from_name(kind.name()), Some(kind));
            assert!(ErrorName::try_from(kind.name()).is_ok());
            let ours = kind.name().starts_with(crate::ERROR_PREFIX);
            assert!(ours || kind == ProblemKind::AccessDenied);
        }
    }
}
