//! `/ws/config`: an agent's session, from its hello to its end. It says what it has, asks, and takes orders.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blxrep_dbus::problem::ProblemKind;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;
use tracing::{error, info, warn};

use super::fetch::Refusal;
use super::registry::{DISKS_MAX, Peer, Place, Registry, Seen};
use super::server::{Server, turned};
use super::session::check_device_name;
use crate::clock::unix_ms;
use crate::generation::{Generation, Standing};
use crate::ids::AgentId;
use crate::message_id::{AGENT_FENCED, AGENT_LOST};
use crate::restore;
use crate::store::catalogue::{AgentEntry, CatalogueError};
use crate::wire::frame::{decode_message, encode_message};
use crate::wire::message::{
    Answer, ConfigDown, ConfigUp, DiskOffer, QUESTIONS_MAX, Question, ROWS_MAX, clean_text,
};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, pump};
use crate::wire::socket::ServerSocket;

/// The longest footprint, as JSON.
const FOOTPRINT_MAX_BYTES: usize = 512 << 10;
/// How long an agent that is refused may take to hear so.
const FENCED_HEARS: Duration = Duration::from_secs(5);

/// Serves one session until it ends.
pub(super) async fn serve(server: &Arc<Server>, socket: ServerSocket, mut place: Place, peer: SocketAddr) {
    let mut cut = place.cut.clone();
    let (out, outbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
    let (inbox, mut inbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
    let deliver = move |frame| {
        let inbox = inbox.clone();
        async move { inbox.send(frame).await.is_ok() }
    };
    // A task of its own: what is sent below must drain while this loop waits to send. Ends with this function.
    let mut pumping = JoinSet::new();
    pumping.spawn(pump(socket, outbound, deliver));
    let agent = place.agent.clone();
    let mut link = Link {
        server,
        agent: agent.clone(),
        peer,
        out,
        answering: JoinSet::new(),
        stage: Stage::New,
        described: false,
    };
    let end = loop {
        if link.stage == Stage::Fenced {
            // It hangs up when it has heard why.
            let _ = timeout(FENCED_HEARS, pumping.join_next()).await;
            return;
        }
        let handled = tokio::select! {
            end = pumping.join_next() => break end.and_then(Result::ok).map_or(String::new(), |end| end.to_string()),
            () = turned(&mut cut) => break "cut off here".to_owned(),
            Some(frame) = inbound.recv() => link.frame(place.token, &frame).await,
            Some(order) = place.orders.recv() => link.send(order).await,
            Some(_) = link.answering.join_next() => Ok(()),
        };
        if let Err(reason) = handled {
            break reason;
        }
    };
    // The place is free before anything waits for a disk: the agent may be knocking already.
    drop(place);
    if link.stage != Stage::Welcome {
        return warn!(AGENT = %agent, "agent {agent} ({peer}) left before it was welcome: {end}");
    }
    if server.registry.is_stopping() {
        info!(AGENT = %agent, "agent {agent} ({peer}) is let go");
    } else {
        warn!(MESSAGE_ID = AGENT_LOST, AGENT = %agent, "agent {agent} ({peer}) is gone: {end}");
    }
    let registry = server.registry.clone();
    let _ = spawn_blocking(move || note_agent(&registry, &agent, None)).await;
}

struct Link<'a> {
    server: &'a Arc<Server>,
    agent: AgentId,
    peer: SocketAddr,
    out: mpsc::Sender<Vec<u8>>,
    answering: JoinSet<()>,
    stage: Stage,
    described: bool,
}

/// How far a session is.
#[derive(PartialEq)]
enum Stage {
    /// It has said nothing.
    New,
    /// Its hello was good; it is to say that it holds what it was offered.
    Offered { software: String, disks: Vec<DiskOffer> },
    /// It may attach its disks, and ask.
    Welcome,
    /// It was refused.
    Fenced,
}

impl Link<'_> {
    async fn send(&self, message: ConfigDown) -> Result<(), String> {
        send(&self.out, message).await
    }

    async fn frame(&mut self, token: [u8; 16], frame: &[u8]) -> Result<(), String> {
        let (registry, agent) = (&self.server.registry, &self.agent);
        match decode_message(frame).map_err(|e| e.to_string())? {
            ConfigUp::Hello { software, boot_id, disks, generation } if self.stage == Stage::New => {
                self.hello(clean_text(software), clean_text(boot_id), disks, generation).await
            }
            ConfigUp::Hello { .. } => Err("a second hello".to_owned()),
            ConfigUp::Holds(generation) => self.holds(token, generation).await,
            _ if self.stage != Stage::Welcome => Err("a message before the welcome".to_owned()),
            ConfigUp::Footprint(_) if std::mem::replace(&mut self.described, true) => {
                Err("a second footprint".to_owned())
            }
            ConfigUp::Footprint(json) => self.footprint(&json).await,
            ConfigUp::Paused(disks) if disks.len() > DISKS_MAX => {
                Err(format!("an agent has at most {DISKS_MAX} disks to pause"))
            }
            ConfigUp::Paused(disks) => {
                registry.paused_by_agent(agent, &disks);
                Ok(())
            }
            ConfigUp::Ask { .. } if self.answering.len() >= QUESTIONS_MAX => {
                Err("too many questions at once".to_owned())
            }
            ConfigUp::Ask { request, question } => {
                self.answering.spawn(answer(
                    self.server.clone(),
                    agent.clone(),
                    request,
                    question,
                    self.out.clone(),
                ));
                Ok(())
            }
        }
    }

    async fn hello(
        &mut self,
        software: String,
        boot_id: String,
        disks: Vec<DiskOffer>,
        shown: Option<Generation>,
    ) -> Result<(), String> {
        let (agent, peer) = (self.agent.clone(), self.peer);
        if disks.is_empty() || disks.len() > DISKS_MAX {
            return Err(format!("an agent has 1 to {DISKS_MAX} disks, not {}", disks.len()));
        }
        for offer in &disks {
            check_device_name(&offer.device).map_err(|e| e.to_string())?;
        }
        let names: Vec<&str> = disks.iter().map(|offer| offer.device.as_str()).collect();
        let names = names.join(", ");
        info!(AGENT = %agent, "agent {agent} ({peer}) with {names}; blxrep {software}, boot {boot_id}");
        let (registry, of) = (self.server.registry.clone(), agent.clone());
        let decided = spawn_blocking(move || registry.house.generations.hello(&of, shown)).await;
        match decided.map_err(|e| e.to_string())?.map_err(|e| e.to_string())? {
            Ok((standing, offer)) => {
                warn_of(standing, &agent, shown);
                self.stage = Stage::Offered { software, disks };
                self.send(ConfigDown::Offer(offer)).await
            }
            Err(fenced) => {
                let why = format!("the machine at {} is refused: {fenced}", peer.ip());
                if self.server.registry.fenced(&agent, &why) {
                    let advice = format!("if it is the right one: 'blxctl accept {agent}'");
                    error!(MESSAGE_ID = AGENT_FENCED, AGENT = %agent, "agent {agent}: {why}; {advice}");
                }
                self.stage = Stage::Fenced;
                self.send(ConfigDown::Fenced { reason: fenced.to_string() }).await
            }
        }
    }

    /// The agent holds what it was offered: only now nobody else can go on in its place.
    async fn holds(&mut self, token: [u8; 16], held: Generation) -> Result<(), String> {
        let Stage::Offered { software, disks } = std::mem::replace(&mut self.stage, Stage::New) else {
            return Err("a generation without a hello".to_owned());
        };
        let (registry, of) = (self.server.registry.clone(), self.agent.clone());
        let confirmed = spawn_blocking(move || registry.house.generations.confirm(&of, held)).await;
        if !confirmed.map_err(|e| e.to_string())?.map_err(|e| e.to_string())? {
            return Err("it holds a generation that it was not offered".to_owned());
        }
        self.stage = Stage::Welcome;
        let peer = Peer { address: self.peer, version: software };
        let paused = self.server.registry.welcome(&self.agent, peer, disks);
        // First: nothing of a paused disk is to be sent.
        self.send(ConfigDown::Paused(paused)).await?;
        self.send(ConfigDown::Welcome { session: token }).await
    }

    async fn footprint(&self, json: &str) -> Result<(), String> {
        if json.len() > FOOTPRINT_MAX_BYTES {
            return Err("a footprint that is too long".to_owned());
        }
        let footprint =
            serde_json::from_str(json).map_err(|e| format!("a footprint that is no JSON: {e}"))?;
        let (registry, of) = (self.server.registry.clone(), self.agent.clone());
        let kept = spawn_blocking(move || note_agent(&registry, &of, Some(footprint))).await;
        if let Ok(Err(error)) = kept {
            warn!(AGENT = %self.agent, "its footprint is not kept: {}", clean_text(error.to_string()));
        }
        Ok(())
    }
}

