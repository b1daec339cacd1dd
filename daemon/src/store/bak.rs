//! A delta (`docs/FORMAT.md`, "`.bak`"): an append-only log of runs that is sealed with an index and a closing
//! header when its checkpoint is committed.
//!
//! Every record's hash covers the 16 bytes before it, the end of the record before: records cannot change places,
//! and what an earlier life left behind the end cannot come back. What must never happen here: a byte written
//! twice, or a record taken for valid after one that is not.

use std::collections::BTreeSet;

use super::StoreError;
use super::block_map::{BlockMap, Piece};
use super::codec::{Fields, short_hash};
use super::handle::{Dir, Handle};
use super::layout::{HEADER_BYTES, Header, Kind, Paths, SealHash};
use crate::bitmap::{BlockSet, Extent};
use crate::geometry::Geometry;
use crate::hash::{BlockHash, HASH_BYTES, insert_unreadable};
use crate::run::{Encoding, RUN_HEADER_BYTES, RUN_MAX_BYTES, Run};

/// Bytes of a record before the run: magic, length of the run, sequence number.
pub const RECORD_HEADER_BYTES: usize = 16;
/// Bytes of a record's hash, behind the run.
pub const RECORD_HASH_BYTES: usize = 16;
/// Bytes of an entry of the index.
pub const INDEX_ENTRY_BYTES: usize = 24;
const RECORD_MAGIC: [u8; 4] = *b"BLXr";
const START: u64 = HEADER_BYTES as u64;

/// The open delta log of a disk.
pub struct DeltaLog {
    file: Handle,
    header: Header,
    end: u64,
    chain: [u8; RECORD_HASH_BYTES],
    hasher: blake3::Hasher,
    map: BlockMap,
    /// Records that hold blocks that could not be read: seldom any.
    unreadable: BTreeSet<u64>,
    seq: u64,
    durable_seq: u64,
    durable_end: u64,
    dirty: bool,
    named: bool,
}

/// What a pass over a whole delta found.
pub struct Scan {
    /// The opening header.
    pub header: Header,
    /// The closing header and the checkpoint's seal, if the file is sealed and whole.
    pub sealed: Option<(Header, SealHash)>,
    /// Where the newest data of each block lies (layer 0).
    pub map: BlockMap,
    unreadable: BTreeSet<u64>,
    end: u64,
    chain: [u8; RECORD_HASH_BYTES],
    hasher: blake3::Hasher,
    seq: u64,
}

fn record_header(bytes: &[u8]) -> Option<(usize, u64)> {
    let mut f = Fields(bytes);
    let (magic, len, seq) = (f.array::<4>()?, f.u32()? as usize, f.u64()?);
    (magic == RECORD_MAGIC && (RUN_HEADER_BYTES..=RUN_MAX_BYTES).contains(&len)).then_some((len, seq))
}

/// Reads the record at `offset`: its sequence number and run, and all its bytes. `None` if there is no whole one.
fn read_record(
    file: &Handle,
    geometry: Geometry,
    offset: u64,
    file_len: u64,
) -> Result<Option<(u64, Run, Vec<u8>)>, StoreError> {
    let head_end = offset.saturating_add(RECORD_HEADER_BYTES as u64);
    if offset < START || head_end > file_len {
        return Ok(None);
    }
    let lead = file.read_vec(RECORD_HASH_BYTES + RECORD_HEADER_BYTES, offset - RECORD_HASH_BYTES as u64)?;
    let Some((chain, head)) = lead.split_at_checked(RECORD_HASH_BYTES) else { return Ok(None) };
    let Some((len, seq)) = record_header(head) else { return Ok(None) };
    let body_len = len + RECORD_HASH_BYTES;
    if head_end + body_len as u64 > file_len {
        return Ok(None);
    }
    let body = file.read_vec(body_len, head_end)?;
    let Some((run, hash)) = body.split_at_checked(len) else { return Ok(None) };
    if short_hash::<RECORD_HASH_BYTES>(&[chain, head, run]) != hash {
        return Ok(None);
    }
    let Ok(decoded) = Run::decode(run, geometry) else { return Ok(None) };
    let bytes = [head, &body].concat();
    Ok(Some((seq, decoded, bytes)))
}

