//! The messages.
//!
//! Encoded with postcard 1 (<https://postcard.jamesmunns.com/wire-format>): fields in the order written here,
//! integers as LEB128 varints, enums by the index of their variant. A change of any type here is a change of
//! [`super::PROTOCOL_VERSION`].
//!
//! No message lets an agent delete or change what is stored. What a message speaks of is the disk its connection was
//! opened for or, on restore, a disk of the agent's own or of one that a person at the dispatcher lets it fetch.

use blxrep_dbus::problem::ProblemKind;
use serde::{Deserialize, Serialize};

use crate::bitmap::Extent;
use crate::checkpoint::{Checkpoint, Consistency};
use crate::generation::Generation;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, GroupDigest};
use crate::ids::{AgentId, CheckpointId, DiskId, Epoch};
use crate::restore::ShowRow;
use crate::status::Newest;
use crate::tracker::{Claim, Gap};

/// The most extents in one [`DiskUp::Changed`].
pub const CHANGED_MAX_EXTENTS: usize = 4096;
/// The most extents of unreadable blocks in one [`DiskDown::Attached`] or [`RestoreDown::Verified`]: a disk that has more
/// is failing.
pub const UNREADABLE_MAX_EXTENTS: usize = 4096;
/// The most groups in one [`DiskUp::WantDigests`] or [`RestoreUp::WantDigests`].
pub const DIGESTS_MAX: u32 = 4096;
/// The longest text in a message, in bytes; longer ones are cut.
pub const TEXT_MAX_BYTES: usize = 1000;
/// The most checkpoints in one [`Answer::Checkpoints`].
pub const ROWS_MAX: usize = 256;
/// The most questions of one agent without an answer.
pub const QUESTIONS_MAX: usize = 64;
/// The longest name of a disk or a checkpoint in [`Fetch`], in bytes.
pub const NAME_MAX_BYTES: usize = 128;
/// The most lines of damage in [`RestoreDown::Refused`].
pub const DAMAGE_MAX_LINES: usize = 100;

/// Makes a text fit for a message, a log line, the bus and a terminal: cut to [`TEXT_MAX_BYTES`] at a character's border,
/// and without control characters. What the other side sent goes through here as well.
pub fn clean_text(text: impl Into<String>) -> String {
    let mut text: String = text.into();
    text.truncate(text.floor_char_boundary(TEXT_MAX_BYTES));
    if text.contains(char::is_control) {
        text = text.replace('\n', "; ").replace(char::is_control, "\u{fffd}");
        text.truncate(text.floor_char_boundary(TEXT_MAX_BYTES));
    }
    text
}

/// A disk an agent offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOffer {
    /// Its stable id.
    pub disk: DiskId,
    /// The device's name, such as `sda`.
    pub device: String,
    /// Its size and block size.
    pub geometry: Geometry,
}

/// Agent to dispatcher on `/ws/config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConfigUp {
    /// The first message.
    Hello {
        /// The agent's version of blxrep, for people.
        software: String,
        /// The kernel's boot id, for people.
        boot_id: String,
        /// The disks it tracks.
        disks: Vec<DiskOffer>,
        /// What it holds durably; nothing at its first start and when its state directory was lost.
        generation: Option<Generation>,
    },
    /// It holds durably what it was offered.
    Holds(Generation),
    /// What the host is, as JSON; once, after the welcome.
    Footprint(String),
    /// The disks that are paused on the agent's host: all of them, after the welcome and after every change.
    Paused(Vec<DiskId>),
    /// Asks for something that has one [`ConfigDown::Answer`].
    Ask {
        /// A number of the agent's choice, not used by another question without its answer.
        request: u32,
        /// What.
        question: Question,
    },
}

/// What an agent may ask. All of it is about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// The checkpoints of its disks, from minute `start` to minute `end` (`YYYYMMDDHHMM` as a number).
    Show {
        /// Only this disk, by id or device name.
        disk: Option<String>,
        /// The first minute.
        start: Option<u64>,
        /// The last minute.
        end: Option<u64>,
    },
    /// A checkpoint now; answered when it is committed or has failed.
    Sync {
        /// Which disk.
        disk: DiskId,
        /// After a compare of the whole disk.
        compare: bool,
    },
}

