//! What the daemons tell, as plain values. Pure.
//!
//! A property or key that a daemon does not send reads as empty or 0: it may be of another version. Text is cleaned
//! here once, because names and messages come from other hosts and end on a terminal.

use std::collections::HashMap;

use blxrep_dbus::words::DiskState;
use serde_json::{Value, json};
use zbus::wire::{OwnedVariant, Variant};

/// Named values of an answer, of a signal or of an object.
pub(crate) type Named = HashMap<String, OwnedVariant>;

/// Text without control characters.
pub(crate) fn clean(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => ' ',
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    text.trim_end().chars().map(shown).collect()
}

pub(crate) fn text(named: &Named, key: &str) -> String {
    named.get(key).and_then(|v| v.downcast_ref::<&str>().ok()).map(clean).unwrap_or_default()
}

pub(crate) fn texts(named: &Named, key: &str) -> Vec<String> {
    let Some(Variant::Array(array)) = named.get(key).map(|v| &**v) else { return Vec::new() };
    array.inner().iter().filter_map(|v| v.downcast_ref::<&str>().ok()).map(clean).collect()
}

pub(crate) fn number(named: &Named, key: &str) -> u64 {
    let Some(value) = named.get(key) else { return 0 };
    value.downcast_ref::<u64>().or_else(|_| value.downcast_ref::<u32>().map(u64::from)).unwrap_or(0)
}

fn flag(named: &Named, key: &str) -> bool {
    named.get(key).and_then(|v| v.downcast_ref::<bool>().ok()).unwrap_or(false)
}

/// A share of the whole, from 0 to 1.
fn share(named: &Named, key: &str) -> f64 {
    let share = named.get(key).and_then(|v| v.downcast_ref::<f64>().ok()).unwrap_or(0.0);
    if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 }
}

/// `null` for what is empty.
fn or_null(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { Value::from(text) }
}

/// One disk.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Disk {
    pub(crate) agent: String,
    pub(crate) id: String,
    pub(crate) device: String,
    pub(crate) size_bytes: u64,
    pub(crate) state: String,
    pub(crate) paused: bool,
    pub(crate) paused_by: Vec<String>,
    pub(crate) progress: f64,
    pub(crate) dirty_bytes: u64,
    pub(crate) last_checkpoint: String,
    /// Age of the newest checkpoint; `None` if there is none.
    pub(crate) lag_usec: Option<u64>,
    pub(crate) consistency: String,
    /// 0 where it is not known.
    pub(crate) sync_every_usec: u64,
    pub(crate) last_error: String,
    /// What of it is stored damaged, one line each.
    pub(crate) damage: Vec<String>,
}

impl Disk {
    pub(crate) fn new(properties: &Named) -> Self {
        let last_checkpoint = text(properties, "LastCheckpoint");
        let lag_usec = match number(properties, "LagUSec") {
            u64::MAX => None,
            lag => (!last_checkpoint.is_empty()).then_some(lag),
        };
        Self {
            agent: text(properties, "Agent"),
            id: text(properties, "Id"),
            device: text(properties, "Device"),
            size_bytes: number(properties, "SizeBytes"),
            state: text(properties, "State"),
            paused: flag(properties, "Paused"),
            paused_by: texts(properties, "PausedBy"),
            progress: share(properties, "Progress"),
            dirty_bytes: number(properties, "DirtyBytes"),
            last_checkpoint,
            lag_usec,
            consistency: text(properties, "Consistency"),
            sync_every_usec: number(properties, "SyncEveryUSec"),
            last_error: text(properties, "LastError"),
            damage: texts(properties, "Damage"),
        }
    }

    pub(crate) fn is(&self, state: DiskState) -> bool {
        self.state == state.as_str()
    }

    /// What a person calls it: the device's name, or else the id.
    pub(crate) fn name(&self) -> &str {
        if self.device.is_empty() { &self.id } else { &self.device }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "agent": self.agent,
            "disk": self.id,
            "device": or_null(&self.device),
            "size_bytes": self.size_bytes,
            "state": self.state,
            "paused": self.paused,
            "paused_by": self.paused_by,
            "progress": self.progress,
            "dirty_bytes": self.dirty_bytes,
            "last_checkpoint": or_null(&self.last_checkpoint),
            "lag_usec": self.lag_usec,
            "consistency": or_null(&self.consistency),
            "sync_every_usec": self.sync_every_usec,
            "last_error": or_null(&self.last_error),
            "damage": self.damage,
        })
    }
}

/// One job under way.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Job {
    pub(crate) id: u64,
    pub(crate) job_type: String,
    pub(crate) agent: String,
    pub(crate) disk: String,
    pub(crate) checkpoint: String,
    pub(crate) target: String,
    pub(crate) started_by_uid: u64,
    /// The user of that number, where it has a name here.
    pub(crate) started_by: Option<String>,
    pub(crate) state: String,
    pub(crate) progress: f64,
    pub(crate) bytes_done: u64,
    pub(crate) bytes_total: u64,
    pub(crate) rate_bytes: u64,
}

