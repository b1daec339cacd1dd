//! Whether what an agent sends has room in the data directory. Pure.
//!
//! What must never happen here: a disk refused because of how much it *might* send, while there is room. A sparse or
//! compressible one may fit after all; only when the reserve is reached is nothing more taken.

use std::fmt;

use crate::store::files::Space;

/// Kept free at most for what goes on when the disk is full: journals of changed sectors, the seal of what has arrived,
/// the catalogue.
const RESERVE_MAX_BYTES: u64 = 64 << 20;
/// On a small file system the reserve is this part of it.
const RESERVE_PART: u64 = 100;

/// Too little room: what is to be stored, and what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// What is to be stored, before compression.
    pub needed_bytes: u64,
    /// Free in the data directory.
    pub free_bytes: u64,
    /// The part of the free bytes that is not given to data.
    pub reserve_bytes: u64,
}

fn reserve_bytes(space: Space) -> u64 {
    RESERVE_MAX_BYTES.min(space.total_bytes / RESERVE_PART)
}

/// Whether data must wait. Once it does, it waits until what is needed fits, or at least as much as the reserve: else every
/// freed block would begin a sync that cannot end.
pub fn data_waits(space: Space, needed_bytes: u64, waits: bool) -> bool {
    let reserve = reserve_bytes(space);
    let more = if waits { needed_bytes.min(reserve) } else { 0 };
    space.free_bytes <= reserve.saturating_add(more)
}

/// Whether not even a journal may grow: half of the reserve is for sealing, and for the catalogue.
pub fn all_waits(space: Space) -> bool {
    space.free_bytes <= reserve_bytes(space) / 2
}

/// Whether that much may not fit, should none of it be zeros or compress. `None` where it does.
pub fn tight(space: Space, needed_bytes: u64) -> Option<Shortage> {
    let shortage = Shortage::new(space, needed_bytes);
    (needed_bytes > space.free_bytes.saturating_sub(shortage.reserve_bytes)).then_some(shortage)
}

impl Shortage {
    /// What is needed, beside what is there.
    pub fn new(space: Space, needed_bytes: u64) -> Self {
        Self { needed_bytes, free_bytes: space.free_bytes, reserve_bytes: reserve_bytes(space) }
    }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "up to {} MiB are needed in the data directory, {} MiB are free ({} MiB of them are kept for journals)",
            mib(self.needed_bytes),
            self.free_bytes >> 20,
            mib(self.reserve_bytes)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn space(free_mib: u64, total_mib: u64) -> Space {
        Space { free_bytes: free_mib * MIB, total_bytes: total_mib * MIB }
    }

    #[test]
    fn data_is_taken_down_to_the_reserve_and_journals_to_half_of_it() {
        assert!(!data_waits(space(65, 100_000), u64::MAX, false), "how much may come is no reason");
        assert!(data_waits(space(64, 100_000), 0, false));
        assert!(!all_waits(space(64, 100_000)) && all_waits(space(32, 100_000)));
        assert!(!data_waits(space(2, 100), 0, false), "1 % of a small one");
        assert!(data_waits(space(1, 100), 0, false));
    }

    #[test]
    fn what_waits_goes_on_when_it_fits_or_when_there_is_room_to_speak_of() {
        assert!(data_waits(space(73, 100_000), 10 * MIB, true));
        assert!(data_waits(space(74, 100_000), 10 * MIB, true));
        assert!(!data_waits(space(75, 100_000), 10 * MIB, true));
        assert!(data_waits(space(128, 100_000), u64::MAX, true));
        assert!(!data_waits(space(129, 100_000), u64::MAX, true));
    }

    #[test]
    fn what_may_not_fit_is_said_with_numbers() {
        assert_eq!(tight(space(164, 100_000), 100 * MIB), None);
        let text = tight(space(164, 100_000), 100 * MIB + 1).unwrap().to_string();
        assert_eq!(
            text,
            "up to 101 MiB are needed in the data directory, 164 MiB are free (64 MiB of them are kept for journals)"
        );
    }
}
