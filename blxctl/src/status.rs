//! The verdict: is every disk protected, what is wrong, and what to do about it. Pure.

use blxrep_dbus::words::{DiskState, Role};
use serde_json::{Value, json};

use crate::connect::bus_name;
use crate::failure::Exit;
use crate::model::{Agent, Disk, Job, Scrub};
use crate::render;

/// What one daemon told.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(crate) role: Role,
    pub(crate) version: String,
    pub(crate) agents: Vec<Agent>,
    /// `None` of an agent.
    pub(crate) scrub: Option<Scrub>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) jobs: Vec<Job>,
}

/// What is wrong with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// It is given up until a person acts.
    Failed,
    /// The two sides are not connected.
    Detached,
    /// It was paused on these sides.
    Paused { agent: bool, dispatcher: bool },
    /// It has no checkpoint yet.
    Unprotected,
    /// Its newest checkpoint is too old.
    Late,
    /// Its newest checkpoint is not a point in time.
    Fuzzy,
    /// What is stored of it is damaged.
    Damaged,
    /// Something went wrong since its newest checkpoint.
    Error,
}

impl Trouble {
    fn word(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Detached => "detached",
            Self::Paused { .. } => "paused",
            Self::Unprotected => "unprotected",
            Self::Late => "late",
            Self::Fuzzy => "fuzzy",
            Self::Damaged => "damaged",
            Self::Error => "error",
        }
    }
}

/// Whether the newest checkpoint is older than two intervals and a minute. Never where the interval is not known.
fn is_late(disk: &Disk) -> bool {
    let bound = disk.sync_every_usec.saturating_mul(2).saturating_add(60_000_000);
    disk.sync_every_usec > 0 && disk.lag_usec.is_some_and(|lag| lag > bound)
}

/// Whether a disaster now would cost no more than it may.
fn is_protected(disk: &Disk) -> bool {
    let goes_on = !disk.is(DiskState::Failed);
    // An agent does not know how often a checkpoint is due: it is only sure while more are coming.
    let fresh = match disk.sync_every_usec {
        0 => !disk.is(DiskState::Detached) && !disk.paused,
        _ => !is_late(disk),
    };
    // The newest checkpoint rests on all that is stored.
    goes_on && fresh && disk.lag_usec.is_some() && disk.damage.is_empty()
}

fn troubles(disk: &Disk) -> Vec<Trouble> {
    let by = |role: Role| disk.paused_by.iter().any(|side| side == role.as_str());
    let mut found = Vec::new();
    let paused = disk.paused || disk.is(DiskState::Paused);
    let failed = disk.is(DiskState::Failed);
    let detached = disk.is(DiskState::Detached);
    if failed {
        found.push(Trouble::Failed);
    }
    if detached {
        found.push(Trouble::Detached);
    }
    if paused {
        found.push(Trouble::Paused { agent: by(Role::Agent), dispatcher: by(Role::Dispatcher) });
    }
    // Of a disk that stands still, why it does so is what a person needs to know.
    let moves = !failed && !detached && !paused;
    match disk.lag_usec {
        None if moves => found.push(Trouble::Unprotected),
        Some(_) if moves && is_late(disk) => found.push(Trouble::Late),
        _ => {}
    }
    if disk.consistency == "fuzzy" {
        found.push(Trouble::Fuzzy);
    }
    if !disk.damage.is_empty() {
        found.push(Trouble::Damaged);
    }
    if !disk.last_error.is_empty() && !failed {
        found.push(Trouble::Error);
    }
    found
}

impl Report {
    fn protected(&self) -> usize {
        self.disks.iter().filter(|disk| is_protected(disk)).count()
    }

    /// What is wrong with a disk: the trouble, what is so, and what to do.
    fn problems(&self, disk: &Disk, both: bool) -> Vec<(Trouble, String, String)> {
        let explain = |trouble| {
            let (text, advice) = self.explain(disk, trouble, both);
            (trouble, text, advice)
        };
        troubles(disk).into_iter().map(explain).collect()
    }

    /// Where a person finds the agent of a disk.
    fn host<'a>(&'a self, disk: &'a Disk) -> &'a str {
        match self.role {
            Role::Agent => "this host",
            Role::Dispatcher => {
                let agent = self.agents.iter().find(|agent| agent.id == disk.agent);
                agent.map_or(disk.agent.as_str(), Agent::host)
            }
        }
    }

    /// A `blxctl` command about a disk, to be typed on the host of `side`.
    fn command(&self, side: Role, verb: &str, disk: &Disk, both: bool) -> String {
        let role = if both && side == self.role { format!(" --role {side}") } else { String::new() };
        let agent = if side == Role::Dispatcher { format!(" {}", disk.agent) } else { String::new() };
        let place = match (side, self.role) {
            (Role::Agent, Role::Dispatcher) => format!(" on {}", self.host(disk)),
            (Role::Dispatcher, Role::Agent) => " on the dispatcher".to_owned(),
            _ => String::new(),
        };
        format!("'blxctl{role} {verb}{agent} --disk {}'{place}", disk.name())
    }

