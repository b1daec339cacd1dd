//! The change tracker's BPF object, and the layouts it shares with user space.
//!
//! All values are in the machine's own byte order: they never leave the machine, nor outlive its boot. Names and
//! numbers here are those of `tracker.bpf.c`.

#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/tracker.bpf.o")));

/// The object file (ELF, with BTF), aligned to 8 bytes as its parser wants it.
pub static OBJECT: &[u8] = &ALIGNED.0;

/// Blocks in a group of the coarse bitmap: 64 words of 64 bits.
pub const COARSE_GROUP_WORDS: usize = 64;

/// Names of the maps in the object, and of their pins.
pub mod map {
    /// Array of u64: one bit a block, set by the probe.
    pub const LIVE: &str = "live";
    /// Array of u64: one bit for 64 words of [`LIVE`], set by the probe for huge writes.
    pub const COARSE: &str = "coarse";
    /// Array of u64: as [`LIVE`], written by user space only.
    pub const PENDING: &str = "pending";
    /// Array of u64, see [`super::meta`]; written by user space only.
    pub const META: &str = "meta";
    /// Array of u64, see [`super::state`]; written by the probe only.
    pub const STATE: &str = "state";
    /// Array of [`super::COUNT_WORDS`] u64 a CPU; written by the probe only.
    pub const COUNTS: &str = "counts";
    /// Hash of the writes in flight on a bio-based disk.
    pub const INFLIGHT: &str = "inflight";
    /// All of them.
    pub const ALL: [&str; 7] = [LIVE, COARSE, PENDING, META, STATE, COUNTS, INFLIGHT];
}

/// Names of the constants that are set before the object is loaded.
pub mod constant {
    /// u32: the disk's major number.
    pub const MAJOR: &str = "disk_major";
    /// u32: the disk's first minor number.
    pub const MINOR: &str = "disk_minor";
    /// u32: log2 of the bytes of a block.
    pub const BLOCK_SHIFT: &str = "block_shift";
    /// u64: the disk's blocks.
    pub const BLOCKS: &str = "disk_blocks";
}

/// A program of the object: two copies on one tracepoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// The tracepoint.
    pub tracepoint: &'static str,
    /// The names of copy a and b.
    pub copies: [&'static str; 2],
}

/// The probe of disks with a request queue.
pub const REQUEST_PROBES: &[Probe] =
    &[Probe { tracepoint: "block_rq_complete", copies: ["rq_complete_a", "rq_complete_b"] }];

/// The probes of disks without one, in the order in which they must be attached: with the first one alone, a completion
/// finds no entry, which is harmless; with the other one alone, an entry would never leave.
pub const BIO_PROBES: &[Probe] = &[
    Probe { tracepoint: "block_bio_complete", copies: ["bio_complete_a", "bio_complete_b"] },
    Probe { tracepoint: "block_bio_queue", copies: ["bio_queue_a", "bio_queue_b"] },
];

/// Words of a CPU's slot in [`map::COUNTS`]: sectors written, discarded, and (bio-based disks) queued; the rest is the probe's own.
pub const COUNT_WORDS: usize = 8;

/// Slots of [`map::STATE`]: how often something happened that leaves a doubt.
pub mod state {
    /// A passthrough command with data to the disk.
    pub const PASSTHROUGH: usize = 0;
    /// The table of bios in flight did not take an entry.
    pub const TABLE_FULL: usize = 1;
    /// A discard with more ranges than the probe walks.
    pub const DISCARD_TOO_LONG: usize = 2;
    /// A write behind the end that the disk had when the tracker was made.
    pub const BEYOND_END: usize = 3;
    /// A bio was queued again without its completion having been seen.
    pub const LOST_COMPLETION: usize = 4;
    /// How many there are.
    pub const SLOTS: usize = 5;
    /// Entries of the map.
    pub const ENTRIES: usize = 8;
}

