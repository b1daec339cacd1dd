//! Names of agents, disks and checkpoints.
//!
//! Every name that comes from a person, the network or a file passes through here before it is used, above all
//! before it becomes part of a path.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A name or id that is not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text is not a name: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
    #[error(
        "{kind} {text:?} is not valid: 1 to 64 characters, letters, digits, '.', '_' and '-', beginning with a letter or a digit"
    )]
    Name {
        /// What was to be named.
        kind: &'static str,
        /// The refused text.
        text: String,
    },
    /// The text is not a checkpoint id.
    #[error(
        "{0:?} is not a checkpoint id: YYYYMMDDHHMMSS in UTC, with -2 to -65535 behind it where a second holds several"
    )]
    Checkpoint(String),
    /// The text is not an epoch.
    #[error("{0:?} is not an epoch: 32 hexadecimal digits")]
    Epoch(String),
}

fn check_name(kind: &'static str, text: &str) -> Result<String, IdError> {
    let mut bytes = text.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if first && rest && text.len() <= 64 {
        Ok(text.to_owned())
    } else {
        Err(IdError::Name { kind, text: text.chars().take(80).collect() })
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text; safe as one component of a path.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                check_name($kind, text).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// The name of an agent: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
    AgentId,
    "agent id"
);
name_type!(
    /// The stable name of a disk: serial, WWN or GPT id where there is one, else the device's name.
    DiskId,
    "disk id"
);

impl DiskId {
    /// The name of a disk that has none: `disk`.
    pub fn unknown() -> Self {
        Self("disk".to_owned())
    }

    /// Makes a disk id of a serial number or the like: characters a name may not hold become `_`, and what is
    /// longer than 64 characters is cut. `None` if nothing usable is left.
    pub fn from_label(label: &str) -> Option<Self> {
        let keep = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
        let text: String = label.trim().chars().map(keep).collect();
        let text: String = text.trim_matches(['_', '.', '-']).chars().take(64).collect();
        text.parse().ok()
    }
}

/// A checkpoint's id: the UTC second of its freeze, and an ordinal where one second holds several.
///
/// Ids of one disk only ever grow, so their order is the order of the chain. Written `YYYYMMDDHHMMSS`, or
/// `YYYYMMDDHHMMSS-N` with N from 2 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct CheckpointId {
    /// The second as the decimal number `YYYYMMDDHHMMSS`.
    second: u64,
    /// 1 for the first of its second.
    ordinal: u16,
}

const SECOND_MIN: u64 = 19_700_101_000_000;
const SECOND_MAX: u64 = 99_991_231_235_959;

impl CheckpointId {
    /// The id of a checkpoint frozen at `unix_seconds`, later than `last` even if the clock went back.
    pub fn next(unix_seconds: i64, last: Option<Self>) -> Self {
        let this = Self { second: second_of(unix_seconds), ordinal: 1 };
        match last {
            Some(last) if last >= this && last.ordinal < u16::MAX => {
                Self { second: last.second, ordinal: last.ordinal + 1 }
            }
            Some(last) if last >= this => Self { second: (last.second + 1).min(SECOND_MAX), ordinal: 1 },
            _ => this,
        }
    }

    /// The number that stands for this id in files and shared memory; grows with the id and is never 0.
    pub fn to_u64(self) -> u64 {
        self.second << 16 | u64::from(self.ordinal)
    }

    /// The id behind a number made by [`Self::to_u64`]; `None` if it is none.
    pub fn from_u64(number: u64) -> Option<Self> {
        let id = Self { second: number >> 16, ordinal: (number & 0xffff) as u16 };
        (id.ordinal > 0 && valid_second(id.second)).then_some(id)
    }

    /// The minute as `YYYYMMDDHHMM`.
    pub fn minute(self) -> u64 {
        self.second / 100
    }

    /// The time this id stands for, as seconds since 1970.
    pub fn unix_seconds(self) -> i64 {
        date_time(self.second).map_or(0, |z| z.timestamp().as_second())
    }
}

fn second_of(unix_seconds: i64) -> u64 {
    let time = jiff::Timestamp::from_second(unix_seconds.max(0)).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let z = time.to_zoned(jiff::tz::TimeZone::UTC);
    let date = i64::from(z.year()) * 10_000 + i64::from(z.month()) * 100 + i64::from(z.day());
    let clock = i64::from(z.hour()) * 10_000 + i64::from(z.minute()) * 100 + i64::from(z.second());
    u64::try_from(date * 1_000_000 + clock).unwrap_or(SECOND_MIN)
}

