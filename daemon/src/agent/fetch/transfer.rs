//! Takes what a dispatcher sends, checks it and writes it, over one connection or several.

use std::io;
use std::time::Instant;

use tracing::info;

use super::line::Line;
use super::plan::{Plan, Step};
use super::{FetchError, unexpected};
use crate::bitmap::{BlockSet, Extent};
use crate::checkpoint::Checkpoint;
use crate::geometry::Geometry;
use crate::hash::{BlockHash, group_digest};
use crate::reader::ahead::HashesAhead;
use crate::restore::{Meter, Target};
use crate::run::Run;
use crate::wire::frame::{Area, Frame, FrameError, decode};
use crate::wire::message::{RestoreDown, RestoreUp};

/// What is called once, just before the first byte of a device is changed.
pub type BeforeWriting<'a> = &'a mut dyn FnMut(&Checkpoint) -> io::Result<()>;

/// What the target holds before it is written.
enum Holds {
    /// A new file.
    Zeros,
    /// A device, read past the page cache.
    Device(HashesAhead),
    /// A device that cannot be read: it may be written all the same.
    Unknown,
}

impl Holds {
    fn of(target: &Target, geometry: Geometry) -> Self {
        if !target.is_device() {
            return Self::Zeros;
        }
        target.hashes_ahead(geometry).map_or(Self::Unknown, Self::Device)
    }

    /// The hashes of a group's blocks; none if they are not known.
    fn hashes(&mut self, group: u64, geometry: Geometry) -> Vec<BlockHash> {
        match self {
            Self::Zeros => vec![BlockHash::ZERO; geometry.group_extent(group).1 as usize],
            Self::Device(ahead) => ahead.hashes(group).unwrap_or_default(),
            Self::Unknown => Vec::new(),
        }
    }
}

/// A fetch under way.
pub(super) struct Transfer<'a, 'p> {
    checkpoint: &'a Checkpoint,
    geometry: Geometry,
    verify_bytes: u64,
    target: &'a mut Target,
    meter: &'a mut Meter<'p>,
    before_writing: Option<BeforeWriting<'a>>,
    holds: Holds,
    plan: Plan,
    /// Bytes that the dispatcher has verified.
    verified_bytes: u64,
    /// Blocks that the disk's own agent could not read; known when all is verified.
    unreadable: Option<BlockSet>,
    written_bytes: u64,
    /// When something came of it last.
    progressed: Instant,
}

