//! Making a checkpoint a point in time.
//!
//! [`topology`] finds the file systems on a disk, [`guard`] freezes and thaws them from a process of its own,
//! [`hooks`] lets applications prepare, [`record`] remembers a freeze for the case that everybody is killed, and
//! [`final_pass`] does all of it in the right order.
//!
//! What must never happen here: a file system that stays frozen. Everything is bounded in time, and whoever dies,
//! somebody is left who thaws.

pub mod alone;
mod devices;
pub mod final_pass;
mod frost;
pub mod guard;
mod guard_process;
mod guard_wire;
pub mod hooks;
mod memory;
pub mod mountinfo;
pub mod mounts;
pub mod place;
pub mod record;
pub mod topology;
mod verdict;
