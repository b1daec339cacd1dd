//! Agents' keys: one line for the agent, one hash for the dispatcher.
//!
//! A key is 256 random bits, so one plain hash protects it: there is nothing to guess. The line in an agent's
//! `key-file` is `blxrep1:<agent>:<secret>:<fingerprint>`, secret and fingerprint (SHA-256 of the dispatcher's
//! certificate) in hexadecimal. A line of the dispatcher's `agents-file` is `<agent> blake3:<hash of the secret>`, and
//! after it `no-restore` for an agent that may fetch no checkpoint, or `restores:<agent>` for each other agent whose
//! checkpoints it may fetch besides its own.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use subtle::ConstantTimeEq;

use super::tls::Fingerprint;
use crate::ids::AgentId;

const KEY_MAX_BYTES: u64 = 4096;
const AGENTS_MAX_BYTES: u64 = 16 << 20;
/// The word for an agent that may not restore.
const NO_RESTORE: &str = "no-restore";
/// What an agent is named behind whose checkpoints another one may fetch.
const RESTORES: &str = "restores:";

/// A key or agents file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no key.
    #[error("{0} does not hold a key: put the one line there that 'blxrep enroll' printed")]
    NoKey(PathBuf),
    /// Others may read the key.
    #[error("{path} may be read by others (mode {mode:03o}): chmod 600 it")]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A line of the agents file is not one.
    #[error(
        "{path}, line {line}: expected '<agent> blake3:<64 hexadecimal digits>', and nothing after it but '{NO_RESTORE}' or '{RESTORES}<agent>', once or more"
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// The agent is there already.
    #[error("{path} holds agent {agent} already: remove its line first if its key is to be replaced")]
    Enrolled {
        /// The file.
        path: PathBuf,
        /// The agent.
        agent: AgentId,
    },
    /// It is made by something else than enrolling: NixOS keeps what its configuration says in a place nobody writes.
    #[error(
        "{0} is on a read-only file system: give a new file as --agents-file, and add the line it gets where this one is made"
    )]
    ReadOnly(PathBuf),
    /// No random numbers.
    #[error("the kernel gives no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// An agent's secret. Never printed but by [`AgentKey`]'s line.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// The secret as 64 hexadecimal digits, for the `Authorization` header.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        unhex(text).map(Self)
    }
}

/// What an agent's `key-file` holds.
#[derive(Debug, Clone)]
pub struct AgentKey {
    /// Whose key it is.
    pub agent: AgentId,
    /// The secret.
    pub secret: Secret,
    /// The dispatcher's certificate.
    pub fingerprint: Fingerprint,
}

impl AgentKey {
    /// A new random key.
    ///
    /// # Errors
    /// When the kernel gives no random numbers.
    pub fn generate(agent: AgentId, fingerprint: Fingerprint) -> Result<Self, KeyError> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret)?;
        Ok(Self { agent, secret: Secret(secret), fingerprint })
    }

    /// The line for the agent's `key-file`.
    pub fn to_line(&self) -> String {
        format!("blxrep1:{}:{}:{}", self.agent, self.secret.to_hex(), self.fingerprint)
    }

    /// Reads a line made by [`Self::to_line`].
    pub fn from_line(line: &str) -> Option<Self> {
        let mut parts = line.trim().split(':');
        let (version, agent, secret) = (parts.next()?, parts.next()?, parts.next()?);
        let fingerprint = parts.next()?;
        if version != "blxrep1" || parts.next().is_some() {
            return None;
        }
        Some(Self {
            agent: agent.parse().ok()?,
            secret: Secret::from_hex(secret)?,
            fingerprint: Fingerprint(unhex(fingerprint)?),
        })
    }

    /// Reads a key file, which nobody but its owner (and group) may read.
    ///
    /// # Errors
    /// When it cannot be read, others may read it, or it holds no key.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let file_error = |source| KeyError::File { path: path.to_owned(), source };
        let mode = fs::metadata(path).map_err(file_error)?.permissions().mode() & 0o777;
        if mode & 0o007 != 0 {
            return Err(KeyError::Open { path: path.to_owned(), mode });
        }
        let text = read_bounded(path, KEY_MAX_BYTES).map_err(file_error)?;
        Self::from_line(&text).ok_or_else(|| KeyError::NoKey(path.to_owned()))
    }
}

/// Which checkpoints an agent may fetch: none, or its own and those of these other agents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fetchable {
    /// None.
    Nothing,
    /// Its own, and those of these.
    OwnAnd(Vec<AgentId>),
}

