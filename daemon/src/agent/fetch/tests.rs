//! Fetching from a dispatcher that says whatever the test wants: the image is right, or there is none.

use std::cell::Cell;
use std::fs::{self, OpenOptions};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::Message;

use super::*;
use crate::bitmap::Extent;
use crate::checkpoint::{Checkpoint, Consistency};
use crate::hash::{BlockHash, group_digest, hash_blocks};
use crate::ids::{CheckpointId, Epoch};
use crate::restore::tests::Loop;
use crate::run::Run;
use crate::wire::frame::{Area, FRAME_MAX_BYTES, encode_data, encode_message};
use crate::wire::key::AgentKey;
use crate::wire::socket::accept;
use crate::wire::tls::{Identity, connector};

const GO_ON: Progress<'_> = &|_, _| ControlFlow::Continue(());

/// What the dispatcher does when it has sent its frames.
#[derive(Clone, Copy)]
enum Then {
    Close,
    /// Answers pings, and sends nothing more.
    Wait,
    /// Is not heard of any more.
    Freeze,
}

/// Every block of the second MiB zeros, block 3 one that could not be read, the last block short.
fn geometry() -> Geometry {
    Geometry::new((2 << 20) + 4096 + 512, 12).unwrap()
}

fn image() -> Vec<u8> {
    let mut image: Vec<u8> = (0..geometry().size_bytes()).map(|i| (i / 4096 + i % 251) as u8).collect();
    image[1 << 20..2 << 20].fill(0);
    image[8192..16384].fill(0);
    image
}

fn checkpoint() -> Checkpoint {
    Checkpoint {
        id: CheckpointId::next(1_795_293_296, None),
        agent: "web1".parse().unwrap(),
        disk: "disk0".parse().unwrap(),
        device: "sda".into(),
        geometry: geometry(),
        parent: None,
        consistency: Consistency::Filesystem,
        time_unix_ms: 1,
        unreadable_blocks: 1,
        freeze_ms: 2,
        epoch: Epoch([3; 16]),
        note: String::new(),
    }
}

fn message(message: &RestoreDown) -> Vec<u8> {
    encode_message(message).unwrap()
}

fn run_of(group: u64) -> Run {
    let (first, count) = geometry().group_extent(group);
    let (offset, len) = geometry().range(first, count);
    let data = &image()[offset as usize..(offset + len) as usize];
    match group {
        1 => Run::zeros(first, count as u32),
        _ => {
            let mut hashes = hash_blocks(data, 4096);
            if group == 0 {
                hashes[3] = BlockHash::UNREADABLE;
            }
            Run::pack(first, hashes, data)
        }
    }
}

fn data(group: u64) -> Vec<u8> {
    encode_data(Area::Base, group + 1, &run_of(group))
}

fn begin() -> Vec<u8> {
    message(&RestoreDown::Begin { checkpoint: checkpoint(), part: geometry(), verify_bytes: 100 })
}

fn verifying(done_bytes: u64) -> Vec<u8> {
    message(&RestoreDown::Verifying { done_bytes })
}

fn verified() -> Vec<u8> {
    message(&RestoreDown::Verified { unreadable: vec![Extent { first: 3, count: 1 }] })
}

fn digests(groups: std::ops::Range<u64>) -> Vec<u8> {
    let digest = |group: u64| {
        let image = image();
        let start = (group << 20) as usize;
        group_digest(&hash_blocks(&image[start..image.len().min(start + (1 << 20))], 4096))
    };
    let first_group = groups.start;
    message(&RestoreDown::Digests { first_group, digests: groups.map(digest).collect() })
}

fn sent(group: u64) -> Vec<u8> {
    message(&RestoreDown::Sent { group })
}

/// What a good dispatcher sends for a new file, which holds the zeros of the second group already.
fn good() -> Vec<Vec<u8>> {
    let begin = [begin(), verifying(40), verifying(100), verified(), digests(0..3)];
    [&begin[..], &[data(0), sent(0), data(2), sent(2)]].concat()
}

/// And for a device that holds something else everywhere.
fn good_for_device() -> Vec<Vec<u8>> {
    let mut frames = good();
    frames.splice(7..7, [data(1), sent(1)]);
    frames
}

struct Lab {
    runtime: Runtime,
    dir: tempfile::TempDir,
    dial: Dial,
    listener: Arc<TcpListener>,
    acceptor: TlsAcceptor,
}

