//! Who is connected: one session an agent, one thread a disk; and every disk there is something stored of.

mod survey;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blxrep_dbus::problem::{Problem, ProblemKind};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::change;
use super::disk::{DiskHandle, Input};
use super::generations::Generations;
use crate::accept::Accepted;
use crate::disk_list::DiskListError;
use crate::ids::{AgentId, CheckpointId, DiskId, Epoch};
use crate::pause::Pauses;
use crate::status::{CheckpointAdded, DiskStatus, SharedDisk};
use crate::store::catalogue::{AgentEntry, Catalogue};
use crate::store::files::Files;
use crate::watchdog::Watchdog;
use crate::wire::key::KeyHash;
use crate::wire::message::{ConfigDown, DiskOffer, clean_text};

/// The most disks one agent may offer.
pub const DISKS_MAX: usize = 128;
/// A machine that is refused asks again at least this often: silent for longer, it is gone.
const FENCED_SHOWN: Duration = Duration::from_secs(180);

/// What every disk's thread uses.
pub struct House {
    /// The data directory.
    pub files: Arc<dyn Files>,
    /// The catalogue of agents and actions.
    pub catalogue: Arc<Catalogue>,
    /// The time between checkpoints.
    pub sync_every: watch::Sender<Duration>,
    /// Tells of every checkpoint.
    pub checkpoints: broadcast::Sender<CheckpointAdded>,
    /// Watches the loops.
    pub watchdog: Watchdog,
    /// The disks whose change a person accepted.
    pub accepted: Accepted,
    /// Which machine each agent's name belongs to.
    pub generations: Generations,
    /// This run of the dispatcher.
    pub instance: Epoch,
}

/// What a connected agent is.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where it connects from.
    pub address: SocketAddr,
    /// Its version of blxrep.
    pub version: String,
}

struct Session {
    /// The key it was begun with.
    key: KeyHash,
    token: [u8; 16],
    orders: mpsc::Sender<ConfigDown>,
    disks: HashMap<DiskId, DiskOffer>,
    /// Stored disks of which another one has taken the place, by the other one's id.
    replaced: HashMap<DiskId, DiskId>,
    /// Who it is, once it was welcomed.
    peer: Option<Peer>,
    cut: watch::Sender<bool>,
}

struct Known {
    shown: Arc<SharedDisk>,
    handle: Option<DiskHandle>,
}

fn own_session<'a>(
    sessions: &'a HashMap<AgentId, Session>,
    agent: &AgentId,
    token: &[u8],
) -> Result<&'a Session, String> {
    let session = sessions.get(agent).filter(|s| subtle::ConstantTimeEq::ct_eq(&s.token[..], token).into());
    session.ok_or_else(|| "this session is over: connect to /ws/config first".to_owned())
}

/// What is known of an agent whether it is connected or not.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// The host's name.
    pub hostname: String,
    /// When it was last connected, in milliseconds since 1970.
    pub last_unix_ms: u64,
}

impl From<&AgentEntry> for Seen {
    fn from(entry: &AgentEntry) -> Self {
        let hostname = entry.footprint.get("hostname").and_then(|name| name.as_str());
        Self { hostname: clean_text(hostname.unwrap_or_default()), last_unix_ms: entry.last_seen_unix_ms }
    }
}

#[derive(Default)]
struct State {
    sessions: HashMap<AgentId, Session>,
    seen: HashMap<AgentId, Seen>,
    /// Why a machine was refused, and when last.
    fenced: HashMap<AgentId, (String, Instant)>,
    disks: HashMap<(AgentId, DiskId), Known>,
}

/// The connected agents and their disks; what a person may order or ask goes through here.
pub struct Registry {
    /// What the disks' threads use.
    pub house: Arc<House>,
    /// The file of the agents that may connect.
    pub agents_file: PathBuf,
    pauses: Pauses,
    stopping: AtomicBool,
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
    /// The stored disk whose place it has taken.
    pub replaces: Option<DiskId>,
}

