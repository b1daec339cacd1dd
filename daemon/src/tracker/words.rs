//! Memory shared with the probe, as words that are only ever touched atomically.
//!
//! A trait, so that a test can record the order of accesses, or stop them at any point as a kill would.

use std::sync::atomic::{AtomicU64, Ordering};

/// An array of shared words. An index behind the end reads 0 and writes nothing.
pub trait Words {
    /// The number of words.
    fn len(&self) -> usize;
    /// Whether there is no word.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Reads a word.
    fn load(&self, index: usize) -> u64;
    /// Writes a word.
    fn store(&self, index: usize, value: u64);
    /// Sets bits of a word.
    fn set(&self, index: usize, bits: u64);
    /// Clears bits of a word.
    fn clear(&self, index: usize, bits: u64);
}

impl Words for [AtomicU64] {
    fn len(&self) -> usize {
        <[AtomicU64]>::len(self)
    }

    fn load(&self, index: usize) -> u64 {
        self.get(index).map_or(0, |word| word.load(Ordering::SeqCst))
    }

    fn store(&self, index: usize, value: u64) {
        if let Some(word) = self.get(index) {
            word.store(value, Ordering::SeqCst);
        }
    }

    fn set(&self, index: usize, bits: u64) {
        if let Some(word) = self.get(index) {
            word.fetch_or(bits, Ordering::SeqCst);
        }
    }

    fn clear(&self, index: usize, bits: u64) {
        if let Some(word) = self.get(index) {
            word.fetch_and(!bits, Ordering::SeqCst);
        }
    }
}

/// A memory for tests: logs every write and ignores all after the `budget`-th, as if the process had been killed.
#[cfg(test)]
pub(crate) mod fake {
    use super::Words;
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    /// How many writes are still carried out, over all memories that share it, and which words were written.
    #[derive(Clone, Default)]
    pub(crate) struct Life {
        budget: Rc<Cell<Option<u64>>>,
        log: Rc<RefCell<Vec<(&'static str, usize)>>>,
    }

    impl Life {
        pub(crate) fn until(budget: u64) -> Self {
            Self { budget: Rc::new(Cell::new(Some(budget))), log: Rc::default() }
        }

        pub(crate) fn log(&self) -> Vec<(&'static str, usize)> {
            self.log.borrow().clone()
        }

        fn lives(&self, name: &'static str, index: usize) -> bool {
            match self.budget.get() {
                Some(0) => return false,
                Some(n) => self.budget.set(Some(n - 1)),
                None => {}
            }
            self.log.borrow_mut().push((name, index));
            true
        }
    }

    pub(crate) struct FakeWords {
        pub(crate) name: &'static str,
        pub(crate) words: RefCell<Vec<u64>>,
        pub(crate) life: Life,
    }

    impl FakeWords {
        pub(crate) fn new(name: &'static str, words: Vec<u64>, life: &Life) -> Self {
            Self { name, words: RefCell::new(words), life: life.clone() }
        }

        fn change(&self, index: usize, change: impl FnOnce(u64) -> u64) {
            if self.life.lives(self.name, index)
                && let Some(word) = self.words.borrow_mut().get_mut(index)
            {
                *word = change(*word);
            }
        }
    }

    impl Words for FakeWords {
        fn len(&self) -> usize {
            self.words.borrow().len()
        }
        fn load(&self, index: usize) -> u64 {
            self.words.borrow().get(index).copied().unwrap_or(0)
        }
        fn store(&self, index: usize, value: u64) {
            self.change(index, |_| value);
        }
        fn set(&self, index: usize, bits: u64) {
            self.change(index, |word| word | bits);
        }
        fn clear(&self, index: usize, bits: u64) {
            self.change(index, |word| word & !bits);
        }
    }
}
