//! Types of settings' values, read from a flag or from the file.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};

const DAY: Duration = Duration::from_secs(24 * 3600);
const LONGEST: Duration = DAY.saturating_mul(366);

fn parse_time(text: &str, unit: Duration) -> Result<Duration, String> {
    let text = text.trim();
    let time = if let Ok(number) = text.parse::<u32>() {
        Ok(unit.saturating_mul(number))
    } else {
        let wrong =
            || format!("{text:?} is not a time: a number, or a number with a unit as in 30s, 5m, 1h, 2d");
        let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
        let of_days = days.map(|days| DAY.saturating_mul(days));
        let of_clock = || text.parse::<jiff::SignedDuration>().ok().and_then(|d| Duration::try_from(d).ok());
        of_days.or_else(of_clock).ok_or_else(wrong)
    };
    time.and_then(|time| match time {
        t if t < Duration::from_secs(1) => Err(format!("{text:?} is too short: at least 1s")),
        t if t > LONGEST => Err(format!("{text:?} is too long: at most a year")),
        t => Ok(t),
    })
}

/// Reads a YAML number or string as text, so that `5` and `5m` are one kind of value.
struct Text<T>(std::marker::PhantomData<T>);

impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a number")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        number.to_string().parse().map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

/// Reads a value from its text. The error comes from inside the reader, which knows key and line.
///
/// # Errors
/// When the text is not such a value.
pub fn text<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(
    from: D,
) -> Result<Option<T>, D::Error> {
    from.deserialize_any(Text(std::marker::PhantomData)).map(Some)
}

macro_rules! time_type {
    ($(#[$doc:meta])* $name:ident, $unit_s:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct $name(pub Duration);

        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                parse_time(text, Duration::from_secs($unit_s)).map(Self)
            }
        }
    };
}

time_type!(
    /// Time between checkpoints: a bare number is minutes.
    SyncFreq,
    60
);
time_type!(
    /// A limit: a bare number is seconds.
    Delay,
    1
);

/// The time of a full pass of the scrub: a bare number is days; `never` is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubEvery(pub Option<Duration>);

impl FromStr for ScrubEvery {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "never" {
            return Ok(Self(None));
        }
        parse_time(text, DAY).map(Some).map(Self).map_err(|e| format!("{e}, or 'never'"))
    }
}

/// Reads one path, or a list of paths.
///
/// # Errors
/// When the value is neither.
pub fn one_or_many<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a path or a list of paths is expected")]
    enum Either {
        One(PathBuf),
        Many(Vec<PathBuf>),
    }
    Ok(match Either::deserialize(from)? {
        Either::One(one) => vec![one],
        Either::Many(many) => many,
    })
}

/// The dispatcher's host and port; `wss://` may stand before it, `ws://` may not: there is no connection without TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DispatcherAddr(String);

impl DispatcherAddr {
    /// `HOST:PORT`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DispatcherAddr {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("ws://") {
            return Err(format!("{text:?}: blxrep speaks TLS only; give HOST:PORT or wss://HOST:PORT"));
        }
        let addr = text.strip_prefix("wss://").unwrap_or(text).trim_end_matches('/');
        let wrong = || format!("{text:?} is not HOST:PORT");
        let (host, port) = addr.rsplit_once(':').ok_or_else(wrong)?;
        let host_fits =
            if host.starts_with('[') { host.ends_with(']') } else { !host.contains([':', '/', '@']) };
        match port.parse::<u16>() {
            Ok(1..) if !host.is_empty() && host_fits => Ok(Self(addr.to_owned())),
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_sync_freq_is_minutes_and_a_bare_delay_seconds() {
        for (text, seconds) in [("5", 300), ("30s", 30), ("5m", 300), ("1h", 3600), ("1m 30s", 90)] {
            assert_eq!(text.parse::<SyncFreq>().unwrap().0.as_secs(), seconds, "{text}");
        }
        assert_eq!("5".parse::<Delay>().unwrap().0.as_secs(), 5);
        for (text, seconds) in
            [("30", Some(30 * 86_400)), ("30d", Some(30 * 86_400)), ("10s", Some(10)), ("never", None)]
        {
            assert_eq!(text.parse::<ScrubEvery>().unwrap().0.map(|every| every.as_secs()), seconds, "{text}");
        }
        for bad in ["0", "off", "400d", "-1d", "d", "1.5d"] {
            assert!(bad.parse::<ScrubEvery>().unwrap_err().ends_with("or 'never'"), "{bad}");
        }
        for bad in ["", "0", "-5m", "5 parsecs", "0.1s", "99999999h", "1e9"] {
            assert!(bad.parse::<SyncFreq>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_address_is_host_and_port() {
        for good in ["127.0.0.1:8080", "backup.example:443", "[::1]:1", "wss://h:1/"] {
            assert!(good.parse::<DispatcherAddr>().is_ok(), "{good}");
        }
        for bad in
            ["", "host", "host:", "host:0", "host:99999", ":80", "::1:80", "ws://h:1", "http://h:1", "u@h:1"]
        {
            assert!(bad.parse::<DispatcherAddr>().is_err(), "{bad}");
        }
    }
}
