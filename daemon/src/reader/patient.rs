//! Reading around blocks that the disk cannot read: pure, over a [`BlockReader`].
//!
//! An extent that cannot be read is halved until the bad blocks are known one by one. What must never happen here: a
//! block passed over in silence, or a disk that is gone taken for one with bad blocks.

use super::{BlockReader, ReadError};
use crate::bitmap::Extent;

/// A part of what was to be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Blocks and their bytes.
    Data(Extent, &'a [u8]),
    /// Blocks that cannot be read.
    Unreadable(Extent),
}

/// Reads an extent and hands it over in pieces, in order and without a hole. Each attempt at a bad block can take a
/// dying disk many seconds: before each but the first, `go_on` is asked.
///
/// # Errors
/// GaveUp when `go_on` said no; whatever is no bad block. Pieces that were handed over are to be thrown away then.
pub fn read_pieces(
    reader: &mut dyn BlockReader,
    extent: Extent,
    go_on: &mut dyn FnMut() -> bool,
    take: &mut dyn FnMut(Piece<'_>),
) -> Result<(), ReadError> {
    let mut bad = Extent { first: extent.first, count: 0 };
    let flush = |bad: Extent, take: &mut dyn FnMut(Piece<'_>)| {
        if bad.count > 0 {
            take(Piece::Unreadable(bad));
        }
    };
    let mut rest = vec![extent];
    while let Some(part) = rest.pop() {
        if part != extent && !go_on() {
            return Err(ReadError::GaveUp { first: part.first, count: part.count });
        }
        match reader.read(part) {
            Ok(data) => {
                flush(bad, take);
                take(Piece::Data(part, data));
                bad = Extent { first: part.end(), count: 0 };
            }
            Err(ReadError::Unreadable { .. }) if part.count > 1 => {
                let half = part.count / 2;
                rest.push(Extent { first: part.first + half, count: part.count - half });
                rest.push(Extent { first: part.first, count: half });
            }
            Err(ReadError::Unreadable { .. }) => bad.count += part.count,
            Err(error) => return Err(error),
        }
    }
    flush(bad, take);
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bitmap::BlockSet;
    use proptest::prelude::*;

    /// A disk in memory of which some blocks cannot be read, and that counts its reads.
    pub(crate) struct BadDisk<'a> {
        pub(crate) data: &'a [u8],
        pub(crate) block_bytes: usize,
        pub(crate) bad: &'a BlockSet,
        pub(crate) reads: usize,
    }

    impl BlockReader for BadDisk<'_> {
        fn read(&mut self, extent: Extent) -> Result<&[u8], ReadError> {
            self.reads += 1;
            let Extent { first, count } = extent;
            if (first..extent.end()).any(|block| self.bad.contains(block)) {
                let source = std::io::Error::from_raw_os_error(libc::EIO);
                return Err(ReadError::Unreadable { device: "/dev/bad".into(), first, count, source });
            }
            let (start, end) = (first as usize * self.block_bytes, extent.end() as usize * self.block_bytes);
            Ok(&self.data[start..end.min(self.data.len())])
        }
    }

    fn set(blocks: &[u64]) -> BlockSet {
        blocks.iter().map(|first| Extent { first: *first, count: 1 }).collect()
    }

    #[test]
    fn bad_blocks_are_found_by_halving_and_joined() {
        let (data, bad) = (vec![1; 256 * 512], set(&[7, 8, 9, 255]));
        let mut disk = BadDisk { data: &data, block_bytes: 512, bad: &bad, reads: 0 };
        let mut found = Vec::new();
        read_pieces(&mut disk, Extent { first: 0, count: 256 }, &mut || true, &mut |piece| {
            if let Piece::Unreadable(extent) = piece {
                found.push((extent.first, extent.count));
            }
        })
        .unwrap();
        assert_eq!(found, [(7, 3), (255, 1)]);
        assert!(disk.reads < 50, "{} reads", disk.reads);
    }

    #[test]
    fn it_ends_when_it_is_told_to_and_never_asks_of_a_good_disk() {
        let (data, bad) = (vec![1; 256 * 512], set(&[200]));
        let mut disk = BadDisk { data: &data, block_bytes: 512, bad: &bad, reads: 0 };
        let mut left = 3;
        let mut go_on = || {
            left -= 1;
            left >= 0
        };
        let gave_up = read_pieces(&mut disk, Extent { first: 0, count: 256 }, &mut go_on, &mut |_| {});
        assert!(matches!(gave_up, Err(ReadError::GaveUp { .. })));
        assert_eq!(disk.reads, 4);
        let never = &mut || panic!("asked");
        read_pieces(&mut disk, Extent { first: 0, count: 200 }, never, &mut |_| {}).unwrap();
    }

    #[test]
    fn a_disk_that_is_gone_has_no_bad_blocks() {
        struct Gone;
        impl BlockReader for Gone {
            fn read(&mut self, extent: Extent) -> Result<&[u8], ReadError> {
                let source = std::io::Error::from_raw_os_error(libc::ENODEV);
                let Extent { first, count } = extent;
                Err(ReadError::Failed { device: "/dev/gone".into(), first, count, source })
            }
        }
        let read =
            read_pieces(&mut Gone, Extent { first: 0, count: 9 }, &mut || true, &mut |_| panic!("piece"));
        assert!(matches!(read, Err(ReadError::Failed { .. })));
    }

    proptest! {
        #[test]
        fn pieces_are_the_extent_without_a_hole(
            bad in proptest::collection::btree_set(0u64..90, 0..40), first in 0u64..60, count in 1u64..30
        ) {
            let data: Vec<u8> = (0..90 * 512).map(|i| (i / 512) as u8).collect();
            let bad: BlockSet = set(&bad.into_iter().collect::<Vec<_>>());
            let mut disk = BadDisk { data: &data, block_bytes: 512, bad: &bad, reads: 0 };
            let (mut next, mut found, mut was_bad) = (first, BlockSet::new(), false);
            let extent = Extent { first, count };
            read_pieces(&mut disk, extent, &mut || true, &mut |piece| {
                let (part, is_bad) = match piece {
                    Piece::Data(part, bytes) => {
                        assert!(bytes == &data[part.first as usize * 512..part.end() as usize * 512]);
                        (part, false)
                    }
                    Piece::Unreadable(part) => (part, true),
                };
                assert!(part.count > 0 && part.first == next && !(is_bad && was_bad));
                (next, was_bad) = (part.end(), is_bad);
                if is_bad { found.insert(part); }
            }).unwrap();
            prop_assert_eq!(next, first + count);
            let mut want = bad.clone();
            want.remove(Extent { first: 0, count: first });
            want.remove(Extent { first: first + count, count: 90 });
            prop_assert_eq!(found, want);
        }
    }
}
