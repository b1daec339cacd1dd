//! The generation this agent holds: a file in its state directory. It waits while another thread freezes, as the
//! directory may lie on what is frozen.
//!
//! What must never happen here: a generation shown that a crash could take back, or that an older write could replace.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;
use tracing::warn;

use crate::freeze::alone::Alone;
use crate::generation::Generation;
use crate::ids::AgentId;
use crate::wire::key::write_with_mode;

const FILE_MAX_BYTES: u64 = 100;
/// A freeze is over long before.
const PATIENCE: Duration = Duration::from_secs(60);

/// See the module.
pub struct Held {
    file: HeldFile,
    writing: JoinSet<io::Result<Generation>>,
}

impl Held {
    /// What an agent holds.
    pub fn new(state_dir: &Path, agent: &AgentId) -> Self {
        let file = HeldFile { path: state_dir.join(format!("{agent}.generation")) };
        Self { file, writing: JoinSet::new() }
    }

    /// What the agent holds durably; `None` where there is no file. Waits for a write of an earlier session first.
    ///
    /// # Errors
    /// When the file cannot be read, is not understood or cannot be made durable.
    pub async fn load(&mut self) -> io::Result<Option<Generation>> {
        let (file, writing) = (self.file.clone(), &mut self.writing);
        let loading = async {
            while writing.join_next().await.is_some() {}
            spawn_blocking(move || file.load()).await.map_err(io::Error::other)?
        };
        tokio::pin!(loading);
        loop {
            match timeout(PATIENCE, &mut loading).await {
                Ok(loaded) => return loaded,
                Err(_) => {
                    warn!("{}: the file system does not answer: not connecting", self.file.path.display())
                }
            }
        }
    }

    /// Begins to keep what the agent was offered.
    pub fn keep(&mut self, generation: Generation) {
        let file = self.file.clone();
        self.writing.spawn_blocking(move || file.keep(generation).map(|()| generation));
    }

    /// Waits for that; `None` if nothing was begun. After an error only [`Self::load`] can say what is held.
    pub async fn kept(&mut self) -> Option<io::Result<Generation>> {
        Some(self.writing.join_next().await?.unwrap_or_else(|fault| Err(io::Error::other(fault))))
    }
}

#[derive(Debug, Clone)]
struct HeldFile {
    path: PathBuf,
}

impl HeldFile {
    fn load(&self) -> io::Result<Option<Generation>> {
        let _alone = Alone::take();
        self.read().map_err(|e| self.named(&e))
    }

    fn keep(&self, generation: Generation) -> io::Result<()> {
        let _alone = Alone::take();
        write_with_mode(&self.path, format!("{generation}\n").as_bytes(), 0o600).map_err(|e| self.named(&e))
    }

    fn read(&self) -> io::Result<Option<Generation>> {
        let file = match File::open(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut text = String::new();
        (&file).take(FILE_MAX_BYTES).read_to_string(&mut text)?;
        let generation = text.strip_suffix('\n').unwrap_or(&text).parse().map_err(|e| {
            let advice = "remove the file: the dispatcher then takes this agent for a reinstalled one";
            io::Error::new(io::ErrorKind::InvalidData, format!("{e}; {advice}"))
        })?;
        // Whoever wrote it may have been killed before it was durable.
        file.sync_all()?;
        File::open(self.path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        Ok(Some(generation))
    }

    fn named(&self, error: &io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("{}: {error}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn what_is_kept_is_held_and_nobody_else_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut held = Held::new(dir.path(), &"web1".parse().unwrap());
        assert_eq!(held.load().await.unwrap(), None);
        for number in [1, 2] {
            let generation = Generation { number, token: [9; 16] };
            held.keep(generation);
            assert_eq!(held.kept().await.unwrap().unwrap(), generation);
            assert_eq!(held.load().await.unwrap(), Some(generation));
        }
        let path = dir.path().join("web1.generation");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        for damaged in ["", "2", "2:x\n", "0:09090909090909090909090909090909\n"] {
            std::fs::write(&path, damaged).unwrap();
            let error = held.load().await.unwrap_err().to_string();
            assert!(error.contains("web1.generation") && error.contains("remove the file"), "{error}");
        }
    }

    /// Else the next session would show what that write is about to replace.
    #[tokio::test]
    async fn the_write_of_a_session_that_broke_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let mut held = Held::new(dir.path(), &"web1".parse().unwrap());
        let (frozen, is_frozen) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let _alone = Alone::take();
            frozen.send(()).unwrap();
            std::thread::sleep(Duration::from_millis(100));
        });
        is_frozen.recv().unwrap();
        let generation = Generation { number: 7, token: [9; 16] };
        held.keep(generation);
        assert_eq!(held.load().await.unwrap(), Some(generation));
        assert!(held.kept().await.is_none(), "no write is left that could land later");
    }
}
