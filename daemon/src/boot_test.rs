//! What came of starting a checkpoint in a virtual machine, kept for who asks later (`docs/FORMAT.md`, "`.boot`").
//!
//! The console's text comes from a guest, the file from a directory that others may have touched: both are checked. What must never
//! happen here: evidence taken for that of another checkpoint, text shown that could steer a terminal.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use blxrep_dbus::BOOT_CONSOLE_MAX_BYTES;
use blxrep_dbus::words::BootResult;

use crate::ids::CheckpointId;
use crate::store::layout::{Paths, id_in_name};
use crate::wire::key::{hex, write_private};

/// What the file begins with; the checksum of all that follows its line is behind it.
pub(crate) const MAGIC: &str = "blxrep boot 1";
/// The lines before the console's text are shorter.
const HEAD_MAX_BYTES: usize = 512;
const EXTENSION: &str = "boot";

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootTest {
    /// Whether what was waited for came.
    pub result: BootResult,
    /// When, in milliseconds since 1970.
    pub time_unix_ms: u64,
    /// What the guest wrote to its serial console, without control characters but newlines and tabs.
    console: String,
}

impl BootTest {
    /// `None` if the console's text is longer than [`BOOT_CONSOLE_MAX_BYTES`] or not clean.
    pub fn new(result: BootResult, time_unix_ms: u64, console: String) -> Option<Self> {
        let is_clean = !console.chars().any(|c| c.is_control() && c != '\n' && c != '\t');
        (is_clean && console.len() <= BOOT_CONSOLE_MAX_BYTES).then_some(Self {
            result,
            time_unix_ms,
            console,
        })
    }

    pub(crate) fn encode(&self, owner: &Paths, id: CheckpointId) -> String {
        let Self { result, time_unix_ms, console } = self;
        let body = format!(
            "agent {}\ndisk {}\ncheckpoint {id}\nresult {result}\ntime_unix_ms {time_unix_ms}\n\n{console}",
            owner.agent, owner.disk
        );
        format!("{MAGIC} {}\n{body}", hex(blake3::hash(body.as_bytes()).as_bytes()))
    }

    /// `None` if this is not what [`Self::encode`] makes for this checkpoint.
    pub(crate) fn decode(owner: &Paths, id: CheckpointId, text: &str) -> Option<Self> {
        let (head, console) = text.split_once("\n\n")?;
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
        let (result, time_unix_ms) = (field("result ")?.parse().ok()?, field("time_unix_ms ")?.parse().ok()?);
        let test = Self::new(result, time_unix_ms, console.to_owned())?;
        (test.encode(owner, id) == text).then_some(test)
    }

    /// Keeps it, durably, in place of what is there of this checkpoint. What is there of checkpoints of this disk that are
    /// not among `all` goes.
    ///
    /// # Errors
    /// What the file system says.
    pub fn keep(
        &self,
        data_dir: &Path,
        owner: &Paths,
        id: CheckpointId,
        all: &[CheckpointId],
    ) -> io::Result<()> {
        let path = data_dir.join(owner.boot(id));
        let dir = path.parent().unwrap_or(data_dir);
        fs::create_dir_all(dir)?;
        for made_in in dir.ancestors().skip(1).take_while(|above| above.starts_with(data_dir)) {
            fs::File::open(made_in)?.sync_all()?;
        }
        write_private(&path, self.encode(owner, id).as_bytes())?;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let of = name.to_str().and_then(|name| id_in_name(name, EXTENSION));
            if of.is_some_and(|of| !all.contains(&of)) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// What is kept of a checkpoint; `None` if nothing is, or what is there is damaged and so proves nothing.
    pub fn find(data_dir: &Path, owner: &Paths, id: CheckpointId) -> Option<Self> {
        let max = (HEAD_MAX_BYTES + BOOT_CONSOLE_MAX_BYTES) as u64;
        let mut text = String::new();
        fs::File::open(data_dir.join(owner.boot(id))).ok()?.take(max).read_to_string(&mut text).ok()?;
        Self::decode(owner, id, &text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn owner(agent: &str) -> Paths {
        Paths::new(agent.parse().unwrap(), "sda".parse().unwrap())
    }

    fn id(n: i64) -> CheckpointId {
        CheckpointId::next(1_795_293_296 + n, None)
    }

    fn sample() -> BootTest {
        BootTest::new(BootResult::Passed, 1_795_293_300_000, "GRUB\n\n\tweb1 login: ".to_owned()).unwrap()
    }

    proptest! {
        #[test]
        fn decoding_gives_back_what_was_encoded(passes: bool, time: u64, console in "[^\\p{Cc}]{0,40}\n\n\t[^\\p{Cc}]{0,40}") {
            let result = if passes { BootResult::Passed } else { BootResult::Failed };
            let test = BootTest::new(result, time, console).unwrap();
            prop_assert_eq!(BootTest::decode(&owner("a"), id(0), &test.encode(&owner("a"), id(0))), Some(test));
        }

        #[test]
        fn garbage_is_nothing(text in "(blxrep boot 1 [0-9a-f]{64}\n)?(result passed\n)?(time_unix_ms [0-9]{1,30}\n)?\n?\\PC{0,80}") {
            prop_assert_eq!(BootTest::decode(&owner("a"), id(0), &text), None);
        }
    }

    #[test]
    fn every_flipped_byte_every_cut_and_every_swap_is_found() {
        let bytes = sample().encode(&owner("a"), id(0)).into_bytes();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            for bad in [&bad[..], &bytes[..at]] {
                assert_eq!(BootTest::decode(&owner("a"), id(0), std::str::from_utf8(bad).unwrap()), None);
            }
        }
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(BootTest::decode(&owner("b"), id(0), &text), None);
        assert_eq!(BootTest::decode(&owner("a"), id(1), &text), None);
    }

    #[test]
    fn text_that_is_not_clean_or_too_long_is_refused() {
        for bad in ["\x1b[2J", "a\rb", "\u{9b}2J", "\0"] {
            assert_eq!(BootTest::new(BootResult::Passed, 0, bad.to_owned()), None, "{bad:?}");
        }
        assert!(BootTest::new(BootResult::Passed, 0, "x".repeat(BOOT_CONSOLE_MAX_BYTES)).is_some());
        assert_eq!(BootTest::new(BootResult::Passed, 0, "x".repeat(BOOT_CONSOLE_MAX_BYTES + 1)), None);
    }

    #[test]
    fn the_longest_is_found_again_and_what_is_of_no_checkpoint_goes() {
        let dir = tempfile::tempdir().unwrap();
        let owner = owner(&"a".repeat(64));
        let long = BootTest::new(BootResult::Failed, u64::MAX, "x".repeat(BOOT_CONSOLE_MAX_BYTES)).unwrap();
        for n in [0, 1] {
            long.keep(dir.path(), &owner, id(n), &[id(0), id(1)]).unwrap();
            assert_eq!(BootTest::find(dir.path(), &owner, id(n)), Some(long.clone()));
        }
        sample().keep(dir.path(), &owner, id(2), &[id(1), id(2)]).unwrap();
        let found = [0, 1, 2].map(|n| BootTest::find(dir.path(), &owner, id(n)));
        assert_eq!(found, [None, Some(long), Some(sample())]);
    }
}
