//! What is stored of whom, found out at the start.

use std::collections::HashSet;

use tracing::{error, warn};

use super::{Registry, Seen};
use crate::checkpoint::chain;
use crate::geometry::Geometry;
use crate::ids::AgentId;
use crate::message_id::DAMAGE_FOUND;
use crate::status::{DiskStatus, Newest};
use crate::store::catalogue::AgentEntry;
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::store::{StoreError, cst};

impl Registry {
    /// Takes in every agent and disk that is stored. Damage is told, and no reason to stop: other disks are sound. Agents that
    /// the catalogue lacks are entered there from their files; gives how many that are.
    ///
    /// # Errors
    /// Io.
    pub fn survey(&self) -> Result<usize, StoreError> {
        let dir = Dir::new(self.house.files.clone());
        let known = self.catalogued();
        let mut lacking = Vec::new();
        for agent in chain::agents(&dir)? {
            let mut times = Vec::new();
            for disk in chain::disks(&dir, &agent)? {
                let owner = Paths::new(agent.clone(), disk.clone());
                let chain = chain::load(&dir, &owner)?;
                times.extend(chain.members.iter().map(|member| member.checkpoint.time_unix_ms));
                let Some(newest) = chain.newest().map(|member| &member.checkpoint) else { continue };
                let (device, size_bytes) = (newest.device.clone(), newest.geometry.size_bytes());
                let mut status = DiskStatus::new(agent.clone(), disk.clone(), device, size_bytes);
                status.newest = Some(Newest::from(newest));
                status.dirty_bytes = exposed_bytes(&dir, &owner, newest.geometry);
                if let Some((damage, _)) = &chain.broken {
                    error!(MESSAGE_ID = DAMAGE_FOUND, AGENT = %agent, DISK = %disk, "{damage}");
                    status.last_error = Some(damage.to_string());
                }
                self.know(&mut self.state(), status);
            }
            if !known.contains(&agent) {
                let entry = AgentEntry {
                    footprint: serde_json::Value::Null,
                    first_seen_unix_ms: times.iter().min().copied().unwrap_or_default(),
                    last_seen_unix_ms: times.iter().max().copied().unwrap_or_default(),
                };
                self.saw(&agent, Seen::from(&entry));
                lacking.push((agent, entry));
            }
        }
        if let (false, Err(error)) = (lacking.is_empty(), self.house.catalogue.put_agents(&lacking)) {
            warn!("{error}");
        }
        Ok(lacking.len())
    }

    /// Takes in the agents of which the catalogue knows. Nothing depends on it but what is shown.
    fn catalogued(&self) -> HashSet<AgentId> {
        let (entries, damaged) =
            self.house.catalogue.agents().unwrap_or_else(|error| (Vec::new(), vec![error]));
        for error in damaged {
            warn!("{error}");
        }
        let parsed = entries.into_iter().filter_map(|(agent, entry)| Some((agent.parse().ok()?, entry)));
        parsed
            .map(|(agent, entry): (AgentId, _)| {
                self.saw(&agent, Seen::from(&entry));
                agent
            })
            .collect()
    }
}

/// What the journal of the next checkpoint says of changes; where it cannot be read, the disk's thread will say why.
fn exposed_bytes(dir: &Dir, owner: &Paths, geometry: Geometry) -> u64 {
    let journal = dir.open_existing(&owner.next_cst(), false).ok().flatten();
    let journal = journal.and_then(|file| cst::read(&file, owner, None).ok().flatten());
    journal.map_or(0, |journal| journal.reported.len() << geometry.block_shift())
}