/// Reads one run of a delta, checked against its record's hash.
///
/// # Errors
/// Damaged if there is no whole record at `offset`.
pub fn read_run(file: &Handle, geometry: Geometry, offset: u64) -> Result<Run, StoreError> {
    let found = read_record(file, geometry, offset, file.len()?)?;
    found
        .map(|(_, run, _)| run)
        .ok_or_else(|| file.damaged(format!("the record at byte {offset} is not what was written")))
}

/// Reads the hashes of `count` blocks, `skip` blocks into the run of the record at `offset`. The record's own hash
/// is looked at only where the record is as short as its header: no changed bit makes zeros of data, and for
/// all else data is checked against these hashes.
///
/// # Errors
/// Damaged if there is no such record.
pub fn read_hashes(
    file: &Handle,
    geometry: Geometry,
    offset: u64,
    skip: u64,
    count: u64,
) -> Result<Vec<BlockHash>, StoreError> {
    let bad = || file.damaged(format!("the record at byte {offset} is not what was written"));
    let head = file.read_vec(RECORD_HEADER_BYTES + RUN_HEADER_BYTES, offset)?;
    let mut f = Fields(&head);
    record_header(f.bytes(RECORD_HEADER_BYTES).ok_or_else(bad)?).ok_or_else(bad)?;
    let (_first, blocks, encoding) =
        (f.u64().ok_or_else(bad)?, u64::from(f.u32().ok_or_else(bad)?), f.u8().ok_or_else(bad)?);
    let wanted = usize::try_from(count).map_err(|_| bad())?;
    if skip.saturating_add(count) > blocks || wanted > RUN_MAX_BYTES {
        return Err(bad());
    }
    if let Some(hash) = Encoding::only_hash_of(encoding) {
        read_run(file, geometry, offset)?;
        return Ok(vec![hash; wanted]);
    }
    let start = offset + (RECORD_HEADER_BYTES + RUN_HEADER_BYTES) as u64 + skip * HASH_BYTES as u64;
    let bytes = file.read_vec(wanted * HASH_BYTES, start)?;
    Ok(bytes.as_chunks::<HASH_BYTES>().0.iter().map(|h| BlockHash(*h)).collect())
}

/// The closing header of a sealed delta, and its seal.
///
/// # Errors
/// Damaged if there is none.
pub fn read_closing(file: &Handle) -> Result<(Header, SealHash), StoreError> {
    let len = file.len()?;
    let at = len.checked_sub(START).filter(|at| *at >= START).ok_or_else(|| file.damaged("cut short"))?;
    let bytes = file.read_vec(HEADER_BYTES, at)?;
    let (header, seal) = Header::decode(Kind::DeltaEnd, &bytes).map_err(|what| file.damaged(what))?;
    let index_end = header.index_count.checked_mul(INDEX_ENTRY_BYTES as u64);
    let index_end = index_end.and_then(|n| n.checked_add(header.index_offset));
    if header.id.is_none() || header.index_offset < START || index_end != Some(at) {
        return Err(file.damaged("its closing header does not fit its length"));
    }
    Ok((header, seal))
}

fn encode_index(map: &BlockMap) -> (Vec<u8>, u64) {
    let mut out = Vec::with_capacity(map.len() * INDEX_ENTRY_BYTES);
    let mut count = 0;
    for piece in map.pieces() {
        // A piece never outgrows its run, and a run's blocks fit 32 bits.
        out.extend(piece.extent.first.to_le_bytes());
        out.extend((piece.extent.count as u32).to_le_bytes());
        out.extend((piece.skip as u32).to_le_bytes());
        out.extend(piece.record.to_le_bytes());
        count += 1;
    }
    (out, count)
}

/// Reads the index of a sealed delta into a map, as layer `layer`.
///
/// # Errors
/// Damaged if the index does not have its hash or holds what is not possible.
pub fn read_index(file: &Handle, closing: &Header, layer: u32) -> Result<BlockMap, StoreError> {
    let bad = |what| file.damaged(what);
    let len = file.len()?;
    let bytes = closing.index_count.checked_mul(INDEX_ENTRY_BYTES as u64).filter(|n| *n < len);
    let bytes = bytes.and_then(|n| usize::try_from(n).ok()).ok_or_else(|| bad("its index is too long"))?;
    let index = file.read_vec(bytes, closing.index_offset)?;
    if *blake3::hash(&index).as_bytes() != closing.index_hash {
        return Err(bad("its index does not have its hash"));
    }
    let (mut map, mut end) = (BlockMap::default(), 0);
    for entry in index.as_chunks::<INDEX_ENTRY_BYTES>().0 {
        let piece = index_entry(entry, layer).ok_or_else(|| bad("its index is cut short"))?;
        let sound = piece.extent.count > 0 && piece.extent.first >= end;
        end = piece.extent.end();
        if !sound || end > closing.geometry.blocks() || piece.record >= closing.index_offset {
            return Err(bad("its index holds what is not possible"));
        }
        map.insert(piece);
    }
    Ok(map)
}

