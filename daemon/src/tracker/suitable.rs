//! Which disks can be tracked: deciding from what sysfs and the kernel say.
//!
//! What must never happen here: a disk accepted whose writes the probe does not see.

use std::path::Path;

use super::TrackerError;
use crate::device::BlockDevice;
use crate::geometry::Geometry;

/// The oldest kernel (5.15 has `diskseq` and `request_queue.disk`); on arm64 5.18 has the atomic instructions of BPF.
const KERNEL_MIN: (u32, u32) = if cfg!(target_arch = "aarch64") { (5, 18) } else { (5, 15) };

/// What the decision rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Facts {
    /// Major and minor of the kernel's version.
    kernel: (u32, u32),
    has_btf: bool,
    request_based: bool,
    logical_block_bytes: u32,
    dax: bool,
    zoned: bool,
    multipath_head: bool,
    bcache: bool,
    md_linear: bool,
    counts_io: bool,
}

/// Refuses a disk that cannot be tracked, and gives the geometry of one that can.
///
/// # Errors
/// [`TrackerError::Unsuitable`] with the reason and what to do.
pub fn check(device: &BlockDevice, block_shift: u8) -> Result<Geometry, TrackerError> {
    let unsuitable = |reason| TrackerError::Unsuitable { device: device.name.clone(), reason };
    let facts = facts_of(device).map_err(unsuitable)?;
    if let Some(reason) = reason_against(&facts, block_shift) {
        return Err(unsuitable(reason));
    }
    let geometry = Geometry::new(device.size_bytes, block_shift).map_err(|e| unsuitable(e.to_string()))?;
    if u32::try_from(geometry.blocks().div_ceil(64)).is_err() {
        let reason = "it has more blocks than a bitmap can hold; choose larger blocks".to_owned();
        return Err(unsuitable(reason));
    }
    Ok(geometry)
}

fn facts_of(device: &BlockDevice) -> Result<Facts, String> {
    let is = |name: &str, value: &str| device.attribute(name).as_deref() == Some(value);
    let kernel = kernel()?;
    let sysfs = device.sysfs();
    let below_subsystem = sysfs.components().any(|part| part.as_os_str() == "nvme-subsystem");
    Ok(Facts {
        kernel,
        has_btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        request_based: device.request_based,
        logical_block_bytes: device.logical_block_bytes,
        dax: is("queue/dax", "1"),
        zoned: device.attribute("queue/zoned").is_some_and(|zoned| zoned != "none"),
        multipath_head: !device.request_based && (below_subsystem || sysfs.join("multipath").is_dir()),
        bcache: device.name.starts_with("bcache"),
        md_linear: is("md/level", "linear"),
        counts_io: counts_io(device),
    })
}

/// Whether the kernel counts this disk's I/O, in flight and done.
pub fn counts_io(device: &BlockDevice) -> bool {
    let iostats = device.attribute("queue/iostats");
    kernel().is_ok_and(|kernel| counts(kernel, &device.name, iostats.as_deref()))
}

/// zram counts whatever `queue/iostats` says (which is 0 there since 6.11), and so did dm, when it was 0 unless somebody set it: up
/// to 6.4 at least. Other bio-based drivers (md, pmem, dm since) obey it.
fn counts(kernel: (u32, u32), name: &str, iostats: Option<&str>) -> bool {
    iostats != Some("0") || name.starts_with("zram") || (name.starts_with("dm-") && kernel < (6, 5))
}

fn kernel() -> Result<(u32, u32), String> {
    let release = nix::sys::utsname::uname().map_err(|e| format!("uname(2) failed: {e}"))?;
    let release = release.release().to_string_lossy().into_owned();
    parse_release(&release).ok_or(format!("the kernel's version {release:?} is not understood"))
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn reason_against(facts: &Facts, block_shift: u8) -> Option<String> {
    let (major, minor) = KERNEL_MIN;
    let block_bytes = 1u64.checked_shl(block_shift.into()).unwrap_or(0);
    let reason = if facts.kernel < KERNEL_MIN {
        format!(
            "the kernel is {}.{}, older than {major}.{minor}: run a newer one",
            facts.kernel.0, facts.kernel.1
        )
    } else if !facts.has_btf {
        "the kernel does not describe itself (/sys/kernel/btf/vmlinux is missing): run one with CONFIG_DEBUG_INFO_BTF"
            .to_owned()
    } else if facts.dax {
        "programs can write to it past the block layer (DAX): switch its namespace to sector mode".to_owned()
    } else if facts.zoned {
        "it is a zoned disk, which places writes by itself: replicate a disk built on top of it".to_owned()
    } else if facts.multipath_head {
        "the ends of writes cannot be seen on an NVMe multipath head: boot with nvme_core.multipath=N"
            .to_owned()
    } else if facts.bcache || facts.md_linear {
        let kind = if facts.bcache { "bcache" } else { "linear md" };
        format!("the ends of writes cannot be seen on a {kind} device: replicate a device above or below it")
    } else if !facts.request_based && !facts.counts_io {
        "its I/O statistics are off, which say when nothing is in flight: write 1 to its queue/iostats in sysfs"
            .to_owned()
    } else if block_bytes < u64::from(facts.logical_block_bytes) {
        format!(
            "blocks of {block_bytes} bytes are smaller than its sectors of {}: choose larger blocks",
            facts.logical_block_bytes
        )
    } else {
        return None;
    };
    Some(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            kernel: (6, 1),
            has_btf: true,
            request_based: true,
            logical_block_bytes: 512,
            dax: false,
            zoned: false,
            multipath_head: false,
            bcache: false,
            md_linear: false,
            counts_io: true,
        }
    }

    #[test]
    fn every_reason_is_given_and_a_plain_disk_passes() {
        assert_eq!(reason_against(&good(), 12), None);
        assert_eq!(reason_against(&Facts { counts_io: false, ..good() }, 12), None);
        assert_eq!(reason_against(&Facts { request_based: false, ..good() }, 9), None);
        let cases = [
            (Facts { kernel: (5, 10), ..good() }, "older than"),
            (Facts { kernel: (4, 19), ..good() }, "older than"),
            (Facts { has_btf: false, ..good() }, "CONFIG_DEBUG_INFO_BTF"),
            (Facts { dax: true, ..good() }, "DAX"),
            (Facts { zoned: true, ..good() }, "zoned"),
            (Facts { multipath_head: true, ..good() }, "multipath"),
            (Facts { bcache: true, ..good() }, "bcache"),
            (Facts { md_linear: true, ..good() }, "linear md"),
            (Facts { request_based: false, counts_io: false, ..good() }, "iostats"),
            (Facts { logical_block_bytes: 8192, ..good() }, "larger blocks"),
        ];
        for (facts, word) in cases {
            let reason = reason_against(&facts, 12).unwrap_or_default();
            assert!(reason.contains(word), "{facts:?}: {reason:?}");
        }
    }

    #[test]
    fn who_obeys_iostats_depends_on_driver_and_kernel() {
        assert!(counts((6, 12), "dm-0", Some("1")) && counts((6, 12), "md0", None));
        assert!(!counts((6, 12), "dm-0", Some("0")) && !counts((6, 1), "md0", Some("0")));
        assert!(counts((6, 1), "dm-0", Some("0")) && counts((6, 12), "zram0", Some("0")));
    }

    #[test]
    fn kernel_versions_are_read() {
        assert_eq!(parse_release("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(parse_release("5.15-rc1"), Some((5, 15)));
        assert_eq!(parse_release("x"), None);
    }
}