impl Fetchable {
    fn from_words<'a>(words: impl Iterator<Item = &'a str>) -> Option<Self> {
        let words: Vec<&str> = words.collect();
        if words == [NO_RESTORE] {
            return Some(Self::Nothing);
        }
        let agent = |word: &&str| word.strip_prefix(RESTORES)?.parse().ok();
        words.iter().map(agent).collect::<Option<_>>().map(Self::OwnAnd)
    }

    /// The words of the line, each with a blank before it.
    fn to_words(&self) -> String {
        match self {
            Self::Nothing => format!(" {NO_RESTORE}"),
            Self::OwnAnd(others) => others.iter().map(|agent| format!(" {RESTORES}{agent}")).collect(),
        }
    }
}

/// Which key an agent has proven to hold, as the agents file names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyHash([u8; 32]);

#[derive(Debug, Clone)]
struct Known {
    hash: KeyHash,
    fetchable: Fetchable,
}

/// The agents a dispatcher knows.
#[derive(Debug, Clone, Default)]
pub struct Agents(HashMap<AgentId, Known>);

impl Agents {
    /// Reads an agents file; one that is not there holds no agents.
    ///
    /// # Errors
    /// As [`Self::load`], but for that.
    pub fn load_if_there(path: &Path) -> Result<Self, KeyError> {
        match Self::load(path) {
            Err(KeyError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            other => other,
        }
    }

    /// Reads an agents file. One that is not there is an error: it may be about to be replaced, and that is no reason to
    /// cut everybody off.
    ///
    /// # Errors
    /// When it cannot be read, or a line is malformed (then no line counts).
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let text = read_bounded(path, AGENTS_MAX_BYTES)
            .map_err(|source| KeyError::File { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|line| KeyError::Line { path: path.to_owned(), line })
    }

    pub(crate) fn parse(text: &str) -> Result<Self, usize> {
        let mut agents = HashMap::new();
        for (line, number) in text.lines().zip(1usize..) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut words = line.split_ascii_whitespace();
            let agent = words.next().and_then(|word| word.parse().ok()).ok_or(number)?;
            let hash = words.next().and_then(|word| unhex(word.strip_prefix("blake3:")?)).ok_or(number)?;
            let fetchable = Fetchable::from_words(words).ok_or(number)?;
            agents.insert(agent, Known { hash: KeyHash(hash), fetchable });
        }
        Ok(Self(agents))
    }

    /// The agents' ids, in no order.
    pub fn ids(&self) -> Vec<AgentId> {
        self.0.keys().cloned().collect()
    }

    /// Whether the agent is known.
    pub fn contains(&self, agent: &AgentId) -> bool {
        self.0.contains_key(agent)
    }

    /// The agent's key, if this is its secret. Takes the same time for a wrong secret and an unknown agent.
    pub fn accept(&self, agent: &AgentId, secret: &Secret) -> Option<KeyHash> {
        let given = hash_secret(secret);
        let expected = self.0.get(agent).map_or([0; 32], |known| known.hash.0);
        (bool::from(given.ct_eq(&expected)) && self.contains(agent)).then_some(KeyHash(given))
    }

    /// Whether this key is still the agent's.
    pub fn has(&self, agent: &AgentId, key: KeyHash) -> bool {
        self.0.get(agent).is_some_and(|known| known.hash == key)
    }

    /// Whether an agent may fetch the checkpoints of `of`.
    pub fn may_fetch(&self, agent: &AgentId, of: &AgentId) -> bool {
        self.0.get(agent).is_some_and(|known| match &known.fetchable {
            Fetchable::Nothing => false,
            Fetchable::OwnAnd(others) => agent == of || others.contains(of),
        })
    }
}

/// Adds an agent to the agents file, and what it may fetch, so that a reader sees the old file or the new one.
///
/// # Errors
/// When the agent is there already, a line of the file is malformed, or it cannot be written.
pub fn enroll(agents_file: &Path, key: &AgentKey, fetchable: &Fetchable) -> Result<(), KeyError> {
    if Agents::load_if_there(agents_file)?.contains(&key.agent) {
        return Err(KeyError::Enrolled { path: agents_file.to_owned(), agent: key.agent.clone() });
    }
    let write = || -> io::Result<()> {
        let mut text = match read_bounded(agents_file, AGENTS_MAX_BYTES) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            other => other?,
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        let (hash, words) = (hex(&hash_secret(&key.secret)), fetchable.to_words());
        text.push_str(&format!("{} blake3:{hash}{words}\n", key.agent));
        write_private(agents_file, text.as_bytes())
    };
    write().map_err(|source| match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => KeyError::ReadOnly(agents_file.to_owned()),
        _ => KeyError::File { path: agents_file.to_owned(), source },
    })
}

