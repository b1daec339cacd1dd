//! The catalogue `catalogue.redb`: what agents said of themselves and how far actions are.
//!
//! A convenience only: the files of the disks are the truth. What must never happen here: a damaged catalogue that
//! keeps the dispatcher from starting, or a full disk one that it cannot do without.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::{Deserialize, Serialize};

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
        redb::Error::Io(e) => e.kind() != std::io::ErrorKind::InvalidData,
        redb::Error::PreviousIo | redb::Error::DatabaseClosed => true,
        _ => false,
    }
}

fn is_full(error: &redb::Error) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error, redb::Error::Io(e) if matches!(e.kind(), StorageFull | QuotaExceeded))
}

impl Catalogue {
    /// Opens the catalogue of a data directory, or makes one. A damaged one is renamed aside; its new path is the second
    /// value, so that it can be told. On a full disk it is opened when there is space.
    ///
    /// # Errors
    /// InUse if another process has it open; Open if the file system refuses.
    pub fn open(data_dir: &Path) -> Result<(Self, Option<PathBuf>), CatalogueError> {
        let (database, aside) = open_or_make(data_dir)?;
        Ok((Self { data_dir: data_dir.to_owned(), database: Mutex::new(database) }, aside))
    }

    /// Does something with the database, which is opened again if it is not open.
    fn with<T>(&self, act: impl FnOnce(&Database) -> Result<T, CatalogueError>) -> Result<T, CatalogueError> {
        let mut slot = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let open = match slot.take() {
            Some(database) => Some(database),
            None => open_or_make(&self.data_dir)?.0,
        };
        let Some(database) = open else {
            let reason = "no space left; free some in the data directory".to_owned();
            return Err(CatalogueError::Open { path: self.data_dir.join(FILE), reason });
        };
        let result = act(&database);
        if !matches!(&result, Err(CatalogueError::Storage(error)) if is_io(error)) {
            *slot = Some(database);
        }
        result
    }

    /// Keeps how an action on a disk stands, in place of what was known of that kind.
    ///
    /// # Errors
    /// Storage.
    pub fn put_action(&self, agent: &AgentId, disk: &DiskId, action: &Action) -> Result<(), CatalogueError> {
        self.put(ACTIONS, &format!("{agent}/{disk}/{}", action.kind), action)
    }

    /// All actions, with their keys `agent/disk/kind`.
    ///
    /// # Errors
    /// Storage; Entry.
    pub fn actions(&self) -> Result<Vec<(String, Action)>, CatalogueError> {
        self.all(ACTIONS)
    }