fn warn_of(standing: Standing, agent: &AgentId, shown: Option<Generation>) {
    match standing {
        Standing::First | Standing::Known => {}
        Standing::Reinstalled => warn!(
            AGENT = %agent,
            "agent {agent} shows no generation, though one was given out: its state directory is new; its disks are compared"
        ),
        Standing::DispatcherBehind => warn!(
            AGENT = %agent,
            "agent {agent} shows generation {}, which was not given out here: this data directory is an old copy, or a file of generations/ is lost; checkpoints may be missing, the disks are compared",
            shown.map_or(0, |shown| shown.number)
        ),
    }
}

async fn send(out: &mpsc::Sender<Vec<u8>>, message: ConfigDown) -> Result<(), String> {
    let bytes = encode_message(&message).map_err(|e| e.to_string())?;
    // A connection that is gone is noticed by the loop.
    let _ = out.send(bytes).await;
    Ok(())
}

/// Answers one question; only ever about the agent that asks.
async fn answer(
    server: Arc<Server>,
    agent: AgentId,
    request: u32,
    question: Question,
    out: mpsc::Sender<Vec<u8>>,
) {
    let answers = match question {
        Question::Show { disk, start, end } => {
            let _turn = server.shows.acquire().await;
            let data_dir = server.data_dir.clone();
            spawn_blocking(move || show(data_dir, &agent, disk, start, end)).await.unwrap_or_default()
        }
        Question::Sync { disk, compare } => {
            let done = server.registry.sync(&agent, &disk, compare).await.await;
            vec![match done {
                Ok(Ok(id)) => Answer::Synced { id },
                Ok(Err(problem)) => {
                    Answer::Refused { kind: problem.kind, reason: clean_text(problem.message) }
                }
                Err(_) => {
                    let reason = "the connection of the disk broke meanwhile: try again".to_owned();
                    Answer::Refused { kind: ProblemKind::NotConnected, reason }
                }
            }]
        }
    };
    for answer in answers {
        if let Err(error) = send(&out, ConfigDown::Answer { request, answer }).await {
            return warn!("an answer is not sent: {error}");
        }
    }
}