/// Replaces a file whole and durably, readable by its owner and group only: a reader, and a crash, sees the old one or the new.
///
/// # Errors
/// What the file system says; the old file is then still there.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with_mode(path, content, 0o640)
}

/// The same with another mode.
///
/// # Errors
/// As there.
pub(crate) fn write_with_mode(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    let done =
        file.write_all(content).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    if done.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    done?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(parent)?.sync_all()
}

fn read_bounded(path: &Path, max: u64) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    fs::File::open(path)?.take(max + 1).read_to_string(&mut text)?;
    if text.len() as u64 > max { Err(io::Error::from(io::ErrorKind::FileTooLarge)) } else { Ok(text) }
}

fn hash_secret(secret: &Secret) -> [u8; 32] {
    blake3::derive_key("blxrep agent secret v1", &secret.0)
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

/// Exactly `N` bytes from hexadecimal digits.
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N * 2 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(agent: &str) -> AgentKey {
        AgentKey::generate(agent.parse().unwrap(), Fingerprint([3; 32])).unwrap()
    }

    #[test]
    fn only_the_enrolled_secret_of_the_enrolled_agent_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agents");
        let (one, ten) = (key("agent1"), key("agent10"));
        let of_ten = Fetchable::OwnAnd(vec![ten.agent.clone(), "gone".parse().unwrap()]);
        enroll(&file, &one, &of_ten).unwrap();
        enroll(&file, &ten, &Fetchable::Nothing).unwrap();
        assert!(matches!(enroll(&file, &one, &Fetchable::Nothing), Err(KeyError::Enrolled { .. })));
        let agents = Agents::load(&file).unwrap();
        let accepts = |agent, secret| agents.accept(agent, secret).is_some();
        assert!(accepts(&one.agent, &one.secret) && accepts(&ten.agent, &ten.secret));
        let other = "agent2".parse().unwrap();
        assert!(agents.may_fetch(&one.agent, &one.agent) && agents.may_fetch(&one.agent, &ten.agent));
        assert!(!agents.may_fetch(&one.agent, &other) && !agents.may_fetch(&other, &other));
        assert!(!agents.may_fetch(&ten.agent, &ten.agent) && !agents.may_fetch(&ten.agent, &one.agent));
        assert!(!accepts(&one.agent, &ten.secret));
        assert!(!accepts(&"agent2".parse().unwrap(), &one.secret));
        let key = agents.accept(&one.agent, &one.secret).unwrap();
        assert!(agents.has(&one.agent, key) && !agents.has(&ten.agent, key) && !agents.has(&other, key));
        assert!(!fs::read_to_string(&file).unwrap().contains(&one.secret.to_hex()), "only a hash is kept");
        assert!(!format!("{one:?}").contains(&one.secret.to_hex()), "a secret is never printed");
    }

    /// Configurations of NixOS hold such hashes; this one is in nix/tests.
    #[test]
    fn the_hash_of_a_key_stays_what_it_is() {
        let secret = Secret::from_hex(&"07".repeat(32)).unwrap();
        assert_eq!(
            hex(&hash_secret(&secret)),
            "64c5e710067099a23bc9a34b4a944e90fd5eec4788ddfc3c6bb7a8e0a7c6ba69"
        );
    }

    #[test]
    fn a_key_file_is_private_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        fs::write(&file, key("a").to_line()).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(AgentKey::load(&file), Err(KeyError::Open { .. })));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(AgentKey::load(&file).unwrap().agent.as_str(), "a");
        for wrong in ["blxrep1:a:00".to_owned(), format!("{}:more", key("a").to_line())] {
            fs::write(&file, wrong).unwrap();
            assert!(matches!(AgentKey::load(&file), Err(KeyError::NoKey(_))));
        }
    }

    #[test]
    fn a_malformed_line_is_named() {
        assert_eq!(Agents::parse("# x\n\na blake3:12\n").unwrap_err(), 3);
        assert_eq!(Agents::parse("../x blake3:00\n").unwrap_err(), 1);
        let good = format!("a blake3:{}", "0".repeat(64));
        assert!(Agents::parse(&format!("{good}\nb{} no-restore \n", &good[1..])).is_ok());
        assert!(Agents::parse(&format!("{good} restores:b restores:c.d")).is_ok());
        for more in [
            "norestore",
            "no-restore no-restore",
            "no-restore x",
            "NO-RESTORE",
            "# x",
            "restores:",
            "restores:../b",
            "restores: b",
            "no-restore restores:b",
            "restores:b no-restore",
        ] {
            assert_eq!(Agents::parse(&format!("{good}\n{good} {more}")).unwrap_err(), 2, "{more}");
        }
    }
}
