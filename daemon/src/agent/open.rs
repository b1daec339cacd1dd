//! Opens a disk to be replicated: the device, its reader and its tracker, all for the size it has now.
//!
//! What must never happen here: another disk opened in the place of the one whose thread asks.

use std::path::Path;

use tracing::{info, warn};

use super::disk::Disk;
use super::disk_id::disk_id;
use crate::config::AgentConfig;
use crate::device::{BlockDevice, DeviceError};
use crate::geometry::{Geometry, GeometryError};
use crate::ids::DiskId;
use crate::message_id::GAP_FOUND;
use crate::reader::{DirectReader, ReadError};
use crate::tracker::bpf::BpfTracker;
use crate::tracker::pins::pin_path;
use crate::tracker::{Closed, Gap, Tracker, TrackerError};

/// A disk that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such disk.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It has a size that is not possible.
    #[error("{0}: {1}")]
    Geometry(String, GeometryError),
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It cannot be tracked.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// Another disk is there now.
    #[error(
        "{path} is another disk now, {found}, and no longer {expected}: restart the agent to replicate it"
    )]
    Another {
        /// Where the disk was.
        path: String,
        /// The disk's id.
        expected: DiskId,
        /// That of the disk which is there.
        found: DiskId,
    },
}

impl Disk {
    /// Opens the disk behind a path.
    ///
    /// # Errors
    /// When there is none, or it cannot be read or tracked.
    pub fn open(config: &AgentConfig, path: &Path) -> Result<Self, OpenError> {
        let device = BlockDevice::open(path)?;
        let id = disk_id(&device.name, &device.path);
        Self::with(config, path, device, id)
    }

    /// Opens the same disk again, whatever size it has now.
    ///
    /// # Errors
    /// As [`Self::open`], and when another disk is there now. Nothing is tracked by this process then; what is pinned in
    /// the kernel tracks on.
    pub fn reopen(&mut self, config: &AgentConfig) -> Result<(), OpenError> {
        // Before the next one: it holds the lock of the pins.
        self.tracker = Box::new(Closed);
        let device = BlockDevice::open(&self.path)?;
        let found = disk_id(&device.name, &device.path);
        if found != self.id {
            let (path, expected) = (self.path.display().to_string(), self.id.clone());
            return Err(OpenError::Another { path, expected, found });
        }
        *self = Self::with(config, &self.path, device, found)?;
        Ok(())
    }

    fn with(config: &AgentConfig, path: &Path, device: BlockDevice, id: DiskId) -> Result<Self, OpenError> {
        let geometry = Geometry::new(device.size_bytes, config.block_shift)
            .map_err(|e| OpenError::Geometry(path.display().to_string(), e))?;
        let reader = DirectReader::open(&device.path, geometry)?;
        let mut tracker = BpfTracker::open(&device, config.block_shift, &pin_path(&config.id, &id))?;
        let (agent, name) = (&config.id, &device.name);
        match tracker.claim()?.gap {
            None => info!(AGENT = %agent, DISK = %id, "{name} is tracked on, nothing was missed"),
            Some(gap) if gap != Gap::NewTracker => {
                warn!(MESSAGE_ID = GAP_FOUND, AGENT = %agent, DISK = %id, "{name} is tracked, with a gap: {gap}");
            }
            Some(gap) => info!(AGENT = %agent, DISK = %id, "{name} is tracked: {gap}"),
        }
        let path = path.to_owned();
        Ok(Self { id, path, device, geometry, tracker: Box::new(tracker), reader: Box::new(reader) })
    }

    /// Whether the device is still what it was opened as.
    pub fn is_as_opened(&self) -> bool {
        let device = &self.device;
        let size = device.size_bytes_now().is_ok_and(|size| size == device.size_bytes);
        size && device.diskseq_now().is_ok_and(|diskseq| diskseq == device.diskseq)
    }
}