impl Lab {
    fn new() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (dir, tls) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let identity = Identity::load_or_create(tls.path()).unwrap();
        let key = AgentKey::generate("web1".parse().unwrap(), identity.fingerprint()).unwrap();
        let listener = Arc::new(runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap());
        let addr = listener.local_addr().unwrap().to_string().parse().unwrap();
        let dial = Dial { addr, connector: connector(identity.fingerprint()).unwrap(), key };
        Self { runtime, dir, dial, listener, acceptor: identity.acceptor().unwrap() }
    }

    /// Serves the next connection.
    fn serve(&self, frames: Vec<Vec<u8>>, then: Then) {
        self.serve_each(vec![frames], then);
    }

    /// Serves the next connections, one after the other.
    fn serve_each(&self, connections: Vec<Vec<Vec<u8>>>, then: Then) {
        let (listener, acceptor) = (self.listener.clone(), self.acceptor.clone());
        self.runtime.spawn(async move {
            for frames in connections {
                let (tcp, peer) = listener.accept().await.unwrap();
                let (mut socket, ..) = accept(tcp, &acceptor, peer.ip(), |_| Ok(())).await.unwrap();
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_binary() {
                        break;
                    }
                }
                for frame in frames {
                    // A client that has seen enough is gone.
                    let _ = socket.send(Message::Binary(frame.into())).await;
                }
                if matches!(then, Then::Freeze) {
                    std::future::pending().await
                }
                if matches!(then, Then::Close) {
                    let _ = socket.close(None).await;
                }
                // What is still asked is read, or the client might not hear the end of what was sent.
                while socket.next().await.is_some_and(|m| m.is_ok()) {}
            }
        });
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("x.img")
    }

    fn fetch_to(&self, output: Output, progress: Progress<'_>) -> Result<RestoreReport, FetchError> {
        self.fetch(request(output), progress)
    }

    fn fetch(&self, request: FetchRequest, progress: Progress<'_>) -> Result<RestoreReport, FetchError> {
        fetch(&self.dial, request, self.runtime.handle(), progress, &mut |_| Ok(()))
    }

    /// A fetch into a new file that must fail, and leave nothing.
    fn fails(&self, frames: Vec<Vec<u8>>, then: Then, says: &str) -> FetchError {
        self.serve(frames, then);
        let error = self.fetch_to(Output::Path(self.path()), GO_ON).unwrap_err();
        assert!(error.to_string().contains(says), "must say {says:?}: {error}");
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 0, "something is left: {error}");
        error
    }
}

/// Of the newest checkpoint; what is cut is not tried again.
fn request(output: Output) -> FetchRequest {
    let (disk, checkpoint, patience) = (Some("sda".into()), "latest".into(), Duration::ZERO);
    FetchRequest { agent: None, disk, checkpoint, partition: None, output, patience }
}

/// A good dispatcher's frames, changed.
fn but(change: impl FnOnce(&mut Vec<Vec<u8>>)) -> Vec<Vec<u8>> {
    let mut frames = good();
    change(&mut frames);
    frames
}

