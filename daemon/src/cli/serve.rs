//! `blxrep dispatcher mount` and `export`: a checkpoint of a data directory, shown until Ctrl-C.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use blxrep::checkpoint::{Checkpoint, Consistency};
use blxrep::restore::{Opened, open};
use blxrep::serve::export::{Listener, serve};
use blxrep::serve::image::Image;
use blxrep::serve::mount::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, umask};

use super::signals::on_signal;

fn find(checkpoint: &super::Checkpoint) -> anyhow::Result<Opened> {
    super::log::init();
    let super::Checkpoint { checkpoint, agent, data_dir, disk } = checkpoint;
    Ok(open(data_dir, agent, disk.as_deref(), checkpoint)?)
}

/// What a person should know of a checkpoint that is shown.
fn warn(checkpoint: &Checkpoint) {
    match checkpoint.consistency {
        Consistency::Application | Consistency::Filesystem => {}
        class => eprintln!(
            "warning: this checkpoint is {class}: its file systems' journals may have to be replayed. Mount them with \
             -o ro,noload (ext4) or -o ro,norecovery (xfs), or use export --writable"
        ),
    }
    if !checkpoint.note.is_empty() {
        eprintln!("note: {}", checkpoint.note);
    }
}

fn name(checkpoint: &Checkpoint) -> String {
    format!("checkpoint {} of {}'s {}", checkpoint.id, checkpoint.agent, checkpoint.disk)
}

/// Mounts a checkpoint until it is unmounted.
pub(crate) fn mount(args: &super::Mount) -> anyhow::Result<()> {
    let dir = args.dir.canonicalize().with_context(|| args.dir.display().to_string())?;
    let mut entries = dir.read_dir().with_context(|| dir.display().to_string())?;
    if entries.next().is_some() {
        bail!("{}: not empty: name an empty directory, where nothing is mounted", dir.display());
    }
    let image = Image::read_only(find(&args.checkpoint)?);
    let checkpoint = image.checkpoint().clone();
    let at = dir.clone();
    on_signal(move || umount(&at))?;
    let mount = Mount::at(&dir, image).with_context(|| format!("{}: cannot mount", dir.display()))?;
    mount.warnings().iter().for_each(|warning| eprintln!("warning: {warning}"));
    warn(&checkpoint);
    println!("{} is mounted on {} until Ctrl-C or umount", name(&checkpoint), dir.display());
    mount.serve(&|| false).with_context(|| dir.display().to_string())
}

/// Unmounts, as root or through fusermount3; says what is in the way.
fn umount(dir: &Path) {
    let done = match umount2(dir, MntFlags::empty()) {
        Err(Errno::EPERM) => {
            Command::new("fusermount3").arg("-u").arg("--").arg(dir).status().is_ok_and(|s| s.success())
        }
        Err(Errno::EBUSY) => false,
        _ => true,
    };
    if !done {
        eprintln!(
            "{} is in use: unmount what is mounted of it, end what reads it, and press Ctrl-C again",
            dir.display()
        );
    }
}

/// Exports a checkpoint until Ctrl-C.
pub(crate) fn export(args: &super::Export) -> anyhow::Result<()> {
    let opened = find(&args.checkpoint)?;
    let image = if args.writable {
        let file =
            tempfile::tempfile_in("/var/tmp").context("/var/tmp: cannot make a file for what is written")?;
        Image::writable(opened, file).context("the temporary file")?
    } else {
        Image::read_only(opened)
    };
    let ended = Arc::new(AtomicBool::new(false));
    let seen = ended.clone();
    on_signal(move || seen.store(true, Ordering::Relaxed))?;
    let (socket, place) = listen(args)?;
    let uri = match &args.address.socket {
        Some(path) => format!("nbd+unix:///?socket={}", path.display()),
        None => format!("nbd://{place}"),
    };
    warn(image.checkpoint());
    println!("{} is exported as {uri} until Ctrl-C", name(image.checkpoint()));
    let served = serve(&Listener::new(socket)?, &image, &|| ended.load(Ordering::Relaxed));
    if let Some(path) = &args.address.socket {
        std::fs::remove_file(path).with_context(|| path.display().to_string())?;
    }
    served.context(place)
}

/// A socket that listens, and where. A unix socket is only for this user.
fn listen(args: &super::Export) -> anyhow::Result<(OwnedFd, String)> {
    if let Some(path) = &args.address.socket {
        let mask = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        umask(mask);
        let hint = |e: &std::io::Error| match e.kind() {
            ErrorKind::AddrInUse => {
                ": it is there already: remove it if nobody serves it, or name another one"
            }
            _ => "",
        };
        let listener =
            bound.map_err(|e| anyhow::anyhow!("{}: cannot listen: {e}{}", path.display(), hint(&e)))?;
        return Ok((listener.into(), path.display().to_string()));
    }
    let Some(address) = args.address.tcp else { bail!("neither --socket nor --tcp") };
    let listener = TcpListener::bind(address).with_context(|| format!("{address}: cannot listen"))?;
    let place = listener.local_addr()?.to_string();
    Ok((listener.into(), place))
}
