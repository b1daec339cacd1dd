//! Starts a checkpoint in a virtual machine: for a person ([`run`]), or to prove that it starts ([`prove`]).
//!
//! The dispatcher exports the disks to sockets that only the caller reaches, and QEMU runs with the caller's rights. What the machine
//! writes goes to files that have no name. What must never happen here: a machine, an export or a file that outlives the
//! command, however that ends. (After SIGKILL, 'blxctl cancel' ends the export.)

pub(crate) mod console;
mod proof;
mod qemu;

use std::ffi::OsString;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use blxrep_dbus::proxy::Options;
use blxrep_dbus::{ACTION_CHECKPOINT, ACTION_INSPECT};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::time::{sleep_until, timeout};

use self::console::{Awaited, Console, Verdict};
use self::proof::Proof;
use self::qemu::{Drive, PROGRAM, Serial};
use crate::connect::Daemon;
use crate::exports::{Export, Exports, cannot};
use crate::failure::Failure;
use crate::job::Stop;
use crate::model::Checkpoint;

/// Where the files for what the machine writes are: they may get large.
const OVERLAYS: &str = "/var/tmp";
/// How long QEMU may take to end when it is asked to.
const END_MAX: Duration = Duration::from_secs(5);
/// How long is read on when it is known how a start ended: the next lines say more.
const READ_ON: Duration = Duration::from_secs(1);

/// Which checkpoint, and with what.
pub(crate) struct Request {
    pub(crate) agent: String,
    pub(crate) checkpoint: String,
    pub(crate) disk: Option<String>,
    /// QEMU's arguments behind the usual ones.
    pub(crate) qemu: Vec<OsString>,
}

/// What a proof waits for, and how long.
pub(crate) struct Wanted {
    pub(crate) awaited: Awaited,
    pub(crate) time: Duration,
}

/// A checkpoint, and those of the agent's other disks from before it, exported for a machine.
struct Exported<'a> {
    daemon: &'a Daemon,
    exports: Exports<'a>,
    drives: Vec<Drive>,
    /// The disk's id and its checkpoint.
    disk: String,
    checkpoint: String,
}

/// A running QEMU. One that is dropped is killed.
struct Machine(Child);

/// Starts a checkpoint, with its console on the terminal, until the machine ends.
pub(crate) async fn run(daemon: &Daemon, request: Request) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let exported = Exported::open(daemon, &request).await?;
    let ended = exported.for_a_person(&request, &mut stop).await;
    exported.exports.close().await;
    ended
}

/// Starts a checkpoint without anybody, waits for what is wanted, and has the dispatcher keep what came.
pub(crate) async fn prove(daemon: &Daemon, request: Request, wanted: Wanted) -> Result<Proof, Failure> {
    let mut stop = Stop::new()?;
    let exported = Exported::open(daemon, &request).await?;
    let came = exported.watch(&request, &wanted, &mut stop).await;
    let (agent, disk, checkpoint) = (request.agent, exported.disk.clone(), exported.checkpoint.clone());
    exported.exports.close().await;
    let (verdict, seconds, console) = came?;
    let proof = Proof { agent, disk, checkpoint, verdict, seconds, console };
    let options =
        Options::from([("disk", proof.disk.as_str().into()), ("console", proof.console.as_str().into())]);
    let manager = daemon.manager().await?;
    let kept = manager.record_boot(&proof.agent, &proof.checkpoint, proof.result().as_str(), options);
    kept.await.map_err(|e| Failure::of_call(&e, ACTION_CHECKPOINT))?;
    Ok(proof)
}

impl<'a> Exported<'a> {
    async fn open(daemon: &'a Daemon, request: &Request) -> Result<Self, Failure> {
        let (exports, drives) = (Exports::new(daemon)?, Vec::new());
        let mut exported = Self { daemon, exports, drives, disk: String::new(), checkpoint: String::new() };
        let all = exported.export_all(request).await;
        if let Err(failure) = all {
            exported.exports.close().await;
            return Err(failure);
        }
        Ok(exported)
    }

    async fn export_all(&mut self, request: &Request) -> Result<(), Failure> {
        (self.disk, self.checkpoint) =
            self.export(&request.agent, &request.checkpoint, request.disk.as_deref()).await?;
        let manager = self.daemon.manager().await?;
        let rows = manager.show(&request.agent, Options::new()).await;
        let rows = rows.map_err(|e| Failure::of_call(&e, ACTION_INSPECT))?;
        let rows: Vec<_> = rows.iter().map(Checkpoint::new).collect();
        for row in others(&rows, &self.disk, &self.checkpoint) {
            self.export(&request.agent, &row.checkpoint, Some(&row.disk)).await?;
        }
        for drive in &mut self.drives {
            let device = rows.iter().rev().find(|row| row.disk == drive.disk).map(|row| row.device.clone());
            drive.device = device.unwrap_or_default();
        }
        Ok(())
    }

    /// Has one more disk exported; gives its id and the checkpoint's.
    async fn export(
        &mut self,
        agent: &str,
        checkpoint: &str,
        disk: Option<&str>,
    ) -> Result<(String, String), Failure> {
        let overlay = tempfile::tempfile_in(OVERLAYS).map_err(|e| cannot("make a temporary file", &e))?;
        let Export { socket, disk, checkpoint, .. } =
            self.exports.add(agent, checkpoint, disk, Some(overlay)).await?;
        self.drives.push(Drive { socket, device: String::new(), disk: disk.clone() });
        Ok((disk, checkpoint))
    }

