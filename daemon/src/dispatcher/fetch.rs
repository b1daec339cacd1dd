//! `/ws/restore`: gives an agent checkpoints back: of any disk that is stored under its id, offered in a session or not, for on
//! the worst day the disk is a new one, and of other agents where a person let it in the agents file.
//!
//! Such a connection needs the agent's key and no session: a rescue system has none, and a live agent of that name goes
//! on beside it. What must never happen here: a byte or a name told of an agent whose checkpoints this one may not fetch.

mod answer;
mod refusal;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blxrep_dbus::problem::ProblemKind;
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use self::answer::Answering;
pub(super) use self::refusal::Refusal;
use super::server::turned;
use crate::bus::control::Planned;
use crate::ids::AgentId;
use crate::wire::frame::decode_message;
use crate::wire::key::{Agents, KeyHash};
use crate::wire::message::{Fetch, RestoreUp};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, pump};
use crate::wire::socket::ServerSocket;

/// Restores of one agent at once: each keeps a thread and the disks busy.
const PER_AGENT_MAX: usize = 4;
/// Connections of one agent at once, with those that have asked for nothing yet and those that are about to end.
const CONNECTIONS_MAX: usize = 2 * PER_AGENT_MAX;
/// Questions that wait; more than an agent has open at once, so that it is always read from.
const ASKED_MAX: usize = 32;

/// How long an agent may take to say what it wants.
const ASKS: Duration = Duration::from_secs(15);
/// How long an agent may take to hear of the end.
const HEARS: Duration = Duration::from_secs(5);

/// The restores to agents that are under way.
pub struct Fetches {
    data_dir: PathBuf,
    agents_file: PathBuf,
    connected: Mutex<Connected>,
    /// Shows each as a job; where nobody looks they go on all the same.
    begun: mpsc::Sender<Planned>,
}

#[derive(Default)]
struct Connected {
    last_id: u64,
    all: HashMap<u64, Connection>,
}

struct Connection {
    agent: AgentId,
    /// The key it was let in with.
    key: KeyHash,
    /// Whose checkpoint it is given, while it is.
    of: Option<AgentId>,
    /// Ends it.
    cut: watch::Sender<bool>,
}

/// A place among the connections, while one is up or its thread still works.
pub struct Place {
    fetches: Arc<Fetches>,
    id: u64,
    agent: AgentId,
    key: KeyHash,
    cut: watch::Receiver<bool>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.fetches.connected().all.remove(&self.id);
    }
}

impl Fetches {
    /// None under way. `begun` is told of each as a job.
    pub fn new(data_dir: PathBuf, agents_file: PathBuf, begun: mpsc::Sender<Planned>) -> Self {
        Self { data_dir, agents_file, connected: Mutex::default(), begun }
    }

    /// Gives a place to an agent that has proven to hold this key.
    ///
    /// # Errors
    /// A sentence if it has too many.
    pub fn enter(self: &Arc<Self>, agent: &AgentId, key: KeyHash) -> Result<Place, String> {
        let mut connected = self.connected();
        if connected.all.values().filter(|of| of.agent == *agent).count() >= CONNECTIONS_MAX {
            return Err(format!(
                "agent {agent} has {CONNECTIONS_MAX} connections for restores: wait for one to end"
            ));
        }
        connected.last_id += 1;
        let (id, agent, (to_cut, cut)) = (connected.last_id, agent.clone(), watch::channel(false));
        connected.all.insert(id, Connection { agent: agent.clone(), key, of: None, cut: to_cut });
        Ok(Place { fetches: self.clone(), id, agent, key, cut })
    }

    /// Cuts off whoever may not be connected any more, or not fetch any more what it fetches.
    pub fn cut_unless_allowed(&self, agents: &Agents) {
        for Connection { agent, key, of, cut } in self.connected().all.values() {
            let may_fetch = of.as_ref().is_none_or(|of| agents.may_fetch(agent, of));
            if !may_fetch || !agents.has(agent, *key) {
                cut.send_replace(true);
            }
        }
    }

    /// Cuts off everybody: they connect again when the dispatcher is back, and go on.
    pub fn cut_all(&self) {
        self.connected().all.values().for_each(|connection| {
            connection.cut.send_replace(true);
        });
    }

    fn connected(&self) -> MutexGuard<'_, Connected> {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves one connection until it is closed, or cut.
pub(super) async fn serve(socket: ServerSocket, place: Place) {
    let (out, outbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
    let (inbox, mut asked) = mpsc::channel(ASKED_MAX);
    let deliver = move |frame: Vec<u8>| {
        let inbox = inbox.clone();
        async move {
            let Ok(message) = decode_message::<RestoreUp>(&frame) else { return false };
            // Behind the end it is read and not heard: an agent that still asks is to hear of the end.
            let _ = inbox.send(message).await;
            true
        }
    };
    let (name, mut is_cut, place) = (place.agent.clone(), place.cut.clone(), Arc::new(place));
    let answering = async {
        let Ok(Some(RestoreUp::Fetch(wanted))) = timeout(ASKS, asked.recv()).await else {
            return "it did not say what to fetch";
        };
        let (place, answering) = (place.clone(), Answering::new(place.agent.clone(), asked, out.clone()));
        let _ = spawn_blocking(move || place.carry_out(answering, wanted)).await;
        // It hangs up when it has heard of the end; until then the queue has a sender.
        sleep(HEARS).await;
        "it does not hang up"
    };
    tokio::select! {
        end = pump(socket, outbound, deliver) => info!(AGENT = %name, "a fetch ended: {end}"),
        end = answering => info!(AGENT = %name, "a fetch ended: {end}"),
        () = turned(&mut is_cut) => info!(AGENT = %name, "a fetch was cut off here"),
    }
}

impl Place {
    fn carry_out(&self, mut answering: Answering, wanted: Fetch) {
        let Fetches { data_dir, begun, .. } = &*self.fetches;
        let result = self.begin(&wanted.agent).and_then(|()| answering.stream(data_dir, &wanted, begun));
        // The next one may begin when the agent hears of the end.
        self.is_given(None);
        answering.end(result);
    }

    /// Looks whether what is of `of` may be fetched: now, for the connection may have come long ago.
    fn begin(&self, of: &AgentId) -> Result<(), Refusal> {
        let Self { fetches, agent, key, .. } = self;
        let agents = Agents::load(&fetches.agents_file).map_err(|error| {
            warn!(AGENT = %agent, "a fetch is refused: {error}");
            Refusal::new(ProblemKind::Busy, "the dispatcher cannot read its agents file: see its journal")
        })?;
        if !agents.has(agent, *key) {
            return Err(Refusal::new(ProblemKind::Refused, "this agent's key is not enrolled any more"));
        }
        if !agents.may_fetch(agent, of) {
            return Err(Refusal::not_allowed(agent, of));
        }
        if !self.is_given(Some(of)) {
            let reason = format!("{PER_AGENT_MAX} restores of this agent run already: wait for one to end");
            return Err(Refusal::new(ProblemKind::Busy, reason));
        }
        Ok(())
    }

    /// Notes whose checkpoint this connection is given; false if too many of this agent are given one.
    fn is_given(&self, of: Option<&AgentId>) -> bool {
        let mut connected = self.fetches.connected();
        let given = connected.all.values().filter(|other| other.agent == self.agent && other.of.is_some());
        let has_room = of.is_none() || given.count() < PER_AGENT_MAX;
        if let (true, Some(own)) = (has_room, connected.all.get_mut(&self.id)) {
            own.of = of.cloned();
        }
        has_room
    }
}
