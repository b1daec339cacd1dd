//! The pinned maps, programs and links of one tracker, opened and checked to be what their names say.
//!
//! What must never happen here: a map of another shape taken for ours, or a program that is not attached.

use std::io;
use std::sync::atomic::AtomicU64;

use blxrep_ebpf::{BIO_PROBES, COARSE_GROUP_WORDS, COUNT_WORDS, Probe, REQUEST_PROBES, map, meta, state};

use super::TrackerError;
use super::audit::Counted;
use super::mapping::Mapping;
use super::pins::{PinDir, Pinned, kernel};
use super::words::Words;
use crate::geometry::Geometry;

/// BPF_MAP_TYPE_ARRAY of linux/bpf.h.
const MAP_TYPE_ARRAY: u64 = 2;
const WORD_BYTES: u64 = 8;
/// What the kernel says to mmap of a map without BPF_F_MMAPABLE (linux/errno.h, not in any libc).
const ENOTSUPP: i32 = 524;

/// The programs for a disk with or without a request queue.
pub(super) fn probes(request_based: bool) -> &'static [Probe] {
    if request_based { REQUEST_PROBES } else { BIO_PROBES }
}

/// The name of a program's pinned link.
pub(super) fn link_name(program: &str) -> String {
    format!("{program}_link")
}

/// How many words each bitmap has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) live: usize,
    pub(super) coarse: usize,
    pub(super) cpus: usize,
}

impl Sizes {
    pub(super) fn of(geometry: Geometry) -> Result<Self, TrackerError> {
        let live = usize::try_from(geometry.blocks().div_ceil(64))
            .map_err(|_| kernel("the bitmap does not fit in memory", io::ErrorKind::OutOfMemory))?;
        let coarse = live.div_ceil(COARSE_GROUP_WORDS * 64);
        let cpus = aya::util::nr_cpus().map_err(|(what, e)| kernel(format!("{what} cannot be read"), e))?;
        Ok(Self { live, coarse, cpus })
    }
}

/// An open tracker.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) live: Mapping,
    pub(super) coarse: Mapping,
    pub(super) pending: Mapping,
    pub(super) meta: Mapping,
    pub(super) state: Mapping,
    pub(super) counts: Mapping,
    /// Copy a and b, probe by probe.
    pub(super) programs: Vec<[Pinned; 2]>,
    /// The kernel's ids of all maps and programs.
    pub(super) ids: Vec<u64>,
}

impl Parts {
    /// Opens what is pinned; `None` if anything is missing, of another shape, or not attached.
    pub(super) fn open(
        dir: &PinDir,
        sizes: Sizes,
        request_based: bool,
    ) -> Result<Option<Self>, TrackerError> {
        let mut ids = Vec::new();
        let mut array = |name, words| open_array(dir, name, words, 1, &mut ids);
        let Some(live) = array(map::LIVE, sizes.live)? else { return Ok(None) };
        let Some(coarse) = array(map::COARSE, sizes.coarse)? else { return Ok(None) };
        let Some(pending) = array(map::PENDING, sizes.live)? else { return Ok(None) };
        let Some(meta) = array(map::META, meta::ENTRIES)? else { return Ok(None) };
        let Some(state) = array(map::STATE, state::ENTRIES)? else { return Ok(None) };
        let counts = open_array(dir, map::COUNTS, sizes.cpus, COUNT_WORDS, &mut ids)?;
        let Some(counts) = counts else { return Ok(None) };
        let mut programs = Vec::new();
        for probe in probes(request_based) {
            let [a, b] = probe.copies.map(|name| open_program(dir, name, &mut ids));
            let (Some(a), Some(b)) = (a?, b?) else { return Ok(None) };
            programs.push([a, b]);
        }
        Ok(Some(Self { live, coarse, pending, meta, state, counts, programs, ids }))
    }

    /// What the probe has counted, on all CPUs.
    pub(super) fn counted(&self) -> Counted {
        let counts: &[AtomicU64] = &self.counts;
        let sum = |first: usize| {
            let slots = (first..counts.len()).step_by(COUNT_WORDS);
            slots.fold(0u64, |sum, at| sum.wrapping_add(counts.load(at)))
        };
        Counted { written: sum(0), discarded: sum(1), queued: sum(2) }
    }
}

fn open_array(
    dir: &PinDir,
    name: &str,
    entries: usize,
    entry_words: usize,
    ids: &mut Vec<u64>,
) -> Result<Option<Mapping>, TrackerError> {
    let Some(pin) = dir.open(name)? else { return Ok(None) };
    let is_as_made = pin.number("map_type") == Some(MAP_TYPE_ARRAY)
        && pin.number("max_entries") == Some(entries as u64)
        && pin.number("value_size") == Some(entry_words as u64 * WORD_BYTES);
    let Some(id) = pin.number("map_id").filter(|_| is_as_made) else { return Ok(None) };
    ids.push(id);
    match Mapping::new(&pin, entries * entry_words) {
        Ok(mapping) => Ok(Some(mapping)),
        // Not made to be mapped, so not by us.
        Err(e) if e.raw_os_error() == Some(ENOTSUPP) => Ok(None),
        Err(e) => Err(kernel(format!("the map {name} cannot be mapped"), e)),
    }
}

fn open_program(dir: &PinDir, name: &str, ids: &mut Vec<u64>) -> Result<Option<Pinned>, TrackerError> {
    let (Some(program), Some(link)) = (dir.open(name)?, dir.open(&link_name(name))?) else {
        return Ok(None);
    };
    // Both descriptions have a prog_id; only a link's has a link_id.
    let id = program.number("prog_id").filter(|_| program.number("link_id").is_none());
    let is_attached = link.number("link_id").is_some() && link.number("prog_id") == id;
    Ok(id.filter(|_| is_attached).map(|id| {
        ids.push(id);
        program
    }))
}
