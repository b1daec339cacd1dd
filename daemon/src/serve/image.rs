//! A disk as of a checkpoint, as it is served: with a throw-away overlay where clients may write.
//!
//! What must never happen here: a write that reaches the store.

use std::fs::File;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use tracing::error;

use super::overlay::Overlay;
use crate::checkpoint::Checkpoint;
use crate::geometry::GROUP_BYTES;
use crate::message_id::DAMAGE_FOUND;
use crate::restore::Opened;
use crate::store::view::View;
use crate::store::{Damage, StoreError};

/// A disk as it is served. Shared by all threads that serve it.
pub struct Image {
    checkpoint: Checkpoint,
    view: View,
    overlay: Option<Overlay>,
    /// What was logged last: a client that asks again is not logged again.
    logged: Mutex<String>,
}

impl Image {
    /// A disk that cannot be written to.
    pub fn read_only(opened: Opened) -> Self {
        let Opened { checkpoint, view } = opened;
        Self { checkpoint, view, overlay: None, logged: Mutex::default() }
    }

    /// A disk whose writes go to `file`, an empty regular file opened for reading and writing, and are lost with it.
    ///
    /// # Errors
    /// What fstat(2) and ftruncate(2) say; InvalidInput if it is another file.
    pub fn writable(opened: Opened, file: File) -> std::io::Result<Self> {
        let overlay = Overlay::new(file, opened.view.geometry())?;
        Ok(Self { overlay: Some(overlay), ..Self::read_only(opened) })
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The disk's size.
    pub fn size_bytes(&self) -> u64 {
        self.view.geometry().size_bytes()
    }

    /// The unit in which it is read best.
    pub fn block_bytes(&self) -> usize {
        self.view.geometry().block_bytes()
    }

    /// Whether it can be written to.
    pub fn is_writable(&self) -> bool {
        self.overlay.is_some()
    }

    /// Fills `buf` from `offset`. What is damaged is logged once, with the file's name.
    ///
    /// # Errors
    /// EIO: not all of it could be read and checked; EINVAL: not all of it is on the disk.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let read = match &self.overlay {
            None => self.view.read_at(offset, buf),
            Some(overlay) => overlay.read_at(&self.view, offset, buf),
        };
        read.map_err(|e| self.tell(&e))
    }

    /// Writes all of `data` to the overlay.
    ///
    /// # Errors
    /// EPERM: it cannot be written to; EINVAL: not all of it is on the disk; ENOSPC; EIO.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let overlay = self.overlay.as_ref().ok_or(Errno::EPERM)?;
        overlay.write_at(&self.view, offset, data).map_err(|e| self.tell(&e))
    }

    /// Makes a range zeros, in the overlay.
    ///
    /// # Errors
    /// As [`Self::write_at`].
    pub fn write_zeros(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let overlay = self.overlay.as_ref().ok_or(Errno::EPERM)?;
        overlay.write_zeros(&self.view, offset, len).map_err(|e| self.tell(&e))
    }

    /// Whether the MiB that holds this byte of the disk is known to be all zeros. One that was written to is not.
    ///
    /// # Errors
    /// EIO.
    pub fn is_zero_mib(&self, offset: u64) -> Result<bool, Errno> {
        let group = offset / GROUP_BYTES;
        if self.overlay.as_ref().is_some_and(|overlay| overlay.holds(group)) {
            return Ok(false);
        }
        self.view.is_zero(group).map_err(|e| self.tell(&e))
    }

    /// Logs an error, and gives what a client is told of it.
    fn tell(&self, error: &StoreError) -> Errno {
        let Checkpoint { agent, disk, id, .. } = &self.checkpoint;
        let (errno, message_id) = match error {
            StoreError::Refused(_) => return Errno::EINVAL,
            StoreError::NoSpace { .. } => (Errno::ENOSPC, None),
            StoreError::Damaged(Damage { .. }) => (Errno::EIO, Some(DAMAGE_FOUND)),
            _ => (Errno::EIO, None),
        };
        let text = error.to_string();
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if *logged != text {
            error!(MESSAGE_ID = message_id, AGENT = %agent, DISK = %disk, CHECKPOINT = %id, "{text}");
            *logged = text;
        }
        errno
    }
}
