//! Who is connected: one session an agent, one thread a disk.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::disk::{DiskHandle, Input};
use super::session::DiskSession;
use super::status::{DiskState, DiskStatus};
use crate::ids::{AgentId, DiskId, Epoch};
use crate::store::catalogue::Catalogue;
use crate::store::files::Files;
use crate::wire::message::{ConfigDown, DiskOffer};

/// The most disks one agent may offer.
pub const DISKS_MAX: usize = 128;

struct Session {
    token: [u8; 16],
    orders: mpsc::Sender<ConfigDown>,
    disks: HashMap<DiskId, DiskOffer>,
    cut: watch::Sender<bool>,
}

fn own_session<'a>(
    sessions: &'a HashMap<AgentId, Session>,
    agent: &AgentId,
    token: &[u8],
) -> Result<&'a Session, String> {
    let session = sessions.get(agent).filter(|s| subtle::ConstantTimeEq::ct_eq(&s.token[..], token).into());
    session.ok_or_else(|| "this session is over: connect to /ws/config first".to_owned())
}

#[derive(Default)]
struct State {
    sessions: HashMap<AgentId, Session>,
    disks: HashMap<(AgentId, DiskId), DiskHandle>,
}

/// The connected agents and their disks; what a person may order or ask goes through here.
pub struct Registry {
    files: Arc<dyn Files>,
    catalogue: Arc<Catalogue>,
    /// The file of the agents that may connect.
    pub agents_file: PathBuf,
    sync_every: Duration,
    instance: Epoch,
    state: Mutex<State>,
}

/// An agent's place, held while its config connection is up.
pub struct Place {
    registry: Arc<Registry>,
    /// Whose place it is.
    pub agent: AgentId,
    /// The session's token.
    pub token: [u8; 16],
    /// Turns true when the session must end.
    pub cut: watch::Receiver<bool>,
    /// Orders for the agent.
    pub orders: mpsc::Receiver<ConfigDown>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(session) = self.registry.state().sessions.remove(&self.agent) {
            let _ = session.cut.send(true);
        }
    }
}

/// A disk's connection that may go on.
pub struct Admitted {
    /// The disk's thread.
    pub disk: DiskHandle,
    /// The agent's way for orders.
    pub orders: mpsc::Sender<ConfigDown>,
    /// Turns true when the session ends.
    pub cut: watch::Receiver<bool>,
}

impl Registry {
    /// Nobody connected.
    pub fn new(
        files: Arc<dyn Files>,
        catalogue: Arc<Catalogue>,
        agents_file: PathBuf,
        sync_every: Duration,
        instance: Epoch,
    ) -> Self {
        Self { files, catalogue, agents_file, sync_every, instance, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an agent's place; `None` if it is taken already.
    pub fn enter(self: &Arc<Self>, agent: &AgentId, token: [u8; 16]) -> Option<Place> {
        let mut state = self.state();
        if state.sessions.contains_key(agent) {
            return None;
        }
        let (orders_tx, orders) = mpsc::channel(2 * DISKS_MAX);
        let (cut_tx, cut) = watch::channel(false);
        let session = Session { token, orders: orders_tx, disks: HashMap::new(), cut: cut_tx };
        state.sessions.insert(agent.clone(), session);
        Some(Place { registry: self.clone(), agent: agent.clone(), token, cut, orders })
    }

    /// Remembers the disks an agent offers in this session.
    pub fn offer(&self, agent: &AgentId, disks: Vec<DiskOffer>) {
        if let Some(session) = self.state().sessions.get_mut(agent) {
            session.disks = disks.into_iter().map(|offer| (offer.disk.clone(), offer)).collect();
        }
    }

    /// Finds or starts the thread of a disk that was offered in this session.
    ///
    /// # Errors
    /// A sentence if the session is another one, the disk was not offered, or there is no thread to be had.
    pub fn admit(&self, agent: &AgentId, token: &[u8], disk: &DiskId) -> Result<Admitted, String> {
        let mut state = self.state();
        let State { sessions, disks } = &mut *state;
        let session = own_session(sessions, agent, token)?;
        let offer = session.disks.get(disk).ok_or("this disk was not offered in the hello")?;
        let key = (agent.clone(), disk.clone());
        let handle = match disks.get(&key) {
            Some(handle) if !handle.queue.is_closed() => handle.clone(),
            _ if disks.keys().filter(|(of, _)| of == agent).count() >= 2 * DISKS_MAX => {
                return Err("too many different disks since the dispatcher started".to_owned());
            }
            _ => {
                let handle = self.start(agent, offer).map_err(|e| format!("no thread for the disk: {e}"))?;
                disks.insert(key, handle.clone());
                handle
            }
        };
        Ok(Admitted { disk: handle, orders: session.orders.clone(), cut: session.cut.subscribe() })
    }

    /// Turns true when this session of the agent ends.
    ///
    /// # Errors
    /// A sentence if the session is another one.
    pub fn cut_of(&self, agent: &AgentId, token: &[u8]) -> Result<watch::Receiver<bool>, String> {
        Ok(own_session(&self.state().sessions, agent, token)?.cut.subscribe())
    }

    fn start(&self, agent: &AgentId, offer: &DiskOffer) -> std::io::Result<DiskHandle> {
        let session = DiskSession::new(self.files.clone(), agent.clone(), offer.disk.clone(), self.instance);
        let status = DiskStatus {
            agent: agent.clone(),
            disk: offer.disk.clone(),
            device: offer.device.clone(),
            state: DiskState::Detached,
            newest: None,
            last_error: None,
        };
        DiskHandle::spawn(session, status, self.sync_every, self.catalogue.clone())
    }

    /// The agents that are connected.
    pub fn agents(&self) -> Vec<AgentId> {
        let mut agents: Vec<AgentId> = self.state().sessions.keys().cloned().collect();
        agents.sort();
        agents
    }

    /// How every disk is doing that was seen since the dispatcher started.
    pub fn disks(&self) -> Vec<DiskStatus> {
        let handles: Vec<DiskHandle> = self.state().disks.values().cloned().collect();
        let mut disks: Vec<DiskStatus> = handles.iter().map(DiskHandle::status).collect();
        disks.sort_by(|a, b| (&a.agent, &a.disk).cmp(&(&b.agent, &b.disk)));
        disks
    }

    /// Orders a checkpoint of a disk now; false if the disk is not known.
    pub async fn sync(&self, agent: &AgentId, disk: &DiskId) -> bool {
        let handle = self.state().disks.get(&(agent.clone(), disk.clone())).cloned();
        match handle {
            Some(handle) => handle.queue.send(Input::SyncNow).await.is_ok(),
            None => false,
        }
    }

    /// Ends an agent's session; it may connect again if it is still enrolled.
    pub fn cut(&self, agent: &AgentId) {
        if let Some(session) = self.state().sessions.get(agent) {
            let _ = session.cut.send(true);
        }
    }

    /// Ends every session and every disk's thread, everything received made durable. Blocks: not for async threads.
    pub fn stop(&self) {
        for agent in self.agents() {
            self.cut(&agent);
        }
        let disks: Vec<DiskHandle> = self.state().disks.drain().map(|(_, handle)| handle).collect();
        for disk in &disks {
            let _ = disk.queue.blocking_send(Input::Stop);
        }
        disks.iter().for_each(DiskHandle::join);
    }
}
