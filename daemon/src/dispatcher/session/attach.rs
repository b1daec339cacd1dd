//! How a disk attaches: whether it may, and what it has to do.

use tracing::info;

use super::{Admission, Attachment, DiskSession, Event, SessionError, WINDOW_BYTES};
use crate::dispatcher::change::{self, Known};
use crate::dispatcher::reattach::{self, Reason};
use crate::dispatcher::room;
use crate::geometry::Geometry;
use crate::status::Newest;
use crate::store::handle::Dir;
use crate::tracker::{Claim, Gap};
use crate::wire::Endpoint;
use crate::wire::message::{DiskDown, Plan, UNREADABLE_MAX_EXTENTS};

impl DiskSession {
    pub(super) fn attach(
        &mut self,
        device: String,
        geometry: Geometry,
        claim: Claim,
    ) -> Result<Vec<Event>, SessionError> {
        check_device_name(&device)?;
        self.need_reserve()?;
        let resized = self.resize(geometry)?;
        let comparing = self.comparing.filter(|_| !resized);
        let store = self.store()?;
        store.set_epoch(claim.epoch);
        let copy = store.copy().filter(|copy| copy.geometry == geometry);
        let (plan, reason) =
            reattach::plan(claim, geometry, store.newest(), copy.as_ref().map(|copy| copy.epoch));
        let mut resumes = true;
        match plan {
            Plan::Continue => {}
            Plan::Copy { compare } => {
                let begun = copy.is_some();
                self.need_room(if begun { 0 } else { geometry.size_bytes() })?;
                let store = self.store()?;
                if !begun {
                    store.begin_copy(geometry, &device, claim.epoch)?;
                }
                resumes = !resized && (!compare || comparing == Some(claim.epoch));
            }
            // What came of the round before stays: the compare is with all that is here.
            Plan::Compare => {
                self.need_room(0)?;
                resumes = comparing == Some(claim.epoch);
            }
        }
        let gap = reason.map(|reason| match reason {
            Reason::Gap(gap) => (gap, gap.to_string()),
            Reason::OtherHistory => {
                (Gap::NewTracker, "the agent's last checkpoint is not the newest one here".to_owned())
            }
        });
        let resumes = resumes && !self.distrust;
        let store = self.store()?;
        let newest = store.newest().map(Newest::from);
        let next_seq = store.last_seq() + 1;
        let unreadable = store.unreadable()?.extents(u64::MAX).take(UNREADABLE_MAX_EXTENTS).collect();
        self.comparing = comparing.filter(|_| gap.is_some());
        let scanning = plan != Plan::Continue;
        let acked = [next_seq - 1; 2];
        self.attachment = Some(Attachment {
            geometry,
            device,
            epoch: claim.epoch,
            gap,
            scanning,
            scanned_groups: 0,
            received: acked,
            acked,
        });
        info!(AGENT = %self.agent, DISK = %self.disk, "attached: {}", describe(plan));
        let attached = DiskDown::Attached {
            plan,
            instance: self.instance,
            resumes,
            newest,
            next_seq,
            window_bytes: WINDOW_BYTES,
            unreadable,
        };
        let mut events = vec![Event::Answer(Endpoint::Live, attached)];
        if matches!(plan, Plan::Copy { .. }) {
            let space = Dir::new(self.files.clone()).space()?;
            events.extend(room::tight(space, self.needed_bytes()).map(Event::Tight));
        }
        events.extend((!scanning).then_some(Event::Ready { scanned: false }));
        self.distrust = false;
        Ok(events)
    }

    /// Lets the disk go on with the size it has now, if it may; true if that is another than so far.
    fn resize(&mut self, geometry: Geometry) -> Result<bool, SessionError> {
        let Admission { replaces, accepted } = self.admission.clone();
        let (agent, disk) = (self.agent.clone(), self.disk.clone());
        let store = self.store()?;
        // What came on a connection that broke must be durable before the agent is told it is here.
        store.sync()?;
        let committed = store.newest().map(|newest| newest.geometry);
        let copied = store.copy().map(|copy| copy.geometry);
        let known = Known { committed, copied, replaces: replaces.as_ref(), accepted };
        change::check(&agent, &disk, geometry, known).map_err(SessionError::Lasting)?;
        let Some(before) = committed.or(copied).filter(|before| *before != geometry) else {
            return Ok(committed.is_some() && store.resize(geometry)?);
        };
        let (old, new) = (before.size_bytes(), geometry.size_bytes());
        info!(AGENT = %agent, DISK = %disk, "the disk has {new} bytes now, {old} are stored of it");
        Ok(committed.is_none() || store.resize(geometry)?)
    }
}

pub(in crate::dispatcher) fn check_device_name(device: &str) -> Result<(), SessionError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '!');
    if device.is_empty() || device.len() > 64 || !device.chars().all(plain) {
        return Err(SessionError::Protocol("a device name that is none".to_owned()));
    }
    Ok(())
}

fn describe(plan: Plan) -> &'static str {
    match plan {
        Plan::Continue => "goes on from the last checkpoint",
        Plan::Copy { compare: false } => "full copy",
        Plan::Copy { compare: true } => "full copy, what is there already is compared",
        Plan::Compare => "the whole disk is compared",
    }
}
