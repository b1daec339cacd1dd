//! Checkpoints mounted and exported from a data directory: what other programs read is what a restore brings back.
//! Needs root for the loop devices, /dev/fuse, and nbdcopy, nbdinfo and qemu-img.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod chain;
    pub(crate) mod lab;
    pub(crate) mod store;
}

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::chain::Chain;
use common::lab::{BLXREP, Lab, run, wait_for};
use common::store::{AGENT, PART1, PART2, PART3, SIZE_MIB, Store, Umount, noise};

/// The plainest of clients.
struct Client<S>(S);

impl<S: Read + Write> Client<S> {
    fn begin(mut stream: S) -> Self {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert!(greeting.starts_with(b"NBDMAGICIHAVEOPT"));
        // The export without a name, and no zeros behind the answer.
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        Self(stream)
    }

    /// What is read, or the error's number.
    fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        let words =
            [&0x2560_9513u32.to_be_bytes()[..], &[0; 4], &offset.to_le_bytes(), &offset.to_be_bytes()];
        self.0.write_all(&[&words.concat()[..], &len.to_be_bytes()].concat()).unwrap();
        let mut head = [0; 16];
        self.0.read_exact(&mut head).unwrap();
        assert_eq!((&head[..4], &head[8..]), (&0x6744_6698u32.to_be_bytes()[..], &offset.to_le_bytes()[..]));
        match u32::from_be_bytes(head[4..8].try_into().unwrap()) {
            0 => {
                let mut data = vec![0; len as usize];
                self.0.read_exact(&mut data).unwrap();
                Ok(data)
            }
            error => Err(error),
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn every_export_is_what_a_restore_brings_back() {
    let store = Store::new("export");
    let copy = store.lab.path("copied.img");
    for n in 0..3 {
        let restored = store.restored(n);
        let (mut process, uri, socket) = store.export(n, &[]);
        assert_eq!(run("nbdinfo", &["--size", &uri]), (SIZE_MIB << 20).to_string());
        assert_eq!(run("nbdinfo", &["--is", "read-only", &uri]), "");
        run("nbdcopy", &[&uri, &copy]);
        assert!(fs::read(&copy).unwrap() == store.disks[n], "nbdcopy of {n}");
        fs::remove_file(&copy).unwrap();
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &restored]);
        let map = run("nbdinfo", &["--map", &uri]);
        assert!(map.contains("zero") && map.contains("data"), "{map}");
        process.signal("TERM");
        assert_eq!(process.exit_code(20), 0);
        assert!(!socket.exists(), "the socket is left behind");
    }
}

#[test]
fn an_export_can_be_converted_to_qcow2_and_written_to_without_a_trace() {
    let store = Store::new("writable");
    let (mut process, uri, socket) = store.export(2, &["--writable"]);
    let qcow2 = store.lab.path("web1.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, &qcow2]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, &qcow2]);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 0x77 5000 70000", "-c", "write -z 1M 64k", "-c", "flush", &uri],
    );
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x77 5000 70000", "-c", "read -P 0 1M 64k", &uri]);
    let differs =
        Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2", &uri, &qcow2]).output();
    assert_eq!(differs.unwrap().status.code(), Some(1));
    process.signal("INT");
    assert_eq!((process.exit_code(20), socket.exists()), (0, false));
    store.restored(2);
    run(BLXREP, &store.args("verify", "latest"));
}

#[test]
fn a_mount_has_the_disk_and_its_partitions_which_can_be_mounted() {
    let store = Store::new("mount");
    let (dir, part) = (store.lab.path("mnt"), store.lab.path("part"));
    fs::create_dir_all(&dir).unwrap();
    fs::create_dir_all(&part).unwrap();
    let _umount = Umount(&dir);
    for (n, content) in [(0, "one"), (1, "two"), (2, "two")] {
        let mut process =
            store.start(&[store.args("mount", &store.ids[n]), vec![&dir]].concat(), "is mounted");
        let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["disk.img", "part1.img", "part2.img", "part3.img"]);
        let disk = &store.disks[n];
        assert!(fs::read(format!("{dir}/disk.img")).unwrap() == *disk);
        for (name, (at, len)) in [("part1", PART1), ("part2", PART2), ("part3", PART3)] {
            assert!(fs::read(format!("{dir}/{name}.img")).unwrap() == disk[at..at + len], "{name} of {n}");
        }
        assert!(fs::File::options().write(true).open(format!("{dir}/disk.img")).is_err());
        assert!(fs::write(format!("{dir}/new"), "x").is_err());

        run("mount", &["-o", "loop,ro", &format!("{dir}/part1.img"), &part]);
        let _umount = Umount(&part);
        assert_eq!(fs::read_to_string(format!("{part}/which")).unwrap(), content);
        process.signal("INT");
        wait_for("the mount to say that it is in use", 20, || process.log().contains("is in use"));
        assert_eq!(fs::read_to_string(format!("{part}/which")).unwrap(), content, "it goes on");
        run("umount", &[&part]);
        // The loop device is let go of a moment later.
        wait_for("the mount to end", 20, || {
            process.signal("INT");
            std::thread::sleep(Duration::from_millis(200));
            process.child.try_wait().unwrap().is_some()
        });
        assert_eq!(process.exit_code(1), 0);
        assert!(fs::read_dir(&dir).unwrap().next().is_none(), "still mounted");
    }
}