impl Registry {
    /// Nobody connected.
    pub fn new(house: Arc<House>, agents_file: PathBuf, pauses: Pauses) -> Self {
        Self { house, agents_file, pauses, stopping: AtomicBool::new(false), state: Mutex::default() }
    }

    /// Takes in what is known of an agent.
    pub fn saw(&self, agent: &AgentId, seen: Seen) {
        self.state().seen.insert(agent.clone(), seen);
    }

    /// What is known of the agents that were ever connected.
    pub fn seen(&self) -> HashMap<AgentId, Seen> {
        self.state().seen.clone()
    }

    fn know(&self, state: &mut State, status: DiskStatus) -> Arc<SharedDisk> {
        let key = (status.agent.clone(), status.disk.clone());
        let known = state.disks.entry(key).or_insert_with_key(|(agent, disk)| {
            let shown = Arc::new(SharedDisk::new(status));
            shown.set_paused_by_dispatcher(self.pauses.contains(agent, disk));
            Known { shown, handle: None }
        });
        known.shown.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an agent's place; `None` if it is taken already.
    pub fn enter(self: &Arc<Self>, agent: &AgentId, key: KeyHash, token: [u8; 16]) -> Option<Place> {
        let mut state = self.state();
        if state.sessions.contains_key(agent) {
            return None;
        }
        let (orders_tx, orders) = mpsc::channel(2 * DISKS_MAX);
        let (cut_tx, cut) = watch::channel(false);
        let (disks, replaced) = (HashMap::new(), HashMap::new());
        let session = Session { key, token, orders: orders_tx, disks, replaced, peer: None, cut: cut_tx };
        state.sessions.insert(agent.clone(), session);
        Some(Place { registry: self.clone(), agent: agent.clone(), token, cut, orders })
    }

    /// Lets the disks an agent offers in this session attach; gives those of the agent that are paused here.
    pub fn welcome(&self, agent: &AgentId, peer: Peer, disks: Vec<DiskOffer>) -> Vec<DiskId> {
        let mut state = self.state();
        // What is neither stored nor offered any more is forgotten.
        state.disks.retain(|(of, disk), known| {
            of != agent
                || known.shown.status().newest.is_some()
                || disks.iter().any(|offer| offer.disk == *disk)
        });
        let stored = state.disks.values().map(|known| known.shown.status().clone());
        let stored = stored.filter(|status| status.agent == *agent && status.newest.is_some());
        let stored: Vec<_> = stored.map(|status| (status.disk, status.device)).collect();
        let replaced = disks.iter().filter_map(|offer| {
            change::in_place_of(offer, &disks, &stored).map(|old| (offer.disk.clone(), old))
        });
        let replaced = replaced.collect();
        for offer in &disks {
            let size_bytes = offer.geometry.size_bytes();
            let status = DiskStatus::new(agent.clone(), offer.disk.clone(), offer.device.clone(), size_bytes);
            let shown = self.know(&mut state, status);
            shown.status().device.clone_from(&offer.device);
        }
        if let Some(session) = state.sessions.get_mut(agent) {
            session.peer = Some(peer);
            session.replaced = replaced;
            session.disks = disks.into_iter().map(|offer| (offer.disk.clone(), offer)).collect();
        }
        self.pauses.of(agent)
    }

    /// Takes in which disks an agent's host pauses.
    pub fn paused_by_agent(&self, agent: &AgentId, paused: &[DiskId]) {
        for known in self.state().disks.values().filter(|known| known.shown.agent == *agent) {
            let pause = paused.contains(&known.shown.id);
            let resumed = known.shown.status().paused_by_agent && !pause;
            known.shown.set_paused_by_agent(pause);
            known.tell_resumed(resumed);
        }
    }

    /// Pauses or resumes disks here, durably, and tells their agents; gives those that this changed.
    ///
    /// # Errors
    /// When that cannot be kept.
    pub fn set_paused(
        &self,
        disks: Vec<(AgentId, DiskId)>,
        pause: bool,
    ) -> Result<Vec<(AgentId, DiskId)>, DiskListError> {
        if pause {
            // At once: the file may have to wait for a busy disk.
            self.tell_paused(&disks, |_, _| true);
        }
        let changed = self.pauses.set(disks.iter().cloned(), pause);
        // Not `pause`: another order may have overtaken this one since, or the file could not be written.
        self.tell_paused(&disks, |agent, disk| self.pauses.contains(agent, disk));
        changed
    }

    /// Sets what the disks' threads look at, and tells their agents.
    fn tell_paused(&self, disks: &[(AgentId, DiskId)], is_paused: impl Fn(&AgentId, &DiskId) -> bool) {
        let state = self.state();
        for known in disks.iter().filter_map(|key| state.disks.get(key)) {
            let paused = is_paused(&known.shown.agent, &known.shown.id);
            let resumed = known.shown.status().paused_by_dispatcher && !paused;
            known.shown.set_paused_by_dispatcher(paused);
            known.tell_resumed(resumed);
        }
        for (agent, session) in
            state.sessions.iter().filter(|(agent, _)| disks.iter().any(|(of, _)| of == *agent))
        {
            let own = state.disks.values().map(|known| &known.shown).filter(|shown| shown.agent == *agent);
            let paused =
                own.filter(|shown| shown.status().paused_by_dispatcher).map(|shown| shown.id.clone());
            if session.orders.try_send(ConfigDown::Paused(paused.collect())).is_err() {
                // It hears it when it connects again.
                let _ = session.cut.send(true);
            }
        }
    }

    /// Finds or starts the thread of a disk that was offered in this session.
    ///
    /// # Errors
    /// A sentence if the session is another one, the disk was not offered, or there is no thread to be had.
    pub fn admit(&self, agent: &AgentId, token: &[u8], disk: &DiskId) -> Result<Admitted, String> {
        let mut state = self.state();
        let State { sessions, disks, .. } = &mut *state;
        let session = own_session(sessions, agent, token)?;
        let offer = session.disks.get(disk).ok_or("this disk was not offered in the hello")?;
        let threads = disks.iter().filter(|((of, _), known)| of == agent && known.handle.is_some()).count();
        let known = disks.get_mut(&(agent.clone(), offer.disk.clone()));
        let known = known.ok_or("this disk was not offered in the hello")?;
        let handle = match known.handle.take().filter(|handle| !handle.queue.is_closed()) {
            Some(handle) => handle,
            None if threads >= 2 * DISKS_MAX => {
                return Err("too many different disks since the dispatcher started".to_owned());
            }
            None => self.start(&known.shown).map_err(|e| format!("no thread for the disk: {e}"))?,
        };
        known.handle = Some(handle.clone());
        let replaces = session.replaced.get(disk).cloned();
        Ok(Admitted { disk: handle, orders: session.orders.clone(), cut: session.cut.subscribe(), replaces })
    }

    fn start(&self, shown: &Arc<SharedDisk>) -> std::io::Result<DiskHandle> {
        DiskHandle::spawn(shown.clone(), self.house.clone())
    }

    /// The agents that are connected.
    pub fn agents(&self) -> HashMap<AgentId, Peer> {
        let welcome = |(agent, session): (&AgentId, &Session)| Some((agent.clone(), session.peer.clone()?));
        self.state().sessions.iter().filter_map(welcome).collect()
    }

    /// The agents that hold a place, welcome or not, and the keys they were let in with.
    pub fn present(&self) -> Vec<(AgentId, KeyHash)> {
        self.state().sessions.iter().map(|(agent, session)| (agent.clone(), session.key)).collect()
    }

    /// Notes that a machine was refused under an agent's name; gives whether that is news.
    pub fn fenced(&self, agent: &AgentId, why: &str) -> bool {
        let mut state = self.state();
        let news = state.fenced(agent).is_none_or(|known| known != why);
        state.fenced.insert(agent.clone(), (why.to_owned(), Instant::now()));
        news
    }

    /// Why a machine is refused under an agent's name, if one is and was heard of lately.
    pub fn why_fenced(&self, agent: &AgentId) -> Option<String> {
        self.state().fenced(agent).map(str::to_owned)
    }

    /// A person takes the machine that was refused last under an agent's name for the right one: it goes on at its next
    /// try, and whoever is connected under that name is cut off. False if none was refused. Blocks.
    ///
    /// # Errors
    /// When that cannot be kept.
    pub fn accept_machine(&self, agent: &AgentId) -> std::io::Result<bool> {
        let accepted = self.house.generations.accept(agent)?.is_some();
        if accepted {
            self.state().fenced.remove(agent);
            self.cut(agent);
        }
        Ok(accepted)
    }

    /// A person accepts that a disk shrank or was replaced; its agent is to attach it again at once. Blocks.
    ///
    /// # Errors
    /// When that cannot be kept.
    pub fn accept_disk(&self, agent: &AgentId, disk: &DiskId) -> Result<(), DiskListError> {
        self.house.accepted.add(agent, disk)?;
        self.cut(agent);
        Ok(())
    }

    /// How every disk is doing that is stored or was seen since the dispatcher started.
    pub fn disks(&self) -> Vec<DiskStatus> {
        let sync_every = Some(*self.house.sync_every.borrow());
        let of = |known: &Known| DiskStatus { sync_every, ..known.shown.status().clone() };
        let mut disks: Vec<_> = self.state().disks.values().map(of).collect();
        disks.sort_by(|a, b| (&a.agent, &a.disk).cmp(&(&b.agent, &b.disk)));
        disks
    }

    /// Orders a checkpoint of a disk now, after a compare of the whole disk if that is wanted. The receiver tells what
    /// became of it, and ends if the connection breaks.
    pub async fn sync(
        &self,
        agent: &AgentId,
        disk: &DiskId,
        compare: bool,
    ) -> oneshot::Receiver<Result<CheckpointId, Problem>> {
        let (reply, receiver) = oneshot::channel();
        let handle = self.state().disks.get(&(agent.clone(), disk.clone())).and_then(|d| d.handle.clone());
        match handle {
            // A thread that has ended drops the reply.
            Some(handle) => drop(handle.queue.send(Input::SyncNow { reply, compare }).await),
            None => {
                let text = format!("{agent}'s disk {disk} is not connected: see 'blxctl status'");
                let _ = reply.send(Err(Problem::new(ProblemKind::NotConnected, text)));
            }
        }
        receiver
    }

    /// Ends an agent's session; it may connect again if it is still enrolled.
    pub fn cut(&self, agent: &AgentId) {
        if let Some(session) = self.state().sessions.get(agent) {
            let _ = session.cut.send(true);
        }
    }

    /// Whether the dispatcher ends.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Ends every session and every disk's thread, everything received made durable. Blocks: not for async threads.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        for (agent, _) in self.present() {
            self.cut(&agent);
        }
        let disks: Vec<DiskHandle> =
            self.state().disks.drain().filter_map(|(_, known)| known.handle).collect();
        for disk in &disks {
            let _ = disk.queue.blocking_send(Input::Stop);
        }
        disks.iter().for_each(DiskHandle::join);
    }
}

impl State {
    fn fenced(&self, agent: &AgentId) -> Option<&str> {
        let (why, last) = self.fenced.get(agent)?;
        (last.elapsed() < FENCED_SHOWN).then_some(why)
    }
}

impl Known {
    /// A checkpoint is due when a pause ends.
    fn tell_resumed(&self, resumed: bool) {
        if let (true, Some(handle)) = (resumed, &self.handle) {
            // A full queue means that the disk is at work; its next checkpoint comes in its time.
            let _ = handle.queue.try_send(Input::Resumed);
        }
    }
}
