//! Prints how many seconds one thread takes to hash some MiB as a compare does: `hash MIB`.

use std::time::Instant;

use blxrep::geometry::{GROUP_BYTES, Geometry};
use blxrep::hash::group_digest;
use blxrep::reader::hash_extent;

fn main() {
    let mib = std::env::args().nth(1).and_then(|mib| mib.parse().ok()).unwrap_or(1024);
    let Ok(geometry) = Geometry::new(GROUP_BYTES, 12) else { return };
    // No zeros: those are known without being hashed.
    let data: Vec<u8> = (0..GROUP_BYTES).map(|byte| (byte % 251) as u8 + 1).collect();
    let began = Instant::now();
    for _ in 0..mib {
        std::hint::black_box(group_digest(&hash_extent(std::hint::black_box(&data), geometry)));
    }
    println!("{:.3}", began.elapsed().as_secs_f64());
}
