//! Two real hosts, an agent whose root is replicated and a dispatcher, under systemd, as README tells a new user to run them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

#[path = "../common/hosts.rs"]
mod hosts;
#[path = "../common/janitor.rs"]
mod janitor;
#[path = "../common/lab.rs"]
mod lab;
#[path = "../common/stage.rs"]
mod stage;

mod access;
mod bus;
mod freeze;
mod network;
mod pause;
mod postgres;
mod reboot;
mod serve;
mod services;
mod upgrade;
mod watchdog;
