//! Which disks a person means, and what of them can be asked for now. Pure.

use blxrep_dbus::problem::{Problem, ProblemKind};
use blxrep_dbus::words::DiskState;

use super::control::Which;
use crate::ids::AgentId;
use crate::status::DiskStatus;

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() { "none yet".to_owned() } else { names.join(", ") }
}

impl Which {
    /// The agent's id.
    ///
    /// # Errors
    /// InvalidArgument.
    pub fn agent(&self) -> Result<AgentId, Problem> {
        self.agent.parse().map_err(|e| Problem::new(ProblemKind::InvalidArgument, format!("{e}")))
    }

    /// Those of the known disks that are meant: one at least.
    ///
    /// # Errors
    /// NoSuchAgent, NoSuchDisk, InvalidArgument.
    pub fn among(&self, known: &[DiskStatus]) -> Result<Vec<DiskStatus>, Problem> {
        let agent = self.agent()?;
        let mut disks: Vec<_> = known.iter().filter(|disk| disk.agent == agent).cloned().collect();
        if disks.is_empty() {
            let there = list(known.iter().map(|disk| disk.agent.as_str()));
            let text = format!("no disk of an agent {agent} is known; the agents with disks are: {there}");
            return Err(Problem::new(ProblemKind::NoSuchAgent, text));
        }
        let Some(name) = &self.disk else { return Ok(disks) };
        let there = list(disks.iter().flat_map(|disk| [disk.disk.as_str(), disk.device.as_str()]));
        let device = name.strip_prefix("/dev/").unwrap_or(name);
        if let Some(at) = disks.iter().position(|disk| disk.disk.as_str() == name) {
            return Ok(vec![disks.swap_remove(at)]);
        }
        disks.retain(|disk| disk.device == device);
        match disks.len() {
            1 => Ok(disks),
            0 => Err(Problem::new(
                ProblemKind::NoSuchDisk,
                format!("agent {agent} has no disk {name:?}; there is: {there}"),
            )),
            _ => Err(Problem::new(
                ProblemKind::InvalidArgument,
                format!(
                    "several disks of agent {agent} were {device}: name one by its id; there is: {there}"
                ),
            )),
        }
    }

    /// Those that a checkpoint can be taken of now. Where all of an agent's disks are meant, the paused ones are left out.
    ///
    /// # Errors
    /// As [`Self::among`]; Paused, NotConnected, Busy, Failed.
    pub fn to_sync(&self, known: &[DiskStatus]) -> Result<Vec<DiskStatus>, Problem> {
        let mut disks = self.among(known)?;
        let (agent, paused) =
            (&self.agent, |disk: &DiskStatus| disk.paused_by_agent || disk.paused_by_dispatcher);
        if disks.iter().all(paused) {
            let text =
                format!("agent {agent}'s disks that are meant are paused: 'blxctl resume {agent}' first");
            return Err(Problem::new(ProblemKind::Paused, text));
        }
        disks.retain(|disk| !paused(disk));
        for disk in &disks {
            let name = format!("{}'s {}", disk.agent, disk.device);
            let (kind, text) = match disk.state {
                DiskState::Detached => (ProblemKind::NotConnected, "is not connected: see 'blxctl status'"),
                DiskState::Copying | DiskState::Comparing => {
                    (ProblemKind::Busy, "is still being copied or compared; a checkpoint follows by itself")
                }
                DiskState::Failed => (ProblemKind::Failed, "is not replicated any more: see 'blxctl status'"),
                DiskState::Idle | DiskState::Syncing | DiskState::Paused => continue,
            };
            return Err(Problem::new(kind, format!("{name} {text}")));
        }
        Ok(disks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(agent: &str, id: &str, device: &str) -> DiskStatus {
        let mut disk = DiskStatus::new(agent.parse().unwrap(), id.parse().unwrap(), device.into(), 1 << 20);
        disk.state = DiskState::Idle;
        disk
    }

    fn which(agent: &str, disk: Option<&str>) -> Which {
        Which { agent: agent.to_owned(), disk: disk.map(str::to_owned) }
    }

    #[test]
    fn disks_are_meant_by_id_or_device_and_never_another_agents() {
        let known = [disk("web1", "s1", "sda"), disk("web1", "s2", "sdb"), disk("web10", "s1", "sda")];
        let ids = |which: Which| {
            which.among(&known).map(|d| d.iter().map(|d| d.disk.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(ids(which("web1", None)).unwrap(), ["s1", "s2"]);
        assert_eq!(ids(which("web1", Some("s2"))).unwrap(), ["s2"]);
        assert_eq!(ids(which("web1", Some("/dev/sda"))).unwrap(), ["s1"]);
        let kind = |w: Which| w.among(&known).unwrap_err().kind;
        assert_eq!(kind(which("web10", Some("sdb"))), ProblemKind::NoSuchDisk);
        assert_eq!(kind(which("web", None)), ProblemKind::NoSuchAgent);
        assert_eq!(kind(which("../web", None)), ProblemKind::InvalidArgument);
        let twice = [disk("web1", "s1", "sda"), disk("web1", "s2", "sda")];
        assert_eq!(which("web1", Some("sda")).among(&twice).unwrap_err().kind, ProblemKind::InvalidArgument);
    }

    #[test]
    fn only_what_can_be_synced_now_is() {
        let mut known = [disk("web1", "s1", "sda"), disk("web1", "s2", "sdb")];
        known[0].paused_by_agent = true;
        assert_eq!(which("web1", None).to_sync(&known).unwrap(), known[1..]);
        let kind = |w: Which, known: &[DiskStatus]| w.to_sync(known).unwrap_err().kind;
        assert_eq!(kind(which("web1", Some("sda")), &known), ProblemKind::Paused);
        for (state, expected) in [
            (DiskState::Detached, ProblemKind::NotConnected),
            (DiskState::Copying, ProblemKind::Busy),
            (DiskState::Comparing, ProblemKind::Busy),
            (DiskState::Failed, ProblemKind::Failed),
        ] {
            known[1].state = state;
            assert_eq!(kind(which("web1", None), &known), expected);
        }
    }
}
