//! The two connections of one disk: kept up while the agent's session lasts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsConnector;
use tracing::{debug, warn};

use super::disk::Inbound;
use crate::config::value::DispatcherAddr;
use crate::ids::DiskId;
use crate::wire::key::{AgentKey, hex};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, PumpEnd, pump};
use crate::wire::socket::{ClientSocket, ConnectError, connect};
use crate::wire::{Endpoint, header};

/// Numbers of attachments; unique in the life of the process, which is all the dispatcher needs to pair them.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// What a connection to the dispatcher needs.
#[derive(Clone)]
pub struct Dial {
    /// Where to.
    pub addr: DispatcherAddr,
    /// Who we are.
    pub key: AgentKey,
    /// TLS with the pinned certificate.
    pub connector: TlsConnector,
}

impl Dial {
    /// The headers that prove who we are.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        vec![
            (header::AGENT, self.key.agent.to_string()),
            ("authorization", format!("Bearer {}", self.key.secret.to_hex())),
        ]
    }

    /// Connects to an endpoint.
    ///
    /// # Errors
    /// When the dispatcher cannot be reached or refuses.
    pub async fn open(
        &self,
        endpoint: Endpoint,
        headers: &[(&'static str, String)],
    ) -> Result<ClientSocket, ConnectError> {
        connect(self.addr.as_str(), &self.connector, endpoint, headers).await
    }
}

/// Times between attempts: doubled after each that failed soon.
pub struct Backoff {
    wait: Duration,
    began: Instant,
}

const SHORTEST: Duration = Duration::from_millis(300);
const LONGEST: Duration = Duration::from_secs(15);
/// How long a refused disk waits before it is tried again, and up to a quarter more.
const REFUSED_WAIT: Duration = Duration::from_secs(600);
/// What lasted this long counts as a success.
const LASTED: Duration = Duration::from_secs(20);

/// A dispatcher that refuses a disk closes both connections, and says why on live: that may come behind the end of the other.
const LAST_WORD: Duration = Duration::from_secs(1);

impl Default for Backoff {
    fn default() -> Self {
        Self { wait: SHORTEST, began: Instant::now() }
    }
}

impl Backoff {
    /// An attempt begins.
    pub fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// The attempt ended: waits before the next.
    pub async fn wait(&mut self) {
        if self.began.elapsed() >= LASTED {
            self.wait = SHORTEST;
        }
        tokio::time::sleep(self.wait + spread(self.wait)).await;
        self.wait = (self.wait * 2).min(LONGEST);
    }
}

/// Up to a quarter of a wait, so that many agents do not come back in step.
pub(super) fn spread(wait: Duration) -> Duration {
    wait * u32::from(getrandom::u32().unwrap_or(0) as u8) / 1024
}

/// Keeps a disk attached. Ends only by being dropped, with the session. A disk that is refused until a person has acted is
/// tried again now and then; a new session tries at once.
pub async fn keep_attached(
    dial: &Dial,
    session: [u8; 16],
    disk: &DiskId,
    inbox: mpsc::Sender<Inbound>,
    refused: watch::Receiver<bool>,
) {
    let mut backoff = Backoff::default();
    loop {
        backoff.begin();
        match attach(dial, session, disk, &inbox).await {
            Ok(end) => debug!(DISK = %disk, "detached: {end}"),
            Err(error) => warn!(DISK = %disk, "{error}"),
        }
        if inbox.is_closed() {
            // The agent ends.
            return;
        }
        // First: the refusal may still be on its way to the disk's thread.
        backoff.wait().await;
        if *refused.borrow() {
            tokio::time::sleep(REFUSED_WAIT + spread(REFUSED_WAIT)).await;
        }
    }
}

async fn attach(
    dial: &Dial,
    session: [u8; 16],
    disk: &DiskId,
    inbox: &mpsc::Sender<Inbound>,
) -> Result<PumpEnd, ConnectError> {
    let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
    let mut headers = dial.headers();
    headers.push((header::SESSION, hex(&session)));
    headers.push((header::DISK, disk.to_string()));
    headers.push((header::LINK, number.to_string()));
    let snapshot = dial.open(Endpoint::Snapshot, &headers).await?;
    let live = dial.open(Endpoint::Live, &headers).await?;

    let (snapshot_out, snapshot_frames) = mpsc::channel(OUTBOUND_MAX_FRAMES);
    let (live_out, live_frames) = mpsc::channel(OUTBOUND_MAX_FRAMES);
    let deliver = |endpoint| {
        move |bytes| async move { inbox.send(Inbound::Frame(number, endpoint, bytes)).await.is_ok() }
    };
    if inbox.send(Inbound::LinkUp { number, snapshot: snapshot_out, live: live_out }).await.is_err() {
        return Ok(PumpEnd::Undeliverable);
    }
    let _tell = LinkDown { number, inbox: inbox.clone() };
    let mut live = std::pin::pin!(pump(live, live_frames, deliver(Endpoint::Live)));
    Ok(tokio::select! {
        end = pump(snapshot, snapshot_frames, deliver(Endpoint::Snapshot)) => {
            let _ = tokio::time::timeout(LAST_WORD, live).await;
            end
        }
        end = &mut live => end,
    })
}

/// Tells the disk that its connections are gone, however that came about.
struct LinkDown {
    number: u64,
    inbox: mpsc::Sender<Inbound>,
}

impl Drop for LinkDown {
    fn drop(&mut self) {
        let (number, inbox) = (self.number, self.inbox.clone());
        // A full queue is no reason to forget this.
        tokio::spawn(async move { inbox.send(Inbound::LinkDown(number)).await });
    }
}