fn index_entry(entry: &[u8], layer: u32) -> Option<Piece> {
    let mut f = Fields(entry);
    let (first, count, skip, record) = (f.u64()?, u64::from(f.u32()?), u64::from(f.u32()?), f.u64()?);
    Some(Piece { extent: Extent { first, count }, skip, layer, seq: 0, record })
}

/// Goes through a whole delta, sealed or not: the valid records from the front, and whether a seal over exactly
/// these closes the file. `tick` is told the bytes of every record, and may end it.
///
/// # Errors
/// Damaged if there is no opening header of this disk; Io; what `tick` says.
pub fn scan<E: From<StoreError>>(
    file: &Handle,
    owner: &Paths,
    tick: &mut dyn FnMut(u64) -> Result<(), E>,
) -> Result<Scan, E> {
    let len = file.len()?;
    let bytes = file.read_vec(HEADER_BYTES, 0)?;
    let (header, seal) = Header::decode(Kind::Delta, &bytes).map_err(|what| file.damaged(what))?;
    if !header.is_of(owner) {
        return Err(file.damaged(format!("it belongs to {}/{}", header.agent, header.disk)).into());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes);
    let chain = seal.last_chunk().copied().unwrap_or_default();
    let (map, unreadable) = (BlockMap::default(), BTreeSet::new());
    let mut scan = Scan { header, sealed: None, map, unreadable, end: START, chain, hasher, seq: 0 };
    while let Some((seq, run, bytes)) = read_record(file, scan.header.geometry, scan.end, len)? {
        scan.add(seq, &run, &bytes);
        tick(bytes.len() as u64)?;
    }
    scan.sealed = scan.closing(file)?;
    Ok(scan)
}

impl Scan {
    fn add(&mut self, seq: u64, run: &Run, bytes: &[u8]) {
        self.map.insert(Piece { extent: run.extent(), skip: 0, layer: 0, seq, record: self.end });
        self.unreadable.extend(run.has_unreadable().then_some(self.end));
        self.hasher.update(bytes);
        self.chain = bytes.last_chunk().copied().unwrap_or_default();
        self.end += bytes.len() as u64;
        self.seq = self.seq.max(seq);
    }

    fn closing(&self, file: &Handle) -> Result<Option<(Header, SealHash)>, StoreError> {
        let (closing, seal) = match read_closing(file) {
            Ok(found) => found,
            Err(StoreError::Damaged(_)) => return Ok(None),
            Err(e) => return Err(e),
        };
        let (index, count) = encode_index(&self.map);
        if (closing.index_offset, closing.index_count) != (self.end, count)
            || file.read_vec(index.len(), self.end)? != index
        {
            return Ok(None);
        }
        let mut hasher = self.hasher.clone();
        hasher.update(&index);
        let open = &self.header;
        let whole = closing.index_hash == *blake3::hash(&index).as_bytes()
            && closing.content == *hasher.finalize().as_bytes()
            && (&closing.agent, &closing.disk) == (&open.agent, &open.disk)
            && (closing.geometry, closing.parent) == (open.geometry, open.parent);
        Ok(whole.then_some((closing, seal)))
    }
}

