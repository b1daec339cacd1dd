//! The role that keeps the replicas: listens, admits agents, and keeps one thread a disk that owns its store.

pub mod change;
#[cfg(test)]
mod compare_tests;
pub mod config_link;
pub mod control;
pub mod disk;
pub mod fetch;
#[cfg(test)]
mod full_tests;
pub mod generations;
pub mod reattach;
pub mod registry;
#[cfg(test)]
mod resize_tests;
pub mod room;
pub mod schedule;
pub mod scrub;
mod serve;
pub mod server;
pub mod session;
#[cfg(test)]
mod survey_tests;
