//! What each command does.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blxrep_dbus::proxy::Options;
use blxrep_dbus::words::{JobType, Role};
use blxrep_dbus::{
    ACTION_CHECKPOINT, ACTION_INSPECT, ACTION_PAUSE, ACTION_RESTORE, STARTED_BY_AGENT_UID, job_path,
};
use nix::unistd::{Uid, User};
use serde_json::{Value, json};
use zbus::wire::{Fd, ObjectPath, OwnedObjectPath};

use crate::boot;
use crate::boot::console::Awaited;
use crate::cli::{Cli, Command, Disks, Format, Several, Shown, Start, Wait, Which};
use crate::connect::{self, Daemon, Objects};
use crate::failure::{Exit, Failure, error_name};
use crate::job::{self, Plan, Stop};
use crate::model::{Agent, Checkpoint, Disk, Job};
use crate::output::show;
use crate::status::Report;
use crate::target::{self, Target};
use crate::{qcow2, render, serve, status, watch};

/// Runs a command. The exit code is not 0 only where `status` says so.
pub(crate) async fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let json = cli.json;
    if matches!(cli.command, Command::Status) {
        return show_status(cli.role, json).await;
    }
    if let Command::Umount { dir } = cli.command {
        serve::umount(&dir, json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let daemon = connect::daemon(cli.role).await?;
    match cli.command {
        Command::Agents => agents(&daemon, json).await,
        Command::Disks { agent } => disks(&daemon, agent.as_deref(), json).await,
        Command::Show { disks, start, end } => checkpoints(&daemon, disks, [start, end], json).await,
        Command::Restore { which, target, partition, overwrite, format: Format::Qcow2, wait } => {
            if partition.is_some() || overwrite.is_some() || wait.no_wait {
                return Err(Failure::usage(
                    "a qcow2 image is a new file with the whole disk: --format qcow2 goes with none of --partition, --overwrite and \
                     --no-wait. Restore a partition as raw, and convert it with 'qemu-img convert -O qcow2'",
                ));
            }
            let ended = qcow2::restore(&daemon, which, &target.path(), json).await?;
            finish(&ended, None, json)
        }
        Command::Restore { which, target, partition, overwrite, format: Format::Raw, wait } => {
            let mut options = disk_option(which.disk.clone());
            options.extend(partition.map(|number| ("partition", number.into())));
            if let Some(overwrite) = overwrite {
                options.insert("overwrite", target::absolute(&overwrite)?.1.into());
            }
            restore(&daemon, which, target.path(), options, &wait, json).await
        }
        Command::Verify { which, start, .. } if start.boot => prove(&daemon, which, start, json).await,
        Command::Verify { which, wait, .. } => verify(&daemon, which, &wait, json).await,
        Command::Mount { shown, dir } => serve::mount(&daemon, shown, &dir, json).await,
        Command::Export { shown, address, writable, wait } => {
            serve::export(&daemon, shown, &address, writable, &wait, json).await
        }
        Command::Boot { shown, qemu } => {
            let Shown { agent, checkpoint, disk } = shown;
            boot::run(&daemon, boot::Request { agent, checkpoint, disk, qemu }).await
        }
        Command::Sync { disks, compare, wait } => sync(&daemon, disks, compare, &wait, json).await,
        Command::Accept { agent, disk } => accept(&daemon, &agent, disk, json).await,
        Command::Pause(disks) => pause(&daemon, disks, true, json).await,
        Command::Resume(disks) => pause(&daemon, disks, false, json).await,
        Command::Jobs => jobs(&daemon, json).await,
        Command::Cancel { job } => cancel(&daemon, job, json).await,
        Command::Watch => watch::run(daemon, json).await,
        // These are no questions to a daemon.
        Command::Status | Command::Umount { .. } | Command::Generate { .. } => Ok(()),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn now_usec() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn array<T>(items: &[T], json: impl Fn(&T) -> Value) -> Value {
    Value::Array(items.iter().map(json).collect())
}

async fn show_status(role: Option<Role>, json: bool) -> Result<ExitCode, Failure> {
    let bus = connect::bus().await?;
    let roles = role.map_or(vec![Role::Dispatcher, Role::Agent], |role| vec![role]);
    let daemons = connect::running(&bus, &roles).await?;
    if daemons.is_empty() {
        return Err(connect::nobody(&roles, connect::installed_units(&bus).await.as_deref()));
    }
    let mut reports = Vec::new();
    for daemon in daemons {
        let Objects { disks, jobs } = daemon.objects().await?;
        reports.push(Report {
            role: daemon.role,
            version: daemon.version().await?,
            agents: daemon.agents().await?,
            scrub: daemon.scrub().await,
            disks: disks.into_iter().map(|(_, disk)| disk).collect(),
            jobs,
        });
    }
    show(json, || status::json(&reports), || status::text(&reports))?;
    Ok(status::exit(&reports).map_or(ExitCode::SUCCESS, |exit| ExitCode::from(exit as u8)))
}

async fn agents(daemon: &Daemon, json: bool) -> Result<(), Failure> {
    let agents = daemon.agents().await?;
    show(json, || array(&agents, Agent::json), || render::agents(&agents, now_usec()))
}

async fn disks(daemon: &Daemon, agent: Option<&str>, json: bool) -> Result<(), Failure> {
    let disks = daemon.objects().await?.disks;
    let wanted = |disk: &&Disk| agent.is_none_or(|agent| agent == disk.agent);
    let disks: Vec<_> = disks.iter().map(|(_, disk)| disk).filter(wanted).collect();
    if let (Some(agent), true) = (agent, disks.is_empty()) {
        return Err(Failure::new(
            Exit::NotFound,
            format!("no disk of an agent {agent}: see 'blxctl agents'"),
        ));
    }
    show(json, || array(&disks, |disk| disk.json()), || render::disks(&disks))
}

async fn checkpoints(
    daemon: &Daemon,
    disks: Disks,
    [start, end]: [Option<String>; 2],
    json: bool,
) -> Result<(), Failure> {
    let agent = daemon.agent(disks.agent).await?;
    let given = [("disk", disks.disk), ("start", start), ("end", end)];
    let options = given.into_iter().filter_map(|(key, value)| Some((key, value?.into())));
    let found = daemon.manager().await?.show(&agent, options.collect()).await;
    let found = found.map_err(|e| Failure::of_call(&e, ACTION_INSPECT))?;
    let found: Vec<_> = found.iter().map(Checkpoint::new).collect();
    show(json, || array(&found, Checkpoint::json), || render::checkpoints(&found, now_usec()))
}

pub(crate) fn disk_option(disk: Option<String>) -> Options<'static> {
    disk.map(|disk| ("disk", disk.into())).into_iter().collect()
}

async fn restore(
    daemon: &Daemon,
    which: Which,
    path: PathBuf,
    mut options: Options<'_>,
    wait: &Wait,
    json: bool,
) -> Result<(), Failure> {
    let (path, name) = target::absolute(&path)?;
    let is_device = target::is_device(&path)?;
    let agent = daemon.agent(which.agent).await?;
    let manager = daemon.manager().await?;
    // From here on a signal must not leave a hidden file.
    let stop = Stop::new()?;
    // Who should give a new file its name? Without us only the daemon can, so it makes the file.
    let target = if wait.no_wait && !is_device { None } else { Some(Target::open(&path)?) };
    if let Some(target) = &target {
        options.insert("output", Fd::from(target.fd()).into());
    }
    let begin = manager.restore(&agent, &which.checkpoint, &name, options);
    if wait.no_wait {
        return began(begin.await, ACTION_RESTORE, json);
    }
    let plan = Plan { job_type: JobType::Restore, agent: &agent, action: ACTION_RESTORE, json };
    let ended = job::run(daemon, &plan, begin, stop).await?;
    let failure = ended.failure(ACTION_RESTORE);
    if let (Some(target), None) = (target, &failure) {
        target.finish()?;
    }
    finish(&ended, failure, json)
}

async fn verify(daemon: &Daemon, which: Several, wait: &Wait, json: bool) -> Result<(), Failure> {
    let Several { agent, disk, mut checkpoint, start, end, all: _ } = which;
    let everybodys = agent.is_none() && disk.is_none() && checkpoint.is_empty();
    let agent = if everybodys { String::new() } else { daemon.agent(agent).await? };
    let manager = daemon.manager().await?;
    let given = [("disk", disk), ("start", start), ("end", end)];
    let mut options: Options<'_> =
        given.into_iter().filter_map(|(key, value)| Some((key, value?.into()))).collect();
    let one = if checkpoint.len() == 1 { checkpoint.pop() } else { None };
    if !checkpoint.is_empty() {
        options.insert("checkpoints", checkpoint.into());
    }
    let begin = manager.verify(&agent, one.as_deref().unwrap_or_default(), options);
    let plan = Plan { job_type: JobType::Verify, agent: &agent, action: ACTION_CHECKPOINT, json };
    begin_and_end(daemon, &plan, begin, wait).await
}

async fn prove(daemon: &Daemon, which: Several, start: Start, json: bool) -> Result<(), Failure> {
    let Several { agent, disk, mut checkpoint, .. } = which;
    if checkpoint.len() > 1 {
        return Err(Failure::usage("--boot takes one checkpoint"));
    }
    let agent = daemon.agent(agent).await?;
    let checkpoint = checkpoint.pop().unwrap_or_else(|| "latest".to_owned());
    let awaited = if start.probe { Awaited::Probe } else { Awaited::Login };
    let wanted = boot::Wanted { awaited, time: Duration::from_secs(start.boot_timeout) };
    let request = boot::Request { agent, checkpoint, disk, qemu: start.qemu };
    let proof = boot::prove(daemon, request, wanted).await?;
    show(json, || proof.json(), || proof.text())?;
    proof.failure().map_or(Ok(()), Err)
}

async fn sync(daemon: &Daemon, disks: Disks, compare: bool, wait: &Wait, json: bool) -> Result<(), Failure> {
    let agent = daemon.agent(disks.agent).await?;
    let manager = daemon.manager().await?;
    let mut options = disk_option(disks.disk);
    options.extend(compare.then(|| ("compare", true.into())));
    let begin = manager.sync(&agent, options);
    let plan = Plan { job_type: JobType::Sync, agent: &agent, action: ACTION_CHECKPOINT, json };
    begin_and_end(daemon, &plan, begin, wait).await
}

async fn accept(daemon: &Daemon, agent: &str, disk: Option<String>, json: bool) -> Result<(), Failure> {
    let accepted = daemon.manager().await?.accept(agent, disk_option(disk.clone())).await;
    accepted.map_err(|e| Failure::of_call(&e, ACTION_CHECKPOINT))?;
    show(
        json,
        || json!({ "agent": agent, "disk": disk, "accepted": true }),
        || render::accepted(agent, disk.as_deref()),
    )
}

async fn begin_and_end(
    daemon: &Daemon,
    plan: &Plan<'_>,
    begin: impl Future<Output = zbus::Result<OwnedObjectPath>>,
    wait: &Wait,
) -> Result<(), Failure> {
    if wait.no_wait {
        return began(begin.await, plan.action, plan.json);
    }
    let ended = job::run(daemon, plan, begin, Stop::new()?).await?;
    finish(&ended, ended.failure(plan.action), plan.json)
}

/// Names a job that is left running.
fn began(job: zbus::Result<OwnedObjectPath>, action: &str, json: bool) -> Result<(), Failure> {
    let path = job.map_err(|e| Failure::of_call(&e, action))?;
    let number = job::number(&path);
    let number =
        number.ok_or_else(|| Failure::failed(format!("the daemon named a job {}", path.as_str())))?;
    show(
        json,
        || json!({ "job": number, "path": path.as_str() }),
        || format!("job {number} ({})\n", path.as_str()),
    )
}

fn finish(ended: &crate::ended::Ended, failure: Option<Failure>, json: bool) -> Result<(), Failure> {
    for line in ended.warnings() {
        eprintln!("{line}");
    }
    show(json, || ended.json(), || ended.text())?;
    failure.map_or(Ok(()), Err)
}

async fn pause(daemon: &Daemon, disks: Disks, paused: bool, json: bool) -> Result<(), Failure> {
    let agent = daemon.agent(disks.agent).await?;
    let manager = daemon.manager().await?;
    let options = disk_option(disks.disk);
    let paths =
        if paused { manager.pause(&agent, options).await } else { manager.resume(&agent, options).await };
    let paths = paths.map_err(|e| Failure::of_call(&e, ACTION_PAUSE))?;
    let all = daemon.objects().await?.disks;
    let is_named = |path: &str| paths.iter().any(|p| p.as_str() == path);
    let changed: Vec<_> = all.iter().filter(|(path, _)| is_named(path)).map(|(_, disk)| disk).collect();
    let value = || json!({ "changed": array(&changed, |disk| disk.json()) });
    show(json, value, || render::paused(&changed, paused))
}

async fn jobs(daemon: &Daemon, json: bool) -> Result<(), Failure> {
    let mut jobs = daemon.objects().await?.jobs;
    for job in &mut jobs {
        let uid = u32::try_from(job.started_by_uid).ok();
        if uid == Some(STARTED_BY_AGENT_UID) {
            job.started_by = Some("agent".to_owned());
            continue;
        }
        let uid = uid.map(Uid::from_raw);
        job.started_by = uid.and_then(|uid| User::from_uid(uid).ok().flatten()).map(|user| user.name);
    }
    show(json, || array(&jobs, Job::json), || render::jobs(&jobs))
}

async fn cancel(daemon: &Daemon, id: u32, json: bool) -> Result<(), Failure> {
    let path = ObjectPath::try_from(job_path(id))?;
    let canceled = daemon.job(path).await?.cancel().await;
    canceled.map_err(|e| match error_name(&e).as_deref() {
        Some(
            "org.freedesktop.DBus.Error.UnknownObject"
            | "org.freedesktop.DBus.Error.UnknownInterface"
            | "org.freedesktop.DBus.Error.UnknownMethod",
        ) => Failure::new(Exit::NotFound, format!("no job {id} runs: see 'blxctl jobs'")),
        _ => Failure::of_call(
            &e,
            &format!("{ACTION_RESTORE} (restores, mounts, exports) or {ACTION_CHECKPOINT} (other jobs)"),
        ),
    })?;
    show(json, || json!({ "job": id, "state": "canceling" }), || format!("job {id}: canceling\n"))
}
