//! The bus interface of both roles: `org.blxrep.Manager`, one object a running job, one object a disk.
//!
//! Everything here is the same for agent and dispatcher; what they really do is behind [`control::Control`]. What must
//! never happen here: a call carried out that [`access`] did not allow, an option passed over that is not known, a blocking
//! call on an async thread.

mod access;
pub mod control;
mod disks;
mod job;
mod jobs;
mod manager;
mod options;
pub(crate) mod outcome;
mod publish;
mod rate;
#[cfg(test)]
mod tests;
mod which;

use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use blxrep_dbus::words::{JobType, Role};
use blxrep_dbus::{
    BUS_NAME_AGENT, BUS_NAME_DISPATCHER, PATH_MANAGER, PATH_ROOT, SIGNAL_INTERVAL_MS, STARTED_BY_AGENT_UID,
};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{interval, sleep};
use tracing::{debug, info, warn};
use zbus::Connection;
use zbus::connection::Builder;
use zbus::fdo::{self, ObjectManager, RequestNameFlags};
use zbus::object_server::SignalEmitter;

use self::access::Access;
use self::control::{Control, Planned};
use self::disks::Disks;
use self::manager::Manager;
use crate::status::CheckpointAdded;

/// Between two attempts to get on the bus.
const RETRY_MS: u64 = 5000;

/// Serves a role on the system bus until `stop` turns true, then ends the jobs. Without a bus it goes on trying: a
/// daemon replicates also where none is. `begun` are restores that an agent begins, to be shown as jobs. `tried` hears of the
/// end of the first attempt to get on the bus.
pub async fn run(
    control: Arc<dyn Control>,
    checkpoints: broadcast::Receiver<CheckpointAdded>,
    mut begun: mpsc::Receiver<Planned>,
    tried: oneshot::Sender<()>,
    mut stop: watch::Receiver<bool>,
) {
    let manager = Manager::new(control, Access::Polkit);
    tokio::select! {
        never = stay_on_bus(&manager, Builder::system, &checkpoints, &mut begun, tried) => match never {},
        _ = stop.wait_for(|stop| *stop) => {}
    }
    manager.jobs.stop().await;
    manager.jobs.detach().await;
}

/// Gets on the bus, and again whenever it went away. Every outage is said once.
async fn stay_on_bus(
    manager: &Manager,
    bus: impl Fn() -> Builder<'static>,
    checkpoints: &broadcast::Receiver<CheckpointAdded>,
    begun: &mut mpsc::Receiver<Planned>,
    tried: oneshot::Sender<()>,
) -> Infallible {
    let name = match manager.control.role() {
        Role::Agent => BUS_NAME_AGENT,
        Role::Dispatcher => BUS_NAME_DISPATCHER,
    };
    let (mut is_said, mut tried) = (false, Some(tried));
    loop {
        let entered = enter(manager, bus(), name).await;
        // Nobody may be waiting any more.
        let _ = tried.take().map(|tried| tried.send(()));
        match entered {
            Ok((connection, disks)) => {
                info!("on the bus as {name}");
                let lost = serve(manager, &connection, disks, checkpoints.resubscribe(), begun).await;
                warn!("off the bus ({lost}): nobody can call until it is back, all else goes on");
                is_said = true;
            }
            Err(error) if is_said => debug!("still not on the bus: {error}"),
            Err(error) => {
                let advice = advice(&error, name);
                warn!("not on the bus: {error}. Nobody can call this daemon, all else goes on. {advice}");
                is_said = true;
            }
        }
        manager.jobs.detach().await;
        sleep(Duration::from_millis(RETRY_MS)).await;
    }
}

/// What to do about a failed attempt.
fn advice(error: &zbus::Error, name: &str) -> String {
    match error {
        zbus::Error::NameTaken => format!("Another process owns {name}: end it"),
        zbus::Error::FDO(error) if matches!(**error, fdo::Error::AccessDenied(_)) => {
            "Install org.blxrep.conf in /usr/share/dbus-1/system.d and reload the bus: systemctl reload dbus"
                .into()
        }
        _ => "Where there is to be a system bus, start it: systemctl start dbus".into(),
    }
}

