//! What the bus may ask of a dispatcher.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blxrep_dbus::problem::{Problem, ProblemKind};
use blxrep_dbus::words::{BootResult, Role};
use tokio::runtime::Handle;
use tokio::sync::oneshot::Receiver;
use tokio::time::timeout;
use tracing::{error, info};

use super::registry::Registry;
use super::scrub::{Scrub, ScrubStatus};
use super::serve;
use crate::boot_test::BootTest;
use crate::bus::control::{
    About, Control, Details, Failure, Planned, Progress, RestoreRequest, ServeRequest, Which,
};
use crate::bus::outcome::{Compared, canceled, check_target, lines, report, restored, value, verified};
use crate::clock::unix_ms;
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::message_id::{BOOT_FAILED, DAMAGE_FOUND};
use crate::restore::{
    self, Chosen, Output, RestoreError, RestoreOptions, ShowRow, Verification, VerifyRequest,
};
use crate::status::{AgentStatus, DiskStatus};
use crate::store::layout::Paths;
use crate::wire::key::Agents;

/// How often a wait looks whether it is to end.
const POLL: Duration = Duration::from_millis(200);

/// A dispatcher, for the bus.
pub struct DispatcherControl {
    /// The agents and disks.
    pub registry: Arc<Registry>,
    /// Checks what is stored, and knows what is damaged.
    pub scrub: Arc<Scrub>,
    /// Where everything is stored.
    pub data_dir: PathBuf,
    /// Runs what is not blocking.
    pub runtime: Handle,
}

impl DispatcherControl {
    /// The checkpoint that is meant, and what a job about it shows.
    fn find(&self, which: &Which, checkpoint: &str) -> Result<(AgentId, DiskId, CheckpointId), Problem> {
        let agent = which.agent()?;
        let chosen = Chosen::find(&self.data_dir, &agent, which.disk.as_deref(), checkpoint)?;
        Ok((agent, chosen.owner.disk.clone(), chosen.id))
    }
}

fn about(agent: &AgentId, disk: &DiskId, id: CheckpointId) -> About {
    About {
        agent: agent.to_string(),
        disk: disk.to_string(),
        checkpoint: id.to_string(),
        target: String::new(),
    }
}

impl Control for DispatcherControl {
    fn role(&self) -> Role {
        Role::Dispatcher
    }

    fn agents(&self) -> Vec<AgentStatus> {
        let mut agents: HashMap<AgentId, AgentStatus> = HashMap::new();
        let unknown = |id: AgentId| AgentStatus {
            id,
            connected: false,
            hostname: String::new(),
            version: String::new(),
            address: String::new(),
            last_seen_unix_ms: 0,
            disks: 0,
            refused: String::new(),
            unfinished: Vec::new(),
        };
        // A file that cannot be read is told where agents connect.
        for id in Agents::load_if_there(&self.registry.agents_file).unwrap_or_default().ids() {
            agents.entry(id.clone()).or_insert_with(|| unknown(id));
        }
        for (id, seen) in self.registry.seen() {
            let agent = agents.entry(id.clone()).or_insert_with(|| unknown(id));
            (agent.hostname, agent.last_seen_unix_ms) = (seen.hostname, seen.last_unix_ms);
        }
        for disk in self.registry.disks() {
            agents.entry(disk.agent.clone()).or_insert_with(|| unknown(disk.agent)).disks += 1;
        }
        for (id, peer) in self.registry.agents() {
            let agent = agents.entry(id.clone()).or_insert_with(|| unknown(id));
            (agent.connected, agent.last_seen_unix_ms) = (true, unix_ms());
            (agent.address, agent.version) = (peer.address.to_string(), peer.version);
        }
        let mut agents: Vec<AgentStatus> = agents.into_values().collect();
        for agent in &mut agents {
            agent.refused = self.registry.why_fenced(&agent.id).unwrap_or_default();
        }
        agents.sort_by(|a, b| a.id.cmp(&b.id));
        agents
    }