#[test]
fn a_checkpoint_comes_back_into_every_kind_of_target() {
    let lab = Lab::new();
    lab.serve(good(), Then::Close);
    let last = Cell::new((0, 0));
    let count = |done, total| {
        assert!(done >= last.get().0 && done <= total || total == 0);
        last.set((done, total));
        ControlFlow::Continue(())
    };
    let report = lab.fetch_to(Output::Path(lab.path()), &count).unwrap();
    let total = 100 + 2 * geometry().size_bytes();
    assert_eq!(last.get(), (total, total));
    assert_eq!((report.checkpoint, report.output), (checkpoint(), lab.path()));
    assert_eq!(report.unreadable_sectors, "24-31");
    assert_eq!(report.written_bytes, geometry().size_bytes() - (1 << 20) - 8192, "zeros stay holes");
    assert!(fs::read(lab.path()).unwrap() == image());
    assert_eq!(fs::read_dir(lab.dir.path()).unwrap().count(), 1);

    let given = lab.dir.path().join("given");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&given).unwrap();
    lab.serve(good(), Then::Wait);
    lab.fetch_to(Output::Open { file, name: "x".into() }, GO_ON).unwrap();
    assert!(fs::read(&given).unwrap() == image());

    let backing = lab.dir.path().join("backing");
    fs::write(&backing, vec![0xaa; image().len()]).unwrap();
    let device = Loop::over(&backing);
    let (mut noted, output) = (Vec::new(), Output::Path(PathBuf::from(&device.0)));
    lab.serve(good_for_device(), Then::Close);
    let mut note = |checkpoint: &Checkpoint| {
        assert_eq!(fs::read(&backing).unwrap(), vec![0xaa; image().len()], "noted before it is written");
        noted.push(checkpoint.id);
        Ok(())
    };
    fetch(&lab.dial, request(output), lab.runtime.handle(), GO_ON, &mut note).unwrap();
    assert!(fs::read(&device.0).unwrap() == image());
    assert_eq!(noted, [checkpoint().id], "once");

    // What is there already is neither sent nor written.
    lab.serve(good()[..5].to_vec(), Then::Wait);
    let report = lab.fetch_to(Output::Path(PathBuf::from(&device.0)), GO_ON).unwrap();
    assert_eq!(report.written_bytes, 0);
    let mut other = image();
    other[5000..6000].fill(0x77);
    fs::write(&device.0, &other).unwrap();
    let block = Run::pack(1, hash_blocks(&image()[4096..8192], 4096), &image()[4096..8192]);
    let block = encode_data(Area::Base, 1, &block);
    lab.serve(but(|f| f.splice(5.., [block, sent(0)]).for_each(drop)), Then::Close);
    let report = lab.fetch_to(Output::Path(PathBuf::from(&device.0)), GO_ON).unwrap();
    assert_eq!(report.written_bytes, 4096);
    assert!(fs::read(&device.0).unwrap() == image());
}

#[test]
fn a_fetch_that_was_cut_goes_on_where_it_was() {
    let lab = Lab::new();
    let resumed = |groups: std::ops::Range<u64>| {
        let begin = RestoreDown::Begin { checkpoint: checkpoint(), part: geometry(), verify_bytes: 0 };
        vec![message(&begin), verified(), digests(groups)]
    };
    for cut_at in 1..good().len() {
        // Before all was verified it is verified once more; then it goes on at the first group that is not settled.
        let rest = match cut_at {
            ..4 => good(),
            4..7 => [resumed(0..3), good()[5..].to_vec()].concat(),
            _ => [resumed(2..3), good()[7..].to_vec()].concat(),
        };
        lab.serve_each(vec![but(|f| f.truncate(cut_at)), rest], Then::Close);
        let request = FetchRequest { patience: PATIENCE, ..request(Output::Path(lab.path())) };
        let report = lab.fetch(request, GO_ON).unwrap();
        assert!(fs::read(&report.output).unwrap() == image(), "cut at {cut_at}");
        fs::remove_file(report.output).unwrap();
    }
    // Nor does it go on with another checkpoint.
    let mut other = checkpoint();
    other.epoch = Epoch([4; 16]);
    let other = RestoreDown::Begin { checkpoint: other, part: geometry(), verify_bytes: 0 };
    lab.serve_each(vec![but(|f| f.truncate(6)), vec![message(&other)]], Then::Close);
    let request = FetchRequest { patience: PATIENCE, ..request(Output::Path(lab.path())) };
    let error = lab.fetch(request, GO_ON).unwrap_err();
    assert!(error.to_string().contains("another checkpoint") && !lab.path().exists(), "{error}");
}

#[test]
fn a_fetch_of_which_nothing_comes_is_given_up_after_fewer_and_fewer_tries() {
    // Cut in the middle of the verifying, and behind it. The last connection is good, and is never tried.
    for frames in [2, 4] {
        let lab = Lab::new();
        let mut connections = vec![but(|f| f.truncate(frames)); 7];
        connections.push(good());
        lab.serve_each(connections, Then::Close);
        let request = FetchRequest { patience: Duration::from_secs(4), ..request(Output::Path(lab.path())) };
        let error = lab.fetch(request, GO_ON).unwrap_err();
        assert!(matches!(error, FetchError::Cut { .. }) && !lab.path().exists(), "{frames}: {error}");
    }
}