/// Slots of [`map::META`], a u64 each. Everything but [`MAGIC`](meta::MAGIC) is written first; a tracker without it
/// was never finished.
pub mod meta {
    /// [`MAGIC_VALUE`], written last.
    pub const MAGIC: usize = 0;
    /// "blxrepTM".
    pub const MAGIC_VALUE: u64 = u64::from_le_bytes(*b"blxrepTM");
    /// First of the slots that say which tracker this is: those up to [`IDENTITY_END`] are compared as a whole.
    pub const IDENTITY: usize = 1;
    /// Behind the last slot of the identity.
    pub const IDENTITY_END: usize = 11;
    /// The epoch's bytes 0 to 7.
    pub const EPOCH_LOW: usize = 16;
    /// The epoch's bytes 8 to 15.
    pub const EPOCH_HIGH: usize = 17;
    /// The checkpoint since which pending is complete, 0 for none.
    pub const BASE: usize = 18;
    /// The code of the newest gap, 0 for none.
    pub const GAP: usize = 19;
    /// How often a gap was raised.
    pub const GAP_COUNT: usize = 20;
    /// The disk's size in bytes when last looked at.
    pub const SEEN_SIZE: usize = 21;
    /// The disk's `diskseq` when last looked at.
    pub const SEEN_DISKSEQ: usize = 22;
    /// First of the counts of [`map::STATE`](super::map::STATE) already accounted for.
    pub const SEEN_STATE: usize = 24;
    /// First of the counts of skipped runs already accounted for: probe by probe, copy a and b.
    pub const SEEN_MISSES: usize = 32;
    /// How many readings the audit has, at most [`AUDIT_READINGS`].
    pub const AUDIT_VALID: usize = 40;
    /// Where the audit's next reading goes, counted from 0.
    pub const AUDIT_NEXT: usize = 41;
    /// First of the kernel's ids of the maps and programs that belong together.
    pub const PIN_IDS: usize = 48;
    /// First of the audit's readings, [`AUDIT_WORDS`] slots each, in sectors: written and discarded as the kernel says,
    /// then written, discarded and queued as the probe says.
    pub const AUDIT_BASE: usize = 64;
    /// Slots of one reading.
    pub const AUDIT_WORDS: usize = 5;
    /// The readings the audit keeps.
    pub const AUDIT_READINGS: usize = 2;
    /// Entries of the map.
    pub const ENTRIES: usize = 96;
}

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSection};

    use super::*;

    #[test]
    fn the_object_is_an_aligned_elf_file_for_bpf() {
        assert_eq!(OBJECT.as_ptr() as usize % 8, 0);
        assert_eq!(OBJECT.get(..4), Some(&b"\x7fELF"[..]));
        assert_eq!(OBJECT.get(18), Some(&247), "EM_BPF");
    }

    /// What lets one object run on every kernel. A compiler that leaves it out builds an object all the same.
    #[test]
    fn the_object_has_btf_and_co_re_relocations() {
        let file = object::File::parse(OBJECT).unwrap();
        assert!(file.section_by_name(".BTF").is_some_and(|btf| btf.size() > 0));
        let ext = file.section_by_name(".BTF.ext").expect(".BTF.ext").data().unwrap();
        // The last word of libbpf's struct btf_ext_header.
        let (core_relo_len, _) = ext[28..].split_first_chunk().unwrap();
        assert!(u32::from_ne_bytes(*core_relo_len) > 0, "no CO-RE relocations");
    }

    #[test]
    fn every_name_is_in_the_object() {
        let probes = REQUEST_PROBES.iter().chain(BIO_PROBES);
        let names = map::ALL.into_iter().chain(probes.flat_map(|p| p.copies));
        for name in names.chain([constant::MAJOR, constant::MINOR, constant::BLOCK_SHIFT, constant::BLOCKS]) {
            let with_end = [name.as_bytes(), b"\0"].concat();
            assert!(OBJECT.windows(with_end.len()).any(|w| w == with_end), "{name}");
        }
    }

    #[test]
    fn slots_do_not_overlap() {
        const { assert!(meta::SEEN_STATE + state::SLOTS <= meta::SEEN_MISSES) };
        const { assert!(meta::SEEN_MISSES + 4 <= meta::AUDIT_VALID) };
        const { assert!(meta::PIN_IDS + map::ALL.len() + 4 <= meta::AUDIT_BASE) };
        const { assert!(meta::AUDIT_BASE + meta::AUDIT_WORDS * meta::AUDIT_READINGS <= meta::ENTRIES) };
    }
}
