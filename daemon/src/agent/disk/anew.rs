//! How a disk comes to an end for now, and begins anew with the next connections.

use tracing::{error, warn};

use super::{Disk, FREEZE_BUDGET_BYTES, Worker, lost, offer};
use crate::agent::action::Input;
use crate::agent::session::DiskSession;
use crate::message_id::DISK_GIVEN_UP;
use crate::tracker::Claim;
use crate::watchdog::SLOW_DISK_MAX;

impl Worker {
    /// Closes the connections; what is pinned in the kernel tracks on, and the next connections begin anew.
    pub(super) fn fail(&mut self, reason: String) {
        let name = &self.disk.device.name;
        // It is tried again and again, and said once.
        if !self.failed || self.last_error.as_ref() != Some(&reason) {
            error!(
                MESSAGE_ID = DISK_GIVEN_UP, AGENT = %self.shared.agent, DISK = %self.disk.id,
                "{name} is not replicated: {reason}"
            );
        }
        (self.failed, self.last_error) = (true, Some(reason));
        self.link = None;
        self.session.handle(Input::LinkDown);
        self.show();
    }

    /// What the tracker claims, of the disk as it is now: one that was given another size is opened anew.
    pub(super) fn claim(&mut self) -> Result<Claim, String> {
        // The claim comes first: for what changes behind it, the tracker raises a gap.
        if let Ok(claim) = self.disk.tracker.claim()
            && self.disk.is_as_opened()
        {
            return Ok(claim);
        }
        self.pulse.allow(SLOW_DISK_MAX);
        let config = self.config.borrow().clone();
        self.disk.reopen(&config).map_err(|e| e.to_string())?;
        let Disk { device, geometry, .. } = &self.disk;
        let (agent, disk, size_bytes) = (&self.shared.agent, &self.disk.id, geometry.size_bytes());
        warn!(AGENT = %agent, DISK = %disk, "{} has {size_bytes} bytes now and is tracked anew", device.name);
        self.session = DiskSession::new(*geometry, device.name.clone(), FREEZE_BUDGET_BYTES);
        self.session.handle(Input::Paused(self.paused));
        self.offer.send_replace(offer(&self.disk));
        let mut status = self.shown.status();
        (status.device, status.size_bytes) = (device.name.clone(), size_bytes);
        drop(status);
        self.disk.tracker.claim().map_err(|e| lost(&e))
    }
}