#[test]
fn a_dispatcher_that_lies_leaves_nothing() {
    let lab = Lab::new();
    let turn = "out of turn";
    let of = |change: fn(&mut Checkpoint)| {
        let mut checkpoint = checkpoint();
        change(&mut checkpoint);
        let part = checkpoint.geometry;
        message(&RestoreDown::Begin { checkpoint, part, verify_bytes: 100 })
    };
    let part = Geometry::new(1 << 20, 12).unwrap();
    let cases = [
        (vec![vec![0xff; 40]], "must not"),
        (vec![vec![0; FRAME_MAX_BYTES + 1]], "the connection ended"),
        (vec![data(0)], "must not"),
        (vec![sent(0)], turn),
        (but(|f| f[0] = of(|c| c.agent = "web2".parse().unwrap())), "another agent"),
        (but(|f| f[0] = of(|c| c.geometry = Geometry::new(1 << 46, 12).unwrap())), ""),
        (but(|f| f[0] = of(|c| c.geometry = Geometry::new(1 << 20, 12).unwrap())), turn),
        (but(|f| f[0] = of(|c| c.geometry = Geometry::new(8 << 20, 12).unwrap())), "does not unpack"),
        (
            but(|f| {
                f[0] = message(&RestoreDown::Begin { checkpoint: checkpoint(), part, verify_bytes: 100 });
            }),
            "another part",
        ),
        (but(|f| f.insert(1, begin())), "began twice"),
        (but(|f| f[2] = verifying(40)), "verifies out of turn"),
        (but(|f| f[2] = verifying(101)), "verifies out of turn"),
        (but(|f| f.insert(4, verifying(100))), "verifies out of turn"),
        (but(|f| f.insert(4, verified())), "verifies out of turn"),
        (but(|f| drop(f.remove(3))), "digests out of turn"),
        (but(|f| f[3] = data(0)), turn),
        (
            but(|f| {
                f[3] = message(&RestoreDown::Verified { unreadable: vec![Extent { first: 514, count: 1 }] })
            }),
            "not on the disk",
        ),
        (but(|f| f[4] = digests(1..3)), "digests out of turn"),
        (but(|f| f[4] = digests(0..0)), "digests out of turn"),
        (but(|f| f.insert(5, digests(0..3))), "digests out of turn"),
        (but(|f| f.swap(5, 7)), turn),
        (but(|f| f.insert(7, data(0))), turn),
        (but(|f| f.insert(7, sent(0))), turn),
        (but(|f| drop(f.remove(5))), "other blocks"),
        (but(|f| drop(f.remove(6))), turn),
        (but(|f| f[5] = encode_data(Area::Base, 3, &run_of(0))), turn),
        (but(|f| f[5] = encode_data(Area::Delta, 1, &run_of(0))), turn),
        (but(|f| f[5] = encode_data(Area::Base, 1, &run_of(1))), turn),
        (but(|f| f[5] = encode_data(Area::Base, 1, &Run::zeros(250, 10))), turn),
        (but(|f| f[5] = encode_data(Area::Base, 1, &Run::zeros(256, 259))), "must not"),
        (but(|f| f[7] = encode_data(Area::Base, 3, &Run::zeros(512, 2))), "other blocks"),
        (
            but(|f| {
                let blocks = &image()[2 << 20..];
                f[7] = encode_data(Area::Base, 3, &Run::pack(512, vec![BlockHash([1; 16]); 2], blocks));
            }),
            "does not have its hash",
        ),
        (but(|f| f.truncate(8)), "the connection ended"),
        (but(|f| f.truncate(6)), "the connection ended"),
        (but(|f| f.truncate(1)), "the connection ended"),
        (vec![], "the connection ended"),
    ];
    for (at, (frames, says)) in cases.into_iter().enumerate() {
        let error = lab.fails(frames, Then::Close, says);
        assert!(!matches!(error, FetchError::Refused { .. }), "case {at}: {error}");
    }
}

#[test]
fn a_refusal_is_passed_on_whenever_it_comes() {
    let lab = Lab::new();
    let refused = message(&RestoreDown::Refused {
        kind: ProblemKind::Damaged,
        reason: "r".repeat(5000),
        damage: vec!["d".repeat(5000); 150],
    });
    for at in 0..good().len() {
        let frames = but(|f| f.splice(at.., [refused.clone()]).for_each(drop));
        let FetchError::Refused { kind, reason, damage, hint } = lab.fails(frames, Then::Wait, "rrr") else {
            panic!("no refusal at {at}")
        };
        assert_eq!((kind, reason.len(), damage.len(), hint), (ProblemKind::Damaged, 1000, 100, ""));
        assert!(damage.iter().all(|line| line.len() == 1000));
    }
}

