//! Arguments and options of a call: checked before anything is asked. Pure.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use blxrep_dbus::BOOT_CONSOLE_MAX_BYTES;
use blxrep_dbus::problem::{Problem, ProblemKind};
use zbus::wire::{self, Fd, OwnedVariant, Variant};

use super::control::Which;
use crate::boot_test::BootTest;
use crate::checkpoint::select::parse_minute;
use crate::clock::unix_ms;
use crate::ids::AgentId;
use crate::restore::Wanted;

/// The longest name of a disk or checkpoint that is looked at.
const NAME_MAX: usize = 255;
/// The most checkpoints that one call names.
const NAMES_MAX: usize = 1000;
/// The longest path that the kernel takes.
const TARGET_MAX: usize = 4096;

/// The options of one call, taken out one by one.
#[derive(Debug)]
pub(super) struct Options(HashMap<String, OwnedVariant>);

impl Options {
    /// Options of a method that has only the keys `known`.
    pub(super) fn new(options: HashMap<String, OwnedVariant>, known: &[&str]) -> Result<Self, Problem> {
        match options.keys().filter(|key| !known.contains(&key.as_str())).min() {
            None => Ok(Self(options)),
            Some(key) => {
                let key: String = key.chars().take(80).collect();
                let known = known.join(", ");
                Err(Problem::new(
                    ProblemKind::UnknownOption,
                    format!("there is no option {key:?}; there is: {known}"),
                ))
            }
        }
    }

    /// An option that is a text.
    pub(super) fn text(&mut self, key: &str) -> Result<Option<String>, Problem> {
        self.take(key, "a string (s)", |value| match value {
            Variant::Str(text) => Some(text.as_str().to_owned()),
            _ => None,
        })
    }

    /// An option that is a list of texts; empty where it is not given.
    pub(super) fn texts(&mut self, key: &str) -> Result<Vec<String>, Problem> {
        let list = self.take(key, "an array of strings (as)", |value| Vec::<String>::try_from(value).ok());
        Ok(list?.unwrap_or_default())
    }

    /// An option that is yes or no; no where it is not given.
    pub(super) fn flag(&mut self, key: &str) -> Result<bool, Problem> {
        let flag = self.take(key, "a boolean (b)", |value| match value {
            Variant::Bool(flag) => Some(flag),
            _ => None,
        });
        Ok(flag?.unwrap_or(false))
    }

    /// An option that is a number.
    pub(super) fn number(&mut self, key: &str) -> Result<Option<u32>, Problem> {
        self.take(key, "a number (u)", |value| match value {
            Variant::U32(number) => Some(number),
            _ => None,
        })
    }

    /// An option that is a minute, `YYYYMMDDHHMM`.
    pub(super) fn minute(&mut self, key: &str) -> Result<Option<u64>, Problem> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        let minute = parse_minute(&text);
        minute.map(Some).ok_or_else(|| invalid(format!("{key} is not a minute in UTC, YYYYMMDDHHMM")))
    }

    /// An option that is an open file.
    pub(super) fn file(&mut self, key: &str) -> Result<Option<File>, Problem> {
        self.take(key, "an open file (h)", |value| match value {
            Variant::Fd(Fd::Owned(fd)) => Some(File::from(fd)),
            Variant::Fd(fd) => OwnedFd::try_from(fd).ok().map(File::from),
            _ => None,
        })
    }

    fn take<T>(
        &mut self,
        key: &str,
        wanted: &str,
        get: impl FnOnce(Variant<'static>) -> Option<T>,
    ) -> Result<Option<T>, Problem> {
        let Some(value) = self.0.remove(key) else { return Ok(None) };
        get(value.into()).map(Some).ok_or_else(|| invalid(format!("the option {key} must be {wanted}")))
    }
}

/// An argument that is an open file.
pub(super) fn file(fd: wire::OwnedFd) -> Result<OwnedFd, Problem> {
    OwnedFd::try_from(Fd::from(fd)).map_err(|error| invalid(format!("the open file: {error}")))
}

