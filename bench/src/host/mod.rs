//! Inside the measured host: everything that is measured there, one file each. `bin/bench_host.rs` calls them in order.

pub mod clock;
pub mod control;
pub mod memory;
pub mod microvm;
pub mod pods;
pub mod registry;
pub mod sys;
pub mod syscalls;
pub mod traffic;
pub mod unpack;
