//! One sync: pre-copy rounds until little is left, then the final pass. Pure.
//!
//! As in the live migration of virtual machines (Clark et al., NSDI 2005): every round sends what changed while
//! the round before was sent. When what is left fits the freeze budget, or rounds stop helping, file systems are
//! frozen and the rest is read. If it does not fit even then, the freeze is given up at once and tried again
//! later; after the last try the sync ends without a freeze, as `crash` or `fuzzy`.

use crate::bitmap::{BlockSet, Extent};
use crate::freeze::final_pass::Taken;

/// Pre-copy rounds before a final pass is tried in any case.
const ROUNDS_MAX: u32 = 8;
/// Final passes before the sync ends without one.
const ATTEMPTS_MAX: u32 = 3;
/// Blocks of a retry that may fail: each can take a dying disk many seconds.
const RETRY_FAILURES_MAX: u32 = 64;

/// Where a sync is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Blocks that could not be read before are read again, one by one, long before anything is frozen.
    Retry,
    /// File systems are being synced and the tracker drained.
    PreCopy,
    /// Little is left: the final pass may begin.
    Freeze,
    /// The final pass runs.
    Freezing,
    /// A round is being sent.
    Round,
    /// The round was sent.
    RoundSent,
    /// The rest, read while frozen, is being sent.
    Rest,
    /// Everything is being sent without a freeze.
    Unfrozen,
    /// Everything was sent without a freeze.
    UnfrozenSent,
    /// The last drain of a sync without a freeze.
    LastDrain,
    /// The seal was sent.
    Sealed,
}

impl Phase {
    /// Whether what changes now belongs to the next checkpoint.
    pub fn is_behind_freeze(self) -> bool {
        matches!(self, Self::Rest | Self::Unfrozen | Self::UnfrozenSent | Self::LastDrain | Self::Sealed)
    }
}

/// A sync under way.
pub struct Sync {
    phase: Phase,
    rounds: u32,
    attempts: u32,
    retry_failures: u32,
    round_due: bool,
    last_round_blocks: u64,
    sending: BlockSet,
    rest: Option<Taken>,
    note: String,
}

impl Default for Sync {
    fn default() -> Self {
        Self::new()
    }
}

