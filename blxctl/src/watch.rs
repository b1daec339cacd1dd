//! What happens, line by line, until somebody has seen enough.

use std::collections::HashMap;

use blxrep_dbus::words::Role;
use blxrep_dbus::{INTERFACE_DISK, INTERFACE_MANAGER, PATH_ROOT};
use futures_util::StreamExt;
use jiff::Timestamp;
use serde_json::{Value, json};
use zbus::fdo::DBusProxy;
use zbus::message::Type;
use zbus::wire::OwnedObjectPath;
use zbus::{MatchRule, Message, MessageStream};

use crate::connect::{Daemon, bus_name};
use crate::failure::Failure;
use crate::job::Stop;
use crate::model::{Disk, Named, clean, text};
use crate::output;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
enum Event {
    Checkpoint { agent: String, disk: String, checkpoint: String },
    JobBegan { job: u32 },
    JobEnded { job: u32, result: String, message: String },
    Disk { agent: String, disk: String, state: String, error: String },
    DiskGone { agent: String, disk: String },
    DaemonGone,
    DaemonBack,
}

impl Event {
    fn line(&self, role: Role) -> String {
        match self {
            Self::Checkpoint { agent, disk, checkpoint } => {
                format!("{agent} {disk}: checkpoint {checkpoint}")
            }
            Self::JobBegan { job } => format!("job {job} began"),
            Self::JobEnded { job, result, message } if message.is_empty() => {
                format!("job {job} ended: {result}")
            }
            Self::JobEnded { job, result, message } => format!("job {job} ended: {result}: {message}"),
            Self::Disk { agent, disk, state, error } if error.is_empty() => {
                format!("{agent} {disk}: {state}")
            }
            Self::Disk { agent, disk, state, error } => format!("{agent} {disk}: {state}: {error}"),
            Self::DiskGone { agent, disk } => format!("{agent} {disk}: gone"),
            Self::DaemonGone => format!("the {role} is gone"),
            Self::DaemonBack => format!("the {role} is back"),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Checkpoint { agent, disk, checkpoint } => {
                json!({ "event": "checkpoint", "agent": agent, "disk": disk, "checkpoint": checkpoint })
            }
            Self::JobBegan { job } => json!({ "event": "job_began", "job": job }),
            Self::JobEnded { job, result, message } => {
                json!({ "event": "job_ended", "job": job, "result": result, "message": message })
            }
            Self::Disk { agent, disk, state, error } => {
                json!({ "event": "disk", "agent": agent, "disk": disk, "state": state, "last_error": error })
            }
            Self::DiskGone { agent, disk } => json!({ "event": "disk_gone", "agent": agent, "disk": disk }),
            Self::DaemonGone => json!({ "event": "daemon_gone" }),
            Self::DaemonBack => json!({ "event": "daemon_back" }),
        }
    }
}

fn written(event: &Event, role: Role, now: Timestamp, as_json: bool) -> String {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    if !as_json {
        return format!("{now} {}\n", event.line(role));
    }
    let mut value = event.json();
    if let Some(object) = value.as_object_mut() {
        object.insert("time".to_owned(), now.into());
        object.insert("role".to_owned(), role.as_str().into());
    }
    format!("{value}\n")
}

/// What is known of a disk.
#[derive(Debug, Clone, Default, PartialEq)]
struct Seen {
    agent: String,
    disk: String,
    state: String,
    error: String,
}

impl Seen {
    fn new(disk: Disk) -> Self {
        Self { agent: disk.agent, disk: disk.id, state: disk.state, error: disk.last_error }
    }

    fn event(&self) -> Event {
        let Self { agent, disk, state, error } = self.clone();
        Event::Disk { agent, disk, state, error }
    }
}

/// The disks as they were seen last, by object path: only what changed is told.
#[derive(Debug, Default)]
struct Watch(HashMap<String, Seen>);

impl Watch {
    fn disk(&mut self, path: String, disk: Disk) -> Option<Event> {
        let seen = Seen::new(disk);
        let before = self.0.insert(path, seen.clone());
        (before.as_ref() != Some(&seen)).then(|| seen.event())
    }

    fn changed(&mut self, path: &str, changed: &Named) -> Option<Event> {
        let seen = self.0.get_mut(path)?;
        let before = seen.clone();
        if changed.contains_key("State") {
            seen.state = text(changed, "State");
        }
        if changed.contains_key("LastError") {
            seen.error = text(changed, "LastError");
        }
        (*seen != before).then(|| seen.event())
    }

