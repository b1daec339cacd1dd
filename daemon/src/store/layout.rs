//! Where the files of a disk lie, and the header every one of them carries (`docs/FORMAT.md`, "Header").

use std::path::{Path, PathBuf};

use super::codec::Fields;
use crate::checkpoint::{Checkpoint, Consistency};
use crate::geometry::Geometry;
use crate::ids::{AgentId, CheckpointId, DiskId, Epoch};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 1024;
/// The version of all formats of the store.
pub const VERSION: u32 = 1;
/// The longest device name, in bytes.
pub const DEVICE_MAX_BYTES: usize = 64;
/// The longest note, in bytes.
pub const NOTE_MAX_BYTES: usize = 512;
const NAME_BYTES: usize = 64;
const PAD_BYTES: usize = 64;
const CHECKSUM_AT: usize = HEADER_BYTES - 32;

/// A checkpoint's own checksum: of its closing header, which holds the hash of all the rest of its file.
pub type SealHash = [u8; 32];

/// Which header it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// At the start of a `.sum`.
    Sum,
    /// At the start of a `.bak`: nothing is known of the checkpoint yet.
    Delta,
    /// At the end of a sealed `.bak`.
    DeltaEnd,
    /// At the start of a `.cst`.
    Journal,
}

impl Kind {
    fn magic(self) -> [u8; 8] {
        *match self {
            Self::Sum => b"BLXRsum\n",
            Self::Delta => b"BLXRbak\n",
            Self::DeltaEnd => b"BLXRend\n",
            Self::Journal => b"BLXRcst\n",
        }
    }
}

/// The checkpoint a file builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Its id.
    pub id: CheckpointId,
    /// Its seal.
    pub seal: SealHash,
}

/// What a file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Which header it is.
    pub kind: Kind,
    /// Whose disk.
    pub agent: AgentId,
    /// Which disk.
    pub disk: DiskId,
    /// The device's name on the agent.
    pub device: String,
    /// Size and block size.
    pub geometry: Geometry,
    /// The checkpoint and how it was proven; `None` while it is not sealed.
    pub id: Option<(CheckpointId, Consistency)>,
    /// On what it builds; `None` for the base.
    pub parent: Option<Link>,
    /// The total hash of the checkpoint's sealed journal; zeros while not sealed.
    pub journal: [u8; 32],
    /// BLAKE3 of all other bytes of the file; zeros while not sealed.
    pub content: [u8; 32],
    /// BLAKE3 of the index; zeros where there is none.
    pub index_hash: [u8; 32],
    /// Where the index begins, in bytes; 0 where there is none.
    pub index_offset: u64,
    /// Entries of the index.
    pub index_count: u64,
    /// When it was frozen, in milliseconds since 1970.
    pub time_unix_ms: u64,
    /// How long it was frozen, in milliseconds.
    pub freeze_ms: u32,
    /// How many blocks of the disk could not be read; 0 while not sealed.
    pub unreadable_blocks: u32,
    /// The tracker's life.
    pub epoch: Epoch,
    /// What a person should know.
    pub note: String,
}

fn padded(out: &mut Vec<u8>, text: &str, len: usize) {
    let end = out.len() + len;
    out.extend(text.bytes().take(len));
    out.resize(end, 0);
}

fn text(field: &[u8], len: usize) -> Option<String> {
    let (text, rest) = field.split_at_checked(len)?;
    rest.iter().all(|b| *b == 0).then(|| String::from_utf8(text.to_vec()).ok())?
}

