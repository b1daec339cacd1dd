//! `blxrep start --mode agent`.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use blxrep::agent::control::AgentControl;
use blxrep::agent::disk::Disk;
use blxrep::agent::link::Dial;
use blxrep::agent::run;
use blxrep::agent::shared::Shared;
use blxrep::agent::unfinished::Unfinished;
use blxrep::config::{AgentConfig, ConfigError, Settings};
use blxrep::freeze::record::thaw_leftovers;
use blxrep::lock::DirLock;
use blxrep::pause::Pauses;
use blxrep::status::{DiskStatus, SharedDisk};
use blxrep::tracker::pins::mount_bpffs_if_missing;
use blxrep::watchdog::Watchdog;
use blxrep::wire::key::AgentKey;
use blxrep::wire::tls::connector;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::service;

/// Runs until SIGTERM or SIGINT. Tracking goes on behind it.
pub(crate) fn run(
    settings: Settings,
    file: &Path,
    reread: impl Fn() -> super::Reread + Send + 'static,
) -> anyhow::Result<()> {
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
    let pauses = Pauses::load(config.state_dir.join(format!("{}.paused", config.id)))?;
    let unfinished = Unfinished::load(config.state_dir.join(format!("{}.unfinished", config.id)))?;
    let disks = open_disks(&config)?;
    let agent = config.id.clone();
    let shown = disks.iter().map(|disk| {
        let (name, size_bytes) = (disk.device.name.clone(), disk.device.size_bytes);
        Arc::new(SharedDisk::new(DiskStatus::new(agent.clone(), disk.id.clone(), name, size_bytes)))
    });
    let shown = shown.collect();
    // The file this process runs from, even if it has been replaced on disk since.
    let guard_exe = "/proc/self/exe".into();
    let dial = Dial { addr: config.dispatcher_addr.clone(), connector: connector(key.fingerprint)?, key };
    let (shared, asked) = Shared::new(config, shown, pauses, unfinished, Watchdog::from_env());
    let shared = Arc::new(shared);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(async {
        let stop = service::stop_on_signal()?;
        let control = AgentControl { shared: shared.clone(), dial: dial.clone(), runtime: Handle::current() };
        // Nobody but a caller begins a job on an agent.
        let (_, no_jobs) = mpsc::channel(1);
        let on_bus =
            service::go_on_bus(Arc::new(control), shared.checkpoints.subscribe(), no_jobs, stop.subscribe())
                .await;
        let of = shared.clone();
        service::reload_on_hangup(move || reload(&of, reread()?))?;
        service::ready();
        let result = tokio::select! {
            result = run::run(shared.clone(), asked, dial, disks, guard_exe, stop.subscribe()) => result,
            never = shared.watchdog.feed() => match never {},
            never = service::show_status(|| status(&shared)) => match never {},
        };
        // Also where it was refused: jobs are to clean up.
        stop.send_replace(true);
        on_bus.await?;
        info!("the agent stopped; tracking goes on");
        Ok(result?)
    });
    runtime.shutdown_timeout(service::SHUTDOWN_TIMEOUT);
    result
}

/// Takes what can change while it runs.
fn reload(shared: &Shared, (settings, file): (Settings, PathBuf)) -> anyhow::Result<String> {
    let now = shared.config.borrow().clone();
    let new = AgentConfig::new(settings, &file)?;
    let taken = AgentConfig {
        hooks_dir: new.hooks_dir.clone(),
        hook_timeout: new.hook_timeout,
        freeze_timeout: new.freeze_timeout,
        read_rate_bytes: new.read_rate_bytes,
        ..(*now).clone()
    };
    let restart = taken != new;
    shared.config.send_replace(Arc::new(taken));
    let keys = "hooks-dir, hook-timeout, freeze-timeout and read-rate-mib are taken";
    Ok(format!("{keys}{}", super::needs_restart(restart)))
}

fn status(shared: &Shared) -> String {
    let disks: Vec<DiskStatus> = shared.disks.iter().map(|disk| disk.status().clone()).collect();
    let uplink = match (&*shared.uplink.borrow(), &*shared.fenced.borrow()) {
        (Some(uplink), _) => format!("connected to {}", uplink.address),
        (None, Some(reason)) => format!("refused: {reason}"),
        (None, None) => "not connected".to_owned(),
    };
    format!("{uplink}; {}", service::describe(&disks))
}

fn open_disks(config: &AgentConfig) -> anyhow::Result<Vec<Disk>> {
    let mut seen = HashSet::new();
    let mut disks = Vec::new();
    for path in &config.devices {
        let disk = Disk::open(config, path)?;
        if !seen.insert(disk.id.clone()) {
            bail!("two devices have the id {}: {} is one of them; give only one", disk.id, path.display());
        }
        disks.push(disk);
    }
    Ok(disks)
}
