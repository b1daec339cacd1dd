//! Reading at any place gives what a restore gives, or says which file is damaged.

use proptest::prelude::*;

use super::StoreError;
use super::bak::{self, RECORD_HEADER_BYTES};
use super::disk_store::DiskStore;
use super::handle::Dir;
use super::life_tests::{self, Acks, live, owner};
use super::simfiles::SimFiles;
use super::unreadable_tests as unreadable;
use super::view::View;
use crate::checkpoint::chain;
use crate::restore::verify;

/// The files of a whole life: sizes change, blocks are A, B, A, and some are zeros now and then.
fn life() -> SimFiles {
    let files = SimFiles::default();
    let mut store = DiskStore::open(files.arc(), owner().agent, owner().disk).unwrap();
    live(&mut store, &mut Acks::default()).unwrap();
    files
}

fn views(files: &SimFiles, owner: &super::layout::Paths) -> Vec<View> {
    let dir = Dir::new(files.arc());
    let found = chain::load(&dir, owner).unwrap();
    (1..=found.members.len()).map(|count| verify::view(&dir, owner, &found, count).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn every_range_of_every_checkpoint_is_what_was_on_the_disk(
        ranges in proptest::collection::vec((any::<proptest::sample::Index>(), 0usize..300_000), 1..20)
    ) {
        let lives = [
            (views(&life(), &owner()), life_tests::version as fn(usize) -> Vec<u8>),
            (views(&unreadable::files(), &owner()), unreadable::version),
        ];
        for (views, version) in lives {
            for (n, view) in views.iter().enumerate() {
                let disk = version(n);
                for (at, len) in &ranges {
                    let at = at.index(disk.len());
                    let mut found = vec![0x5a; (*len).min(disk.len() - at)];
                    view.read_at(at as u64, &mut found).unwrap();
                    prop_assert!(found == disk[at..at + found.len()], "{} bytes from {at} of checkpoint {n}", found.len());
                }
            }
        }
    }
}

#[test]
fn threads_that_read_at_once_disturb_nobody() {
    let views = views(&life(), &owner());
    let (view, disk) = (&views[3], life_tests::version(3));
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let disk = &disk;
            scope.spawn(move || {
                for step in 0..200 {
                    let at = (step * 7919 + thread * 104_729) * 37 % (disk.len() - 5000);
                    let mut found = vec![0; 5000];
                    view.read_at(at as u64, &mut found).unwrap();
                    assert!(found == disk[at..at + 5000], "{at}");
                }
            });
        }
    });
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    let views = views(&life(), &owner());
    let size = life_tests::version(0).len() as u64;
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX, 0)] {
        let found = views[0].read_at(offset, &mut vec![0; len]);
        assert!(matches!(found, Err(StoreError::Refused(_))), "{len} bytes from {offset}");
    }
    views[0].read_at(size, &mut []).unwrap();
    views[0].read_at(size - 1, &mut [0]).unwrap();
}

#[test]
fn damage_is_found_where_it_is_read_and_only_there() {
    let files = life();
    let dir = Dir::new(files.arc());
    let img = dir.open(&owner().img(life_tests::id(0)), true).unwrap();
    img.write(&[0xff], 9).unwrap();
    let views = views(&files, &owner());
    let mut block = vec![0; 1 << 16];
    for view in &views {
        let Err(StoreError::Damaged(damage)) = view.read_at(100, &mut [0; 10]) else { panic!("not found") };
        assert_eq!(damage.file, owner().img(life_tests::id(0)).display().to_string());
        view.read_at(2 << 16, &mut block).unwrap();
    }
    // A delta that goes away after it was opened is an error, never other bytes.
    dir.remove(&owner().bak(life_tests::id(3))).unwrap();
    let read = views[3].read_at(2 << 16, &mut block);
    assert!(
        read.is_ok() && block == life_tests::version(3)[2 << 16..3 << 16]
            || matches!(read, Err(StoreError::Damaged(_)))
    );
}

#[test]
fn a_group_of_zeros_is_known_without_its_data() {
    let views = views(&life(), &owner());
    for (n, view) in views.iter().enumerate() {
        for (group, bytes) in life_tests::version(n).chunks(1 << 20).enumerate() {
            assert_eq!(view.is_zero(group as u64).unwrap(), bytes.iter().all(|b| *b == 0), "{n} {group}");
        }
    }
}

/// An export tells its client of zeros, and they are never read.
#[test]
fn no_changed_encoding_of_a_record_makes_zeros_of_data() {
    const ENCODING_AT: u64 = RECORD_HEADER_BYTES as u64 + 12;
    let files = life();
    let dir = Dir::new(files.arc());
    let mut tried = 0;
    for n in 1..chain::load(&dir, &owner()).unwrap().members.len() {
        let file = dir.open(&owner().bak(life_tests::id(n)), true).unwrap();
        let closing = bak::read_closing(&file).unwrap().0;
        let disk = life_tests::version(n);
        for piece in bak::read_index(&file, &closing, 0).unwrap().pieces() {
            let group = piece.extent.first / closing.geometry.group_blocks();
            let zeros = disk.chunks(1 << 20).nth(group as usize).is_none_or(|of| of.iter().all(|b| *b == 0));
            let was = file.read_vec(1, piece.record + ENCODING_AT).unwrap();
            for encoding in 0..4 {
                file.write(&[encoding], piece.record + ENCODING_AT).unwrap();
                let said = views(&files, &owner())[n].is_zero(group);
                assert!(
                    said.is_err() || said.unwrap() == zeros,
                    "checkpoint {n}, encoding {encoding} at {}",
                    piece.record
                );
                tried += 1;
            }
            file.write(&was, piece.record + ENCODING_AT).unwrap();
        }
    }
    assert!(tried > 40, "{tried}");
}