/// Connects, serves everything there is, and only then takes the name: who sees it may call.
async fn enter(manager: &Manager, bus: Builder<'static>, name: &str) -> zbus::Result<(Connection, Disks)> {
    let connection = bus.build().await?;
    let disks = set_up(manager, &connection).await?;
    connection.request_name_with_flags(name, RequestNameFlags::DO_NOT_QUEUE).await?;
    Ok((connection, disks))
}

/// Puts all objects on a connection.
async fn set_up(manager: &Manager, connection: &Connection) -> zbus::Result<Disks> {
    let server = connection.object_server();
    server.at(PATH_ROOT, ObjectManager).await?;
    server.at(PATH_MANAGER, manager.clone()).await?;
    manager.jobs.attach(connection).await?;
    let mut disks = Disks::default();
    look(manager, connection, &mut disks).await?;
    Ok(disks)
}

/// Tells what happens, until the connection is gone. Gives why.
async fn serve(
    manager: &Manager,
    connection: &Connection,
    mut disks: Disks,
    mut checkpoints: broadcast::Receiver<CheckpointAdded>,
    begun: &mut mpsc::Receiver<Planned>,
) -> zbus::Error {
    let mut tick = interval(Duration::from_millis(SIGNAL_INTERVAL_MS));
    loop {
        let told = tokio::select! {
            () = connection.closed() => return zbus::Error::Failure("the connection was closed".into()),
            _ = tick.tick() => {
                let told = look(manager, connection, &mut disks).await;
                // Counted from the end: no object is told of more often than the interval allows.
                tick.reset();
                told
            }
            added = next(&mut checkpoints) => tell_checkpoint(connection, &added).await,
            Some(planned) = begun.recv() => {
                show_restore(manager, planned).await;
                Ok(())
            }
        };
        if let Err(error) = told {
            return error;
        }
    }
}

/// Looks at everything that changes by itself, and tells what did.
async fn look(manager: &Manager, connection: &Connection, disks: &mut Disks) -> zbus::Result<()> {
    let control = manager.control.clone();
    let seen = spawn_blocking(move || (control.agents(), control.scrub(), control.disks())).await;
    let (agents, scrub, seen) = seen.map_err(|fault| zbus::Error::Failure(fault.to_string()))?;
    *manager.agents.lock().unwrap_or_else(PoisonError::into_inner) = agents;
    *manager.scrub.lock().unwrap_or_else(PoisonError::into_inner) = scrub;
    disks.show(connection, seen).await?;
    manager.jobs.signal_changes().await
}

/// Shows a restore that an agent began. One that cannot be shown goes on all the same.
async fn show_restore(manager: &Manager, planned: Planned) {
    let shown = match manager.jobs.slot() {
        Ok(slot) => manager.jobs.begin(slot, JobType::Restore, STARTED_BY_AGENT_UID, planned).await,
        Err(problem) => Err(problem),
    };
    if let Err(problem) = shown {
        warn!("a restore to an agent is not shown as a job: {problem}");
    }
}

async fn next(checkpoints: &mut broadcast::Receiver<CheckpointAdded>) -> CheckpointAdded {
    loop {
        match checkpoints.recv().await {
            Ok(added) => return added,
            Err(RecvError::Lagged(missed)) => {
                warn!("{missed} checkpoints were not signalled: too many at once")
            }
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

async fn tell_checkpoint(connection: &Connection, added: &CheckpointAdded) -> zbus::Result<()> {
    let emitter = SignalEmitter::new(connection, PATH_MANAGER)?;
    let (agent, disk) = (added.agent.as_str(), added.disk.as_str());
    Manager::checkpoint_added(&emitter, agent, disk, &added.id.to_string()).await
}
