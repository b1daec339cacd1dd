//! Which disk a person means.

use std::path::Path;
use std::sync::Arc;

use super::{Missing, RestoreError};
use crate::checkpoint::chain::{self, Chain};
use crate::ids::{AgentId, DiskId};
use crate::store::files::RealFiles;
use crate::store::handle::Dir;
use crate::store::layout::Paths;

/// A disk there are files of.
pub(super) struct Found {
    pub(super) owner: Paths,
    pub(super) chain: Chain,
}

impl Found {
    fn device(&self) -> &str {
        self.chain.newest().map_or("", |m| m.checkpoint.device.as_str())
    }
}

/// The data directory, which must be one.
pub(super) fn data_dir(path: &Path) -> Result<Dir, RestoreError> {
    if !path.join("snapshot").is_dir() {
        let text = format!("{} is no data directory: it has no directory snapshot", path.display());
        return Err(RestoreError::NotFound(Missing::Agent, text));
    }
    Ok(Dir::new(Arc::new(RealFiles::new(path))))
}

/// The agent's disks that `disk` (an id, or a device's name with or without `/dev/`) means; all without it.
pub(super) fn disks(dir: &Dir, agent: &AgentId, disk: Option<&str>) -> Result<Vec<Found>, RestoreError> {
    let mut all = Vec::new();
    for id in chain::disks(dir, agent)? {
        let owner = Paths::new(agent.clone(), id);
        let chain = chain::load_readable(dir, &owner)?;
        all.push(Found { owner, chain });
    }
    if all.is_empty() {
        let agents = list(chain::agents(dir)?.iter().map(AgentId::to_string));
        let text = format!("nothing is stored of agent {agent}; there is: {agents}");
        return Err(RestoreError::NotFound(Missing::Agent, text));
    }
    let Some(disk) = disk else { return Ok(all) };
    let names = list(all.iter().map(|f| format!("{} ({})", f.owner.disk, f.device())));
    let by_id = |f: &Found| Ok(&f.owner.disk) == disk.parse::<DiskId>().as_ref();
    if let Some(at) = all.iter().position(by_id) {
        return Ok(vec![all.swap_remove(at)]);
    }
    let device = disk.strip_prefix("/dev/").unwrap_or(disk);
    all.retain(|f| !device.is_empty() && f.device().strip_prefix("/dev/").unwrap_or(f.device()) == device);
    match all.len() {
        1 => Ok(all),
        0 => {
            let text = format!("agent {agent} has no disk {disk}; there is: {names}");
            Err(RestoreError::NotFound(Missing::Disk, text))
        }
        _ => Err(RestoreError::Usage(format!(
            "several disks of agent {agent} were {disk}: ask for one by its id; there is: {names}"
        ))),
    }
}

/// The one disk that is meant.
pub(super) fn disk(dir: &Dir, agent: &AgentId, disk: Option<&str>) -> Result<Found, RestoreError> {
    let mut all = disks(dir, agent, disk)?;
    let names = list(all.iter().map(|f| format!("{} ({})", f.owner.disk, f.device())));
    match (all.pop(), all.is_empty()) {
        (Some(found), true) => Ok(found),
        _ => Err(RestoreError::Usage(format!("agent {agent} has several disks, name one: {names}"))),
    }
}

fn list(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.collect();
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}
