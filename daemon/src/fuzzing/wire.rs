//! Frames, messages and runs. The first byte of an input says what the rest is taken for.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bitmap::Extent;
use crate::checkpoint::{Checkpoint, Consistency};
use crate::generation::Generation;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, GroupDigest, hash_blocks};
use crate::ids::{CheckpointId, Epoch};
use crate::run::Run;
use crate::tracker::{Claim, Gap};
use crate::wire::PROTOCOL_VERSION;
use crate::wire::frame::{self, Area, Frame, decode_message, encode_data, encode_message};
use crate::wire::message::{
    Answer, ConfigDown, ConfigUp, DiskDown, DiskOffer, DiskUp, Fetch, Question, RestoreDown, RestoreUp,
};

/// Set in the first byte: the frame's header is put right, so that what is behind it is reached.
const PUT_RIGHT: u8 = 0x80;

fn geometry() -> Geometry {
    Geometry::new((2 << 20) + 512, 12).unwrap()
}

/// What is a message means the same when it is sent on.
fn message<M: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) {
    if let Ok(message) = decode_message::<M>(bytes) {
        let again = encode_message(&message).expect("what fitted into a frame fits into one again");
        assert!(again.len() <= bytes.len(), "the encoding is the shortest there is");
        assert_eq!(decode_message::<M>(&again).as_ref(), Ok(&message));
    }
}

fn run(bytes: &[u8]) {
    if let Ok(run) = Run::decode(bytes, geometry()) {
        let mut again = Vec::new();
        run.encode(&mut again);
        assert_eq!(again, bytes, "a run has one encoding");
        if let Ok(Some(data)) = run.unpack(geometry()) {
            let hashes = hash_blocks(&data, geometry().block_bytes());
            assert!(hashes.iter().zip(0..).all(|(hash, i)| run.hash(i).content() == *hash));
            assert_eq!(hashes.len() as u64, run.extent().count);
        }
    }
}

fn data(bytes: &[u8]) {
    if let Ok(Frame::Data { area, seq, run }) = frame::decode::<DiskUp>(bytes, geometry()) {
        assert_eq!(encode_data(area, seq, &run), bytes, "a data frame has one encoding");
        let _ = run.unpack(geometry());
    }
    let _ = frame::decode::<RestoreDown>(bytes, geometry());
}

pub(super) fn check(bytes: &[u8]) {
    let Some((how, bytes)) = bytes.split_first() else { return };
    let kind = how & !PUT_RIGHT;
    let mut bytes = bytes.to_vec();
    if how & PUT_RIGHT != 0 && kind != 7 {
        let len = (bytes.len() as u32).to_le_bytes();
        let kind = if kind == 6 { 2 } else { 1 };
        bytes.splice(0..0, [PROTOCOL_VERSION, kind, 0, 0].into_iter().chain(len));
    }
    match kind {
        0 => message::<ConfigUp>(&bytes),
        1 => message::<ConfigDown>(&bytes),
        2 => message::<DiskUp>(&bytes),
        3 => message::<DiskDown>(&bytes),
        4 => message::<RestoreUp>(&bytes),
        5 => message::<RestoreDown>(&bytes),
        6 => data(&bytes),
        _ => run(&bytes),
    }
}

/// A message both ways: as a whole frame, and as a body whose header is made for it.
fn both<M: Serialize>(kind: u8, message: &M) -> [Vec<u8>; 2] {
    let frame = encode_message(message).unwrap();
    let body = frame[frame::FRAME_HEADER_BYTES..].to_vec();
    [[vec![kind], frame].concat(), [vec![kind | PUT_RIGHT], body].concat()]
}

