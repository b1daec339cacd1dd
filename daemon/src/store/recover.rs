//! Opening a disk's files after whatever happened to them. Done again at any point it ends the same.

use tracing::{error, warn};

use super::StoreError;
use super::bak::{self, DeltaLog};
use super::block_map::BlockMap;
use super::copy::Copy;
use super::cst::{self, OpenJournal};
use super::disk_store::DiskStore;
use super::handle::{Dir, Handle};
use super::layers::Layers;
use super::layout::{HEADER_BYTES, Header, Paths};
use crate::bitmap::BlockSet;
use crate::checkpoint::chain;
use crate::geometry::Geometry;
use crate::ids::Epoch;

/// Opens the files of a disk; see [`DiskStore::open`].
pub(super) fn open(dir: Dir, owner: Paths) -> Result<DiskStore, StoreError> {
    // Names that a dead process left may not be durable yet, and from here on they are built upon.
    for file in [owner.copy_sum(), owner.next_bak(), owner.next_cst()] {
        if !dir.list(file.parent().unwrap_or(&file))?.is_empty() {
            dir.sync_names(&file)?;
        }
    }
    let found = chain::load(&dir, &owner)?;
    if let Some((damage, _)) = found.broken {
        return Err(StoreError::Damaged(damage));
    }
    let mut store = DiskStore {
        epoch: found.newest().map_or(Epoch([0; 16]), |m| m.checkpoint.epoch),
        newest: found.newest().map(|m| m.link),
        chain: found.members.iter().map(|m| m.checkpoint.clone()).collect(),
        base: None,
        resized: None,
        layers: Layers::default(),
        head: BlockMap::default(),
        unreadable: BlockSet::new(),
        copy: None,
        delta: None,
        journal: None,
        unsynced_bytes: 0,
        poisoned: false,
        dir,
        owner,
    };
    let mut members = found.members.iter();
    if let Some(base) = members.next() {
        store.base = Some(store.dir.open(&store.owner.sum(base.checkpoint.id), false)?);
    }
    for (member, before) in members.zip(&found.members) {
        let geometry = member.checkpoint.geometry;
        let layer = store.layers.push(member.link, geometry);
        let (file, _) = store.layers.file(&store.dir, &store.owner, layer)?;
        let map = bak::read_index(&file, &member.header, layer)?;
        store.head.lay(layer, &map, before.checkpoint.geometry.blocks(), geometry.blocks());
    }
    store.recover_delta()?;
    store.recover_copy()?;
    store.recover_journal()?;
    store.find_unreadable()?;
    Ok(store)
}

impl DiskStore {
    fn recover_delta(&mut self) -> Result<(), StoreError> {
        let path = self.owner.next_bak();
        let Some(file) = self.dir.open_existing(&path, true)? else { return Ok(()) };
        if !has_header(&file)? {
            // Nothing in it was ever durable, else its header would be.
            return self.dir.forget(&path);
        }
        let scan = bak::scan::<StoreError>(&file, &self.owner, &mut |_| Ok(()))?;
        if let Some((closing, hash)) = scan.sealed {
            let Some((id, _)) = closing.id else { return Err(file.damaged("it was never sealed")) };
            if self.chain.iter().any(|c| c.id == id) {
                // The base's delta, folded already.
                return self.dir.forget(&path);
            }
            self.check_parent(&file, &closing)?;
            let journal = self.sealed_journal(&closing)?;
            // Under its final name both were durable before, and blocks may be folded already.
            if journal.path() == self.owner.next_cst() {
                self.sync_or_remove([&file, &journal])?;
            }
            self.finish(id, closing, hash, &file, &scan.map)?;
            return Ok(());
        }
        self.check_parent(&file, &scan.header)?;
        self.epoch = scan.header.epoch;
        self.sync_or_remove([&file])?;
        self.resized = self.resized_to(&scan.header);
        self.delta = Some(DeltaLog::resume(file, scan)?);
        Ok(())
    }

    /// The size that a file of the next checkpoint was begun with, where it is not the newest's.
    fn resized_to(&self, header: &Header) -> Option<Geometry> {
        self.newest().filter(|newest| newest.geometry != header.geometry).map(|_| header.geometry)
    }

    /// Makes files that were found durable. If that fails it is not known which bytes are only in memory, and at the
    /// next try nothing would tell any more: they go, and what was in them comes again.
    fn sync_or_remove<const N: usize>(&self, files: [&Handle; N]) -> Result<(), StoreError> {
        let synced = files.into_iter().try_for_each(Handle::sync);
        if synced.is_err() {
            for error in files.into_iter().filter_map(|file| self.dir.forget(file.path()).err()) {
                error!(
                    AGENT = %self.owner.agent, DISK = %self.owner.disk,
                    "{error}; remove it before the dispatcher starts again"
                );
            }
        }
        synced
    }

