//! Reading the whole disk once: the full copy and the verified compare. Pure.
//!
//! The agent asks for the dispatcher's digests in batches ahead of where it reads. A group the dispatcher does not
//! have is sent whole; one it has is skipped (a copy that goes on) or compared, and where the digest differs the
//! group's hashes are asked for and only the blocks that differ are sent.

use std::collections::{BTreeSet, VecDeque};

use crate::geometry::Geometry;
use crate::hash::GroupDigest;
use crate::wire::message::DIGESTS_MAX;

/// Groups that were read and are not settled yet.
const UNSETTLED_MAX: usize = 16;

/// What a scan wants next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Ask for digests.
    Ask {
        /// The first group.
        first_group: u64,
        /// How many.
        count: u32,
    },
    /// Read a group.
    Read {
        /// Which.
        group: u64,
        /// The dispatcher does not have it.
        missing: bool,
    },
    /// Everything was read and sent: say so, once a connection.
    Done,
}

/// A scan under way.
#[derive(Debug)]
pub struct Scan {
    groups: u64,
    compare: bool,
    /// Every group before this one was read, and is settled or in `unsettled`.
    next_group: u64,
    asked_to: u64,
    digests: VecDeque<GroupDigest>,
    comparing: Option<GroupDigest>,
    /// Groups whose hashes were asked for and have not come.
    wanted: BTreeSet<u64>,
    /// Groups being read, and those of `wanted`: what becomes of them is not known yet.
    unsettled: BTreeSet<u64>,
    told: bool,
    closed: bool,
}

impl Scan {
    /// A scan from the first group on; `compare` the groups the dispatcher has, or skip them.
    pub fn new(geometry: Geometry, compare: bool) -> Self {
        Self {
            groups: geometry.groups(),
            compare,
            next_group: 0,
            asked_to: 0,
            digests: VecDeque::new(),
            comparing: None,
            wanted: BTreeSet::new(),
            unsettled: BTreeSet::new(),
            told: false,
            closed: false,
        }
    }

    /// Whether the dispatcher has everything. Not sooner: a seal goes on another connection and may overtake the last data.
    pub fn is_done(&self) -> bool {
        self.closed
    }

    /// The dispatcher says that it has everything.
    pub fn close(&mut self) {
        self.closed = self.told;
    }

    /// Whether it compares every group and has not begun: whatever changed before need not be sent apart from it.
    pub fn covers_all_before(&self) -> bool {
        self.compare && self.next_group == 0 && self.asked_to == 0
    }

    /// How much was read, from 0 to 1.
    pub fn progress(&self) -> f64 {
        self.next_group as f64 / self.groups.max(1) as f64
    }

    /// What to do next, if anything can be done now.
    pub fn step(&mut self) -> Option<Step> {
        if self.told {
            return None;
        }
        let batch = u64::from(DIGESTS_MAX).min(self.groups - self.asked_to);
        if batch > 0 && self.asked_to - self.next_group <= u64::from(DIGESTS_MAX / 2) {
            let first_group = self.asked_to;
            self.asked_to += batch;
            return Some(Step::Ask { first_group, count: batch as u32 });
        }
        while self.unsettled.len() < UNSETTLED_MAX {
            let Some(digest) = self.digests.pop_front() else { break };
            let group = self.next_group;
            self.next_group += 1;
            if digest == GroupDigest::MISSING {
                self.unsettled.insert(group);
                return Some(Step::Read { group, missing: true });
            } else if self.compare {
                self.comparing = Some(digest);
                self.unsettled.insert(group);
                return Some(Step::Read { group, missing: false });
            }
        }
        if self.next_group == self.groups && self.unsettled.is_empty() {
            self.told = true;
            return Some(Step::Done);
        }
        None
    }

    /// Digests came. Ones that were not asked for next are not taken: the dispatcher answers in order.
    pub fn digests(&mut self, first_group: u64, digests: Vec<GroupDigest>) {
        let expected = self.next_group + self.digests.len() as u64;
        if first_group == expected && digests.len() as u64 <= self.asked_to - expected {
            self.digests.extend(digests);
        }
    }

