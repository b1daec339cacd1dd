//! The values that were used last, shared by threads. What must never happen here: more of them kept than was said.

use std::hash::Hash;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;

/// At most so many values, each by its key.
pub(super) struct Recent<K: Hash + Eq, V>(Mutex<LruCache<K, Arc<V>>>);

impl<K: Hash + Eq, V> Recent<K, V> {
    /// Keeps `max` values.
    pub(super) fn new(max: NonZeroUsize) -> Self {
        Self(Mutex::new(LruCache::new(max)))
    }

    /// The value of this key, made if it is not kept. Other threads go on meanwhile, so two may make the same.
    ///
    /// # Errors
    /// What `make` says; then nothing is kept.
    pub(super) fn get<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<Arc<V>, E> {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = kept().get(&key) {
            return Ok(value.clone());
        }
        let value = Arc::new(make()?);
        kept().put(key, value.clone());
        Ok(value)
    }
}
