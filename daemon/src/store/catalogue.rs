//! The catalogue `catalogue.redb`: what agents said of themselves and how far actions are.
//!
//! A convenience only: the files of the disks are the truth. What must never happen here: a damaged catalogue that
//! keeps the dispatcher from starting, or a full disk one that it cannot do without. redb panics on some damage: that is
//! caught, and damage.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::ids::{AgentId, DiskId};

/// The file's name in the data directory.
pub const FILE: &str = "catalogue.redb";
const ACTIONS: TableDefinition<'_, &str, &str> = TableDefinition::new("xmactions");
const AGENTS: TableDefinition<'_, &str, &str> = TableDefinition::new("xmdispatcher");

/// Why the catalogue did not take or give something.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// Another process has it open.
    #[error("{0} is open in another process: only one dispatcher may use a data directory")]
    InUse(PathBuf),
    /// It cannot be opened, and not because it is damaged.
    #[error("{path}: cannot open the catalogue: {reason}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("the catalogue failed: {0}; it may be removed while the dispatcher does not run")]
    Storage(#[from] redb::Error),
    /// An entry is not what this program writes.
    #[error("the catalogue's entry {key:?} cannot be read: {source}")]
    Entry {
        /// The entry's key.
        key: String,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// What is known of an action on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// What is done: `copy`, `sync`, `compare`, `restore` and the like.
    pub kind: String,
    /// How it stands, in one word.
    pub state: String,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all; 0 if that is not known.
    pub total_bytes: u64,
    /// When it began, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// When this was written, in milliseconds since 1970.
    pub updated_unix_ms: u64,
}

/// What is known of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentEntry {
    /// The footprint it sent.
    pub footprint: serde_json::Value,
    /// When it was first seen, in milliseconds since 1970.
    pub first_seen_unix_ms: u64,
    /// When it was last seen, in milliseconds since 1970.
    pub last_seen_unix_ms: u64,
}

/// Where an opened catalogue comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was there.
    Found,
    /// There was none.
    New,
    /// It was damaged; it was put aside here and made anew.
    Damaged(PathBuf),
}

/// The open catalogue.
#[derive(Debug)]
pub struct Catalogue {
    data_dir: PathBuf,
    /// `None` after an error of the file system, behind which redb does nothing more: it is opened again when it is needed.
    database: Mutex<Option<Database>>,
}

/// Whether the file system failed, be it for lack of space, and not the catalogue.
fn is_io(error: &redb::Error) -> bool {
    match error {
        redb::Error::Io(_) => !is_damage(error),
        redb::Error::PreviousIo | redb::Error::DatabaseClosed => true,
        _ => false,
    }
}

/// Whether it is not what redb wrote; what is cut short is not, either.
fn is_damage(error: &redb::Error) -> bool {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    match error {
        redb::Error::Io(e) => matches!(e.kind(), InvalidData | UnexpectedEof),
        error => matches!(error, redb::Error::Corrupted(_)),
    }
}

fn is_full(error: &redb::Error) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error, redb::Error::Io(e) if matches!(e.kind(), StorageFull | QuotaExceeded))
}

impl Catalogue {
    /// Opens the catalogue of a data directory, or makes one. A damaged one is renamed aside. On a full disk it is opened
    /// when there is space.
    ///
    /// # Errors
    /// InUse if another process has it open; Open if the file system refuses.
    pub fn open(data_dir: &Path) -> Result<(Self, Origin), CatalogueError> {
        let (database, origin) = open_or_make(data_dir)?;
        Ok((Self { data_dir: data_dir.to_owned(), database: Mutex::new(database) }, origin))
    }

    /// Does something with the database, which is opened again if it is not open.
    fn with<T>(&self, act: impl FnOnce(&Database) -> Result<T, CatalogueError>) -> Result<T, CatalogueError> {
        let mut slot = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let open = match slot.take() {
            Some(database) => Some(database),
            None => {
                let (open, origin) = open_or_make(&self.data_dir)?;
                if let Origin::Damaged(aside) = origin {
                    warn!("the catalogue was damaged and is made anew; the old one is {}", aside.display());
                }
                open
            }
        };
        let Some(database) = open else {
            let reason = "no space left; free some in the data directory".to_owned();
            return Err(CatalogueError::Open { path: self.data_dir.join(FILE), reason });
        };
        let result = caught(|| Ok(act(&database))).map_err(CatalogueError::from).flatten();
        match &result {
            // Opened again when it is needed, and then looked at: damage is found there.
            Err(CatalogueError::Storage(error)) if is_io(error) || is_damage(error) => close(database),
            _ => *slot = Some(database),
        }
        result
    }

    /// Keeps how an action on a disk stands, in place of what was known of that kind.
    ///
    /// # Errors
    /// Storage.
    pub fn put_action(&self, agent: &AgentId, disk: &DiskId, action: &Action) -> Result<(), CatalogueError> {
        self.put(ACTIONS, [(&*format!("{agent}/{disk}/{}", action.kind), action)])
    }

