//! The stable name of a disk: what it is called whatever order the kernel finds disks in.
//!
//! Two disks of one machine can still have one name (a copied disk with its GPT): the caller has to look.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::ids::DiskId;

/// More of a sysfs file than this is not looked at.
const LABEL_MAX_BYTES: usize = 512;

/// The id of the disk that the kernel calls `device_name` (such as `sda`), at `path`: its serial number, else its WWN,
/// else the UUID of a dm or md device, else `gpt-` and the GUID of its partition table, else its name.
pub fn disk_id(device_name: &str, path: &Path) -> DiskId {
    from_sysfs(Path::new("/sys/block"), device_name)
        .or_else(|| gpt_guid(path).and_then(|guid| DiskId::from_label(&format!("gpt-{guid}"))))
        .or_else(|| DiskId::from_label(device_name))
        .unwrap_or_else(DiskId::unknown)
}

fn from_sysfs(block: &Path, device_name: &str) -> Option<DiskId> {
    // sysfs writes `!` where a device's name has a slash (cciss/c0d0).
    let dir = block.join(device_name.replace('/', "!"));
    let serial = ["device/serial", "serial"].iter().find_map(|file| label(&dir.join(file)));
    let serial = serial.map(|serial| match namespace(device_name) {
        // All namespaces of an NVMe controller have its serial number.
        Some(number) if number != "1" => format!("{serial}-n{number}"),
        _ => serial,
    });
    let other =
        || ["wwid", "device/wwid", "dm/uuid", "md/uuid"].iter().find_map(|file| label(&dir.join(file)));
    DiskId::from_label(&serial.or_else(other)?)
}

/// The namespace's number in a name like `nvme0n2`.
fn namespace(device_name: &str) -> Option<&str> {
    device_name.strip_prefix("nvme")?.split_once('n').map(|(_, number)| number)
}

/// What a file of sysfs says, if that can tell one disk from another.
fn label(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    let text = String::from_utf8_lossy(bytes.get(..LABEL_MAX_BYTES.min(bytes.len()))?).into_owned();
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    // Cloud and USB disks: empty, or the same character over and over.
    let first = text.chars().find(char::is_ascii_alphanumeric)?;
    let says_something =
        text.chars().filter(char::is_ascii_alphanumeric).any(|c| c != first) || text.len() == 1;
    says_something.then(|| text.to_owned())
}

/// The disk GUID of a GPT (UEFI specification, "GUID Partition Table Header"): at offset 56 of the second sector. Sectors of
/// 512 and of 4096 bytes are tried.
fn gpt_guid(path: &Path) -> Option<String> {
    let file = File::open(path).ok()?;
    [512, 4096].into_iter().find_map(|offset| {
        let mut header = [0; 72];
        file.read_exact_at(&mut header, offset).ok()?;
        guid_in(&header)
    })
}

fn guid_in(header: &[u8; 72]) -> Option<String> {
    let guid = header.strip_prefix(b"EFI PART")?.last_chunk::<16>()?;
    let number = u128::from_le_bytes(*guid);
    if number == 0 || number == u128::MAX {
        return None;
    }
    // The first three fields are little-endian, the last two are bytes in order.
    let [a0, a1, a2, a3, b0, b1, c0, c1, rest @ ..] = *guid;
    let (a, b, c) =
        (u32::from_le_bytes([a0, a1, a2, a3]), u16::from_le_bytes([b0, b1]), u16::from_le_bytes([c0, c1]));
    let [d0, d1, node @ ..] = rest;
    let node: String = node.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{a:08x}-{b:04x}-{c:04x}-{d0:02x}{d1:02x}-{node}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn id(files: &[(&str, &str)], name: &str) -> Option<String> {
        from_sysfs(sysfs(files).path(), name).map(|id| id.to_string())
    }

    #[test]
    fn the_best_name_that_says_something_is_taken() {
        let wwid = ("sda/device/wwid", "naa.5000c500a0b1c2d3\n");
        assert_eq!(id(&[("sda/device/serial", "  WD-1234 \n"), wwid], "sda").unwrap(), "WD-1234");
        assert_eq!(id(&[("sda/serial", "\n"), wwid], "sda").unwrap(), "naa.5000c500a0b1c2d3");
        assert_eq!(id(&[("sda/serial", "00000000\n"), wwid], "sda").unwrap(), "naa.5000c500a0b1c2d3");
        assert_eq!(id(&[("dm-0/dm/uuid", "LVM-abc/1\n")], "dm-0").unwrap(), "LVM-abc_1");
        assert_eq!(id(&[("sda/serial", "---\n")], "sda"), None);
        assert_eq!(id(&[], "sda"), None);
    }

    #[test]
    fn namespaces_of_one_controller_differ() {
        let files = [("nvme0n1/device/serial", "vol1"), ("nvme0n2/device/serial", "vol1")];
        assert_eq!(id(&files, "nvme0n1").unwrap(), "vol1");
        assert_eq!(id(&files, "nvme0n2").unwrap(), "vol1-n2");
    }

    #[test]
    fn without_a_serial_the_partition_table_names_the_disk_and_else_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(4 << 20).unwrap();
        assert_eq!(disk_id("nosuch0", &image).as_str(), "nosuch0");
        assert_eq!(disk_id("../..", Path::new("/nonexistent")).as_str(), "disk");
        let script = "printf 'label: gpt\\nlabel-id: 01234567-89AB-CDEF-0123-456789ABCDEF\\n' | sfdisk -q";
        let done =
            std::process::Command::new("sh").args(["-c", &format!("{script} \"$0\"")]).arg(&image).status();
        assert!(done.unwrap().success(), "this test needs sfdisk");
        assert_eq!(disk_id("nosuch0", &image).as_str(), "gpt-01234567-89ab-cdef-0123-456789abcdef");
    }

    #[test]
    fn headers_that_are_none_have_no_guid() {
        let mut header = [0; 72];
        assert_eq!(guid_in(&header), None);
        header[..8].copy_from_slice(b"EFI PART");
        assert_eq!(guid_in(&header), None, "a GUID of zeros names nothing");
        header[56] = 1;
        assert_eq!(guid_in(&header).unwrap(), "00000001-0000-0000-0000-000000000000");
    }
}
