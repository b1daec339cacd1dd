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
use tokio::time::sleep;
use tracing::info;

use self::answer::Answering;
pub(super) use self::refusal::Refusal;
use super::server::turned;
use crate::bus::control::Planned;
use crate::ids::AgentId;
use crate::wire::frame::decode_message;
use crate::wire::key::Agents;
use crate::wire::message::{Fetch, RestoreUp};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, pump};
use crate::wire::socket::ServerSocket;

/// Restores of one agent at once: each keeps a thread and the disks busy.
const PER_AGENT_MAX: usize = 4;
/// Questions that wait; more than an agent has open at once, so that it is always read from.
const ASKED_MAX: usize = 32;

/// How long an agent may take to hear of the end.
const HEARS: Duration = Duration::from_secs(5);

/// The restores to agents that are under way.
pub struct Fetches {
    running: Mutex<Running>,
    /// Shows each as a job; where nobody looks they go on all the same.
    begun: mpsc::Sender<Planned>,
}

#[derive(Default)]
struct Running {
    last_id: u64,
    all: HashMap<u64, Fetching>,
}

struct Fetching {
    agent: AgentId,
    of: AgentId,
    /// Ends it.
    cut: watch::Sender<bool>,
}

/// A place among those under way, while the thread lasts.
struct Place<'a> {
    fetches: &'a Fetches,
    id: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.fetches.running().all.remove(&self.id);
    }
}

impl Fetches {
    /// None under way. `begun` is told of each as a job.
    pub fn new(begun: mpsc::Sender<Planned>) -> Self {
        Self { running: Mutex::default(), begun }
    }

    /// Serves one connection until it is closed, or cut.
    pub async fn serve(
        self: &Arc<Self>,
        socket: ServerSocket,
        data_dir: PathBuf,
        agent: AgentId,
        agents: Agents,
    ) {
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
        let (cut, mut is_cut) = watch::channel(false);
        let (fetches, name, to_cut) = (self.clone(), agent.clone(), cut.clone());
        let answering = async move {
            if let Some(RestoreUp::Fetch(wanted)) = asked.recv().await {
                let answering = Answering::new(data_dir, agent, asked, out.clone());
                let _ = spawn_blocking(move || fetches.carry_out(answering, wanted, &agents, to_cut)).await;
            }
            // It hangs up when it has heard of the end; until then the queue has a sender.
            sleep(HEARS).await;
            drop(out);
        };
        tokio::select! {
            end = pump(socket, outbound, deliver) => info!(AGENT = %name, "a fetch ended: {end}"),
            () = answering => {}
            () = turned(&mut is_cut) => info!(AGENT = %name, "a fetch was cut off here"),
        }
    }

    fn carry_out(&self, mut answering: Answering, wanted: Fetch, agents: &Agents, cut: watch::Sender<bool>) {
        let result = match self.enter(answering.agent(), &wanted.agent, agents, cut) {
            // Its place is free when the agent hears of the end.
            Ok(_place) => answering.stream(&wanted, &self.begun),
            Err(refusal) => Err(refusal),
        };
        answering.end(result);
    }

    fn enter(
        &self,
        agent: &AgentId,
        of: &AgentId,
        agents: &Agents,
        cut: watch::Sender<bool>,
    ) -> Result<Place<'_>, Refusal> {
        if !agents.may_fetch(agent, of) {
            return Err(Refusal::not_allowed(agent, of));
        }
        let mut running = self.running();
        if running.all.values().filter(|fetching| fetching.agent == *agent).count() >= PER_AGENT_MAX {
            let reason = format!("{PER_AGENT_MAX} restores of this agent run already: wait for one to end");
            return Err(Refusal::new(ProblemKind::Busy, reason));
        }
        running.last_id += 1;
        let id = running.last_id;
        running.all.insert(id, Fetching { agent: agent.clone(), of: of.clone(), cut });
        Ok(Place { fetches: self, id })
    }

    /// Cuts off whoever may not fetch any more what it fetches.
    pub fn cut_unless_allowed(&self, agents: &Agents) {
        for Fetching { agent, of, cut } in self.running().all.values() {
            if !agents.may_fetch(agent, of) {
                cut.send_replace(true);
            }
        }
    }

    /// Cuts off everybody: they connect again when the dispatcher is back, and go on.
    pub fn cut_all(&self) {
        self.running().all.values().for_each(|fetching| {
            fetching.cut.send_replace(true);
        });
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
