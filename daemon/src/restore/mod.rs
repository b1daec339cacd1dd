//! Bringing checkpoints back.
