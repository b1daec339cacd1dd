//! blxrep: live replication of disks over the network.
//!
//! The path of data, in the order of the modules: [`tracker`] says which blocks changed, [`bitmap`] holds them,
//! [`reader`] reads and hashes them, [`wire`] carries them, [`store`] keeps them, [`checkpoint`] names what can be
//! brought back and [`restore`] brings it back; [`serve`] shows it without that. [`freeze`] makes a checkpoint a point in time. [`agent`] and
//! [`dispatcher`] are the two roles built from these parts.

pub mod accept;
pub mod agent;
pub mod bitmap;
pub mod boot_test;
pub mod bus;
pub mod checkpoint;
pub mod clock;
mod command;
pub mod config;
pub mod device;
pub mod disk_list;
pub mod dispatcher;
pub mod freeze;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod generation;
pub mod geometry;
pub mod hash;
pub mod ids;
pub mod lock;
mod lsblk;
pub mod message_id;
pub mod partitions;
pub mod pause;
pub mod reader;
pub mod restore;
pub mod run;
pub mod serve;
#[cfg(test)]
mod simulation;
pub mod status;
pub mod store;
pub mod tracker;
pub mod unreadable;
pub mod watchdog;
pub mod wire;
