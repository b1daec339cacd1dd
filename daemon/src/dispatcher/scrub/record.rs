//! What is known of the passes and of damage, and is kept over restarts (`docs/FORMAT.md`, "`scrub`").
//!
//! What must never happen here: damage that is forgotten before a later look found the place sound, or gone.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::schedule::Course;
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::store::layout::Paths;

/// The most lines that are kept of one checkpoint's files; a verify lists all.
const LINES_MAX: usize = 32;

/// Everything that is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// The pass under way.
    pub(crate) pass: Option<Pass>,
    /// The last one that came to its end.
    pub(crate) last: Option<LastPass>,
    /// What is damaged, in the order of agents, disks and checkpoints.
    damage: Vec<Damaged>,
}

/// A pass under way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pass {
    /// How far it is.
    pub(crate) course: Course,
    /// What is checked next; `None` at the beginning.
    pub(crate) at: Option<Position>,
}

/// A checkpoint whose own files are being checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Position {
    /// Whose.
    pub(crate) agent: AgentId,
    /// Of which disk.
    pub(crate) disk: DiskId,
    /// Which.
    pub(crate) checkpoint: CheckpointId,
    /// Groups of a base image that were checked.
    pub(crate) groups: u64,
    /// What was found damaged of it in this pass.
    found: Vec<String>,
}

/// A pass that came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastPass {
    /// When it began, in milliseconds since 1970.
    pub began_unix_ms: u64,
    /// When it ended, in milliseconds since 1970.
    pub ended_unix_ms: u64,
}

/// A checkpoint whose own files are damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Damaged {
    agent: AgentId,
    disk: DiskId,
    checkpoint: CheckpointId,
    lines: Vec<String>,
}

impl Damaged {
    fn is_of(&self, owner: &Paths) -> bool {
        (&self.agent, &self.disk) == (&owner.agent, &owner.disk)
    }
}

impl Position {
    fn is_of(&self, owner: &Paths) -> bool {
        (&self.agent, &self.disk) == (&owner.agent, &owner.disk)
    }
}

impl Pass {
    /// Whether this pass has not come to a disk's end yet. Disks are checked in the order of their agents and ids.
    pub(crate) fn has_before_it(&self, owner: &Paths) -> bool {
        self.at.as_ref().is_none_or(|at| (&owner.agent, &owner.disk) >= (&at.agent, &at.disk))
    }

    /// Whether this pass has not come to the end of a checkpoint of such a disk yet.
    pub(crate) fn has_checkpoint_before_it(&self, owner: &Paths, id: CheckpointId) -> bool {
        self.at.as_ref().filter(|at| at.is_of(owner)).is_none_or(|at| id >= at.checkpoint)
    }
}

impl Record {
    /// Comes to a checkpoint; gives how many groups of it were checked before a restart.
    pub(crate) fn enter(&mut self, owner: &Paths, id: CheckpointId) -> u64 {
        let Some(pass) = &mut self.pass else { return 0 };
        if let Some(at) = pass.at.as_ref().filter(|at| at.is_of(owner) && at.checkpoint == id) {
            return at.groups;
        }
        let (agent, disk) = (owner.agent.clone(), owner.disk.clone());
        pass.at = Some(Position { agent, disk, checkpoint: id, groups: 0, found: Vec::new() });
        0
    }

    /// Notes damage of the checkpoint being checked; gives what is news. What was known before stays known.
    pub(crate) fn found(&mut self, lines: Vec<String>) -> Vec<String> {
        let Some(at) = self.pass.as_mut().and_then(|pass| pass.at.as_mut()) else { return Vec::new() };
        for line in lines {
            if at.found.len() < LINES_MAX && !at.found.contains(&line) {
                at.found.push(line);
            }
        }
        let (owner, id) = (Paths::new(at.agent.clone(), at.disk.clone()), at.checkpoint);
        let mut all = at.found.clone();
        let known = self.known(&owner, id);
        let news = all.iter().filter(|line| !known.contains(line)).cloned().collect();
        let before: Vec<_> = known.into_iter().filter(|line| !all.contains(line)).collect();
        all.extend(before);
        self.put(&owner, id, all);
        news
    }

