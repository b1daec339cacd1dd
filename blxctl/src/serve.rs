//! Showing a checkpoint: `mount`, `umount` and `export`. What is mounted or listened on is opened here, with the rights of
//! whoever calls; the dispatcher serves it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use blxrep_dbus::ACTION_RESTORE;
use blxrep_dbus::proxy::Options;
use blxrep_dbus::words::{JobResult, JobType};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount as mount_fs, umount2};
use nix::sys::stat::{Mode, umask};
use serde_json::{Value, json};
use zbus::wire::OwnedObjectPath;

use crate::cli::{Address, Shown, Wait};
use crate::commands::disk_option;
use crate::connect::Daemon;
use crate::failure::Failure;
use crate::job::{self, Plan, Stop};
use crate::model::{Named, text, texts};
use crate::output::show;
use crate::target::absolute;

/// The kind of file system that a mount shows up as.
const FS_TYPE: &str = "fuse.blxrep";

/// A mount that goes away again unless it is kept.
struct Mounted<'a> {
    dir: &'a Path,
    kept: bool,
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let _ = umount2(self.dir, MntFlags::MNT_DETACH);
        }
    }
}

/// Shows a checkpoint as files.
pub(crate) async fn mount(daemon: &Daemon, shown: Shown, dir: &Path, json: bool) -> Result<(), Failure> {
    let failed = |what: &str| Failure::failed(format!("{}: {what}", dir.display()));
    let dir = dir.canonicalize().map_err(|e| failed(&e.to_string()))?;
    let (dir, name) = absolute(&dir)?;
    let mut entries = dir.read_dir().map_err(|e| failed(&e.to_string()))?;
    if entries.next().is_some() {
        return Err(Failure::usage(format!(
            "{name} is not empty: name an empty directory, where nothing is mounted"
        )));
    }
    let agent = daemon.agent(Some(shown.agent)).await?;
    let manager = daemon.manager().await?;
    let fuse = attach(&dir)?;
    let mut mounted = Mounted { dir: &dir, kept: false };
    let options = options(shown.disk, &name);
    let begun = manager.mount(&agent, &shown.checkpoint, fuse.into(), options).await;
    let (job, details) = begun.map_err(|e| Failure::of_call(&e, ACTION_RESTORE))?;
    mounted.kept = true;
    let begun = Begun { agent, job, details, target: name };
    begun.warn();
    show(json, || begun.json(None), || begun.text("mounted on", &begun.target, "until 'blxctl umount'"))
}

fn options(disk: Option<String>, target: &str) -> Options<'static> {
    let mut options = disk_option(disk);
    options.insert("target", target.to_owned().into());
    options
}

/// Mounts a `/dev/fuse` that nobody serves yet.
fn attach(dir: &Path) -> Result<OwnedFd, Failure> {
    use std::os::fd::AsRawFd;
    let refused = |what: &str, e: std::io::Error| {
        let hint = match e.kind() {
            ErrorKind::PermissionDenied => ": run it as root, or use 'blxctl export'",
            ErrorKind::NotFound => ": load the kernel module fuse",
            _ => "",
        };
        Failure::failed(format!("{what}: {e}{hint}"))
    };
    let fuse =
        File::options().read(true).write(true).open("/dev/fuse").map_err(|e| refused("/dev/fuse", e))?;
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let done = mount_fs(Some("blxrep"), dir, Some(FS_TYPE), flags, Some(&*data));
    done.map_err(|e| refused(&format!("{}: cannot mount", dir.display()), e.into()))?;
    Ok(fuse.into())
}

/// Unmounts what [`mount`] mounted, and nothing else.
pub(crate) fn umount(dir: &Path, json: bool) -> Result<(), Failure> {
    // As it was mounted. One that nobody serves any more cannot be looked at.
    let dir = dir.canonicalize().or_else(|_| std::path::absolute(dir));
    let dir = dir.map_err(|e| Failure::failed(e.to_string()))?;
    let name = dir.display().to_string();
    let table = fs::read_to_string("/proc/self/mounts");
    let table = table.map_err(|e| Failure::failed(format!("/proc/self/mounts: {e}")))?;
    if !is_ours(&table, &dir) {
        return Err(Failure::usage(format!(
            "{name}: no checkpoint is mounted there: see 'findmnt -t {FS_TYPE}'"
        )));
    }
    umount2(&dir, MntFlags::empty()).map_err(|e| match e {
        Errno::EBUSY => {
            Failure::failed(format!("{name} is in use: unmount what is mounted of it, and end what reads it"))
        }
        Errno::EPERM => Failure::failed(format!("{name}: run it as root")),
        e => Failure::failed(format!("{name}: cannot unmount: {}", e.desc())),
    })?;
    show(json, || json!({ "umounted": name }), || format!("{name} is unmounted\n"))
}

/// Whether a table of mounts says that the topmost one at `dir` is a checkpoint's.
fn is_ours(table: &str, dir: &Path) -> bool {
    let wanted = |line: &&str| line.split(' ').nth(1).is_some_and(|at| Path::new(&unescape(at)) == dir);
    let kind = table.lines().rfind(wanted).and_then(|line| line.split(' ').nth(2));
    kind == Some(FS_TYPE)
}

/// A name of a table of mounts: blanks, tabs, line ends and backslashes are octal there.
fn unescape(name: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(name.to_owned(), |name, (code, plain)| name.replace(code, plain))
}

