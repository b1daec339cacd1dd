//! What a session does with blocks that cannot be read: one disk with a list of bad blocks, and what it said and sent.

use super::*;
use crate::agent::read::read;
use crate::checkpoint::Consistency;
use crate::freeze::final_pass::{Outcome, Taken};
use crate::ids::Epoch;
use crate::reader::patient_tests::BadDisk;
use crate::reader::{Piece, read_pieces};
use crate::run::Encoding;
use crate::tracker::Gap;
use crate::unreadable::UNREADABLE_MAX_BLOCKS;
use crate::wire::message::Plan;

const LIFE: Epoch = Epoch([7; 16]);

/// A disk and its session; its dispatcher acknowledges nothing.
pub(super) struct Side {
    session: DiskSession,
    disk: Vec<u8>,
    bad: BlockSet,
    /// What the next drain finds.
    live: BlockSet,
    /// The next final pass takes too long.
    slow: bool,
    /// Everything that was done, in order.
    pub(super) done: Vec<String>,
    pub(super) sent: Vec<Run>,
}

fn set(blocks: &[(u64, u64)]) -> BlockSet {
    blocks.iter().map(|(first, count)| Extent { first: *first, count: *count }).collect()
}

fn geometry() -> Geometry {
    Geometry::new(32 << 20, 12).unwrap()
}

impl Side {
    /// A disk that is attached, of which the dispatcher has these blocks as unreadable.
    pub(super) fn attached(plan: Plan, known: &[(u64, u64)]) -> Self {
        let disk = vec![1; geometry().size_bytes() as usize];
        let session = DiskSession::new(geometry(), "sdx".into(), 8 << 20);
        let (bad, live) = (BlockSet::new(), BlockSet::new());
        let mut side = Self { session, disk, bad, live, slow: false, done: Vec::new(), sent: Vec::new() };
        let claim = Claim { epoch: LIFE, base: None, gap: Some(Gap::NewTracker) };
        side.session.handle(Input::LinkUp(claim, 1));
        side.settle();
        let unreadable = set(known).extents(u64::MAX).collect();
        let (instance, window_bytes) = (LIFE, 48 << 20);
        let attached = DiskDown::Attached {
            plan,
            instance,
            resumes: true,
            newest: None,
            next_seq: 1,
            window_bytes,
            unreadable,
        };
        side.session.handle(Input::Message(Endpoint::Live, attached));
        side.done.clear();
        side
    }

    fn committed(&mut self) {
        let id = CheckpointId::next(1_795_000_000, None);
        self.input(Input::Message(Endpoint::Live, DiskDown::Committed { id }));
    }

    pub(super) fn input(&mut self, input: Input) {
        self.session.handle(input);
        self.settle();
    }

    pub(super) fn sync(&mut self) {
        (self.done, self.sent) = (Vec::new(), Vec::new());
        self.input(Input::SyncOrdered);
    }

