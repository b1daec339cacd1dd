//! What a disk has to do when its agent attaches. Pure.
//!
//! Both sides name the last commit they share. Only if the tracker's claim reaches back to exactly the newest
//! checkpoint, in the life of the tracker that made it, are the pending blocks enough. Everything else is a gap
//! and is healed by a compare, never by trusting and never by sending the whole disk again.

use crate::checkpoint::Checkpoint;
use crate::geometry::Geometry;
use crate::ids::Epoch;
use crate::tracker::{Claim, Gap};
use crate::wire::message::{Plan, is_fresh};

/// Why a compare is needed, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The tracker said so.
    Gap(Gap),
    /// The agent's last commit is not the newest checkpoint here: another machine with the same key, an agent from
    /// an old image, or a dispatcher from an old copy of its data directory.
    OtherHistory,
}

/// The plan for a disk of this size, and why if it is a compare. `copy` is the life in which a copy of this size began.
pub fn plan(
    claim: Claim,
    geometry: Geometry,
    newest: Option<&Checkpoint>,
    copy: Option<Epoch>,
) -> (Plan, Option<Reason>) {
    let gap = claim.gap.map_or(Reason::OtherHistory, Reason::Gap);
    let Some(newest) = newest else {
        // A copy that began in this tracker's life and had no doubt since only lacks what is missing.
        let same_life =
            copy.is_none_or(|epoch| epoch == claim.epoch) && is_fresh(claim.gap) && claim.base.is_none();
        let plan = Plan::Copy { compare: !same_life };
        return (plan, (!same_life).then_some(gap));
    };
    if newest.geometry != geometry {
        return (Plan::Compare, Some(Reason::Gap(Gap::Resized)));
    }
    let same_life = newest.epoch == claim.epoch;
    // The commit was made, but its acknowledgement was lost: pending reaches back further than needed. The first
    // commit of a life also healed the doubt that every life begins with.
    let unheard = claim.base == newest.parent
        && (claim.gap.is_none() || (is_fresh(claim.gap) && newest.parent.is_none()));
    let heard = claim.base == Some(newest.id) && claim.gap.is_none();
    if same_life && (heard || unheard) { (Plan::Continue, None) } else { (Plan::Compare, Some(gap)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Consistency;
    use crate::ids::CheckpointId;

    const LIFE: Epoch = Epoch([1; 16]);
    const OTHER: Epoch = Epoch([2; 16]);

    fn id(n: i64) -> CheckpointId {
        CheckpointId::next(n, None)
    }

    fn size(size_bytes: u64) -> Geometry {
        Geometry::new(size_bytes, 12).unwrap()
    }

    /// The plan for a disk that has the size of its newest checkpoint.
    fn plan(claim: Claim, newest: Option<&Checkpoint>, copy: Option<Epoch>) -> (Plan, Option<Reason>) {
        super::plan(claim, size(1 << 20), newest, copy)
    }

    fn checkpoint(n: i64, parent: Option<i64>) -> Checkpoint {
        Checkpoint {
            id: id(n),
            agent: "a".parse().unwrap(),
            disk: "d".parse().unwrap(),
            device: "sda".to_owned(),
            geometry: size(1 << 20),
            parent: parent.map(id),
            consistency: Consistency::Filesystem,
            time_unix_ms: 0,
            freeze_ms: 0,
            unreadable_blocks: 0,
            epoch: LIFE,
            note: String::new(),
        }
    }

    fn claim(epoch: Epoch, base: Option<i64>, gap: Option<Gap>) -> Claim {
        Claim { epoch, base: base.map(id), gap }
    }

    #[test]
    fn pending_blocks_are_enough_only_with_a_shared_commit_in_one_life() {
        let newest = checkpoint(9, Some(8));
        let on = |c| plan(c, Some(&newest), None).0;
        assert_eq!(on(claim(LIFE, Some(9), None)), Plan::Continue);
        assert_eq!(on(claim(LIFE, Some(8), None)), Plan::Continue, "a lost acknowledgement");
        assert_eq!(on(claim(LIFE, Some(7), None)), Plan::Compare, "an old copy of the agent");
        assert_eq!(on(claim(LIFE, Some(10), None)), Plan::Compare, "an old copy of the dispatcher's data");
        assert_eq!(on(claim(OTHER, Some(9), None)), Plan::Compare, "a clone");
        assert_eq!(on(claim(LIFE, None, None)), Plan::Compare);
        for gap in [Gap::NewTracker, Gap::Passthrough, Gap::Audit] {
            assert_eq!(on(claim(LIFE, Some(9), Some(gap))), Plan::Compare, "{gap}");
            assert_eq!(on(claim(LIFE, Some(8), Some(gap))), Plan::Compare, "{gap}");
        }
    }

    #[test]
    fn a_disk_of_another_size_is_compared_whatever_its_tracker_says() {
        let newest = checkpoint(9, Some(8));
        let resized = (Plan::Compare, Some(Reason::Gap(Gap::Resized)));
        for now in [(1 << 20) - 512, (1 << 20) + 512] {
            for claim in [claim(LIFE, Some(9), None), claim(OTHER, None, Some(Gap::NewTracker))] {
                assert_eq!(super::plan(claim, size(now), Some(&newest), None), resized);
            }
        }
    }

    #[test]
    fn the_lost_acknowledgement_of_the_first_commit_needs_no_compare() {
        let newest = checkpoint(9, None);
        let on = |c| plan(c, Some(&newest), None).0;
        assert_eq!(on(claim(LIFE, None, Some(Gap::NewTracker))), Plan::Continue);
        assert_eq!(on(claim(LIFE, None, Some(Gap::Audit))), Plan::Compare);
        assert_eq!(on(claim(OTHER, None, Some(Gap::NewTracker))), Plan::Compare);
    }

    #[test]
    fn a_copy_goes_on_and_compares_what_is_there_only_after_a_gap() {
        let fresh = claim(LIFE, None, Some(Gap::NewTracker));
        assert_eq!(plan(fresh, None, None).0, Plan::Copy { compare: false });
        assert_eq!(plan(fresh, None, Some(LIFE)).0, Plan::Copy { compare: false });
        assert_eq!(plan(fresh, None, Some(OTHER)).0, Plan::Copy { compare: true });
        assert_eq!(
            plan(claim(LIFE, None, Some(Gap::Audit)), None, Some(LIFE)).0,
            Plan::Copy { compare: true }
        );
        assert_eq!(plan(claim(LIFE, Some(3), None), None, None).0, Plan::Copy { compare: true });
    }
}
