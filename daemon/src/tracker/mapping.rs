//! A BPF array mapped into this process.
//!
//! What must never happen here: a plain (not atomic) access to memory that the probe changes at the same time.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::AtomicU64;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

/// The words of a mapped array; unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    address: NonNull<c_void>,
    words: usize,
    len_bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, is valid in every thread, and its memory is only reached as atomics.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps an array of `words` words made with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// What mmap(2) says; the kernel refuses a length behind the array's end.
    pub(super) fn new(map: impl AsFd, words: usize) -> io::Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|n| usize::try_from(n).ok()).unwrap_or(4096);
        let len = words.checked_mul(8).and_then(|n| n.checked_next_multiple_of(page));
        let len = len.and_then(NonZeroUsize::new).ok_or(io::ErrorKind::InvalidInput)?;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new shared mapping at an address of the kernel's choice; no existing memory is touched.
        let address = unsafe { mmap(None, len, rights, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self { address, words, len_bytes: len.get() })
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, at least `words` * 8 bytes long, readable and writable, and lives as
        // long as self. Others (the probe) change it at any time, which AtomicU64 allows.
        unsafe { slice::from_raw_parts(self.address.cast().as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what mmap returned, and no reference outlives self. An error could only mean a wrong
        // argument and would change nothing.
        let _ = unsafe { munmap(self.address, self.len_bytes) };
    }
}
