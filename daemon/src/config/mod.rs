//! Flags and the configuration file.
//!
//! One set of settings, [`Settings`], is both: the keys of the YAML file carry the names of the flags, and a flag
//! beats the file. What a role needs of it is checked by [`AgentConfig`] and [`DispatcherConfig`] before anything
//! is opened.

pub mod value;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use self::value::{Delay, DispatcherAddr, ScrubEvery, SyncFreq, one_or_many, text};
use crate::dispatcher::scrub::Pace;
use crate::geometry::BLOCK_SHIFT_DEFAULT;
use crate::ids::AgentId;

/// Where the configuration is looked for if no other file is named.
pub const DEFAULT_PATH: &str = "/etc/blxrep/config.yaml";
const FILE_MAX_BYTES: u64 = 1 << 20;
const SCRUB_EVERY: Duration = Duration::from_secs(30 * 24 * 3600);
const SCRUB_RATE_MIB: u32 = 50;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A key or value in the file is wrong; the message names key and line.
    #[error("{path}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
    /// A key that the role needs is missing.
    #[error("'{key}' is missing: set it in {path} or with --{key}")]
    Missing {
        /// The key.
        key: &'static str,
        /// The file it could be in.
        path: PathBuf,
    },
    /// A value cannot be used.
    #[error("'{key}': {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// The role a daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Tracks this machine's disks and sends what changes.
    Agent,
    /// Receives and keeps.
    Dispatcher,
}

/// Every setting, as a flag and as a key of the file.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// The role to run
    #[arg(long, value_enum)]
    pub mode: Option<Mode>,
    /// Agent: this agent's id, as it was enrolled
    #[arg(long, value_name = "AGENT")]
    #[serde(default, deserialize_with = "text")]
    pub id: Option<AgentId>,
    /// Agent: where the dispatcher listens, HOST:PORT
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(default, deserialize_with = "text")]
    pub dispatcher_addr: Option<DispatcherAddr>,
    /// Agent: a whole disk to replicate, such as /dev/sda; may be given several times
    #[arg(long, value_name = "DEVICE")]
    #[serde(default, deserialize_with = "one_or_many")]
    pub device: Vec<PathBuf>,
    /// Dispatcher: the directory everything is kept in
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Dispatcher: time between checkpoints: minutes, or with a unit as in 30s, 5m, 1h [default: 5m]
    #[arg(long, value_name = "TIME")]
    #[serde(default, deserialize_with = "text")]
    pub sync_freq: Option<SyncFreq>,
    /// Dispatcher: the time in which everything stored is read and checked once: days, or with a unit; 'never' switches that off [default: 30d]
    #[arg(long, value_name = "TIME")]
    #[serde(default, deserialize_with = "text")]
    pub scrub_every: Option<ScrubEvery>,
    /// Dispatcher: the most MiB that this reads in a second, however late it is [default: 50]
    #[arg(long, value_name = "MIB")]
    pub scrub_rate_mib: Option<u32>,
    /// Dispatcher: address and port to listen on [default: 0.0.0.0:8080]
    #[arg(long, value_name = "ADDR:PORT")]
    #[serde(default, deserialize_with = "text")]
    pub listen: Option<SocketAddr>,
    /// Agent: the file with the key 'blxrep enroll' printed; mode 600
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Dispatcher: the agents that may connect, one a line
    #[arg(long, value_name = "FILE")]
    pub agents_file: Option<PathBuf>,
    /// Agent: where it keeps what must outlive it [default: /var/lib/blxrep]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Agent: executables called around a freeze
    #[arg(long, value_name = "DIR")]
    pub hooks_dir: Option<PathBuf>,
    /// Agent: the longest a file system stays frozen: seconds, or with a unit [default: 10s]
    #[arg(long, value_name = "TIME")]
    #[serde(default, deserialize_with = "text")]
    pub freeze_timeout: Option<Delay>,
    /// Agent: the longest one hook may run: seconds, or with a unit [default: 10s]
    #[arg(long, value_name = "TIME")]
    #[serde(default, deserialize_with = "text")]
    pub hook_timeout: Option<Delay>,
    /// Agent: bytes of a tracked block, a power of two from 512 to 1048576 [default: 4096]
    #[arg(long, value_name = "BYTES")]
    pub block_size: Option<u32>,
    /// Agent: the most MiB read from a disk in a second; without it, reading is only as fast as sending
    #[arg(long, value_name = "MIB")]
    pub read_rate_mib: Option<u32>,
}

