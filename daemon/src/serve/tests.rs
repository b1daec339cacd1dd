//! A client of the served image in memory: what it asks for comes, what it must not ask for is refused, and garbage
//! ends its connection and nothing else.

use std::io::{self, Cursor, Read, Write};

use nix::errno::Errno;
use proptest::prelude::*;

use super::connection::{ClientError, talk};
use super::image::Image;
use crate::restore::{Opened, tests::laid_open};

/// A client that has said everything already; what it is answered is kept.
struct Script {
    said: Cursor<Vec<u8>>,
    heard: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.said.read(into)
    }
}

impl Write for Script {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.heard.extend(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a client hears that says this.
fn hear(image: &Image, said: Vec<u8>) -> (Result<(), ClientError>, Vec<u8>) {
    let mut script = Script { said: Cursor::new(said), heard: Vec::new() };
    let end = talk(&mut script, image, |_| Ok(()));
    (end, script.heard)
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &number.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn request(flags: u16, kind: u16, offset: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
    out.extend([flags.to_be_bytes(), kind.to_be_bytes()].concat());
    out.extend(7u64.to_be_bytes());
    out.extend(offset.to_be_bytes());
    out.extend(len.to_be_bytes());
    out.extend(payload);
    out
}

/// Flags, EXPORT_NAME without a name, and the answer's bytes.
const BEGIN: [u8; 4] = [0, 0, 0, 3];
const GREETED_BYTES: usize = 18 + 10;

fn begin() -> Vec<u8> {
    [BEGIN.as_slice(), &option(1, b"")].concat()
}

fn simple(error: u32, data: &[u8]) -> Vec<u8> {
    [0x6744_6698u32.to_be_bytes().as_slice(), &error.to_be_bytes(), &7u64.to_be_bytes(), data].concat()
}

fn opened(n: usize) -> (tempfile::TempDir, Opened, Vec<u8>) {
    laid_open(n)
}

fn writable(n: usize) -> (tempfile::TempDir, Image, Vec<u8>) {
    let (dir, opened, disk) = opened(n);
    (dir, Image::writable(opened, tempfile::tempfile().unwrap()).unwrap(), disk)
}

#[test]
fn a_client_reads_what_is_on_the_disk_and_no_more() {
    let (_dir, opened, disk) = opened(3);
    let image = Image::read_only(opened);
    let size = disk.len() as u64;
    let said = [
        begin(),
        request(0, 0, 70_000, 200_000, b""),
        request(0, 0, size - 1, 1, b""),
        request(0, 0, size - 1, 2, b""),
        request(0, 0, u64::MAX, 2, b""),
        request(0, 0, 0, 0, b""),
        request(0, 0, 0, 33 << 20, b""),
        request(4, 0, 0, 1, b""),
        request(0, 99, 0, 1, b""),
        request(0, 7, 0, 1, b""),
        request(0, 3, 0, 0, b""),
        request(0, 2, 0, 0, b""),
        b"behind the end".to_vec(),
    ];
    let (end, heard) = hear(&image, said.concat());
    end.unwrap();
    let mut want = b"NBDMAGICIHAVEOPT\x00\x03".to_vec();
    want.extend(size.to_be_bytes());
    want.extend([1, 3]);
    want.extend(simple(0, &disk[70_000..270_000]));
    want.extend(simple(0, &disk[disk.len() - 1..]));
    for error in [22, 22, 0, 75, 22, 22, 22, 0] {
        want.extend(simple(error, b""));
    }
    assert!(heard == want);
}

#[test]
fn a_read_only_export_takes_no_write_and_goes_on() {
    let (_dir, opened, disk) = opened(0);
    let image = Image::read_only(opened);
    let said = [
        begin(),
        request(0, 1, 0, 5, b"hello"),
        request(0, 6, 0, 5, b""),
        request(0, 0, 0, 5, b""),
        request(0, 2, 0, 0, b""),
    ];
    let (end, heard) = hear(&image, said.concat());
    end.unwrap();
    let want = [simple(1, b""), simple(1, b""), simple(0, &disk[..5])].concat();
    assert_eq!(&heard[GREETED_BYTES..], want);
}

#[test]
fn structured_answers_name_zeros_and_the_ranges_that_are() {
    let (_dir, opened, disk) = opened(2);
    let image = Image::read_only(opened);
    let context =
        [0u32.to_be_bytes().as_slice(), &1u32.to_be_bytes(), &15u32.to_be_bytes(), b"base:allocation"]
            .concat();
    let go = [0u32.to_be_bytes().as_slice(), &1u16.to_be_bytes(), &3u16.to_be_bytes()].concat();
    // Blocks 6 to 15 are zeros in every version.
    let said = [
        BEGIN.to_vec(),
        option(10, &context),
        option(8, b""),
        option(10, &context),
        option(7, &go),
        request(0, 0, 6 << 16, 1 << 16, b""),
        request(0, 0, 2 << 16, 512, b""),
        request(8, 7, 0, disk.len() as u32, b""),
        request(0, 7, 0, 0, b""),
        request(0, 2, 0, 0, b""),
    ];
    let (end, heard) = hear(&image, said.concat());
    end.unwrap();
    let has = |what: &[u8]| heard.windows(what.len()).any(|window| window == what);
    let reply = |option: u32, kind: u32, len: u32| {
        [
            0x0003_e889_0455_65a9u64.to_be_bytes().as_slice(),
            &option.to_be_bytes(),
            &kind.to_be_bytes(),
            &len.to_be_bytes(),
        ]
        .concat()
    };
    assert!(has(&reply(10, (1 << 31) + 3, 0)), "no context before structured answers");
    assert!(has(&reply(10, 4, 19)) && has(&reply(7, 3, 12)) && has(&reply(7, 3, 14)) && has(&reply(7, 1, 0)));
    let chunk = |flags: u16, kind: u16, data: &[u8]| {
        let mut out = 0x668e_33efu32.to_be_bytes().to_vec();
        out.extend([flags.to_be_bytes(), kind.to_be_bytes()].concat());
        out.extend(7u64.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        out
    };
    let hole = [(6u64 << 16).to_be_bytes().as_slice(), &(1u32 << 16).to_be_bytes()].concat();
    assert!(has(&[chunk(0, 2, &hole), chunk(1, 0, b"")].concat()));
    let data = [(2u64 << 16).to_be_bytes().as_slice(), &disk[2 << 16..][..512]].concat();
    assert!(has(&[chunk(0, 1, &data), chunk(1, 0, b"")].concat()));
    let status = [1u32.to_be_bytes(), (disk.len() as u32).to_be_bytes(), [0; 4]].concat();
    assert!(has(&chunk(1, 5, &status)));
    assert!(has(&chunk(1, (1 << 15) + 1, &[0, 0, 0, 22, 0, 0])));
}

#[test]
fn one_who_speaks_something_else_is_let_go() {
    let (_dir, opened, _) = opened(0);
    let image = Image::read_only(opened);
    let named = option(1, b"other");
    let long = option(1, &[b'x'; 5000]);
    for (said, what) in [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "another protocol"),
        (vec![0, 0, 0, 0], "the oldest style"),
        ([BEGIN.as_slice(), b"IHAVEOPTx"].concat(), "cut short"),
        ([BEGIN.as_slice(), &[0; 16]].concat(), "another magic"),
        ([BEGIN.as_slice(), &named].concat(), "an export by name"),
        ([BEGIN.as_slice(), &long].concat(), "a long name"),
        ([BEGIN.to_vec(), option(99, b"").repeat(100)].concat(), "options without end"),
        ([begin(), vec![0; 28]].concat(), "no request"),
        ([begin(), request(0, 1, 0, 33 << 20, b"")].concat(), "a write that is too large"),
    ] {
        assert!(hear(&image, said).0.is_err(), "{what}");
    }
}

#[test]
fn what_is_written_is_read_again_and_nothing_else_changes() {
    let (dir, image, disk) = writable(3);
    let before = tree(dir.path());
    let mut want = disk.clone();
    let writes = [(100, 50), (65_530, 12), (3 << 16, 1 << 16), (disk.len() - 3, 3), (9, 0), (0, 300_000)];
    for (n, (at, len)) in writes.into_iter().enumerate() {
        let data = vec![n as u8 + 0x80; len];
        image.write_at(at as u64, &data).unwrap();
        want[at..at + len].copy_from_slice(&data);
        let (skip, zeros) = (len / 3, len / 2);
        image.write_zeros((at + skip) as u64, zeros as u64).unwrap();
        want[at + skip..at + skip + zeros].fill(0);
        let mut found = vec![0; disk.len()];
        image.read_at(0, &mut found).unwrap();
        assert!(found == want, "{at} {len}");
    }
    assert!(!image.is_zero_mib(0).unwrap());
    let size = disk.len() as u64;
    assert_eq!(image.write_at(size - 1, &[0; 2]), Err(Errno::EINVAL));
    assert_eq!(image.write_zeros(u64::MAX, 2), Err(Errno::EINVAL));
    assert_eq!(tree(dir.path()), before, "the store is as it was");
}

/// Every file below a directory, with its content.
fn tree(dir: &std::path::Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(tree(&path));
        } else {
            found.push((path.clone(), std::fs::read(path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn a_full_overlay_is_no_space_and_what_was_there_stays() {
    let (_dir, opened, disk) = opened(0);
    let full = std::fs::File::options().read(true).write(true).open("/dev/full").unwrap();
    assert!(Image::writable(opened, full).is_err(), "only a regular file");
    let (_dir, image, _) = writable(0);
    let said = [begin(), request(0, 1, disk.len() as u64 - 2, 5, b"hello"), request(0, 2, 0, 0, b"")];
    let (end, heard) = hear(&image, said.concat());
    end.unwrap();
    assert_eq!(&heard[GREETED_BYTES..], simple(28, b""), "a write behind the end");
}

#[test]
fn damage_is_an_error_of_that_read_only() {
    let (dir, opened, disk) = opened(0);
    let image = Image::read_only(opened);
    let img = tree(dir.path())
        .into_iter()
        .find(|(path, _)| path.extension().is_some_and(|e| e == "img"))
        .unwrap()
        .0;
    let mut bytes = std::fs::read(&img).unwrap();
    bytes[5] ^= 1;
    std::fs::write(&img, bytes).unwrap();
    let said = [begin(), request(0, 0, 0, 9, b""), request(0, 0, 2 << 16, 9, b""), request(0, 2, 0, 0, b"")];
    let (end, heard) = hear(&image, said.concat());
    end.unwrap();
    assert_eq!(&heard[GREETED_BYTES..], [simple(5, b""), simple(0, &disk[2 << 16..][..9])].concat());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn whatever_a_client_says_it_ends_and_harms_nothing(
        parts in proptest::collection::vec(prop_oneof![
            (any::<u32>().prop_map(|n| n % 12), proptest::collection::vec(any::<u8>(), 0..40)).prop_map(|(n, d)| option(n, &d)),
            (0u16..20, 0u16..9, prop_oneof![0u64..(3 << 20), any::<u64>()], prop_oneof![0u32..100_000, any::<u32>()])
                .prop_map(|(f, k, o, l)| request(f, k, o, l, b"")),
            proptest::collection::vec(any::<u8>(), 0..60),
        ], 0..12),
        begins in any::<bool>(), structured in any::<bool>()
    ) {
        let (dir, image, _) = writable(1);
        let before = tree(dir.path());
        let mut said = if structured { [BEGIN.to_vec(), option(8, b"")].concat() } else { BEGIN.to_vec() };
        if begins { said.extend(option(1, b"")); }
        said.extend(parts.concat());
        let _ = hear(&image, said);
        prop_assert!(tree(dir.path()) == before);
    }
}
