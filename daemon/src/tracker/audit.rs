//! Comparing the sectors that the probe counted with those the kernel counted.
//!
//! Both counts of one write change at slightly different moments, so a reading is judged only if it is *settled*:
//! nothing in flight, and the same again a moment later. On a disk that is never quiet nothing is judged.
//!
//! What must never happen here: a missing write that is taken for settled.

use std::thread::sleep;
use std::time::Duration;

use blxrep_ebpf::meta;

use super::suitable;
use crate::device::{BlockDevice, DeviceError, DiskStat};

/// Time between two looks at a disk, in milliseconds: longer than anything between the two counts of one write.
const SETTLE_MS: u64 = 20;

/// What the probe counted since it was attached, in sectors of 512 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// Writes completed.
    pub written: u64,
    /// Discards completed.
    pub discarded: u64,
    /// Writes and discards queued; always 0 on a request-based disk.
    pub queued: u64,
}

/// What the kernel and the probe had counted at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// The kernel's counts.
    pub kernel: DiskStat,
    /// The probe's.
    pub probe: Counted,
}

impl Reading {
    /// The reading as it is stored.
    pub fn to_words(self) -> [u64; 5] {
        let Self { kernel, probe } = self;
        [kernel.sectors_written, kernel.sectors_discarded, probe.written, probe.discarded, probe.queued]
    }

    /// The reading that was stored.
    pub fn from_words([sectors_written, sectors_discarded, written, discarded, queued]: [u64; 5]) -> Self {
        let kernel = DiskStat { sectors_written, sectors_discarded };
        Self { kernel, probe: Counted { written, discarded, queued } }
    }
}

/// What two settled readings say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The probe saw every write.
    Complete,
    /// The probe missed something.
    Missed,
}

/// Compares two settled readings. The probe may count more than the kernel, which leaves some out (passthrough, discards
/// of zram), never less.
pub fn judge(base: Reading, now: Reading, request_based: bool) -> Verdict {
    let since = |count: fn(&Reading) -> u64| count(&now).wrapping_sub(count(&base));
    let (written, discarded) = (since(|r| r.probe.written), since(|r| r.probe.discarded));
    let less =
        since(|r| r.kernel.sectors_written) > written || since(|r| r.kernel.sectors_discarded) > discarded;
    // With nothing in flight, a bio that was queued and not seen completed has ended behind our back.
    let unseen_end = !request_based && since(|r| r.probe.queued) != written.wrapping_add(discarded);
    if less || unseen_end { Verdict::Missed } else { Verdict::Complete }
}

/// Compares a settled reading with those before it. The probe missed something only if all of them say so: a write
/// that a busy machine holds up between the two counts, for longer than a reading takes to settle, spoils one.
pub fn judge_all(history: &[Reading], now: Reading, request_based: bool) -> Verdict {
    let missed = |base: &Reading| judge(*base, now, request_based) == Verdict::Missed;
    let enough = history.len() == meta::AUDIT_READINGS;
    if enough && history.iter().all(missed) { Verdict::Missed } else { Verdict::Complete }
}

/// Takes a settled reading; `None` if the disk is not quiet. Takes 20 ms on a quiet disk. `counted` gives the probe's
/// counts.
///
/// # Errors
/// When sysfs cannot be read.
pub fn settled_reading(
    device: &BlockDevice,
    counted: impl Fn() -> Counted,
) -> Result<Option<Reading>, DeviceError> {
    let Some(first) = quiet_reading(device, &counted)? else { return Ok(None) };
    sleep(Duration::from_millis(SETTLE_MS));
    Ok(quiet_reading(device, &counted)?.filter(|second| *second == first))
}

fn quiet_reading(
    device: &BlockDevice,
    counted: &impl Fn() -> Counted,
) -> Result<Option<Reading>, DeviceError> {
    if !suitable::counts_io(device) || !is_quiet(device)? {
        return Ok(None);
    }
    let kernel = device.stat()?;
    let probe = counted();
    // A write that is in one of the counts only is in flight now, or has changed the other by the next look.
    let quiet = is_quiet(device)? && device.stat()? == kernel;
    Ok(quiet.then_some(Reading { kernel, probe }))
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

    const BASE: [u64; 5] = [100, 50, 90, 40, 130];

    /// Judges what was counted since BASE, in the order of `Reading::to_words`.
    fn judged(since: [u64; 5], request_based: bool) -> Verdict {
        let now = std::array::from_fn(|i| BASE[i] + since[i]);
        judge(Reading::from_words(BASE), Reading::from_words(now), request_based)
    }

    #[test]
    fn one_sector_less_than_the_kernel_counted_is_found() {
        assert_eq!(judged([8, 3, 8, 3, 11], false), Verdict::Complete);
        assert_eq!(judged([8, 3, 7, 3, 10], false), Verdict::Missed);
        assert_eq!(judged([8, 3, 8, 2, 10], false), Verdict::Missed);
        assert_eq!(judged([8, 0, 7, 0, 0], true), Verdict::Missed);
        assert_eq!(
            judged([8, 0, 7, 99, 0], true),
            Verdict::Missed,
            "a discard more does not hide a write less"
        );
        assert_eq!(judged([0, 0, 8, 8, 0], true), Verdict::Complete, "the kernel may leave some out");
    }

    #[test]
    fn a_bio_that_never_came_back_is_found_although_the_kernel_did_not_count_it() {
        assert_eq!(judged([0, 0, 8, 0, 16], false), Verdict::Missed);
        assert_eq!(judged([0, 0, 8, 0, 0], true), Verdict::Complete);
    }

    #[test]
    fn one_reading_that_was_spoiled_raises_no_doubt_but_a_loss_does() {
        let at = |kernel: u64, probe: u64| Reading::from_words([kernel, 0, probe, 0, 0]);
        let mut history = vec![at(0, 0), at(16, 24)];
        assert_eq!(
            judge_all(&history, at(32, 32), true),
            Verdict::Complete,
            "the second was read in between"
        );
        history[1] = at(16, 16);
        assert_eq!(judge_all(&history, at(32, 31), true), Verdict::Missed);
        assert_eq!(judge_all(&history[1..], at(32, 31), true), Verdict::Complete, "too few to judge by");
    }

    #[test]
    fn counters_that_wrap_are_no_mismatch() {
        let base = Reading::from_words([u64::MAX, 0, u64::MAX - 3, 0, u64::MAX - 3]);
        assert_eq!(judge(base, Reading::from_words([7, 0, 4, 0, 4]), false), Verdict::Complete);
    }

    #[test]
    fn a_reading_is_stored_and_read_back() {
        let reading = Reading::from_words([1, 2, 3, 4, 5]);
        assert_eq!(reading.to_words(), [1, 2, 3, 4, 5]);
    }
}