    /// What a signal of the daemon means; `None` for what is not told. A body of another form is passed over.
    fn signal(&mut self, message: &Message) -> Option<Event> {
        let (header, body) = (message.header(), message.body());
        match (header.interface()?.as_str(), header.member()?.as_str()) {
            (INTERFACE_MANAGER, "CheckpointAdded") => {
                let (agent, disk, id): (String, String, String) = body.deserialize().ok()?;
                Some(Event::Checkpoint { agent: clean(&agent), disk: clean(&disk), checkpoint: clean(&id) })
            }
            (INTERFACE_MANAGER, "JobNew") => {
                let (job, _): (u32, OwnedObjectPath) = body.deserialize().ok()?;
                Some(Event::JobBegan { job })
            }
            (INTERFACE_MANAGER, "JobRemoved") => {
                let (job, _, result, details): (u32, OwnedObjectPath, String, Named) =
                    body.deserialize().ok()?;
                Some(Event::JobEnded { job, result: clean(&result), message: text(&details, "message") })
            }
            ("org.freedesktop.DBus.Properties", "PropertiesChanged") => {
                let (interface, changed, _): (String, Named, Vec<String>) = body.deserialize().ok()?;
                (interface == INTERFACE_DISK).then(|| self.changed(header.path()?.as_str(), &changed))?
            }
            ("org.freedesktop.DBus.ObjectManager", "InterfacesAdded") => {
                let (path, interfaces): (OwnedObjectPath, HashMap<String, Named>) =
                    body.deserialize().ok()?;
                self.disk(path.to_string(), Disk::new(interfaces.get(INTERFACE_DISK)?))
            }
            ("org.freedesktop.DBus.ObjectManager", "InterfacesRemoved") => {
                let (path, _): (OwnedObjectPath, Vec<String>) = body.deserialize().ok()?;
                let Seen { agent, disk, .. } = self.0.remove(path.as_str())?;
                Some(Event::DiskGone { agent, disk })
            }
            _ => None,
        }
    }
}

/// Prints what happens until a signal to stop comes, or until nobody reads.
pub(crate) async fn run(mut daemon: Daemon, as_json: bool) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let name = bus_name(daemon.role);
    // A connection of its own: where nobody takes the signals, no answer gets through either.
    let listening = crate::connect::bus().await?;
    let dbus = DBusProxy::new(&listening).await?;
    let mut owners = dbus.receive_name_owner_changed_with_args(&[(0, name)]).await?;
    let rule = MatchRule::builder().msg_type(Type::Signal).sender(name).path_namespace(PATH_ROOT).build()?;
    let mut signals = MessageStream::for_match_rule(rule, &listening, None).await?;
    let mut watch = Watch::default();
    let mut there = true;
    look(&daemon, &mut watch).await?;
    loop {
        let events = tokio::select! {
            biased;
            () = stop.asked() => return Ok(()),
            message = signals.next() => {
                let Some(message) = message else { return Err(Failure::failed("the system bus went away")) };
                let message = message?;
                // Whoever else sends us signals is not the daemon.
                let ours = there && message.header().sender().is_some_and(|sender| *sender == daemon.owner);
                if ours { watch.signal(&message).into_iter().collect() } else { Vec::new() }
            }
            Some(change) = owners.next() => {
                let new = change.args()?.new_owner.as_ref().map(|owner| owner.to_owned());
                let mut events = Vec::new();
                if there {
                    events.push(Event::DaemonGone);
                }
                there = new.is_some();
                if let Some(owner) = new {
                    daemon.owner = owner;
                    events.push(Event::DaemonBack);
                    events.extend(look(&daemon, &mut watch).await.unwrap_or_default());
                }
                events
            }
        };
        for event in events {
            if !output::print(&written(&event, daemon.role, Timestamp::now(), as_json))? {
                return Ok(());
            }
        }
    }
}