#[test]
fn a_device_is_not_touched_before_data_comes_and_is_said_to_hold_a_part_then() {
    let lab = Lab::new();
    let backing = lab.dir.path().join("backing");
    let junk = vec![0xaa; image().len()];
    fs::write(&backing, &junk).unwrap();
    let device = Loop::over(&backing);
    for (frames, part) in [(5, false), (6, true)] {
        lab.serve(good_for_device()[..frames].to_vec(), Then::Close);
        let error = lab.fetch_to(Output::Path(PathBuf::from(&device.0)), GO_ON).unwrap_err();
        assert_eq!(error.to_string().contains("holds only a part"), part, "{error}");
        assert_eq!(fs::read(&device.0).unwrap() != junk, part);
    }
    drop(device);
    fs::write(&backing, &junk[..1 << 20]).unwrap();
    let small = Loop::over(&backing);
    lab.serve(good(), Then::Close);
    let error = lab.fetch_to(Output::Path(PathBuf::from(&small.0)), GO_ON).unwrap_err();
    assert!(matches!(&error, FetchError::Restore(e) if e.kind() == ProblemKind::InvalidArgument), "{error}");
    assert!(fs::read(&small.0).unwrap() == junk[..1 << 20]);
}

#[test]
fn a_cancel_ends_every_wait_within_a_second() {
    let lab = Lab::new();
    for frames in [0, 1, 2, 4] {
        lab.serve(but(|f| f.truncate(frames)), Then::Wait);
        let began = Instant::now();
        let later = |_, _| {
            let over = began.elapsed() > Duration::from_millis(700);
            if over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let error = lab.fetch_to(Output::Path(lab.path()), &later).unwrap_err();
        assert!(matches!(&error, FetchError::Restore(RestoreError::Canceled { .. })), "{error}");
        assert!(began.elapsed() < Duration::from_millis(1700), "{:?}", began.elapsed());
        assert_eq!(fs::read_dir(lab.dir.path()).unwrap().count(), 0);
    }
    // Nobody accepts: the connection itself is waited for.
    let began = Instant::now();
    let error = lab.fetch_to(Output::Path(lab.path()), &|_, _| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, FetchError::Restore(RestoreError::Canceled { .. })), "{error}");
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_cancel_at_any_look_leaves_nothing() {
    let lab = Lab::new();
    for n in 1.. {
        lab.serve(good(), Then::Wait);
        let looks = Cell::new(0);
        let at = |_, _| {
            looks.set(looks.get() + 1);
            if looks.get() >= n { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        match lab.fetch_to(Output::Path(lab.path()), &at) {
            Ok(_) => {
                assert!(n > 6, "it looked {n} times only");
                break;
            }
            Err(error) => assert_eq!(error.to_string(), "canceled"),
        }
        assert_eq!(fs::read_dir(lab.dir.path()).unwrap().count(), 0, "canceled at {n}");
    }
}

#[test]
fn a_silent_dispatcher_is_given_up() {
    let lab = Lab::new();
    lab.fails(but(|f| f.truncate(4)), Then::Freeze, "nothing was heard");
}

#[test]
fn a_faulty_target_is_found_by_reading_back() {
    let lab = Lab::new();
    let given = lab.dir.path().join("given");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&given).unwrap();
    lab.serve(good(), Then::Wait);
    let size = geometry().size_bytes();
    let spoil = |done: u64, _| {
        if done == 100 + size + (1 << 20) {
            // Everything is written, and nothing read back but the group that was not.
            let file = OpenOptions::new().write(true).open(&given).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[0x55], (2 << 20) + 500).unwrap();
        }
        ControlFlow::Continue(())
    };
    let error = lab.fetch_to(Output::Open { file, name: "x".into() }, &spoil).unwrap_err();
    assert!(matches!(error, FetchError::Restore(RestoreError::ReadBack { block: 512, .. })), "{error}");
    assert_eq!(fs::metadata(&given).unwrap().len(), 0);
}

#[test]
fn another_checkpoint_than_was_asked_for_is_not_taken() {
    let lab = Lab::new();
    lab.serve(good(), Then::Wait);
    let checkpoint = "20200101000000".into();
    let error =
        lab.fetch(FetchRequest { checkpoint, ..request(Output::Path(lab.path())) }, GO_ON).unwrap_err();
    assert!(error.to_string().contains("another checkpoint"), "{error}");
    assert!(!lab.path().exists());
}