    /// The files of the checkpoint being checked were all looked at: what was not found again is put right. Gives whether
    /// that makes it sound.
    pub(crate) fn leave(&mut self) -> bool {
        let Some(at) = self.pass.as_mut().and_then(|pass| pass.at.as_mut()) else { return false };
        let (owner, id) = (Paths::new(at.agent.clone(), at.disk.clone()), at.checkpoint);
        let found = std::mem::take(&mut at.found);
        self.look(&owner, id, found).1
    }

    /// Somebody looked at all of a checkpoint's own files, and this is what is damaged of them. Gives what is news, and
    /// whether it was damaged and is sound.
    pub(crate) fn look(
        &mut self,
        owner: &Paths,
        id: CheckpointId,
        mut lines: Vec<String>,
    ) -> (Vec<String>, bool) {
        lines.truncate(LINES_MAX);
        if let Some(at) = self.pass.as_mut().and_then(|pass| pass.at.as_mut()).filter(|at| at.is_of(owner))
            && at.checkpoint == id
        {
            at.found = lines.clone();
        }
        let known = self.known(owner, id);
        let news = lines.iter().filter(|line| !known.contains(line)).cloned().collect();
        let healed = lines.is_empty() && !known.is_empty();
        self.put(owner, id, lines);
        (news, healed)
    }

    fn known(&self, owner: &Paths, id: CheckpointId) -> Vec<String> {
        let known = self.damage.iter().find(|of| of.is_of(owner) && of.checkpoint == id);
        known.map(|of| of.lines.clone()).unwrap_or_default()
    }

    fn put(&mut self, owner: &Paths, id: CheckpointId, mut lines: Vec<String>) {
        lines.truncate(LINES_MAX);
        self.damage.retain(|of| !of.is_of(owner) || of.checkpoint != id);
        if !lines.is_empty() {
            let (agent, disk) = (owner.agent.clone(), owner.disk.clone());
            self.damage.push(Damaged { agent, disk, checkpoint: id, lines });
            self.damage
                .sort_by(|a, b| (&a.agent, &a.disk, a.checkpoint).cmp(&(&b.agent, &b.disk, b.checkpoint)));
        }
    }

    /// Forgets damage of checkpoints that a disk has no more.
    pub(crate) fn keep(&mut self, owner: &Paths, ids: &BTreeSet<CheckpointId>) {
        self.damage.retain(|of| !of.is_of(owner) || ids.contains(&of.checkpoint));
    }

    /// Ends the pass, which has seen these disks; damage of others is forgotten with them.
    pub(crate) fn end_pass(&mut self, disks: &[Paths], now_unix_ms: u64) {
        self.damage.retain(|of| disks.iter().any(|owner| of.is_of(owner)));
        if let Some(pass) = self.pass.take() {
            let began_unix_ms = pass.course.began_unix_ms;
            self.last = Some(LastPass { began_unix_ms, ended_unix_ms: now_unix_ms });
        }
    }