impl<'a, 'p> Transfer<'a, 'p> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        geometry: Geometry,
        verify_bytes: u64,
        target: &'a mut Target,
        meter: &'a mut Meter<'p>,
        before_writing: BeforeWriting<'a>,
    ) -> Self {
        Self {
            checkpoint,
            geometry,
            verify_bytes,
            holds: Holds::of(target, geometry),
            before_writing: target.is_device().then_some(before_writing),
            target,
            meter,
            plan: Plan::new(geometry),
            verified_bytes: 0,
            unreadable: None,
            written_bytes: 0,
            progressed: Instant::now(),
        }
    }

    pub(super) fn meter(&mut self) -> &mut Meter<'p> {
        self.meter
    }

    /// Whether this is what it fetches.
    pub(super) fn is_of(&self, checkpoint: &Checkpoint, part: Geometry) -> bool {
        (self.checkpoint, self.geometry) == (checkpoint, part)
    }

    /// Whether the dispatcher has verified all it rests on.
    pub(super) fn is_verified(&self) -> bool {
        self.unreadable.is_some()
    }

    /// When something came of it last.
    pub(super) fn progressed(&self) -> Instant {
        self.progressed
    }

    /// Takes everything that has not come, over a connection that has begun.
    pub(super) fn receive(&mut self, line: &mut Line) -> Result<(), FetchError> {
        self.plan.disconnect();
        self.wait_verified(line)?;
        loop {
            while let Some(step) = self.plan.step() {
                self.step(step, line)?;
                line.tell_progress(self.meter)?;
            }
            if self.plan.is_done() {
                return Ok(());
            }
            let frame = line.frame(self.meter)?;
            self.take(&frame)?;
        }
    }

    fn wait_verified(&mut self, line: &mut Line) -> Result<(), FetchError> {
        let mut told = 0;
        loop {
            match decode(&line.frame(self.meter)?, self.geometry)? {
                Frame::Message(RestoreDown::Verifying { done_bytes })
                    if (told + 1..=self.verify_bytes).contains(&done_bytes) =>
                {
                    told = done_bytes;
                    self.verified(done_bytes)?;
                    line.tell_progress(self.meter)?;
                }
                Frame::Message(RestoreDown::Verified { unreadable }) => {
                    let blocks = self.geometry.blocks();
                    if !unreadable
                        .iter()
                        .all(|of| of.first.checked_add(of.count).is_some_and(|end| end <= blocks))
                    {
                        return Err(FetchError::broken(
                            "the dispatcher named blocks that are not on the disk",
                        ));
                    }
                    if self.unreadable.replace(unreadable.into_iter().collect()).is_none() {
                        self.progressed = Instant::now();
                        info!("the dispatcher has verified what the checkpoint rests on");
                    }
                    return self.verified(self.verify_bytes);
                }
                Frame::Data { .. } => {
                    return Err(FetchError::broken("the dispatcher sent blocks out of turn"));
                }
                Frame::Message(other) => return Err(unexpected(other)),
            }
        }
    }

    /// Where it is verified once more after a cut, nothing is counted twice, and nothing has come of it.
    fn verified(&mut self, done_bytes: u64) -> Result<(), FetchError> {
        if done_bytes > self.verified_bytes {
            self.progressed = Instant::now();
        }
        self.meter.tick(done_bytes.saturating_sub(self.verified_bytes))?;
        self.verified_bytes = self.verified_bytes.max(done_bytes);
        Ok(())
    }

    fn step(&mut self, step: Step, line: &Line) -> Result<(), FetchError> {
        match step {
            Step::Ask { first_group, count } => line.tell(&RestoreUp::WantDigests { first_group, count }),
            Step::Look { group, digest } => {
                let holds = self.holds.hashes(group, self.geometry);
                if group_digest(&holds) == digest {
                    self.progressed = Instant::now();
                    // It is not written, and so it was read back.
                    let (first, count) = self.geometry.group_extent(group);
                    self.meter.tick(2 * self.geometry.range(first, count).1)?;
                    return Ok(());
                }
                self.plan.want(group, digest, &holds);
                line.tell(&RestoreUp::WantGroup { group, holds })
            }
        }
    }

    fn take(&mut self, frame: &[u8]) -> Result<(), FetchError> {
        let broken = |what: &str| FetchError::broken(format!("the dispatcher sent {what}"));
        match decode(frame, self.geometry)? {
            Frame::Data { area: Area::Base, seq, run } => {
                self.plan.blocks(seq, &run).map_err(broken)?;
                self.write(&run)
            }
            Frame::Data { .. } => Err(broken("blocks out of turn")),
            Frame::Message(RestoreDown::Digests { first_group, digests }) => {
                self.plan.digests(first_group, digests).map_err(broken)
            }
            Frame::Message(RestoreDown::Sent { group }) => {
                self.plan.sent(group).map_err(broken)?;
                self.progressed = Instant::now();
                let (first, count) = self.geometry.group_extent(group);
                Ok(self.meter.tick(self.geometry.range(first, count).1)?)
            }
            Frame::Message(other) => Err(unexpected(other)),
        }
    }

    fn write(&mut self, run: &Run) -> Result<(), FetchError> {
        let Extent { first, count } = run.extent();
        let (offset, len) = self.geometry.range(first, count);
        let data = run.unpack(self.geometry).map_err(FrameError::from)?;
        if let Some(before_writing) = self.before_writing.take() {
            before_writing(self.checkpoint).map_err(|e| self.target.not_noted(e))?;
        }
        self.written_bytes += self.target.put(offset, len, data.as_deref())?;
        Ok(())
    }

    /// Reads back all that was written. Gives what the disk's own agent could not read, and how many bytes were written.
    pub(super) fn read_back(self, line: &mut Line) -> Result<(BlockSet, u64), FetchError> {
        let Self { geometry, target, meter, plan, unreadable, written_bytes, .. } = self;
        let written = plan.written();
        let mut tick = |bytes| {
            meter.tick(bytes)?;
            // That the connection is gone is no reason not to go on.
            let _ = line.tell_progress(meter);
            Ok(())
        };
        target.read_back(geometry, written.keys().copied(), &mut tick, |group, first, found| {
            Ok((written.get(&group) != Some(&group_digest(found))).then_some(first))
        })?;
        Ok((unreadable.unwrap_or_else(BlockSet::new), written_bytes))
    }
}