impl Job {
    pub(crate) fn new(properties: &Named) -> Self {
        Self {
            id: number(properties, "Id"),
            job_type: text(properties, "Type"),
            agent: text(properties, "Agent"),
            disk: text(properties, "Disk"),
            checkpoint: text(properties, "Checkpoint"),
            target: text(properties, "Target"),
            started_by_uid: number(properties, "StartedByUID"),
            started_by: None,
            state: text(properties, "State"),
            progress: share(properties, "Progress"),
            bytes_done: number(properties, "BytesDone"),
            bytes_total: number(properties, "BytesTotal"),
            rate_bytes: number(properties, "RateBytes"),
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "job": self.id,
            "type": self.job_type,
            "agent": self.agent,
            "disk": or_null(&self.disk),
            "checkpoint": or_null(&self.checkpoint),
            "target": or_null(&self.target),
            "started_by_uid": self.started_by_uid,
            "started_by": self.started_by,
            "state": self.state,
            "progress": self.progress,
            "bytes_done": self.bytes_done,
            "bytes_total": self.bytes_total,
            "rate_bytes_per_s": self.rate_bytes,
        })
    }
}

/// One agent, as `org.blxrep.Manager.Agents` tells.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Agent {
    pub(crate) id: String,
    pub(crate) connected: bool,
    pub(crate) hostname: String,
    pub(crate) version: String,
    pub(crate) address: String,
    /// Microseconds since 1970; 0 if never.
    pub(crate) last_seen_usec: u64,
    pub(crate) disks: u64,
    /// Why a machine of this name is refused; empty if none is.
    pub(crate) refused: String,
    /// The devices of its host that hold only a part of a restore.
    pub(crate) unfinished: Vec<String>,
}

impl Agent {
    pub(crate) fn new(named: &Named) -> Self {
        Self {
            id: text(named, "id"),
            connected: flag(named, "connected"),
            hostname: text(named, "hostname"),
            version: text(named, "version"),
            address: text(named, "address"),
            last_seen_usec: number(named, "last_seen_usec"),
            disks: number(named, "disks"),
            refused: text(named, "refused"),
            unfinished: texts(named, "unfinished"),
        }
    }

    /// The host a person goes to.
    pub(crate) fn host(&self) -> &str {
        if self.hostname.is_empty() { &self.id } else { &self.hostname }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "agent": self.id,
            "connected": self.connected,
            "hostname": or_null(&self.hostname),
            "version": or_null(&self.version),
            "address": or_null(&self.address),
            "last_seen_usec": (self.last_seen_usec > 0).then_some(self.last_seen_usec),
            "disks": self.disks,
            "refused": or_null(&self.refused),
        })
    }
}

/// How a dispatcher's check of everything stored is doing, as `org.blxrep.Manager.Scrub` tells.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Scrub {
    /// The time of a pass; 0 if it is switched off.
    pub(crate) every_usec: u64,
    /// Of the pass under way.
    pub(crate) progress: f64,
    /// When that began, in microseconds since 1970; 0 between two.
    pub(crate) began_usec: u64,
    pub(crate) last_began_usec: u64,
    /// When the last pass ended that did; 0 if none did.
    pub(crate) last_ended_usec: u64,
    /// How many checkpoints have files that are damaged.
    pub(crate) damaged: u64,
}

impl Scrub {
    /// `None` of an agent, which has nothing to check.
    pub(crate) fn new(named: &Named) -> Option<Self> {
        (!named.is_empty()).then(|| Self {
            every_usec: number(named, "every_usec"),
            progress: share(named, "progress"),
            began_usec: number(named, "began_usec"),
            last_began_usec: number(named, "last_began_usec"),
            last_ended_usec: number(named, "last_ended_usec"),
            damaged: number(named, "damaged"),
        })
    }

    pub(crate) fn json(&self) -> Value {
        let or_null = |usec: u64| (usec > 0).then_some(usec);
        json!({
            "every_usec": or_null(self.every_usec),
            "progress": or_null(self.began_usec).map(|_| self.progress),
            "began_usec": or_null(self.began_usec),
            "last_began_usec": or_null(self.last_began_usec),
            "last_ended_usec": or_null(self.last_ended_usec),
            "damaged": self.damaged,
        })
    }
}

/// One checkpoint, as `Show` tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) checkpoint: String,
    pub(crate) agent: String,
    pub(crate) disk: String,
    pub(crate) device: String,
    pub(crate) time: String,
    pub(crate) consistency: String,
    pub(crate) size_bytes: u64,
    pub(crate) delta_bytes: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) parent: String,
    pub(crate) freeze_ms: u64,
    pub(crate) unreadable_blocks: u64,
    pub(crate) note: String,
    /// `passed` or `failed`; empty if nobody has tried.
    pub(crate) boot: String,
    pub(crate) boot_time: String,
}