/// The answer to a question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Checkpoints.
    Checkpoints {
        /// At most [`ROWS_MAX`].
        rows: Vec<ShowRow>,
        /// Whether another answer with more of them follows.
        more: bool,
    },
    /// The checkpoint that was asked for is committed.
    Synced {
        /// Its id.
        id: CheckpointId,
    },
    /// It cannot be done.
    Refused {
        /// What kind of error it is.
        kind: ProblemKind,
        /// Why, a sentence that says what to do.
        reason: String,
    },
}

/// Dispatcher to agent on `/ws/config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConfigDown {
    /// The answer to a hello: what the agent is to hold from now on, and show in its next hello.
    Offer(Generation),
    /// The other answer to a hello: somebody else goes on under this name. Nothing follows.
    Fenced {
        /// Why, a sentence.
        reason: String,
    },
    /// The agent holds what it was offered: it may attach its disks.
    Welcome {
        /// Names this session in the upgrades of the other endpoints.
        session: [u8; 16],
    },
    /// Take a checkpoint of a disk now.
    Sync {
        /// Which disk.
        disk: DiskId,
        /// After a compare of the whole disk.
        compare: bool,
    },
    /// The disks of this agent that are paused on the dispatcher: all of them, before the welcome and after every change.
    Paused(Vec<DiskId>),
    /// Answers [`ConfigUp::Ask`].
    Answer {
        /// The question's number.
        request: u32,
        /// The answer.
        answer: Answer,
    },
}

/// Agent to dispatcher on `/ws/snapshot` and `/ws/live`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskUp {
    /// The first message, on live.
    Attach {
        /// The device's name.
        device: String,
        /// The disk's size and block size.
        geometry: Geometry,
        /// What the tracker's pending set is worth.
        claim: Claim,
    },
    /// Blocks that changed since the last checkpoint and were not reported before (live).
    Changed(Vec<Extent>),
    /// Asks for [`DiskDown::Digests`] (snapshot).
    WantDigests {
        /// The first group.
        first_group: u64,
        /// How many, at most [`DIGESTS_MAX`].
        count: u32,
    },
    /// Asks for [`DiskDown::Hashes`] of a group whose digest differs (snapshot).
    WantHashes {
        /// The group.
        group: u64,
    },
    /// Every group was read, and what was missing or different was sent (snapshot).
    ScanDone,
    /// All data of a checkpoint was sent: commit it (live).
    Seal {
        /// Its id.
        id: CheckpointId,
        /// How it was proven.
        consistency: Consistency,
        /// When it was frozen, in milliseconds since 1970.
        time_unix_ms: u64,
        /// How long file systems were frozen, in milliseconds.
        freeze_ms: u32,
        /// What a person should know.
        note: String,
    },
    /// The ordered sync did not come to an end (live).
    SyncFailed {
        /// Why, a sentence.
        reason: String,
        /// Because the disk is paused: nothing is wrong.
        paused: bool,
    },
    /// Every group is read and compared from here on: what was reported before counts no more (live).
    ScanBegins,
    /// How far the copy or compare is, for people; about once a second (snapshot).
    Scanned {
        /// Groups read so far.
        groups: u64,
    },
}

/// What an agent has to do once it is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Plan {
    /// Both sides share a commit and nothing was missed since: only pending blocks need to be sent, in syncs.
    Continue,
    /// The full copy: send the groups that are missing.
    Copy {
        /// Compare the groups that are there too, because the tracker has a gap.
        compare: bool,
    },
    /// Compare the whole disk with the newest state.
    Compare,
}

/// Dispatcher to agent on `/ws/snapshot` and `/ws/live`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskDown {
    /// The answer to an attach (live).
    Attached {
        /// What to do.
        plan: Plan,
        /// The dispatcher's run: while it is the same, what was acknowledged need not be sent again.
        instance: Epoch,
        /// Whether a compare of this run goes on where it was.
        resumes: bool,
        /// The newest checkpoint.
        newest: Option<Newest>,
        /// Sequence numbers of this attachment begin here.
        next_seq: u64,
        /// The most bytes of frames that may be sent and not acknowledged.
        window_bytes: u32,
        /// The blocks that the newest state, staged ones included, has as unreadable; at most
        /// [`UNREADABLE_MAX_EXTENTS`], those that come first.
        unreadable: Vec<Extent>,
    },
    /// The digests of consecutive groups of the newest state (snapshot).
    Digests {
        /// The first group.
        first_group: u64,
        /// One a group; [`GroupDigest::MISSING`] for a group not copied yet.
        digests: Vec<GroupDigest>,
    },
    /// The hashes of a group's blocks in the newest state (snapshot).
    Hashes {
        /// The group.
        group: u64,
        /// One a block.
        hashes: Vec<BlockHash>,
    },
    /// Every data frame of this connection up to this sequence number is durable.
    Ack {
        /// The sequence number.
        seq: u64,
    },
    /// The checkpoint is committed and durable (live).
    Committed {
        /// Which.
        id: CheckpointId,
    },
    /// The dispatcher cannot go on with this disk; it closes both connections.
    Refused {
        /// Why, a sentence that says what to do.
        reason: String,
        /// Whether trying again is of no use before a person has acted.
        lasting: bool,
    },
    /// The answer to [`DiskUp::ScanDone`]: everything of the scan has arrived and is durable (snapshot).
    ScanClosed,
}

