//! Restoring one checkpoint into a file or onto a device.

use std::path::PathBuf;

use super::RestoreError;
use super::find::{self, Found};
use super::target::Target;
use super::verify::{Tick, verify, verify_bytes, view};
use crate::checkpoint::chain::{self, Chain};
use crate::checkpoint::{Checkpoint, select};
use crate::hash::{BlockHash, hash_block, is_zero};
use crate::ids::AgentId;
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::store::view::View;

/// What to restore, and where to.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// The data directory.
    pub data_dir: PathBuf,
    /// Whose disk.
    pub agent: AgentId,
    /// Which disk, by id or device name; not needed where the agent has one.
    pub disk: Option<String>,
    /// An id, `YYYYMMDDHHMM` or `latest`.
    pub checkpoint: String,
    /// A new file or a block device; without it `<agent>-<disk>-<id>.img` in the current directory.
    pub output: Option<PathBuf>,
}

/// What was restored.
#[derive(Debug, Clone)]
pub struct RestoreReport {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// Where it is now.
    pub output: PathBuf,
    /// Bytes that were written; the rest is holes or shared with the base image.
    pub written_bytes: u64,
}

/// Restores a checkpoint. All it rests on is verified before the first byte is written, and what was written is read
/// back. `progress` is told the bytes done and the bytes in all (verifying, writing and reading back together).
///
/// # Errors
/// Usage, NotFound, Damaged (all damage that was found), Io; then no file is left behind.
pub fn restore(options: &RestoreOptions, progress: &dyn Fn(u64, u64)) -> Result<RestoreReport, RestoreError> {
    let dir = find::data_dir(&options.data_dir)?;
    let Found { owner, chain } = find::disk(&dir, &options.agent, options.disk.as_deref())?;
    let id = select::select(&chain.ids(), &options.checkpoint).map_err(|e| match e {
        select::SelectError::Form(_) => RestoreError::Usage(e.to_string()),
        select::SelectError::None { .. } => RestoreError::NotFound(e.to_string()),
    })?;
    let Some(at) = chain.members.iter().position(|m| m.checkpoint.id == id) else {
        let mut damage = Vec::from_iter(chain.broken.iter().map(|(damage, _)| damage.clone()));
        damage.extend(verify(&dir, &owner, &chain, chain.members.len(), &mut |_| {})?);
        return Err(RestoreError::Damaged(damage));
    };
    let count = at + 1;
    let members = chain.members.get(..count).unwrap_or_default();
    let checkpoint = members.last().map(|m| m.checkpoint.clone());
    let checkpoint =
        checkpoint.ok_or_else(|| RestoreError::NotFound(format!("there is no checkpoint {id}")))?;
    let size = checkpoint.geometry.size_bytes();
    let name = || PathBuf::from(format!("{}-{}-{id}.img", owner.agent, owner.disk));
    let output = options.output.clone().unwrap_or_else(name);
    let target = Target::open(&output, size)?;

    let total = verify_bytes(&dir, &owner, members)? + 2 * size;
    let mut done = 0;
    let mut tick = |bytes: u64| {
        done = (done + bytes).min(total);
        progress(done, total);
    };
    verified(&dir, &owner, chain.clone(), count, &mut tick)?;
    let mut view = view(&dir, &owner, &chain, count)?;
    let base = members.first().map(|m| options.data_dir.join(owner.img(m.checkpoint.id)));
    let cloned = base.is_some_and(|base| target.clone_from(&base));
    let written_bytes = write(&mut view, &target, cloned, &mut tick)?;
    target.sync()?;
    read_back(&mut view, &target, &mut tick)?;
    target.finish()?;
    Ok(RestoreReport { checkpoint, output, written_bytes })
}

/// Verifies; once more if a commit changed the files meanwhile.
fn verified(
    dir: &Dir,
    owner: &Paths,
    chain: Chain,
    count: usize,
    tick: Tick<'_>,
) -> Result<(), RestoreError> {
    let damage = verify(dir, owner, &chain, count, tick)?;
    if damage.is_empty() {
        return Ok(());
    }
    let again = chain::load(dir, owner)?;
    let moved = again.newest().map(|m| m.link) != chain.newest().map(|m| m.link);
    let damage = if moved { verify(dir, owner, &again, count, tick)? } else { damage };
    if damage.is_empty() { Ok(()) } else { Err(RestoreError::Damaged(damage)) }
}

fn write(view: &mut View, target: &Target, cloned: bool, tick: Tick<'_>) -> Result<u64, RestoreError> {
    let geometry = view.geometry();
    let mut written = 0;
    for group in 0..geometry.groups() {
        let (first, count) = geometry.group_extent(group);
        let (offset, len) = geometry.range(first, count);
        if !cloned || view.is_overlaid(group) {
            let found = view.read_group(group)?;
            let zeros = found.is_none();
            let data = found.map_or_else(|| vec![0; len as usize], |g| g.data);
            if zeros && !cloned && target.begins_as_zeros() {
                // A hole.
            } else if cloned || !target.begins_as_zeros() {
                target.write(&data, offset)?;
                written += len;
            } else {
                written += write_sparse(target, &data, offset, geometry.block_bytes())?;
            }
        }
        tick(len);
    }
    Ok(written)
}

/// Writes the blocks that are not zeros.
fn write_sparse(target: &Target, data: &[u8], offset: u64, block_bytes: usize) -> Result<u64, RestoreError> {
    let mut written = 0;
    let mut at = offset;
    for part in data.chunks(block_bytes.max(4096)) {
        if !is_zero(part) {
            target.write(part, at)?;
            written += part.len() as u64;
        }
        at += part.len() as u64;
    }
    Ok(written)
}

fn read_back(view: &mut View, target: &Target, tick: Tick<'_>) -> Result<(), RestoreError> {
    let geometry = view.geometry();
    let block_bytes = geometry.block_bytes();
    for group in 0..geometry.groups() {
        let (first, count) = geometry.group_extent(group);
        let (offset, len) = geometry.range(first, count);
        let hashes: Vec<BlockHash> = view.hashes(group)?;
        let mut data = vec![0; len as usize];
        target.read(&mut data, offset)?;
        let mut blocks = data.chunks(block_bytes).zip(&hashes).zip(first..);
        if let Some((_, block)) = blocks.find(|((data, hash), _)| hash_block(data, block_bytes) != **hash) {
            return Err(target.faulty(block));
        }
        tick(len);
    }
    Ok(())
}
