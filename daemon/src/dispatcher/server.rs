//! Listens, admits connections and joins them to the registry.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::spawn_blocking;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use super::config_link;
use super::disk::Input;
use super::fetch::{self, Fetches};
use super::registry::{Admitted, Place, Registry};
use crate::ids::{AgentId, DiskId};
use crate::wire::Endpoint;
use crate::wire::header;
use crate::wire::key::{Agents, Secret, unhex};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, pump};
use crate::wire::socket::{Refusal, ServerSocket, Upgrade, accept};

/// Connections at once, the unfinished ones counted.
const CONNECTIONS_MAX: usize = 2048;
/// How often the agents file is looked at while agents are connected.
const AGENTS_CHECK: Duration = Duration::from_secs(2);

/// What a connection needs.
pub struct Server {
    /// Who is connected.
    pub registry: Arc<Registry>,
    /// The data directory, for showing checkpoints.
    pub data_dir: PathBuf,
    /// TLS.
    pub acceptor: TlsAcceptor,
    /// Questions for checkpoints that are answered at once; each reads a whole chain.
    pub shows: Semaphore,
    /// The restores to agents.
    pub fetches: Arc<Fetches>,
}

enum Entry {
    Config(Place),
    Disk(Box<Admitted>, u64),
    Restore(fetch::Place),
}

impl Server {
    /// Accepts connections until `stop` turns true; restores to agents are cut off then.
    ///
    /// # Errors
    /// When the listener itself fails.
    pub async fn run(
        self: Arc<Self>,
        listener: TcpListener,
        mut stop: watch::Receiver<bool>,
    ) -> io::Result<()> {
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        tokio::spawn(watch_agents(self.clone(), stop.clone()));
        loop {
            let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = turned(&mut stop) => {
                    self.fetches.cut_all();
                    return Ok(());
                }
            };
            match accepted {
                Ok((tcp, peer)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        server.connection(tcp, peer).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    // Out of file descriptors or memory: connections that end make room.
                    warn!("a connection cannot be accepted: {error}");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, tcp: TcpStream, peer: SocketAddr) {
        let agents_file = self.registry.agents_file.clone();
        let agents = match spawn_blocking(move || Agents::load(&agents_file)).await {
            Ok(Ok(agents)) => agents,
            Ok(Err(error)) => return warn!("nobody is admitted: {error}"),
            Err(_) => return,
        };
        let admit = |upgrade: &Upgrade| self.admit(&agents, upgrade);
        let (socket, endpoint, entry) = match accept(tcp, &self.acceptor, peer.ip(), admit).await {
            Ok(accepted) => accepted,
            Err(error) => return warn!("{peer}: {error}"),
        };
        debug!("{peer}: connected to {endpoint}");
        match entry {
            Entry::Config(place) => config_link::serve(&self, socket, place, peer).await,
            Entry::Disk(admitted, link) => disk(socket, endpoint, *admitted, link, peer).await,
            Entry::Restore(place) => fetch::serve(socket, place).await,
        }
    }

    fn admit(&self, agents: &Agents, upgrade: &Upgrade) -> Result<Entry, Refusal> {
        let refuse = |status, reason: String| {
            let who = upgrade.header(header::AGENT).unwrap_or("?").escape_default().to_string();
            warn!(AGENT = %who, "refused on {}: {reason}", upgrade.endpoint);
            Refusal { status, reason }
        };
        let agent = upgrade.header(header::AGENT).unwrap_or_default().parse::<AgentId>();
        let agent = agent.map_err(|e| refuse(400, e.to_string()))?;
        let secret = upgrade.bearer().and_then(Secret::from_hex);
        let Some(key) = secret.and_then(|secret| agents.accept(&agent, &secret)) else {
            // Which of the two it is, is nobody's business but the dispatcher's operator's.
            let known = agents.contains(&agent);
            let why = if known { "its secret is wrong" } else { "it is not in the agents file" };
            let _ = refuse(401, format!("agent {agent}: {why}"));
            let reason = format!(
                "agent {agent} is not enrolled with this key: run 'blxrep enroll {agent}' on the dispatcher"
            );
            return Err(Refusal { status: 401, reason });
        };
        if upgrade.endpoint == Endpoint::Config {
            let token = random_token().map_err(|e| refuse(500, e.to_string()))?;
            let place = self.registry.enter(&agent, key, token);
            let taken = || {
                let why =
                    "is connected already: do two machines have its key? Enroll each under a name of its own";
                refuse(409, format!("agent {agent} {why}"))
            };
            return place.map(Entry::Config).ok_or_else(taken);
        }
        if upgrade.endpoint == Endpoint::Restore {
            let place = self.fetches.enter(&agent, key);
            return place.map(Entry::Restore).map_err(|reason| refuse(503, reason));
        }
        let token = upgrade.header(header::SESSION).and_then(unhex::<16>).unwrap_or_default();
        let disk = upgrade.header(header::DISK).unwrap_or_default().parse::<DiskId>();
        let disk = disk.map_err(|e| refuse(400, e.to_string()))?;
        let admitted = self.registry.admit(&agent, &token, &disk).map_err(|e| refuse(403, e))?;
        let link = upgrade.header(header::LINK).and_then(|link| link.parse().ok());
        let link = link.ok_or_else(|| refuse(400, "no link number".to_owned()))?;
        Ok(Entry::Disk(Box::new(admitted), link))
    }
}

async fn disk(socket: ServerSocket, endpoint: Endpoint, admitted: Admitted, number: u64, peer: SocketAddr) {
    let Admitted { disk, orders, mut cut, replaces } = admitted;
    let (out, outbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
    if disk.queue.send(Input::LinkUp { number, endpoint, out, orders, replaces }).await.is_err() {
        return;
    }
    let deliver = |frame| {
        let queue = disk.queue.clone();
        async move { queue.send(Input::Frame(number, endpoint, frame)).await.is_ok() }
    };
    let end = tokio::select! {
        end = pump(socket, outbound, deliver) => end.to_string(),
        () = turned(&mut cut) => "the session ended".to_owned(),
    };
    debug!("{peer}: {endpoint} ended: {end}");
    let _ = disk.queue.send(Input::LinkDown(number)).await;
}

/// Waits until a switch turns true; a switch that is gone has turned.
pub(super) async fn turned(switch: &mut watch::Receiver<bool>) {
    let _ = switch.wait_for(|on| *on).await;
}

async fn watch_agents(server: Arc<Server>, mut stop: watch::Receiver<bool>) {
    let registry = &server.registry;
    loop {
        tokio::select! {
            () = tokio::time::sleep(AGENTS_CHECK) => {}
            () = turned(&mut stop) => return,
        }
        let path = registry.agents_file.clone();
        let Ok(Ok(agents)) = spawn_blocking(move || Agents::load(&path)).await else { continue };
        for (agent, _) in registry.present().into_iter().filter(|(agent, key)| !agents.has(agent, *key)) {
            warn!(AGENT = %agent, "agent {agent}'s key is not in the agents file any more: cut off");
            registry.cut(&agent);
        }
        server.fetches.cut_unless_allowed(&agents);
    }
}

fn random_token() -> Result<[u8; 16], getrandom::Error> {
    let mut token = [0; 16];
    getrandom::fill(&mut token)?;
    Ok(token)
}
