//! One disk's files, opened for writing by one thread of the dispatcher.
//!
//! Data goes to disk before the names that make it visible; [`DiskStore::open`] finishes or forgets what a crash cut
//! off. After an error of the file system the object refuses everything: what is on disk is not known any more until
//! it is opened again.
//!
//! What must never happen here: a commit that is answered with success and can still be lost, a checkpoint that
//! lacks a block that was reported changed, anything stored whose hash was not checked.

use std::sync::Arc;

use tracing::error;

use super::bak::DeltaLog;
use super::block_map::BlockMap;
pub use super::commit::Seal;
use super::copy::Copy;
use super::cst::OpenJournal;
use super::files::Files;
use super::handle::{Dir, Handle};
use super::layers::{Layers, overlay};
use super::layout::{self, Header, Kind, Link, Paths};
use super::{StoreError, sum};
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::Checkpoint;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, GroupDigest, group_digest, insert_unreadable};
use crate::ids::{AgentId, DiskId, Epoch};
use crate::run::{RUN_MAX_BYTES, Run};
use crate::tracker::Gap;

/// How far a full copy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyState {
    /// Size and block size of the disk.
    pub geometry: Geometry,
    /// The device's name on the agent.
    pub device: String,
    /// The tracker's life in which the copy began.
    pub epoch: Epoch,
    /// Groups that have arrived whole.
    pub groups_present: u64,
    /// Groups of the disk.
    pub groups: u64,
}

/// One disk's files, opened for writing.
pub struct DiskStore {
    pub(super) dir: Dir,
    pub(super) owner: Paths,
    pub(super) epoch: Epoch,
    pub(super) chain: Vec<Checkpoint>,
    pub(super) newest: Option<Link>,
    /// The base's `.sum`, once there is a base.
    pub(super) base: Option<Handle>,
    /// The size of the next checkpoint, where it is not the newest's.
    pub(super) resized: Option<Geometry>,
    pub(super) layers: Layers,
    /// Which layer holds the newest committed data of a block that is not the base's.
    pub(super) head: BlockMap,
    /// The blocks of the newest checkpoint that could not be read.
    pub(super) unreadable: BlockSet,
    pub(super) copy: Option<Copy>,
    pub(super) delta: Option<DeltaLog>,
    pub(super) journal: Option<OpenJournal>,
    pub(super) unsynced_bytes: u64,
    pub(super) poisoned: bool,
}

impl DiskStore {
    /// Opens the files of a disk, whatever state they were left in: finishes a commit that was cut off, cuts torn
    /// tails, removes what is part of nothing.
    ///
    /// # Errors
    /// Damaged if the files contradict themselves in a way no crash explains; NoSpace; Io.
    pub fn open(files: Arc<dyn Files>, agent: AgentId, disk: DiskId) -> Result<Self, StoreError> {
        super::recover::open(Dir::new(files), Paths::new(agent, disk))
    }

    /// The committed checkpoints, base first.
    pub fn chain(&self) -> &[Checkpoint] {
        &self.chain
    }

    /// The newest committed checkpoint.
    pub fn newest(&self) -> Option<&Checkpoint> {
        self.chain.last()
    }

    /// Names the tracker's life that a delta or journal begun from now on belongs to.
    pub fn set_epoch(&mut self, epoch: Epoch) {
        self.epoch = epoch;
    }

    /// The tracker's life in which the open delta began; `None` if there is no open delta.
    pub fn delta_epoch(&self) -> Option<Epoch> {
        self.delta.as_ref().map(|d| d.header().epoch)
    }

    /// Begins the full copy; an earlier one that is not complete is thrown away, with its delta and journal.
    ///
    /// # Errors
    /// Refused if the disk has a base already or the device's name cannot be kept; NoSpace; Io.
    pub fn begin_copy(&mut self, geometry: Geometry, device: &str, epoch: Epoch) -> Result<(), StoreError> {
        self.guarded(|s| {
            if let Some(newest) = s.newest() {
                return Err(StoreError::Refused(format!(
                    "the disk has checkpoint {} to build on",
                    newest.id
                )));
            }
            check_device(device)?;
            s.forget_copy()?;
            s.epoch = epoch;
            let header = Header::open(Kind::Sum, &s.owner, device, geometry, epoch);
            s.copy = Some(Copy::create(&s.dir, &s.owner, header)?);
            Ok(())
        })
    }

    fn forget_copy(&mut self) -> Result<(), StoreError> {
        (self.copy, self.delta, self.journal) = (None, None, None);
        for path in
            [self.owner.next_bak(), self.owner.next_cst(), self.owner.copy_sum(), self.owner.copy_img()]
        {
            // Each one durably gone before the next: a delta must not outlive into another copy.
            self.dir.forget(&path)?;
        }
        Ok(())
    }

