//! A dispatcher and an agent in virtual machines with kernels of their own, the agent with a disk of every kind: virtio, NVMe, LVM linear and
//! thin, a mirror of md, dm-crypt. Run by `make test-vm` and `make test-vm-all`, not by `make test`.

#![allow(unreachable_pub, reason = "the modules of a test binary")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

#[path = "../common/janitor.rs"]
mod janitor;
#[path = "../common/lab.rs"]
mod lab;
#[path = "../common/stage.rs"]
mod stage;

mod guest;
mod pair;

use lab::wait_for;
use pair::Pair;

/// How long a checkpoint of every disk may take, in seconds: processors are emulated.
const SLOW: u64 = 900;

/// Every checkpoint is what its photograph shows, also behind a power cut in mid-write, after which every disk is compared. A restore to the
/// agent's machine lives through power cuts as well.
fn every_checkpoint_is_its_photograph(agent_kernel: &str, dispatcher_kernel: &str) {
    let mut pair = Pair::boot(agent_kernel, dispatcher_kernel);
    pair.configure();
    pair.start();
    wait_for("two checkpoints of every disk", SLOW, || pair.all_have(|_| 2));
    pair.agent.power_cut();
    let before = pair.counts();
    pair.boot_agent();
    wait_for("two checkpoints more of every disk", SLOW, || pair.all_have(|disk| before[disk] + 2));
    pair.assert_compared();
    pair.restore_through_power_cuts();
    pair.compare_with_photographs();
}

#[test]
fn kernel_6_1() {
    every_checkpoint_is_its_photograph("6.1", "newest");
}

#[test]
fn kernel_6_12() {
    every_checkpoint_is_its_photograph("6.12", "6.1");
}

#[test]
fn newest_kernel() {
    every_checkpoint_is_its_photograph("newest", "6.12");
}
