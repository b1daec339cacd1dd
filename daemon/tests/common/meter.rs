//! Counts every byte between an agent and its dispatcher, both ways.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses another part")]
#![allow(clippy::unwrap_used, reason = "a test ends so")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A door before the dispatcher. It and its connections end with the test's process.
pub struct Meter {
    pub port: u16,
    bytes: Arc<AtomicU64>,
}

impl Meter {
    pub fn before(dispatcher_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, bytes) = (listener.local_addr().unwrap().port(), Arc::new(AtomicU64::new(0)));
        let counted = bytes.clone();
        std::thread::spawn(move || {
            for agent in listener.incoming().flatten() {
                let Ok(dispatcher) = TcpStream::connect(("127.0.0.1", dispatcher_port)) else { continue };
                let ways =
                    [(agent.try_clone().unwrap(), dispatcher.try_clone().unwrap()), (dispatcher, agent)];
                for (from, to) in ways {
                    let counted = counted.clone();
                    std::thread::spawn(move || carry(from, to, &counted));
                }
            }
        });
        Self { port, bytes }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, counted: &AtomicU64) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        counted.fetch_add(len as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