    /// All that is known to be damaged, by disk.
    pub(crate) fn damage(&self) -> impl Iterator<Item = (&AgentId, &DiskId, &[String])> {
        self.damage.iter().map(|of| (&of.agent, &of.disk, &*of.lines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(agent: &str) -> Paths {
        Paths::new(agent.parse().unwrap(), "sda".parse().unwrap())
    }

    fn id(n: i64) -> CheckpointId {
        CheckpointId::next(1_795_293_296 + n, None)
    }

    fn lines(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn passing() -> Record {
        Record { pass: Some(Pass::default()), ..Record::default() }
    }

    fn known(record: &Record) -> Vec<String> {
        record.damage().flat_map(|(_, _, lines)| lines.to_vec()).collect()
    }

    #[test]
    fn damage_stays_until_a_whole_look_does_not_find_it_again() {
        let (a, mut record) = (owner("a"), passing());
        assert_eq!(record.enter(&a, id(0)), 0);
        assert_eq!(record.found(lines(&["x", "y"])), ["x", "y"]);
        assert_eq!(record.found(lines(&["x"])), [""; 0], "no news");
        assert!(!record.leave());
        assert_eq!(known(&record), ["x", "y"]);
        // The next pass: nothing is forgotten before the end, then what was not found again.
        record.end_pass(std::slice::from_ref(&a), 5);
        record.pass = Some(Pass::default());
        record.enter(&a, id(0));
        assert_eq!(known(&record), ["x", "y"]);
        assert_eq!(record.found(lines(&["y"])), [""; 0]);
        assert!(!record.leave());
        assert_eq!(known(&record), ["y"]);
        record.enter(&a, id(1));
        record.enter(&a, id(0));
        assert!(record.leave(), "it is sound again, which is worth a word");
        assert_eq!(known(&record), [""; 0]);
    }

    #[test]
    fn a_restart_in_a_base_forgets_nothing_of_what_was_found_before() {
        let (a, mut record) = (owner("a"), passing());
        record.enter(&a, id(0));
        record.found(lines(&["x"]));
        record.pass.as_mut().unwrap().at.as_mut().unwrap().groups = 7;
        let text = serde_json::to_string(&record).unwrap();
        let mut record: Record = serde_json::from_str(&text).unwrap();
        assert_eq!(record.enter(&a, id(0)), 7);
        record.leave();
        assert_eq!(known(&record), ["x"]);
    }

    #[test]
    fn a_verify_that_finds_a_place_sound_ends_its_damage_also_within_a_pass() {
        let (a, mut record) = (owner("a"), passing());
        record.enter(&a, id(0));
        record.found(lines(&["x"]));
        assert_eq!(record.look(&a, id(0), Vec::new()), (Vec::new(), true));
        record.leave();
        assert_eq!(known(&record), [""; 0]);
        assert_eq!(record.look(&a, id(1), lines(&["z"])), (lines(&["z"]), false));
        assert_eq!(record.look(&owner("b"), id(1), Vec::new()), (Vec::new(), false), "another disk's");
        assert_eq!(known(&record), ["z"]);
    }

    #[test]
    fn what_is_gone_is_forgotten() {
        let (a, b, mut record) = (owner("a"), owner("b"), passing());
        for owner in [&a, &b] {
            record.look(owner, id(0), lines(&["x"]));
            record.look(owner, id(1), lines(&["y"]));
        }
        record.keep(&a, &BTreeSet::from([id(1)]));
        assert_eq!(known(&record), ["y", "x", "y"]);
        record.end_pass(&[a], 9);
        assert_eq!(known(&record), ["y"]);
        assert_eq!(record.last, Some(LastPass { began_unix_ms: 0, ended_unix_ms: 9 }));
    }

    #[test]
    fn a_pass_goes_on_where_it_was_also_if_that_is_gone() {
        let mut record = passing();
        record.enter(&owner("b"), id(3));
        let pass = record.pass.unwrap();
        assert_eq!(["a", "b", "c"].map(|agent| pass.has_before_it(&owner(agent))), [false, true, true]);
        assert_eq!([2, 3, 4].map(|n| pass.has_checkpoint_before_it(&owner("b"), id(n))), [false, true, true]);
        assert!(pass.has_checkpoint_before_it(&owner("c"), id(0)));
    }

    #[test]
    fn no_disk_however_damaged_fills_the_record() {
        let mut record = passing();
        record.enter(&owner("a"), id(0));
        for n in 0..1000 {
            record.found(vec![format!("block {n}")]);
        }
        assert_eq!(known(&record).len(), LINES_MAX);
        record.leave();
        assert_eq!(known(&record).len(), LINES_MAX);
        // In the next pass, another damage behind a full list of old ones is told, and once.
        record.end_pass(&[owner("a")], 5);
        record.pass = Some(Pass::default());
        record.enter(&owner("a"), id(0));
        assert_eq!(record.found(lines(&["x"])), ["x"]);
        assert_eq!(record.found(lines(&["x"])), [""; 0]);
    }
}
