//! What both roles do as a systemd service: stop on a signal, reload, say how it stands, feed the watchdog.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use blxrep::bus::{
    self,
    control::{Control, Planned},
};
use blxrep::status::{CheckpointAdded, DiskStatus};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{error, info};

/// How often the status text is made anew.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);
/// How long a start waits for the bus.
const BUS_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an end waits for what cannot be interrupted.
pub(super) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Turns true at SIGTERM or SIGINT. To be held until the end: one that is dropped counts as true.
pub(super) fn stop_on_signal() -> std::io::Result<watch::Sender<bool>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = watch::Sender::new(false);
    let by_signal = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        notify(&[NotifyState::Stopping]);
        by_signal.send_replace(true);
    });
    Ok(stop)
}

/// Goes on the bus; returns when that has come about or failed, so that who waits for the service finds it there.
pub(super) async fn go_on_bus(
    control: Arc<dyn Control>,
    checkpoints: broadcast::Receiver<CheckpointAdded>,
    begun: mpsc::Receiver<Planned>,
    stop: watch::Receiver<bool>,
) -> JoinHandle<()> {
    let (tried, is_tried) = oneshot::channel();
    let running = tokio::spawn(bus::run(control, checkpoints, begun, tried, stop));
    // A bus that does not answer is no reason not to replicate.
    let _ = timeout(BUS_TIMEOUT, is_tried).await;
    running
}

/// Tells systemd that it serves.
pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// Calls `reread` at every SIGHUP. It gives what is to be logged; after an error all stays as it was.
pub(super) fn reload_on_hangup(
    reread: impl Fn() -> anyhow::Result<String> + Send + 'static,
) -> std::io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            // systemd 253 and newer wants to know when it began (sd_notify(3)).
            let began = NotifyState::monotonic_usec_now().ok();
            notify(&Vec::from_iter([NotifyState::Reloading].into_iter().chain(began)));
            // One small file: too little to be worth a thread.
            match reread() {
                Ok(what) => info!("configuration read again: {what}"),
                Err(error) => error!("configuration not read again, all stays as it was: {error:#}"),
            }
            notify(&[NotifyState::Ready]);
        }
    });
    Ok(())
}

/// Keeps the text of `systemctl status` true. Never ends.
pub(super) async fn show_status(text: impl Fn() -> String) -> Infallible {
    let mut shown = String::new();
    loop {
        let now = text();
        if now != shown {
            notify(&[NotifyState::Status(&now)]);
            shown = now;
        }
        tokio::time::sleep(STATUS_INTERVAL).await;
    }
}

/// Disks in one line, as `sda idle, sdb copying 37 %`.
pub(super) fn describe(disks: &[DiskStatus]) -> String {
    let one = |disk: &DiskStatus| match disk.progress {
        0.0 => format!("{} {}", disk.device, disk.state),
        done => format!("{} {} {:.0} %", disk.device, disk.state, done * 100.0),
    };
    disks.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Without systemd there is nobody to tell.
fn notify(state: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(state);
}
