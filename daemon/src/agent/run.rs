//! The agent: opens its disks, connects, and stays connected.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tracing::{error, info, warn};

use super::disk::{Disk, INBOX_MAX, Inbound, Worker};
use super::footprint;
use super::link::{Backoff, Dial, keep_attached};
use crate::config::AgentConfig;
use crate::ids::DiskId;
use crate::wire::Endpoint;
use crate::wire::frame::{decode_message, encode_message};
use crate::wire::message::{ConfigDown, ConfigUp, DiskOffer};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, PumpEnd, pump};
use crate::wire::socket::ConnectError;

/// How long an agent that starts waits for another session under its name to end: the other may be its own, cut
/// off a moment ago.
const TAKEN_PATIENCE: Duration = Duration::from_secs(25);

/// Why an agent gives up.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The dispatcher refused this agent, or is not the right one.
    #[error(transparent)]
    Refused(ConnectError),
    /// The dispatcher refused every disk.
    #[error("no disk is left to replicate: {0}")]
    NoDisk(String),
    /// The system gave no thread.
    #[error("a thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
}

struct RunningDisk {
    offer: DiskOffer,
    inbox: mpsc::Sender<Inbound>,
    refused: watch::Receiver<Option<String>>,
    thread: std::thread::JoinHandle<()>,
}

/// Runs until `stop` turns true, or there is nothing left to do.
///
/// # Errors
/// When the dispatcher refuses the agent or all of its disks.
pub async fn run(
    config: Arc<AgentConfig>,
    dial: Dial,
    disks: Vec<Disk>,
    guard_exe: PathBuf,
    mut stop: watch::Receiver<bool>,
) -> Result<(), AgentError> {
    let mut running = Vec::new();
    for disk in disks {
        running.push(start(disk, &config, &guard_exe)?);
    }
    let result = tokio::select! {
        result = stay_connected(&dial, &running) => result,
        reason = all_refused(&running) => Err(AgentError::NoDisk(reason)),
        _ = stop.wait_for(|stop| *stop) => Ok(()),
    };
    for disk in &running {
        let _ = disk.inbox.send(Inbound::Stop).await;
    }
    let joined = spawn_blocking(move || running.into_iter().all(|disk| disk.thread.join().is_ok())).await;
    if !matches!(joined, Ok(true)) {
        error!("a disk's thread panicked");
    }
    result
}

fn start(disk: Disk, config: &Arc<AgentConfig>, guard_exe: &std::path::Path) -> std::io::Result<RunningDisk> {
    let (inbox, from_inbox) = mpsc::channel(INBOX_MAX);
    let (refuse, refused) = watch::channel(None);
    let offer =
        DiskOffer { disk: disk.id.clone(), device: disk.device.name.clone(), geometry: disk.geometry };
    let worker = Worker::new(disk, config.clone(), guard_exe.to_owned(), from_inbox, refuse);
    let name = format!("disk-{}", offer.device);
    let thread = std::thread::Builder::new().name(name).spawn(move || worker.run())?;
    Ok(RunningDisk { offer, inbox, refused, thread })
}

/// Waits until no disk is left; each disk's thread has said in the log why it gave up, when it did.
async fn all_refused(disks: &[RunningDisk]) -> String {
    let mut last = String::new();
    for disk in disks {
        let mut refused = disk.refused.clone();
        let reason = refused.wait_for(Option::is_some).await.map(|reason| reason.clone());
        let reason = reason.ok().flatten().unwrap_or_else(|| "its thread ended".to_owned());
        last = format!("{}: {reason}", disk.offer.device);
    }
    last
}

async fn stay_connected(dial: &Dial, disks: &[RunningDisk]) -> Result<(), AgentError> {
    let footprint = spawn_blocking(|| serde_json::to_string(&footprint::collect()).unwrap_or_default())
        .await
        .unwrap_or_default();
    let began = Instant::now();
    let mut backoff = Backoff::default();
    let mut was_connected = false;
    loop {
        backoff.begin();
        match session(dial, disks, &footprint, &mut was_connected).await {
            Ok(end) => warn!(AGENT = %dial.key.agent, "the dispatcher is gone: {end}; connecting again"),
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

async fn session(
    dial: &Dial,
    disks: &[RunningDisk],
    footprint: &str,
    was_connected: &mut bool,
) -> Result<PumpEnd, ConnectError> {
    let socket = dial.open(Endpoint::Config, &dial.headers()).await?;
    let (out, outbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
    let (inbox, mut inbound) = mpsc::channel::<Vec<u8>>(OUTBOUND_MAX_FRAMES);
    let deliver = |frame| {
        let inbox = inbox.clone();
        async move { inbox.send(frame).await.is_ok() }
    };
    let hello = ConfigUp::Hello {
        software: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        disks: disks.iter().map(|disk| disk.offer.clone()).collect(),
    };
    for message in [hello, ConfigUp::Footprint(footprint.to_owned())] {
        match encode_message(&message) {
            Ok(bytes) => drop(out.send(bytes).await),
            Err(error) => warn!("not sent: {error}"),
        }
    }
    let mut pumping = std::pin::pin!(pump(socket, outbound, deliver));
    let mut links = JoinSet::new();
    loop {
        let frame = tokio::select! {
            end = &mut pumping => return Ok(end),
            Some(frame) = inbound.recv() => frame,
        };
        match decode_message(&frame) {
            Ok(ConfigDown::Welcome { session }) => {
                info!(AGENT = %dial.key.agent, "connected to {}", dial.addr.as_str());
                *was_connected = true;
                links.abort_all();
                for disk in disks {
                    let (dial, id, inbox) = (dial.clone(), disk.offer.disk.clone(), disk.inbox.clone());
                    links.spawn(async move { keep_attached(&dial, session, &id, inbox).await });
                }
            }
            Ok(ConfigDown::Sync { disk }) => order(disks, &disk).await,
            Err(error) => {
                return Err(ConnectError::Protocol {
                    addr: dial.addr.as_str().to_owned(),
                    reason: error.to_string(),
                });
            }
        }
    }
}

async fn order(disks: &[RunningDisk], disk: &DiskId) {
    if let Some(disk) = disks.iter().find(|running| running.offer.disk == *disk) {
        // A disk that was given up takes no orders.
        let _ = disk.inbox.send(Inbound::Sync).await;
    }
}