/// What is to be fetched. The names are as a person types them, at most [`NAME_MAX_BYTES`] of printable ASCII each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// Whose disk: the agent's own, or one of another agent that the agents file lets it fetch.
    pub agent: AgentId,
    /// A disk's id or its device's name; not needed where the agent has one.
    pub disk: Option<String>,
    /// An id, `YYYYMMDDHHMM` or `latest`.
    pub checkpoint: String,
    /// Only this partition, by its number in the disk's own table.
    pub partition: Option<u32>,
    /// It goes on after a cut: what it rests on was verified before, and need not be once more.
    pub resumes: bool,
}

/// Agent to dispatcher on `/ws/restore`. Groups and blocks count from the beginning of what is fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestoreUp {
    /// The first message, and only that.
    Fetch(Fetch),
    /// Asks for [`RestoreDown::Digests`].
    WantDigests {
        /// The first group.
        first_group: u64,
        /// How many, at most [`DIGESTS_MAX`].
        count: u32,
    },
    /// Asks for the blocks of a group that differ from what the target holds.
    WantGroup {
        /// Which.
        group: u64,
        /// The hashes of what the target holds, one a block; none if that is not known: then all blocks are sent.
        holds: Vec<BlockHash>,
    },
    /// How far it is, for people; about twice a second.
    Progress {
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// Everything is on the target and was read back right.
    Done,
}

/// Dispatcher to agent on `/ws/restore`. What a [`RestoreUp::WantGroup`] is answered with are data frames of the area
/// base, whose sequence number is the group's number plus one, and [`Self::Sent`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestoreDown {
    /// The answer to a fetch.
    Begin {
        /// The checkpoint.
        checkpoint: Checkpoint,
        /// Size and blocks of what is fetched: of the disk or of the partition.
        part: Geometry,
        /// The bytes it rests on, all verified before anything is sent; 0 where it goes on after a cut.
        verify_bytes: u64,
    },
    /// How far the verifying is.
    Verifying {
        /// More than the last time, at most all.
        done_bytes: u64,
    },
    /// It is sound: from here on the agent asks.
    Verified {
        /// The blocks that the disk's own agent could not read, zeros; at most [`UNREADABLE_MAX_EXTENTS`].
        unreadable: Vec<Extent>,
    },
    /// The digests of consecutive groups, unreadable blocks taken for zeros.
    Digests {
        /// The first group.
        first_group: u64,
        /// One a group.
        digests: Vec<GroupDigest>,
    },
    /// All blocks that differ of a group were sent.
    Sent {
        /// Which.
        group: u64,
    },
    /// It cannot be sent.
    Refused {
        /// What kind of error it is.
        kind: ProblemKind,
        /// Why, a sentence that says what to do.
        reason: String,
        /// The damage that was found, at most [`DAMAGE_MAX_LINES`] lines.
        damage: Vec<String>,
    },
}

/// Whether a gap is only the beginning of this tracker's life.
pub fn is_fresh(gap: Option<Gap>) -> bool {
    gap == Some(Gap::NewTracker)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_of_the_other_side_ends_a_line_a_terminal_or_a_bus_connection() {
        assert_eq!(clean_text("all is well: ä"), "all is well: ä");
        assert_eq!(clean_text("sd\0a\x1b[2J\nAGENT=web2"), "sd\u{fffd}a\u{fffd}[2J; AGENT=web2");
        for long in ["ä".repeat(5000), "\x07".repeat(5000), "\n".repeat(999)] {
            assert!(clean_text(long).len() <= TEXT_MAX_BYTES);
        }
    }
}