    fn explain(&self, disk: &Disk, trouble: Trouble, both: bool) -> (String, String) {
        let command = |side, verb| self.command(side, verb, disk, both);
        let journal = format!("'journalctl -u {}'", crate::connect::unit(self.role));
        match trouble {
            Trouble::Failed => {
                let host = self.host(disk);
                let advice = format!("when that is put right, on {host}: 'systemctl restart blxrep-agent'");
                (format!("failed and not replicated any more: {}", or(&disk.last_error, &journal)), advice)
            }
            Trouble::Detached => {
                let other = match self.role {
                    Role::Dispatcher => format!("'systemctl status blxrep-agent' on {}", self.host(disk)),
                    Role::Agent => "'systemctl status blxrep-dispatcher' on the dispatcher".to_owned(),
                };
                (
                    "detached: agent and dispatcher are not connected".to_owned(),
                    format!("check the network and {other}"),
                )
            }
            Trouble::Paused { agent, dispatcher } => {
                let sides = [(agent, Role::Agent), (dispatcher, Role::Dispatcher)];
                let sides: Vec<_> = sides.into_iter().filter(|(by, _)| *by).map(|(_, side)| side).collect();
                if sides.is_empty() {
                    return ("paused".to_owned(), command(self.role, "resume"));
                }
                let by: Vec<_> = sides.iter().map(|side| format!("the {side}")).collect();
                let commands: Vec<_> = sides.iter().map(|side| command(*side, "resume")).collect();
                (format!("paused by {}", by.join(" and ")), commands.join(" and "))
            }
            Trouble::Unprotected if disk.is(DiskState::Copying) => {
                let text =
                    format!("no checkpoint yet: the first copy is at {}", render::percent(disk.progress));
                (text, "wait for it: 'blxctl watch'".to_owned())
            }
            Trouble::Unprotected => ("no checkpoint yet".to_owned(), command(self.role, "sync")),
            Trouble::Late => {
                let age = render::span(disk.lag_usec.unwrap_or(0));
                let every = render::span(disk.sync_every_usec);
                let text = format!("late: the newest checkpoint is {age} old, one is due every {every}");
                match DiskState::ALL.iter().find(|state| disk.is(**state)) {
                    Some(state @ (DiskState::Copying | DiskState::Comparing | DiskState::Syncing)) => {
                        (format!("{text}; {state} now"), "wait for it: 'blxctl watch'".to_owned())
                    }
                    _ => (text, format!("{}, and if that fails {journal}", command(self.role, "sync"))),
                }
            }
            Trouble::Fuzzy => (
                "the newest checkpoint is fuzzy: its blocks are of slightly different moments".to_owned(),
                format!("when the disk is less busy: {}", command(self.role, "sync")),
            ),
            Trouble::Damaged => {
                let more = match disk.damage.len() {
                    0 | 1 => String::new(),
                    n => format!(" (and {} more)", n - 1),
                };
                let text = format!("{}{more}", disk.damage.first().map_or("", String::as_str));
                let verify = format!("'blxctl verify --agent {} --disk {} --all'", disk.agent, disk.id);
                let advice = format!(
                    "{verify} says which checkpoints are sound; put the file back if there is a copy, and verify again"
                );
                (text, advice)
            }
            Trouble::Error => (format!("error: {}", disk.last_error), journal),
        }
    }

    fn counts(&self) -> String {
        let disks = self.disks.len();
        if disks == 0 {
            return "no disks: nothing is protected".to_owned();
        }
        let noun = if disks == 1 { "disk" } else { "disks" };
        format!("{} of {disks} {noun} protected", self.protected())
    }

    /// The agents that were enrolled and have never shown a disk.
    fn silent(&self) -> impl Iterator<Item = &Agent> {
        self.agents.iter().filter(|agent| agent.disks == 0)
    }

    /// The agents of whose name a machine is refused, and what to do.
    fn refused(&self) -> impl Iterator<Item = (&Agent, String)> {
        let place = if self.role == Role::Agent { " on the dispatcher" } else { "" };
        let advice = move |agent: &Agent| {
            let id = &agent.id;
            format!(
                "if it is the right one: 'blxctl accept {id}'{place}; if it is a copy: enroll it under a name of its own"
            )
        };
        let refused = self.agents.iter().filter(|agent| !agent.refused.is_empty());
        refused.map(move |agent| (agent, advice(agent)))
    }