fn show(
    data_dir: PathBuf,
    agent: &AgentId,
    disk: Option<String>,
    start: Option<u64>,
    end: Option<u64>,
) -> Vec<Answer> {
    let mut rows = match restore::show(&data_dir, agent, disk.as_deref(), start, end) {
        Ok(rows) => rows,
        Err(error) => {
            let Refusal { kind, reason, .. } = error.into();
            return vec![Answer::Refused { kind, reason: clean_text(reason) }];
        }
    };
    rows.iter_mut().for_each(|row| row.note = clean_text(std::mem::take(&mut row.note)));
    let mut answers: Vec<Answer> =
        rows.chunks(ROWS_MAX).map(|rows| Answer::Checkpoints { rows: rows.to_vec(), more: true }).collect();
    answers.push(Answer::Checkpoints { rows: Vec::new(), more: false });
    answers
}

/// Keeps that an agent was seen now, and its footprint if it sent one.
fn note_agent(
    registry: &Registry,
    agent: &AgentId,
    footprint: Option<serde_json::Value>,
) -> Result<(), CatalogueError> {
    let (now, catalogue) = (unix_ms(), &registry.house.catalogue);
    let entry = catalogue.agent(agent).ok().flatten();
    let first_seen_unix_ms = entry.as_ref().map_or(now, |entry| entry.first_seen_unix_ms);
    let footprint = footprint.or(entry.map(|entry| entry.footprint)).unwrap_or_default();
    let entry = AgentEntry { footprint, first_seen_unix_ms, last_seen_unix_ms: now };
    registry.saw(agent, Seen::from(&entry));
    catalogue.put_agent(agent, &entry)
}
