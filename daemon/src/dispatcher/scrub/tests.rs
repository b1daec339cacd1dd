//! Passes over stores in memory: what is read, what is found, and what a restart knows.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::restore::several_tests::{ReadFiles, Reads, laid};
use crate::restore::{damage_tests, tests as restore_tests};
use crate::store::life_tests::{id, owner};
use crate::store::simfiles::SimFiles;

/// As fast as it can.
const PACE: Pace = Pace { every: Duration::ZERO, rate_bytes: u64::MAX };

fn open(files: Arc<dyn Files>, dir: &TempDir) -> Scrub {
    Scrub::open(files, dir.path().join(FILE), Some(PACE))
}

/// The lines of all damage after a pass.
fn passed(files: Arc<dyn Files>, dir: &TempDir) -> Vec<String> {
    let scrub = open(files, dir);
    scrub.pass(PACE).unwrap();
    assert!(scrub.status().course.is_none() && scrub.status().last.is_some());
    known(&scrub)
}

fn known(scrub: &Scrub) -> Vec<String> {
    scrub.damage().into_iter().flat_map(|(_, _, lines)| lines).collect()
}

fn flip(files: &SimFiles, path: &Path, at: usize) {
    let file = Dir::new(files.arc()).open(path, true).unwrap();
    let byte = file.read_vec(1, at as u64).unwrap()[0];
    file.write(&[byte ^ 1], at as u64).unwrap();
}

#[test]
fn a_pass_reads_every_byte_of_every_disk_once() {
    let (reads, dir) = (Reads::default(), tempfile::tempdir().unwrap());
    for tree in [damage_tests::tree(), restore_tests::tree()] {
        let files = laid(&tree);
        assert_eq!(passed(reads.of(&files), &dir), [""; 0]);
        let read = reads.take();
        for (path, bytes) in &tree {
            let (read, bytes) = (read.get(path).copied().unwrap_or(0), bytes.len() as u64);
            let name = path.display();
            match path.extension().unwrap().to_str().unwrap() {
                // Holes are not read.
                "img" => assert!(read <= bytes && read > 0, "{name}: {read} of {bytes}"),
                // Headers and the end of a delta are looked at to find the chain.
                _ => assert!((bytes..=bytes + 8192).contains(&read), "{name}: {read} of {bytes}"),
            }
        }
    }
}

#[test]
fn a_flipped_byte_of_every_kind_of_file_is_found_until_it_is_put_right() {
    let dir = tempfile::tempdir().unwrap();
    let tree = damage_tests::tree();
    let files = laid(&tree);
    for (path, bytes) in &tree {
        for at in [40, bytes.len() / 2, bytes.len() - 1] {
            flip(&files, path, at);
            let found = passed(files.arc(), &dir);
            let name = path.display().to_string();
            assert!(found.iter().any(|line| line.starts_with(&name)), "byte {at} of {name}: {found:?}");
            assert_eq!(known(&open(files.arc(), &dir)), found, "it is known after a restart");
            flip(&files, path, at);
            assert_eq!(passed(files.arc(), &dir), [""; 0], "byte {at} of {name}");
        }
    }
}

