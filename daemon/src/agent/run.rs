//! The agent: opens its disks, connects, and stays connected.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blxrep_dbus::problem::ProblemKind;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tracing::{error, info, warn};

use super::disk::{Disk, INBOX_MAX, Inbound, Worker, offer};
use super::footprint;
use super::held::Held;
use super::link::{Backoff, Dial, keep_attached, spread};
use super::shared::{Ask, Shared, Uplink};
use crate::generation::Generation;
use crate::ids::DiskId;
use crate::message_id::AGENT_FENCED;
use crate::status::SharedDisk;
use crate::wire::Endpoint;
use crate::wire::frame::{decode_message, encode_message};
use crate::wire::message::{Answer, ConfigDown, ConfigUp, DiskOffer, QUESTIONS_MAX, clean_text};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, PumpEnd, pump};
use crate::wire::socket::ConnectError;

/// How long an agent that starts waits for another session under its name to end: the other may be its own, cut
/// off a moment ago.
const TAKEN_PATIENCE: Duration = Duration::from_secs(25);
/// How long an agent that is refused for another machine waits before it asks again, and up to a quarter more: only a
/// person can change the answer.
const FENCED_WAIT: Duration = Duration::from_secs(60);

/// Why an agent gives up.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The dispatcher refused this agent, or is not the right one.
    #[error(transparent)]
    Refused(ConnectError),
    /// The system gave no thread.
    #[error("a thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
}

struct RunningDisk {
    id: DiskId,
    offer: watch::Receiver<DiskOffer>,
    inbox: mpsc::Sender<Inbound>,
    refused: watch::Receiver<bool>,
    thread: std::thread::JoinHandle<()>,
}

/// Runs until `stop` turns true.
///
/// # Errors
/// When the dispatcher refuses the agent.
pub async fn run(
    shared: Arc<Shared>,
    mut asked: mpsc::Receiver<Ask>,
    dial: Dial,
    disks: Vec<Disk>,
    guard_exe: PathBuf,
    mut stop: watch::Receiver<bool>,
) -> Result<(), AgentError> {
    let mut running = Vec::new();
    for (disk, shown) in disks.into_iter().zip(&shared.disks) {
        running.push(start(disk, &shared, shown.clone(), &guard_exe)?);
    }
    let result = tokio::select! {
        result = stay_connected(&shared, &mut asked, &dial, &running) => result,
        _ = stop.wait_for(|stop| *stop) => Ok(()),
    };
    shared.uplink.send_replace(None);
    shared.stopping.store(true, Ordering::Relaxed);
    for disk in &running {
        let _ = disk.inbox.send(Inbound::Stop).await;
    }
    let joined = spawn_blocking(move || running.into_iter().all(|disk| disk.thread.join().is_ok())).await;
    if !matches!(joined, Ok(true)) {
        error!("a disk's thread panicked");
    }
    result
}

fn start(
    disk: Disk,
    shared: &Arc<Shared>,
    shown: Arc<SharedDisk>,
    guard_exe: &std::path::Path,
) -> std::io::Result<RunningDisk> {
    let (inbox, from_inbox) = mpsc::channel(INBOX_MAX);
    let (id, name) = (disk.id.clone(), format!("disk-{}", disk.device.name));
    let (offers, offer) = watch::channel(offer(&disk));
    let (refuse, refused) = watch::channel(false);
    let guard_exe = guard_exe.to_owned();
    let worker = Worker::new(disk, shared.clone(), shown, guard_exe, from_inbox, offers, refuse);
    let thread = std::thread::Builder::new().name(name).spawn(move || worker.run())?;
    Ok(RunningDisk { id, offer, inbox, refused, thread })
}

