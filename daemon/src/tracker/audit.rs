//! Comparing the sectors that the probe counted with those the kernel counted.
//!
//! Both counts of one write change at slightly different moments, so a reading is judged only if it is *settled*:
//! nothing in flight, and the same again a moment later. On a disk that is never quiet nothing is judged.
//!
//! What must never happen here: a missing write that is taken for settled.

use std::thread::sleep;
use std::time::Duration;

use crate::device::{BlockDevice, DeviceError};

/// Time between two looks at a disk, in milliseconds: longer than anything between the two counts of one write.
const SETTLE_MS: u64 = 20;

/// What was counted at one moment, in sectors of 512 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Written and discarded, as the kernel counted.
    pub kernel: u64,
    /// Completed, as the probe saw.
    pub completed: u64,
    /// Queued, as the probe saw; always 0 on a request-based disk.
    pub queued: u64,
}

/// What two settled readings say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The probe saw every write.
    Complete,
    /// The probe missed something.
    Missed,
}

/// Compares two settled readings. The probe may count more than the kernel, which leaves some out (writes begun while
/// `iostats` was 0, passthrough), never less.
pub fn judge(base: Reading, now: Reading, request_based: bool) -> Verdict {
    let kernel = now.kernel.wrapping_sub(base.kernel);
    let completed = now.completed.wrapping_sub(base.completed);
    let queued = now.queued.wrapping_sub(base.queued);
    // With nothing in flight, a bio that was queued and not seen completed has ended behind our back.
    let unseen_end = !request_based && queued != completed;
    if kernel > completed || unseen_end { Verdict::Missed } else { Verdict::Complete }
}

/// Takes a settled reading; `None` if the disk is not quiet. Takes 20 ms on a quiet disk. `counted` gives the probe's
/// sectors completed and queued.
///
/// # Errors
/// When sysfs cannot be read.
pub fn settled_reading(
    device: &BlockDevice,
    counted: impl Fn() -> (u64, u64),
) -> Result<Option<Reading>, DeviceError> {
    let Some(first) = quiet_reading(device, &counted)? else { return Ok(None) };
    sleep(Duration::from_millis(SETTLE_MS));
    Ok(quiet_reading(device, &counted)?.filter(|second| *second == first))
}

fn quiet_reading(
    device: &BlockDevice,
    counted: &impl Fn() -> (u64, u64),
) -> Result<Option<Reading>, DeviceError> {
    if device.attribute("queue/iostats").as_deref() == Some("0") || !is_quiet(device)? {
        return Ok(None);
    }
    let before = device.stat()?;
    let (completed, queued) = counted();
    // A write that is in one of the counts only is in flight now, or has changed the other by the next look.
    let quiet = is_quiet(device)? && device.stat()? == before;
    let kernel = before.sectors_written.wrapping_add(before.sectors_discarded);
    Ok(quiet.then_some(Reading { kernel, completed, queued }))
}

/// Whether no write is in flight and none is held back by a suspended device mapper.
///
/// # Errors
/// When sysfs cannot be read.
pub fn is_quiet(device: &BlockDevice) -> Result<bool, DeviceError> {
    Ok(device.inflight()?.writes == 0 && device.attribute("dm/suspended").as_deref() != Some("1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Reading = Reading { kernel: 100, completed: 90, queued: 90 };

    fn after(kernel: u64, completed: u64, queued: u64) -> Reading {
        Reading { kernel: 100 + kernel, completed: 90 + completed, queued: 90 + queued }
    }

    #[test]
    fn one_sector_less_than_the_kernel_counted_is_found() {
        assert_eq!(judge(BASE, after(8, 8, 8), false), Verdict::Complete);
        assert_eq!(judge(BASE, after(8, 7, 7), false), Verdict::Missed);
        assert_eq!(judge(BASE, after(8, 7, 0), true), Verdict::Missed);
        assert_eq!(judge(BASE, after(0, 8, 0), true), Verdict::Complete, "the kernel may leave some out");
    }

    #[test]
    fn a_bio_that_never_came_back_is_found_although_the_kernel_did_not_count_it() {
        assert_eq!(judge(BASE, after(0, 8, 16), false), Verdict::Missed);
        assert_eq!(judge(BASE, after(0, 8, 0), true), Verdict::Complete);
    }

    #[test]
    fn counters_that_wrap_are_no_mismatch() {
        let base = Reading { kernel: u64::MAX, completed: u64::MAX - 3, queued: u64::MAX - 3 };
        let now = Reading { kernel: 7, completed: 4, queued: 4 };
        assert_eq!(judge(base, now, false), Verdict::Complete);
    }
}
