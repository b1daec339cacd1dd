//! Counts every byte between an agent and its dispatcher, both ways; cuts connections, or holds them up.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses another part")]
#![allow(clippy::unwrap_used, reason = "a test ends so")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// A door before the dispatcher. It and its connections end with the test's process.
pub struct Meter {
    pub port: u16,
    state: Arc<State>,
}

struct State {
    bytes: AtomicU64,
    /// When so many bytes have passed, no more do.
    hold_at_bytes: AtomicU64,
    /// So many connections are cut when each has carried so many bytes.
    cuts_left: AtomicU32,
    cut_after_bytes: u64,
}

impl Meter {
    pub fn before(dispatcher_port: u16) -> Self {
        Self::cutting(dispatcher_port, 0, 0)
    }

    /// Cuts the first connections that carry this many bytes.
    pub fn cutting(dispatcher_port: u16, cuts: u32, cut_after_bytes: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let state = Arc::new(State {
            bytes: AtomicU64::new(0),
            hold_at_bytes: AtomicU64::new(u64::MAX),
            cuts_left: AtomicU32::new(cuts),
            cut_after_bytes,
        });
        let (port, shared) = (listener.local_addr().unwrap().port(), state.clone());
        std::thread::spawn(move || {
            for agent in listener.incoming().flatten() {
                let Ok(dispatcher) = TcpStream::connect(("127.0.0.1", dispatcher_port)) else { continue };
                let carried = Arc::new(AtomicU64::new(0));
                let ways =
                    [(agent.try_clone().unwrap(), dispatcher.try_clone().unwrap()), (dispatcher, agent)];
                for (from, to) in ways {
                    let (state, carried) = (shared.clone(), carried.clone());
                    std::thread::spawn(move || carry(from, to, &state, &carried));
                }
            }
        });
        Self { port, state }
    }

    pub fn bytes(&self) -> u64 {
        self.state.bytes.load(Ordering::Relaxed)
    }

    /// Connections that are still to be cut.
    pub fn cuts_left(&self) -> u32 {
        self.state.cuts_left.load(Ordering::Relaxed)
    }

    /// Lets no more than so many bytes pass from now on, until it is called again.
    pub fn hold_after(&self, bytes: u64) {
        self.state.hold_at_bytes.store(self.bytes().saturating_add(bytes), Ordering::Relaxed);
    }

    /// Whether it holds bytes up.
    pub fn holds(&self) -> bool {
        self.bytes() >= self.state.hold_at_bytes.load(Ordering::Relaxed)
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, state: &State, carried: &AtomicU64) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        while state.bytes.load(Ordering::Relaxed) >= state.hold_at_bytes.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        state.bytes.fetch_add(len as u64, Ordering::Relaxed);
        let before = carried.fetch_add(len as u64, Ordering::Relaxed);
        let is_over = before < state.cut_after_bytes && before + len as u64 >= state.cut_after_bytes;
        let take = |left: u32| left.checked_sub(1);
        if is_over && state.cuts_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            break;
        }
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