impl Header {
    /// A header that is not sealed.
    pub fn open(kind: Kind, owner: &Paths, device: &str, geometry: Geometry, epoch: Epoch) -> Self {
        Self {
            kind,
            agent: owner.agent.clone(),
            disk: owner.disk.clone(),
            device: device.to_owned(),
            geometry,
            id: None,
            parent: None,
            journal: [0; 32],
            content: [0; 32],
            index_hash: [0; 32],
            index_offset: 0,
            index_count: 0,
            time_unix_ms: 0,
            freeze_ms: 0,
            unreadable_blocks: 0,
            epoch,
            note: String::new(),
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend(self.kind.magic());
        out.extend(VERSION.to_le_bytes());
        out.extend((HEADER_BYTES as u32).to_le_bytes());
        out.extend(self.geometry.size_bytes().to_le_bytes());
        out.push(self.geometry.block_shift());
        out.push(self.id.map_or(0, |(_, class)| class.code()));
        out.push(self.agent.as_str().len() as u8);
        out.push(self.disk.as_str().len() as u8);
        out.push(self.device.len().min(DEVICE_MAX_BYTES) as u8);
        out.push(0);
        out.extend((self.note.len().min(NOTE_MAX_BYTES) as u16).to_le_bytes());
        out.extend(self.id.map_or(0, |(id, _)| id.to_u64()).to_le_bytes());
        out.extend(self.parent.map_or(0, |p| p.id.to_u64()).to_le_bytes());
        out.extend(self.parent.map_or([0; 32], |p| p.seal));
        out.extend(self.journal);
        out.extend(self.content);
        out.extend(self.index_hash);
        out.extend(self.index_offset.to_le_bytes());
        out.extend(self.index_count.to_le_bytes());
        out.extend(self.time_unix_ms.to_le_bytes());
        out.extend(self.freeze_ms.to_le_bytes());
        out.extend(self.unreadable_blocks.to_le_bytes());
        out.extend(self.epoch.0);
        padded(&mut out, self.agent.as_str(), NAME_BYTES);
        padded(&mut out, self.disk.as_str(), NAME_BYTES);
        padded(&mut out, &self.device, DEVICE_MAX_BYTES);
        padded(&mut out, &self.note, NOTE_MAX_BYTES);
        out.extend([0; PAD_BYTES]);
        let checksum = blake3::hash(&out);
        out.extend(checksum.as_bytes());
        out
    }

    /// The header and its seal (its checksum).
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(kind: Kind, bytes: &[u8]) -> Result<(Self, SealHash), &'static str> {
        let (body, seal) = bytes
            .split_at_checked(CHECKSUM_AT)
            .and_then(|(body, seal)| Some((body, <SealHash>::try_from(seal).ok()?)))
            .ok_or("its header is cut short")?;
        if !body.starts_with(&kind.magic()) {
            return Err("it does not begin as such a file must");
        }
        if *blake3::hash(body).as_bytes() != seal {
            return Err("the header does not have its checksum");
        }
        let header =
            Self::fields(kind, Fields(body)).ok_or("its header holds values that are not possible")?;
        Ok((header?, seal))
    }

    fn fields(kind: Kind, mut f: Fields<'_>) -> Option<Result<Self, &'static str>> {
        f.array::<8>()?;
        if f.u32()? != VERSION || f.u32()? as usize != HEADER_BYTES {
            return Some(Err("its version is not known: a newer blxrep wrote it"));
        }
        let geometry = Geometry::new(f.u64()?, f.u8()?).ok()?;
        let class = f.u8()?;
        let (agent_len, disk_len, device_len) =
            (usize::from(f.u8()?), usize::from(f.u8()?), usize::from(f.u8()?));
        let zero = f.u8()?;
        let note_len = usize::from(f.u16()?);
        let (id, parent, parent_seal) = (f.u64()?, f.u64()?, f.array::<32>()?);
        let (journal, content, index_hash) = (f.array()?, f.array()?, f.array()?);
        let (index_offset, index_count) = (f.u64()?, f.u64()?);
        let (time_unix_ms, freeze_ms, unreadable_blocks) = (f.u64()?, f.u32()?, f.u32()?);
        let epoch = Epoch(f.array()?);
        let agent = text(f.bytes(NAME_BYTES)?, agent_len)?.parse().ok()?;
        let disk = text(f.bytes(NAME_BYTES)?, disk_len)?.parse().ok()?;
        let device = text(f.bytes(DEVICE_MAX_BYTES)?, device_len)?;
        let note = text(f.bytes(NOTE_MAX_BYTES)?, note_len)?;
        let id = match (id, class) {
            (0, 0) => None,
            (id, class) => Some((CheckpointId::from_u64(id)?, Consistency::from_code(class)?)),
        };
        let parent = match parent {
            0 if parent_seal == [0; 32] => None,
            id => Some(Link { id: CheckpointId::from_u64(id)?, seal: parent_seal }),
        };
        let clean = zero == 0 && (id.is_some() || unreadable_blocks == 0) && f.0.iter().all(|b| *b == 0);
        let later = id.is_none_or(|(id, _)| parent.is_none_or(|p| p.id < id));
        (clean && later && device_is_sound(&device)).then_some(Ok(Self {
            kind,
            agent,
            disk,
            device,
            geometry,
            id,
            parent,
            journal,
            content,
            index_hash,
            index_offset,
            index_count,
            time_unix_ms,
            freeze_ms,
            unreadable_blocks,
            epoch,
            note,
        }))
    }

    /// The checkpoint this header describes; `None` while it is not sealed.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        let (id, consistency) = self.id?;
        Some(Checkpoint {
            id,
            agent: self.agent.clone(),
            disk: self.disk.clone(),
            device: self.device.clone(),
            geometry: self.geometry,
            parent: self.parent.map(|p| p.id),
            consistency,
            time_unix_ms: self.time_unix_ms,
            freeze_ms: self.freeze_ms,
            unreadable_blocks: self.unreadable_blocks,
            epoch: self.epoch,
            note: self.note.clone(),
        })
    }

    /// Whether the file belongs to this disk.
    pub fn is_of(&self, owner: &Paths) -> bool {
        self.agent == owner.agent && self.disk == owner.disk
    }
}

/// Whether a device's name can be kept: 1 to 64 bytes, nothing that could play tricks with a terminal.
pub fn device_is_sound(device: &str) -> bool {
    (1..=DEVICE_MAX_BYTES).contains(&device.len()) && !device.chars().any(char::is_control)
}

