//! Making a new tracker: loading the object, pinning its parts, attaching its programs.
//!
//! What must never happen here: a half-made tracker that passes for a whole one. The magic in its `meta` is written by
//! the caller when everything here is done.

use std::error::Error;
use std::fmt::Display;

use aya::programs::BtfTracePoint;
use aya::programs::links::FdLink;
use aya::{Btf, Ebpf, EbpfLoader};
use blxrep_ebpf::{OBJECT, constant, map};

use super::TrackerError;
use super::parts::{Sizes, link_name, probes};
use super::pins::PinDir;
use crate::device::BlockDevice;
use crate::geometry::Geometry;

/// Bios in flight that a bio-based disk can have before a gap is raised; about 5 MiB of kernel memory.
const INFLIGHT_MAX: u32 = 65_536;
/// Characters of an error that are kept from its beginning and its end: the verifier's log has megabytes.
const ERROR_KEEP: usize = 240;

/// Loads and attaches the probes of a disk, with everything pinned in an empty directory.
pub(super) fn create(
    dir: &PinDir,
    device: &BlockDevice,
    geometry: Geometry,
    sizes: Sizes,
) -> Result<(), TrackerError> {
    let btf = Btf::from_sys_fs().map_err(failed("the kernel's BTF cannot be read"))?;
    let mut object = load(&btf, device, geometry, sizes)?;
    for name in map::ALL {
        let map = object.map(name).ok_or_else(|| missing(name))?;
        map.pin(dir.path().join(name)).map_err(failed(name))?;
    }
    for probe in probes(device.request_based) {
        for name in probe.copies {
            let program = object.program_mut(name).ok_or_else(|| missing(name))?;
            let program: &mut BtfTracePoint = program.try_into().map_err(failed(name))?;
            program.load(probe.tracepoint, &btf).map_err(failed(name))?;
            program.pin(dir.path().join(name)).map_err(failed(name))?;
            let id = program.attach().map_err(failed(name))?;
            let link: FdLink = program.take_link(id).map_err(failed(name))?.into();
            link.pin(dir.path().join(link_name(name))).map_err(failed(name))?;
        }
    }
    Ok(())
}

fn load(btf: &Btf, device: &BlockDevice, geometry: Geometry, sizes: Sizes) -> Result<Ebpf, TrackerError> {
    let entries = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let (shift, blocks) = (u32::from(geometry.block_shift()), geometry.blocks());
    let mut loader = EbpfLoader::new();
    loader
        .btf(Some(btf))
        .override_global(constant::MAJOR, &device.major, true)
        .override_global(constant::MINOR, &device.minor, true)
        .override_global(constant::BLOCK_SHIFT, &shift, true)
        .override_global(constant::BLOCKS, &blocks, true)
        .map_max_entries(map::LIVE, entries(sizes.live))
        .map_max_entries(map::PENDING, entries(sizes.live))
        .map_max_entries(map::COARSE, entries(sizes.coarse))
        .map_max_entries(map::COUNTS, entries(sizes.cpus));
    if !device.request_based {
        loader.map_max_entries(map::INFLIGHT, INFLIGHT_MAX);
    }
    loader.load(OBJECT).map_err(failed("maps"))
}

fn missing(name: &str) -> TrackerError {
    TrackerError::Load(format!("it has no {name}; the program was built wrongly"))
}

fn failed<E: Error + 'static>(what: impl Display) -> impl FnOnce(E) -> TrackerError {
    move |e| TrackerError::Load(format!("{what}: {}", shorten(&chain(&e))))
}

/// An error with its causes, those left out that repeat what was said.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

fn shorten(text: &str) -> String {
    let text: Vec<char> = text.trim().chars().map(|c| if c == '\n' { '|' } else { c }).collect();
    match (text.first_chunk::<ERROR_KEEP>(), text.last_chunk::<ERROR_KEEP>()) {
        (Some(head), Some(tail)) if text.len() > 2 * ERROR_KEEP => {
            head.iter().chain(&[' ', '…', ' ']).chain(tail).collect()
        }
        _ => text.iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verifier_log_is_cut_to_its_ends() {
        let log = format!("BPF_PROG_LOAD failed\n{}\nthe reason", "x".repeat(1 << 20));
        let short = shorten(&log);
        assert!(short.chars().count() <= 2 * ERROR_KEEP + 3);
        assert!(short.starts_with("BPF_PROG_LOAD failed|x") && short.ends_with("|the reason"));
        assert_eq!(shorten("short"), "short");
    }
}