    /// Keeps what is known of an agent.
    ///
    /// # Errors
    /// Storage.
    pub fn put_agent(&self, agent: &AgentId, entry: &AgentEntry) -> Result<(), CatalogueError> {
        self.put(AGENTS, agent.as_str(), entry)
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

    /// All agents, by name.
    ///
    /// # Errors
    /// Storage; Entry.
    pub fn agents(&self) -> Result<Vec<(String, AgentEntry)>, CatalogueError> {
        self.all(AGENTS)
    }

    fn put<T: Serialize>(
        &self,
        table: TableDefinition<'_, &str, &str>,
        key: &str,
        value: &T,
    ) -> Result<(), CatalogueError> {
        let text = serde_json::to_string(value)
            .map_err(|source| CatalogueError::Entry { key: key.to_owned(), source })?;
        self.with(|database| {
            let write = database.begin_write().map_err(redb::Error::from)?;
            let mut open = write.open_table(table).map_err(redb::Error::from)?;
            open.insert(key, text.as_str()).map_err(redb::Error::from)?;
            drop(open);
            Ok(write.commit().map_err(redb::Error::from)?)
        })
    }

    fn all<T: for<'a> Deserialize<'a>>(
        &self,
        table: TableDefinition<'_, &str, &str>,
    ) -> Result<Vec<(String, T)>, CatalogueError> {
        self.with(|database| all_in(database, table))
    }
}

fn all_in<T: for<'a> Deserialize<'a>>(
    database: &Database,
    table: TableDefinition<'_, &str, &str>,
) -> Result<Vec<(String, T)>, CatalogueError> {
    let read = database.begin_read().map_err(redb::Error::from)?;
    let open = read.open_table(table).map_err(redb::Error::from)?;
    let entries = open.iter().map_err(redb::Error::from)?;
    let entry = |entry: Result<(redb::AccessGuard<'_, &str>, redb::AccessGuard<'_, &str>), _>| {
        let (key, value) = entry.map_err(|e: redb::StorageError| redb::Error::from(e))?;
        Ok((key.value().to_owned(), decode(key.value(), value.value())?))
    };
    entries.map(entry).collect()
}

fn decode<T: for<'a> Deserialize<'a>>(key: &str, text: &str) -> Result<T, CatalogueError> {
    serde_json::from_str(text).map_err(|source| CatalogueError::Entry { key: key.to_owned(), source })
}

/// The database of a data directory, and where a damaged one was put. No database if the disk is full.
fn open_or_make(data_dir: &Path) -> Result<(Option<Database>, Option<PathBuf>), CatalogueError> {
    let path = data_dir.join(FILE);
    let refused = |reason: String| CatalogueError::Open { path: path.clone(), reason };
    let made = |opened: Result<Database, redb::Error>| match opened {
        Ok(database) => Ok(Some(database)),
        Err(error) if is_full(&error) => Ok(None),
        Err(error) => Err(refused(error.to_string())),
    };
    match open_checked(&path) {
        Err(redb::Error::DatabaseAlreadyOpen) => Err(CatalogueError::InUse(path)),
        Err(error) if !is_io(&error) => {
            let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let aside = data_dir.join(format!("{FILE}.damaged-{seconds}"));
            std::fs::rename(&path, &aside).map_err(|e| refused(e.to_string()))?;
            Ok((made(open_checked(&path))?, Some(aside)))
        }
        opened => Ok((made(opened)?, None)),
    }
}

/// Opens or makes the database and its tables, and reads both once: damage is to show now, not later.
fn open_checked(path: &Path) -> Result<Database, redb::Error> {
    let database = Database::create(path).map_err(|e| match e {
        DatabaseError::DatabaseAlreadyOpen => redb::Error::DatabaseAlreadyOpen,
        e => e.into(),
    })?;
    let write = database.begin_write()?;
    for table in [ACTIONS, AGENTS] {
        let open = write.open_table(table).map_err(|e: TableError| redb::Error::from(e))?;
        for entry in open.iter()? {
            entry?;
        }
    }
    write.commit()?;
    Ok(database)
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
            let (catalogue, aside) = Catalogue::open(dir.path()).unwrap();
            assert!(aside.is_none());
            catalogue.put_action(&agent, &disk, &action("running")).unwrap();
            catalogue.put_action(&agent, &disk, &action("done")).unwrap();
            catalogue.put_agent(&agent, &entry).unwrap();
            assert!(matches!(Catalogue::open(dir.path()), Err(CatalogueError::InUse(_))));
        }
        let (catalogue, aside) = Catalogue::open(dir.path()).unwrap();
        assert!(aside.is_none());
        assert_eq!(catalogue.actions().unwrap(), [("agent1/disk0/copy".to_owned(), action("done"))]);
        assert_eq!(catalogue.agent(&agent).unwrap(), Some(entry));
        assert_eq!(catalogue.agent(&"agent10".parse().unwrap()).unwrap(), None);
        assert_eq!(catalogue.agents().unwrap().len(), 1);
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
            let (catalogue, aside) = Catalogue::open(dir.path()).unwrap();
            assert_eq!(std::fs::read(aside.unwrap()).unwrap(), garbage);
            assert!(catalogue.actions().unwrap().is_empty());
        }
    }
}
