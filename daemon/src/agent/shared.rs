//! What the disks' threads, the connection to the dispatcher and those who ask on this host share.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use blxrep_dbus::problem::{Problem, ProblemKind};
use tokio::sync::{broadcast, mpsc, watch};

use super::unfinished::Unfinished;
use crate::config::AgentConfig;
use crate::disk_list::DiskListError;
use crate::freeze::alone::Alone;
use crate::ids::{AgentId, DiskId};
use crate::pause::Pauses;
use crate::status::{CheckpointAdded, SharedDisk};
use crate::watchdog::Watchdog;
use crate::wire::message::{Answer, Question};

/// Questions waiting for the connection.
const ASKS_MAX: usize = 16;
/// Answers to one question waiting for who asked.
const ANSWERS_MAX: usize = 128;

/// A question on its way, and where its answers go.
pub struct Ask {
    /// The question.
    pub question: Question,
    /// Takes the answers; dropped when there are no more, or the connection is gone.
    pub answers: mpsc::Sender<Answer>,
}

/// The connection to the dispatcher, while there is one.
#[derive(Debug, Clone)]
pub struct Uplink {
    /// The session's token.
    pub session: [u8; 16],
    /// Where the dispatcher is.
    pub address: String,
}

/// See the module.
pub struct Shared {
    /// This agent.
    pub agent: AgentId,
    /// The configuration; changes when it is read again.
    pub config: watch::Sender<Arc<AgentConfig>>,
    /// The disks.
    pub disks: Vec<Arc<SharedDisk>>,
    /// The connection.
    pub uplink: watch::Sender<Option<Uplink>>,
    /// Why the dispatcher lets somebody else go on under this agent's name, if it does.
    pub fenced: watch::Sender<Option<String>>,
    /// The disks paused on this host, for the dispatcher.
    pub paused: watch::Sender<Vec<DiskId>>,
    /// Tells of every checkpoint.
    pub checkpoints: broadcast::Sender<CheckpointAdded>,
    /// Watches the loops.
    pub watchdog: Watchdog,
    /// Whether the agent ends.
    pub stopping: AtomicBool,
    /// The devices of this host that hold a part of a restore.
    pub unfinished: Unfinished,
    pauses: Pauses,
    asks: mpsc::Sender<Ask>,
}

impl Shared {
    /// Nothing connected yet. The receiver is the connection's.
    pub fn new(
        config: AgentConfig,
        disks: Vec<Arc<SharedDisk>>,
        pauses: Pauses,
        unfinished: Unfinished,
        watchdog: Watchdog,
    ) -> (Self, mpsc::Receiver<Ask>) {
        let (asks, asked) = mpsc::channel(ASKS_MAX);
        let agent = config.id.clone();
        for disk in &disks {
            disk.set_paused_by_agent(pauses.contains(&agent, &disk.id));
        }
        let shared = Self {
            config: watch::Sender::new(Arc::new(config)),
            disks,
            uplink: watch::Sender::new(None),
            fenced: watch::Sender::new(None),
            paused: watch::Sender::new(pauses.of(&agent)),
            checkpoints: broadcast::Sender::new(256),
            watchdog,
            stopping: AtomicBool::new(false),
            unfinished,
            pauses,
            asks,
            agent,
        };
        (shared, asked)
    }

    /// Pauses or resumes disks on this host, durably; gives those that this changed.
    ///
    /// # Errors
    /// When that cannot be kept.
    pub fn set_paused(&self, disks: &[DiskId], pause: bool) -> Result<Vec<(AgentId, DiskId)>, DiskListError> {
        let meant = || self.disks.iter().filter(|disk| disks.contains(&disk.id));
        if pause {
            // At once: the file may have to wait for a freeze.
            meant().for_each(|disk| disk.set_paused_by_agent(true));
        }
        // Also one order at a time: the flags follow the file.
        let _alone = Alone::take();
        let named = disks.iter().map(|disk| (self.agent.clone(), disk.clone()));
        let changed = self.pauses.set(named, pause);
        meant().for_each(|disk| disk.set_paused_by_agent(self.pauses.contains(&self.agent, &disk.id)));
        self.paused.send_replace(self.pauses.of(&self.agent));
        changed
    }

    /// Takes in which disks are paused on the dispatcher.
    pub fn paused_by_dispatcher(&self, paused: &[DiskId]) {
        for disk in &self.disks {
            disk.set_paused_by_dispatcher(paused.contains(&disk.id));
        }
    }

    /// Asks the dispatcher; the answers come from the receiver, which ends early if the connection breaks.
    ///
    /// # Errors
    /// NotConnected; Busy if too much is being asked.
    pub fn ask(&self, question: Question) -> Result<mpsc::Receiver<Answer>, Problem> {
        if self.uplink.borrow().is_none() {
            return Err(not_connected());
        }
        let (answers, receiver) = mpsc::channel(ANSWERS_MAX);
        let busy = |_| Problem::new(ProblemKind::Busy, "too much is being asked at once: try again");
        self.asks.try_send(Ask { question, answers }).map_err(busy)?;
        Ok(receiver)
    }
}

/// That there is no connection to the dispatcher, or not any more.
pub fn not_connected() -> Problem {
    let text =
        "this agent is not connected to its dispatcher: see 'blxctl status' and 'journalctl -u blxrep-agent'";
    Problem::new(ProblemKind::NotConnected, text)
}
