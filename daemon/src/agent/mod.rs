//! The role on a server whose disks are replicated.

mod command;
pub mod disk_id;
pub mod footprint;
mod lsblk;
