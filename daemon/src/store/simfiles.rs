//! A file system in memory that loses what was not synced, fills up, and stops at any operation. For tests.
//!
//! Every operation that changes something is counted. A crash decides for every operation since the last sync of
//! its file, or of its directory for names, whether it is lost, kept, or (a write) torn at 512 bytes.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::files::{Files, Space, StoreFile};

const PAGE: usize = 4096;

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Len(u64),
}

#[derive(Clone)]
enum NameChange {
    Link(PathBuf, u64),
    Rename(PathBuf, PathBuf),
    Unlink(PathBuf),
}

#[derive(Clone, Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    changes: Vec<Change>,
}

/// What goes wrong, at which counted operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// From operation N on there is no space.
    Full(u64),
    /// The sync with number N (files and directories counted together) is not done.
    SkipSync(u64),
}

/// What a crash takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// Only the process died.
    Nothing,
    /// Everything that was not synced.
    All,
    /// Each operation by a seed.
    Seed(u64),
}

#[derive(Clone, Default)]
struct State {
    inodes: HashMap<u64, Inode>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    name_changes: Vec<NameChange>,
    next: u64,
    ops: u64,
    syncs: u64,
    fault: Option<Fault>,
    stop_at: Option<u64>,
    stopped: bool,
    /// Bytes that fit, and the size that is told; `None`: as many as one likes.
    capacity: Option<(u64, u64)>,
    /// There is no space, until there is.
    is_full: bool,
    /// The operation that fails with an I/O error, once.
    fail_at: Option<u64>,
}

#[derive(Clone, Default)]
pub(crate) struct SimFiles(Arc<Mutex<State>>);

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, data) => {
            let end = *at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*at as usize..end].copy_from_slice(data);
        }
        Change::Len(len) => bytes.resize(*len as usize, 0),
    }
}

fn apply_name(names: &mut BTreeMap<PathBuf, u64>, change: &NameChange) {
    match change {
        NameChange::Link(path, inode) => {
            names.insert(path.clone(), *inode);
        }
        NameChange::Rename(from, to) => {
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
        NameChange::Unlink(path) => {
            names.remove(path);
        }
    }
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

impl State {
    /// Holes take no space, as on a real disk.
    fn used(&self) -> u64 {
        let pages =
            |inode: &Inode| inode.now.chunks(PAGE).filter(|page| page.iter().any(|b| *b != 0)).count();
        self.names.values().map(|inode| pages(&self.inodes[inode]) as u64 * PAGE as u64).sum()
    }

    fn space(&self) -> Space {
        if self.is_full {
            return Space { free_bytes: 0, total_bytes: 1 << 60 };
        }
        let Some((fit, total_bytes)) = self.capacity else {
            return Space { free_bytes: 1 << 60, total_bytes: 1 << 60 };
        };
        Space { free_bytes: fit.saturating_sub(self.used()), total_bytes }
    }

    /// Counts an operation; an error if the process is dead or the disk full.
    fn op(&mut self, grows: bool) -> io::Result<()> {
        let n = self.ops;
        self.ops += 1;
        if self.stopped || self.stop_at.is_some_and(|at| n >= at) {
            self.stopped = true;
            return Err(io::Error::other("the process is dead"));
        }
        if self.fail_at.take_if(|at| n >= *at).is_some() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if grows && self.is_full {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        if grows && self.fault.is_some_and(|f| matches!(f, Fault::Full(at) if n >= at)) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        if grows && self.capacity.is_some() && self.space().free_bytes == 0 {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<bool> {
        self.op(false)?;
        let n = self.syncs;
        self.syncs += 1;
        Ok(self.fault != Some(Fault::SkipSync(n)))
    }

    fn crash(&mut self, loss: Loss) {
        let mut dice = Dice(if let Loss::Seed(seed) = loss { seed.wrapping_mul(7919) } else { 0 });
        if loss != Loss::Nothing {
            let mut inodes: Vec<_> = self.inodes.iter_mut().collect();
            inodes.sort_by_key(|(n, _)| **n);
            for (_, inode) in inodes {
                for change in std::mem::take(&mut inode.changes) {
                    let fate = if loss == Loss::All { 0 } else { dice.roll(5) };
                    match (fate, &change) {
                        (0, _) => {}
                        (1, Change::Write(at, data)) => {
                            let sectors = (*at as usize % 512 + data.len()) / 512;
                            let keep = (dice.roll(sectors as u64 + 1) as usize * 512)
                                .saturating_sub(*at as usize % 512)
                                .min(data.len());
                            apply(&mut inode.durable, &Change::Write(*at, data[..keep].to_vec()));
                            // Some file systems have the length already, and zeros where the data is to be.
                            if dice.roll(2) == 0 && inode.durable.len() < *at as usize + data.len() {
                                inode.durable.resize(*at as usize + data.len(), 0);
                            }
                        }
                        _ => apply(&mut inode.durable, &change),
                    }
                }
                inode.now.clone_from(&inode.durable);
            }
            for change in std::mem::take(&mut self.name_changes) {
                if loss != Loss::All && dice.roll(2) == 0 {
                    apply_name(&mut self.durable_names, &change);
                }
            }
            self.names.clone_from(&self.durable_names);
        }
        (self.fault, self.stop_at, self.stopped) = (None, None, false);
    }
}

impl SimFiles {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Sets what goes wrong and counts operations and syncs from 0.
    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        let mut state = self.state();
        (state.fault, state.stop_at, state.stopped, state.ops, state.syncs) = (fault, None, false, 0, 0);
    }

    /// From now on so many bytes are free, of a file system of `total_bytes`.
    pub(crate) fn set_free(&self, free_bytes: u64, total_bytes: u64) {
        let mut state = self.state();
        state.capacity = Some((state.used() + free_bytes, total_bytes));
    }

    /// The process is killed before operation `at`.
    pub(crate) fn stop_at(&self, at: u64) {
        self.state().stop_at = Some(at);
    }

    /// The process is killed some operations from now.
    pub(crate) fn stop_soon(&self, ops: u64) {
        let mut state = self.state();
        state.stop_at = Some(state.ops + ops);
    }

    /// Whether the process is dead.
    pub(crate) fn is_stopped(&self) -> bool {
        self.state().stopped
    }

    /// An operation soon fails with an I/O error. If it is a sync, what it was to write is lost, and yet is read until
    /// a crash: so does Linux (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
    pub(crate) fn fail_soon(&self, ops: u64) {
        let mut state = self.state();
        state.fail_at = Some(state.ops + ops);
    }

    /// What was to fail soon does not.
    pub(crate) fn never_fail(&self) {
        let mut state = self.state();
        (state.stop_at, state.fail_at) = (None, None);
    }

    /// There is no space any more, or there is again.
    pub(crate) fn set_full(&self, is_full: bool) {
        self.state().is_full = is_full;
    }

    /// Operations and syncs so far.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let state = self.state();
        (state.ops, state.syncs)
    }

    /// The process or the machine dies; what is left is as on the disk, and works again.
    pub(crate) fn crash(&self, loss: Loss) {
        self.state().crash(loss);
    }

    /// An independent copy of all that is there now.
    pub(crate) fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.state().clone())))
    }

    /// All files and their bytes.
    pub(crate) fn dump(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let state = self.state();
        state.names.iter().map(|(path, inode)| (path.clone(), state.inodes[inode].now.clone())).collect()
    }

    pub(crate) fn arc(&self) -> Arc<dyn Files> {
        Arc::new(self.clone())
    }
}

