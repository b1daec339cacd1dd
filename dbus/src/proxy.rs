//! Client proxies of the interfaces, and their documentation.
//!
//! The proxies have no default service: both daemons may run on one host. Options travel as `a{sv}`; a key that a
//! method does not have is refused as [`crate::problem::ProblemKind::UnknownOption`].

use std::collections::HashMap;

use zbus::wire::{Fd, OwnedObjectPath, OwnedVariant, Variant};

/// Options of a call.
pub type Options<'a> = HashMap<&'a str, Variant<'a>>;
/// Named values in an answer or a signal.
pub type Details = HashMap<String, OwnedVariant>;

/// What can be asked and ordered. `agent`: an agent's id; on an agent, its own id or nothing at all.
#[zbus::proxy(interface = "org.blxrep.Manager", default_path = "/org/blxrep/Manager")]
pub trait Manager {
    /// The checkpoints of an agent's disks, oldest first. Options: `disk` (s, id or device name), `start` and `end`
    /// (s, YYYYMMDDHHMM in UTC, both included).
    ///
    /// Each has `checkpoint` s, `agent` s, `disk` s, `device` s, `time` s (RFC 3339), `consistency` s, `size_bytes` t,
    /// `delta_bytes` t, `stored_bytes` t, `parent` s (empty for the base), `freeze_ms` u,
    /// `unreadable_blocks` u (blocks the agent's disk could not read: zeros), `note` s, `boot` s (what came of starting it in a
    /// virtual machine, see [`crate::words::BootResult`]; empty if nobody has) and `boot_time` s (RFC 3339).
    #[zbus(allow_interactive_auth)]
    fn show(&self, agent: &str, options: Options<'_>) -> zbus::Result<Vec<Details>>;

    /// Brings a checkpoint (an id, YYYYMMDDHHMM or `latest`) back into `target`: a new file, or a block device that is
    /// not in use. Options: `disk` (s), `partition` (u): only this partition of the disk, by its number, `output` (h): an open
    /// empty file or block device to write to, `target` being only its name then, and `overwrite` (s): `target` once more, without
    /// which a device that holds a file system or the like is refused. On an agent `agent` may be another one, if the dispatcher
    /// lets this one restore its disks.
    #[zbus(allow_interactive_auth)]
    fn restore(
        &self,
        agent: &str,
        checkpoint: &str,
        target: &str,
        options: Options<'_>,
    ) -> zbus::Result<OwnedObjectPath>;

    /// Stops sending of an agent's disks, or of one (option `disk`, s), until [`Self::resume`], also over restarts of
    /// both sides. Changes are tracked on. Gives the disks that were not paused on this side yet.
    #[zbus(allow_interactive_auth)]
    fn pause(&self, agent: &str, options: Options<'_>) -> zbus::Result<Vec<OwnedObjectPath>>;

    /// Ends what [`Self::pause`] on this side began. A disk is sent again when neither side pauses it. Gives the disks
    /// that were paused on this side.
    #[zbus(allow_interactive_auth)]
    fn resume(&self, agent: &str, options: Options<'_>) -> zbus::Result<Vec<OwnedObjectPath>>;

    /// Takes a checkpoint now, of all of an agent's disks or of one (option `disk`, s). With `compare` (b) the whole disk is
    /// compared with what is stored first. Canceling the job only ends the wait: what was ordered may still come.
    #[zbus(allow_interactive_auth)]
    fn sync(&self, agent: &str, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;

    /// Reads everything that a checkpoint rests on and checks it. With an empty `checkpoint`: that those of the option
    /// `checkpoints` (as) rest on, or all from `start` to `end` (s, YYYYMMDDHHMM in UTC), or all; then `agent` may be empty,
    /// for everybody's. Option besides: `disk` (s). Only on the dispatcher.
    #[zbus(allow_interactive_auth)]
    fn verify(&self, agent: &str, checkpoint: &str, options: Options<'_>) -> zbus::Result<OwnedObjectPath>;

    /// Shows a checkpoint as files, `disk.img` and `partN.img`, read-only, until it is unmounted. `fuse`: an open
    /// `/dev/fuse` that the caller has mounted. Only on the dispatcher. Options: `disk` (s), and `target` (s), where it
    /// is mounted, for people to read. Gives the job and what is shown: `checkpoint`, `disk`, `consistency`, `note` (s)
    /// and `warnings` (as). When the job is canceled, the mount stays, and every read fails, until it is unmounted.
    #[zbus(allow_interactive_auth)]
    fn mount(
        &self,
        agent: &str,
        checkpoint: &str,
        fuse: Fd<'_>,
        options: Options<'_>,
    ) -> zbus::Result<(OwnedObjectPath, Details)>;

    /// Shows a checkpoint as a network block device (NBD), until the job is canceled. `listener`: a unix or TCP socket on
    /// which the caller listens. Only on the dispatcher. Options: `disk` (s), `target` (s), the socket's name, for people
    /// to read, and `overlay` (h): an empty regular file; clients may write then, and what they write goes there. Gives
    /// what [`Self::mount`] gives.
    #[zbus(allow_interactive_auth)]
    fn export(
        &self,
        agent: &str,
        checkpoint: &str,
        listener: Fd<'_>,
        options: Options<'_>,
    ) -> zbus::Result<(OwnedObjectPath, Details)>;

    /// Accepts the machine that was refused last under an agent's name: it goes on at its next try, and every other one is
    /// refused. With the option `disk` (s): accepts that this disk shrank or was replaced. Only on the dispatcher.
    #[zbus(allow_interactive_auth)]
    fn accept(&self, agent: &str, options: Options<'_>) -> zbus::Result<()>;

    /// Keeps what came of starting a checkpoint in a virtual machine, in place of what is kept of it. `result`: see
    /// [`crate::words::BootResult`]. Only on the dispatcher. Options: `disk` (s), and `console` (s): what the guest wrote to its
    /// serial console, at most [`crate::BOOT_CONSOLE_MAX_BYTES`], without control characters but newlines and tabs.
    #[zbus(allow_interactive_auth)]
    fn record_boot(
        &self,
        agent: &str,
        checkpoint: &str,
        result: &str,
        options: Options<'_>,
    ) -> zbus::Result<()>;

    /// A job began.
    #[zbus(signal)]
    fn job_new(&self, id: u32, job: OwnedObjectPath) -> zbus::Result<()>;

    /// A job ended and its object is gone. `result`: see [`crate::words::JobResult`]. Details of a restore: `checkpoint`,
    /// `disk`, `consistency`, `note`, `output` (all s), `size_bytes`, `written_bytes` (t); of a sync: `checkpoints`
    /// (a{ss}, by disk); of a verify: `damage` (as, empty if sound, at most about 1000) and `verified` (aa{sv}), for each disk
    /// `agent`, `disk`, `oldest`, `newest` (s), `checkpoints`, `damaged` (u), `first_damaged` (s; all behind it rest on it; empty if
    /// none is) and `unreadable` (u, how many checkpoints have zeros for unreadable blocks); of a verify of one checkpoint also
    /// `checkpoint`, `disk` (s); of both a restore and such a verify `unreadable_blocks` (u) and their sectors, `unreadable_sectors` (s, such as `2048-2055, 4096`); of a job that failed:
    /// `error`, `message` (s), and `damage` (as) where that is why.
    #[zbus(signal)]
    fn job_removed(
        &self,
        id: u32,
        job: OwnedObjectPath,
        result: String,
        details: Details,
    ) -> zbus::Result<()>;

    /// A checkpoint was committed.
    #[zbus(signal)]
    fn checkpoint_added(&self, agent: String, disk: String, id: String) -> zbus::Result<()>;

    /// `agent` or `dispatcher`.
    #[zbus(property(emits_changed_signal = "const"))]
    fn role(&self) -> zbus::Result<String>;

    /// The daemon's version.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> zbus::Result<String>;

    /// On a dispatcher, the agents that are stored or connected: `id` s, `connected` b, `hostname` s, `version` s,
    /// `address` s, `last_seen_usec` t (since 1970; 0 if never), `disks` u and `refused` s (why a machine of this name was
    /// refused of late; empty if none was). On an agent, itself alone, and in `unfinished` (as) a sentence for each device
    /// that holds only a part of a restore.
    #[zbus(property(emits_changed_signal = "false"))]
    fn agents(&self) -> zbus::Result<Vec<Details>>;

    /// On a dispatcher, how the check of everything stored is doing: `every_usec` t (the time of a pass; 0 if it is switched
    /// off), `progress` d (0 to 1) and `began_usec` t of the pass under way (0 between two), `last_began_usec` and `last_ended_usec` t of
    /// the last pass that came to its end (since 1970; 0 if none did), `damaged` u (how many checkpoints have damaged files).
    /// On an agent, empty.
    #[zbus(property(emits_changed_signal = "false"))]
    fn scrub(&self) -> zbus::Result<Details>;
}

/// One job under way, at [`crate::job_path`]. Its object goes away when it has ended.
#[zbus::proxy(interface = "org.blxrep.Job", assume_defaults = false, default_path = "/org/blxrep/job")]
pub trait Job {
    /// Asks it to end. Its end is told by `JobRemoved`. Whoever began it may, and whoever may begin such jobs.
    #[zbus(allow_interactive_auth)]
    fn cancel(&self) -> zbus::Result<()>;

    /// Its number.
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> zbus::Result<u32>;

    /// See [`crate::words::JobType`].
    #[zbus(property(emits_changed_signal = "const"), name = "Type")]
    fn job_type(&self) -> zbus::Result<String>;

    /// Whose disk.
    #[zbus(property(emits_changed_signal = "const"))]
    fn agent(&self) -> zbus::Result<String>;

    /// Which disk; empty for several.
    #[zbus(property(emits_changed_signal = "const"))]
    fn disk(&self) -> zbus::Result<String>;

    /// Which checkpoint, as far as it is known.
    #[zbus(property(emits_changed_signal = "const"))]
    fn checkpoint(&self) -> zbus::Result<String>;

    /// Where a restore writes to, or where a mount or an export is.
    #[zbus(property(emits_changed_signal = "const"))]
    fn target(&self) -> zbus::Result<String>;

    /// Who began it; [`crate::STARTED_BY_AGENT_UID`] for a restore to an agent, which began there.
    #[zbus(property(emits_changed_signal = "const"), name = "StartedByUID")]
    fn started_by_uid(&self) -> zbus::Result<u32>;

    /// See [`crate::words::JobState`].
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;

    /// From 0 to 1; 0 while that is not known.
    #[zbus(property)]
    fn progress(&self) -> zbus::Result<f64>;

    /// Bytes done.
    #[zbus(property)]
    fn bytes_done(&self) -> zbus::Result<u64>;

    /// Bytes in all; 0 while that is not known.
    #[zbus(property)]
    fn bytes_total(&self) -> zbus::Result<u64>;

    /// Bytes a second, of late.
    #[zbus(property)]
    fn rate_bytes(&self) -> zbus::Result<u64>;
}

/// One disk, at [`crate::disk_path`].
#[zbus::proxy(interface = "org.blxrep.Disk", assume_defaults = false, default_path = "/org/blxrep/disk")]
pub trait Disk {
    /// Whose it is.
    #[zbus(property(emits_changed_signal = "const"))]
    fn agent(&self) -> zbus::Result<String>;

    /// Its stable id.
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> zbus::Result<String>;

    /// The device's name on the agent.
    #[zbus(property)]
    fn device(&self) -> zbus::Result<String>;

    /// Its size.
    #[zbus(property)]
    fn size_bytes(&self) -> zbus::Result<u64>;

    /// See [`crate::words::DiskState`].
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;

    /// Whether nothing is sent because it was paused, on either side.
    #[zbus(property)]
    fn paused(&self) -> zbus::Result<bool>;

    /// On which sides it is paused: `agent`, `dispatcher`.
    #[zbus(property)]
    fn paused_by(&self) -> zbus::Result<Vec<String>>;

    /// How far a full copy or compare is, from 0 to 1; else 0.
    #[zbus(property)]
    fn progress(&self) -> zbus::Result<f64>;

    /// Bytes changed since the newest checkpoint, as far as they are known here: what a disaster now would cost.
    #[zbus(property)]
    fn dirty_bytes(&self) -> zbus::Result<u64>;

    /// The newest checkpoint; empty if there is none.
    #[zbus(property)]
    fn last_checkpoint(&self) -> zbus::Result<String>;

    /// When it was frozen, in microseconds since 1970; 0 if there is none.
    #[zbus(property, name = "LastCheckpointUSec")]
    fn last_checkpoint_usec(&self) -> zbus::Result<u64>;

    /// How long ago that was, in microseconds; all ones if there is none.
    #[zbus(property(emits_changed_signal = "false"), name = "LagUSec")]
    fn lag_usec(&self) -> zbus::Result<u64>;

    /// How the newest checkpoint was proven: `application`, `filesystem`, `crash` or `fuzzy`; empty if there is none.
    #[zbus(property)]
    fn consistency(&self) -> zbus::Result<String>;

    /// The time between checkpoints, in microseconds; 0 on an agent, which does not know it.
    #[zbus(property, name = "SyncEveryUSec")]
    fn sync_every_usec(&self) -> zbus::Result<u64>;

    /// What is known to be damaged of what is stored of it, until it is looked at again and found sound; only on a dispatcher.
    #[zbus(property)]
    fn damage(&self) -> zbus::Result<Vec<String>>;

    /// What went wrong last, until a checkpoint is committed; empty if nothing did.
    #[zbus(property)]
    fn last_error(&self) -> zbus::Result<String>;
}
