//! Restoring one checkpoint into a file or onto a device.

use std::path::PathBuf;

use super::chosen::Chosen;
use super::target::{Output, Target};
use super::verify::Tick;
use super::{Meter, Progress, RestoreError};
use crate::checkpoint::Checkpoint;
use crate::ids::AgentId;
use crate::store::view::View;

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
    /// Where to; without it into `<agent>-<disk>-<id>.img` in the current directory.
    pub output: Option<Output>,
}

/// What was restored.
#[derive(Debug, Clone)]
pub struct RestoreReport {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// Where it is now.
    pub output: PathBuf,
    /// The sectors that could not be read on the agent's disk and are zeros here, as
    /// [`crate::unreadable::sectors`] names them.
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
    let RestoreOptions { data_dir, agent, disk, checkpoint, output } = options;
    let chosen = Chosen::find(&data_dir, &agent, disk.as_deref(), &checkpoint)?;
    let verify_bytes = chosen.verify_bytes()?;
    let Some(checkpoint) = chosen.checkpoint().cloned() else {
        let mut meter = Meter::new(progress, verify_bytes);
        return Err(RestoreError::Damaged(chosen.damage(&mut |bytes| meter.tick(bytes))?));
    };
    let size = checkpoint.geometry.size_bytes();
    let name = || Output::Path(PathBuf::from(format!("{agent}-{}-{}.img", chosen.owner.disk, checkpoint.id)));
    let mut target = output.unwrap_or_else(name).open(size)?;

    let mut meter = Meter::new(progress, verify_bytes.saturating_add(2 * size));
    let mut tick = |bytes| meter.tick(bytes);
    chosen.verified(&mut tick)?;
    let view = chosen.view()?;
    let unreadable_sectors = chosen.unreadable_sectors()?;
    let cloned = match chosen.base() {
        Some(base) => target.clone_from(&data_dir.join(chosen.owner.img(base)), size)?,
        None => false,
    };
    let written = write(&view, &mut target, cloned, &mut tick)
        .and_then(|written_bytes| read_back(&view, &target, &mut tick).map(|()| written_bytes));
    let written_bytes = written.map_err(|e| target.explain(e))?;
    let output = target.finish()?;
    Ok(RestoreReport { checkpoint, output, unreadable_sectors, written_bytes })
}

fn write(view: &View, target: &mut Target, cloned: bool, tick: Tick<'_>) -> Result<u64, RestoreError> {
    let geometry = view.geometry();
    let mut written = 0;
    for group in 0..geometry.groups() {
        let (first, count) = geometry.group_extent(group);
        let (offset, len) = geometry.range(first, count);
        if !cloned || view.is_overlaid(group) {
            let found = view.read_group(group)?;
            written += target.put(offset, len, found.as_ref().map(|g| g.data.as_slice()))?;
        }
        tick(len)?;
    }
    Ok(written)
}

fn read_back(view: &View, target: &Target, tick: Tick<'_>) -> Result<(), RestoreError> {
    let geometry = view.geometry();
    target.read_back(geometry, 0..geometry.groups(), tick, |group, first, found| {
        let hashes = view.hashes(group)?;
        Ok(found
            .iter()
            .zip(&hashes)
            .zip(first..)
            .find(|((a, b), _)| **a != b.content())
            .map(|(_, block)| block))
    })
}