/// A unix socket's file, removed when it is not needed any more.
struct SocketFile(Option<PathBuf>);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// Shows a checkpoint as a network block device.
pub(crate) async fn export(
    daemon: &Daemon,
    shown: Shown,
    address: &Address,
    writable: bool,
    wait: &Wait,
    json: bool,
) -> Result<(), Failure> {
    let agent = daemon.agent(Some(shown.agent)).await?;
    let manager = daemon.manager().await?;
    let stop = Stop::new()?;
    let overlay =
        if writable {
            let made = tempfile::tempfile_in("/var/tmp");
            Some(made.map_err(|e| {
                Failure::failed(format!("/var/tmp: cannot make a file for what is written: {e}"))
            })?)
        } else {
            None
        };
    let (listener, target, uri) = listen(address)?;
    let mut file = SocketFile(address.socket.clone());
    let mut options = options(shown.disk, &target);
    options.extend(overlay.map(|file| ("overlay", zbus::wire::Variant::Fd(OwnedFd::from(file).into()))));
    let begin = async {
        let (job, details) = manager.export(&agent, &shown.checkpoint, listener.into(), options).await?;
        let begun = Begun { agent: agent.clone(), job: job.clone(), details, target };
        begun.warn();
        Ok((begun, job))
    };
    let tell = |begun: &Begun, until: &str| {
        show(json, || begun.json(Some(&uri)), || begun.text("exported as", &uri, until))
    };
    if wait.no_wait {
        let (begun, _) = begin.await.map_err(|e: zbus::Error| Failure::of_call(&e, ACTION_RESTORE))?;
        file.0 = None;
        return tell(&begun, "until 'blxctl cancel'");
    }
    let told = async {
        let (begun, job) = begin.await?;
        // Nobody may read any more what is only told for people.
        let _ = tell(&begun, "until Ctrl-C");
        Ok(job)
    };
    // There is no end to be ahead of: no progress bar.
    let plan = Plan { job_type: JobType::Export, agent: &agent, action: ACTION_RESTORE, json: true };
    let ended = job::run(daemon, &plan, told, stop).await?;
    // That is how it ends.
    let canceled = ended.result == JobResult::Canceled.as_str();
    ended.failure(ACTION_RESTORE).filter(|_| !canceled).map_or(Ok(()), Err)
}

/// A socket that listens, its name, and its URI. A unix socket is only for whoever calls.
fn listen(address: &Address) -> Result<(OwnedFd, String, String), Failure> {
    if let Some(path) = &address.socket {
        let (path, name) = absolute(path)?;
        let mask = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(&path);
        umask(mask);
        let listener = bound.map_err(|e| match e.kind() {
            ErrorKind::AddrInUse => Failure::usage(format!(
                "{name} is there already: remove it if nobody serves it, or name another one"
            )),
            _ => Failure::failed(format!("{name}: cannot listen: {e}")),
        })?;
        let uri = format!("nbd+unix:///?socket={name}");
        return Ok((listener.into(), name, uri));
    }
    let Some(tcp) = address.tcp else { return Err(Failure::usage("neither --socket nor --tcp")) };
    let listener =
        TcpListener::bind(tcp).map_err(|e| Failure::failed(format!("{tcp}: cannot listen: {e}")))?;
    let name = listener.local_addr().unwrap_or(tcp).to_string();
    let uri = format!("nbd://{name}");
    Ok((listener.into(), name, uri))
}

/// A job that shows a checkpoint, and what it shows.
struct Begun {
    agent: String,
    job: OwnedObjectPath,
    details: Named,
    target: String,
}

impl Begun {
    /// For standard error: what a person should know.
    fn warn(&self) {
        let class = text(&self.details, "consistency");
        if class == "crash" || class == "fuzzy" {
            eprintln!(
                "warning: this checkpoint is {class}: its file systems' journals may have to be replayed, see --help"
            );
        }
        for warning in texts(&self.details, "warnings") {
            eprintln!("warning: {warning}");
        }
        let note = text(&self.details, "note");
        if !note.is_empty() {
            eprintln!("note: {note}");
        }
    }

    fn text(&self, how: &str, place: &str, until: &str) -> String {
        let (checkpoint, disk) = (text(&self.details, "checkpoint"), text(&self.details, "disk"));
        let agent = &self.agent;
        format!("checkpoint {checkpoint} of {agent}'s {disk} is {how} {place} {until}\n")
    }

    fn json(&self, uri: Option<&str>) -> Value {
        let mut value = json!({
            "job": job::number(&self.job),
            "agent": self.agent,
            "disk": text(&self.details, "disk"),
            "checkpoint": text(&self.details, "checkpoint"),
            "consistency": text(&self.details, "consistency"),
            "note": text(&self.details, "note"),
            "warnings": texts(&self.details, "warnings"),
            "target": self.target,
        });
        if let (Some(object), Some(uri)) = (value.as_object_mut(), uri) {
            object.insert("uri".into(), uri.into());
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_topmost_mount_of_a_directory_counts() {
        let table = "blxrep /mnt/a fuse.blxrep ro 0 0\n/dev/sda1 / ext4 rw 0 0\n\
                     blxrep /mnt/b\\040c fuse.blxrep ro 0 0\nblxrep /mnt/d fuse.blxrep ro 0 0\ntmpfs /mnt/d tmpfs rw 0 0\n";
        for (dir, ours) in
            [("/mnt/a", true), ("/", false), ("/mnt/b c", true), ("/mnt/d", false), ("/mnt", false)]
        {
            assert_eq!(is_ours(table, Path::new(dir)), ours, "{dir}");
        }
    }

    #[test]
    fn nothing_else_is_unmounted_and_no_file_taken_for_a_socket() {
        assert!(umount(Path::new("/"), false).unwrap_err().message.contains("no checkpoint is mounted"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("there");
        fs::write(&path, "x").unwrap();
        let address = Address { socket: Some(path.clone()), tcp: None };
        assert!(listen(&address).unwrap_err().message.contains("there already"));
        assert_eq!(fs::read(path).unwrap(), b"x");
    }
}
