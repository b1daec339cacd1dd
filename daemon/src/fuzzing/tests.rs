//! The targets over mutated seeds, so that no libFuzzer is needed to find what a few thousand tries find.

use std::fs;
use std::path::PathBuf;

use super::{TARGETS, Target};

const TRIES: u64 = 4000;

/// SplitMix64 (Steele, Lea, Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

fn mutate(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    let at = random.below(bytes.len() + 1);
    let longest = 1 << random.below(8);
    let len = 1 + random.below(longest);
    let end = (at + len).min(bytes.len());
    match random.below(9) {
        0 | 1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        2 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
        3 => {
            // A number at one of the places numbers are at.
            let at = at & !3;
            let number = [0, 1, u64::MAX, 1 << 31, 1 << 32, 1 << 63, random.next()][random.below(7)];
            let width = [4, 8][random.below(2)];
            if let Some(slot) = bytes.get_mut(at..at + width) {
                slot.copy_from_slice(&number.to_le_bytes()[..width]);
            }
        }
        4 => bytes.truncate(at),
        5 => drop(bytes.drain(at..end)),
        6 => {
            let more: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            drop(bytes.splice(at..at, more));
        }
        7 => bytes[at..end].fill(0),
        _ => {
            let from = random.below(other.len() + 1);
            let part = other[from..(from + len).min(other.len())].to_vec();
            drop(bytes.splice(at..end, part));
        }
    }
}

fn try_mutations(name: &str) {
    let Target { check, seeds, .. } = *TARGETS.iter().find(|target| target.name == name).unwrap();
    let seeds = seeds();
    seeds.iter().for_each(|seed| check(seed));
    for n in 0..TRIES {
        let mut random = Random(n);
        let mut bytes = seeds[random.below(seeds.len())].clone();
        let other = &seeds[random.below(seeds.len())];
        for _ in 0..=random.below(4) {
            mutate(&mut random, &mut bytes, other);
        }
        if std::panic::catch_unwind(|| check(&bytes)).is_err() {
            let kept = std::env::temp_dir().join(format!("blxrep-fuzz-{name}-{n}"));
            fs::write(&kept, &bytes).unwrap();
            panic!("{name}: try {n} broke a promise; the input is in {}", kept.display());
        }
    }
}

#[test]
fn mutated_frames_messages_and_runs_are_refused_or_mean_what_they_say() {
    try_mutations("wire");
}

#[test]
fn mutated_deltas_are_refused_or_mean_what_they_say() {
    try_mutations("bak");
}

#[test]
fn mutated_sums_are_refused_or_mean_what_they_say() {
    try_mutations("sum");
}

#[test]
fn mutated_journals_are_refused_or_mean_what_they_say() {
    try_mutations("cst");
}

#[test]
fn mutated_configurations_are_refused_or_mean_what_they_say() {
    try_mutations("config");
}

#[test]
fn mutated_agents_files_keys_and_names_are_refused_or_mean_what_they_say() {
    try_mutations("agents");
}

#[test]
fn mutated_boot_tests_are_refused_or_mean_what_they_say() {
    try_mutations("boot");
}

#[test]
fn mutated_scrub_records_are_refused_or_mean_what_they_say() {
    try_mutations("scrub");
}

/// `tools/fuzz` begins with these.
#[test]
#[ignore = "writes the seeds of the fuzz targets below $BLXREP_FUZZ_SEEDS"]
fn seeds_are_written() {
    let dir = PathBuf::from(std::env::var("BLXREP_FUZZ_SEEDS").expect("BLXREP_FUZZ_SEEDS: where to"));
    for target in TARGETS {
        let dir = dir.join(target.name);
        fs::create_dir_all(&dir).unwrap();
        for (n, seed) in (target.seeds)().iter().enumerate() {
            fs::write(dir.join(format!("seed-{n}")), seed).unwrap();
        }
    }
}
