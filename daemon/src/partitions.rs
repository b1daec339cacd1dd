//! The partitions of a disk, from its own table: GPT (UEFI specification 2.10, chapter 5) or MBR with logical partitions,
//! numbered as Linux does. Pure over a function that reads.
//!
//! The table is a guest's and says what it likes. What must never happen here: a partition that does not lie on the disk, a
//! walk without an end, memory without a bound.

/// The largest array of GPT entries that is read; one of 128 entries has 16 KiB.
const ENTRIES_MAX_BYTES: u64 = 1 << 20;
/// The most logical partitions of an MBR that are followed.
const LOGICAL_MAX: u32 = 252;
/// The sectors a disk may count in. A checkpoint does not say which; the place of the GPT does.
const SECTORS_BYTES: [u64; 2] = [512, 4096];
/// An MBR counts in these; of a disk with 4 KiB sectors and an MBR the table is not understood.
const MBR_SECTOR_BYTES: u64 = 512;
const GPT_SIGNATURE: &[u8] = b"EFI PART";
const GPT_HEADER_BYTES: usize = 92;
const GPT_ENTRY_MIN_BYTES: u64 = 128;
/// The type of the partition by which an MBR says that there is a GPT.
const PROTECTIVE: u8 = 0xee;

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its number, as in `sda1`.
    pub number: u32,
    /// Where it begins, in bytes from the beginning of the disk.
    pub first_byte: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its type: a GUID on GPT, such as `0x83` on MBR.
    pub kind: String,
    /// Its name; only on GPT, and there often empty.
    pub name: String,
}

/// A table that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartitionsError<E> {
    /// Reading failed.
    #[error(transparent)]
    Read(E),
    /// There is a GPT, and neither of its two copies is whole.
    #[error("the partition table (GPT) is damaged, and so is its copy at the end of the disk")]
    Damaged,
}

/// The partitions of a disk of `size_bytes`, in the order of the table; none where there is no table. Those that do not lie
/// on the disk are left out. `read` fills the slice from this byte of the disk on; it is never asked for what is
/// not on the disk.
///
/// # Errors
/// What `read` says; Damaged.
pub fn partitions<E>(
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    size_bytes: u64,
) -> Result<Vec<Partition>, PartitionsError<E>> {
    let mut disk = Disk { read: &mut read, size_bytes };
    let Some(records) = disk.boot_record(0)? else { return Ok(Vec::new()) };
    if records.iter().any(|record| record.kind == PROTECTIVE) { disk.gpt() } else { disk.mbr(&records) }
}

struct Disk<'a, R> {
    read: &'a mut R,
    size_bytes: u64,
}

/// One line of an MBR, in sectors.
#[derive(Clone, Copy)]
struct Record {
    kind: u8,
    first: u64,
    count: u64,
}

impl Record {
    fn is_used(&self) -> bool {
        self.kind != 0 && self.count > 0
    }

