//! The checkpoints there are, for people and scripts.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{RestoreError, find};
use crate::boot_test::BootTest;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::chain::Member;
use crate::ids::{AgentId, CheckpointId};
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::store::{StoreError, bak};

/// One checkpoint, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShowRow {
    /// The id, as text.
    pub checkpoint: String,
    /// Whose it is.
    pub agent: String,
    /// The disk's id.
    pub disk: String,
    /// The device's name on the agent when it was taken; empty if that cannot be read.
    pub device: String,
    /// When it was frozen, RFC 3339 in UTC.
    pub time: String,
    /// `application`, `filesystem`, `crash` or `fuzzy`; `damaged` if it cannot be restored as things are.
    pub consistency: String,
    /// The disk's size in bytes; 0 if that cannot be read.
    pub size_bytes: u64,
    /// Bytes of the blocks that changed since the parent; of the whole disk for the base.
    pub delta_bytes: u64,
    /// Bytes its own files take.
    pub stored_bytes: u64,
    /// The checkpoint it builds on.
    pub parent: Option<String>,
    /// How long file systems were frozen, in milliseconds.
    pub freeze_ms: u32,
    /// How many blocks of the disk could not be read: zeros stand for them.
    pub unreadable_blocks: u32,
    /// What a person should know; the damage, if there is.
    pub note: String,
    /// What came of starting it in a virtual machine, `passed` or `failed`; `None` if nobody has.
    pub boot: Option<String>,
    /// When that was, RFC 3339 in UTC.
    pub boot_time: Option<String>,
}

/// The checkpoints of an agent's disks, oldest first, from minute `start` to minute `end` (`YYYYMMDDHHMM` as a number,
/// both included). Only what the files say of themselves is looked at, not their data.
///
/// # Errors
/// NotFound or Usage for an agent or disk that is not there or not clear; Io.
pub fn show(
    data_dir: &Path,
    agent: &AgentId,
    disk: Option<&str>,
    start: Option<u64>,
    end: Option<u64>,
) -> Result<Vec<ShowRow>, RestoreError> {
    let dir = find::data_dir(data_dir)?;
    let wanted = |id: CheckpointId| {
        start.is_none_or(|minute| id.minute() >= minute) && end.is_none_or(|minute| id.minute() <= minute)
    };
    let mut rows = Vec::new();
    for found in find::disks(&dir, agent, disk)? {
        let members = found.chain.members.iter().filter(|m| wanted(m.checkpoint.id));
        for member in members {
            rows.push(row(&dir, data_dir, &found.owner, member)?);
        }
        if let Some((damage, ids)) = &found.chain.broken {
            let lost = ids.iter().filter(|id| wanted(**id));
            rows.extend(lost.map(|id| damaged_row(data_dir, &found.owner, *id, damage.to_string())));
        }
    }
    Ok(rows)
}

fn time_text(unix_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(unix_ms).unwrap_or(jiff::Timestamp::UNIX_EPOCH).to_string()
}

fn own_bytes(data_dir: &Path, owner: &Paths, id: CheckpointId) -> u64 {
    let files = [owner.bak(id), owner.img(id), owner.sum(id)];
    files.iter().filter_map(|f| data_dir.join(f).metadata().ok()).map(|m| m.blocks() * 512).sum()
}

fn changed_bytes(dir: &Dir, owner: &Paths, member: &Member) -> Result<u64, RestoreError> {
    let Checkpoint { id, geometry, parent, .. } = &member.checkpoint;
    if parent.is_none() {
        return Ok(geometry.size_bytes());
    }
    let file = dir.open(&owner.bak(*id), false)?;
    match bak::read_index(&file, &member.header, 0) {
        Ok(map) => {
            Ok(map.pieces().map(|piece| geometry.range(piece.extent.first, piece.extent.count).1).sum())
        }
        // A restore says what is damaged; a list does not fail for it.
        Err(StoreError::Damaged(_)) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

fn row(dir: &Dir, data_dir: &Path, owner: &Paths, member: &Member) -> Result<ShowRow, RestoreError> {
    let c = &member.checkpoint;
    let boot = BootTest::find(data_dir, owner, c.id);
    Ok(ShowRow {
        checkpoint: c.id.to_string(),
        agent: c.agent.to_string(),
        disk: c.disk.to_string(),
        device: c.device.clone(),
        time: time_text(i64::try_from(c.time_unix_ms).unwrap_or(i64::MAX)),
        consistency: c.consistency.to_string(),
        size_bytes: c.geometry.size_bytes(),
        delta_bytes: changed_bytes(dir, owner, member)?,
        stored_bytes: own_bytes(data_dir, owner, c.id),
        parent: c.parent.map(|id| id.to_string()),
        freeze_ms: c.freeze_ms,
        unreadable_blocks: c.unreadable_blocks,
        note: c.note.clone(),
        boot: boot.as_ref().map(|test| test.result.to_string()),
        boot_time: boot.map(|test| time_text(i64::try_from(test.time_unix_ms).unwrap_or(i64::MAX))),
    })
}

fn damaged_row(data_dir: &Path, owner: &Paths, id: CheckpointId, note: String) -> ShowRow {
    ShowRow {
        checkpoint: id.to_string(),
        agent: owner.agent.to_string(),
        disk: owner.disk.to_string(),
        device: String::new(),
        time: time_text(id.unix_seconds() * 1000),
        consistency: "damaged".into(),
        size_bytes: 0,
        delta_bytes: 0,
        stored_bytes: own_bytes(data_dir, owner, id),
        parent: None,
        freeze_ms: 0,
        unreadable_blocks: 0,
        note,
        boot: None,
        boot_time: None,
    }
}
