//! Agent, network, dispatcher, store and disk in one thread under a seed: what every checkpoint holds is known, and must
//! be what comes back, whatever breaks.
//!
//! The real sessions of both sides, the real frames, the real schedule and the real store run here. Simulated are what
//! they stand on: the disk with its writes in flight ([`machine`]), the tracker, the freeze, the network, the clock
//! ([`world`]) and the store's file system ([`crate::store::simfiles`]). What breaks is in [`faults`], what must hold in [`oracle`].
//!
//! `make sim SEEDS=N FIRST=S` runs N seeds from S on. The same seed always does the same: `make sim SEEDS=1 FIRST=S TRACE=1` shows
//! every event of it.

mod disk;
mod dispatcher;
mod faults;
mod machine;
mod oracle;
mod random;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use faults::Fault;
use world::{Event, World};

/// How long things break, in virtual milliseconds.
const FAULTY_MS: u64 = 40_000;
/// How long a checkpoint may take after the faults, likewise.
const PEACE_MS: u64 = 120_000;
/// Seeds in every run of the tests, and how long they may take.
const SEEDS: u64 = 2000;
const TIME_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Gives the number of checkpoints.
fn run(seed: u64, with_trace: bool) -> usize {
    let mut world = World::new(seed);
    world.trace = with_trace.then(Vec::new);
    let calm_ms = 250 << world.random.below(6);
    world.after(calm_ms, Event::Fault(Fault::Any { calm_ms }));
    let step = |world: &mut World| {
        world.step();
        world.trace.iter_mut().flat_map(|trace| trace.drain(..)).for_each(|line| println!("{line}"));
    };
    while world.now_ms < FAULTY_MS {
        step(&mut world);
    }
    world.make_peace();
    while !world.has_arrived() {
        step(&mut world);
        assert!(world.now_ms < FAULTY_MS + PEACE_MS, "after the faults no consistent checkpoint came");
    }
    world.oracle.check_all(&world.files);
    world.oracle.check_sent();
    world.oracle.acknowledged.len()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs the seeds on every processor; gives the checkpoints, or the first seed that failed.
fn run_all(first: u64, seeds: u64) -> Result<u64, u64> {
    let (next, checkpoints, failed) = (AtomicU64::new(first), AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds || seed > failed.load(Ordering::Relaxed) {
                return;
            }
            match std::panic::catch_unwind(|| run(seed, false)) {
                Ok(count) => drop(checkpoints.fetch_add(count as u64, Ordering::Relaxed)),
                Err(_) => drop(failed.fetch_min(seed, Ordering::Relaxed)),
            }
        }
    };
    std::thread::scope(|scope| {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        (0..processors).for_each(|_| drop(scope.spawn(work)));
    });
    match failed.into_inner() {
        u64::MAX => Ok(checkpoints.into_inner()),
        seed => Err(seed),
    }
}

#[test]
fn every_checkpoint_is_what_the_disk_was_whatever_breaks() {
    let (first, seeds) =
        (number("BLXREP_SIM_FIRST").unwrap_or(0), number("BLXREP_SIM_SEEDS").unwrap_or(SEEDS));
    if number("BLXREP_SIM_TRACE").is_some() {
        run(first, true);
        return;
    }
    let began = Instant::now();
    match run_all(first, seeds) {
        Ok(checkpoints) => {
            assert!(
                seeds > SEEDS || began.elapsed() < TIME_LIMIT,
                "{seeds} seeds took {:?}",
                began.elapsed()
            );
            println!("{seeds} seeds passed, {checkpoints} checkpoints compared");
            assert!(
                seeds < 100 || checkpoints > 2 * seeds,
                "only {checkpoints} checkpoints: the simulation does not get anywhere"
            );
        }
        Err(seed) => panic!("seed {seed} failed; to see it again: make sim SEEDS=1 FIRST={seed} TRACE=1"),
    }
}