    /// All actions that can be read, with their keys `agent/disk/kind`.
    ///
    /// # Errors
    /// Storage.
    pub fn actions(&self) -> Result<Vec<(String, Action)>, CatalogueError> {
        Ok(self.all(ACTIONS)?.0)
    }

    /// Keeps what is known of an agent.
    ///
    /// # Errors
    /// Storage.
    pub fn put_agent(&self, agent: &AgentId, entry: &AgentEntry) -> Result<(), CatalogueError> {
        self.put(AGENTS, [(agent.as_str(), entry)])
    }

    /// The same for several, at once.
    ///
    /// # Errors
    /// Storage.
    pub fn put_agents(&self, entries: &[(AgentId, AgentEntry)]) -> Result<(), CatalogueError> {
        self.put(AGENTS, entries.iter().map(|(agent, entry)| (agent.as_str(), entry)))
    }

    /// What is known of an agent.
    ///
    /// # Errors
    /// Storage; Entry.
    pub fn agent(&self, agent: &AgentId) -> Result<Option<AgentEntry>, CatalogueError> {
        self.with(|database| {
            let read = database.begin_read().map_err(redb::Error::from)?;
            let table = read.open_table(AGENTS).map_err(redb::Error::from)?;
            let value = table.get(agent.as_str()).map_err(redb::Error::from)?;
            value.map(|v| decode(agent.as_str(), v.value())).transpose()
        })
    }

    /// All agents, by name, and what is wrong with entries that cannot be read.
    ///
    /// # Errors
    /// Storage.
    pub fn agents(&self) -> Result<Entries<AgentEntry>, CatalogueError> {
        self.all(AGENTS)
    }

    fn put<'a, T: Serialize + 'a>(
        &self,
        table: TableDefinition<'_, &str, &str>,
        entries: impl IntoIterator<Item = (&'a str, &'a T)>,
    ) -> Result<(), CatalogueError> {
        self.with(|database| {
            let write = database.begin_write().map_err(redb::Error::from)?;
            let mut open = write.open_table(table).map_err(redb::Error::from)?;
            for (key, value) in entries {
                let text = serde_json::to_string(value)
                    .map_err(|source| CatalogueError::Entry { key: key.to_owned(), source })?;
                open.insert(key, text.as_str()).map_err(redb::Error::from)?;
            }
            drop(open);
            Ok(write.commit().map_err(redb::Error::from)?)
        })
    }

    fn all<T: for<'a> Deserialize<'a>>(
        &self,
        table: TableDefinition<'_, &str, &str>,
    ) -> Result<Entries<T>, CatalogueError> {
        self.with(|database| all_in(database, table))
    }
}

/// Entries by their keys, and what is wrong with those that cannot be read.
pub type Entries<T> = (Vec<(String, T)>, Vec<CatalogueError>);

fn all_in<T: for<'a> Deserialize<'a>>(
    database: &Database,
    table: TableDefinition<'_, &str, &str>,
) -> Result<Entries<T>, CatalogueError> {
    let read = database.begin_read().map_err(redb::Error::from)?;
    let open = read.open_table(table).map_err(redb::Error::from)?;
    let (mut sound, mut damaged) = (Vec::new(), Vec::new());
    for entry in open.iter().map_err(redb::Error::from)? {
        let (key, value) = entry.map_err(redb::Error::from)?;
        match decode(key.value(), value.value()) {
            Ok(value) => sound.push((key.value().to_owned(), value)),
            Err(error) => damaged.push(error),
        }
    }
    Ok((sound, damaged))
}

fn decode<T: for<'a> Deserialize<'a>>(key: &str, text: &str) -> Result<T, CatalogueError> {
    serde_json::from_str(text).map_err(|source| CatalogueError::Entry { key: key.to_owned(), source })
}

/// The database of a data directory, and where it comes from. No database if the disk is full.
fn open_or_make(data_dir: &Path) -> Result<(Option<Database>, Origin), CatalogueError> {
    let path = data_dir.join(FILE);
    let refused = |reason: String| CatalogueError::Open { path: path.clone(), reason };
    let made = |opened: Result<Database, redb::Error>| match opened {
        Ok(database) => Ok(Some(database)),
        Err(error) if is_full(&error) => Ok(None),
        Err(error) => Err(refused(error.to_string())),
    };
    let origin = if path.exists() { Origin::Found } else { Origin::New };
    match open_checked(|| Database::create(&path)) {
        Err(redb::Error::DatabaseAlreadyOpen) => Err(CatalogueError::InUse(path)),
        Err(error) if !is_io(&error) => {
            let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let aside = data_dir.join(format!("{FILE}.damaged-{seconds}"));
            std::fs::rename(&path, &aside).map_err(|e| refused(e.to_string()))?;
            Ok((made(open_checked(|| Database::create(&path)))?, Origin::Damaged(aside)))
        }
        opened => Ok((made(opened)?, origin)),
    }
}

/// Opens or makes the database and its tables, and checks all of it: damage is to show now, not later.
pub(super) fn open_checked(
    create: impl FnOnce() -> Result<Database, DatabaseError>,
) -> Result<Database, redb::Error> {
    let mut database = caught(|| create().map_err(of_opening))?;
    match caught(|| check(&mut database)) {
        Ok(()) => Ok(database),
        Err(error) => {
            close(database);
            Err(error)
        }
    }
}

