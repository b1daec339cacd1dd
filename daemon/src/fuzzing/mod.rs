//! What every decoder owes to any bytes: no panic, no memory without a bound, and what it accepts means what it
//! says. One function for each target of `fuzz/`, which libFuzzer drives; the ordinary tests drive the same
//! functions with some thousands of mutations of valid inputs.
//!
//! Only there in tests and under cargo-fuzz.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a fuzz target ends so"
)]

mod files;
mod kept;
mod repair;
#[cfg(test)]
mod tests;
mod texts;
mod wire;

/// A decoder, or some that belong together.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name in `fuzz/`.
    pub name: &'static str,
    /// Panics if a decoder breaks its promise on these bytes.
    pub check: fn(&[u8]),
    /// Inputs to begin with, all of them valid.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 8] = [
    Target { name: "wire", check: wire::check, seeds: wire::seeds },
    Target { name: "bak", check: files::check_bak, seeds: files::bak_seeds },
    Target { name: "sum", check: files::check_sum, seeds: files::sum_seeds },
    Target { name: "cst", check: files::check_cst, seeds: files::cst_seeds },
    Target { name: "config", check: texts::check_config, seeds: texts::config_seeds },
    Target { name: "agents", check: texts::check_agents, seeds: texts::agents_seeds },
    Target { name: "boot", check: kept::check_boot, seeds: kept::boot_seeds },
    Target { name: "scrub", check: kept::check_scrub, seeds: kept::scrub_seeds },
];

/// Runs the target of this name.
pub fn check(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of this name");
    (target.check)(bytes);
}
