//! `blxrep start --mode dispatcher`.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use blxrep::config::{DispatcherConfig, Settings};
use blxrep::dispatcher::fetch::Fetches;
use blxrep::dispatcher::registry::Registry;
use blxrep::dispatcher::server::Server;
use blxrep::ids::Epoch;
use blxrep::lock::DirLock;
use blxrep::store::catalogue::Catalogue;
use blxrep::store::files::RealFiles;
use blxrep::wire::key::Agents;
use blxrep::wire::tls::Identity;
use tokio::net::TcpListener;
use tokio::task::spawn_blocking;
use tracing::{info, warn};

/// Runs until SIGTERM or SIGINT.
pub(crate) fn run(settings: Settings, file: &Path) -> anyhow::Result<()> {
    let config = DispatcherConfig::new(settings, file)?;
    let data_dir = &config.data_dir;
    let made = fs::DirBuilder::new().recursive(true).mode(0o750).create(data_dir);
    made.with_context(|| format!("the data directory {}", data_dir.display()))?;
    let _lock = DirLock::take(data_dir, "dispatcher.lock").context("the data directory")?;
    // A malformed agents file is found now, not when the first agent is turned away.
    Agents::load(&config.agents_file)?;
    let identity = Identity::load_or_create(data_dir)?;
    info!("certificate SHA-256 {}", identity.fingerprint());
    let (catalogue, renamed) = Catalogue::open(data_dir)?;
    if let Some(renamed) = renamed {
        warn!("the catalogue was damaged and is made anew; the old one is {}", renamed.display());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(config, identity, Arc::new(catalogue)))
}

async fn serve(
    config: DispatcherConfig,
    identity: Identity,
    catalogue: Arc<Catalogue>,
) -> anyhow::Result<()> {
    let files = Arc::new(RealFiles::new(&config.data_dir));
    let registry =
        Registry::new(files, catalogue.clone(), config.agents_file, config.sync_every, Epoch::random()?);
    let registry = Arc::new(registry);
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let stop = super::start_agent::stop_on_signal()?;
    let server = Arc::new(Server {
        registry: registry.clone(),
        catalogue,
        data_dir: config.data_dir,
        acceptor: identity.acceptor()?,
        fetches: Fetches::default(),
    });
    info!("the dispatcher listens on {address}");
    sd_notify::notify(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status("listening")])?;
    let result = server.run(listener, stop).await;
    sd_notify::notify(&[sd_notify::NotifyState::Stopping])?;
    spawn_blocking(move || registry.stop()).await?;
    info!("the dispatcher stopped");
    Ok(result?)
}