    /// A group's own digest is known: whether its hashes must be asked for.
    pub fn compare(&mut self, group: u64, digest: GroupDigest) -> bool {
        let differs = self.comparing.take() != Some(digest);
        if differs {
            self.wanted.insert(group);
        } else {
            self.settled(group);
        }
        differs
    }

    /// A group's hashes came: whether they were asked for.
    pub fn answered(&mut self, group: u64) -> bool {
        self.wanted.remove(&group)
    }

    /// All that is to be sent of a group was handed over.
    pub fn settled(&mut self, group: u64) {
        self.unsettled.remove(&group);
    }

    /// Goes back to a group whose data may not have arrived.
    pub fn rewind(&mut self, group: u64) {
        self.next_group = self.next_group.min(group);
        (self.told, self.closed) = (false, false);
    }

    /// The connection is gone: what was asked for will not come.
    pub fn disconnect(&mut self) {
        if let Some(first) = self.unsettled.pop_first() {
            self.rewind(first);
        }
        self.unsettled.clear();
        self.wanted.clear();
        self.digests.clear();
        self.comparing = None;
        self.asked_to = self.next_group;
        // A finished scan is told again: the dispatcher may not have heard.
        (self.told, self.closed) = (false, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> GroupDigest {
        GroupDigest([n; 16])
    }

    fn scan(groups: u64, compare: bool) -> Scan {
        let mut scan = Scan::new(Geometry::new(groups << 20, 12).unwrap(), compare);
        assert_eq!(scan.step(), Some(Step::Ask { first_group: 0, count: groups as u32 }));
        scan
    }

    #[test]
    fn a_copy_sends_what_is_missing_and_skips_the_rest() {
        let mut scan = scan(3, false);
        scan.digests(0, vec![digest(1), GroupDigest::MISSING, digest(2)]);
        assert_eq!(scan.step(), Some(Step::Read { group: 1, missing: true }));
        assert_eq!(scan.step(), None, "not done before it is read");
        scan.settled(1);
        assert_eq!(scan.step(), Some(Step::Done));
        assert_eq!(scan.step(), None);
    }

    #[test]
    fn a_cut_compare_goes_back_to_the_first_group_that_is_not_settled() {
        let mut scan = scan(4, true);
        scan.digests(0, vec![digest(1); 4]);
        for group in 0..3 {
            assert_eq!(scan.step(), Some(Step::Read { group, missing: false }));
            assert_eq!(scan.compare(group, digest(if group == 1 { 9 } else { 1 })), group == 1);
        }
        scan.disconnect();
        assert!(!scan.answered(1), "an answer to the connection before is not taken");
        assert_eq!(scan.step(), Some(Step::Ask { first_group: 1, count: 3 }));
        scan.digests(0, vec![digest(1)]);
        assert_eq!(scan.step(), None, "digests of other groups are not taken");
        scan.digests(1, vec![digest(1); 3]);
        assert_eq!(scan.step(), Some(Step::Read { group: 1, missing: false }));
    }

    #[test]
    fn it_is_not_done_while_hashes_are_awaited() {
        let mut scan = scan(1, true);
        scan.digests(0, vec![digest(1)]);
        assert_eq!(scan.step(), Some(Step::Read { group: 0, missing: false }));
        assert!(scan.compare(0, digest(2)));
        assert_eq!(scan.step(), None);
        assert!(scan.answered(0));
        assert_eq!(scan.step(), None, "the blocks that differ are still to be read");
        scan.settled(0);
        assert_eq!(scan.step(), Some(Step::Done));
    }

    #[test]
    fn a_group_whose_blocks_were_about_to_be_read_is_not_forgotten_by_a_cut() {
        let mut scan = scan(2, true);
        scan.digests(0, vec![digest(1); 2]);
        assert_eq!(scan.step(), Some(Step::Read { group: 0, missing: false }));
        assert!(scan.compare(0, digest(2)) && scan.answered(0));
        scan.disconnect();
        assert_eq!(scan.step(), Some(Step::Ask { first_group: 0, count: 2 }));
    }
}