impl DeltaLog {
    /// Creates the log. Nothing of it is durable before [`Self::sync`].
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn create(dir: &Dir, owner: &Paths, header: Header) -> Result<Self, StoreError> {
        let file = dir.create(&owner.next_bak())?;
        let bytes = header.encode();
        file.write(&bytes, 0)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes);
        Ok(Self {
            file,
            header,
            end: START,
            chain: bytes.last_chunk().copied().unwrap_or_default(),
            hasher,
            map: BlockMap::default(),
            unreadable: BTreeSet::new(),
            seq: 0,
            durable_seq: 0,
            durable_end: START,
            dirty: true,
            named: false,
        })
    }

    /// Goes on with a log that was found and made durable: cuts what is behind the last valid record.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn resume(file: Handle, scan: Scan) -> Result<Self, StoreError> {
        if file.len()? > scan.end {
            file.set_len(scan.end)?;
            file.sync()?;
        }
        let Scan { header, map, unreadable, end, chain, hasher, seq, .. } = scan;
        Ok(Self {
            file,
            header,
            end,
            chain,
            hasher,
            map,
            unreadable,
            seq,
            durable_seq: seq,
            durable_end: end,
            dirty: false,
            // Who opens a store makes the names durable first.
            named: true,
        })
    }

    /// The opening header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file.
    pub fn file(&self) -> &Handle {
        &self.file
    }

    /// Where the newest data of each block lies (layer 0).
    pub fn map(&self) -> &BlockMap {
        &self.map
    }

    /// The blocks whose newest data here is that they could not be read.
    ///
    /// # Errors
    /// Damaged; Io.
    pub fn unreadable(&self) -> Result<BlockSet, StoreError> {
        let mut found = BlockSet::new();
        if self.unreadable.is_empty() {
            return Ok(found);
        }
        for piece in self.map.pieces().filter(|piece| self.unreadable.contains(&piece.record)) {
            let hashes =
                read_hashes(&self.file, self.header.geometry, piece.record, piece.skip, piece.extent.count)?;
            insert_unreadable(piece.extent.first, &hashes, &mut found);
        }
        Ok(found)
    }

    /// The highest sequence number that is durable.
    pub fn durable_seq(&self) -> u64 {
        self.durable_seq
    }

    /// Appends a run whose data was checked.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn append(&mut self, seq: u64, run: &Run) -> Result<u64, StoreError> {
        let mut bytes = Vec::with_capacity(RECORD_HEADER_BYTES + run.encoded_len() + RECORD_HASH_BYTES);
        bytes.extend(RECORD_MAGIC);
        bytes.extend((run.encoded_len() as u32).to_le_bytes());
        bytes.extend(seq.to_le_bytes());
        run.encode(&mut bytes);
        let hash = short_hash::<RECORD_HASH_BYTES>(&[&self.chain, &bytes]);
        bytes.extend(hash);
        self.file.write(&bytes, self.end)?;
        self.hasher.update(&bytes);
        self.map.insert(Piece { extent: run.extent(), skip: 0, layer: 0, seq, record: self.end });
        self.unreadable.extend(run.has_unreadable().then_some(self.end));
        self.chain = hash;
        self.end += bytes.len() as u64;
        self.seq = self.seq.max(seq);
        self.dirty = true;
        Ok(bytes.len() as u64)
    }

    /// Makes the log and its name durable.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn sync(&mut self, dir: &Dir) -> Result<(), StoreError> {
        if self.dirty {
            self.file.sync()?;
            self.dirty = false;
        }
        if !self.named {
            dir.sync_names(self.file.path())?;
            self.named = true;
        }
        (self.durable_seq, self.durable_end) = (self.seq, self.end);
        Ok(())
    }

    /// Cuts off what is not known to be durable, after an error of the file system.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn cut_back(&self) -> Result<(), StoreError> {
        self.file.set_len(if self.named { self.durable_end } else { 0 })
    }

    /// Appends the index and the closing header, `header` with the hashes filled in, and makes all durable.
    ///
    /// # Errors
    /// NoSpace or Io.
    pub fn seal(&mut self, dir: &Dir, mut header: Header) -> Result<(Header, SealHash), StoreError> {
        let (mut tail, count) = encode_index(&self.map);
        self.hasher.update(&tail);
        header.kind = Kind::DeltaEnd;
        header.index_hash = *blake3::hash(&tail).as_bytes();
        header.index_offset = self.end;
        header.index_count = count;
        header.content = *self.hasher.finalize().as_bytes();
        let closing = header.encode();
        tail.extend(&closing);
        self.file.write(&tail, self.end)?;
        self.dirty = true;
        self.sync(dir)?;
        let seal = closing.last_chunk().copied().unwrap_or_default();
        Ok((header, seal))
    }
}