/// A note of at most [`NOTE_MAX_BYTES`], cut at a character.
pub fn cut_note(note: &str) -> String {
    let mut end = note.len().min(NOTE_MAX_BYTES);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    note.split_at(end).0.to_owned()
}

/// The paths of one disk's files, relative to the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Whose disk.
    pub agent: AgentId,
    /// Which disk.
    pub disk: DiskId,
}

impl Paths {
    /// The paths of one disk.
    pub fn new(agent: AgentId, disk: DiskId) -> Self {
        Self { agent, disk }
    }

    fn under(&self, top: &str, name: &str) -> PathBuf {
        Path::new(top).join(self.agent.as_str()).join(self.disk.as_str()).join(name)
    }

    /// The directory of the base image.
    pub fn snapshot_dir(&self) -> PathBuf {
        self.under("snapshot", "")
    }

    /// The directory of the deltas.
    pub fn incremental_dir(&self) -> PathBuf {
        self.under("incremental", "")
    }

    /// The directory of the journals.
    pub fn live_dir(&self) -> PathBuf {
        self.under("live", "")
    }

    /// The base image.
    pub fn img(&self, id: CheckpointId) -> PathBuf {
        self.under("snapshot", &format!("{id}.img"))
    }

    /// The base image's hashes.
    pub fn sum(&self, id: CheckpointId) -> PathBuf {
        self.under("snapshot", &format!("{id}.sum"))
    }

    /// A committed delta.
    pub fn bak(&self, id: CheckpointId) -> PathBuf {
        self.under("incremental", &format!("{id}.bak"))
    }

    /// A sealed journal.
    pub fn cst(&self, id: CheckpointId) -> PathBuf {
        self.under("live", &format!("{id}.cst"))
    }

    /// What came of starting a checkpoint.
    pub fn boot(&self, id: CheckpointId) -> PathBuf {
        self.under("boot", &format!("{id}.boot"))
    }

    /// The image of a copy under way.
    pub fn copy_img(&self) -> PathBuf {
        self.under("snapshot", "copy.img.part")
    }

    /// The hashes of a copy under way.
    pub fn copy_sum(&self) -> PathBuf {
        self.under("snapshot", "copy.sum.part")
    }

    /// The open delta log.
    pub fn next_bak(&self) -> PathBuf {
        self.under("incremental", "next.bak.part")
    }

    /// The open journal.
    pub fn next_cst(&self) -> PathBuf {
        self.under("live", "next.cst")
    }
}

/// The checkpoint in a file name with this extension.
pub fn id_in_name(name: &str, extension: &str) -> Option<CheckpointId> {
    name.strip_suffix(extension)?.strip_suffix('.')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn sample(device: String, note: String, sealed: bool) -> Header {
        let paths = Paths::new("agent1".parse().unwrap(), "disk-0".parse().unwrap());
        let geometry = Geometry::new(5 << 20, 12).unwrap();
        let mut h = Header::open(Kind::DeltaEnd, &paths, &device, geometry, Epoch([3; 16]));
        h.note = note;
        if sealed {
            h.id = Some(("20261121203456-2".parse().unwrap(), Consistency::Crash));
            h.parent = Some(Link { id: "20261121203456".parse().unwrap(), seal: [9; 32] });
            h.content = [1; 32];
            h.index_count = 7;
            h.unreadable_blocks = 9;
        }
        h
    }

    proptest! {
        #[test]
        fn decoding_gives_back_what_was_encoded(device in "[a-z]{1,64}", note in "\\PC{0,100}", sealed: bool) {
            let header = sample(device, note, sealed);
            let bytes = header.encode();
            prop_assert_eq!(bytes.len(), HEADER_BYTES);
            prop_assert_eq!(Header::decode(Kind::DeltaEnd, &bytes).unwrap().0, header);
        }

        #[test]
        fn garbage_with_a_good_checksum_is_refused_without_a_panic(mut body in proptest::collection::vec(any::<u8>(), CHECKSUM_AT)) {
            body[..16].copy_from_slice(&sample("sda".into(), String::new(), true).encode()[..16]);
            let sum = blake3::hash(&body);
            body.extend(sum.as_bytes());
            let _ = Header::decode(Kind::DeltaEnd, &body);
        }
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_found() {
        let bytes = sample("sda".into(), "a hook failed".into(), true).encode();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x20;
            assert!(Header::decode(Kind::DeltaEnd, &bad).is_err(), "{at}");
            assert!(Header::decode(Kind::DeltaEnd, &bytes[..at]).is_err(), "{at}");
        }
        assert!(Header::decode(Kind::Sum, &bytes).is_err());
    }

    #[test]
    fn a_long_note_is_cut_at_a_character() {
        let note = cut_note(&"ä".repeat(300));
        assert_eq!(note.len(), 512);
        assert_eq!(cut_note(&format!("x{}", "ä".repeat(300))).len(), 511);
    }
}