impl Settings {
    /// Reads the file and lets the flags beat it. `file`: the one named by the user, or else the default one, if
    /// it is there.
    ///
    /// # Errors
    /// When the file cannot be read, or holds an unknown key or a bad value.
    pub fn load(flags: Self, file: Option<&Path>) -> Result<(Self, PathBuf), ConfigError> {
        let path = file.unwrap_or(Path::new(DEFAULT_PATH));
        let from_file = match read(path) {
            Ok(text) => Self::parse(&text, path)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound && file.is_none() => Self::default(),
            Err(source) => return Err(ConfigError::Read { path: path.to_owned(), source }),
        };
        Ok((flags.or(from_file), path.to_owned()))
    }

    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            return Ok(Self::default());
        }
        serde_norway::from_str(text)
            .map_err(|e| ConfigError::File { path: path.to_owned(), message: e.to_string() })
    }

    fn or(self, file: Self) -> Self {
        Self {
            mode: self.mode.or(file.mode),
            id: self.id.or(file.id),
            dispatcher_addr: self.dispatcher_addr.or(file.dispatcher_addr),
            device: if self.device.is_empty() { file.device } else { self.device },
            data_dir: self.data_dir.or(file.data_dir),
            sync_freq: self.sync_freq.or(file.sync_freq),
            scrub_every: self.scrub_every.or(file.scrub_every),
            scrub_rate_mib: self.scrub_rate_mib.or(file.scrub_rate_mib),
            listen: self.listen.or(file.listen),
            key_file: self.key_file.or(file.key_file),
            agents_file: self.agents_file.or(file.agents_file),
            state_dir: self.state_dir.or(file.state_dir),
            hooks_dir: self.hooks_dir.or(file.hooks_dir),
            freeze_timeout: self.freeze_timeout.or(file.freeze_timeout),
            hook_timeout: self.hook_timeout.or(file.hook_timeout),
            block_size: self.block_size.or(file.block_size),
            read_rate_mib: self.read_rate_mib.or(file.read_rate_mib),
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.len() > FILE_MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    fs::read_to_string(path)
}

fn need<T>(value: Option<T>, key: &'static str, path: &Path) -> Result<T, ConfigError> {
    value.ok_or_else(|| ConfigError::Missing { key, path: path.to_owned() })
}

/// What an agent needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentConfig {
    /// Its id.
    pub id: AgentId,
    /// The dispatcher's host and port.
    pub dispatcher_addr: DispatcherAddr,
    /// The disks.
    pub devices: Vec<PathBuf>,
    /// The key.
    pub key_file: PathBuf,
    /// What must outlive the agent.
    pub state_dir: PathBuf,
    /// Executables called around a freeze.
    pub hooks_dir: Option<PathBuf>,
    /// The longest a file system stays frozen.
    pub freeze_timeout: Duration,
    /// The longest one hook may run.
    pub hook_timeout: Duration,
    /// log2 of a block's bytes.
    pub block_shift: u8,
    /// The most bytes read from a disk in a second.
    pub read_rate_bytes: Option<u64>,
}

impl AgentConfig {
    /// Checks what an agent needs.
    ///
    /// # Errors
    /// When a key is missing or a value cannot be used.
    pub fn new(settings: Settings, file: &Path) -> Result<Self, ConfigError> {
        let block_bytes = settings.block_size.unwrap_or(1 << BLOCK_SHIFT_DEFAULT);
        if !block_bytes.is_power_of_two() || !(512..=1 << 20).contains(&block_bytes) {
            let reason = "a power of two from 512 to 1048576 is expected".to_owned();
            return Err(ConfigError::Value { key: "block-size", reason });
        }
        let devices = need(Some(settings.device).filter(|devices| !devices.is_empty()), "device", file)?;
        Ok(Self {
            id: need(settings.id, "id", file)?,
            dispatcher_addr: need(settings.dispatcher_addr, "dispatcher-addr", file)?,
            devices,
            key_file: need(settings.key_file, "key-file", file)?,
            state_dir: settings.state_dir.unwrap_or_else(|| "/var/lib/blxrep".into()),
            hooks_dir: settings.hooks_dir,
            freeze_timeout: settings.freeze_timeout.map_or(Duration::from_secs(10), |d| d.0),
            hook_timeout: settings.hook_timeout.map_or(Duration::from_secs(10), |d| d.0),
            block_shift: block_bytes.trailing_zeros() as u8,
            read_rate_bytes: settings.read_rate_mib.map(|mib| u64::from(mib.max(1)) << 20),
        })
    }
}

