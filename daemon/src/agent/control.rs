//! What the bus may ask of an agent. Checkpoints are the dispatcher's: what of them is shown and given is its decision.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use blxrep_dbus::problem::{Problem, ProblemKind};
use blxrep_dbus::words::Role;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::fetch::{FetchError, FetchRequest, PATIENCE, fetch};
use super::link::Dial;
use super::shared::{Shared, not_connected};
use super::unfinished::Record;
use crate::boot_test::BootTest;
use crate::bus::control::{
    About, Control, Details, Failure, Planned, Progress, RestoreRequest, ServeRequest, Which,
};
use crate::bus::outcome::{
    Compared, SHOW_ROWS_MAX, canceled, check_target, report, restored, too_many_rows, value,
};
use crate::checkpoint::Checkpoint;
use crate::clock::unix_ms;
use crate::dispatcher::scrub::ScrubStatus;
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::restore::{Output, ShowRow, VerifyRequest, check_empty};
use crate::status::{AgentStatus, DiskStatus};
use crate::wire::message::{Answer, Question, ROWS_MAX, clean_text};

/// How often a wait looks whether it is to end.
const POLL: Duration = Duration::from_millis(200);
/// The dispatcher reads no data to show checkpoints: longer than this, and it does not answer.
const SHOW_TIMEOUT: Duration = Duration::from_secs(60);
/// Full answers with all the checkpoints that may be shown at once, and the last one, which holds none.
const SHOW_ANSWERS_MAX: usize = SHOW_ROWS_MAX.div_ceil(ROWS_MAX) + 1;

/// An agent, for the bus.
pub struct AgentControl {
    /// Its disks and its connection.
    pub shared: Arc<Shared>,
    /// How the dispatcher is reached.
    pub dial: Dial,
    /// Runs what is not blocking.
    pub runtime: Handle,
}

impl AgentControl {
    /// What is meant, this agent filled in.
    fn own(&self, which: &Which) -> Result<Which, Problem> {
        let own = self.shared.agent.as_str();
        if !which.agent.is_empty() && which.agent != own {
            let text = format!("this is agent {own}: what is of {} is asked on the dispatcher", which.agent);
            return Err(Problem::new(ProblemKind::NoSuchAgent, text));
        }
        Ok(Which { agent: own.to_owned(), disk: which.disk.clone() })
    }
}

impl Control for AgentControl {
    fn role(&self) -> Role {
        Role::Agent
    }

    fn agents(&self) -> Vec<AgentStatus> {
        let uplink = self.shared.uplink.borrow().clone();
        vec![AgentStatus {
            id: self.shared.agent.clone(),
            connected: uplink.is_some(),
            hostname: nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            last_seen_unix_ms: if uplink.is_some() { unix_ms() } else { 0 },
            address: uplink.map(|uplink| uplink.address).unwrap_or_default(),
            disks: u32::try_from(self.shared.disks.len()).unwrap_or(u32::MAX),
            refused: match &*self.shared.fenced.borrow() {
                Some(reason) => format!("this machine is refused: {reason}"),
                None => String::new(),
            },
            unfinished: self.shared.unfinished.all().iter().map(Record::to_string).collect(),
        }]
    }

    fn disks(&self) -> Vec<DiskStatus> {
        self.shared.disks.iter().map(|disk| disk.status().clone()).collect()
    }

    fn scrub(&self) -> Option<ScrubStatus> {
        None
    }

    fn show(&self, which: &Which, start: Option<u64>, end: Option<u64>) -> Result<Vec<ShowRow>, Problem> {
        let disk = self.own(which)?.disk;
        shown(&self.runtime, self.shared.ask(Question::Show { disk, start, end })?)
    }

    fn set_paused(&self, which: &Which, paused: bool) -> Result<Vec<(AgentId, DiskId)>, Problem> {
        let disks: Vec<DiskId> =
            self.own(which)?.among(&self.disks())?.into_iter().map(|disk| disk.disk).collect();
        let failed = |e: crate::disk_list::DiskListError| Problem::new(ProblemKind::Failed, e.to_string());
        self.shared.set_paused(&disks, paused).map_err(failed)
    }

