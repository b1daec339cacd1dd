//! A checkpoint shown to other programs without being restored: as files ([`mount`], FUSE) and as a network block
//! device ([`export`], NBD). Both read through [`image`].
//!
//! Everything here blocks and runs on threads of its own. What must never happen here: a byte served that was not
//! checked, anything of the store changed, memory or threads that grow with what a client asks for.

mod connection;
pub mod export;
mod handshake;
pub mod image;
pub mod mount;
mod overlay;
mod request;
#[cfg(test)]
mod tests;

use std::time::Duration;

/// How often a server looks whether it is to end.
const POLL: Duration = Duration::from_millis(200);
