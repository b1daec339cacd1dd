//! What ends a command before it is done.

use std::mem::MaybeUninit;
use std::ptr;

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};

/// Runs `stop` at every SIGINT, SIGTERM and, where it is not ignored, SIGHUP from now on, in a thread. No thread begun later gets
/// these signals.
pub(super) fn on_signal(stop: impl Fn() + Send + 'static) -> anyhow::Result<()> {
    let mut signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    // nohup(1) leaves it ignored, and means it.
    if !is_ignored(libc::SIGHUP) {
        signals.add(Signal::SIGHUP);
    }
    signals.thread_block().context("signals")?;
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            stop();
        }
    });
    Ok(())
}

fn is_ignored(signal: i32) -> bool {
    let mut now = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: sigaction(2) without a new action only writes the one there is; all zeros is a value of it as well.
    let now = unsafe {
        libc::sigaction(signal, ptr::null(), now.as_mut_ptr());
        now.assume_init()
    };
    now.sa_sigaction == libc::SIG_IGN
}
