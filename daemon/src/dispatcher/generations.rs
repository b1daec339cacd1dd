//! The agents' generations in files, one an agent: `generations/<agent>` holds its [`Ledger`] in one line.
//!
//! Everything here blocks. What must never happen: an agent told of a change that a crash could take back.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::generation::{Fenced, Generation, Ledger, Standing, decide};
use crate::ids::AgentId;
use crate::wire::key::write_private;

/// The directory's name in the data directory.
pub const DIR: &str = "generations";
const FILE_MAX_BYTES: u64 = 400;

/// See the module.
#[derive(Debug)]
pub struct Generations {
    dir: PathBuf,
    /// Held while an agent's file is read and replaced.
    turns: Mutex<HashMap<AgentId, Arc<Mutex<()>>>>,
}

impl Generations {
    /// Those of a data directory.
    ///
    /// # Errors
    /// When their directory cannot be made.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let dir = data_dir.join(DIR);
        match fs::create_dir(&dir) {
            Ok(()) => fs::File::open(data_dir)?.sync_all()?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", dir.display()))),
        }
        Ok(Self { dir, turns: Mutex::default() })
    }

    /// An agent says hello: may it go on, and what is it to hold then?
    ///
    /// # Errors
    /// When its file cannot be read or written. The agent then holds what it held.
    pub fn hello(
        &self,
        agent: &AgentId,
        shown: Option<Generation>,
    ) -> io::Result<Result<(Standing, Generation), Fenced>> {
        let mut token = [0; 16];
        getrandom::fill(&mut token).map_err(io::Error::other)?;
        self.change(agent, |ledger| match (decide(ledger, shown), shown) {
            (Ok(standing), _) => Ok((standing, ledger.offer(shown, token))),
            (Err(fenced), shown) => {
                shown.into_iter().for_each(|shown| ledger.refuse(shown));
                Err(fenced)
            }
        })
    }

    /// An agent says that it holds a generation; false if it was not offered that one.
    ///
    /// # Errors
    /// As [`Self::hello`].
    pub fn confirm(&self, agent: &AgentId, held: Generation) -> io::Result<bool> {
        self.change(agent, |ledger| ledger.confirm(held))
    }

    /// A person takes the machine that was refused last for the right one; `None` if none was.
    ///
    /// # Errors
    /// As [`Self::hello`].
    pub fn accept(&self, agent: &AgentId) -> io::Result<Option<Generation>> {
        self.change(agent, Ledger::accept)
    }

    fn change<T>(&self, agent: &AgentId, change: impl FnOnce(&mut Ledger) -> T) -> io::Result<T> {
        let turn = self
            .turns
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(agent.clone())
            .or_default()
            .clone();
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.dir.join(agent.as_str());
        let changed = || {
            let before = read(&path)?;
            let mut ledger = before;
            let result = change(&mut ledger);
            if ledger != before {
                write_private(&path, format!("{ledger}\n").as_bytes())?;
            }
            Ok(result)
        };
        changed().map_err(|e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
    }
}

fn read(path: &Path) -> io::Result<Ledger> {
    let file = match fs::File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Ledger::default()),
        file => file?,
    };
    let mut text = String::new();
    file.take(FILE_MAX_BYTES).read_to_string(&mut text)?;
    text.strip_suffix('\n').unwrap_or(&text).parse().map_err(|e| {
        let advice = "remove the file: then whichever machine connects first under this name goes on";
        io::Error::new(io::ErrorKind::InvalidData, format!("{e}; {advice}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_refused_until_it_is_accepted_also_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let (web1, web10) = ("web1".parse().unwrap(), "web10".parse().unwrap());
        let open = || Generations::open(dir.path()).unwrap();
        let (standing, first) = open().hello(&web1, None).unwrap().unwrap();
        assert_eq!(standing, Standing::First);
        assert!(!open().confirm(&web10, first).unwrap(), "another agent's");
        assert!(open().confirm(&web1, first).unwrap());
        let (standing, second) = open().hello(&web1, Some(first)).unwrap().unwrap();
        assert_eq!((standing, second.number), (Standing::Known, 2));
        assert!(second.token != first.token && open().confirm(&web1, second).unwrap());
        assert_eq!(open().accept(&web1).unwrap(), None);
        assert_eq!(open().hello(&web1, Some(first)).unwrap(), Err(Fenced::Old { shown: 1, highest: 2 }));
        assert_eq!(open().accept(&web1).unwrap(), Some(first));
        assert!(open().hello(&web1, Some(second)).unwrap().is_err());
        assert!(open().hello(&web1, Some(first)).unwrap().is_ok());
        assert_eq!(open().hello(&web10, None).unwrap().unwrap().0, Standing::First);
    }

    #[test]
    fn a_damaged_file_lets_nobody_in_and_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let web1 = "web1".parse().unwrap();
        let generations = Generations::open(dir.path()).unwrap();
        fs::write(dir.path().join("generations/web1"), "3 - -\n").unwrap();
        let error = generations.hello(&web1, None).unwrap_err().to_string();
        assert!(error.contains("generations/web1") && error.contains("remove the file"), "{error}");
        assert!(generations.hello(&"web2".parse().unwrap(), None).unwrap().is_ok());
    }
}