    fn is_extended(&self) -> bool {
        self.is_used() && matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

impl<E, R: FnMut(u64, &mut [u8]) -> Result<(), E>> Disk<'_, R> {
    /// These bytes; `None` if they are not all on the disk.
    fn bytes(&mut self, offset: u64, len: u64) -> Result<Option<Vec<u8>>, PartitionsError<E>> {
        if len > ENTRIES_MAX_BYTES || offset.checked_add(len).is_none_or(|end| end > self.size_bytes) {
            return Ok(None);
        }
        let mut bytes = vec![0; len as usize];
        (self.read)(offset, &mut bytes).map_err(PartitionsError::Read)?;
        Ok(Some(bytes))
    }

    /// The four lines of a boot record; `None` if it is none (a file system's boot sector is not).
    fn boot_record(&mut self, offset: u64) -> Result<Option<[Record; 4]>, PartitionsError<E>> {
        let Some(sector) = self.bytes(offset, MBR_SECTOR_BYTES)? else { return Ok(None) };
        let record = |at: usize| {
            let line = sector.get(446 + 16 * at..)?.first_chunk::<16>()?;
            let [status, _, _, _, kind, _, _, _, f0, f1, f2, f3, c0, c1, c2, c3] = *line;
            let number = |bytes| u64::from(u32::from_le_bytes(bytes));
            let (first, count) = (number([f0, f1, f2, f3]), number([c0, c1, c2, c3]));
            (status & 0x7f == 0).then_some(Record { kind, first, count })
        };
        if sector.last_chunk::<2>() != Some(&[0x55, 0xaa]) {
            return Ok(None);
        }
        Ok(match (record(0), record(1), record(2), record(3)) {
            (Some(a), Some(b), Some(c), Some(d)) => Some([a, b, c, d]),
            _ => None,
        })
    }

    fn mbr(&mut self, records: &[Record; 4]) -> Result<Vec<Partition>, PartitionsError<E>> {
        let mut found = Vec::new();
        for (record, number) in records.iter().zip(1..) {
            if record.is_used() && !record.is_extended() {
                found.extend(self.on_disk(number, record.first, *record));
            }
        }
        if let Some(extended) = records.iter().find(|record| record.is_extended()) {
            self.logical(extended.first, &mut found)?;
        }
        Ok(found)
    }

    /// Follows the chain of boot records that an extended partition is.
    fn logical(&mut self, start: u64, found: &mut Vec<Partition>) -> Result<(), PartitionsError<E>> {
        let (mut at, mut number) = (start, 5);
        // A chain that goes in circles ends as well.
        for _ in 0..LOGICAL_MAX {
            let Some(records) = self.boot_record(at * MBR_SECTOR_BYTES)? else { break };
            for record in records.iter().filter(|record| record.is_used() && !record.is_extended()) {
                found.extend(self.on_disk(number, at + record.first, *record));
                number += 1;
            }
            let Some(next) = records.iter().find(|record| record.is_extended()) else { break };
            at = start + next.first;
        }
        Ok(())
    }

    fn on_disk(&self, number: u32, first: u64, record: Record) -> Option<Partition> {
        let (kind, name) = (format!("{:#04x}", record.kind), String::new());
        let (first_byte, size_bytes) = (first * MBR_SECTOR_BYTES, record.count * MBR_SECTOR_BYTES);
        (first_byte > 0 && first_byte + size_bytes <= self.size_bytes).then_some(Partition {
            number,
            first_byte,
            size_bytes,
            kind,
            name,
        })
    }

    fn gpt(&mut self) -> Result<Vec<Partition>, PartitionsError<E>> {
        for sector_bytes in SECTORS_BYTES {
            let last = (self.size_bytes / sector_bytes).saturating_sub(1);
            for header in [1, last] {
                if let Some(found) = self.gpt_at(header, sector_bytes)? {
                    return Ok(found);
                }
            }
        }
        Err(PartitionsError::Damaged)
    }

    /// The partitions of the GPT whose header is in this sector; `None` if it is not whole.
    fn gpt_at(&mut self, at: u64, sector_bytes: u64) -> Result<Option<Vec<Partition>>, PartitionsError<E>> {
        let Some(sector) = self.bytes(at * sector_bytes, sector_bytes)? else { return Ok(None) };
        let Some(entries) = entries_of(&sector, at) else { return Ok(None) };
        let Some(offset) = entries.first.checked_mul(sector_bytes) else { return Ok(None) };
        let Some(table) = self.bytes(offset, entries.count * entries.size_bytes)? else { return Ok(None) };
        if crc32fast::hash(&table) != entries.checksum {
            return Ok(None);
        }
        let found = table.chunks(entries.size_bytes as usize).zip(1..);
        Ok(Some(found.filter_map(|(entry, number)| self.gpt_entry(entry, number, sector_bytes)).collect()))
    }

    fn gpt_entry(&self, entry: &[u8], number: u32, sector_bytes: u64) -> Option<Partition> {
        let kind = entry.first_chunk::<16>().filter(|kind| **kind != [0; 16])?;
        let (first, last) = (u64_at(entry, 32)?, u64_at(entry, 40)?);
        let first_byte = first.checked_mul(sector_bytes)?;
        let end = last.checked_add(1)?.checked_mul(sector_bytes)?;
        if first_byte == 0 || end <= first_byte || end > self.size_bytes {
            return None;
        }
        let units = entry.get(56..128)?.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit));
        let name: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        let name = String::from_utf16_lossy(&name).replace(char::is_control, "\u{fffd}");
        Some(Partition { number, first_byte, size_bytes: end - first_byte, kind: guid(kind), name })
    }
}

/// Where a GPT's entries lie, in sectors.
struct Entries {
    first: u64,
    count: u64,
    size_bytes: u64,
    checksum: u32,
}

