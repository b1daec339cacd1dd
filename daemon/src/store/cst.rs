//! The journal of changed sectors since the last checkpoint (`docs/FORMAT.md`, "`.cst`").
//!
//! It shows at any moment what is exposed, and keeps a commit from leaving out a block that was reported. Records
//! are chained like those of a delta. One write holds all records of one sync, so that at most the last write can
//! be torn. What must never happen here: a flipped bit taken for the torn tail of a power cut.

use super::StoreError;
use super::codec::{Fields, short_hash};
use super::handle::{Dir, Handle};
use super::layout::{HEADER_BYTES, Header, Kind, Paths};
use crate::bitmap::{BlockSet, Extent};
use crate::ids::CheckpointId;
use crate::tracker::Gap;

/// Bytes of a record before its body: type, length, own checksum.
pub const RECORD_HEADER_BYTES: usize = 16;
const HASH_BYTES: usize = 16;
const EXTENT_BYTES: usize = 16;
/// Extents in one record at most.
pub const EXTENTS_MAX: usize = 4096;
const CHANGED: u8 = 1;
const GAP: u8 = 2;
const SEAL: u8 = 3;
const TORN_MIN_BYTES: u64 = HASH_BYTES as u64;

/// What a journal says.
#[derive(Debug, Clone)]
pub struct Journal {
    /// The header.
    pub header: Header,
    /// Blocks reported changed since the last gap.
    pub reported: BlockSet,
    /// The last gap, if there was one.
    pub gap: Option<Gap>,
    /// The checkpoint it was sealed for, and the hash of all bytes before the seal.
    pub sealed: Option<(CheckpointId, [u8; 32])>,
    /// The end of the last whole record that is not a seal.
    end: u64,
    /// Whether bytes follow the last whole record.
    torn: bool,
    chain: [u8; HASH_BYTES],
    hasher: blake3::Hasher,
}

fn record(chain: &[u8], kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind, 0, 0, 0];
    out.extend((body.len() as u32).to_le_bytes());
    let own = short_hash::<8>(&[&out]);
    out.extend(own);
    out.extend(body);
    let hash = short_hash::<HASH_BYTES>(&[chain, &out]);
    out.extend(hash);
    out
}

fn record_header(bytes: &[u8]) -> Option<(u8, usize)> {
    let (fields, own) = bytes.split_at_checked(8)?;
    let mut f = Fields(fields);
    let (kind, zeros, len) = (f.u8()?, f.array::<3>()?, f.u32()? as usize);
    let sound = match kind {
        CHANGED => len > 0 && len % EXTENT_BYTES == 0 && len <= EXTENTS_MAX * EXTENT_BYTES,
        GAP => len == 8,
        SEAL => len == 40,
        _ => false,
    };
    (sound && zeros == [0; 3] && short_hash::<8>(&[fields]) == own).then_some((kind, len))
}

/// Reads the journal at `file`. An open one (`sealed_for` is `None`) may have a torn tail and may end in a seal that
/// came to nothing; `None` is returned if not even its header was written. A sealed one must be whole.
///
/// # Errors
/// Damaged; Io.
pub fn read(
    file: &Handle,
    owner: &Paths,
    sealed_for: Option<CheckpointId>,
) -> Result<Option<Journal>, StoreError> {
    let len = file.len()?;
    let head = file.read_vec(HEADER_BYTES.min(usize::try_from(len).unwrap_or(HEADER_BYTES)), 0)?;
    let (header, seal) = match Header::decode(Kind::Journal, &head) {
        Ok(found) => found,
        Err(_) if sealed_for.is_none() && (head.len() < HEADER_BYTES || is_torn(file, 0, len)?) => {
            return Ok(None);
        }
        Err(what) => return Err(file.damaged(what)),
    };
    if !header.is_of(owner) {
        return Err(file.damaged(format!("it belongs to {}/{}", header.agent, header.disk)));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head);
    let chain = seal.last_chunk().copied().unwrap_or_default();
    let end = HEADER_BYTES as u64;
    let (reported, gap, sealed) = (BlockSet::new(), None, None);
    let mut journal = Journal { header, reported, gap, sealed, end, torn: false, chain, hasher };
    let mut at = end;
    while at < len {
        match journal.next(file, at, len)? {
            Some(next) => at = next,
            None if sealed_for.is_none() && is_torn(file, at, len)? => {
                journal.torn = true;
                break;
            }
            None => return Err(file.damaged(format!("the record at byte {at} is not what was written"))),
        }
    }
    match (sealed_for, journal.sealed) {
        (Some(id), Some((for_id, _))) if id != for_id => {
            Err(file.damaged(format!("it was sealed for checkpoint {for_id}")))
        }
        (Some(_), None) => Err(file.damaged("it was never sealed, or its end is missing")),
        _ => Ok(Some(journal)),
    }
}

