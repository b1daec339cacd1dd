//! `org.blxrep.Disk`: one object a disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use blxrep_dbus::disk_path;
use blxrep_dbus::words::Role;
use zbus::Connection;

use super::publish::Published;
use crate::clock::unix_ms;
use crate::status::{DiskStatus, Newest};

/// The disks on one connection, by their paths.
#[derive(Default)]
pub(super) struct Disks(BTreeMap<String, Published<DiskObject>>);

impl Disks {
    /// Makes the objects be what the disks are now.
    pub(super) async fn show(&mut self, connection: &Connection, disks: Vec<DiskStatus>) -> zbus::Result<()> {
        let mut now: BTreeMap<String, DiskStatus> =
            disks.into_iter().map(|d| (disk_path(d.agent.as_str(), d.disk.as_str()), d)).collect();
        let gone: Vec<_> = self.0.keys().filter(|path| !now.contains_key(*path)).cloned().collect();
        for path in gone {
            if let Some(published) = self.0.remove(&path) {
                published.remove().await?;
            }
        }
        for (path, published) in &mut self.0 {
            if let Some(status) = now.remove(path) {
                published.object().set(status);
                published.signal_changes().await?;
            }
        }
        for (path, status) in now {
            let published = Published::add(connection, &path, DiskObject::new(status)).await?;
            self.0.insert(path, published);
        }
        Ok(())
    }
}

/// The object on the bus.
#[derive(Clone)]
pub(super) struct DiskObject(Arc<Mutex<DiskStatus>>);

impl DiskObject {
    /// An object of a disk.
    pub(super) fn new(status: DiskStatus) -> Self {
        Self(Arc::new(Mutex::new(status)))
    }

    fn set(&self, status: DiskStatus) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    fn get<T>(&self, read: impl FnOnce(&DiskStatus) -> T) -> T {
        read(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn newest<T>(&self, read: impl FnOnce(&Newest) -> T) -> Option<T> {
        self.get(|status| status.newest.as_ref().map(read))
    }
}

#[zbus::interface(name = "org.blxrep.Disk", introspection_docs = false)]
impl DiskObject {
    #[zbus(property(emits_changed_signal = "const"))]
    fn agent(&self) -> String {
        self.get(|status| status.agent.to_string())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> String {
        self.get(|status| status.disk.to_string())
    }

    #[zbus(property)]
    fn device(&self) -> String {
        self.get(|status| status.device.clone())
    }

    #[zbus(property)]
    fn size_bytes(&self) -> u64 {
        self.get(|status| status.size_bytes)
    }

    #[zbus(property)]
    fn state(&self) -> &str {
        self.get(|status| status.state.as_str())
    }

    #[zbus(property)]
    fn paused(&self) -> bool {
        self.get(|status| status.paused_by_agent || status.paused_by_dispatcher)
    }

    #[zbus(property)]
    fn paused_by(&self) -> Vec<&str> {
        let sides = self.get(|status| {
            [(status.paused_by_agent, Role::Agent), (status.paused_by_dispatcher, Role::Dispatcher)]
        });
        sides.into_iter().filter(|(paused, _)| *paused).map(|(_, role)| role.as_str()).collect()
    }

    #[zbus(property)]
    fn progress(&self) -> f64 {
        self.get(|status| status.progress)
    }

    #[zbus(property)]
    fn dirty_bytes(&self) -> u64 {
        self.get(|status| status.dirty_bytes)
    }

    #[zbus(property)]
    fn last_checkpoint(&self) -> String {
        self.newest(|newest| newest.id.to_string()).unwrap_or_default()
    }

    #[zbus(property, name = "LastCheckpointUSec")]
    fn last_checkpoint_usec(&self) -> u64 {
        self.newest(|newest| newest.time_unix_ms.saturating_mul(1000)).unwrap_or(0)
    }

    #[zbus(property(emits_changed_signal = "false"), name = "LagUSec")]
    fn lag_usec(&self) -> u64 {
        let lag = self.newest(|newest| unix_ms().saturating_sub(newest.time_unix_ms).saturating_mul(1000));
        lag.unwrap_or(u64::MAX)
    }

    #[zbus(property)]
    fn consistency(&self) -> String {
        self.newest(|newest| newest.consistency.to_string()).unwrap_or_default()
    }

    #[zbus(property, name = "SyncEveryUSec")]
    fn sync_every_usec(&self) -> u64 {
        let every = self.get(|status| status.sync_every).unwrap_or_default();
        u64::try_from(every.as_micros()).unwrap_or(u64::MAX)
    }

    #[zbus(property)]
    fn damage(&self) -> Vec<String> {
        self.get(|status| status.damage.clone())
    }

    #[zbus(property)]
    fn last_error(&self) -> String {
        self.get(|status| status.last_error.clone()).unwrap_or_default()
    }
}
