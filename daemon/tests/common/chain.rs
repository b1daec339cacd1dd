//! Makes a chain of checkpoints in a data directory, without an agent.
#![allow(dead_code, unreachable_pub, reason = "every user takes another part")]
#![allow(clippy::unwrap_used, reason = "a test ends so")]

use std::path::Path;
use std::sync::Arc;

use blxrep::checkpoint::Consistency;
use blxrep::geometry::Geometry;
use blxrep::hash::hash_blocks;
use blxrep::ids::{AgentId, CheckpointId, DiskId, Epoch};
use blxrep::run::Run;
use blxrep::store::disk_store::{DiskStore, Seal};
use blxrep::store::files::RealFiles;

const FIRST_UNIX_SECOND: i64 = 1_795_293_296;

/// A disk of an agent that grows by a checkpoint at a time.
pub struct Chain {
    store: DiskStore,
    geometry: Geometry,
    pub ids: Vec<CheckpointId>,
}

impl Chain {
    /// A base with this data, which is asked for MiB by MiB.
    pub fn new(
        data: &Path,
        agent: &AgentId,
        disk: &DiskId,
        size_bytes: u64,
        mut mib: impl FnMut(u64) -> Vec<u8>,
    ) -> Self {
        std::fs::create_dir_all(data).unwrap();
        let geometry = Geometry::new(size_bytes, 12).unwrap();
        let mut store = DiskStore::open(Arc::new(RealFiles::new(data)), agent.clone(), disk.clone()).unwrap();
        store.begin_copy(geometry, "sda", Epoch([7; 16])).unwrap();
        for group in 0..geometry.groups() {
            store.put_base(&run(geometry.group_extent(group).0, &mib(group))).unwrap();
        }
        let mut chain = Self { store, geometry, ids: Vec::new() };
        chain.commit([]);
        chain
    }

    /// The next checkpoint: these bytes, of at most a MiB each, were written at these blocks of 4 KiB.
    pub fn commit(&mut self, writes: impl IntoIterator<Item = (u64, Vec<u8>)>) -> CheckpointId {
        for (block, bytes) in writes {
            self.store.put_delta(self.store.last_seq() + 1, &run(block, &bytes)).unwrap();
        }
        self.store.sync().unwrap();
        let id = CheckpointId::next(FIRST_UNIX_SECOND + self.ids.len() as i64, None);
        let seal = Seal {
            id,
            device: "sda".into(),
            geometry: self.geometry,
            consistency: Consistency::Filesystem,
            time_unix_ms: id.unix_seconds() as u64 * 1000,
            freeze_ms: 12,
            epoch: Epoch([7; 16]),
            note: String::new(),
        };
        self.store.commit(seal).unwrap();
        self.ids.push(id);
        id
    }
}

fn run(block: u64, bytes: &[u8]) -> Run {
    if bytes.iter().all(|byte| *byte == 0) {
        return Run::zeros(block, bytes.len().div_ceil(4096) as u32);
    }
    Run::pack(block, hash_blocks(bytes, 4096), bytes)
}
