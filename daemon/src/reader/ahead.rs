//! The block hashes of one group after the other, a little ahead by two threads: while one reads the other hashes, so that a
//! compare takes as long as the slower of the two and not as both.
//!
//! What must never happen here: hashes of what the disk held before the compare began. Who begins one makes a new
//! [`HashesAhead`].

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{BlockReader, hash_extent};
use crate::bitmap::Extent;
use crate::geometry::Geometry;
use crate::hash::BlockHash;

const THREADS: u64 = 2;
/// Groups that are read before they are asked for.
const AHEAD_GROUPS: u64 = 4;

struct Lane {
    groups: SyncSender<u64>,
    hashes: Receiver<Option<Vec<BlockHash>>>,
    thread: JoinHandle<()>,
}

/// See the module.
pub struct HashesAhead {
    lanes: Vec<Lane>,
    groups: u64,
    /// Asked for and not taken yet: from the first of these to before the second.
    first: u64,
    next: u64,
}

impl HashesAhead {
    /// Starts the threads; each reads by a reader of its own.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new(readers: Vec<Box<dyn BlockReader>>, geometry: Geometry) -> std::io::Result<Self> {
        let lane = |reader| Lane::start(reader, geometry);
        let lanes = readers.into_iter().map(lane).collect::<std::io::Result<_>>()?;
        Ok(Self { lanes, groups: geometry.groups(), first: 0, next: 0 })
    }

    /// How many readers it is made of.
    pub const fn readers() -> usize {
        THREADS as usize
    }

    /// The hashes of a group's blocks; `None` if it could not be read.
    pub fn hashes(&mut self, group: u64) -> Option<Vec<BlockHash>> {
        while self.first < group.min(self.next) {
            self.take();
        }
        if self.first != group {
            while self.first < self.next {
                self.take();
            }
            (self.first, self.next) = (group, group);
        }
        while self.next < self.groups && self.next <= group + AHEAD_GROUPS {
            let lane = self.lane(self.next)?;
            lane.groups.send(self.next).ok()?;
            self.next += 1;
        }
        self.take()
    }

    fn take(&mut self) -> Option<Vec<BlockHash>> {
        let hashes = self.lane(self.first)?.hashes.recv().ok().flatten();
        self.first += 1;
        hashes
    }

    fn lane(&self, group: u64) -> Option<&Lane> {
        let lanes = self.lanes.len().max(1) as u64;
        self.lanes.get((group % lanes) as usize)
    }
}

impl Drop for HashesAhead {
    fn drop(&mut self) {
        for Lane { groups, hashes, thread } in self.lanes.drain(..) {
            // It ends when nobody asks and nobody listens any more; its reader is closed then.
            drop((groups, hashes));
            let _ = thread.join();
        }
    }
}

impl Lane {
    fn start(mut reader: Box<dyn BlockReader>, geometry: Geometry) -> std::io::Result<Self> {
        let room = AHEAD_GROUPS as usize + 1;
        let (groups, asked) = sync_channel::<u64>(room);
        let (answer, hashes) = sync_channel(room);
        let work = move || {
            for group in asked {
                let (first, count) = geometry.group_extent(group);
                let read = reader.read(Extent { first, count });
                let hashes = read.ok().map(|data| hash_extent(data, geometry));
                if answer.send(hashes).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("hashes".to_owned()).spawn(work)?;
        Ok(Self { groups, hashes, thread })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::ReadError;

    /// A disk whose groups are filled with their number, and one of which cannot be read.
    struct Disk(Geometry, u64, Vec<u8>);

    impl BlockReader for Disk {
        fn read(&mut self, extent: Extent) -> Result<&[u8], ReadError> {
            let group = extent.first / self.0.group_blocks();
            if group == self.1 {
                return Err(ReadError::Extent { first: 0, count: 0, blocks: 0 });
            }
            self.2 = vec![group as u8 + 1; self.0.range(extent.first, extent.count).1 as usize];
            Ok(&self.2)
        }
    }

    #[test]
    fn hashes_are_those_of_the_groups_asked_for_in_whatever_order() {
        let geometry = Geometry::new((20 << 20) + 512, 12).unwrap();
        let disk = |bad| Box::new(Disk(geometry, bad, Vec::new())) as Box<dyn BlockReader>;
        let readers = (0..HashesAhead::readers()).map(|_| disk(13)).collect();
        let mut ahead = HashesAhead::new(readers, geometry).unwrap();
        let mut alone = disk(13);
        let order = (0..21).chain([3, 4, 5, 9, 20, 0, 7, 7, 8, 12, 13, 14, 2]);
        for group in order {
            let (first, count) = geometry.group_extent(group);
            let expected = alone.read(Extent { first, count }).ok();
            let expected = expected.map(|data| hash_extent(data, geometry));
            assert_eq!(ahead.hashes(group), expected, "group {group}");
            assert_eq!(expected.is_none(), group == 13);
        }
    }
}