/// What a dispatcher needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DispatcherConfig {
    /// Everything is kept here.
    pub data_dir: PathBuf,
    /// Who may connect.
    pub agents_file: PathBuf,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Time between checkpoints.
    pub sync_every: Duration,
    /// How everything stored is checked; not at all without it.
    pub scrub: Option<Pace>,
}

impl DispatcherConfig {
    /// Checks what a dispatcher needs.
    ///
    /// # Errors
    /// When a key is missing.
    pub fn new(settings: Settings, file: &Path) -> Result<Self, ConfigError> {
        let every = settings.scrub_every.unwrap_or(ScrubEvery(Some(SCRUB_EVERY))).0;
        let rate_bytes = u64::from(settings.scrub_rate_mib.unwrap_or(SCRUB_RATE_MIB).max(1)) << 20;
        Ok(Self {
            data_dir: need(settings.data_dir, "data-dir", file)?,
            agents_file: need(settings.agents_file, "agents-file", file)?,
            listen: settings.listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 8080))),
            sync_every: settings.sync_freq.map_or(Duration::from_secs(300), |freq| freq.0),
            scrub: every.map(|every| Pace { every, rate_bytes }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        Settings::parse(text, Path::new("c.yaml")).map_err(|e| e.to_string())
    }

    #[test]
    fn a_bad_file_is_refused_with_key_file_and_line() {
        let unknown = parse("mode: agent\nsink-freq: 5\n").unwrap_err();
        assert!(
            unknown.starts_with("c.yaml: ") && unknown.contains("sink-freq") && unknown.contains("line 2"),
            "{unknown}"
        );
        let bad = parse("mode: agent\nid: ../../x\n").unwrap_err();
        assert!(bad.contains("../../x") && bad.contains("id: ") && bad.contains("line 2"), "{bad}");
        let bad = parse("sync-freq: soon\n").unwrap_err();
        assert!(bad.contains("sync-freq") && bad.contains("soon"), "{bad}");
        assert!(parse("mode: both\n").is_err());
        assert!(parse("mode: agent\nmode: agent\n").is_err(), "a key given twice");
        assert!(parse("# nothing\n").is_ok());
    }

    #[test]
    fn a_missing_key_is_named_with_the_file_it_could_be_in() {
        let settings = parse("mode: agent\nid: a\n").unwrap();
        let error = AgentConfig::new(settings, Path::new("/etc/c.yaml")).unwrap_err().to_string();
        assert_eq!(error, "'device' is missing: set it in /etc/c.yaml or with --device");
    }

    #[test]
    fn the_scrub_is_on_unless_it_is_switched_off() {
        let scrub = |text: &str| {
            let settings = parse(&format!("data-dir: /d\nagents-file: /a\n{text}")).unwrap();
            DispatcherConfig::new(settings, Path::new("c.yaml")).unwrap().scrub
        };
        assert_eq!(scrub(""), Some(Pace { every: SCRUB_EVERY, rate_bytes: 50 << 20 }));
        let set = scrub("scrub-every: 7\nscrub-rate-mib: 9\n");
        assert_eq!(set, Some(Pace { every: SCRUB_EVERY / 30 * 7, rate_bytes: 9 << 20 }));
        assert_eq!(scrub("scrub-every: never\n"), None);
    }

    #[test]
    fn a_flag_beats_the_file() {
        let file = parse("id: a\nsync-freq: 5\ndevice: [/dev/sda, /dev/sdb]\nfreeze-timeout: 3\n").unwrap();
        let flags = Settings { id: Some("b".parse().unwrap()), ..Settings::default() };
        let both = flags.or(file);
        assert_eq!(both.id.unwrap().as_str(), "b");
        assert_eq!(both.sync_freq.unwrap().0, Duration::from_secs(300));
        assert_eq!(both.device.len(), 2);
        assert_eq!(both.freeze_timeout.unwrap().0, Duration::from_secs(3));
    }
}