impl Sync {
    /// A sync that begins.
    pub fn new() -> Self {
        Self {
            phase: Phase::PreCopy,
            rounds: 0,
            attempts: 0,
            retry_failures: 0,
            round_due: false,
            last_round_blocks: u64::MAX,
            sending: BlockSet::new(),
            rest: None,
            note: String::new(),
        }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether another round is better than a final pass now: what is left is above half the budget (the last
    /// seconds before a freeze add to it), and rounds still make it smaller.
    pub fn worth_a_round(&self, blocks: u64, budget_blocks: u64) -> bool {
        let shrinks = blocks < self.last_round_blocks / 4 * 3 || self.rounds < 2;
        self.round_due || (blocks > budget_blocks / 2 && shrinks && self.rounds < ROUNDS_MAX)
    }

    /// A round must come before the next final pass: what is left could not be read while frozen.
    pub fn demand_round(&mut self) {
        self.round_due = true;
    }

    /// Tries blocks again that could not be read.
    pub fn retry(&mut self, blocks: BlockSet) {
        (self.sending, self.phase) = (blocks, Phase::Retry);
    }

    /// One of them still cannot be read: whether that is enough for this sync. The others then wait for the next one.
    pub fn retry_failed(&mut self) -> bool {
        self.retry_failures += 1;
        let enough = self.retry_failures >= RETRY_FAILURES_MAX;
        if enough {
            self.sending = BlockSet::new();
        }
        enough
    }

    /// Sends a round.
    pub fn send(&mut self, blocks: BlockSet) {
        self.rounds += 1;
        self.round_due = false;
        self.last_round_blocks = blocks.len();
        (self.sending, self.phase) = (blocks, Phase::Round);
    }

    /// Little is left.
    pub fn freeze(&mut self) {
        self.phase = Phase::Freeze;
    }

    /// The final pass begins.
    pub fn freezing(&mut self) {
        self.phase = Phase::Freezing;
    }

    /// Begins the next round's drain.
    pub fn next_round(&mut self) {
        self.phase = Phase::PreCopy;
    }

    /// After a final pass that came to nothing: whether it is tried again.
    pub fn try_again(&mut self, note: String) -> bool {
        self.attempts += 1;
        self.phase = Phase::PreCopy;
        (self.rounds, self.last_round_blocks) = (0, u64::MAX);
        if !note.is_empty() {
            self.note = note;
        }
        self.attempts < ATTEMPTS_MAX
    }

    /// Sends everything without a freeze.
    pub fn send_unfrozen(&mut self, blocks: BlockSet) {
        (self.sending, self.phase) = (blocks, Phase::Unfrozen);
    }

    /// Drains for the last time without a freeze.
    pub fn last_drain(&mut self) {
        self.phase = Phase::LastDrain;
    }

    /// What a checkpoint without a freeze says of itself.
    pub fn unfrozen_note(&self) -> String {
        let why = "too much changed for a freeze: blocks were read while the disk was written";
        if self.note.is_empty() { why.to_owned() } else { format!("{why}; {}", self.note) }
    }

    /// Sends what the final pass read.
    pub fn send_rest(&mut self, taken: Taken) {
        (self.rest, self.phase) = (Some(taken), Phase::Rest);
    }

    /// The next piece the final pass read.
    pub fn next_of_rest(&mut self) -> Option<(Extent, Vec<u8>)> {
        self.rest.as_mut()?.data.pop()
    }

    /// What the final pass said, once all of it was sent.
    pub fn take_when_sent(&mut self) -> Option<Taken> {
        let taken = self.rest.take_if(|taken| taken.data.is_empty())?;
        self.phase = Phase::Sealed;
        Some(taken)
    }

    /// The seal was sent.
    pub fn sealed(&mut self) {
        self.phase = Phase::Sealed;
    }

    /// The next blocks to read, at most `max` of them.
    pub fn next_to_read(&mut self, max: u64) -> Option<Extent> {
        let max = match self.phase {
            Phase::Retry => 1,
            Phase::Round | Phase::Unfrozen => max,
            _ => return None,
        };
        let extent = self.sending.first_extent(max);
        match (extent, self.phase) {
            (Some(extent), _) => self.sending.remove(extent),
            (None, Phase::Retry | Phase::Round) => self.phase = Phase::RoundSent,
            (None, _) => self.phase = Phase::UnfrozenSent,
        }
        extent
    }

    /// The sync comes to nothing: what it had taken to send and did not send.
    pub fn give_back(self, to_send: &mut BlockSet) {
        // What was to be tried again is so in the next sync as well.
        if self.phase != Phase::Retry {
            to_send.union(&self.sending);
        }
        for (extent, _) in self.rest.into_iter().flat_map(|taken| taken.data) {
            to_send.insert(extent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(count: u64) -> BlockSet {
        [Extent { first: 0, count }].into_iter().collect()
    }

    #[test]
    fn rounds_go_on_while_they_help_and_end_when_they_do_not() {
        let mut sync = Sync::new();
        assert!(!sync.worth_a_round(50, 100), "what fits is read in the freeze");
        assert!(sync.worth_a_round(1000, 100));
        sync.send(blocks(1000));
        sync.send(blocks(990));
        assert!(!sync.worth_a_round(980, 100), "rounds that do not shrink the rest do not help");
        assert!(sync.worth_a_round(500, 100));
        (0..ROUNDS_MAX).for_each(|_| sync.send(blocks(1000)));
        assert!(!sync.worth_a_round(500, 100));
        assert!(sync.try_again(String::new()) && sync.try_again("x".to_owned()));
        assert!(!sync.try_again(String::new()));
        assert!(sync.unfrozen_note().ends_with("; x"));
    }

    #[test]
    fn what_changes_while_the_last_blocks_are_sent_belongs_to_the_next_checkpoint() {
        let mut sync = Sync::new();
        sync.send(blocks(600));
        assert!(!sync.phase().is_behind_freeze());
        sync.send_unfrozen(blocks(600));
        assert!(sync.phase().is_behind_freeze());
        while sync.next_to_read(256).is_some() {}
        assert!(sync.phase().is_behind_freeze());
        sync.last_drain();
        assert!(sync.phase().is_behind_freeze());
    }

    #[test]
    fn a_retry_goes_block_by_block_and_ends_when_enough_have_failed() {
        let mut sync = Sync::new();
        sync.retry(blocks(100));
        for first in 0..u64::from(RETRY_FAILURES_MAX) {
            assert_eq!(sync.next_to_read(256), Some(Extent { first, count: 1 }));
            assert_eq!(sync.retry_failed(), first + 1 == u64::from(RETRY_FAILURES_MAX));
        }
        assert_eq!((sync.next_to_read(256), sync.phase()), (None, Phase::RoundSent));
        sync.retry(blocks(2));
        let mut to_send = BlockSet::new();
        sync.give_back(&mut to_send);
        assert!(to_send.is_empty(), "they would be read while frozen");
    }

    #[test]
    fn what_could_not_be_read_while_frozen_is_sent_in_a_round() {
        let mut sync = Sync::new();
        assert!(!sync.worth_a_round(1, 100));
        sync.demand_round();
        assert!(sync.worth_a_round(1, 100));
        sync.send(blocks(1));
        assert!(!sync.worth_a_round(1, 100));
    }

    #[test]
    fn what_was_not_sent_is_given_back() {
        let mut sync = Sync::new();
        sync.send(blocks(600));
        assert_eq!(sync.next_to_read(256), Some(Extent { first: 0, count: 256 }));
        let mut to_send = BlockSet::new();
        sync.give_back(&mut to_send);
        assert_eq!(to_send.len(), 344);
    }
}
