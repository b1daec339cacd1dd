//! One freeze at a time in an agent.
//!
//! The state directory can lie on what is frozen: a thread of another disk that waits there to write its own freeze record,
//! or which disks are paused, cannot be killed. The agent would not be gone before the thaw, and the guard, which thaws
//! when it is gone, would wait for its deadline.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

static ALONE: Mutex<()> = Mutex::new(());

/// While this is held, no other thread of this agent freezes, or writes to the state directory.
pub struct Alone(#[expect(dead_code, reason = "held")] MutexGuard<'static, ()>);

impl Alone {
    /// Waits for it.
    pub fn take() -> Self {
        Self(ALONE.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes it if nobody has it.
    pub fn try_take() -> Option<Self> {
        match ALONE.try_lock() {
            Ok(guard) => Some(Self(guard)),
            Err(TryLockError::Poisoned(poisoned)) => Some(Self(poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}
