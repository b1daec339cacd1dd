//! Blocks of the disk that cannot be read, as a session knows them. Pure.
//!
//! What must never happen here: the dispatcher left with data, or zeros, for a block that could not be read, or a block
//! that can be read again left as one that cannot.

use crate::bitmap::{BlockSet, Extent};
use crate::geometry::Geometry;
use crate::run::{Encoding, Run};
use crate::unreadable::UNREADABLE_MAX_BLOCKS;

/// See the module.
#[derive(Default)]
pub(super) struct Unreadable {
    /// The blocks that the dispatcher's newest state has as unreadable, or will have when all was received.
    known: BlockSet,
    /// Those of which `text` speaks.
    named: BlockSet,
    text: String,
    /// Where the next retry begins.
    retry_from: u64,
}

impl Unreadable {
    /// What the dispatcher's newest state holds, after an attach.
    pub(super) fn told(&mut self, extents: Vec<Extent>, geometry: Geometry) {
        let on_disk = |extent: &Extent| extent.count > 0 && extent.end() <= geometry.blocks();
        self.known = extents.into_iter().filter(on_disk).collect();
    }

    /// The blocks to be tried again in a sync that begins.
    pub(super) fn take_retry(&mut self) -> BlockSet {
        let mut blocks = self.known.clone();
        blocks.remove(Extent { first: 0, count: std::mem::take(&mut self.retry_from) });
        if blocks.is_empty() { self.known.clone() } else { blocks }
    }

    /// A retry ended early: the next one begins behind it.
    pub(super) fn retried_to(&mut self, block: u64) {
        self.retry_from = block;
    }

    /// Whether the dispatcher needs this run. It does not if it has these blocks as unreadable, and they are not
    /// reported as changed since: those have to be in the checkpoint.
    pub(super) fn is_news(&self, run: &Run, reported: &BlockSet) -> bool {
        let Extent { first, .. } = run.extent();
        run.encoding() != Encoding::Unreadable
            || (first..run.extent().end()).any(|n| !self.known.contains(n) || reported.contains(n))
    }

    /// Whether the disk is failing if these blocks cannot be read either.
    pub(super) fn is_too_much(&self, more: impl Iterator<Item = Extent>) -> bool {
        let mut all: BlockSet = more.collect();
        !all.is_empty() && {
            all.union(&self.known);
            all.len() > UNREADABLE_MAX_BLOCKS
        }
    }

    /// A run is on its way to the dispatcher.
    pub(super) fn sent(&mut self, run: &Run) {
        if run.encoding() == Encoding::Unreadable {
            self.known.insert(run.extent());
        } else if !self.known.is_empty() {
            self.known.remove(run.extent());
        }
    }

    /// The blocks, if they are others than those that were named last.
    pub(super) fn to_name(&self) -> Option<BlockSet> {
        (self.known != self.named).then(|| self.known.clone())
    }

    /// These blocks were given a text.
    pub(super) fn named(&mut self, blocks: BlockSet, text: String) {
        (self.named, self.text) = (blocks, text);
    }

    /// What a person should know of them; empty if there is none.
    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

/// The blocks of these runs that could not be read.
pub(super) fn unreadable_in(runs: &[Run]) -> impl Iterator<Item = Extent> + '_ {
    runs.iter().filter(|run| run.encoding() == Encoding::Unreadable).map(Run::extent)
}

/// Why nothing more is done with a disk that cannot read too much.
pub(super) fn failing() -> String {
    format!("the disk is failing: more than {UNREADABLE_MAX_BLOCKS} blocks cannot be read; replace it")
}
