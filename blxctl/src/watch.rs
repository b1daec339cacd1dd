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
