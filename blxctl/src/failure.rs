//! What went wrong, and which exit code says so.

use std::fmt;

use blxrep_dbus::problem::{Problem, ProblemKind};
use zbus::Error;

use crate::model::clean;

/// The exit codes besides 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Anything else.
    Failed = 1,
    /// Wrong usage.
    Usage = 2,
    /// No daemon runs, it refused, or it is not connected to the other side.
    Unreachable = 3,
    /// Damage was found.
    Damaged = 4,
    /// No such agent, disk, checkpoint or job.
    NotFound = 5,
    /// Only of `status`: something needs attention.
    Attention = 6,
}

/// An error that ends the program: a sentence for a person, and the exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    /// A failure without a more exact exit code.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// Wrong usage.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// What a daemon answered. `action` is the polkit action that the call needs.
    pub(crate) fn of_problem(problem: &Problem, action: &str) -> Self {
        let mut message = clean(&problem.message);
        if message.is_empty() {
            message = problem.kind.name().to_owned();
        }
        if problem.kind == ProblemKind::AccessDenied {
            message.push_str(&format!(
                "\nrun it as root, or let an administrator allow you the polkit action {action}"
            ));
        }
        Self::new(exit_of(problem.kind), message)
    }

    /// What a failed call means. `action` is the polkit action that the call needs.
    pub(crate) fn of_call(error: &Error, action: &str) -> Self {
        if let Some(problem) = Problem::of(error) {
            return Self::of_problem(&problem, action);
        }
        match error_name(error).as_deref() {
            Some(
                "org.freedesktop.DBus.Error.ServiceUnknown" | "org.freedesktop.DBus.Error.NameHasNoOwner",
            ) => Self::new(Exit::Unreachable, "the daemon has just ended: see 'blxctl status'"),
            Some("org.freedesktop.DBus.Error.NoReply" | "org.freedesktop.DBus.Error.Disconnected") => {
                Self::failed("the daemon went away and gave no answer: see 'blxctl status'")
            }
            _ => Self::failed(format!("the call failed: {}", clean(&error.to_string()))),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// A failure of the bus itself, or of setting up what listens to it.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::failed(format!("the system bus: {}", clean(&error.to_string())))
    }
}

/// The exit code of a kind of error.
pub(crate) fn exit_of(kind: ProblemKind) -> Exit {
    match kind {
        ProblemKind::InvalidArgument | ProblemKind::UnknownOption | ProblemKind::WrongRole => Exit::Usage,
        ProblemKind::AccessDenied | ProblemKind::Refused | ProblemKind::NotConnected => Exit::Unreachable,
        ProblemKind::Damaged => Exit::Damaged,
        ProblemKind::NoSuchAgent | ProblemKind::NoSuchDisk | ProblemKind::NoSuchCheckpoint => Exit::NotFound,
        ProblemKind::Paused | ProblemKind::Busy | ProblemKind::Canceled | ProblemKind::Failed => Exit::Failed,
    }
}

/// The name of an error that came over the bus.
pub(crate) fn error_name(error: &Error) -> Option<String> {
    match error {
        Error::MethodError(name, ..) => Some(name.to_string()),
        Error::FDO(error) => Some(zbus::DBusError::name(error.as_ref()).to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_has_its_exit_code() {
        let codes: Vec<_> = ProblemKind::ALL.iter().map(|kind| (*kind, exit_of(*kind) as u8)).collect();
        use ProblemKind::*;
        let expected = [
            (AccessDenied, 3),
            (InvalidArgument, 2),
            (UnknownOption, 2),
            (NoSuchAgent, 5),
            (NoSuchDisk, 5),
            (NoSuchCheckpoint, 5),
            (NotConnected, 3),
            (Paused, 1),
            (Busy, 1),
            (WrongRole, 2),
            (Refused, 3),
            (Damaged, 4),
            (Canceled, 1),
            (Failed, 1),
        ];
        assert_eq!(codes, expected);
    }

    #[test]
    fn a_denied_call_names_the_action() {
        let problem = Problem::new(ProblemKind::AccessDenied, "not authorized");
        let failure = Failure::of_problem(&problem, blxrep_dbus::ACTION_RESTORE);
        insta::assert_snapshot!(failure, @r"
        not authorized
        run it as root, or let an administrator allow you the polkit action org.blxrep.restore
        ");
        assert_eq!(failure.exit, Exit::Unreachable);
    }

    #[test]
    fn an_error_without_a_message_is_named_and_no_terminal_code_gets_through() {
        let problem = Problem::new(ProblemKind::Busy, "");
        assert_eq!(Failure::of_problem(&problem, "").message, "org.blxrep.Error.Busy");
        let problem = Problem::new(ProblemKind::Failed, "a\x1b[2Jb");
        assert_eq!(Failure::of_problem(&problem, "").message, "a\u{fffd}[2Jb");
    }

    #[test]
    fn a_daemon_that_ends_is_told_from_one_that_is_not_there() {
        let gone = |error: zbus::fdo::Error| Failure::of_call(&Error::from(error), "").exit;
        assert_eq!(gone(zbus::fdo::Error::NoReply(String::new())), Exit::Failed);
        assert_eq!(gone(zbus::fdo::Error::ServiceUnknown(String::new())), Exit::Unreachable);
    }
}
