//! `blxctl restore --format qcow2`: `qemu-img` reads an export that only the caller reaches, and writes the image with the
//! caller's rights, and compares the two when it has. The export checks every block it gives.
//!
//! What must never happen here: a part that looks like a whole image; a file or a `qemu-img` that outlives the command.

use std::ffi::OsStr;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Stdio;

use blxrep_dbus::ACTION_INSPECT;
use blxrep_dbus::words::{JobResult, JobType, Role};
use serde_json::json;
use tokio::process::Command;
use zbus::wire::{OwnedVariant, Variant};

use crate::cli::Which;
use crate::commands::disk_option;
use crate::connect::Daemon;
use crate::ended::Ended;
use crate::exports::{Export, Exports, cannot};
use crate::failure::Failure;
use crate::job::Stop;
use crate::model::{Checkpoint, Named};
use crate::target::{self, Target};

/// The program, looked for in PATH.
const PROGRAM: &str = "qemu-img";

/// Makes a qcow2 image of a checkpoint. Gives what is told of it, as of a restore.
pub(crate) async fn restore(
    daemon: &Daemon,
    which: Which,
    path: &Path,
    json: bool,
) -> Result<Ended, Failure> {
    if daemon.role == Role::Agent {
        return Err(Failure::usage("a qcow2 image is made on the dispatcher: restore as raw here"));
    }
    let (path, name) = target::absolute(path)?;
    if target::is_device(&path)? {
        return Err(Failure::usage(format!("{name} is a device, and a qcow2 image is a file")));
    }
    let agent = daemon.agent(which.agent.clone()).await?;
    // From here on a signal must not leave a hidden file.
    let mut stop = Stop::new()?;
    let target = Target::open(&path)?;
    let mut exports = Exports::new(daemon)?;
    let made = async {
        let export = exports.add(&agent, &which.checkpoint, which.disk.as_deref(), None).await?;
        let row = row(daemon, &agent, &export).await?;
        let (source, image) = (source(&export.socket), target.written());
        let [source, image, qcow2] = [source.as_ref(), image.as_os_str(), OsStr::new("qcow2")];
        let convert = ["convert", "-O"].map(OsStr::new);
        qemu_img(&[&convert, &[qcow2, source, image][..]].concat(), json, &mut stop).await?;
        let compare = ["compare", "-q", "-F"].map(OsStr::new);
        qemu_img(&[&compare, &[qcow2, source, image][..]].concat(), json, &mut stop).await?;
        Ok::<_, Failure>((export.job, row))
    }
    .await;
    exports.close().await;
    let (job, row) = made?;
    target.finish()?;
    Ok(ended(job, &agent, &row, &name))
}

/// Runs qemu-img to its end, or to that of this command.
async fn qemu_img(arguments: &[&OsStr], json: bool, stop: &mut Stop) -> Result<(), Failure> {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null());
    // How far it is goes where people look, and not among what is told.
    let shown = io::stderr().as_fd().try_clone_to_owned().map_err(|e| cannot("use standard error", &e))?;
    command.stdout(shown).args((!json && io::stderr().is_terminal()).then_some("-p"));
    // In a group of its own: Ctrl-C is for this command, which ends it.
    let mut running = command.process_group(0).kill_on_drop(true).spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Failure::failed(format!(
            "there is no {PROGRAM} in PATH: install it (Debian and Ubuntu: qemu-utils, Fedora: qemu-img), or restore as raw"
        )),
        _ => cannot(&format!("start {PROGRAM}"), &e),
    })?;
    let status = tokio::select! {
        status = running.wait() => status.map_err(|e| cannot(&format!("wait for {PROGRAM}"), &e))?,
        () = stop.asked() => {
            running.kill().await.map_err(|e| cannot(&format!("end {PROGRAM}"), &e))?;
            return Err(Failure::failed("canceled"));
        }
    };
    if status.success() {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{PROGRAM} broke off ({status}); what it says is above. If it could not read, look for damage by 'blxctl verify'"
    )))
}

/// The export in QEMU's words. As JSON, where a name is only a name.
fn source(socket: &Path) -> String {
    let server = json!({ "type": "unix", "path": socket.to_string_lossy() });
    format!("json:{}", json!({ "driver": "raw", "file": { "driver": "nbd", "server": server } }))
}

/// What the dispatcher says of the checkpoint.
async fn row(daemon: &Daemon, agent: &str, export: &Export) -> Result<Checkpoint, Failure> {
    let Export { disk, checkpoint, .. } = export;
    let rows = daemon.manager().await?.show(agent, disk_option(Some(disk.clone()))).await;
    let rows = rows.map_err(|e| Failure::of_call(&e, ACTION_INSPECT))?;
    let row = rows.iter().map(Checkpoint::new).find(|row| row.checkpoint == *checkpoint);
    row.ok_or_else(|| Failure::failed(format!("checkpoint {checkpoint} of {disk} went away meanwhile")))
}

/// As a job tells it that restores.
fn ended(id: u32, agent: &str, row: &Checkpoint, output: &str) -> Ended {
    let text = |text: &str| Variant::from(text.to_owned());
    let details = [
        ("checkpoint", text(&row.checkpoint)),
        ("disk", text(&row.disk)),
        ("consistency", text(&row.consistency)),
        ("note", text(&row.note)),
        ("output", text(output)),
        ("size_bytes", row.size_bytes.into()),
        ("unreadable_blocks", row.unreadable_blocks.into()),
    ];
    // Only a file could fail to become owned, and there is none.
    let owned = |(key, value)| Some((str::to_owned(key), OwnedVariant::try_from(value).ok()?));
    let details: Named = details.into_iter().filter_map(owned).collect();
    let (job_type, result) = (JobType::Restore, JobResult::Done.as_str().to_owned());
    Ended { id, job_type, agent: agent.to_owned(), result, details }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_may_have_any_name() {
        let source = source(Path::new("/tmp/a,b?\"c/0.sock"));
        insta::assert_snapshot!(source, @r#"json:{"driver":"raw","file":{"driver":"nbd","server":{"path":"/tmp/a,b?\"c/0.sock","type":"unix"}}}"#);
    }
}