    fn disks(&self) -> Vec<DiskStatus> {
        let mut disks = self.registry.disks();
        for (agent, disk, lines) in self.scrub.damage() {
            let at = disks.iter().position(|of| (&of.agent, &of.disk) == (&agent, &disk));
            // One whose base is lost is known by its damage only.
            let at = at.unwrap_or_else(|| {
                disks.push(DiskStatus::new(agent, disk, String::new(), 0));
                disks.len() - 1
            });
            disks.get_mut(at).into_iter().for_each(|of| of.damage.extend_from_slice(&lines));
        }
        disks
    }

    fn scrub(&self) -> Option<ScrubStatus> {
        Some(self.scrub.status())
    }

    fn show(&self, which: &Which, start: Option<u64>, end: Option<u64>) -> Result<Vec<ShowRow>, Problem> {
        Ok(restore::show(&self.data_dir, &which.agent()?, which.disk.as_deref(), start, end)?)
    }

    fn set_paused(&self, which: &Which, paused: bool) -> Result<Vec<(AgentId, DiskId)>, Problem> {
        let disks = which.among(&self.disks())?.into_iter().map(|disk| (disk.agent, disk.disk)).collect();
        let failed = |e: crate::disk_list::DiskListError| Problem::new(ProblemKind::Failed, e.to_string());
        self.registry.set_paused(disks, paused).map_err(failed)
    }

