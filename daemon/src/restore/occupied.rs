//! Whether an output holds something that a restore would destroy.
//!
//! That nothing uses it (mounts, LVM, md, swap) is seen to by whoever opens it: `O_EXCL`. What must never happen here: a device
//! taken for empty that could not be looked at.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Output, RestoreError};
use crate::command::ask;
use crate::lsblk::{BlockDevice, complete};

const BLKID_TIMEOUT: Duration = Duration::from_secs(20);
const BLKID_MAX_BYTES: usize = 64 << 10;
/// blkid found nothing (blkid(8)).
const NOTHING_FOUND: i32 = 2;
/// How much of a device's beginning, and of its end, is looked at. What says that something is there lies in the first few MiB, or in
/// the last one: md, other RAIDs, the copy of a GPT.
const EDGE_BYTES: u64 = 8 << 20;

/// Refuses a block device with a file system, a partition table, LVM, md or encryption on it, unless `overwrite` names it as the
/// output does. Whatever else is there is refused where it is opened.
///
/// # Errors
/// Usage.
pub fn check_empty(output: &Output, overwrite: Option<&Path>) -> Result<(), RestoreError> {
    let name = output.name().display();
    match overwrite {
        Some(named) if named == output.name() => return Ok(()),
        Some(named) => {
            let named = named.display();
            let text = format!("--overwrite names {named}, but the target is {name}: nothing was written");
            return Err(RestoreError::Usage(text));
        }
        None => {}
    }
    let found = match output {
        Output::Open { file, .. } => on_device(file),
        Output::Path(path) if is_device(path.metadata()) => {
            File::open(path).and_then(|file| on_device(&file))
        }
        Output::Path(_) => Ok(None),
    };
    match found {
        Ok(None) => Ok(()),
        Ok(Some(what)) => Err(RestoreError::Usage(format!(
            "{name} holds {what}: if that is to be overwritten, say --overwrite {name}"
        ))),
        Err(error) => Err(RestoreError::Usage(format!(
            "it cannot be told whether {name} is empty: {error}; if it may be overwritten, say --overwrite {name}"
        ))),
    }
}

fn is_device(meta: io::Result<std::fs::Metadata>) -> bool {
    meta.is_ok_and(|meta| meta.file_type().is_block_device())
}

fn on_device(file: &File) -> io::Result<Option<String>> {
    if is_device(file.metadata()) { held(file) } else { Ok(None) }
}

/// What is on it, for a person; `None` for nothing that is known. blkid looks at a copy of the edges, since the dispatcher, which
/// was given the device open, could not have it opened once more.
fn held(device: &File) -> io::Result<Option<String>> {
    let args = ["-p", "-o", "export", "/proc/self/fd/0"];
    match ask("blkid", &args, edges(device)?.into(), BLKID_TIMEOUT, BLKID_MAX_BYTES) {
        Ok((status, _)) if status.code() == Some(NOTHING_FOUND) => Ok(None),
        Ok((status, said)) if status.success() => Ok(Some(describe(&said))),
        // Several things at once, say, of which one is left over from before.
        Ok((status, _)) => Ok(Some(format!("something that blkid cannot make out ({status})"))),
        Err(error) => Err(io::Error::new(error.kind(), format!("{error} (blkid is in util-linux)"))),
    }
}

/// A file in memory, as long as the device, with the device's beginning and end and a hole between.
fn edges(mut device: &File) -> io::Result<File> {
    let size_bytes = device.seek(SeekFrom::End(0))?;
    let copy = File::from(memfd_create(c"blxrep-edges", MFdFlags::MFD_CLOEXEC)?);
    copy.set_len(size_bytes)?;
    let mut edge = vec![0; EDGE_BYTES.min(size_bytes) as usize];
    for offset in [0, size_bytes.saturating_sub(EDGE_BYTES)] {
        device.read_exact_at(&mut edge, offset)?;
        copy.write_all_at(&edge, offset)?;
    }
    Ok(copy)
}

/// What blkid found, for a person.
fn describe(said: &[u8]) -> String {
    let mut device = BlockDevice::default();
    complete(&mut device, said);
    let label = device.label.map(|label| format!(" named {label}")).unwrap_or_default();
    match (device.fs_type, device.partition_table) {
        (Some(fs_type), _) => format!("{fs_type}{label}"),
        (None, Some(table)) => format!("a partition table ({table})"),
        (None, None) => "something".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_person_is_told_what_is_there() {
        assert_eq!(describe(b"TYPE=ext4\nLABEL=my\\ data\nUUID=1\n"), "ext4 named my data");
        assert_eq!(describe(b"PTTYPE=gpt\nPTUUID=2\n"), "a partition table (gpt)");
        assert_eq!(describe(b"SBMAGIC=x\n"), "something");
    }

    #[test]
    fn only_the_target_itself_may_be_named() {
        let target = Path::new("/dev/no-such-device");
        let output = Output::Path(target.to_owned());
        assert!(check_empty(&output, Some(target)).is_ok());
        let error = check_empty(&output, Some(Path::new("/dev/no-such-devic"))).unwrap_err();
        assert!(error.to_string().contains("target is /dev/no-such-device:"), "{error}");
        let taken = Output::Open { file: tempfile::tempfile().unwrap(), name: target.to_owned() };
        assert!(check_empty(&taken, None).is_ok() && check_empty(&taken, Some(target)).is_ok());
        assert!(check_empty(&taken, Some(Path::new("/dev/sda"))).is_err());
    }

    /// What is found on a file of this size, behind this script: larger than both edges, and smaller than one.
    fn after(script: &str, size_bytes: u64) -> Option<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size_bytes).unwrap();
        let made = Command::new("sh").args(["-ec", script, "sh"]).arg(file.path()).status().unwrap();
        assert!(made.success(), "{script}");
        held(file.as_file()).unwrap()
    }

    #[test]
    fn what_is_on_it_is_found() {
        for size_bytes in [1 << 20, (64 << 20) + 512] {
            assert_eq!(after(":", size_bytes), None);
            assert_eq!(after("mkswap -q \"$1\"", size_bytes).as_deref(), Some("swap"));
            let gpt = "echo label: gpt | sfdisk -q \"$1\"";
            let found = Some("a partition table (gpt)");
            assert_eq!(after(gpt, size_bytes).as_deref(), found);
            // The first copy is gone; the other one lies in the last sector.
            let second =
                format!("{gpt}; dd if=/dev/zero of=\"$1\" bs=512 seek=1 count=1 conv=notrunc status=none");
            assert_eq!(after(&second, size_bytes).as_deref(), found);
        }
        assert_eq!(after(":", 0), None);
    }
}
