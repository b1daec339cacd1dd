//! Committing a checkpoint: journal, delta, and the name that makes it visible, each durable before the next.
//!
//! What must never happen here: success answered before the name is durable, or a name that is visible before what it
//! names.

use super::StoreError;
use super::block_map::BlockMap;
use super::disk_store::{DiskStore, check_device};
use super::fold;
use super::handle::Handle;
use super::layout::{self, Header, Kind, Link, SealHash};
use crate::checkpoint::{Checkpoint, Consistency};
use crate::geometry::Geometry;
use crate::ids::{CheckpointId, Epoch};

/// Everything a commit says of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// The id; later than the newest.
    pub id: CheckpointId,
    /// The device's name on the agent: 1 to 64 bytes without control characters.
    pub device: String,
    /// Size and block size of the disk.
    pub geometry: Geometry,
    /// How it was proven.
    pub consistency: Consistency,
    /// When it was frozen, in milliseconds since 1970.
    pub time_unix_ms: u64,
    /// How long it was frozen, in milliseconds.
    pub freeze_ms: u32,
    /// The tracker's life.
    pub epoch: Epoch,
    /// What a person should know; cut after 512 bytes.
    pub note: String,
}

impl DiskStore {
    /// Makes the newest state a checkpoint. When this returns it is durable and visible.
    ///
    /// After an error of the file system the checkpoint may or may not be there: [`Self::open`] tells.
    ///
    /// # Errors
    /// Refused, and nothing changed, if the id is not later than the newest, the copy is not complete, the geometry is
    /// another, or a block that was reported changed has not arrived; Damaged; NoSpace; Io.
    pub fn commit(&mut self, seal: Seal) -> Result<Checkpoint, StoreError> {
        self.guarded(|s| {
            s.check_commit(&seal)?;
            let unreadable = s.unreadable()?;
            if let Some(copy) = &mut s.copy {
                copy.sync(&s.dir)?;
            }
            s.open_journal()?;
            let journal = match &mut s.journal {
                Some(journal) => journal.seal(&s.dir, &s.owner, seal.id)?,
                None => return Err(StoreError::Poisoned),
            };
            let header = Header {
                device: seal.device,
                id: Some((seal.id, seal.consistency)),
                journal,
                time_unix_ms: seal.time_unix_ms,
                freeze_ms: seal.freeze_ms,
                unreadable_blocks: u32::try_from(unreadable.len()).unwrap_or(u32::MAX),
                epoch: seal.epoch,
                note: layout::cut_note(&seal.note),
                ..s.open_header(Kind::DeltaEnd)?
            };
            let dir = s.dir.clone();
            let (closing, hash) = s.open_delta()?.seal(&dir, header)?;
            let Some(delta) = s.delta.take() else { return Err(StoreError::Poisoned) };
            s.journal = None;
            let checkpoint = s.finish(seal.id, closing, hash, delta.file(), delta.map())?;
            s.unreadable = unreadable;
            Ok(checkpoint)
        })
    }

    fn check_commit(&self, seal: &Seal) -> Result<(), StoreError> {
        let refuse = |why: String| Err(StoreError::Refused(why));
        check_device(&seal.device)?;
        let geometry = self.known_geometry()?;
        if let Some(newest) = self.newest().filter(|n| n.id >= seal.id) {
            return refuse(format!("checkpoint {} is not later than the newest, {}", seal.id, newest.id));
        }
        if seal.geometry != geometry {
            return refuse(format!(
                "the disk has {} bytes in blocks of {}, not the {} in blocks of {} that were agreed on",
                seal.geometry.size_bytes(),
                seal.geometry.block_bytes(),
                geometry.size_bytes(),
                geometry.block_bytes()
            ));
        }
        if let Some(copy) = self.copy.as_ref().filter(|c| !c.is_complete()) {
            return refuse(format!("{} of {} MiB are copied", copy.groups_present(), geometry.groups()));
        }
        // The first checkpoint holds every block, the copy's or the delta's.
        let missing = if self.base.is_some() { self.exposed_blocks() } else { 0 };
        if missing > 0 {
            return refuse(format!("{missing} blocks that were reported changed have not arrived"));
        }
        Ok(())
    }

    /// Carries a sealed delta through to a visible checkpoint; also what [`Self::open`] does after a crash.
    pub(super) fn finish(
        &mut self,
        id: CheckpointId,
        closing: Header,
        hash: SealHash,
        delta: &Handle,
        map: &BlockMap,
    ) -> Result<Checkpoint, StoreError> {
        let (dir, owner) = (self.dir.clone(), self.owner.clone());
        if dir.exists(&owner.next_cst())? {
            dir.rename(&owner.next_cst(), &owner.cst(id))?;
            dir.sync_names(&owner.cst(id))?;
        }
        let checkpoint = closing.checkpoint().ok_or(StoreError::Poisoned)?;
        if closing.parent.is_none() {
            self.copy = None;
            let (_, seal) = fold::fold(&dir, &owner, id, &closing, delta, map)?;
            self.newest = Some(Link { id, seal });
            self.base = Some(dir.open(&owner.sum(id), false)?);
            // If this name comes back after a crash, it is known to be part of nothing.
            dir.remove(&owner.next_bak())?;
        } else {
            dir.rename(&owner.next_bak(), &owner.bak(id))?;
            dir.sync_names(&owner.bak(id))?;
            let link = Link { id, seal: hash };
            self.newest = Some(link);
            let blocks_before = self.newest().map_or(0, |newest| newest.geometry.blocks());
            let layer = self.layers.push(link, closing.geometry);
            self.head.lay(layer, map, blocks_before, closing.geometry.blocks());
            self.resized = None;
        }
        self.chain.push(checkpoint.clone());
        Ok(checkpoint)
    }
}