fn runs() -> Vec<Run> {
    let text: Vec<u8> = (0..8192u32).map(|i| (i / 100) as u8).collect();
    let mut noise = vec![0; 512];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    vec![
        Run::zeros(3, 400),
        Run::unreadable(9, 2),
        Run::pack(1, hash_blocks(&text, 4096), &text),
        Run::pack(512, hash_blocks(&noise, 4096), &noise),
    ]
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let disk: crate::ids::DiskId = "disk0".parse().unwrap();
    let id = CheckpointId::next(1_795_293_296, None);
    let mut seeds = Vec::new();
    let offer = DiskOffer { disk: disk.clone(), device: "sda".into(), geometry: geometry() };
    let generation = Generation { number: 7, token: [9; 16] };
    let hello = ConfigUp::Hello {
        software: "0.1.0".into(),
        boot_id: "b".into(),
        disks: vec![offer.clone(), offer],
        generation: Some(generation),
    };
    let show = Question::Show { disk: Some("sda".into()), start: Some(202611212034), end: None };
    let extent = Extent { first: 3, count: 9 };
    for message in [
        hello,
        ConfigUp::Holds(generation),
        ConfigUp::Footprint("{}".into()),
        ConfigUp::Paused(vec![disk.clone()]),
        ConfigUp::Ask { request: 7, question: show },
    ] {
        seeds.extend(both(0, &message));
    }
    let refused = Answer::Refused { kind: blxrep_dbus::problem::ProblemKind::Busy, reason: "busy".into() };
    for message in [
        ConfigDown::Welcome { session: [5; 16] },
        ConfigDown::Sync { disk: disk.clone(), compare: true },
        ConfigDown::Offer(generation),
        ConfigDown::Fenced { reason: "a copy".into() },
        ConfigDown::Paused(vec![disk.clone()]),
        ConfigDown::Answer { request: 7, answer: Answer::Synced { id } },
        ConfigDown::Answer { request: 8, answer: refused },
        ConfigDown::Answer { request: 9, answer: Answer::Checkpoints { rows: Vec::new(), more: true } },
    ] {
        seeds.extend(both(1, &message));
    }
    let claim = Claim { epoch: Epoch([7; 16]), base: Some(id), gap: Some(Gap::SkippedRuns) };
    for message in [
        DiskUp::Attach { device: "sda".into(), geometry: geometry(), claim },
        DiskUp::Changed(vec![extent, extent]),
        DiskUp::WantDigests { first_group: 1, count: 2 },
        DiskUp::WantHashes { group: 1 },
        DiskUp::ScanBegins,
        DiskUp::ScanDone,
        DiskUp::Scanned { groups: 1 },
        DiskUp::SyncFailed { reason: "too much changed".into(), paused: false },
    ] {
        seeds.extend(both(2, &message));
    }
    for message in [
        DiskDown::Digests { first_group: 0, digests: vec![GroupDigest::MISSING; 3] },
        DiskDown::Hashes { group: 2, hashes: vec![BlockHash([3; 16]); 2] },
        DiskDown::Ack { seq: 5 },
        DiskDown::ScanClosed,
        DiskDown::Attached {
            plan: crate::wire::message::Plan::Copy { compare: true },
            instance: Epoch([2; 16]),
            resumes: false,
            newest: None,
            unreadable: vec![extent],
            next_seq: 1,
            window_bytes: 48 << 20,
        },
        DiskDown::Committed { id },
        DiskDown::Refused { reason: "no space left".into(), lasting: false },
    ] {
        seeds.extend(both(3, &message));
    }
    let fetch = Fetch {
        agent: "agent1".parse().unwrap(),
        disk: Some("sda".into()),
        checkpoint: "latest".into(),
        partition: Some(2),
        resumes: true,
    };
    for message in [
        RestoreUp::Fetch(fetch),
        RestoreUp::WantDigests { first_group: 1, count: 2 },
        RestoreUp::WantGroup { group: 2, holds: vec![BlockHash([3; 16]); 2] },
        RestoreUp::Progress { done_bytes: 5, total_bytes: 9 },
        RestoreUp::Done,
    ] {
        seeds.extend(both(4, &message));
    }
    let checkpoint = Checkpoint {
        id,
        agent: "agent1".parse().unwrap(),
        disk,
        device: "sda".into(),
        geometry: geometry(),
        parent: None,
        consistency: Consistency::Crash,
        time_unix_ms: 1_795_293_296_000,
        freeze_ms: 12,
        epoch: Epoch([7; 16]),
        note: "a hook failed".into(),
        unreadable_blocks: 3,
    };
    for message in [
        RestoreDown::Begin { checkpoint, part: geometry(), verify_bytes: 5 << 20 },
        RestoreDown::Verifying { done_bytes: 1 << 20 },
        RestoreDown::Verified { unreadable: vec![extent] },
        RestoreDown::Digests { first_group: 0, digests: vec![GroupDigest([3; 16]); 3] },
        RestoreDown::Sent { group: 2 },
    ] {
        seeds.extend(both(5, &message));
    }
    for (run, seq) in runs().into_iter().zip(1..) {
        let frame = encode_data(if seq == 1 { Area::Base } else { Area::Delta }, seq, &run);
        seeds.push([vec![6 | PUT_RIGHT], frame[frame::FRAME_HEADER_BYTES..].to_vec()].concat());
        seeds.push([vec![6], frame].concat());
        let mut bytes = vec![7];
        run.encode(&mut bytes);
        seeds.push(bytes);
    }
    seeds
}
