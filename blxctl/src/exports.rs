//! Exports for a program that is started here: on sockets that only the caller reaches.
//!
//! What must never happen here: an export that outlives the command, however that ends. (After SIGKILL, 'blxctl cancel' ends it.)

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use blxrep_dbus::ACTION_RESTORE;
use blxrep_dbus::proxy::Options;
use tempfile::TempDir;
use zbus::wire::{Fd, OwnedObjectPath};

use crate::connect::Daemon;
use crate::failure::Failure;
use crate::job;
use crate::model::{Named, text};

/// Exports until [`Self::close`].
pub(crate) struct Exports<'a> {
    daemon: &'a Daemon,
    dir: TempDir,
    jobs: Vec<OwnedObjectPath>,
}

/// One of them.
pub(crate) struct Export {
    /// Where it is served.
    pub(crate) socket: PathBuf,
    /// The disk's id.
    pub(crate) disk: String,
    /// The checkpoint's.
    pub(crate) checkpoint: String,
    /// The number of its job; 0 if the dispatcher calls it something else.
    pub(crate) job: u32,
}

impl<'a> Exports<'a> {
    /// None yet.
    pub(crate) fn new(daemon: &'a Daemon) -> Result<Self, Failure> {
        let dir = tempfile::Builder::new().prefix("blxctl-").tempdir();
        let dir = dir.map_err(|e| cannot("make a directory", &e))?;
        Ok(Self { daemon, dir, jobs: Vec::new() })
    }

    /// One more, read-only or with a file for what is written.
    pub(crate) async fn add(
        &mut self,
        agent: &str,
        checkpoint: &str,
        disk: Option<&str>,
        overlay: Option<File>,
    ) -> Result<Export, Failure> {
        let socket = self.dir.path().join(format!("{}.sock", self.jobs.len()));
        let listener = UnixListener::bind(&socket).map_err(|e| cannot("make a socket", &e))?;
        let target = socket.display().to_string();
        let mut options = Options::from([("target", target.as_str().into())]);
        options.extend(overlay.as_ref().map(|file| ("overlay", Fd::from(file.as_fd()).into())));
        options.extend(disk.map(|disk| ("disk", disk.into())));
        let manager = self.daemon.manager().await?;
        let begun = manager.export(agent, checkpoint, Fd::from(listener.as_fd()), options).await;
        let (job, shown): (_, Named) = begun.map_err(|e| Failure::of_call(&e, ACTION_RESTORE))?;
        let number = job::number(&job).unwrap_or(0);
        self.jobs.push(job);
        Ok(Export { socket, disk: text(&shown, "disk"), checkpoint: text(&shown, "checkpoint"), job: number })
    }

    /// Ends them.
    pub(crate) async fn close(self) {
        for job in self.jobs {
            if let Ok(job) = self.daemon.job(job.into()).await {
                // One that is gone has ended.
                let _ = job.cancel().await;
            }
        }
    }
}

/// That something of the system's did not work.
pub(crate) fn cannot(what: &str, error: &io::Error) -> Failure {
    Failure::failed(format!("cannot {what}: {error}"))
}