    fn accept(&self, which: &Which) -> Result<(), Problem> {
        let agent = which.agent()?;
        if which.disk.is_some() {
            let meant = which.among(&self.disks())?;
            for disk in meant {
                let kept = self.registry.accept_disk(&disk.agent, &disk.disk);
                kept.map_err(|e| Problem::new(ProblemKind::Failed, e.to_string()))?;
            }
            return Ok(());
        }
        match self.registry.accept_machine(&agent) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let text = format!(
                    "nothing to accept: no machine was refused as agent {agent}; for a disk that shrank or was replaced, name the disk"
                );
                Err(Problem::new(ProblemKind::Failed, text))
            }
            Err(e) => Err(Problem::new(ProblemKind::Failed, e.to_string())),
        }
    }

    fn sync(&self, which: &Which, compare: bool) -> Result<Planned, Problem> {
        let disks = which.to_sync(&self.disks())?;
        let disk = if let [one] = &*disks { one.disk.to_string() } else { String::new() };
        let about = About { agent: which.agent.clone(), disk, ..About::default() };
        let (registry, runtime) = (self.registry.clone(), self.runtime.clone());
        let work = move |progress: &Progress| {
            let order = |disk: &DiskStatus| {
                let receiver = runtime.block_on(registry.sync(&disk.agent, &disk.disk, compare));
                (disk.disk.clone(), receiver)
            };
            let ordered: Vec<_> = disks.iter().map(order).collect();
            let mut compared = Compared::new(if compare { &disks } else { &[] });
            let mut tell = || compared.tell(|| registry.disks(), progress);
            let mut checkpoints = HashMap::new();
            for (disk, mut receiver) in ordered {
                let id = wait(&runtime, &mut receiver, progress, &mut tell)?;
                checkpoints.insert(disk.to_string(), id.to_string());
            }
            Ok(Details::from([("checkpoints".to_owned(), value(checkpoints))]))
        };
        Ok(Planned { about, work: Box::new(work) })
    }

    fn restore(&self, request: RestoreRequest) -> Result<Planned, Problem> {
        let RestoreRequest { which, checkpoint, target, output, partition, overwrite } = request;
        let (agent, disk, id) = self.find(&which, &checkpoint)?;
        let name = target.display().to_string();
        let about = About { target: name, ..about(&agent, &disk, id) };
        let output = match output {
            Some(file) => Output::Open { file, name: target },
            None => {
                check_target(&target, &self.data_dir)?;
                Output::Path(target)
            }
        };
        restore::check_empty(&output, overwrite.as_deref())?;
        let options = RestoreOptions {
            data_dir: self.data_dir.clone(),
            agent: agent.clone(),
            disk: Some(disk.to_string()),
            checkpoint: id.to_string(),
            partition,
            output: Some(output),
        };
        let work = move |progress: &Progress| {
            let done = restore::restore(options, &report(progress));
            if let Err(RestoreError::Damaged(damage)) = &done {
                tell_damage(&agent, &disk, id, &lines(damage));
            }
            Ok(restored(&done?))
        };
        Ok(Planned { about, work: Box::new(work) })
    }

    fn verify(&self, request: VerifyRequest) -> Result<Planned, Problem> {
        let verification = Verification::plan(&self.data_dir, &request)?;
        let about = match verification.only() {
            Some((owner, id)) => about(&owner.agent, &owner.disk, id),
            None => About {
                agent: request.agent.map_or_else(String::new, |agent| agent.to_string()),
                disk: request.disk.unwrap_or_default(),
                ..About::default()
            },
        };
        let scrub = self.scrub.clone();
        let work = move |progress: &Progress| {
            let reports = verification.run(&report(progress))?;
            scrub.verified(&reports);
            Ok(verified(&reports))
        };
        Ok(Planned { about, work: Box::new(work) })
    }

    fn serve(&self, request: ServeRequest) -> Result<(Planned, Details), Problem> {
        let ServeRequest { which, checkpoint, target, by } = request;
        let agent = which.agent()?;
        let opened = restore::open(&self.data_dir, &agent, which.disk.as_deref(), &checkpoint)?;
        serve::plan(opened, target, by)
    }

    fn record_boot(&self, which: &Which, checkpoint: &str, test: &BootTest) -> Result<(), Problem> {
        let chosen = Chosen::find(&self.data_dir, &which.agent()?, which.disk.as_deref(), checkpoint)?;
        let (owner, id) = (&chosen.owner, chosen.id);
        test.keep(&self.data_dir, owner, id, &chosen.all_ids()).map_err(|e| {
            let text = format!("what booting checkpoint {id} showed cannot be kept: {e}");
            Problem::new(ProblemKind::Failed, text)
        })?;
        let Paths { agent, disk } = owner;
        match test.result {
            BootResult::Passed => {
                info!(AGENT = %agent, DISK = %disk, CHECKPOINT = %id, "checkpoint {id} of {disk} boots");
            }
            BootResult::Failed => {
                error!(MESSAGE_ID = BOOT_FAILED, AGENT = %agent, DISK = %disk, CHECKPOINT = %id,
                    "checkpoint {id} of {disk} does not boot: {} has its console", owner.boot(id).display());
            }
        }
        Ok(())
    }
}

fn tell_damage(agent: &AgentId, disk: &DiskId, id: CheckpointId, damage: &[String]) {
    for line in damage {
        error!(MESSAGE_ID = DAMAGE_FOUND, AGENT = %agent, DISK = %disk, CHECKPOINT = %id, "{line}");
    }
}

/// Waits for an ordered checkpoint.
fn wait(
    runtime: &Handle,
    receiver: &mut Receiver<Result<CheckpointId, Problem>>,
    progress: &Progress,
    tell: &mut impl FnMut(),
) -> Result<CheckpointId, Failure> {
    loop {
        tell();
        match runtime.block_on(async { timeout(POLL, &mut *receiver).await }) {
            Ok(Ok(done)) => return Ok(done?),
            Ok(Err(_)) => {
                let text =
                    "the connection of the disk broke meanwhile: try again when 'blxctl status' is well";
                return Err(Problem::new(ProblemKind::NotConnected, text).into());
            }
            Err(_) if progress.is_canceled() => return Err(canceled().into()),
            Err(_) => {}
        }
    }
}