fn date_time(second: u64) -> Option<jiff::Zoned> {
    let part = |div: u64, modulo: u64| i8::try_from(second / div % modulo).ok();
    let year = i16::try_from(second / 10_000_000_000).ok()?;
    let time = jiff::civil::DateTime::new(
        year,
        part(100_000_000, 100)?,
        part(1_000_000, 100)?,
        part(10_000, 100)?,
        part(100, 100)?,
        part(1, 100)?,
        0,
    );
    time.ok()?.to_zoned(jiff::tz::TimeZone::UTC).ok()
}

fn valid_second(second: u64) -> bool {
    (SECOND_MIN..=SECOND_MAX).contains(&second) && date_time(second).is_some()
}

impl FromStr for CheckpointId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let bad = || IdError::Checkpoint(text.chars().take(80).collect());
        let (second, ordinal) = match text.split_once('-') {
            Some((second, ordinal)) => {
                (second, ordinal.parse::<u16>().ok().filter(|n| *n >= 2).ok_or_else(bad)?)
            }
            None => (text, 1),
        };
        if second.len() != 14 || !second.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let id = Self { second: second.parse().map_err(|_| bad())?, ordinal };
        // Only the one spelling that Display makes: a name with leading zeros would be a second name of one file.
        if valid_second(id.second) && id.to_string() == text { Ok(id) } else { Err(bad()) }
    }
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ordinal {
            1 => write!(f, "{:014}", self.second),
            n => write!(f, "{:014}-{n}", self.second),
        }
    }
}

impl TryFrom<u64> for CheckpointId {
    type Error = IdError;
    fn try_from(number: u64) -> Result<Self, IdError> {
        Self::from_u64(number).ok_or_else(|| IdError::Checkpoint(number.to_string()))
    }
}

impl From<CheckpointId> for u64 {
    fn from(id: CheckpointId) -> u64 {
        id.to_u64()
    }
}

/// One unbroken life of a tracker: a new random number whenever tracking begins anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub [u8; 16]);

impl Epoch {
    /// A new random epoch.
    ///
    /// # Errors
    /// When the kernel gives no random numbers (getrandom(2)).
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_data_directory_are_refused() {
        for bad in ["", "..", ".", "../../x", "a/b", "-a", ".a", "a\0", "a b", "ä", &"a".repeat(65)] {
            assert!(bad.parse::<AgentId>().is_err(), "{bad:?}");
            assert!(bad.parse::<DiskId>().is_err(), "{bad:?}");
        }
        for good in ["a", "agent10", "A.b_c-9", &"a".repeat(64)] {
            assert_eq!(good.parse::<AgentId>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_label_becomes_a_name_or_nothing() {
        assert_eq!(DiskId::from_label(" S3Z9/NX 0 ").unwrap().as_str(), "S3Z9_NX_0");
        assert_eq!(DiskId::from_label("../x").unwrap().as_str(), "x");
        assert!(DiskId::from_label(" .. ").is_none());
    }

    #[test]
    fn checkpoint_ids_only_grow_even_when_the_clock_goes_back() {
        let a = CheckpointId::next(1_795_293_296, None);
        assert_eq!(a.to_string(), "20261121203456");
        let b = CheckpointId::next(1_795_293_296, Some(a));
        assert_eq!(b.to_string(), "20261121203456-2");
        let c = CheckpointId::next(1_795_293_200, Some(b));
        assert_eq!(c.to_string(), "20261121203456-3");
        let d = CheckpointId::next(1_795_293_297, Some(c));
        assert_eq!(d.to_string(), "20261121203457");
        assert!(a < b && b < c && c < d);
        assert!(a.to_u64() < b.to_u64() && c.to_u64() < d.to_u64());
        assert_eq!(d.unix_seconds(), 1_795_293_297);
    }

    #[test]
    fn checkpoint_ids_have_one_spelling() {
        for id in ["20261121203456", "20261121203456-2", "20261121203456-65535"] {
            let parsed: CheckpointId = id.parse().unwrap();
            assert_eq!(parsed.to_string(), id);
            assert_eq!(CheckpointId::from_u64(parsed.to_u64()), Some(parsed));
        }
        for bad in [
            "",
            "2026112120345",
            "20261121203456-1",
            "20261121203456-02",
            "20261321203456",
            "20261121203456-",
        ] {
            assert!(bad.parse::<CheckpointId>().is_err(), "{bad}");
        }
        assert_eq!(CheckpointId::from_u64(0), None);
        assert_eq!(CheckpointId::from_u64(u64::MAX), None);
    }
}
