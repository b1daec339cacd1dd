//! The system bus, and a daemon on it.

use std::future::Future;
use std::time::Duration;

use blxrep_dbus::proxy::{JobProxy, ManagerProxy};
use blxrep_dbus::words::Role;
use blxrep_dbus::{
    ACTION_INSPECT, BUS_NAME_AGENT, BUS_NAME_DISPATCHER, INTERFACE_DISK, INTERFACE_JOB, INTERFACE_MANAGER,
    PATH_MANAGER, PATH_ROOT,
};
use tokio::time::timeout;
use zbus::fdo::{self, DBusProxy, ManagedObjects};
use zbus::names::{BusName, UniqueName};
use zbus::proxy::{CacheProperties, MethodFlags};
use zbus::wire::{ObjectPath, OwnedVariant};
use zbus::{Connection, Proxy};

use crate::failure::{Exit, Failure};
use crate::model::{Agent, Disk, Job, Named, Scrub};

/// A bus that does not answer within this time is broken.
const BUS_TIMEOUT: Duration = Duration::from_secs(10);

/// There is somebody who can be asked for a password. The proxies of properties and of the object manager cannot say it.
const PERSON_AT_HAND: MethodFlags = MethodFlags::ALLOW_INTERACTIVE_AUTH;

/// The name that a role's daemon owns.
pub(crate) fn bus_name(role: Role) -> &'static str {
    match role {
        Role::Agent => BUS_NAME_AGENT,
        Role::Dispatcher => BUS_NAME_DISPATCHER,
    }
}

/// The role's systemd unit.
pub(crate) fn unit(role: Role) -> &'static str {
    match role {
        Role::Agent => "blxrep-agent.service",
        Role::Dispatcher => "blxrep-dispatcher.service",
    }
}

/// One daemon that runs: exactly this process, and no later owner of its name.
#[derive(Debug, Clone)]
pub(crate) struct Daemon {
    pub(crate) bus: Connection,
    pub(crate) role: Role,
    pub(crate) owner: UniqueName<'static>,
}

/// What a daemon has, at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Objects {
    /// By object path, in the order of agents and names.
    pub(crate) disks: Vec<(String, Disk)>,
    /// In the order of their numbers.
    pub(crate) jobs: Vec<Job>,
}

/// Connects to the system bus.
pub(crate) async fn bus() -> Result<Connection, Failure> {
    let connected = in_time(async { Connection::system().await }).await?;
    connected.map_err(|e| {
        Failure::failed(format!(
            "the system bus cannot be reached: {e}\n\
             install and start it (package dbus, 'systemctl start dbus'), or name another one in \
             DBUS_SYSTEM_BUS_ADDRESS"
        ))
    })
}

async fn in_time<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let late = || {
        format!("the system bus gave no answer in {} s: see 'systemctl status dbus'", BUS_TIMEOUT.as_secs())
    };
    timeout(BUS_TIMEOUT, work).await.map_err(|_| Failure::failed(late()))
}