    /// Says which size the disk has now. If that is news, the open delta and journal are forgotten, which were begun for
    /// another size, and the answer is true: the disk must then be compared whole. Until it is committed the newest state
    /// is the newest checkpoint, cut off or with zeros behind its end.
    ///
    /// # Errors
    /// Refused without a checkpoint, or if blocks have another size; NoSpace; Io.
    pub fn resize(&mut self, geometry: Geometry) -> Result<bool, StoreError> {
        self.guarded(|s| {
            let refuse = |why: &str| Err(StoreError::Refused(why.to_owned()));
            let Some(newest) = s.newest().map(|newest| newest.geometry) else {
                return refuse("there is no checkpoint: a copy of another size begins anew");
            };
            if newest.block_shift() != geometry.block_shift() {
                return refuse("all checkpoints of a disk have blocks of one size");
            }
            if s.geometry() == Some(geometry) {
                return Ok(false);
            }
            s.remove_delta()?;
            s.journal = None;
            // If a power cut brings it back, its size tells that it belongs to nothing.
            s.dir.remove(&s.owner.next_cst())?;
            s.resized = Some(geometry).filter(|geometry| *geometry != newest);
            Ok(true)
        })
    }

    /// How far the full copy is; `None` if none was begun or it has become a checkpoint.
    pub fn copy(&self) -> Option<CopyState> {
        self.copy.as_ref().map(|copy| CopyState {
            geometry: copy.geometry(),
            device: copy.header.device.clone(),
            epoch: copy.header.epoch,
            groups_present: copy.groups_present(),
            groups: copy.geometry().groups(),
        })
    }

    /// Size and block size of the next checkpoint, once a copy was begun.
    pub fn geometry(&self) -> Option<Geometry> {
        let committed = self.resized.or(self.newest().map(|c| c.geometry));
        committed.or_else(|| self.copy.as_ref().map(Copy::geometry))
    }

    fn base_geometry(&self) -> Option<Geometry> {
        self.chain.first().map(|base| base.geometry)
    }

    pub(super) fn known_geometry(&self) -> Result<Geometry, StoreError> {
        self.geometry().ok_or_else(|| StoreError::Refused("no full copy was begun".into()))
    }

    /// Digests of at most `count` groups from `first_group` on, of the newest state: the last checkpoint or the copy
    /// under way, with the open delta laid over it. [`GroupDigest::MISSING`] for a group that was not copied yet.
    ///
    /// # Errors
    /// Refused before a copy was begun; Damaged; Io.
    pub fn digests(&mut self, first_group: u64, count: u64) -> Result<Vec<GroupDigest>, StoreError> {
        let geometry = self.known_geometry()?;
        let end = first_group.saturating_add(count).min(geometry.groups());
        (first_group..end).map(|group| self.digest(geometry, group)).collect()
    }

    fn digest(&mut self, geometry: Geometry, group: u64) -> Result<GroupDigest, StoreError> {
        let (first, count) = geometry.group_extent(group);
        let extent = Extent { first, count };
        let overlaid =
            self.head.touches(extent) || self.delta.as_ref().is_some_and(|d| d.map().touches(extent));
        if let (false, Some(base), Some(stored)) = (overlaid, &self.base, self.base_geometry())
            && stored.group_extent(group) == (first, count)
        {
            return sum::read_digest(base, stored, group);
        }
        let hashes = self.hashes(group)?;
        Ok(if hashes.is_empty() { GroupDigest::MISSING } else { group_digest(&hashes) })
    }

    /// The hashes of a group's blocks in the newest state, as for [`Self::digests`]; empty for a group that was not
    /// copied yet or lies behind the end of the disk.
    ///
    /// # Errors
    /// Refused before a copy was begun; Damaged; Io.
    pub fn hashes(&mut self, group: u64) -> Result<Vec<BlockHash>, StoreError> {
        let geometry = self.known_geometry()?;
        let (first, count) = geometry.group_extent(group);
        let extent = Extent { first, count };
        if count == 0 {
            return Ok(Vec::new());
        }
        let Some(mut hashes) = self.hashes_below(geometry, group)? else { return Ok(Vec::new()) };
        for (log, piece) in
            self.delta.iter().flat_map(|d| d.map().within(extent).into_iter().map(move |p| (d, p)))
        {
            overlay(log.file(), log.header().geometry, &piece, first, &mut hashes)?;
        }
        Ok(hashes)
    }