/// Whether a power cut explains that there is no whole record at `at`: the file ends within it, or zeros follow to
/// the end from a sector's border on.
fn is_torn(file: &Handle, at: u64, len: u64) -> Result<bool, StoreError> {
    let head_len = (len - at).min(RECORD_HEADER_BYTES as u64);
    let head = file.read_vec(head_len as usize, at)?;
    if head.len() < RECORD_HEADER_BYTES {
        return Ok(true);
    }
    if let Some((_, body)) = record_header(&head)
        && at + (RECORD_HEADER_BYTES + body + HASH_BYTES) as u64 > len
    {
        return Ok(true);
    }
    let zeros_from = trailing_zeros(file, at, len)?;
    let tear = if zeros_from == at { at } else { zeros_from.next_multiple_of(512) };
    Ok(len.saturating_sub(tear) >= TORN_MIN_BYTES)
}

/// Where the zeros at the end of the file begin, not before `from`.
fn trailing_zeros(file: &Handle, from: u64, len: u64) -> Result<u64, StoreError> {
    let mut end = len;
    while end > from {
        let start = from.max(end.saturating_sub(1 << 16));
        let bytes = file.read_vec((end - start) as usize, start)?;
        if let Some(last) = bytes.iter().rposition(|b| *b != 0) {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(from)
}

impl Journal {
    /// Takes the record at `at` in; returns the place behind it, or `None` if it is not whole.
    fn next(&mut self, file: &Handle, at: u64, len: u64) -> Result<Option<u64>, StoreError> {
        let room = len - at;
        if self.sealed.is_some() || room < RECORD_HEADER_BYTES as u64 {
            return Ok(None);
        }
        let head = file.read_vec(RECORD_HEADER_BYTES, at)?;
        let Some((kind, body_len)) = record_header(&head) else { return Ok(None) };
        let rest_len = body_len + HASH_BYTES;
        let next = at + (RECORD_HEADER_BYTES + rest_len) as u64;
        if next > len {
            return Ok(None);
        }
        let rest = file.read_vec(rest_len, at + RECORD_HEADER_BYTES as u64)?;
        let Some((body, hash)) = rest.split_at_checked(body_len) else { return Ok(None) };
        if short_hash::<HASH_BYTES>(&[&self.chain, &head, body]) != hash || self.apply(kind, body).is_none() {
            return Ok(None);
        }
        if self.sealed.is_none() {
            self.hasher.update(&head);
            self.hasher.update(&rest);
            self.chain = hash.try_into().unwrap_or_default();
            self.end = next;
        }
        Ok(Some(next))
    }

    fn apply(&mut self, kind: u8, body: &[u8]) -> Option<()> {
        let mut f = Fields(body);
        match kind {
            CHANGED => {
                let mut extents = Vec::with_capacity(body.len() / EXTENT_BYTES);
                while !f.0.is_empty() {
                    let extent = Extent { first: f.u64()?, count: f.u64()? };
                    if extent.first.checked_add(extent.count)? > self.header.geometry.blocks() {
                        return None;
                    }
                    extents.push(extent);
                }
                // All of the record or nothing of it.
                extents.into_iter().for_each(|extent| self.reported.insert(extent));
            }
            GAP => {
                self.gap = Some(Gap::from_code(f.u64()?)?);
                self.reported = BlockSet::new();
            }
            _ => {
                let (id, total) = (CheckpointId::from_u64(f.u64()?)?, f.array::<32>()?);
                if total != *self.hasher.finalize().as_bytes() {
                    return None;
                }
                self.sealed = Some((id, total));
            }
        }
        Some(())
    }
}

/// The open journal of a disk. Records wait in memory for [`Self::sync`].
pub struct OpenJournal {
    state: Journal,
    file: Option<Handle>,
    waiting: Vec<u8>,
    written: u64,
    named: bool,
}

impl OpenJournal {
    /// A journal that has no file yet.
    pub fn new(header: Header) -> Self {
        let head = header.encode();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&head);
        let state = Journal {
            header,
            reported: BlockSet::new(),
            gap: None,
            sealed: None,
            end: head.len() as u64,
            torn: false,
            chain: head.last_chunk().copied().unwrap_or_default(),
            hasher,
        };
        Self { state, file: None, waiting: head, written: 0, named: false }
    }

    /// Goes on with a journal that was found and made durable: cuts its torn tail or a seal that came to nothing, for the
    /// next write must not meet old bytes.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn resume(file: Handle, mut state: Journal) -> Result<Self, StoreError> {
        if state.torn || state.sealed.is_some() {
            file.set_len(state.end)?;
            file.sync()?;
        }
        (state.torn, state.sealed) = (false, None);
        let written = state.end;
        Ok(Self { state, file: Some(file), waiting: Vec::new(), written, named: false })
    }

    /// What the journal says, records that wait included.
    pub fn state(&self) -> &Journal {
        &self.state
    }

    /// Bytes that wait to be written.
    pub fn waiting_bytes(&self) -> u64 {
        self.waiting.len() as u64
    }

    fn push(&mut self, kind: u8, body: &[u8]) {
        let bytes = record(&self.state.chain, kind, body);
        self.state.hasher.update(&bytes);
        self.state.chain = bytes.last_chunk().copied().unwrap_or_default();
        self.state.end += bytes.len() as u64;
        self.waiting.extend(bytes);
    }

    /// Notes changed blocks; they must lie on the disk.
    pub fn changed(&mut self, extents: &[Extent]) {
        for part in extents.chunks(EXTENTS_MAX) {
            let mut body = Vec::with_capacity(part.len() * EXTENT_BYTES);
            for extent in part {
                body.extend(extent.first.to_le_bytes());
                body.extend(extent.count.to_le_bytes());
                self.state.reported.insert(*extent);
            }
            self.push(CHANGED, &body);
        }
    }

    /// Notes a gap: a compare of the whole disk follows, earlier reports count no more.
    pub fn gap(&mut self, gap: Gap) {
        self.push(GAP, &gap.code().to_le_bytes());
        self.state.gap = Some(gap);
        self.state.reported = BlockSet::new();
    }

    /// Writes what waits and makes it durable.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn sync(&mut self, dir: &Dir, owner: &Paths) -> Result<(), StoreError> {
        let file = match self.file.take() {
            Some(file) => file,
            None => dir.create(&owner.next_cst())?,
        };
        let file = self.file.insert(file);
        if !self.waiting.is_empty() {
            file.write(&self.waiting, self.written)?;
            file.sync()?;
            self.written += self.waiting.len() as u64;
            self.waiting.clear();
        }
        if !self.named {
            dir.sync_names(file.path())?;
            self.named = true;
        }
        Ok(())
    }

    /// Cuts off what is not known to be durable, after an error of the file system.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn cut_back(&self) -> Result<(), StoreError> {
        self.file.as_ref().map_or(Ok(()), |file| file.set_len(self.written))
    }

    /// Seals the journal for a checkpoint, durably; returns its total hash.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn seal(&mut self, dir: &Dir, owner: &Paths, id: CheckpointId) -> Result<[u8; 32], StoreError> {
        let total = *self.state.hasher.finalize().as_bytes();
        let body = [id.to_u64().to_le_bytes().as_slice(), &total].concat();
        self.push(SEAL, &body);
        self.sync(dir, owner)?;
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;
    use crate::ids::Epoch;
    use crate::store::simfiles::SimFiles;

    /// Found by fuzzing: the blocks before the impossible ones were taken in.
    #[test]
    fn of_a_record_that_does_not_count_no_block_counts() {
        let owner = Paths::new("agent1".parse().unwrap(), "disk0".parse().unwrap());
        let geometry = Geometry::new(1 << 20, 12).unwrap();
        let header = Header::open(Kind::Journal, &owner, "sda", geometry, Epoch([7; 16]));
        let mut bytes = header.encode();
        let extents = [(3u64, 1u64), (1 << 40, 1)].map(|(first, count)| [first, count].map(u64::to_le_bytes));
        let chain = bytes.last_chunk::<HASH_BYTES>().copied().unwrap();
        bytes.extend(record(&chain, CHANGED, extents.as_flattened().as_flattened()));
        bytes.resize(4096, 0);
        let dir = Dir::new(SimFiles::default().arc());
        let file = dir.create(&owner.next_cst()).unwrap();
        file.write(&bytes, 0).unwrap();
        let journal = read(&file, &owner, None).unwrap().unwrap();
        assert!(journal.reported.is_empty());
        assert_eq!(OpenJournal::resume(file, journal).unwrap().written, HEADER_BYTES as u64);
    }
}
