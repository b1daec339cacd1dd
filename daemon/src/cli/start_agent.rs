//! `blxrep start --mode agent`.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use blxrep::agent::disk::Disk;
use blxrep::agent::disk_id::disk_id;
use blxrep::agent::link::Dial;
use blxrep::agent::run;
use blxrep::config::{AgentConfig, ConfigError, Settings};
use blxrep::device::BlockDevice;
use blxrep::freeze::record::thaw_leftovers;
use blxrep::geometry::Geometry;
use blxrep::lock::DirLock;
use blxrep::reader::DirectReader;
use blxrep::tracker::Tracker;
use blxrep::tracker::bpf::BpfTracker;
use blxrep::tracker::pins::{mount_bpffs_if_missing, pin_path};
use blxrep::wire::key::AgentKey;
use blxrep::wire::tls::connector;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

/// Runs until SIGTERM or SIGINT. Tracking goes on behind it.
pub(crate) fn run(settings: Settings, file: &Path) -> anyhow::Result<()> {
    let config = AgentConfig::new(settings, file)?;
    let key = AgentKey::load(&config.key_file)?;
    if key.agent != config.id {
        let reason =
            format!("the key in {} is agent {}'s, not {}'s", config.key_file.display(), key.agent, config.id);
        return Err(ConfigError::Value { key: "id", reason }.into());
    }
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&config.state_dir);
    made.with_context(|| format!("the state directory {}", config.state_dir.display()))?;
    let _lock =
        DirLock::take(&config.state_dir, &format!("{}.lock", config.id)).context("the state directory")?;
    for mount in thaw_leftovers(&config.state_dir)? {
        warn!("{} was left frozen by an agent that was killed: thawed", mount.display());
    }
    if mount_bpffs_if_missing()? {
        info!("mounted bpf on /sys/fs/bpf");
    }
    let disks = open_disks(&config)?;
    // The file this process runs from, even if it has been replaced on disk since.
    let guard_exe = "/proc/self/exe".into();
    let dial = Dial { addr: config.dispatcher_addr.clone(), connector: connector(key.fingerprint)?, key };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = stop_on_signal()?;
        sd_notify::notify(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status("tracking")])?;
        let result = run::run(Arc::new(config), dial, disks, guard_exe, stop).await;
        sd_notify::notify(&[sd_notify::NotifyState::Stopping])?;
        info!("the agent stopped; tracking goes on");
        Ok(result?)
    })
}

fn open_disks(config: &AgentConfig) -> anyhow::Result<Vec<Disk>> {
    let mut seen = HashSet::new();
    let mut disks = Vec::new();
    for path in &config.devices {
        let disk = open_disk(config, path)?;
        if !seen.insert(disk.id.clone()) {
            bail!("two devices have the id {}: {} is one of them; give only one", disk.id, path.display());
        }
        disks.push(disk);
    }
    Ok(disks)
}

fn open_disk(config: &AgentConfig, path: &Path) -> anyhow::Result<Disk> {
    let device = BlockDevice::open(path)?;
    let geometry =
        Geometry::new(device.size_bytes, config.block_shift).with_context(|| path.display().to_string())?;
    let id = disk_id(&device.name, &device.path);
    let reader = DirectReader::open(&device.path, geometry).with_context(|| path.display().to_string())?;
    let mut tracker = BpfTracker::open(&device, config.block_shift, &pin_path(&config.id, &id))?;
    let claim = tracker.claim()?;
    match claim.gap {
        None => info!(AGENT = %config.id, DISK = %id, "{} is tracked on, nothing was missed", device.name),
        Some(gap) => info!(AGENT = %config.id, DISK = %id, "{} is tracked: {gap}", device.name),
    }
    Ok(Disk { id, device, geometry, tracker: Box::new(tracker), reader: Box::new(reader) })
}

/// Turns true at SIGTERM or SIGINT.
pub(crate) fn stop_on_signal() -> std::io::Result<watch::Receiver<bool>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = stop.send(true);
        // Held until the end, so that nobody takes a dropped sender for an order to stop.
        std::future::pending::<()>().await;
    });
    Ok(stopped)
}