    /// The devices that hold only a part of a restore: whose host, what, and what to do.
    fn unfinished<'a>(&'a self) -> impl Iterator<Item = (&'a Agent, &'a str, &'static str)> {
        const ADVICE: &str = "restore it again: what it holds already is not sent once more";
        let of = |agent: &'a Agent| agent.unfinished.iter().map(move |text| (agent, text.as_str(), ADVICE));
        self.agents.iter().flat_map(of)
    }

    /// The disks that something is wrong with.
    fn disks_attention(&self) -> usize {
        self.disks.iter().filter(|disk| !is_protected(disk) || !troubles(disk).is_empty()).count()
    }

    /// All that needs attention.
    fn attention(&self) -> usize {
        self.disks_attention() + self.silent().count() + self.refused().count() + self.unfinished().count()
    }

    fn text(&self, both: bool) -> String {
        let mut out = String::new();
        if !self.disks.is_empty() {
            out.push_str(&format!("\n{}", render::exposure(&self.disks.iter().collect::<Vec<_>>())));
        }
        if !self.jobs.is_empty() {
            out.push_str("\nrunning:\n");
            out.extend(self.jobs.iter().map(|job| format!("  {}\n", render::job_line(job))));
        }
        if let Some(scrub) = &self.scrub {
            out.push_str(&format!("\n{}\n", render::scrub(scrub)));
        }
        let mut problems = String::new();
        for (agent, advice) in self.refused() {
            problems.push_str(&format!("  {}: {}\n    {advice}\n", agent.id, agent.refused));
        }
        for (agent, text, advice) in self.unfinished() {
            problems.push_str(&format!("  {}: {text}\n    {advice}\n", agent.id));
        }
        for disk in &self.disks {
            for (_, text, advice) in self.problems(disk, both) {
                problems.push_str(&format!("  {} {}: {text}\n    {advice}\n", disk.agent, disk.name()));
            }
        }
        for agent in self.silent() {
            let (id, host) = (&agent.id, agent.host());
            problems.push_str(&format!(
                "  {id}: enrolled, and has never shown a disk\n    'systemctl status blxrep-agent' on {host}\n"
            ));
        }
        if !problems.is_empty() {
            out.push_str(&format!("\nto do:\n{problems}"));
        }
        if self.disks.is_empty() && problems.is_empty() {
            let advice = match self.role {
                Role::Dispatcher => "let an agent connect: 'blxrep enroll --help'",
                Role::Agent => "see 'journalctl -u blxrep-agent'",
            };
            out.push_str(&format!("\nto do:\n  {advice}\n"));
        }
        out
    }

    fn json(&self, both: bool) -> Value {
        let disk = |disk: &Disk| {
            let mut value = disk.json();
            let problems = self.problems(disk, both).into_iter().map(
                |(trouble, text, advice)| json!({ "kind": trouble.word(), "message": text, "advice": advice }),
            );
            let problems: Vec<_> = problems.collect();
            if let Some(object) = value.as_object_mut() {
                object.insert("protected".to_owned(), is_protected(disk).into());
                object.insert("problems".to_owned(), problems.into());
            }
            value
        };
        let refused = |(agent, advice): (&Agent, String)| json!({ "agent": agent.id, "message": agent.refused, "advice": advice });
        let unfinished = |(agent, message, advice): (&Agent, &str, &str)| json!({ "agent": agent.id, "message": message, "advice": advice });
        json!({
            "role": self.role.as_str(),
            "bus_name": bus_name(self.role),
            "version": self.version,
            "disks_total": self.disks.len(),
            "disks_protected": self.protected(),
            "disks_attention": self.disks_attention(),
            "targets_unfinished": self.unfinished().map(unfinished).collect::<Vec<_>>(),
            "agents_refused": self.refused().map(refused).collect::<Vec<_>>(),
            "agents_without_disks": self.silent().map(|agent| &agent.id).collect::<Vec<_>>(),
            "disks": self.disks.iter().map(disk).collect::<Vec<_>>(),
            "scrub": self.scrub.as_ref().map(Scrub::json),
            "jobs": self.jobs.iter().map(Job::json).collect::<Vec<_>>(),
        })
    }
}

fn or<'a>(text: &'a str, other: &'a str) -> &'a str {
    if text.is_empty() { other } else { text }
}

/// The verdict in one line, then each daemon in turn.
pub(crate) fn text(reports: &[Report]) -> String {
    let both = reports.len() > 1;
    let attention: usize = reports.iter().map(Report::attention).sum();
    let verdicts: Vec<_> = reports
        .iter()
        .map(|report| match both {
            true => format!("{}: {}", report.role, report.counts()),
            false => report.counts(),
        })
        .collect();
    let mut out = verdicts.join("; ");
    match attention {
        0 => {}
        1 => out.push_str(", 1 needs attention"),
        n => out.push_str(&format!(", {n} need attention")),
    }
    out.push('\n');
    for report in reports {
        if both {
            out.push_str(&format!("\n{}:\n", report.role));
        }
        out.push_str(&report.text(both));
    }
    out
}

/// The same for programs.
pub(crate) fn json(reports: &[Report]) -> Value {
    let both = reports.len() > 1;
    json!({
        "ok": exit(reports).is_none(),
        "daemons": reports.iter().map(|report| report.json(both)).collect::<Vec<_>>(),
    })
}

/// Whether something needs attention. Having nothing to protect does.
pub(crate) fn exit(reports: &[Report]) -> Option<Exit> {
    let fine = reports.iter().all(|report| !report.disks.is_empty() && report.attention() == 0);
    (!fine).then_some(Exit::Attention)
}

#[cfg(test)]
mod tests;