    /// Does all there is to do.
    pub(super) fn settle(&mut self) {
        while let Some(action) = self.session.poll() {
            let input = match action {
                Action::SendData { run, .. } => {
                    let what = if run.encoding() == Encoding::Unreadable { "bad" } else { "data" };
                    self.did(what, run.extent());
                    self.sent.push(run);
                    continue;
                }
                Action::Send(_, DiskUp::Seal { note, .. }) => {
                    self.done.push(format!("seal {note}"));
                    continue;
                }
                Action::Send(_, DiskUp::SyncFailed { reason, .. }) => {
                    self.done.push(format!("failed {reason}"));
                    continue;
                }
                Action::Send(Endpoint::Snapshot, DiskUp::WantDigests { first_group, count }) => {
                    let digests = vec![crate::hash::GroupDigest::MISSING; count as usize];
                    let digests = DiskDown::Digests { first_group, digests };
                    Input::Message(Endpoint::Snapshot, digests)
                }
                Action::Drain(drain) => {
                    let blocks = std::mem::take(&mut self.live);
                    Input::Drained { drain, blocks, time_unix_ms: 1_795_000_000_000 }
                }
                Action::LoadPending => Input::Pending(BlockSet::new()),
                Action::CheckClaim => Input::Doubts(1),
                Action::Locate(blocks) => {
                    self.done.push(format!("locate {}", blocks.len()));
                    let text =
                        if blocks.is_empty() { String::new() } else { format!("{} bad", blocks.len()) };
                    Input::Located(blocks, text)
                }
                Action::Read(extent, purpose) => {
                    self.did("read", extent);
                    let mut disk = self.bad_disk();
                    let result = read(&mut disk, extent, &purpose, geometry(), &mut || true);
                    Input::Read { extent, purpose, result: result.map_err(|e| e.to_string()) }
                }
                Action::FinalPass { to_send, .. } => {
                    self.done.push(format!("freeze {}", to_send.len()));
                    Input::FinalPass(Ok(self.final_pass(to_send)), 1)
                }
                Action::DropLink { reason } => {
                    self.done.push(format!("drop {reason}"));
                    Input::LinkDown
                }
                _ => continue,
            };
            self.session.handle(input);
        }
    }

    fn bad_disk(&self) -> BadDisk<'_> {
        BadDisk { data: &self.disk, block_bytes: 4096, bad: &self.bad, reads: 0 }
    }

    fn final_pass(&mut self, rest: BlockSet) -> Outcome {
        if std::mem::take(&mut self.slow) {
            return Outcome::TooMuch { rest, note: "slow".into() };
        }
        let (mut data, mut unreadable) = (Vec::new(), BlockSet::new());
        for extent in rest.extents(256) {
            read_pieces(&mut self.bad_disk(), extent, &mut || true, &mut |piece| match piece {
                Piece::Data(part, bytes) => data.push((part, bytes.to_vec())),
                Piece::Unreadable(part) => unreadable.insert(part),
            })
            .unwrap();
        }
        Outcome::Taken(Taken {
            id: CheckpointId::next(1_795_000_000, None),
            time_unix_ms: 1_795_000_000_000,
            freeze_ms: 1,
            consistency: Consistency::Filesystem,
            note: "a hook".into(),
            data,
            unreadable,
            after: BlockSet::new(),
        })
    }

    fn did(&mut self, what: &str, extent: Extent) {
        self.done.push(format!("{what} {}+{}", extent.first, extent.count));
    }

    fn position(&self, what: &str) -> usize {
        self.done.iter().position(|done| done == what).unwrap_or_else(|| panic!("no {what}: {:?}", self.done))
    }

    fn has(&self, what: &str) -> bool {
        self.done.iter().any(|done| done.starts_with(what))
    }
}

#[test]
fn blocks_that_are_still_bad_are_read_one_by_one_before_the_freeze_and_not_sent_again() {
    let mut side = Side::attached(Plan::Continue, &[(5, 2)]);
    side.bad = set(&[(5, 2)]);
    side.sync();
    assert_eq!(&side.done[..2], ["read 5+1", "read 6+1"]);
    assert!(side.position("freeze 0") > 1 && side.sent.is_empty(), "{:?}", side.done);
    side.position("seal 2 bad; a hook");
}

#[test]
fn a_bad_block_that_is_reported_as_changed_is_sent_once_more_and_not_read_while_frozen() {
    let mut side = Side::attached(Plan::Continue, &[(5, 2)]);
    side.bad = set(&[(5, 2)]);
    side.live = set(&[(6, 1)]);
    side.settle();
    side.input(Input::Tick);
    side.sync();
    side.position("bad 6+1");
    assert!(!side.has("bad 5"), "{:?}", side.done);
    side.position("freeze 0");
}

