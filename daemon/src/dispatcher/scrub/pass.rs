//! One pass: every disk, every checkpoint of it, every file of that.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::info;

use super::record::Pass;
use super::{Course, Pace, RETRY_EVERY, Scrub, lines, lock, tell};
use crate::checkpoint::chain::{self, Chain, Member};
use crate::clock::unix_ms;
use crate::ids::CheckpointId;
use crate::restore::verify::{verify_base_journal, verify_bytes, verify_delta, verify_open_journal};
use crate::restore::{BaseCheck, RestoreError};
use crate::store::layout::Paths;
use crate::store::{Damage, StoreError};

impl Scrub {
    /// Checks everything once, from where the last run was.
    pub(super) fn pass(&self, pace: Pace) -> Result<(), RestoreError> {
        let disks = self.disks()?;
        if !self.begin(pace, &disks)? {
            return self.wait(RETRY_EVERY.min(pace.every));
        }
        for owner in &disks {
            if lock(&self.record).pass.as_ref().is_some_and(|pass| pass.has_before_it(owner)) {
                self.disk(pace, owner)?;
            }
        }
        lock(&self.record).end_pass(&disks, unix_ms());
        self.save();
        info!("scrub: everything was checked; damaged checkpoints: {}", self.status().damaged);
        Ok(())
    }

    fn disks(&self) -> Result<Vec<Paths>, StoreError> {
        let mut disks = Vec::new();
        for agent in chain::agents(&self.dir)? {
            let of_agent = chain::disks(&self.dir, &agent)?;
            disks.extend(of_agent.into_iter().map(|disk| Paths::new(agent.clone(), disk)));
        }
        disks.sort_by(|a, b| (&a.agent, &a.disk).cmp(&(&b.agent, &b.disk)));
        Ok(disks)
    }

    /// Begins a pass, or goes on with the one that a restart broke off. False if there is nothing to check.
    pub(super) fn begin(&self, pace: Pace, disks: &[Paths]) -> Result<bool, RestoreError> {
        self.ahead_bytes.store(0, Ordering::Relaxed);
        if let Some(pass) = &mut lock(&self.record).pass {
            pass.course.settle(pace, unix_ms());
            return Ok(true);
        }
        let mut total_bytes = 0;
        for owner in disks {
            let chain = chain::load_readable(&self.dir, owner)?;
            // What breaks a chain at its first file is to be told, too.
            total_bytes += u64::from(chain.broken.is_some());
            total_bytes += verify_bytes(&self.dir, owner, &chain.members)?;
            self.wait(Duration::ZERO)?;
        }
        if total_bytes > 0 {
            let course = Course { began_unix_ms: unix_ms(), total_bytes, done_bytes: 0 };
            lock(&self.record).pass = Some(Pass { course, at: None });
            self.save();
        }
        Ok(total_bytes > 0)
    }

    fn disk(&self, pace: Pace, owner: &Paths) -> Result<(), RestoreError> {
        let chain = chain::load_readable(&self.dir, owner)?;
        lock(&self.record).keep(owner, &chain.ids().into_iter().collect::<BTreeSet<_>>());
        for (i, member) in chain.members.iter().enumerate() {
            if self.has_before_it(owner, member.checkpoint.id) {
                self.checkpoint(pace, owner, &chain, i)?;
            }
        }
        if let Some((damage, lost)) = &chain.broken
            && let Some(id) = lost.first().filter(|id| self.has_before_it(owner, **id))
            // A commit, or a person, may have changed it meanwhile.
            && chain::load_readable(&self.dir, owner)?.broken == chain.broken
        {
            self.all_of(owner, *id, damage);
        }
        Ok(())
    }

    /// Notes the only damage of a checkpoint of which nothing else can be looked at.
    fn all_of(&self, owner: &Paths, id: CheckpointId, damage: &Damage) {
        lock(&self.record).enter(owner, id);
        self.note(owner, id, std::slice::from_ref(damage));
        lock(&self.record).leave();
    }

    fn has_before_it(&self, owner: &Paths, id: CheckpointId) -> bool {
        lock(&self.record).pass.as_ref().is_some_and(|pass| pass.has_checkpoint_before_it(owner, id))
    }

    /// Checks the own files of one member of a chain; with the newest one, the open journal that builds on it.
    fn checkpoint(&self, pace: Pace, owner: &Paths, chain: &Chain, at: usize) -> Result<(), RestoreError> {
        let Some(member) = chain.members.get(at) else { return Ok(()) };
        let from_group = lock(&self.record).enter(owner, member.checkpoint.id);
        if at == 0 {
            self.base(pace, owner, member, from_group)?;
        } else {
            let found = verify_delta(&self.dir, owner, member, &mut |bytes| self.tick(pace, bytes));
            self.found(owner, member, found?)?;
        }
        if at + 1 == chain.members.len() && chain.broken.is_none() {
            let open = verify_open_journal(&self.dir, owner, chain)?;
            self.found(owner, member, open)?;
        }
        self.came_to(None);
        let healed = lock(&self.record).leave();
        tell(owner, member.checkpoint.id, &[], healed);
        self.save_if_due();
        Ok(())
    }

    fn base(&self, pace: Pace, owner: &Paths, member: &Member, from_group: u64) -> Result<(), RestoreError> {
        let opened =
            BaseCheck::open(&self.dir, owner, member, from_group, &mut |bytes| self.wait(pace.rest(bytes)));
        match opened {
            Err(error) => self.found(owner, member, error.into_damage()?)?,
            Ok((mut check, wrong_size)) => {
                self.found(owner, member, wrong_size.into_iter().collect())?;
                while !check.is_done() {
                    let found = check.groups(1, &mut |bytes| self.tick(pace, bytes))?;
                    self.found(owner, member, found)?;
                    self.came_to(Some(check.next_group()));
                    self.save_if_due();
                }
                self.found(owner, member, check.finish().into_iter().collect())?;
            }
        }
        let journal = verify_base_journal(&self.dir, owner, member)?;
        self.found(owner, member, journal)
    }

    /// Notes damage of a checkpoint, if it is still the same one.
    fn found(&self, owner: &Paths, member: &Member, damage: Vec<Damage>) -> Result<(), RestoreError> {
        if damage.is_empty() {
            return Ok(());
        }
        let id = member.checkpoint.id;
        let now = chain::load_readable(&self.dir, owner)?;
        if now.members.iter().any(|m| m.link == member.link) {
            self.note(owner, id, &damage);
        } else if let Some((damage, _)) = now.broken.filter(|(_, lost)| lost.contains(&id)) {
            self.note(owner, id, &[damage]);
        }
        Ok(())
    }

    fn note(&self, owner: &Paths, id: CheckpointId, damage: &[Damage]) {
        let news = lock(&self.record).found(lines(damage));
        if !news.is_empty() {
            tell(owner, id, &news, false);
            self.save();
        }
    }
}
