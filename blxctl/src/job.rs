//! Beginning a job and waiting for its end.

use std::future::Future;
use std::io::IsTerminal;
use std::pin::pin;
use std::time::Duration;

use blxrep_dbus::SIGNAL_INTERVAL_MS;
use blxrep_dbus::proxy::JobProxy;
use blxrep_dbus::words::JobType;
use futures_util::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use zbus::fdo::DBusProxy;
use zbus::wire::OwnedObjectPath;

use crate::connect::Daemon;
use crate::ended::Ended;
use crate::failure::Failure;
use crate::render;

/// The signals by which a person or the system asks to stop.
pub(crate) struct Stop([Signal; 3]);

impl Stop {
    pub(crate) fn new() -> Result<Self, Failure> {
        let listen =
            |kind| signal(kind).map_err(|e| Failure::failed(format!("cannot wait for signals: {e}")));
        Ok(Self([
            listen(SignalKind::interrupt())?,
            listen(SignalKind::terminate())?,
            listen(SignalKind::hangup())?,
        ]))
    }

    pub(crate) async fn asked(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// The number of a job, from the path of its object.
pub(crate) fn number(path: &OwnedObjectPath) -> Option<u32> {
    path.rsplit('/').next().and_then(|number| number.parse().ok())
}

/// Which job, and how its end is shown and explained.
pub(crate) struct Plan<'a> {
    pub(crate) job_type: JobType,
    pub(crate) agent: &'a str,
    /// The polkit action of its method.
    pub(crate) action: &'a str,
    /// No progress bar.
    pub(crate) json: bool,
}

fn left() -> Failure {
    Failure::failed("left before the job had ended: see 'blxctl jobs'")
}

fn vanished(daemon: &Daemon) -> Failure {
    let unit = crate::connect::unit(daemon.role);
    Failure::failed(format!(
        "the {} went away during the job, which ended with it\n\
         see 'journalctl -u {unit}', and begin again when 'blxctl status' shows it",
        daemon.role
    ))
}

/// Begins a job by `begin` and waits until it has ended. The first signal to stop cancels it, the second leaves it.
pub(crate) async fn run(
    daemon: &Daemon,
    plan: &Plan<'_>,
    begin: impl Future<Output = zbus::Result<OwnedObjectPath>>,
    mut stop: Stop,
) -> Result<Ended, Failure> {
    // Listened to before it begins: the shortest job's end is not missed.
    let manager = daemon.manager().await?;
    let mut removed = manager.receive_job_removed().await?;
    let dbus = DBusProxy::new(&daemon.bus).await?;
    let mut owners = dbus.receive_name_owner_changed_with_args(&[(0, daemon.owner.as_str())]).await?;
    let bar = progress_bar(plan.json);
    let say = |text: &str| bar.suspend(|| eprintln!("blxctl: {text}"));

    let mut canceling = false;
    let mut begin = pin!(begin);
    let path = loop {
        tokio::select! {
            path = &mut begin => break path.map_err(|e| Failure::of_call(&e, plan.action))?,
            () = stop.asked() => {
                if canceling {
                    return Err(left());
                }
                canceling = true;
                say("canceling as soon as the job has begun; once more to leave it");
            }
        }
    };

    let job = daemon.job(path.clone().into()).await?;
    // Also fetches the properties and begins to keep them; an error only means that the job has ended already.
    let _ = job.bytes_done().await;
    let mut cancels = JoinSet::new();
    if canceling {
        cancel(&mut cancels, &job);
    }
    let mut tick = tokio::time::interval(Duration::from_millis(SIGNAL_INTERVAL_MS));
    loop {
        tokio::select! {
            // In this order: a daemon that ends may have ended the job in time.
            biased;
            signal = removed.next() => {
                let Some(signal) = signal else { return Err(vanished(daemon)) };
                let Ok(args) = signal.args() else { continue };
                if args.job == path {
                    bar.finish_and_clear();
                    let (job_type, agent) = (plan.job_type, plan.agent.to_owned());
                    return Ok(Ended { id: args.id, job_type, agent, result: args.result, details: args.details });
                }
            }
            _ = owners.next() => return Err(vanished(daemon)),
            () = stop.asked() => {
                if canceling {
                    return Err(left());
                }
                canceling = true;
                say("canceling ...; once more to leave it");
                cancel(&mut cancels, &job);
            }
            Some(Ok(Err(error))) = cancels.join_next() => {
                // It may be canceled again.
                canceling = false;
                say(&format!("cannot be canceled: {}", Failure::of_call(&error, plan.action)));
            }
            _ = tick.tick() => draw(&bar, &job),
        }
    }
}

fn cancel(cancels: &mut JoinSet<zbus::Result<()>>, job: &JobProxy<'static>) {
    let job = job.clone();
    cancels.spawn(async move { job.cancel().await });
}

fn progress_bar(json: bool) -> ProgressBar {
    let shown = !json && std::io::stderr().is_terminal();
    let bar = if shown { ProgressBar::new(1000) } else { ProgressBar::hidden() };
    match ProgressStyle::with_template("{bar:24} {percent:>3} %  {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Draws what the daemon told last.
fn draw(bar: &ProgressBar, job: &JobProxy<'_>) {
    let number = |cached: zbus::Result<Option<u64>>| cached.ok().flatten().unwrap_or(0);
    let progress = job.cached_progress().ok().flatten().unwrap_or(0.0).clamp(0.0, 1.0);
    let done = number(job.cached_bytes_done());
    let total = number(job.cached_bytes_total());
    bar.set_message(render::amount(done, total, number(job.cached_rate_bytes())));
    bar.set_position((progress * 1000.0) as u64);
}