/// Takes in all disks; gives those that are not as they were.
async fn look(daemon: &Daemon, watch: &mut Watch) -> Result<Vec<Event>, Failure> {
    let disks = daemon.objects().await?.disks;
    Ok(disks.into_iter().filter_map(|(path, disk)| watch.disk(path, disk)).collect())
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;
    use zbus::wire::{ObjectPath, Variant};

    use super::*;

    const DISK: &str = "/org/blxrep/disk/web1/one";

    fn named(pairs: Vec<(&str, Variant<'_>)>) -> Named {
        pairs.into_iter().map(|(k, v)| (k.to_owned(), v.try_into_owned().unwrap())).collect()
    }

    fn watch() -> Watch {
        let mut watch = Watch::default();
        let disk = Disk { agent: "web1".into(), id: "one".into(), state: "idle".into(), ..Disk::default() };
        assert!(watch.disk(DISK.into(), disk).is_some());
        watch
    }

    fn state(state: &str, error: &str) -> Event {
        Event::Disk { agent: "web1".into(), disk: "one".into(), state: state.into(), error: error.into() }
    }

    #[test]
    fn every_event_has_a_line_and_an_object() {
        let [agent, disk] = ["web1".to_owned(), "one".to_owned()];
        let events = [
            Event::Checkpoint {
                agent: agent.clone(),
                disk: disk.clone(),
                checkpoint: "20261121203456".into(),
            },
            Event::JobBegan { job: 7 },
            Event::JobEnded { job: 7, result: "done".into(), message: String::new() },
            Event::JobEnded { job: 8, result: "failed".into(), message: "no room".into() },
            state("idle", ""),
            state("failed", "it grew"),
            Event::DiskGone { agent, disk },
            Event::DaemonGone,
            Event::DaemonBack,
        ];
        let now: Timestamp = "2026-11-21T20:34:56.789Z".parse().unwrap();
        let all = |json| events.iter().map(|e| written(e, Role::Dispatcher, now, json)).collect::<String>();
        assert_snapshot!(all(false), @r"
        2026-11-21T20:34:56Z web1 one: checkpoint 20261121203456
        2026-11-21T20:34:56Z job 7 began
        2026-11-21T20:34:56Z job 7 ended: done
        2026-11-21T20:34:56Z job 8 ended: failed: no room
        2026-11-21T20:34:56Z web1 one: idle
        2026-11-21T20:34:56Z web1 one: failed: it grew
        2026-11-21T20:34:56Z web1 one: gone
        2026-11-21T20:34:56Z the dispatcher is gone
        2026-11-21T20:34:56Z the dispatcher is back
        ");
        assert_snapshot!(all(true), @r#"
        {"agent":"web1","checkpoint":"20261121203456","disk":"one","event":"checkpoint","role":"dispatcher","time":"2026-11-21T20:34:56Z"}
        {"event":"job_began","job":7,"role":"dispatcher","time":"2026-11-21T20:34:56Z"}
        {"event":"job_ended","job":7,"message":"","result":"done","role":"dispatcher","time":"2026-11-21T20:34:56Z"}
        {"event":"job_ended","job":8,"message":"no room","result":"failed","role":"dispatcher","time":"2026-11-21T20:34:56Z"}
        {"agent":"web1","disk":"one","event":"disk","last_error":"","role":"dispatcher","state":"idle","time":"2026-11-21T20:34:56Z"}
        {"agent":"web1","disk":"one","event":"disk","last_error":"it grew","role":"dispatcher","state":"failed","time":"2026-11-21T20:34:56Z"}
        {"agent":"web1","disk":"one","event":"disk_gone","role":"dispatcher","time":"2026-11-21T20:34:56Z"}
        {"event":"daemon_gone","role":"dispatcher","time":"2026-11-21T20:34:56Z"}
        {"event":"daemon_back","role":"dispatcher","time":"2026-11-21T20:34:56Z"}
        "#);
    }

    #[test]
    fn only_what_changed_of_a_disk_is_told() {
        let mut watch = watch();
        let mut changed = |interface: &str, pairs| {
            let message = Message::signal(DISK, "org.freedesktop.DBus.Properties", "PropertiesChanged");
            watch.signal(&message.build(&(interface, named(pairs), Vec::<String>::new())).unwrap())
        };
        assert_eq!(changed(INTERFACE_DISK, vec![("DirtyBytes", 7u64.into())]), None);
        assert_eq!(changed(INTERFACE_DISK, vec![("State", "idle".into())]), None);
        assert_eq!(changed("org.blxrep.Job", vec![("State", "canceling".into())]), None);
        let told = changed(INTERFACE_DISK, vec![("State", "failed".into()), ("LastError", "it grew".into())]);
        assert_eq!(told, Some(state("failed", "it grew")));
    }

    #[test]
    fn a_disk_that_goes_is_told_once_and_a_body_of_another_form_is_passed_over() {
        let mut watch = watch();
        let removed = Message::signal(PATH_ROOT, "org.freedesktop.DBus.ObjectManager", "InterfacesRemoved");
        let path = ObjectPath::try_from(DISK).unwrap();
        let gone = removed.build(&(path, vec![INTERFACE_DISK])).unwrap();
        assert_eq!(watch.signal(&gone), Some(Event::DiskGone { agent: "web1".into(), disk: "one".into() }));
        assert_eq!(watch.signal(&gone), None);
        for member in ["CheckpointAdded", "JobNew", "JobRemoved", "Unheard"] {
            let odd = Message::signal(PATH_ROOT, INTERFACE_MANAGER, member).build(&(7u8,)).unwrap();
            assert_eq!(watch.signal(&odd), None, "{member}");
        }
    }
}