async fn stay_connected(
    shared: &Shared,
    asked: &mut mpsc::Receiver<Ask>,
    dial: &Dial,
    disks: &[RunningDisk],
) -> Result<(), AgentError> {
    let footprint = spawn_blocking(|| serde_json::to_string(&footprint::collect()).unwrap_or_default())
        .await
        .unwrap_or_default();
    let began = Instant::now();
    let mut backoff = Backoff::default();
    let mut was_connected = false;
    let mut held = Held::new(&shared.config.borrow().state_dir, &shared.agent);
    loop {
        backoff.begin();
        let ended = session(shared, asked, dial, disks, &footprint, &mut held).await;
        was_connected |= shared.uplink.send_replace(None).is_some();
        // Who asked hears that the connection is gone when the question is dropped.
        while asked.try_recv().is_ok() {}
        match ended {
            Ok(End::Gone(end)) => {
                warn!(AGENT = %dial.key.agent, "the dispatcher is gone: {end}; connecting again");
            }
            Ok(End::NotHeld(error)) => warn!(AGENT = %dial.key.agent, "{error}; trying again"),
            Ok(End::Fenced(reason)) => {
                told_fenced(shared, reason);
                tokio::time::sleep(FENCED_WAIT + spread(FENCED_WAIT)).await;
                continue;
            }
            Err(error) => {
                let wait_for_place = was_connected || began.elapsed() < TAKEN_PATIENCE;
                match &error {
                    ConnectError::Fingerprint { .. } => return Err(AgentError::Refused(error)),
                    ConnectError::Refused { status: 409, .. } if wait_for_place => {}
                    ConnectError::Refused { status: 400..500, .. } => return Err(AgentError::Refused(error)),
                    _ => {}
                }
                warn!(AGENT = %dial.key.agent, "{error}; trying again");
            }
        }
        backoff.wait().await;
    }
}

/// Says so once, not at every attempt.
fn told_fenced(shared: &Shared, reason: String) {
    let is_new = shared.fenced.send_if_modified(|known| {
        let is_new = known.as_ref() != Some(&reason);
        *known = Some(reason.clone());
        is_new
    });
    if is_new {
        let agent = &shared.agent;
        error!(
            MESSAGE_ID = AGENT_FENCED, AGENT = %agent,
            "the dispatcher refuses this machine as agent {agent}: {reason}. Changes are tracked on, nothing is sent. If this is \
             the right machine: 'blxctl accept {agent}' on the dispatcher; if it is a copy: enroll it under a name of its own"
        );
    }
}

/// How a session ended.
enum End {
    /// The connection ended.
    Gone(PumpEnd),
    /// Somebody else goes on under this agent's name.
    Fenced(String),
    /// What the agent holds cannot be read or kept.
    NotHeld(std::io::Error),
}

/// One connection to /ws/config, from the hello to its end.
struct Session<'a> {
    shared: &'a Shared,
    dial: &'a Dial,
    disks: &'a [RunningDisk],
    out: mpsc::Sender<Vec<u8>>,
    held: &'a mut Held,
    footprint: &'a str,
    is_welcome: bool,
    links: JoinSet<()>,
    last_request: u32,
    open: HashMap<u32, mpsc::Sender<Answer>>,
}

