//! Which groups a fetch asks for. Pure.
//!
//! The dispatcher tells the digests of what the target is to hold, the agent looks at what it holds, and asks for the groups
//! that differ with the hashes it has of them. What must never happen here: a group taken for settled that does not have
//! its digest.

use std::collections::{BTreeMap, VecDeque};

use crate::geometry::Geometry;
use crate::hash::{BlockHash, GroupDigest, group_digest};
use crate::run::Run;
use crate::wire::message::DIGESTS_MAX;

/// Groups that are asked for and have not come.
pub(super) const WANTED_MAX: usize = 16;
/// Questions without an answer: the groups, and two for digests.
pub(super) const QUESTIONS_MAX: usize = WANTED_MAX + 2;

/// What a fetch does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Ask for digests.
    Ask {
        /// The first group.
        first_group: u64,
        /// How many.
        count: u32,
    },
    /// Look whether the target holds this group already.
    Look {
        /// Which.
        group: u64,
        /// What it is to be.
        digest: GroupDigest,
    },
}

/// A group that was asked for.
#[derive(Debug)]
struct Wanted {
    group: u64,
    digest: GroupDigest,
    /// Of what the target holds with all that came; [`BlockHash::UNREADABLE`], which no target's block has, where not known.
    holds: Vec<BlockHash>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Plan {
    geometry: Geometry,
    /// Every group before it was looked at.
    next_group: u64,
    asked_to: u64,
    /// Of `next_group` and those behind it.
    digests: VecDeque<GroupDigest>,
    wanted: VecDeque<Wanted>,
    /// Groups of which blocks may have been written, and what they are to read back as.
    written: BTreeMap<u64, GroupDigest>,
}

impl Plan {
    /// From the first group on.
    pub(super) fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            next_group: 0,
            asked_to: 0,
            digests: VecDeque::new(),
            wanted: VecDeque::new(),
            written: BTreeMap::new(),
        }
    }

    /// What to do next, if anything can be done before something comes.
    pub(super) fn step(&mut self) -> Option<Step> {
        let batch = u64::from(DIGESTS_MAX).min(self.geometry.groups() - self.asked_to);
        if batch > 0 && self.asked_to - self.next_group <= u64::from(DIGESTS_MAX / 2) {
            let first_group = self.asked_to;
            self.asked_to += batch;
            return Some(Step::Ask { first_group, count: batch as u32 });
        }
        if self.wanted.len() >= WANTED_MAX {
            return None;
        }
        let digest = self.digests.pop_front()?;
        self.next_group += 1;
        Some(Step::Look { group: self.next_group - 1, digest })
    }

    /// Whether the target holds everything.
    pub(super) fn is_done(&self) -> bool {
        self.next_group == self.geometry.groups() && self.wanted.is_empty()
    }

    /// A group differs, and is asked for. `holds` as it was told; empty if it is not known.
    pub(super) fn want(&mut self, group: u64, digest: GroupDigest, holds: &[BlockHash]) {
        let mut holds = holds.to_vec();
        holds.resize(self.geometry.group_extent(group).1 as usize, BlockHash::UNREADABLE);
        self.written.insert(group, digest);
        self.wanted.push_back(Wanted { group, digest, holds });
    }

    /// Digests came.
    ///
    /// # Errors
    /// When they are not those that come next.
    pub(super) fn digests(
        &mut self,
        first_group: u64,
        digests: Vec<GroupDigest>,
    ) -> Result<(), &'static str> {
        let expected = self.next_group + self.digests.len() as u64;
        if first_group != expected || digests.len() as u64 > self.asked_to - expected || digests.is_empty() {
            return Err("digests out of turn");
        }
        self.digests.extend(digests);
        Ok(())
    }

    /// Blocks came: whether they are of the group that is due.
    ///
    /// # Errors
    /// When they are not.
    pub(super) fn blocks(&mut self, seq: u64, run: &Run) -> Result<(), &'static str> {
        let turn = "blocks out of turn";
        let wanted = self.wanted.front_mut().filter(|wanted| wanted.group + 1 == seq).ok_or(turn)?;
        let skip = run.extent().first.checked_sub(self.geometry.group_extent(wanted.group).0).ok_or(turn)?;
        let slots = wanted.holds.iter_mut().skip(usize::try_from(skip).map_err(|_| turn)?);
        if (slots.len() as u64) < run.extent().count {
            return Err(turn);
        }
        slots.zip(0..run.extent().count).for_each(|(slot, at)| *slot = run.hash(at).content());
        Ok(())
    }

    /// All that differs of a group was sent.
    ///
    /// # Errors
    /// When it is not the one that is due, or is not what its digest promised.
    pub(super) fn sent(&mut self, group: u64) -> Result<(), &'static str> {
        match self.wanted.front() {
            Some(wanted) if wanted.group == group && group_digest(&wanted.holds) == wanted.digest => {
                self.wanted.pop_front();
                Ok(())
            }
            Some(wanted) if wanted.group == group => Err("other blocks than it had told the digest of"),
            _ => Err("the end of a group out of turn"),
        }
    }

    /// The connection is gone: what was asked for will not come, and is looked at again.
    pub(super) fn disconnect(&mut self) {
        if let Some(first) = self.wanted.front() {
            self.next_group = first.group;
        }
        self.wanted.clear();
        self.digests.clear();
        self.asked_to = self.next_group;
    }

    /// The groups of which blocks may have been written, in order, and what each must read back as.
    pub(super) fn written(&self) -> &BTreeMap<u64, GroupDigest> {
        &self.written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::hash_blocks;

    fn group_of(fill: u8) -> (Vec<BlockHash>, GroupDigest) {
        let hashes = hash_blocks(&vec![fill; 1 << 20], 4096);
        let digest = group_digest(&hashes);
        (hashes, digest)
    }

    fn run(group: u64, from: u64, count: u64, fill: u8) -> Run {
        let data = vec![fill; count as usize * 4096];
        Run::pack(group * 256 + from, hash_blocks(&data, 4096), &data)
    }

    fn plan(groups: u64) -> Plan {
        let mut plan = Plan::new(Geometry::new(groups << 20, 12).unwrap());
        assert_eq!(plan.step(), Some(Step::Ask { first_group: 0, count: groups as u32 }));
        plan
    }

    #[test]
    fn a_group_is_settled_by_the_blocks_that_differ_and_nothing_else() {
        let mut plan = plan(2);
        let (mut holds, _) = group_of(1);
        let (after, digest) = group_of(2);
        plan.digests(0, vec![digest; 2]).unwrap();
        assert_eq!(plan.step(), Some(Step::Look { group: 0, digest }));
        holds[10..].copy_from_slice(&after[10..]);
        plan.want(0, digest, &holds);
        assert_eq!(plan.step(), Some(Step::Look { group: 1, digest }), "it does not wait");
        plan.want(1, digest, &[]);
        assert!(plan.blocks(2, &run(1, 0, 10, 2)).is_err(), "not due");
        assert!(plan.blocks(1, &run(1, 0, 10, 2)).is_err() && plan.blocks(1, &run(0, 250, 10, 2)).is_err());
        plan.blocks(1, &run(0, 0, 9, 2)).unwrap();
        assert!(plan.sent(0).is_err(), "a block lacks");
        plan.blocks(1, &run(0, 9, 1, 2)).unwrap();
        assert!(plan.sent(1).is_err());
        plan.sent(0).unwrap();
        assert!(!plan.is_done());
        plan.blocks(2, &run(1, 0, 256, 2)).unwrap();
        plan.sent(1).unwrap();
        assert!(plan.is_done() && plan.sent(1).is_err());
        assert_eq!(plan.written().keys().copied().collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn after_a_cut_it_goes_on_at_the_first_group_that_is_not_settled() {
        let mut plan = plan(40);
        let (_, digest) = group_of(2);
        assert!(plan.digests(1, vec![digest]).is_err() && plan.digests(0, vec![digest; 41]).is_err());
        plan.digests(0, vec![digest; 40]).unwrap();
        let looked = std::iter::from_fn(|| match plan.step()? {
            Step::Look { group, digest } => {
                if group != 3 {
                    plan.want(group, digest, &[]);
                }
                Some(group)
            }
            Step::Ask { .. } => None,
        });
        assert_eq!(looked.count(), WANTED_MAX + 1, "no more at once");
        for group in 0..2 {
            plan.blocks(group + 1, &run(group, 0, 256, 2)).unwrap();
            plan.sent(group).unwrap();
        }
        plan.disconnect();
        assert!(plan.sent(2).is_err() && plan.digests(2, vec![digest]).is_err());
        assert_eq!(plan.step(), Some(Step::Ask { first_group: 2, count: 38 }));
        plan.digests(2, vec![digest; 38]).unwrap();
        assert_eq!(plan.step(), Some(Step::Look { group: 2, digest }));
        assert!(plan.written().contains_key(&2), "it may have been written before the cut");
    }
}
