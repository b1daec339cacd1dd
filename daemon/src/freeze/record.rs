//! What is frozen right now, on disk: for the case that agent and guard are killed at once.
//!
//! Written before a freeze and removed after the thaw, because while something is frozen the state directory may be
//! so as well. One file `freeze-<major>-<minor>.json` for each disk. Whoever finds one after its agent is gone thaws
//! with [`thaw_leftovers`]: the agent at its start and `blxrep thaw` behind its stop.
//!
//! The record cannot say which of its file systems somebody else had frozen before (that is known only when writing may
//! be impossible already): after a double death those are thawed, too.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::mountinfo::{DeviceNumber, parse_mountinfo};
use super::mounts::{self, Mount};

/// A record longer than this is none of ours.
const RECORD_MAX_BYTES: u64 = 4 << 20;

/// A record that cannot be written, read or worked off.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system said no.
    #[error("the freeze record {path}: {source}")]
    File {
        /// The record or its directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file system may still be frozen.
    #[error("{mount_point} cannot be thawed: {source}; thaw it with fsfreeze --unfreeze {mount_point}")]
    Thaw {
        /// Where it is mounted.
        mount_point: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The content of a record.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    /// `/proc/sys/kernel/random/boot_id`: a freeze does not outlive its boot.
    boot_id: String,
    mounts: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// As raw bytes: a mount point need not be text.
    mount_point: Vec<u8>,
    device: DeviceNumber,
}

/// A record on disk. Not removed when dropped: only a thaw that went well is a reason to.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
}

impl Record {
    /// Writes the record of a freeze of these file systems on `disk`, durably.
    ///
    /// # Errors
    /// When the directory cannot be made or the file not be written.
    pub fn write(state_dir: &Path, disk: DeviceNumber, mounts: &[Mount]) -> Result<Self, RecordError> {
        use std::os::unix::ffi::OsStrExt;
        let path = state_dir.join(format!("freeze-{}-{}.json", disk.major, disk.minor));
        let failed = |source| RecordError::File { path: path.clone(), source };
        let entry = |m: &Mount| Entry {
            mount_point: m.mount_point.as_os_str().as_bytes().to_vec(),
            device: m.device,
        };
        let content =
            Content { boot_id: boot_id().map_err(failed)?, mounts: mounts.iter().map(entry).collect() };
        let bytes = serde_json::to_vec(&content).map_err(|e| failed(e.into()))?;
        let write = || {
            fs::create_dir_all(state_dir)?;
            let temporary = path.with_extension("tmp");
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(state_dir)?.sync_all()
        };
        write().map_err(failed)?;
        Ok(Self { path })
    }

    /// Removes the record. Call it when everything is thawed.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn remove(self) -> Result<(), RecordError> {
        remove(&self.path)
    }
}

fn remove(path: &Path) -> Result<(), RecordError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(RecordError::File { path: path.to_owned(), source: e })
        }
        _ => Ok(()),
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Thaws what a dead agent has left frozen, and says where that was. Removes the records it has worked off; those of
/// another boot or that are damaged are just removed. Must not run beside an agent of the same state directory.
///
/// # Errors
/// When a file system cannot be thawed (its record stays; the others are thawed all the same) or a record not be
/// read or removed.
pub fn thaw_leftovers(state_dir: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let failed = |source| RecordError::File { path: state_dir.to_owned(), source };
    let names = match fs::read_dir(state_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    // All records are read and all file systems thawed before the first removal: that may have to wait for a thaw.
    let mut thawed = Vec::new();
    let mut done = Vec::new();
    let mut result = Ok(());
    for name in names {
        let path = name.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with("freeze-") || !name.ends_with(".json") {
            continue;
        }
        match thaw_record(&path, &mut thawed) {
            Ok(()) => done.push(path.clone()),
            Err(e) => result = Err(e),
        }
    }
    for path in done {
        remove(&path)?;
    }
    result.map(|()| thawed)
}

fn thaw_record(path: &Path, thawed: &mut Vec<PathBuf>) -> Result<(), RecordError> {
    let failed = |source| RecordError::File { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > RECORD_MAX_BYTES {
        return Ok(());
    }
    let bytes = fs::read(path).map_err(failed)?;
    let Ok(content) = serde_json::from_slice::<Content>(&bytes) else { return Ok(()) };
    if content.boot_id != boot_id().map_err(failed)? {
        return Ok(());
    }
    let entries = parse_mountinfo(&fs::read("/proc/self/mountinfo").map_err(failed)?);
    let mut result = Ok(());
    for entry in content.mounts.iter().rev() {
        let mounted = |e: &&super::mountinfo::MountEntry| e.device == entry.device;
        let open = |e: &super::mountinfo::MountEntry| super::topology::mount_of(e).open().ok();
        // Any mount of the same file system will do; one that is not mounted any more has nobody it could stop.
        let Some(fd) = entries.iter().filter(mounted).find_map(open) else { continue };
        let mount_point = entry.path();
        match mounts::thaw(fd.as_fd()) {
            Ok(()) => thawed.push(mount_point),
            Err(Errno::EINVAL) => {}
            Err(errno) => result = Err(RecordError::Thaw { mount_point, source: errno.into() }),
        }
    }
    result
}

impl Entry {
    fn path(&self) -> PathBuf {
        use std::os::unix::ffi::OsStringExt;
        PathBuf::from(std::ffi::OsString::from_vec(self.mount_point.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(minor: u32) -> Mount {
        Mount {
            mount_id: 1,
            device: DeviceNumber { major: 4000, minor },
            mount_point: PathBuf::from("/no/such/mount"),
            fs_type: "ext4".to_owned(),
            read_only: false,
        }
    }

    #[test]
    fn a_record_is_written_and_removed_and_its_unmounted_file_systems_are_let_be() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("not/there/yet");
        assert!(thaw_leftovers(&state).unwrap().is_empty());
        let disk = DeviceNumber { major: 4000, minor: 0 };
        let record = Record::write(&state, disk, &[mount(1), mount(2)]).unwrap();
        assert!(state.join("freeze-4000-0.json").exists());
        record.remove().unwrap();
        assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
        Record::write(&state, disk, &[mount(1)]).unwrap();
        assert!(thaw_leftovers(&state).unwrap().is_empty());
        assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
    }

    #[test]
    fn damaged_records_and_those_of_another_boot_are_removed_and_other_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("freeze-1-1.json"), b"{\"boot_id\":").unwrap();
        fs::write(dir.path().join("freeze-1-2.json"), b"{\"boot_id\":\"another\",\"mounts\":[]}").unwrap();
        fs::write(dir.path().join("agent.json"), b"x").unwrap();
        assert!(thaw_leftovers(dir.path()).unwrap().is_empty());
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["agent.json"]);
    }
}