    fn sync(&self, which: &Which, compare: bool) -> Result<Planned, Problem> {
        let which = self.own(which)?;
        let disks = which.to_sync(&self.disks())?;
        let disk = if let [one] = &*disks { one.disk.to_string() } else { String::new() };
        let about = About { agent: which.agent, disk, ..About::default() };
        let (shared, runtime) = (self.shared.clone(), self.runtime.clone());
        let work = move |progress: &Progress| {
            let mut asked = Vec::new();
            let mut compared = Compared::new(if compare { &disks } else { &[] });
            let mut tell = || {
                let now = || shared.disks.iter().map(|disk| disk.status().clone()).collect();
                compared.tell(now, progress);
            };
            for DiskStatus { disk, .. } in disks {
                let answers = shared.ask(Question::Sync { disk: disk.clone(), compare })?;
                asked.push((disk, answers));
            }
            let mut checkpoints = HashMap::new();
            for (disk, mut answers) in asked {
                let id = wait(&runtime, &mut answers, progress, &mut tell)?;
                checkpoints.insert(disk.to_string(), id.to_string());
            }
            Ok(Details::from([("checkpoints".to_owned(), value(checkpoints))]))
        };
        Ok(Planned { about, work: Box::new(work) })
    }

    fn restore(&self, request: RestoreRequest) -> Result<Planned, Problem> {
        let RestoreRequest { which, checkpoint, target, output, partition, overwrite } = request;
        let agent = if which.agent.is_empty() { self.shared.agent.clone() } else { which.agent()? };
        let about = About {
            agent: agent.to_string(),
            disk: which.disk.clone().unwrap_or_default(),
            checkpoint: checkpoint.clone(),
            target: target.display().to_string(),
        };
        let output = match output {
            Some(file) => Output::Open { file, name: target.clone() },
            None => {
                check_target(&target, &self.shared.config.borrow().state_dir)?;
                Output::Path(target.clone())
            }
        };
        // Also what a restore began to overwrite: behind a reboot its name may be another device's.
        check_empty(&output, overwrite.as_deref())?;
        let (agent, disk) = (Some(agent), which.disk);
        let request = FetchRequest { agent, disk, checkpoint, partition, output, patience: PATIENCE };
        let (shared, dial, runtime) = (self.shared.clone(), self.dial.clone(), self.runtime.clone());
        let work = move |progress: &Progress| {
            let mut note =
                |checkpoint: &Checkpoint| shared.unfinished.begin(Record::new(&target, checkpoint));
            let done = fetch(&dial, request, &runtime, &report(progress), &mut note).map_err(failure)?;
            let kept = shared.unfinished.end(&target);
            kept.map_err(|e| Problem::new(ProblemKind::Failed, format!("{}: {e}", target.display())))?;
            Ok(restored(&done))
        };
        Ok(Planned { about, work: Box::new(work) })
    }

    fn accept(&self, which: &Which) -> Result<(), Problem> {
        let which = self.own(which)?;
        let text = format!("only the dispatcher can accept: run 'blxctl accept {}' there", which.agent);
        Err(Problem::new(ProblemKind::WrongRole, text))
    }

    fn verify(&self, _request: VerifyRequest) -> Result<Planned, Problem> {
        let text = "only the dispatcher can verify: run 'blxctl verify' there";
        Err(Problem::new(ProblemKind::WrongRole, text))
    }

    fn record_boot(&self, which: &Which, _checkpoint: &str, _test: &BootTest) -> Result<(), Problem> {
        let which = self.own(which)?;
        let text = format!("only the dispatcher keeps what booted: boot agent {} there", which.agent);
        Err(Problem::new(ProblemKind::WrongRole, text))
    }

    fn serve(&self, request: ServeRequest) -> Result<(Planned, Details), Problem> {
        let which = self.own(&request.which)?;
        let text = format!(
            "only the dispatcher can show a checkpoint: run 'blxctl mount' or 'export' for agent {} there",
            which.agent
        );
        Err(Problem::new(ProblemKind::WrongRole, text))
    }
}