#[test]
fn damage_is_an_input_output_error_and_the_log_names_the_file() {
    let store = Store::new("served-damage");
    let img = store.damage(PART2.0 + (10 << 20));
    let dir = store.lab.path("mnt");
    fs::create_dir_all(&dir).unwrap();
    let _umount = Umount(&dir);
    let mut process = store.start(&[store.args("mount", "latest"), vec![&dir]].concat(), "is mounted");
    let mut part = fs::File::open(format!("{dir}/part2.img")).unwrap();
    let error = std::io::copy(&mut part, &mut std::io::sink()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(fs::read(format!("{dir}/part1.img")).unwrap() == store.disks[2][PART1.0..PART1.0 + PART1.1]);
    wait_for("the log to name the file", 10, || process.log().contains(&img));
    drop(part);
    process.signal("INT");
    assert_eq!(process.exit_code(20), 0);
}

#[test]
fn wrong_use_is_refused_and_harms_nothing() {
    let store = Store::new("served-wrong");
    let refused = |args: &[&str], code: i32, says: &str| {
        let output = Command::new(BLXREP).args(args).output().unwrap();
        assert!(output.status.code() == Some(code) && said(&output).contains(says), "{args:?}: {output:?}");
    };
    let (dir, socket) = (store.lab.path("data"), store.lab.path("there.sock"));
    fs::write(&socket, "x").unwrap();
    refused(&[store.args("mount", "latest"), vec![&dir]].concat(), 1, "not empty");
    refused(&[store.args("mount", "latest"), vec![&store.lab.path("none")]].concat(), 1, "No such file");
    refused(&[store.args("export", "latest"), vec!["--socket", &socket]].concat(), 1, "there already");
    assert_eq!(fs::read(&socket).unwrap(), b"x");
    refused(&store.args("export", "latest"), 2, "--socket");
    let empty = store.lab.path("photos");
    for verb in ["mount", "export"] {
        let place: &[&str] = if verb == "mount" { &[&empty] } else { &["--socket", "/nowhere/x"] };
        refused(&[&*store.args(verb, "209901010000"), place].concat(), 5, "no checkpoint");
        let mut args = store.args(verb, "latest");
        args[3] = "web2";
        refused(&[&*args, place].concat(), 5, "nothing is stored of agent web2");
    }
}

#[test]
fn clients_that_send_garbage_or_nothing_are_no_trouble_for_others() {
    let store = Store::new("garbage");
    let (mut process, uri, socket) = store.export(0, &[]);
    let mut silent: Vec<_> = (0..15).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".as_slice(),
        &[0xff; 4096],
        b"\0\0\0\x03IHAVEOPT\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
        assert_eq!(run("nbdinfo", &["--size", &uri]), (SIZE_MIB << 20).to_string());
    }
    // One more than are let in.
    let _last = UnixStream::connect(&socket).unwrap();
    let mut more = UnixStream::connect(&socket).unwrap();
    more.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(more.read_to_end(&mut Vec::new()).unwrap(), 0, "17 clients");
    // Those that say nothing are let go of.
    let end = Instant::now() + Duration::from_secs(30);
    for stream in &mut silent {
        stream.set_read_timeout(Some(end - Instant::now())).unwrap();
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 18, "only the greeting");
    }
    process.signal("TERM");
    assert_eq!(process.exit_code(20), 0);
}