impl Files for SimFiles {
    fn open(&self, path: &Path, _write: bool) -> io::Result<Box<dyn StoreFile>> {
        let state = self.state();
        let inode = *state.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(SimFile { files: self.clone(), inode }))
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        let mut state = self.state();
        state.op(true)?;
        if state.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = state.next;
        state.next += 1;
        state.inodes.insert(inode, Inode::default());
        state.names.insert(path.to_owned(), inode);
        state.name_changes.push(NameChange::Link(path.to_owned(), inode));
        Ok(Box::new(SimFile { files: self.clone(), inode }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.op(true)?;
        if !state.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        apply_name(&mut state.names, &change);
        state.name_changes.push(change);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.op(false)?;
        state.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
        state.name_changes.push(NameChange::Unlink(path.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        if !state.sync()? {
            return Ok(());
        }
        let State { name_changes, durable_names, .. } = &mut *state;
        name_changes.retain(|change| {
            let (NameChange::Link(path, _) | NameChange::Rename(_, path) | NameChange::Unlink(path)) = change;
            let here =
                path.parent() == Some(dir) || path.parent().map(|p| p.join("")) == Some(dir.to_owned());
            if here {
                apply_name(durable_names, change);
            }
            !here
        });
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.state();
        let names = state.names.keys().filter_map(|path| path.strip_prefix(dir).ok());
        let mut names: Vec<String> = names
            .filter_map(|rest| rest.components().next())
            .map(|name| name.as_os_str().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.state().names.contains_key(path))
    }

    fn space(&self) -> io::Result<Space> {
        Ok(self.state().space())
    }
}

struct SimFile {
    files: SimFiles,
    inode: u64,
}

impl SimFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.files.state();
        let result = state.op(true);
        let inode = state.inodes.get_mut(&self.inode).unwrap();
        let change = match (&result, change) {
            (Ok(()), change) => change,
            // A full disk still takes the first half.
            (Err(e), Change::Write(at, data)) if e.kind() == io::ErrorKind::StorageFull => {
                Change::Write(at, data[..data.len() / 2].to_vec())
            }
            _ => return result,
        };
        apply(&mut inode.now, &change);
        inode.changes.push(change);
        result
    }
}

impl StoreFile for SimFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.files.state();
        let bytes = &state.inodes[&self.inode].now;
        let part = bytes.get(offset as usize..offset as usize + buf.len());
        buf.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(Change::Write(offset, buf.to_vec()))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(Change::Write(offset, vec![0; len as usize]))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let state = self.files.state();
        let bytes = &state.inodes[&self.inode].now;
        let mut pages = bytes.chunks(PAGE).enumerate().skip(offset as usize / PAGE);
        let data = pages.find(|(_, page)| page.iter().any(|b| *b != 0));
        Ok(data
            .map(|(n, page)| {
                ((n * PAGE) as u64).max(offset).min((n * PAGE + page.len()) as u64)
                    ..(n * PAGE + page.len()) as u64
            })
            .map(|r| (r.start, r.end)))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.files.state().inodes[&self.inode].now.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Len(len))
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.files.state();
        let synced = state.sync();
        if let Err(error) = &synced
            && error.raw_os_error() == Some(libc::EIO)
            && let Some(inode) = state.inodes.get_mut(&self.inode)
        {
            inode.changes.clear();
        }
        if synced? {
            let inode = state.inodes.get_mut(&self.inode).unwrap();
            for change in std::mem::take(&mut inode.changes) {
                apply(&mut inode.durable, &change);
            }
        }
        Ok(())
    }
}
