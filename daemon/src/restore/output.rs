//! Restoring one checkpoint, or one partition of it, into a file or onto a device.

use std::path::PathBuf;

use super::chosen::Chosen;
use super::part::Part;
use super::target::{Output, Target};
use super::verify::Tick;
use super::{Meter, Progress, RestoreError};
use crate::bitmap::BlockSet;
use crate::checkpoint::Checkpoint;
use crate::ids::AgentId;
use crate::unreadable::{RANGES_MAX, sectors};

/// What to restore, and where to.
#[derive(Debug)]
pub struct RestoreOptions {
    /// The data directory.
    pub data_dir: PathBuf,
    /// Whose disk.
    pub agent: AgentId,
    /// Which disk, by id or device name; not needed where the agent has one.
    pub disk: Option<String>,
    /// An id, `YYYYMMDDHHMM` or `latest`.
    pub checkpoint: String,
    /// Only this partition, by its number.
    pub partition: Option<u32>,
    /// Where to; without it into `<agent>-<disk>-<id>.img`, or `<agent>-<disk>-<id>-part<number>.img`, in the current directory.
    pub output: Option<Output>,
}

/// What was restored.
#[derive(Debug, Clone)]
pub struct RestoreReport {
    /// The checkpoint, with the size and the unreadable blocks of what was restored of it.
    pub checkpoint: Checkpoint,
    /// Where it is now.
    pub output: PathBuf,
    /// The sectors that could not be read on the agent's disk and are zeros here, as
    /// [`crate::unreadable::sectors`] names them; counted from the beginning of what was restored.
    pub unreadable_sectors: String,
    /// Bytes that were written; the rest is holes or shared with the base image.
    pub written_bytes: u64,
}

/// Restores a checkpoint. All it rests on is verified before the first byte is written, and what was written is read
/// back. `progress` is told of verifying, writing and reading back together.
///
/// # Errors
/// Usage, NotFound, Damaged (all damage that was found), Io, Canceled; then no file is left behind.
pub fn restore(options: RestoreOptions, progress: Progress<'_>) -> Result<RestoreReport, RestoreError> {
    let RestoreOptions { data_dir, agent, disk, checkpoint, partition, output } = options;
    let chosen = Chosen::find(&data_dir, &agent, disk.as_deref(), &checkpoint)?;
    let verify_bytes = chosen.verify_bytes()?;
    let Some(mut checkpoint) = chosen.checkpoint().cloned() else {
        let mut meter = Meter::new(progress, verify_bytes);
        return Err(RestoreError::Damaged(chosen.damage(&mut |bytes| meter.tick(bytes))?));
    };
    if partition.is_some() {
        checkpoint.geometry = Part::new(chosen.view()?, partition)?.geometry();
    }
    let size = checkpoint.geometry.size_bytes();
    let name = || {
        let part = partition.map(|number| format!("-part{number}")).unwrap_or_default();
        Output::Path(PathBuf::from(format!("{agent}-{}-{}{part}.img", chosen.owner.disk, checkpoint.id)))
    };
    let mut target = output.unwrap_or_else(name).open(size)?;

    let mut meter = Meter::new(progress, verify_bytes.saturating_add(2 * size));
    let mut tick = |bytes| meter.tick(bytes);
    chosen.verified(&mut tick)?;
    let part = Part::new(chosen.view()?, partition)?;
    let unreadable = if checkpoint.unreadable_blocks > 0 { part.unreadable()? } else { BlockSet::new() };
    checkpoint.unreadable_blocks = u32::try_from(unreadable.len()).unwrap_or(u32::MAX);
    let unreadable_sectors = sectors(&unreadable, part.geometry(), RANGES_MAX);
    let cloned = match chosen.base() {
        Some(base) if partition.is_none() => {
            target.clone_from(&data_dir.join(chosen.owner.img(base)), size)?
        }
        _ => false,
    };
    let written = write(&part, &mut target, cloned, &mut tick)
        .and_then(|written_bytes| read_back(&part, &target, &mut tick).map(|()| written_bytes));
    let written_bytes = written.map_err(|e| target.explain(e))?;
    let output = target.finish()?;
    Ok(RestoreReport { checkpoint, output, unreadable_sectors, written_bytes })
}

fn write(part: &Part, target: &mut Target, cloned: bool, tick: Tick<'_>) -> Result<u64, RestoreError> {
    let geometry = part.geometry();
    let mut written = 0;
    for group in 0..geometry.groups() {
        let (first, count) = geometry.group_extent(group);
        let (offset, len) = geometry.range(first, count);
        if !cloned || part.is_overlaid(group) {
            let found = part.read(group)?;
            written += target.put(offset, len, found.as_ref().map(|g| g.data.as_slice()))?;
        }
        tick(len)?;
    }
    Ok(written)
}

fn read_back(part: &Part, target: &Target, tick: Tick<'_>) -> Result<(), RestoreError> {
    let geometry = part.geometry();
    target.read_back(geometry, 0..geometry.groups(), tick, |group, first, found| {
        let hashes = part.hashes(group)?;
        Ok(found
            .iter()
            .zip(&hashes)
            .zip(first..)
            .find(|((a, b), _)| **a != b.content())
            .map(|(_, block)| block))
    })
}
