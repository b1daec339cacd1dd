//! Whether a device holds something that a restore would destroy.
//!
//! That nothing uses it (mounts, LVM, md, swap) is seen to by whoever opens it: `O_EXCL`. What must never happen here: a device
//! taken for empty that could not be looked at.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::Duration;

use super::command::ask;
use super::lsblk::{BlockDevice, complete};
use crate::restore::RestoreError;

const BLKID_TIMEOUT: Duration = Duration::from_secs(20);
const BLKID_MAX_BYTES: usize = 64 << 10;
/// blkid found nothing (blkid(8)).
const NOTHING_FOUND: i32 = 2;

/// Refuses a block device with a file system, a partition table, LVM, md or encryption on it, unless `overwrite` names it as
/// `target` does. Whatever else is there is refused where it is opened.
///
/// # Errors
/// Usage.
pub fn check_device(target: &Path, overwrite: Option<&Path>) -> Result<(), RestoreError> {
    let is_device = target.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
    if is_device || overwrite.is_some() { check_empty(target, overwrite) } else { Ok(()) }
}

fn check_empty(target: &Path, overwrite: Option<&Path>) -> Result<(), RestoreError> {
    let usage = |text: String| Err(RestoreError::Usage(text));
    let name = target.display();
    match overwrite {
        Some(named) if named == target => return Ok(()),
        Some(named) => {
            return usage(format!(
                "--overwrite names {}, but the target is {name}: nothing was written",
                named.display()
            ));
        }
        None => {}
    }
    // blkid says of what it cannot open that it found nothing.
    let readable = File::open(target).and_then(|file| file.read_exact_at(&mut [0; 512], 0));
    readable.map_err(|e| RestoreError::Usage(format!("it cannot be told whether {name} is empty: {e}")))?;
    let path = target.to_string_lossy();
    let asked = ask("blkid", &["-p", "-o", "export", "--", &path], BLKID_TIMEOUT, BLKID_MAX_BYTES);
    let what = match asked {
        Ok((status, _)) if status.code() == Some(NOTHING_FOUND) => return Ok(()),
        Ok((status, said)) if status.success() => describe(&said),
        // Several things at once, say, of which one is left over from before.
        Ok((status, _)) => format!("something that blkid cannot make out ({status})"),
        Err(error) => {
            return usage(format!(
                "it cannot be told whether {name} is empty: {error}; install util-linux, or say --overwrite {name}"
            ));
        }
    };
    usage(format!("{name} holds {what}: if that is to be overwritten, say --overwrite {name}"))
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
        assert!(check_empty(target, Some(target)).is_ok());
        for other in [None, Some(Path::new("/dev/no-such-devic"))] {
            let error = check_empty(target, other).unwrap_err();
            assert!(error.to_string().contains("/dev/no-such-device"), "{error}");
        }
    }

    #[test]
    fn what_is_on_it_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 8 << 20]).unwrap();
        check_empty(&path, None).unwrap();
        let made = std::process::Command::new("mkswap").arg("-q").arg(&path).status().unwrap();
        assert!(made.success());
        let error = check_empty(&path, None).unwrap_err();
        assert!(error.to_string().contains("swap"), "{error}");
        check_empty(&path, Some(&path)).unwrap();
    }
}
