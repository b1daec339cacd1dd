//! What `lsblk --json` and `blkid -o export` say: pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The most devices that are kept; what a machine has beyond that is cut.
const DEVICES_MAX: usize = 4096;
/// The most mount points of one device.
const MOUNT_POINTS_MAX: usize = 64;
/// The longest text, in characters: a path, mostly.
const TEXT_MAX_CHARS: usize = 256;

/// The columns to ask lsblk for. Before util-linux 2.37 there is no MOUNTPOINTS.
pub(crate) const COLUMNS: &str =
    "NAME,PATH,TYPE,SIZE,MODEL,SERIAL,WWN,ROTA,RO,PTTYPE,PTUUID,FSTYPE,UUID,LABEL,MOUNTPOINTS";
/// The columns for an older lsblk.
pub(crate) const COLUMNS_OLD: &str =
    "NAME,PATH,TYPE,SIZE,MODEL,SERIAL,WWN,ROTA,RO,PTTYPE,PTUUID,FSTYPE,UUID,LABEL,MOUNTPOINT";

/// A block device with what lies on it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDevice {
    /// The kernel's name, such as `sda1`.
    pub name: String,
    /// The path, such as `/dev/sda1`.
    pub path: String,
    /// `disk`, `part`, `lvm`, `raid1`, `crypt`, `loop`, `rom`, ...
    pub kind: String,
    /// The size in bytes.
    pub size_bytes: u64,
    /// The maker's name of it.
    pub model: Option<String>,
    /// The serial number.
    pub serial: Option<String>,
    /// The world wide name.
    pub wwn: Option<String>,
    /// It turns.
    pub rotational: bool,
    /// It cannot be written.
    pub read_only: bool,
    /// The type of its partition table: `gpt`, `dos`.
    pub partition_table: Option<String>,
    /// The id of its partition table.
    pub partition_table_id: Option<String>,
    /// The file system, swap, or the layer that uses it (`LVM2_member`).
    pub fs_type: Option<String>,
    /// The file system's UUID.
    pub uuid: Option<String>,
    /// The file system's label.
    pub label: Option<String>,
    /// Where it is mounted.
    pub mount_points: Vec<String>,
    /// Partitions and layers on it.
    pub children: Vec<BlockDevice>,
}

/// Text that is cut to a sane length and free of control characters; `None` if nothing is left.
pub(crate) fn sane(text: &str) -> Option<String> {
    let text: String = text.chars().filter(|c| !c.is_control()).take(TEXT_MAX_CHARS).collect();
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// The devices in lsblk's answer; `None` if it is not one.
pub(crate) fn parse_lsblk(json: &[u8]) -> Option<Vec<BlockDevice>> {
    let answer: Value = serde_json::from_slice(json).ok()?;
    let mut left = DEVICES_MAX;
    Some(devices(answer.get("blockdevices")?, &mut left))
}

fn devices(list: &Value, left: &mut usize) -> Vec<BlockDevice> {
    let mut found = Vec::new();
    for value in list.as_array().map(Vec::as_slice).unwrap_or_default() {
        let Some(rest) = left.checked_sub(1) else { break };
        *left = rest;
        let mut device = device(value);
        device.children = value.get("children").map(|list| devices(list, left)).unwrap_or_default();
        found.push(device);
    }
    found
}

fn device(value: &Value) -> BlockDevice {
    let text = |key| value.get(key).and_then(Value::as_str).and_then(sane);
    // Older versions write numbers and truths as text.
    let flag = |key| match value.get(key) {
        Some(Value::Bool(flag)) => *flag,
        Some(Value::String(text)) => text == "1",
        _ => false,
    };
    let size = value.get("size").and_then(|size| size.as_u64().or_else(|| size.as_str()?.parse().ok()));
    let points = value.get("mountpoints").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let points = points.iter().chain(value.get("mountpoint")).filter_map(Value::as_str).filter_map(sane);
    BlockDevice {
        name: text("name").unwrap_or_default(),
        path: text("path").unwrap_or_default(),
        kind: text("type").unwrap_or_default(),
        size_bytes: size.unwrap_or(0),
        model: text("model"),
        serial: text("serial"),
        wwn: text("wwn"),
        rotational: flag("rota"),
        read_only: flag("ro"),
        partition_table: text("pttype"),
        partition_table_id: text("ptuuid"),
        fs_type: text("fstype"),
        uuid: text("uuid"),
        label: text("label"),
        mount_points: points.take(MOUNT_POINTS_MAX).collect(),
        children: Vec::new(),
    }
}

/// Fills in what lsblk did not know (it asks udev, which not every machine has) from `blkid -p -o export`.
pub(crate) fn complete(device: &mut BlockDevice, blkid: &[u8]) {
    let text = String::from_utf8_lossy(blkid);
    for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
        let field = match key {
            "TYPE" => &mut device.fs_type,
            "UUID" => &mut device.uuid,
            "LABEL" => &mut device.label,
            "PTTYPE" => &mut device.partition_table,
            "PTUUID" => &mut device.partition_table_id,
            _ => continue,
        };
        // Blanks and the like are written with a backslash before them.
        let value = value.replace("\\\\", "\u{0}").replace('\\', "").replace('\u{0}', "\\");
        *field = field.take().or_else(|| sane(&value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn new_and_old_answers_are_understood() {
        let json = br#"{"blockdevices": [{"name":"sda","path":"/dev/sda","type":"disk","size":1024,"model":"X  ","serial":null,
            "rota":true,"ro":false,"mountpoints":[null],"children":[
            {"name":"sda1","type":"part","size":"512","ro":"1","rota":"0","fstype":"ext4","mountpoint":"/a"}]}]}"#;
        let found = parse_lsblk(json).unwrap();
        let (disk, part) = (&found[0], &found[0].children[0]);
        assert_eq!((disk.size_bytes, disk.model.as_deref(), disk.serial.as_deref()), (1024, Some("X"), None));
        assert!(disk.rotational && !disk.read_only && disk.mount_points.is_empty());
        assert_eq!((part.size_bytes, part.read_only, part.rotational), (512, true, false));
        assert_eq!(part.mount_points, ["/a"]);
    }

    #[test]
    fn only_gaps_are_filled_from_blkid() {
        let mut device = BlockDevice { uuid: Some("known".into()), ..BlockDevice::default() };
        complete(&mut device, b"DEVNAME=/dev/x\nUUID=other\nTYPE=ext4\nLABEL=a\\ b\\\\c\nnonsense\n");
        assert_eq!(device.uuid.as_deref(), Some("known"));
        assert_eq!((device.fs_type.as_deref(), device.label.as_deref()), (Some("ext4"), Some("a b\\c")));
    }

    #[test]
    fn endless_answers_and_texts_are_cut() {
        let one = format!(r#"{{"name":"{}"}}"#, "x".repeat(10_000));
        let json = format!(r#"{{"blockdevices":[{}]}}"#, vec![one; DEVICES_MAX + 10].join(","));
        let found = parse_lsblk(json.as_bytes()).unwrap();
        assert_eq!((found.len(), found[0].name.len()), (DEVICES_MAX, TEXT_MAX_CHARS));
        let deep = "{\"blockdevices\":".to_owned() + &"[{\"children\":".repeat(5000);
        assert!(parse_lsblk(deep.as_bytes()).is_none());
        assert!(parse_lsblk(b"[]").is_none());
    }

    proptest! {
        #[test]
        fn garbage_is_taken_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            parse_lsblk(&bytes);
            complete(&mut BlockDevice::default(), &bytes);
        }
    }
}
