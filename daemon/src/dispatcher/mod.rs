//! The role that keeps the replicas: listens, admits agents, and keeps one thread a disk that owns its store.

pub mod config_link;
pub mod control;
pub mod disk;
pub mod fetch;
#[cfg(test)]
mod full_tests;
pub mod reattach;
pub mod registry;
pub mod room;
pub mod schedule;
pub mod server;
pub mod session;