#[test]
fn a_block_that_can_be_read_again_is_sent_and_no_longer_spoken_of() {
    let mut side = Side::attached(Plan::Continue, &[(5, 2)]);
    side.bad = set(&[(6, 1)]);
    side.sync();
    side.position("data 5+1");
    side.position("seal 1 bad; a hook");
    side.committed();
    side.bad = BlockSet::new();
    side.sync();
    side.position("data 6+1");
    assert!(side.position("locate 0") < side.position("seal a hook"), "{:?}", side.done);
}

#[test]
fn a_block_that_turns_bad_is_sent_as_such_from_a_round_and_from_the_freeze() {
    let mut side = Side::attached(Plan::Continue, &[]);
    // More than half of the budget: a round; what comes after it is read while frozen.
    (side.bad, side.live) = (set(&[(10, 3), (7000, 1)]), set(&[(0, 2000)]));
    side.sync();
    side.position("bad 10+3");
    side.position("seal 3 bad; a hook");
    side.committed();
    side.live = set(&[(7000, 2)]);
    side.sync();
    assert!(side.position("freeze 2") < side.position("bad 7000+1"), "{:?}", side.done);
    side.position("data 7001+1");
    assert!(side.position("locate 4") < side.position("seal 4 bad; a hook"), "{:?}", side.done);
}

#[test]
fn what_took_too_long_in_a_freeze_is_read_before_the_next_one() {
    let mut side = Side::attached(Plan::Continue, &[]);
    (side.bad, side.live, side.slow) = (set(&[(9, 1)]), set(&[(9, 2)]), true);
    side.sync();
    let order =
        ["freeze 2", "read 9+2", "bad 9+1", "freeze 0", "seal 1 bad; a hook"].map(|what| side.position(what));
    assert!(order.is_sorted(), "{:?}", side.done);
}

#[test]
fn a_retry_ends_after_some_failures_and_the_next_one_goes_on_behind_them() {
    let mut side = Side::attached(Plan::Continue, &[(0, 100)]);
    side.bad = set(&[(0, 100)]);
    let reads = |side: &Side| side.done.iter().filter(|done| done.starts_with("read")).count();
    side.sync();
    assert_eq!((reads(&side), side.done[0].as_str()), (64, "read 0+1"));
    side.committed();
    side.sync();
    assert_eq!((reads(&side), side.done[0].as_str()), (36, "read 64+1"));
    side.committed();
    side.sync();
    assert_eq!(side.done[0], "read 0+1", "and from the front again");
}

#[test]
fn a_disk_that_cannot_read_too_much_fails_its_syncs_and_scans() {
    let mut side = Side::attached(Plan::Continue, &[(0, UNREADABLE_MAX_BLOCKS - 1)]);
    side.bad = set(&[(0, 5000)]);
    side.live = set(&[(4999, 1)]);
    side.sync();
    side.position("bad 4999+1");
    side.committed();
    side.live = set(&[(4998, 1)]);
    side.sync();
    assert!(side.has("failed the disk is failing") && side.sent.is_empty(), "{:?}", side.done);
    side.sync();
    assert!(side.has("failed the disk is failing"), "the block is still to be sent: {:?}", side.done);

    let mut side = Side::attached(Plan::Copy { compare: false }, &[]);
    side.bad = set(&[(0, 5000)]);
    side.settle();
    assert!(side.has("drop the disk is failing"), "{:?}", side.done);
    let bad: u64 = side.sent.iter().map(|run| run.extent().count).sum();
    assert_eq!(bad, UNREADABLE_MAX_BLOCKS);
}

#[test]
fn what_a_copy_cannot_read_is_sent_as_such_and_named() {
    let mut side = Side::attached(Plan::Copy { compare: false }, &[]);
    side.bad = set(&[(300, 2)]);
    side.settle();
    side.position("bad 300+2");
    side.input(Input::Tick);
    side.position("locate 2");
    side.done.clear();
    side.input(Input::Tick);
    assert!(!side.has("locate"), "said once");
}