/// The running daemons among `roles`.
pub(crate) async fn running(bus: &Connection, roles: &[Role]) -> Result<Vec<Daemon>, Failure> {
    let asked = in_time(async {
        let dbus = DBusProxy::new(bus).await?;
        let mut daemons = Vec::new();
        for &role in roles {
            match dbus.get_name_owner(BusName::try_from(bus_name(role))?).await {
                Ok(owner) => daemons.push(Daemon { bus: bus.clone(), role, owner: owner.into() }),
                Err(fdo::Error::NameHasNoOwner(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok::<_, zbus::Error>(daemons)
    });
    Ok(asked.await??)
}

/// The one daemon to ask: of this role, or the dispatcher, or else the agent.
pub(crate) async fn daemon(role: Option<Role>) -> Result<Daemon, Failure> {
    let bus = bus().await?;
    let roles = role.map_or(vec![Role::Dispatcher, Role::Agent], |role| vec![role]);
    let found = running(&bus, &roles).await?.into_iter().next();
    match found {
        Some(daemon) => Ok(daemon),
        None => Err(nobody(&roles, installed_units(&bus).await.as_deref())),
    }
}

/// The units of blxrep that systemd has; `None` where it cannot be asked.
pub(crate) async fn installed_units(bus: &Connection) -> Option<Vec<String>> {
    let patterns = [unit(Role::Agent), unit(Role::Dispatcher)];
    let which = (Vec::<&str>::new(), patterns.as_slice());
    let call = bus.call_method(
        Some("org.freedesktop.systemd1"),
        "/org/freedesktop/systemd1",
        Some("org.freedesktop.systemd1.Manager"),
        "ListUnitFilesByPatterns",
        &which,
    );
    let reply = timeout(BUS_TIMEOUT, call).await.ok()?.ok()?;
    let files: Vec<(String, String)> = reply.body().deserialize().ok()?;
    let there = |unit: &&str| files.iter().any(|(path, _)| path.rsplit('/').next() == Some(unit));
    Some(patterns.into_iter().filter(there).map(str::to_owned).collect())
}

/// That no daemon runs, and what to start. `installed`: the units that systemd has, if that is known.
pub(crate) fn nobody(roles: &[Role], installed: Option<&[String]>) -> Failure {
    let mut message = match roles {
        [role] => format!("no blxrep {role} runs on this host: {} is not on the bus", bus_name(*role)),
        _ => "no blxrep daemon runs on this host".to_owned(),
    };
    let units: Vec<_> = roles.iter().map(|role| unit(*role)).collect();
    let may_be_there = |unit: &&str| installed.is_none_or(|there| there.iter().any(|i| i == unit));
    let there: Vec<_> = units.iter().copied().filter(may_be_there).collect();
    if there.is_empty() {
        message.push_str(&format!("\nno unit is installed to start ({})", units.join(", ")));
    }
    for unit in there {
        message.push_str(&format!("\nstart it: systemctl start {unit}"));
    }
    Failure::new(Exit::Unreachable, message)
}

impl Daemon {
    pub(crate) async fn manager(&self) -> Result<ManagerProxy<'static>, Failure> {
        let builder = ManagerProxy::builder(&self.bus).destination(self.owner.clone());
        Ok(builder.cache_properties(CacheProperties::No).build().await?)
    }

    /// A job; its properties are kept up to date by what the daemon signals.
    pub(crate) async fn job(&self, path: ObjectPath<'static>) -> Result<JobProxy<'static>, Failure> {
        let builder = JobProxy::builder(&self.bus).destination(self.owner.clone()).path(path);
        Ok(builder.cache_properties(CacheProperties::Lazily).build().await?)
    }

    /// Disks and jobs. May ask the person for a password.
    pub(crate) async fn objects(&self) -> Result<Objects, Failure> {
        let manager = self.proxy(PATH_ROOT, "org.freedesktop.DBus.ObjectManager").await?;
        let managed: ManagedObjects =
            answer(manager.call_with_flags("GetManagedObjects", PERSON_AT_HAND, &()).await)?;
        let mut objects = Objects::default();
        for (path, interfaces) in managed {
            for (interface, properties) in interfaces {
                match interface.as_str() {
                    INTERFACE_DISK => objects.disks.push((path.to_string(), Disk::new(&properties))),
                    INTERFACE_JOB => objects.jobs.push(Job::new(&properties)),
                    _ => {}
                }
            }
        }
        let key = |disk: &Disk| (disk.agent.clone(), disk.name().to_owned(), disk.id.clone());
        objects.disks.sort_by_key(|(_, disk)| key(disk));
        objects.jobs.sort_by_key(|job| job.id);
        Ok(objects)
    }

    /// The agents of a dispatcher; of an agent, itself.
    pub(crate) async fn agents(&self) -> Result<Vec<Agent>, Failure> {
        let agents: Vec<Named> = self.property("Agents").await?.try_into()?;
        let mut agents: Vec<_> = agents.iter().map(Agent::new).collect();
        agents.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(agents)
    }

    /// How the check of everything stored is doing; `None` of a daemon that does not know.
    pub(crate) async fn scrub(&self) -> Option<Scrub> {
        Scrub::new(&self.property("Scrub").await.ok()?.try_into().ok()?)
    }

    /// A property of the manager.
    async fn property(&self, name: &str) -> Result<OwnedVariant, Failure> {
        let properties = self.proxy(PATH_MANAGER, "org.freedesktop.DBus.Properties").await?;
        let which = (INTERFACE_MANAGER, name);
        answer(properties.call_with_flags("Get", PERSON_AT_HAND, &which).await)
    }

    /// The daemon's version; empty if it does not say.
    pub(crate) async fn version(&self) -> Result<String, Failure> {
        Ok(crate::model::clean(&self.manager().await?.version().await.unwrap_or_default()))
    }

    async fn proxy(&self, path: &'static str, interface: &'static str) -> Result<Proxy<'static>, Failure> {
        Ok(Proxy::new(&self.bus, self.owner.clone(), path, interface).await?)
    }

    /// The agent that is meant: an agent knows itself, and of a dispatcher's agents the only one need not be named.
    pub(crate) async fn agent(&self, named: Option<String>) -> Result<String, Failure> {
        match (named, self.role) {
            (Some(agent), _) => Ok(agent),
            (None, Role::Agent) => Ok(String::new()),
            (None, Role::Dispatcher) => only_agent(&self.agents().await?),
        }
    }
}

fn answer<R>(reply: zbus::Result<Option<R>>) -> Result<R, Failure> {
    let reply = reply.map_err(|e| Failure::of_call(&e, ACTION_INSPECT))?;
    reply.ok_or_else(|| Failure::failed("the daemon gave no answer"))
}

fn only_agent(agents: &[Agent]) -> Result<String, Failure> {
    match agents {
        [] => {
            Err(Failure::new(Exit::NotFound, "no agent is stored or connected: see 'blxrep enroll --help'"))
        }
        [agent] => Ok(agent.id.clone()),
        several => {
            let ids: Vec<_> = several.iter().map(|agent| agent.id.as_str()).collect();
            Err(Failure::usage(format!("which agent? There are {}", ids.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_only_agent_need_not_be_named() {
        let agent = |id: &str| Agent { id: id.to_owned(), ..Agent::default() };
        assert_eq!(only_agent(&[agent("web1")]), Ok("web1".to_owned()));
        assert_eq!(only_agent(&[]).unwrap_err().exit, Exit::NotFound);
        let failure = only_agent(&[agent("db1"), agent("web1")]).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        insta::assert_snapshot!(failure, @"which agent? There are db1, web1");
    }

    #[test]
    fn where_nobody_runs_it_says_what_to_start() {
        let both = [Role::Dispatcher, Role::Agent];
        insta::assert_snapshot!(nobody(&both, Some(&["blxrep-agent.service".to_owned()])), @r"
        no blxrep daemon runs on this host
        start it: systemctl start blxrep-agent.service
        ");
        insta::assert_snapshot!(nobody(&[Role::Agent], Some(&[])), @r"
        no blxrep agent runs on this host: org.blxrep.Agent is not on the bus
        no unit is installed to start (blxrep-agent.service)
        ");
        insta::assert_snapshot!(nobody(&both, None), @r"
        no blxrep daemon runs on this host
        start it: systemctl start blxrep-dispatcher.service
        start it: systemctl start blxrep-agent.service
        ");
        assert_eq!(nobody(&both, None).exit, Exit::Unreachable);
    }
}