/// Whose disk is meant. Only what can be a name passes: the texts are shown to whoever is asked for authentication.
pub(super) fn which(agent: &str, options: &mut Options) -> Result<Which, Problem> {
    if !agent.is_empty() {
        agent.parse::<AgentId>().map_err(|error| invalid(error.to_string()))?;
    }
    let disk = options.text("disk")?;
    if let Some(disk) = &disk {
        name("disk", disk)?;
    }
    Ok(Which { agent: agent.to_owned(), disk })
}

/// Which checkpoints a verify is about: `checkpoint`, or where that is empty those the options name, or all.
pub(super) fn wanted(checkpoint: &str, options: &mut Options) -> Result<Wanted, Problem> {
    let mut names = options.texts("checkpoints")?;
    let (start, end) = (options.minute("start")?, options.minute("end")?);
    let is_between = start.is_some() || end.is_some();
    match (checkpoint, names.is_empty(), is_between) {
        ("", true, _) => return Ok(Wanted::Between(start, end)),
        ("", false, false) => {}
        (_, true, false) => names.push(checkpoint.to_owned()),
        _ => {
            let text = "give one of: a checkpoint, the option checkpoints, or start and end";
            return Err(invalid(text));
        }
    }
    if names.len() > NAMES_MAX {
        return Err(invalid(format!(
            "at most {NAMES_MAX} checkpoints can be named; start and end take all between"
        )));
    }
    for text in &names {
        name("checkpoint", text)?;
    }
    Ok(Wanted::Named(names))
}

