//! What must be true, whatever breaks.

use std::collections::HashMap;

use super::dispatcher::paths;
use super::machine::Photo;
use crate::bitmap::Extent;
use crate::checkpoint::{Checkpoint, Consistency, chain};
use crate::hash::BlockHash;
use crate::ids::CheckpointId;
use crate::restore::verify::view;
use crate::store::handle::Dir;
use crate::store::simfiles::SimFiles;

/// What checkpoints must hold, which were acknowledged, and how much may be sent.
#[derive(Clone, Default)]
pub(super) struct Oracle {
    pub(super) photos: HashMap<CheckpointId, Photo>,
    pub(super) acknowledged: Vec<Checkpoint>,
    /// Blocks that were sent, and that there was a reason to send.
    pub(super) sent_blocks: u64,
    pub(super) allowed_blocks: u64,
}

impl Oracle {
    /// An agent seals a checkpoint.
    pub(super) fn sealed(&mut self, id: CheckpointId, consistency: Consistency, photo: &Photo) {
        assert!(
            consistency == Consistency::Fuzzy || consistency == photo.consistency,
            "{id} is called {consistency}, proven is {}",
            photo.consistency
        );
        self.photos.insert(id, Photo { consistency, ..photo.clone() });
    }

    /// The dispatcher says that a checkpoint is committed.
    pub(super) fn committed(&mut self, files: &SimFiles, checkpoint: Checkpoint) {
        self.check_chain(files);
        self.check(files, &checkpoint);
        self.acknowledged.push(checkpoint);
    }

    /// Nothing acknowledged disappears, and everything hangs together.
    pub(super) fn check_chain(&self, files: &SimFiles) {
        let chain = chain::load(&Dir::new(files.arc()), &paths()).unwrap();
        assert!(chain.broken.is_none(), "the chain is broken: {:?}", chain.broken);
        for checkpoint in &self.acknowledged {
            assert!(
                chain.members.iter().any(|member| member.checkpoint == *checkpoint),
                "checkpoint {} disappeared",
                checkpoint.id
            );
        }
    }

    /// Every checkpoint that was acknowledged is what the disk was.
    pub(super) fn check_all(&self, files: &SimFiles) {
        self.check_chain(files);
        self.acknowledged.iter().for_each(|checkpoint| self.check(files, checkpoint));
    }

    fn check(&self, files: &SimFiles, checkpoint: &Checkpoint) {
        let (id, geometry) = (checkpoint.id, checkpoint.geometry);
        let photo = self.photos.get(&id).expect("a checkpoint that nobody sealed");
        assert_eq!(checkpoint.consistency, photo.consistency, "of {id}");
        assert_eq!(geometry, photo.disk.geometry, "of {id}");
        let dir = Dir::new(files.arc());
        let chain = chain::load(&dir, &paths()).unwrap();
        let at = chain.members.iter().position(|member| member.checkpoint.id == id);
        let view = view(&dir, &paths(), &chain, at.expect("it is in the chain") + 1).unwrap();
        let mut unreadable_blocks = 0;
        for group in 0..geometry.groups() {
            let (first, count) = geometry.group_extent(group);
            // Read in any case: every block has its hash.
            let found = view.read_group(group).unwrap();
            let hashes = view.hashes(group).unwrap();
            let unreadable = (first..).zip(hashes).filter(|(_, hash)| *hash == BlockHash::UNREADABLE);
            let unreadable: Vec<u64> = unreadable.map(|(block, _)| block).collect();
            unreadable_blocks += unreadable.len();
            assert!(
                unreadable.iter().all(|block| photo.ever_bad.contains(*block)),
                "checkpoint {id} lacks blocks that could always be read"
            );
            if checkpoint.consistency == Consistency::Fuzzy {
                continue;
            }
            let found = found.map(|group| group.data);
            let mut expected = photo.disk.bytes(Extent { first, count });
            for (block, n) in expected.chunks_mut(geometry.block_bytes()).zip(first..) {
                if unreadable.contains(&n) {
                    block.fill(0);
                }
            }
            let same =
                found.as_ref().map_or(expected.iter().all(|byte| *byte == 0), |data| *data == expected);
            assert!(
                same || self.differs_where_unsure(photo, first, found, &expected),
                "checkpoint {id} differs in group {group}"
            );
        }
        let told = checkpoint.unreadable_blocks as usize;
        assert_eq!(told, unreadable_blocks, "checkpoint {id} does not say what it lacks");
    }

    fn differs_where_unsure(
        &self,
        photo: &Photo,
        first: u64,
        found: Option<Vec<u8>>,
        expected: &[u8],
    ) -> bool {
        let block_bytes = photo.disk.geometry.block_bytes();
        let found = found.unwrap_or_else(|| vec![0; expected.len()]);
        let blocks = found.chunks(block_bytes).zip(expected.chunks(block_bytes)).zip(first..);
        blocks
            .filter(|((found, expected), _)| found != expected)
            .all(|(_, block)| photo.unsure.contains(block))
    }

    /// Whether the newest checkpoint is a consistent one of the disk as it is now.
    pub(super) fn has_arrived(&self, disk: &super::disk::ModelDisk) -> bool {
        let newest = self.acknowledged.last();
        newest.is_some_and(|newest| {
            newest.consistency != Consistency::Fuzzy
                && newest.unreadable_blocks == 0
                && self.photos.get(&newest.id).is_some_and(|photo| photo.disk == *disk)
        })
    }

    pub(super) fn check_sent(&self) {
        let (sent, allowed) = (self.sent_blocks, self.allowed_blocks);
        assert!(sent <= allowed, "{sent} blocks were sent, there was reason for {allowed}");
    }
}