#[test]
fn a_pass_that_is_broken_off_anywhere_goes_on_there_and_forgets_nothing() {
    let tree = restore_tests::tree();
    let files = laid(&tree);
    let image = owner().img(id(0));
    flip(&files, &image, 5);
    let expected = passed(files.arc(), &tempfile::tempdir().unwrap());
    assert!(expected.len() == 1 && expected[0].contains(".img"), "{expected:?}");
    let (mut broken_at, mut went_on) = (0, 0);
    loop {
        let (reads, dir) = (Reads::default(), tempfile::tempdir().unwrap());
        let (count, left) = (reads.clone(), AtomicUsize::new(broken_at));
        let breaks = move |path: &Path, bytes: usize| {
            if left.fetch_sub(1, Ordering::Relaxed) == 0 {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            count.add(path, bytes);
            Ok(())
        };
        let first = open(Arc::new(ReadFiles(files.arc(), Arc::new(breaks))), &dir);
        if first.pass(PACE).is_ok() {
            break;
        }
        first.save();
        let before = reads.take();
        assert_eq!(passed(reads.of(&files), &dir), expected, "broken off at read {broken_at}");
        let again = reads.take();
        let bytes = |reads: &BTreeMap<PathBuf, u64>| reads.get(&image).copied().unwrap_or(0);
        let whole = tree[&image].len() as u64;
        assert!(bytes(&before) + bytes(&again) <= whole + (1 << 20), "at most one group is read again");
        went_on += usize::from(bytes(&before) > 0 && bytes(&again) == 0);
        broken_at += 1;
    }
    assert!(broken_at > 50 && went_on > 10, "{broken_at} times, {went_on} behind the image");
}

#[test]
fn what_the_medium_does_not_give_back_is_damage_and_the_rest_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let tree = restore_tests::tree();
    let files = laid(&tree);
    let (image, delta) = (owner().img(id(0)), owner().bak(id(2)));
    flip(&files, &delta, 1500);
    let bad = image.clone();
    let fails = move |path: &Path, _: usize| {
        if path == bad { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    };
    let found = passed(Arc::new(ReadFiles(files.arc(), Arc::new(fails))), &dir);
    let names = [image, delta].map(|path| path.display().to_string());
    let of = |name: &String| found.iter().filter(|line| line.starts_with(name)).count();
    // The image's two groups, each by itself.
    assert_eq!(names.each_ref().map(of), [2, 1], "{found:?}");
    assert_eq!(found.len(), 3, "{found:?}");
}

#[test]
fn a_header_that_the_medium_does_not_give_back_keeps_no_other_disk_from_being_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let files = laid(&damage_tests::tree());
    let other = Paths::new("agent2".parse().unwrap(), "disk0".parse().unwrap()).bak(id(1));
    flip(&files, &other, 1500);
    let bad = owner().bak(id(1));
    let fails = {
        let bad = bad.clone();
        move |path: &Path, _: usize| {
            if path == bad { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
        }
    };
    let found = passed(Arc::new(ReadFiles(files.arc(), Arc::new(fails))), &dir);
    let names = [bad, other].map(|path| path.display().to_string());
    assert!(found.len() == 2 && found.iter().zip(&names).all(|(l, n)| l.starts_with(n)), "{found:?}");
}

#[test]
fn what_is_gone_meanwhile_is_not_damaged_and_what_is_lost_is() {
    let dir = tempfile::tempdir().unwrap();
    let newest = [owner().bak(id(3)), owner().cst(id(3)), owner().next_cst()];
    let run = |tree: &restore_tests::Tree, goes: &[PathBuf], when: PathBuf| {
        let files = laid(tree);
        let (store, goes) = (Dir::new(files.arc()), goes.to_vec());
        let hook = move |path: &Path, _: usize| {
            if path == when {
                goes.iter().for_each(|path| store.remove(path).unwrap());
            }
            Ok(())
        };
        passed(Arc::new(ReadFiles(files.arc(), Arc::new(hook))), &dir)
    };
    let tree = restore_tests::tree();
    assert_eq!(run(&tree, &newest, owner().cst(id(1))), [""; 0], "a checkpoint that is taken away");
    let lost = run(&tree, &newest[..1], owner().cst(id(1)));
    assert!(lost.len() == 1 && lost[0].contains("missing"), "{lost:?}");
}

#[test]
fn a_chain_that_breaks_is_told_once_where_it_breaks() {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = restore_tests::tree();
    tree.remove(&owner().bak(id(1)));
    let found = passed(laid(&tree).arc(), &dir);
    assert!(found.len() == 1 && found[0].starts_with(&owner().bak(id(1)).display().to_string()), "{found:?}");
    tree.remove(&owner().sum(id(0)));
    assert!(!passed(laid(&tree).arc(), &dir).is_empty(), "nothing hangs together any more");
    assert_eq!(passed(laid(&restore_tests::tree()).arc(), &dir), [""; 0]);
}

#[test]
fn a_stop_ends_it_at_once_and_keeps_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let pace = Pace { every: Duration::from_secs(30 * 86_400), rate_bytes: 1 << 20 };
    let files = laid(&restore_tests::tree());
    let scrub = Arc::new(Scrub::open(files.arc(), dir.path().join(FILE), Some(pace)));
    let running = scrub.start().unwrap().unwrap();
    while scrub.status().course.is_none_or(|course| course.done_bytes == 0) {
        std::thread::yield_now();
    }
    let began = Instant::now();
    running.stop();
    // It waits for less than a second by itself, and else for a processor; the pass would take a month.
    assert!(began.elapsed() < STOP_MAX * 10, "{:?}", began.elapsed());
    let again = Scrub::open(files.arc(), dir.path().join(FILE), Some(pace));
    assert_eq!(again.status().course.unwrap().began_unix_ms, scrub.status().course.unwrap().began_unix_ms);
    assert!(Arc::new(Scrub::open(files.arc(), dir.path().join(FILE), None)).start().unwrap().is_none());
}

#[test]
fn a_record_that_cannot_be_read_begins_anew_and_an_empty_store_has_no_pass() {
    let dir = tempfile::tempdir().unwrap();
    for bad in ["", "{", "{\"pass\":null,\"last\":null,\"damage\":[],\"more\":1}", "[]"] {
        std::fs::write(dir.path().join(FILE), bad).unwrap();
        let scrub = open(SimFiles::default().arc(), &dir);
        assert!(scrub.status().last.is_none() && scrub.damage().is_empty(), "{bad}");
        assert!(!scrub.begin(PACE, &[]).unwrap());
    }
}
