//! Reading real devices past the page cache. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/mounts.rs"]
mod mounts;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use blxrep::bitmap::Extent;
use blxrep::geometry::Geometry;
use blxrep::reader::{BlockReader, DirectReader, Piece, ReadError, read_pieces};
use mounts::LoopDisk;

fn noise(len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    blake3::Hasher::new().update(b"disk").finalize_xof().fill(&mut data);
    data
}

#[test]
fn blocks_smaller_than_the_sector_are_read_by_whole_sectors() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = LoopDisk::at(&dir.path().join("image"), dir.path(), 4, &[], &["--sector-size", "4096"]);
    let data = noise(4 << 20);
    std::fs::write(&disk.image, &data).unwrap();
    std::fs::File::open(&disk.image).unwrap().sync_all().unwrap();
    let geometry = Geometry::new(4 << 20, 9).unwrap();
    let mut reader = DirectReader::open(&disk.path, geometry).unwrap();
    for (first, count) in [(0, 1), (1, 1), (7, 2), (9, 2048), (8191, 1), (6144, 2048), (6145, 2047)] {
        let (offset, len) = geometry.range(first, count);
        let want = &data[offset as usize..(offset + len) as usize];
        assert!(reader.read(Extent { first, count }).unwrap() == want, "{first}+{count}");
    }
}

#[test]
fn the_page_cache_of_the_device_is_not_asked() {
    let disk = LoopDisk::new(4, &[]);
    let mut reader = DirectReader::open(&disk.path, Geometry::new(4 << 20, 12).unwrap()).unwrap();
    // The old bytes are in the device's cache now; the new ones are only below it.
    let mut old = [1; 4096];
    let cached = OpenOptions::new().read(true).open(&disk.path).unwrap();
    cached.read_exact_at(&mut old, 8192).unwrap();
    let image = OpenOptions::new().write(true).open(&disk.image).unwrap();
    image.write_all_at(&[9; 4096], 8192).unwrap();
    image.sync_all().unwrap();
    cached.read_exact_at(&mut old, 8192).unwrap();
    assert_eq!(old, [0; 4096], "the test is worth nothing if nothing was cached");
    assert_eq!(reader.read(Extent { first: 2, count: 1 }).unwrap(), [9; 4096]);
}

#[test]
fn blocks_that_the_device_cannot_read_are_found_one_by_one() {
    let disk = LoopDisk::new(4, &[]);
    let mut reader = DirectReader::open(&disk.path, Geometry::new(4 << 20, 12).unwrap()).unwrap();
    // Behind the end of its file a loop device answers with an I/O error.
    OpenOptions::new().write(true).open(&disk.image).unwrap().set_len(1000 * 4096).unwrap();
    assert_eq!(reader.read(Extent { first: 990, count: 10 }).unwrap().len(), 40960);
    let error = reader.read(Extent { first: 990, count: 20 }).unwrap_err();
    let ReadError::Unreadable { ref source, .. } = error else { panic!("{error}") };
    assert_eq!(source.raw_os_error(), Some(5), "{error}");
    assert!(error.to_string().contains("blocks 990+20 of /dev/loop"), "{error}");
    let mut pieces = Vec::new();
    let extent = Extent { first: 990, count: 20 };
    read_pieces(&mut reader, extent, &mut || true, &mut |piece| match piece {
        Piece::Data(part, data) => {
            assert_eq!(data.len() as u64, part.count * 4096);
            pieces.push((part.first, part.end(), false));
        }
        Piece::Unreadable(part) => pieces.push((part.first, part.end(), true)),
    })
    .unwrap();
    assert_eq!((pieces.pop(), pieces.last().map(|p| p.1)), (Some((1000, 1010, true)), Some(1000)));
    assert!(pieces.iter().all(|(.., bad)| !bad), "{pieces:?}");
}