impl Checkpoint {
    pub(crate) fn new(named: &Named) -> Self {
        Self {
            checkpoint: text(named, "checkpoint"),
            agent: text(named, "agent"),
            disk: text(named, "disk"),
            device: text(named, "device"),
            time: text(named, "time"),
            consistency: text(named, "consistency"),
            size_bytes: number(named, "size_bytes"),
            delta_bytes: number(named, "delta_bytes"),
            stored_bytes: number(named, "stored_bytes"),
            parent: text(named, "parent"),
            freeze_ms: number(named, "freeze_ms"),
            unreadable_blocks: number(named, "unreadable_blocks"),
            note: text(named, "note"),
            boot: text(named, "boot"),
            boot_time: text(named, "boot_time"),
        }
    }

    /// With the keys of `blxrep dispatcher show --json`.
    pub(crate) fn json(&self) -> Value {
        json!({
            "checkpoint": self.checkpoint,
            "agent": self.agent,
            "disk": self.disk,
            "device": self.device,
            "time": self.time,
            "consistency": self.consistency,
            "size_bytes": self.size_bytes,
            "delta_bytes": self.delta_bytes,
            "stored_bytes": self.stored_bytes,
            "parent": or_null(&self.parent),
            "freeze_ms": self.freeze_ms,
            "unreadable_blocks": self.unreadable_blocks,
            "note": self.note,
            "boot": or_null(&self.boot),
            "boot_time": or_null(&self.boot_time),
        })
    }
}

/// How the checkpoints of one disk are that were verified.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Verified {
    pub(crate) agent: String,
    pub(crate) disk: String,
    pub(crate) oldest: String,
    pub(crate) newest: String,
    pub(crate) checkpoints: u64,
    pub(crate) damaged: u64,
    /// Empty if none is.
    pub(crate) first_damaged: String,
    pub(crate) unreadable: u64,
}

impl Verified {
    pub(crate) fn new(named: &Named) -> Self {
        Self {
            agent: text(named, "agent"),
            disk: text(named, "disk"),
            oldest: text(named, "oldest"),
            newest: text(named, "newest"),
            checkpoints: number(named, "checkpoints"),
            damaged: number(named, "damaged"),
            first_damaged: text(named, "first_damaged"),
            unreadable: number(named, "unreadable"),
        }
    }

    /// With the keys of `blxrep dispatcher verify --json`.
    pub(crate) fn json(&self) -> Value {
        json!({
            "agent": self.agent,
            "disk": self.disk,
            "oldest": self.oldest,
            "newest": self.newest,
            "checkpoints": self.checkpoints,
            "damaged": self.damaged,
            "first_damaged": or_null(&self.first_damaged),
            "unreadable": self.unreadable,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(pairs: Vec<(&str, Variant<'_>)>) -> Named {
        pairs.into_iter().map(|(k, v)| (k.to_owned(), OwnedVariant::try_from(v).unwrap())).collect()
    }

    #[test]
    fn what_is_missing_or_of_another_type_reads_as_nothing() {
        let odd =
            named(vec![("SizeBytes", "big".into()), ("State", 7u64.into()), ("Progress", f64::NAN.into())]);
        assert_eq!(Disk::new(&odd), Disk::default());
        assert_eq!(Job::new(&Named::new()), Job::default());
        assert_eq!(Agent::new(&Named::new()), Agent::default());
        assert_eq!(Checkpoint::new(&Named::new()), Checkpoint::default());
    }

    #[test]
    fn a_disk_without_a_checkpoint_has_no_age() {
        let none = named(vec![("LagUSec", u64::MAX.into()), ("LastCheckpoint", "".into())]);
        assert_eq!(Disk::new(&none).lag_usec, None);
        let some = named(vec![("LagUSec", 5u64.into()), ("LastCheckpoint", "20261121203456".into())]);
        assert_eq!(Disk::new(&some).lag_usec, Some(5));
    }

    #[test]
    fn names_of_other_hosts_cannot_steer_the_terminal() {
        let agent = named(vec![("id", "web1".into()), ("hostname", "a\x1b]0;x\x07\nb".into())]);
        assert_eq!(Agent::new(&agent).hostname, "a\u{fffd}]0;x\u{fffd} b");
    }

    #[test]
    fn lists_of_text_are_read() {
        let disk = named(vec![("PausedBy", vec!["agent", "dispatcher"].into()), ("Paused", true.into())]);
        assert_eq!(Disk::new(&disk).paused_by, ["agent", "dispatcher"]);
        assert!(Disk::new(&disk).paused);
    }
}
