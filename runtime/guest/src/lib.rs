//! The guest: PID 1 inside an Atoll microVM, the one program of its initramfs.
//!
//! ```text
//! boot ─► rpc (dials the runtime over vsock) ─► guest (one method per call) ─► containers
//!                                                  │ spawns `atoll-guest stage` ─► exec of the container's command
//! reap (main thread) ─► process exits ─► stdio pump of that process ─► events ─► rpc
//! ```
//!
//! Plain threads, no async runtime: a guest has a few processes, and each has one thread that moves its bytes.
//! Invariants: PID 1 never exits and never panics the kernel (a failure is logged to the console and the machine
//! reset, which the VMM takes as the end); nothing in a container stops when the runtime's connection breaks.
//!
//! A library, so that what it reads from others can be fuzzed; `main.rs` makes it a program.

mod boot;
mod cgroup;
mod container;
mod error;
mod events;
mod exec;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod guest;
mod layers;
mod log;
mod mount;
mod network;
mod options;
mod power;
mod process;
mod reap;
mod resolve;
mod rootfs;
mod rpc;
mod stage;
mod stats;
mod stdio;
mod sys;
mod transport;
mod tree;
mod user;
mod volumes;

use options::Mode;
pub use sys::start;

/// Called by [`sys::start`] with the arguments of the process.
fn run(args: &[String]) -> i32 {
    match options::parse(args) {
        Ok(Mode::Machine(options)) => boot::machine(options),
        Ok(Mode::Rehearsal(options)) => boot::rehearsal(options),
        Ok(Mode::Stage) => stage::main(),
        Ok(Mode::Pause { empty }) => stage::pause(&empty),
        Err(message) => {
            eprintln!("atoll-guest: {message}");
            2
        }
    }
}
