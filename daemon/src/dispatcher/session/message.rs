//! What each of an agent's messages about its disk does.

use tracing::{info, warn};

use super::{DiskSession, Event, SYNC_EVERY_BYTES, SessionError, not_attached};
use crate::bitmap::Extent;
use crate::geometry::Geometry;
use crate::ids::CheckpointId;
use crate::message_id::GAP_FOUND;
use crate::store::StoreError;
use crate::store::disk_store::{DiskStore, Seal};
use crate::tracker::Gap;
use crate::wire::Endpoint;
use crate::wire::message::{DIGESTS_MAX, DiskDown, DiskUp, clean_text};

impl DiskSession {
    pub(super) fn message(
        &mut self,
        endpoint: Endpoint,
        message: DiskUp,
    ) -> Result<Vec<Event>, SessionError> {
        match (endpoint, message) {
            (Endpoint::Live, DiskUp::Changed(extents)) => self.changed(&extents),
            (Endpoint::Live, DiskUp::ScanBegins) => self.scan_begins(),
            (Endpoint::Live, DiskUp::Seal { id, consistency, time_unix_ms, freeze_ms, note }) => {
                let attachment = self.attachment.as_ref().ok_or_else(not_attached)?;
                if attachment.scanning {
                    let text = "a seal while the disk is being copied or compared";
                    return Err(SessionError::Protocol(text.to_owned()));
                }
                let (device, geometry, epoch) =
                    (attachment.device.clone(), attachment.geometry, attachment.epoch);
                let note = clean_text(note);
                self.commit(Seal { id, device, geometry, consistency, time_unix_ms, freeze_ms, epoch, note })
            }
            (Endpoint::Live, DiskUp::SyncFailed { reason, paused }) => {
                Ok(vec![Event::SyncFailed { reason: clean_text(reason), paused }])
            }
            (Endpoint::Snapshot, DiskUp::WantDigests { first_group, count }) => {
                self.digests(first_group, count)
            }
            (Endpoint::Snapshot, DiskUp::WantHashes { group }) => self.hashes(group),
            (Endpoint::Snapshot, DiskUp::Scanned { groups }) => {
                let attachment = self.attachment.as_mut().ok_or_else(not_attached)?;
                attachment.scanned_groups = groups.min(attachment.geometry.groups());
                Ok(Vec::new())
            }
            (Endpoint::Snapshot, DiskUp::ScanDone) => self.scan_done(),
            (endpoint, _) => {
                Err(SessionError::Protocol(format!("a message that does not belong on {endpoint}")))
            }
        }
    }

    fn changed(&mut self, extents: &[Extent]) -> Result<Vec<Event>, SessionError> {
        let geometry = self.attachment.as_ref().ok_or_else(not_attached)?.geometry;
        if extents.iter().any(|e| e.count == 0 || e.end() > geometry.blocks()) {
            return Err(SessionError::Protocol("changed blocks that are not on the disk".to_owned()));
        }
        self.need_reserve()?;
        let store = self.store.as_mut().ok_or_else(not_attached)?;
        store.put_changed(extents)?;
        if store.unsynced_bytes() >= SYNC_EVERY_BYTES { self.flush() } else { Ok(Vec::new()) }
    }

    /// The size of the disk that is being copied or compared, and what is stored of it.
    fn scanned(&mut self) -> Result<(Geometry, &mut DiskStore), SessionError> {
        let attachment = self.attachment.as_ref().ok_or_else(not_attached)?;
        if !attachment.scanning {
            return Err(SessionError::Protocol("hashes are only asked for in a copy or compare".to_owned()));
        }
        Ok((attachment.geometry, self.store.as_mut().ok_or_else(not_attached)?))
    }

    fn digests(&mut self, first_group: u64, count: u32) -> Result<Vec<Event>, SessionError> {
        let (geometry, store) = self.scanned()?;
        if count > DIGESTS_MAX || first_group.saturating_add(u64::from(count)) > geometry.groups() {
            return Err(SessionError::Protocol("digests of groups that are not on the disk".to_owned()));
        }
        let digests = store.digests(first_group, u64::from(count))?;
        Ok(vec![Event::Answer(Endpoint::Snapshot, DiskDown::Digests { first_group, digests })])
    }

    fn hashes(&mut self, group: u64) -> Result<Vec<Event>, SessionError> {
        let (geometry, store) = self.scanned()?;
        if group >= geometry.groups() {
            return Err(SessionError::Protocol("hashes of a group that is not on the disk".to_owned()));
        }
        let hashes = store.hashes(group)?;
        Ok(vec![Event::Answer(Endpoint::Snapshot, DiskDown::Hashes { group, hashes })])
    }

    fn scan_begins(&mut self) -> Result<Vec<Event>, SessionError> {
        let attachment = self.attachment.as_mut().ok_or_else(not_attached)?;
        let Some((gap, why)) = attachment.gap.take() else {
            return Err(SessionError::Protocol("a compare that was not asked for".to_owned()));
        };
        self.store.as_mut().ok_or_else(not_attached)?.put_gap(gap)?;
        self.comparing = Some(attachment.epoch);
        if gap == Gap::Ordered {
            info!(AGENT = %self.agent, DISK = %self.disk, "the whole disk is compared, as ordered");
        } else {
            warn!(
                MESSAGE_ID = GAP_FOUND, AGENT = %self.agent, DISK = %self.disk,
                "gap: {why}; the whole disk is compared"
            );
        }
        Ok(Vec::new())
    }

    fn scan_done(&mut self) -> Result<Vec<Event>, SessionError> {
        let attachment = self.attachment.as_mut().ok_or_else(not_attached)?;
        let was = std::mem::replace(&mut attachment.scanning, false);
        let mut events = self.flush()?;
        if was {
            info!(AGENT = %self.agent, DISK = %self.disk, "the whole disk was read");
        }
        events.push(Event::Answer(Endpoint::Snapshot, DiskDown::ScanClosed));
        events.extend(was.then_some(Event::Ready { scanned: true }));
        Ok(events)
    }

    fn commit(&mut self, seal: Seal) -> Result<Vec<Event>, SessionError> {
        let id: CheckpointId = seal.id;
        let mut events = self.flush()?;
        let store = self.store.as_mut().ok_or_else(not_attached)?;
        let committed = store.commit(seal);
        self.distrust |= matches!(committed, Err(StoreError::Refused(_)));
        let checkpoint = committed?;
        self.comparing = None;
        events.push(Event::Answer(Endpoint::Live, DiskDown::Committed { id }));
        events.push(Event::Committed(Box::new(checkpoint)));
        Ok(events)
    }
}