    fn start(&self, request: &Request, serial: Serial) -> Result<Machine, Failure> {
        let mut command = Command::new(PROGRAM);
        command.args(qemu::arguments(&self.drives, serial, &request.qemu)).kill_on_drop(true);
        if serial == Serial::Reader {
            command.stdin(Stdio::null()).stdout(Stdio::piped());
        }
        command.spawn().map(Machine).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Failure::failed(format!(
                "there is no {PROGRAM} in PATH: install QEMU (Debian and Ubuntu: qemu-system-x86, Fedora: qemu-system-x86-core)"
            )),
            _ => cannot(&format!("start {PROGRAM}"), &e),
        })
    }

    async fn for_a_person(&self, request: &Request, stop: &mut Stop) -> Result<(), Failure> {
        let (agent, disk, checkpoint) = (&request.agent, &self.disk, &self.checkpoint);
        let mut machine = self.start(request, Serial::Person)?;
        eprintln!(
            "blxctl: checkpoint {checkpoint} of {agent}'s {disk}, and what it writes is thrown away; Ctrl-A X ends it"
        );
        let status = tokio::select! {
            status = machine.0.wait() => status.map_err(|e| cannot("wait for the machine", &e))?,
            () = stop.asked() => return machine.end().await,
        };
        if status.success() { Ok(()) } else { Err(broke(status)) }
    }

    /// Reads the machine's console until it is known how its start ends. Gives that, the seconds it took, and the text.
    async fn watch(
        &self,
        request: &Request,
        wanted: &Wanted,
        stop: &mut Stop,
    ) -> Result<(Verdict, u64, String), Failure> {
        let mut machine = self.start(request, Serial::Reader)?;
        let mut output =
            machine.0.stdout.take().ok_or_else(|| Failure::failed("the machine has no console"))?;
        let mut console = Console::new(wanted.awaited);
        let began = Instant::now();
        let (mut end, mut took) = (began + wanted.time, None);
        let mut buffer = vec![0; 16 << 10];
        loop {
            tokio::select! {
                count = output.read(&mut buffer) => {
                    let count = count.map_err(|e| cannot("read the machine's console", &e))?;
                    console.read(buffer.get(..count).unwrap_or_default());
                    if count == 0 {
                        break;
                    }
                }
                () = sleep_until(end.into()) => break,
                () = stop.asked() => {
                    machine.end().await?;
                    return Err(Failure::failed("canceled: nothing is kept of this start"));
                }
            }
            if took.is_none() && console.verdict().is_some() {
                took = Some(began.elapsed());
                end = Instant::now() + READ_ON;
            }
        }
        // Where its console ended before the time, it has ended.
        let is_late = Instant::now() >= end;
        let status = if is_late { None } else { timeout(END_MAX, machine.0.wait()).await.ok() };
        let status = status.transpose().map_err(|e| cannot("wait for the machine", &e))?;
        machine.end().await?;
        let verdict = match (console.verdict(), status) {
            (Some(verdict), _) => verdict.clone(),
            // It says itself on standard error why.
            (None, Some(status)) if !status.success() => return Err(broke(status)),
            (None, Some(_)) => Verdict::Failed("the machine restarted or was switched off".to_owned()),
            (None, None) => Verdict::Failed(format!("{} s were over", wanted.time.as_secs())),
        };
        Ok((verdict, took.unwrap_or_else(|| began.elapsed()).as_secs(), console.into_text()))
    }
}

impl Machine {
    /// Ends it as if its power was cut. QEMU itself ends in order: it has set the terminal.
    async fn end(mut self) -> Result<(), Failure> {
        let pid = self.0.id().and_then(|id| i32::try_from(id).ok());
        if let Some(pid) = pid {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        match timeout(END_MAX, self.0.wait()).await {
            Ok(ended) => ended.map(drop),
            Err(_) => self.0.kill().await,
        }
        .map_err(|e| cannot("end the machine", &e))
    }
}

fn broke(status: ExitStatus) -> Failure {
    Failure::failed(format!("{PROGRAM} broke off: {status}; what it says is above"))
}

/// The newest checkpoint of each other disk that was not taken in a later second. Rows are oldest first.
fn others<'a>(rows: &'a [Checkpoint], disk: &str, checkpoint: &str) -> Vec<&'a Checkpoint> {
    let second = |id: &str| id.get(..14).map(str::to_owned);
    let mut found: Vec<&Checkpoint> = Vec::new();
    let fits = |row: &&Checkpoint| {
        row.disk != disk && row.consistency != "damaged" && second(&row.checkpoint) <= second(checkpoint)
    };
    for row in rows.iter().filter(fits) {
        found.retain(|other| other.disk != row.disk);
        found.push(row);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(disk: &str, checkpoint: &str, consistency: &str) -> Checkpoint {
        Checkpoint {
            disk: disk.into(),
            checkpoint: checkpoint.into(),
            consistency: consistency.into(),
            ..Checkpoint::default()
        }
    }

    #[test]
    fn the_other_disks_are_as_they_were_then() {
        let rows = [
            row("a", "20261121203456", "crash"),
            row("b", "20261121203400", "crash"),
            row("b", "20261121203456-2", "crash"),
            row("b", "20261121203457", "crash"),
            row("c", "20261121203500", "crash"),
            row("d", "20261121203400", "crash"),
            row("d", "20261121203410", "damaged"),
        ];
        let found = others(&rows, "a", "20261121203456");
        let found: Vec<_> = found.iter().map(|row| (&*row.disk, &*row.checkpoint)).collect();
        assert_eq!(found, [("b", "20261121203456-2"), ("d", "20261121203400")]);
    }
}
