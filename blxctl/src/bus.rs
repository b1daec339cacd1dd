//! Asks the system bus. Only asks: nothing here starts, changes or waits for a daemon.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::time::timeout;
use zbus::wire::{OwnedObjectPath, OwnedVariant};
use zbus::{Connection, Error, fdo};

use crate::status::{Daemon, Owner, Role};

const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";
const SYSTEMD: &str = "org.freedesktop.systemd1";
/// A bus that does not answer within this time is broken.
const BUS_TIMEOUT: Duration = Duration::from_secs(10);

/// Asks for the owners of the roles' names.
pub(crate) async fn ask(roles: &[Role]) -> anyhow::Result<Vec<Daemon>> {
    match timeout(BUS_TIMEOUT, ask_now(roles)).await {
        Ok(result) => result,
        Err(_) => {
            bail!("the system bus gave no answer in {} s: see 'systemctl status dbus'", BUS_TIMEOUT.as_secs())
        }
    }
}

async fn ask_now(roles: &[Role]) -> anyhow::Result<Vec<Daemon>> {
    let bus = Connection::system().await.context(
        "the system bus cannot be reached: install and start it (package dbus, 'systemctl start dbus'), \
         or name another one in DBUS_SYSTEM_BUS_ADDRESS",
    )?;
    let mut daemons = Vec::new();
    for role in roles {
        let name = role.bus_name();
        // In one text: zbus' message already holds its cause.
        let owner = owner(&bus, name)
            .await
            .map_err(|e| anyhow!("the system bus does not say who owns {name}: {e}"))?;
        daemons.push(Daemon { role: *role, owner });
    }
    Ok(daemons)
}

async fn owner(bus: &Connection, name: &str) -> Result<Option<Owner>, Error> {
    let unique = match bus.call_method(Some(BUS), BUS_PATH, Some(BUS), "GetNameOwner", &(name,)).await {
        Ok(reply) => reply.body().deserialize::<String>()?,
        Err(Error::FDO(error)) if matches!(*error, fdo::Error::NameHasNoOwner(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    // By its unique name: the process that owned the name when it was asked for, and no later one.
    let pid = bus.call_method(Some(BUS), BUS_PATH, Some(BUS), "GetConnectionUnixProcessID", &(unique,)).await;
    let pid = pid.and_then(|reply| reply.body().deserialize::<u32>()).ok();
    let unit = match pid {
        Some(pid) => unit(bus, pid).await.ok(),
        None => None,
    };
    Ok(Some(Owner { pid, unit }))
}

async fn unit(bus: &Connection, pid: u32) -> Result<String, Error> {
    let manager = Some("org.freedesktop.systemd1.Manager");
    let reply =
        bus.call_method(Some(SYSTEMD), "/org/freedesktop/systemd1", manager, "GetUnitByPID", &(pid,)).await?;
    let path = reply.body().deserialize::<OwnedObjectPath>()?;
    let property = ("org.freedesktop.systemd1.Unit", "Id");
    let properties = Some("org.freedesktop.DBus.Properties");
    let reply = bus.call_method(Some(SYSTEMD), path, properties, "Get", &property).await?;
    reply.body().deserialize::<OwnedVariant>()?.downcast_ref::<String>()
}