/// Refuses what cannot be the name of a disk or checkpoint.
pub(super) fn name(what: &str, text: &str) -> Result<(), Problem> {
    let good = (1..=NAME_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    let refused =
        || invalid(format!("{what} must be 1 to {NAME_MAX} visible ASCII characters, without spaces"));
    good.then_some(()).ok_or_else(refused)
}

/// Refuses what cannot be a restore's target. The daemon has no working directory that a caller knows.
pub(super) fn target(text: &str, only_a_name: bool) -> Result<(), Problem> {
    if text.is_empty() || text.len() > TARGET_MAX || text.chars().any(char::is_control) {
        return Err(invalid(format!("target must be 1 to {TARGET_MAX} bytes without control characters")));
    }
    if !only_a_name && !text.starts_with('/') {
        return Err(invalid("target must be an absolute path, or there must be an output"));
    }
    Ok(())
}

/// What came of starting a checkpoint, now.
pub(super) fn boot_test(result: &str, console: String) -> Result<BootTest, Problem> {
    let result = result.parse().map_err(|_| invalid("result must be passed or failed"))?;
    let text = || {
        invalid(format!(
            "console must be at most {BOOT_CONSOLE_MAX_BYTES} bytes, with no control characters but newlines and tabs"
        ))
    };
    BootTest::new(result, unix_ms(), console).ok_or_else(text)
}

fn invalid(message: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::InvalidArgument, message)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;

    fn options<const N: usize>(
        values: [(&str, Variant<'static>); N],
        known: &[&str],
    ) -> Result<Options, Problem> {
        let owned = values.into_iter().map(|(k, v)| (k.to_owned(), OwnedVariant::try_from(v).unwrap()));
        Options::new(owned.collect(), known)
    }

    #[test]
    fn a_key_that_is_not_known_is_named_with_those_there_are() {
        let error = options([("disk", "a".into()), ("dsik", "b".into())], &["disk", "start"]).unwrap_err();
        assert_eq!(error.kind, ProblemKind::UnknownOption);
        assert!(error.message.contains("\"dsik\"") && error.message.contains("disk, start"), "{error}");
        assert!(options([], &["disk"]).is_ok());
    }

    #[test]
    fn a_value_of_another_type_is_refused_by_its_key() {
        for value in [Variant::from(1u32), Variant::from(true), Variant::Variant(Box::new("x".into()))] {
            let error = options([("disk", value)], &["disk"]).unwrap().text("disk").unwrap_err();
            assert!(error.kind == ProblemKind::InvalidArgument && error.message.contains("disk"), "{error}");
        }
        let error =
            options([("output", "/dev/sda".into())], &["output"]).unwrap().file("output").unwrap_err();
        assert!(error.kind == ProblemKind::InvalidArgument && error.message.contains("output"), "{error}");
        assert_eq!(options([], &["disk"]).unwrap().text("disk").unwrap(), None);
    }

    #[test]
    fn minutes_are_minutes() {
        let minute = |text: &'static str| options([("end", text.into())], &["end"]).unwrap().minute("end");
        assert_eq!(minute("202611212034").unwrap(), Some(202_611_212_034));
        for bad in ["", "latest", "20261121203456", "202613212034"] {
            let error = minute(bad).unwrap_err();
            assert!(error.kind == ProblemKind::InvalidArgument && error.message.contains("end"), "{error}");
        }
    }

    #[test]
    fn a_verify_is_of_one_checkpoint_of_those_named_or_of_a_time() {
        const KNOWN: [&str; 3] = ["checkpoints", "start", "end"];
        let list = || ("checkpoints", Variant::from(vec!["a", "b"]));
        let start = || ("start", Variant::from("202611212034"));
        let named = |names: &[&str]| Wanted::Named(names.iter().map(|name| (*name).to_owned()).collect());
        let of = |checkpoint, options: Result<Options, Problem>| wanted(checkpoint, &mut options.unwrap());
        assert_eq!(of("latest", options([], &KNOWN)).unwrap(), named(&["latest"]));
        assert_eq!(of("", options([list()], &KNOWN)).unwrap(), named(&["a", "b"]));
        assert_eq!(of("", options([], &KNOWN)).unwrap(), Wanted::Between(None, None));
        let since = Wanted::Between(Some(202_611_212_034), None);
        assert_eq!(of("", options([start()], &KNOWN)).unwrap(), since);
        let many = Variant::from(vec!["a"; NAMES_MAX + 1]);
        for bad in [
            of("latest", options([list()], &KNOWN)),
            of("latest", options([start()], &KNOWN)),
            of("", options([list(), start()], &KNOWN)),
            of("", options([("checkpoints", "a".into())], &KNOWN)),
            of("", options([("checkpoints", vec!["a b"].into())], &KNOWN)),
            of("", options([("checkpoints", many)], &KNOWN)),
        ] {
            assert_eq!(bad.unwrap_err().kind, ProblemKind::InvalidArgument);
        }
    }

    #[test]
    fn an_open_file_is_taken() {
        let file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut &file, b"x").unwrap();
        std::io::Seek::rewind(&mut &file).unwrap();
        let fd = Variant::Fd(file.as_fd().try_clone_to_owned().unwrap().into());
        let mut taken = options([("output", fd)], &["output"]).unwrap().file("output").unwrap().unwrap();
        let mut text = String::new();
        taken.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn texts_that_could_mislead_whoever_is_asked_are_refused() {
        let none = || options([], &[]).unwrap();
        for bad in ["a b", "..", "a\nb", "ä"] {
            assert_eq!(which(bad, &mut none()).unwrap_err().kind, ProblemKind::InvalidArgument, "{bad:?}");
        }
        assert_eq!(which("", &mut none()).unwrap(), Which::default());
        for bad in ["", "a b", "sda\n", "ä", &"a".repeat(256)] {
            assert_eq!(name("disk", bad).unwrap_err().kind, ProblemKind::InvalidArgument, "{bad:?}");
        }
        assert!(name("disk", "/dev/mapper/a-b").is_ok());
        for bad in ["", "relative", "/a\n", &format!("/{}", "a".repeat(4096))] {
            assert_eq!(target(bad, false).unwrap_err().kind, ProblemKind::InvalidArgument, "{bad:?}");
        }
        assert!(
            target("/a b", false).is_ok() && target("relative", true).is_ok() && target("", true).is_err()
        );
    }
}