#[test]
fn garbage_over_tcp_ends_its_own_connection_only() {
    let store = Store::new("tcp");
    let args = [store.args("export", "latest"), vec!["--tcp", "127.0.0.1:0"]].concat();
    let mut process = store.start(&args, "until Ctrl-C");
    let log = process.log();
    let uri = log.split_whitespace().find(|word| word.starts_with("nbd://127.0.0.1:")).unwrap();
    let connect = || {
        let stream = TcpStream::connect(uri.strip_prefix("nbd://").unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    };
    let mut other = Client::begin(connect());
    for begins in [false, true] {
        for garbage in
            [b"\x16\x03\x01\x02\0\x01\0\x01\xfc".repeat(100).as_slice(), &[0xff; 70_000], &[0; 27], b""]
        {
            let mut stream = if begins { Client::begin(connect()).0 } else { connect() };
            // It may hang up in the middle.
            let _ = stream.write_all(garbage).and_then(|()| stream.shutdown(Shutdown::Write));
            let _ = stream.read_to_end(&mut Vec::new());
            drop(stream);
            assert!(other.read(PART1.0 as u64, 65536).unwrap() == store.disks[2][PART1.0..][..65536]);
        }
    }
    assert!(other.read((SIZE_MIB << 20) - 1, 2).is_err() && other.read(u64::MAX, u32::MAX).is_err());
    assert_eq!(run("nbdinfo", &["--size", uri]), (SIZE_MIB << 20).to_string());
    process.signal("TERM");
    assert_eq!(process.exit_code(20), 0);
}

/// Deltas: more than are kept open at once.
const MANY: u64 = 80;

#[test]
fn an_export_whose_files_go_away_or_are_swapped_gives_errors_and_no_wrong_byte() {
    let lab = Lab::new("gone");
    let data = lab.path("data");
    let mut disk = vec![0; 16 << 20];
    noise(&mut disk[..4 << 20], 1);
    let base = disk.clone();
    let mib = |group: u64| base[(group << 20) as usize..][..1 << 20].to_vec();
    let mut chain =
        Chain::new(Path::new(&data), &AGENT.parse().unwrap(), &"disk0".parse().unwrap(), 16 << 20, mib);
    for n in 0..MANY {
        let block = &mut disk[(n as usize * 17) << 12..][..4096];
        noise(block, n + 2);
        chain.commit([(n * 17, block.to_vec())]);
    }
    let store = Store { lab, data, ids: chain.ids.iter().map(ToString::to_string).collect(), disks: vec![] };
    let (mut process, uri, socket) = store.export(MANY as usize, &[]);
    let mut client = Client::begin(UnixStream::connect(&socket).unwrap());
    // Every block: how many are right, and how many are errors.
    let mut look = || {
        let (mut right, mut errors) = (0, 0);
        for (block, is) in disk.chunks(4096).enumerate() {
            match client.read(block as u64 * 4096, 4096) {
                Ok(data) => {
                    assert!(data == is, "block {block} is wrong");
                    right += 1;
                }
                Err(error) => {
                    assert_eq!(error, 5, "an input/output error");
                    errors += 1;
                }
            }
        }
        (right, errors)
    };
    assert_eq!(look(), (4096, 0));
    let dir = Path::new(&store.data).join("incremental").join(AGENT).join("disk0");
    let mut files: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "bak"));
    files.sort();
    assert_eq!(files.len() as u64, MANY);
    let kept: Vec<_> = files.iter().map(|path| fs::read(path).unwrap()).collect();
    for name in ["incremental", "snapshot"] {
        fs::remove_dir_all(Path::new(&store.data).join(name)).unwrap();
    }
    let (right, errors) = look();
    assert!(right > 0 && errors > 0, "{right} right, {errors} errors");

    // Another delta under each one's name.
    fs::create_dir_all(&dir).unwrap();
    for (path, bytes) in files.iter().zip(kept.iter().cycle().skip(1)) {
        fs::write(path, bytes).unwrap();
    }
    let (right, errors) = look();
    assert!(right > 0 && errors > 0, "{right} right, {errors} errors");
    assert!(process.log().contains(".bak"), "the log names a file");
    for (path, bytes) in files.iter().zip(&kept) {
        fs::write(path, bytes).unwrap();
    }
    look();
    assert_eq!(run("nbdinfo", &["--size", &uri]), (16 << 20).to_string());
    process.signal("TERM");
    assert_eq!(process.exit_code(20), 0);
}

#[test]
fn an_export_without_a_thread_for_a_client_goes_on() {
    let store = Store::new("threads");
    let (mut process, uri, socket) = store.export(0, &[]);
    let pid = process.child.id().to_string();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let size_kib: u64 = size.trim().trim_end_matches(" kB").parse().unwrap();
    // Less than a thread's stack.
    run("prlimit", &["--pid", &pid, &format!("--as={}:unlimited", (size_kib + 1024) << 10)]);
    let mut client = UnixStream::connect(&socket).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0, "it is let go of");
    run("prlimit", &["--pid", &pid, "--as=unlimited:unlimited"]);
    assert_eq!(run("nbdinfo", &["--size", &uri]), (SIZE_MIB << 20).to_string());
    process.signal("TERM");
    assert_eq!(process.exit_code(20), 0);
}