    fn check_parent(&self, file: &Handle, header: &Header) -> Result<(), StoreError> {
        if header.parent == self.newest {
            let known = self.newest().map_or(header.geometry, |newest| newest.geometry);
            let same = known.block_shift() == header.geometry.block_shift();
            return same.then_some(()).ok_or_else(|| file.damaged("it has blocks of another size"));
        }
        let name = |id: Option<_>| {
            id.map_or("no checkpoint".to_owned(), |id: crate::ids::CheckpointId| id.to_string())
        };
        let (has, newest) = (name(header.parent.map(|p| p.id)), name(self.newest.map(|n| n.id)));
        Err(file.damaged(format!(
            "it builds on {has}, but the newest checkpoint is {newest}, or not the same one"
        )))
    }

    fn check_journal(&self, file: &Handle, header: &Header) -> Result<(), StoreError> {
        self.check_parent(file, header)?;
        // Without a delta the journal alone may know of another size.
        let may_differ = self.delta.is_none() && self.newest.is_some();
        if !may_differ && self.geometry() != Some(header.geometry) {
            return Err(file.damaged("it is of a disk of another size"));
        }
        Ok(())
    }

    /// A sealed delta's journal was sealed before it, under one of its two names.
    fn sealed_journal(&self, closing: &Header) -> Result<Handle, StoreError> {
        let id = closing.id.map(|(id, _)| id);
        let done = id.map(|id| self.owner.cst(id));
        let path = match done {
            Some(done) if self.dir.exists(&done)? => done,
            _ => self.owner.next_cst(),
        };
        let file = self.dir.open(&path, false)?;
        let journal = cst::read(&file, &self.owner, id)?;
        let sealed = journal.and_then(|journal| journal.sealed);
        if sealed.is_none_or(|(of, total)| (Some(of), total) != (id, closing.journal)) {
            return Err(file.damaged("it is not the journal that the checkpoint under way was sealed with"));
        }
        Ok(file)
    }

    fn recover_copy(&mut self) -> Result<(), StoreError> {
        if self.base.is_none() {
            self.copy = Copy::resume(&self.dir, &self.owner)?;
            if let Some(copy) = &self.copy {
                self.sync_or_remove([copy.sum()])?;
            }
        }
        match &self.copy {
            Some(copy) if self.delta.is_none() => self.epoch = copy.header.epoch,
            Some(_) => {}
            None => {
                for path in [self.owner.copy_sum(), self.owner.copy_img()] {
                    self.dir.forget(&path)?;
                }
            }
        }
        if self.base.is_none() && self.delta.as_ref().map(|delta| delta.header().geometry) != self.geometry()
        {
            // Begun with a copy of another size.
            self.remove_delta()?;
        }
        if self.geometry().is_none() {
            // A delta and a journal of a copy that is gone are part of nothing, and must not outlive into another copy.
            self.delta = None;
            for path in [self.owner.next_bak(), self.owner.next_cst()] {
                self.dir.forget(&path)?;
            }
        }
        Ok(())
    }

    fn recover_journal(&mut self) -> Result<(), StoreError> {
        let newest = self.newest.map(|n| n.id);
        if let Some(id) =
            chain::journal_ids(&self.dir, &self.owner)?.into_iter().find(|id| Some(*id) > newest)
        {
            let file = if newest.is_none() { self.owner.sum(id) } else { self.owner.bak(id) };
            let what = format!("the file is missing, yet {} is there", self.owner.cst(id).display());
            return Err(StoreError::damaged(file.display().to_string(), what));
        }
        let path = self.owner.next_cst();
        let Some(file) = self.dir.open_existing(&path, true)? else { return Ok(()) };
        let read = cst::read(&file, &self.owner, None);
        let sound = read.and_then(|journal| {
            journal.map(|j| self.check_journal(&file, &j.header).map(|()| j)).transpose()
        });
        let journal = match sound {
            Ok(Some(journal)) => journal,
            Ok(None) => return self.dir.forget(&path),
            Err(StoreError::Damaged(damage)) => {
                // The open journal only repeats what the agent has pending and reports again at its next attach. After a
                // power cut it may have holes; it is kept for whoever wants to look, and no reason to stop.
                warn!(AGENT = %self.owner.agent, DISK = %self.owner.disk, "{damage}; put aside, the agent reports again");
                let aside = path.with_extension("cst.damaged");
                self.dir.rename(&path, &aside)?;
                return self.dir.sync_names(&path);
            }
            Err(error) => return Err(error),
        };
        self.sync_or_remove([&file])?;
        if self.delta.is_none() {
            self.resized = self.resized_to(&journal.header);
        }
        self.journal = Some(OpenJournal::resume(file, journal)?);
        Ok(())
    }
}

fn has_header(file: &Handle) -> Result<bool, StoreError> {
    if file.len()? < HEADER_BYTES as u64 {
        return Ok(false);
    }
    let bytes = file.read_vec(HEADER_BYTES, 0)?;
    Ok(Header::decode(super::layout::Kind::Delta, &bytes).is_ok())
}