    /// The hashes of a group without the open delta.
    fn hashes_below(&mut self, geometry: Geometry, group: u64) -> Result<Option<Vec<BlockHash>>, StoreError> {
        let (first, count) = geometry.group_extent(group);
        let below = match (&self.base, self.base_geometry(), &self.copy) {
            (Some(base), Some(stored), _) => Some(sum::read_resized(base, stored, geometry, group)?),
            (_, _, Some(copy)) => copy.hashes(group)?,
            _ => None,
        };
        let Some(mut hashes) = below else { return Ok(None) };
        for piece in self.head.within(Extent { first, count }) {
            self.layers.overlay(&self.dir, &self.owner, &piece, first, &mut hashes)?;
        }
        Ok(Some(hashes))
    }

    /// The blocks of the newest state, as for [`Self::digests`], that the agent's disk could not read.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn unreadable(&self) -> Result<BlockSet, StoreError> {
        let mut found = self.copy.as_ref().map_or(&self.unreadable, Copy::unreadable).clone();
        if let Some(delta) = &self.delta {
            if !found.is_empty() {
                found.subtract(&delta.map().blocks());
            }
            found.union(&delta.unreadable()?);
        }
        if let (Some(now), Some(newest)) = (self.resized, self.newest()) {
            let first = now.blocks();
            found.remove(Extent { first, count: newest.geometry.blocks().saturating_sub(first) });
        }
        Ok(found)
    }

    /// Finds the unreadable blocks of the newest checkpoint anew, if it says that it has any.
    pub(super) fn find_unreadable(&mut self) -> Result<(), StoreError> {
        let Some(geometry) = self.newest().filter(|c| c.unreadable_blocks > 0).map(|c| c.geometry) else {
            return Ok(());
        };
        for group in 0..geometry.groups() {
            let hashes = self.hashes_below(geometry, group)?.unwrap_or_default();
            insert_unreadable(geometry.group_extent(group).0, &hashes, &mut self.unreadable);
        }
        Ok(())
    }

    /// Stores blocks of one group of the copy under way. The data is checked here. Sending the same again changes
    /// nothing.
    ///
    /// # Errors
    /// Run if a block does not have its hash (nothing is stored); Refused if there is no copy under way, the run
    /// crosses the border of a group, or the group is there with other data; NoSpace; Io.
    pub fn put_base(&mut self, run: &Run) -> Result<(), StoreError> {
        self.guarded(|s| {
            let copy = s.copy.as_mut().ok_or_else(|| StoreError::Refused("no copy is under way".into()))?;
            check_range(run.extent(), copy.geometry())?;
            let data = run.unpack(copy.geometry())?;
            copy.put(run, data.as_deref())?;
            s.unsynced_bytes += data.map_or(64, |d| d.len() as u64);
            Ok(())
        })
    }

    /// Appends changed blocks to the open delta, which is created if there is none. The data is checked here. Of two
    /// runs that hold a block the one with the higher `seq` counts, of equals the later one.
    ///
    /// # Errors
    /// Run if a block does not have its hash (nothing is stored); Refused if no copy was begun or the blocks are not on the disk;
    /// NoSpace; Io.
    pub fn put_delta(&mut self, seq: u64, run: &Run) -> Result<(), StoreError> {
        self.guarded(|s| {
            let geometry = s.known_geometry()?;
            check_range(run.extent(), geometry)?;
            if run.encoded_len() > RUN_MAX_BYTES {
                return Err(StoreError::Refused(format!("a run of {} bytes is too long", run.encoded_len())));
            }
            run.unpack(geometry)?;
            s.unsynced_bytes += s.open_delta()?.append(seq, run)?;
            Ok(())
        })
    }

    pub(super) fn open_header(&self, kind: Kind) -> Result<Header, StoreError> {
        let geometry = self.known_geometry()?;
        let begun = || self.copy.as_ref().map(|copy| copy.header.device.clone());
        let device = self.newest().map(|newest| newest.device.clone()).or_else(begun).unwrap_or_default();
        let parent = self.newest;
        Ok(Header { parent, ..Header::open(kind, &self.owner, &device, geometry, self.epoch) })
    }

    pub(super) fn open_delta(&mut self) -> Result<&mut DeltaLog, StoreError> {
        let log = match self.delta.take() {
            Some(log) => log,
            None => DeltaLog::create(&self.dir, &self.owner, self.open_header(Kind::Delta)?)?,
        };
        Ok(self.delta.insert(log))
    }

    pub(super) fn open_journal(&mut self) -> Result<&mut OpenJournal, StoreError> {
        let journal = match self.journal.take() {
            Some(journal) => journal,
            None => OpenJournal::new(self.open_header(Kind::Journal)?),
        };
        Ok(self.journal.insert(journal))
    }

    /// Notes blocks that changed on the agent's disk; durable with the next [`Self::sync`].
    ///
    /// # Errors
    /// Refused if no copy was begun or the blocks are not on the disk.
    pub fn put_changed(&mut self, extents: &[Extent]) -> Result<(), StoreError> {
        self.guarded(|s| {
            let geometry = s.known_geometry()?;
            extents.iter().try_for_each(|extent| check_range(*extent, geometry))?;
            s.open_journal()?.changed(extents);
            s.unsynced_bytes += 16 * extents.len() as u64;
            Ok(())
        })
    }

    /// Notes that a compare of the whole disk follows: what was reported changed before counts no more.
    ///
    /// # Errors
    /// Refused if no copy was begun.
    pub fn put_gap(&mut self, gap: Gap) -> Result<(), StoreError> {
        self.guarded(|s| {
            s.open_journal()?.gap(gap);
            s.unsynced_bytes += 16;
            Ok(())
        })
    }

    /// Blocks reported changed since the last checkpoint.
    pub fn changed_blocks(&self) -> u64 {
        self.journal.as_ref().map_or(0, |journal| journal.state().reported.len())
    }

    /// Those of them that the open delta does not hold: what a commit now would lack.
    pub fn exposed_blocks(&self) -> u64 {
        let Some(journal) = &self.journal else { return 0 };
        let mut left = journal.state().reported.clone();
        if let Some(delta) = &self.delta {
            left.subtract(&delta.map().blocks());
        }
        left.len()
    }

    /// Makes everything put so far durable.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn sync(&mut self) -> Result<(), StoreError> {
        self.guarded(Self::sync_all)
    }

    fn sync_all(&mut self) -> Result<(), StoreError> {
        if let Some(copy) = &mut self.copy {
            copy.sync(&self.dir)?;
        }
        if let Some(delta) = &mut self.delta {
            delta.sync(&self.dir)?;
        }
        if let Some(journal) = &mut self.journal {
            journal.sync(&self.dir, &self.owner)?;
        }
        self.unsynced_bytes = 0;
        Ok(())
    }

    /// About how many bytes wait for [`Self::sync`].
    pub fn unsynced_bytes(&self) -> u64 {
        self.unsynced_bytes
    }

    /// The highest sequence number that is durable in the open delta; 0 if there is none.
    pub fn last_seq(&self) -> u64 {
        self.delta.as_ref().map_or(0, DeltaLog::durable_seq)
    }

    /// Forgets the open delta, durably. The journal stays: what it reports must then come again.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn drop_delta(&mut self) -> Result<(), StoreError> {
        self.guarded(Self::remove_delta)
    }

    pub(super) fn remove_delta(&mut self) -> Result<(), StoreError> {
        match self.delta.take() {
            Some(_) => self.dir.forget(&self.owner.next_bak()),
            None => Ok(()),
        }
    }

    pub(super) fn guarded<T>(
        &mut self,
        act: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if self.poisoned {
            return Err(StoreError::Poisoned);
        }
        let result = act(self);
        self.poisoned = result.as_ref().is_err_and(StoreError::poisons);
        if self.poisoned {
            self.cut_back();
        }
        result
    }

    /// After a sync that failed, Linux reads what it could not write and takes it for written (Rebello et al., "Can
    /// Applications Recover from fsync Failures?", USENIX ATC 2020): who opens the files again would build on it. So
    /// nothing is left but what was durable before.
    fn cut_back(&self) {
        let cut = [
            self.delta.as_ref().map(DeltaLog::cut_back),
            self.journal.as_ref().map(OpenJournal::cut_back),
            self.copy.as_ref().map(Copy::cut_back),
        ];
        for error in cut.into_iter().flatten().filter_map(Result::err) {
            error!(
                AGENT = %self.owner.agent, DISK = %self.owner.disk,
                "{error}; what was not written can be taken for written: mend the disk and restart this machine"
            );
        }
    }
}

fn check_range(extent: Extent, geometry: Geometry) -> Result<(), StoreError> {
    let Extent { first, count } = extent;
    let end = first.checked_add(count).filter(|end| count > 0 && *end <= geometry.blocks());
    end.map(|_| ()).ok_or_else(|| {
        StoreError::Refused(format!(
            "blocks {first}+{count} do not lie on a disk of {} blocks",
            geometry.blocks()
        ))
    })
}

pub(super) fn check_device(device: &str) -> Result<(), StoreError> {
    let sound = layout::device_is_sound(device);
    sound
        .then_some(())
        .ok_or_else(|| StoreError::Refused(format!("{device:?} cannot be kept as a device's name")))
}
