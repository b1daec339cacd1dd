//! `blxrep start --mode dispatcher`.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use blxrep::accept::Accepted;
use blxrep::config::{DispatcherConfig, Settings};
use blxrep::dispatcher::control::DispatcherControl;
use blxrep::dispatcher::fetch::Fetches;
use blxrep::dispatcher::generations::Generations;
use blxrep::dispatcher::registry::{House, Registry};
use blxrep::dispatcher::scrub::{self, Running, Scrub};
use blxrep::dispatcher::server::Server;
use blxrep::ids::Epoch;
use blxrep::lock::DirLock;
use blxrep::pause::Pauses;
use blxrep::status::DiskState;
use blxrep::store::catalogue::{Catalogue, Origin};
use blxrep::store::files::RealFiles;
use blxrep::watchdog::Watchdog;
use blxrep::wire::key::Agents;
use blxrep::wire::tls::Identity;
use blxrep_dbus::JOBS_MAX;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, broadcast, mpsc, watch};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::service;

/// Agents' questions for checkpoints that are answered at once.
const SHOWS_MAX: usize = 16;
/// Every restore to an agent holds a thread for as long as it takes; admitting connections needs some as well.
const BLOCKING_THREADS_MAX: usize = 4096;

/// Runs until SIGTERM or SIGINT.
pub(crate) fn run(
    settings: Settings,
    file: &Path,
    reread: impl Fn() -> super::Reread + Send + 'static,
) -> anyhow::Result<()> {
    let config = DispatcherConfig::new(settings, file)?;
    let data_dir = &config.data_dir;
    let made = fs::DirBuilder::new().recursive(true).mode(0o750).create(data_dir);
    made.with_context(|| format!("the data directory {}", data_dir.display()))?;
    let _lock = DirLock::take(data_dir, "dispatcher.lock").context("the data directory")?;
    // A malformed agents file is found now, not when the first agent is turned away.
    Agents::load_if_there(&config.agents_file)?;
    let identity = Identity::load_or_create(data_dir)?;
    info!("certificate SHA-256 {}", identity.fingerprint());
    let (catalogue, origin) = Catalogue::open(data_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build()?;
    let result = runtime.block_on(serve(config, identity, Arc::new(catalogue), origin, reread));
    runtime.shutdown_timeout(service::SHUTDOWN_TIMEOUT);
    result
}

async fn serve(
    config: DispatcherConfig,
    identity: Identity,
    catalogue: Arc<Catalogue>,
    origin: Origin,
    reread: impl Fn() -> super::Reread + Send + 'static,
) -> anyhow::Result<()> {
    let house = Arc::new(House {
        files: Arc::new(RealFiles::new(&config.data_dir)),
        catalogue,
        sync_every: watch::Sender::new(config.sync_every),
        checkpoints: broadcast::Sender::new(256),
        watchdog: Watchdog::from_env(),
        accepted: Accepted::load(config.data_dir.join("accepted"))?,
        generations: Generations::open(&config.data_dir)?,
        instance: Epoch::random()?,
    });
    let pauses = Pauses::load(config.data_dir.join("paused"))?;
    let registry = Arc::new(Registry::new(house.clone(), config.agents_file.clone(), pauses));
    let surveyed = registry.clone();
    let entered = spawn_blocking(move || surveyed.survey()).await?.context("the data directory")?;
    tell_origin(&origin, entered);
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let stop = service::stop_on_signal()?;
    let (begun, jobs) = mpsc::channel(JOBS_MAX);
    let server = Arc::new(Server {
        registry: registry.clone(),
        data_dir: config.data_dir.clone(),
        acceptor: identity.acceptor()?,
        shows: Semaphore::new(SHOWS_MAX),
        fetches: Arc::new(Fetches::new(config.data_dir.clone(), config.agents_file.clone(), begun)),
    });
    info!("the dispatcher listens on {address}");
    let scrub = Arc::new(Scrub::open(house.files.clone(), config.data_dir.join(scrub::FILE), config.scrub));
    let control = DispatcherControl {
        scrub: scrub.clone(),
        registry: registry.clone(),
        data_dir: config.data_dir.clone(),
        runtime: Handle::current(),
    };
    let scrubbing = scrub.start().context("the scrub")?;
    let on_bus =
        service::go_on_bus(Arc::new(control), house.checkpoints.subscribe(), jobs, stop.subscribe()).await;
    let of = house.clone();
    service::reload_on_hangup(move || reload(&config, &of, reread()?))?;
    service::ready();
    let result = tokio::select! {
        result = server.run(listener, stop.subscribe()) => result,
        never = house.watchdog.feed() => match never {},
        never = service::show_status(|| status(&registry, address)) => match never {},
    };
    stop.send_replace(true);
    on_bus.await?;
    spawn_blocking(move || {
        registry.stop();
        scrubbing.into_iter().for_each(Running::stop);
    })
    .await?;
    info!("the dispatcher stopped");
    Ok(result?)
}

/// Says what became of the catalogue; `entered` agents were not in it.
fn tell_origin(origin: &Origin, entered: usize) {
    let anew = format!("made anew from {entered} agents' files; footprints come back when agents connect");
    match origin {
        Origin::Damaged(aside) => {
            warn!("the catalogue was damaged (the old one is {}); {anew}", aside.display());
        }
        Origin::New if entered > 0 => warn!("the catalogue was lost; {anew}"),
        Origin::Found if entered > 0 => {
            warn!("the catalogue lacked {entered} agents; they are entered from their files");
        }
        Origin::New | Origin::Found => {}
    }
}

/// Takes what can change while it runs.
fn reload(
    now: &DispatcherConfig,
    house: &House,
    (settings, file): (Settings, PathBuf),
) -> anyhow::Result<String> {
    let new = DispatcherConfig::new(settings, &file)?;
    house.sync_every.send_replace(new.sync_every);
    let restart = DispatcherConfig { sync_every: now.sync_every, ..new } != *now;
    Ok(format!("sync-freq is {} s{}", house.sync_every.borrow().as_secs(), super::needs_restart(restart)))
}

fn status(registry: &Registry, address: SocketAddr) -> String {
    let (agents, disks) = (registry.agents().len(), registry.disks());
    let connected = disks.iter().filter(|disk| disk.state != DiskState::Detached).count();
    let disks = disks.len();
    format!("listening on {address}; {agents} agents connected, {connected} of {disks} disks attached")
}