async fn session(
    shared: &Shared,
    asked: &mut mpsc::Receiver<Ask>,
    dial: &Dial,
    disks: &[RunningDisk],
    footprint: &str,
    held: &mut Held,
) -> Result<End, ConnectError> {
    let generation = match held.load().await {
        Ok(generation) => generation,
        Err(error) => return Ok(End::NotHeld(error)),
    };
    let socket = dial.open(Endpoint::Config, &dial.headers()).await?;
    let (out, outbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
    let (inbox, mut inbound) = mpsc::channel::<Vec<u8>>(OUTBOUND_MAX_FRAMES);
    let deliver = move |frame| {
        let inbox = inbox.clone();
        async move { inbox.send(frame).await.is_ok() }
    };
    // A task of its own: what is sent below must drain while this loop waits to send. Ends with this function.
    let mut pumping = JoinSet::new();
    pumping.spawn(pump(socket, outbound, deliver));
    let mut paused = shared.paused.subscribe();
    let (links, open) = (JoinSet::new(), HashMap::new());
    let (is_welcome, last_request) = (false, 0);
    let mut session =
        Session { shared, dial, disks, out, held, footprint, is_welcome, links, last_request, open };
    session.send(&hello(disks, generation)).await;
    paused.mark_changed();
    loop {
        let welcome = session.is_welcome;
        tokio::select! {
            end = pumping.join_next() => {
                return Ok(End::Gone(end.and_then(Result::ok).unwrap_or(PumpEnd::Closed)));
            }
            Some(frame) = inbound.recv() => {
                if let Some(end) = session.frame(&frame).await? {
                    return Ok(end);
                }
            }
            Some(kept) = session.held.kept() => match kept {
                Ok(generation) => session.send(&ConfigUp::Holds(generation)).await,
                Err(error) => return Ok(End::NotHeld(error)),
            },
            Some(ask) = asked.recv() => session.ask(ask).await,
            Ok(()) = paused.changed(), if welcome => {
                let paused = paused.borrow_and_update().clone();
                session.send(&ConfigUp::Paused(paused)).await;
            }
        }
    }
}

fn hello(disks: &[RunningDisk], generation: Option<Generation>) -> ConfigUp {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    ConfigUp::Hello {
        software: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: boot_id.trim().to_owned(),
        disks: disks.iter().map(|disk| disk.offer.borrow().clone()).collect(),
        generation,
    }
}

impl Session<'_> {
    async fn send(&self, message: &ConfigUp) {
        match encode_message(message) {
            // A connection that is gone is noticed by the loop.
            Ok(bytes) => drop(self.out.send(bytes).await),
            Err(error) => warn!(AGENT = %self.shared.agent, "not sent: {error}"),
        }
    }

    async fn ask(&mut self, ask: Ask) {
        self.open.retain(|_, answers| !answers.is_closed());
        if self.open.len() >= QUESTIONS_MAX {
            let reason = "too much is being asked at once: try again".to_owned();
            let _ = ask.answers.try_send(Answer::Refused { kind: ProblemKind::Busy, reason });
            return;
        }
        self.last_request = self.last_request.wrapping_add(1);
        let request = self.last_request;
        self.open.insert(request, ask.answers);
        self.send(&ConfigUp::Ask { request, question: ask.question }).await;
    }

    /// Takes in one frame; gives the session's end if it is one.
    async fn frame(&mut self, frame: &[u8]) -> Result<Option<End>, ConnectError> {
        let message = decode_message(frame).map_err(|error| {
            let (addr, reason) = (self.dial.addr.as_str().to_owned(), error.to_string());
            ConnectError::Protocol { addr, reason }
        })?;
        match message {
            ConfigDown::Offer(generation) => self.held.keep(generation),
            ConfigDown::Fenced { reason } => return Ok(Some(End::Fenced(clean_text(reason)))),
            ConfigDown::Welcome { session } => self.welcome(session).await,
            ConfigDown::Sync { disk, compare } => self.order(&disk, compare).await,
            ConfigDown::Paused(disks) => self.shared.paused_by_dispatcher(&disks),
            ConfigDown::Answer { request, answer } => self.answer(request, answer),
        }
        Ok(None)
    }

    async fn welcome(&mut self, session: [u8; 16]) {
        let address = self.dial.addr.as_str().to_owned();
        info!(AGENT = %self.shared.agent, "connected to {address}");
        self.is_welcome = true;
        self.shared.fenced.send_replace(None);
        self.send(&ConfigUp::Footprint(self.footprint.to_owned())).await;
        self.shared.uplink.send_replace(Some(Uplink { session, address }));
        self.links.abort_all();
        for disk in self.disks {
            let (dial, id, inbox) = (self.dial.clone(), disk.id.clone(), disk.inbox.clone());
            let refused = disk.refused.clone();
            self.links.spawn(async move { keep_attached(&dial, session, &id, inbox, refused).await });
        }
    }

    async fn order(&self, disk: &DiskId, compare: bool) {
        if let Some(disk) = self.disks.iter().find(|running| running.id == *disk) {
            // A thread that ends takes no orders.
            let order = if compare { Inbound::Compare } else { Inbound::Sync };
            let _ = disk.inbox.send(order).await;
        }
    }

    fn answer(&mut self, request: u32, answer: Answer) {
        let more = matches!(answer, Answer::Checkpoints { more: true, .. });
        // Who does not take answers fast enough loses the question, and notices.
        let taken = self.open.get(&request).is_some_and(|answers| answers.try_send(answer).is_ok());
        if !more || !taken {
            self.open.remove(&request);
        }
    }
}
