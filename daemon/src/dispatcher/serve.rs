//! Jobs that show a checkpoint: mounts and exports, by what the caller opened.

use std::io::{self, ErrorKind};

use blxrep_dbus::problem::{Problem, ProblemKind};

use crate::bus::control::{About, By, Details, Failure, Planned, Progress, Work};
use crate::bus::outcome::{canceled, value};
use crate::checkpoint::Checkpoint;
use crate::restore::Opened;
use crate::serve::export::{self, Listener};
use crate::serve::image::Image;
use crate::serve::mount::Mount;

/// Plans to show a checkpoint until that is canceled or unmounted; a mount answers the kernel from here on. Gives also
/// what is shown.
pub(super) fn plan(opened: Opened, target: String, by: By) -> Result<(Planned, Details), Problem> {
    let Checkpoint { agent, disk, id, consistency, note, .. } = opened.checkpoint.clone();
    let (work, warnings): (Work, Vec<String>) = match by {
        By::Mount(fuse) => {
            let mount = Mount::of(fuse, Image::read_only(opened)).map_err(|e| failed("the mount", &e))?;
            let warnings = mount.warnings().to_vec();
            (Box::new(move |progress| ended("the mount", mount.serve(&|| progress.is_canceled()))), warnings)
        }
        By::Export(listener, overlay) => {
            let listener = Listener::new(listener).map_err(|e| failed("the listener", &e))?;
            let image = match overlay {
                Some(file) => Image::writable(opened, file).map_err(|e| failed("the overlay", &e))?,
                None => Image::read_only(opened),
            };
            let work = move |progress: &Progress| {
                let is_canceled = || progress.is_canceled();
                let served = export::serve(&listener, &image, &is_canceled);
                ended("the export", served.and_then(|()| Err(ErrorKind::Interrupted.into())))
            };
            (Box::new(work), Vec::new())
        }
    };
    let shown = Details::from([
        ("checkpoint".to_owned(), value(id.to_string())),
        ("disk".to_owned(), value(disk.to_string())),
        ("consistency".to_owned(), value(consistency.to_string())),
        ("note".to_owned(), value(note)),
        ("warnings".to_owned(), value(warnings)),
    ]);
    let about =
        About { agent: agent.to_string(), disk: disk.to_string(), checkpoint: id.to_string(), target };
    Ok((Planned { about, work }, shown))
}

fn failed(what: &str, error: &io::Error) -> Problem {
    let kind = match error.kind() {
        ErrorKind::InvalidInput => ProblemKind::InvalidArgument,
        _ => ProblemKind::Failed,
    };
    Problem::new(kind, format!("{what}: {error}"))
}

/// How it ended, as its job tells it.
fn ended(what: &str, served: io::Result<()>) -> Result<Details, Failure> {
    match served {
        Ok(()) => Ok(Details::new()),
        Err(e) if e.kind() == ErrorKind::Interrupted => Err(canceled().into()),
        Err(e) => Err(failed(what, &e).into()),
    }
}
