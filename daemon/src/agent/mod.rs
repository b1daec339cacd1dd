//! The role on a server whose disks are replicated: one thread a disk, and the connections to the dispatcher.

pub mod action;
pub mod control;
pub mod disk;
pub mod disk_id;
pub mod fetch;
pub mod footprint;
pub mod held;
pub mod link;
pub mod open;
pub mod pace;
pub mod read;
pub mod run;
pub mod scan;
pub mod session;
pub mod shared;
pub mod sync;
pub mod unfinished;