/// What a header that is whole says; `None` if it is not, or is not meant for this sector.
fn entries_of(sector: &[u8], at: u64) -> Option<Entries> {
    let len = usize::try_from(u32_at(sector, 12)?).ok()?;
    if !sector.starts_with(GPT_SIGNATURE) || len < GPT_HEADER_BYTES || u64_at(sector, 24)? != at {
        return None;
    }
    let mut header = sector.get(..len)?.to_vec();
    header.get_mut(16..20)?.fill(0);
    let (count, size_bytes) = (u64::from(u32_at(sector, 80)?), u64::from(u32_at(sector, 84)?));
    let sound = crc32fast::hash(&header) == u32_at(sector, 16)?;
    let possible = size_bytes >= GPT_ENTRY_MIN_BYTES && count * size_bytes <= ENTRIES_MAX_BYTES;
    let entries = Entries { first: u64_at(sector, 72)?, count, size_bytes, checksum: u32_at(sector, 88)? };
    (sound && possible).then_some(entries)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// A GUID as text: its first three fields are little-endian.
fn guid(bytes: &[u8; 16]) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = *bytes;
    let [i, j, k, l, m, n, o, p] = rest;
    format!(
        "{:08x}-{:04x}-{:04x}-{i:02x}{j:02x}-{k:02x}{l:02x}{m:02x}{n:02x}{o:02x}{p:02x}",
        u32::from_le_bytes([a, b, c, d]),
        u16::from_le_bytes([e, f]),
        u16::from_le_bytes([g, h])
    )
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::io::Write;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;

    const SIZE_BYTES: usize = 32 << 20;

    /// A disk that sfdisk cut into partitions.
    fn cut(script: &str) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE_BYTES as u64).unwrap();
        let mut sfdisk =
            Command::new("sfdisk").arg("-q").arg(file.path()).stdin(Stdio::piped()).spawn().unwrap();
        sfdisk.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        assert!(sfdisk.wait().unwrap().success());
        std::fs::read(file.path()).unwrap()
    }

    fn read(disk: &[u8]) -> Result<Vec<Partition>, PartitionsError<Infallible>> {
        let fill = |offset: u64, into: &mut [u8]| {
            into.copy_from_slice(&disk[offset as usize..][..into.len()]);
            Ok(())
        };
        partitions(fill, disk.len() as u64)
    }

    fn places(disk: &[u8]) -> Vec<(u32, u64, u64)> {
        let found = read(disk).unwrap();
        found.iter().map(|p| (p.number, p.first_byte / 512, p.size_bytes / 512)).collect()
    }

    #[test]
    fn a_gpt_is_read_and_its_copy_where_it_is_damaged() {
        let script =
            "label: gpt\nstart=2048, size=4096, name=\"root\"\n5: start=8192, size=2047, type=swap\n";
        let mut disk = cut(script);
        let found = read(&disk).unwrap();
        assert_eq!(places(&disk), [(1, 2048, 4096), (5, 8192, 2047)]);
        assert_eq!((found[0].name.as_str(), found[1].name.as_str()), ("root", ""));
        assert_eq!(found[1].kind, "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f");
        for damaged in [512 + 60, 1024 + 40] {
            disk[damaged] ^= 1;
            assert_eq!(read(&disk).unwrap(), found);
        }
        disk[SIZE_BYTES - 512 + 60] ^= 1;
        assert_eq!(read(&disk), Err(PartitionsError::Damaged));
    }

    #[test]
    fn an_mbr_is_read_with_its_logical_partitions() {
        let script = "label: dos\nstart=2048, size=2048\nstart=6144, size=20480, type=5\n\
                      start=8192, size=1024\nstart=12288, size=1000, type=82\n";
        let mut disk = cut(script);
        assert_eq!(places(&disk), [(1, 2048, 2048), (5, 8192, 1024), (6, 12288, 1000)]);
        assert_eq!(read(&disk).unwrap()[2].kind, "0x82");
        // The second boot record of the chain names the first one as its next.
        let second = disk.windows(2).enumerate().filter(|(at, w)| at % 512 == 510 && *w == [0x55, 0xaa]);
        let second = second.map(|(at, _)| at - 510).nth(2).unwrap();
        disk[second + 446 + 16..second + 446 + 32].copy_from_slice(&{
            let mut line = [0; 16];
            (line[4], line[12]) = (5, 1);
            line
        });
        assert_eq!(places(&disk).len() as u32, 1 + LOGICAL_MAX, "a circle ends");
    }

    #[test]
    fn what_does_not_lie_on_the_disk_is_left_out_and_no_table_is_none() {
        let mut disk = cut("label: dos\nstart=2048, size=2048\nstart=6144, size=2048\n");
        disk[446 + 16 + 12..446 + 16 + 16].fill(0xff);
        assert_eq!(places(&disk), [(1, 2048, 2048)]);
        // A file system's boot sector ends in the same two bytes.
        disk[446] = 0x41;
        assert!(places(&disk).is_empty());
        assert!(places(&vec![0; 1 << 20]).is_empty() && places(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_a_table_says_it_is_read_within_the_disk(
            at in proptest::collection::vec((0usize..20_000, any::<u8>()), 1..40), gpt in any::<bool>()
        ) {
            let mut disk = vec![0; 1 << 20];
            disk[510..512].copy_from_slice(&[0x55, 0xaa]);
            disk[450] = if gpt { PROTECTIVE } else { 5 };
            disk[512..520].copy_from_slice(GPT_SIGNATURE);
            at.into_iter().for_each(|(at, byte)| disk[if gpt { 512 + at } else { 446 + at % 64 }] = byte);
            for found in read(&disk).unwrap_or_default() {
                prop_assert!(found.first_byte + found.size_bytes <= disk.len() as u64);
            }
        }
    }
}