/// Takes the answers to a question for checkpoints, but not without end: they come from another machine.
fn shown(runtime: &Handle, mut answers: mpsc::Receiver<Answer>) -> Result<Vec<ShowRow>, Problem> {
    let mut all = Vec::new();
    for _ in 0..SHOW_ANSWERS_MAX {
        match runtime.block_on(async { timeout(SHOW_TIMEOUT, answers.recv()).await }) {
            Ok(Some(Answer::Checkpoints { rows, more })) if rows.len() <= ROWS_MAX => {
                all.extend(rows.into_iter().map(clean_row));
                if !more {
                    return Ok(all);
                }
            }
            Ok(Some(Answer::Refused { kind, reason })) => {
                return Err(Problem::new(kind, clean_text(reason)));
            }
            Ok(Some(Answer::Checkpoints { .. } | Answer::Synced { .. })) | Err(_) => return Err(no_answer()),
            Ok(None) => return Err(not_connected()),
        }
    }
    Err(too_many_rows(all.len()))
}

/// A row as it may be shown: it comes from another machine.
fn clean_row(row: ShowRow) -> ShowRow {
    ShowRow {
        checkpoint: clean_text(row.checkpoint),
        agent: clean_text(row.agent),
        disk: clean_text(row.disk),
        device: clean_text(row.device),
        time: clean_text(row.time),
        consistency: clean_text(row.consistency),
        parent: row.parent.map(clean_text),
        note: clean_text(row.note),
        boot: row.boot.map(clean_text),
        boot_time: row.boot_time.map(clean_text),
        ..row
    }
}

fn no_answer() -> Problem {
    Problem::new(ProblemKind::Failed, "the dispatcher gave no answer to the question: see its journal")
}

fn failure(error: FetchError) -> Failure {
    match error {
        FetchError::Restore(error) => error.into(),
        FetchError::Refused { kind, ref damage, .. } => {
            Failure { damage: damage.clone(), problem: Problem::new(kind, error.to_string()) }
        }
        FetchError::Connect(_) => Problem::new(ProblemKind::NotConnected, error.to_string()).into(),
        FetchError::Cut { .. } | FetchError::Broken { .. } => {
            Problem::new(ProblemKind::Failed, error.to_string()).into()
        }
    }
}

/// Waits for an ordered checkpoint.
fn wait(
    runtime: &Handle,
    answers: &mut mpsc::Receiver<Answer>,
    progress: &Progress,
    tell: &mut impl FnMut(),
) -> Result<CheckpointId, Failure> {
    loop {
        tell();
        match runtime.block_on(async { timeout(POLL, answers.recv()).await }) {
            Ok(Some(Answer::Synced { id })) => return Ok(id),
            Ok(Some(Answer::Refused { kind, reason })) => {
                return Err(Problem::new(kind, clean_text(reason)).into());
            }
            Ok(Some(Answer::Checkpoints { .. })) => return Err(no_answer().into()),
            Ok(None) => return Err(not_connected().into()),
            Err(_) if progress.is_canceled() => return Err(canceled().into()),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> ShowRow {
        ShowRow {
            checkpoint: "20261121203456".into(),
            agent: "web1".into(),
            disk: "disk0".into(),
            device: "sda".into(),
            time: "2026-11-21T20:34:56Z".into(),
            consistency: "crash".into(),
            size_bytes: 4096,
            delta_bytes: 512,
            stored_bytes: 100,
            parent: None,
            freeze_ms: 7,
            unreadable_blocks: 0,
            note: String::new(),
            boot: None,
            boot_time: None,
        }
    }

    #[test]
    fn a_dispatcher_that_answers_without_end_is_not_listened_to_for_ever() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let shown = |answers: usize, rows: usize| {
            let (sender, receiver) = mpsc::channel(200);
            for n in 1..=answers {
                let rows = if n == answers { Vec::new() } else { vec![row(); rows] };
                sender.try_send(Answer::Checkpoints { rows, more: n < answers }).unwrap();
            }
            drop(sender);
            shown(runtime.handle(), receiver).map(|rows| rows.len()).map_err(|problem| problem.kind)
        };
        assert_eq!(shown(1, 0), Ok(0));
        assert_eq!(shown(79, 256), Ok(78 * 256), "fewer than may be shown");
        assert_eq!(shown(150, 256), Err(ProblemKind::InvalidArgument));
        assert_eq!(shown(150, 0), Err(ProblemKind::InvalidArgument));
        assert_eq!(shown(2, 257), Err(ProblemKind::Failed), "more than one answer may hold");
    }
}