fn of_opening(error: DatabaseError) -> redb::Error {
    match error {
        DatabaseError::DatabaseAlreadyOpen => redb::Error::DatabaseAlreadyOpen,
        error => error.into(),
    }
}

fn check(database: &mut Database) -> Result<(), redb::Error> {
    // What a crash left is repaired. Every page is checked before what it points to is looked at.
    database.check_integrity().map_err(of_opening)?;
    let write = database.begin_write()?;
    for table in [ACTIONS, AGENTS] {
        let open = write.open_table(table).map_err(|e: TableError| redb::Error::from(e))?;
        for entry in open.iter()? {
            entry?;
        }
    }
    write.commit()?;
    Ok(())
}

/// Does something with a database that may be damaged.
fn caught<T>(act: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, redb::Error> {
    catch_unwind(AssertUnwindSafe(act))
        .unwrap_or_else(|_| Err(redb::Error::Corrupted("redb panicked over it".to_owned())))
}

/// Closes a database that may be damaged.
fn close(database: Database) {
    let closed = caught(|| {
        drop(database);
        Ok(())
    });
    if let Err(error) = closed {
        warn!("the catalogue was not closed cleanly: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action(state: &str) -> Action {
        Action {
            kind: "copy".into(),
            state: state.into(),
            done_bytes: 1,
            total_bytes: 2,
            started_unix_ms: 3,
            updated_unix_ms: 4,
        }
    }

    #[test]
    fn what_is_put_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, disk) = ("agent1".parse().unwrap(), "disk0".parse().unwrap());
        let entry = AgentEntry {
            footprint: serde_json::json!({"cpus": 4}),
            first_seen_unix_ms: 1,
            last_seen_unix_ms: 2,
        };
        {
            let (catalogue, origin) = Catalogue::open(dir.path()).unwrap();
            assert_eq!(origin, Origin::New);
            catalogue.put_action(&agent, &disk, &action("running")).unwrap();
            catalogue.put_action(&agent, &disk, &action("done")).unwrap();
            catalogue.put_agent(&agent, &entry).unwrap();
            assert!(matches!(Catalogue::open(dir.path()), Err(CatalogueError::InUse(_))));
        }
        let (catalogue, origin) = Catalogue::open(dir.path()).unwrap();
        assert_eq!(origin, Origin::Found);
        assert_eq!(catalogue.actions().unwrap(), [("agent1/disk0/copy".to_owned(), action("done"))]);
        assert_eq!(catalogue.agent(&agent).unwrap(), Some(entry));
        assert_eq!(catalogue.agent(&"agent10".parse().unwrap()).unwrap(), None);
        assert_eq!(catalogue.agents().unwrap().0.len(), 1);
    }

    struct Mounted<'a>(&'a Path);

    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg(self.0).status();
        }
    }

    #[test]
    fn a_full_disk_closes_the_catalogue_until_there_is_space() {
        let dir = tempfile::tempdir().unwrap();
        let mount = ["-t", "tmpfs", "-o", "size=4m", "tmpfs"];
        let status = std::process::Command::new("mount").args(mount).arg(dir.path()).status();
        assert!(status.is_ok_and(|s| s.success()), "this test needs root");
        let _mounted = Mounted(dir.path());
        let ballast = dir.path().join("ballast");
        let fill = || drop(std::fs::write(&ballast, vec![1; 8 << 20]).unwrap_err());
        let (agent, disk) = ("agent1".parse().unwrap(), "disk0".parse().unwrap());
        fill();
        let (catalogue, _) = Catalogue::open(dir.path()).unwrap();
        assert!(catalogue.put_action(&agent, &disk, &action("a")).is_err());
        std::fs::remove_file(&ballast).unwrap();
        catalogue.put_action(&agent, &disk, &action("b")).unwrap();
        fill();
        // It grows until there is no space.
        let long = "x".repeat(100_000);
        let full = (0..100).any(|_| catalogue.put_action(&agent, &disk, &action(&long)).is_err());
        assert!(full);
        assert!(catalogue.put_action(&agent, &disk, &action(&long)).is_err());
        std::fs::remove_file(&ballast).unwrap();
        catalogue.put_action(&agent, &disk, &action("c")).unwrap();
        assert_eq!(catalogue.actions().unwrap(), [("agent1/disk0/copy".to_owned(), action("c"))]);
    }

    #[test]
    fn a_damaged_catalogue_is_put_aside_and_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        for garbage in [&b"not a database at all"[..], &[0; 8192]] {
            std::fs::write(dir.path().join(FILE), garbage).unwrap();
            let (catalogue, origin) = Catalogue::open(dir.path()).unwrap();
            let Origin::Damaged(aside) = origin else { panic!("{origin:?}") };
            assert_eq!(std::fs::read(aside).unwrap(), garbage);
            assert!(catalogue.actions().unwrap().is_empty());
        }
    }
}
