//! What the allocator does with buffers that were freed.
//!
//! Every MiB of a disk passes through a handful of buffers of its size. The C library gives such a one back to the kernel and takes
//! it again, zeroed and page by page: a third of a dispatcher's time when it was measured.

/// Buffers below this are cut from what is kept: nothing that holds a run is longer than half of it.
const KEPT_MAX_BYTES: libc::c_int = 4 << 20;
/// So much freed memory is kept, by each of a few arenas.
const KEEP_BYTES: libc::c_int = 16 << 20;

/// Keeps some freed memory for the buffers that come next. To be called before there are threads.
pub(crate) fn keep_buffers() {
    // SAFETY: mallopt takes two numbers and changes settings of the allocator that no memory it gave out depends on. A value it
    // refuses changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_MAX_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEEP_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::{UsageWho, getrusage};

    /// Pages that this thread has taken from the kernel.
    fn faults() -> i64 {
        getrusage(UsageWho::RUSAGE_THREAD).unwrap().minor_page_faults()
    }

    #[test]
    fn a_buffer_that_comes_back_is_not_taken_from_the_kernel_again() {
        keep_buffers();
        let work = || {
            let use_some = || drop(std::hint::black_box([1, 2, 3, 4, 5].map(|byte| vec![byte; 1 << 20])));
            use_some();
            let before = faults();
            (0..100).for_each(|_| use_some());
            faults() - before
        };
        // A thread of its own has an arena that no other test uses.
        let taken = std::thread::spawn(work).join().unwrap();
        assert!(taken < 256 * 5, "{taken} pages: more than the buffers of one round");
    }
}
