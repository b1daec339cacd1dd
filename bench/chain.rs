//! Makes a data directory for `bench/serve`: a base of noise, and deltas of scattered blocks over it.
//!
//! chain DIR SIZE_MIB DELTAS BLOCKS: the agent is `bench`; each delta writes BLOCKS blocks of 4 KiB in random places.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark ends so")]

#[path = "../daemon/tests/common/chain.rs"]
mod chain;

use chain::Chain;

/// The next of a row of random numbers (xorshift64; Marsaglia, 2003).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn noise(state: &mut u64, bytes: usize) -> Vec<u8> {
    (0..bytes / 8).flat_map(|_| next(state).to_le_bytes()).collect()
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, numbers @ ..] = &*args else { panic!("chain DIR SIZE_MIB DELTAS BLOCKS") };
    let numbers: Vec<u64> = numbers.iter().map(|n| n.parse().expect("a number")).collect();
    let [size_mib, deltas, blocks] = *numbers else { panic!("chain DIR SIZE_MIB DELTAS BLOCKS") };
    let state = &mut 0x9e37_79b9_7f4a_7c15;
    let (agent, disk) = ("bench".parse().unwrap(), "disk0".parse().unwrap());
    let mut chain = Chain::new(dir.as_ref(), &agent, &disk, size_mib << 20, |_| noise(state, 1 << 20));
    for _ in 0..deltas {
        let writes: Vec<_> =
            (0..blocks).map(|_| (next(state) % (size_mib << 8), noise(state, 4096))).collect();
        chain.commit(writes);
    }
}
