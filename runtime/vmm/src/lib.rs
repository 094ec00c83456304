//! The Atoll virtual machine monitor: one process per microVM.
//!
//! The runtime starts it with a listening control socket as descriptor 3 and sends one boot request with every resource
//! as a descriptor. From there the flow is one-way:
//!
//! ```text
//! control: Boot ──► check ──► jail ──► builder: memory, kernel, processors, devices ──► threads, filters ──► run
//! control: MapLayer, Pause, Resume, Stats, Kill ──► machine           guest ──► vcpu ──► bus ──► virtio
//! ```
//!
//! Invariants: no byte of the guest is read before the jail is closed; every descriptor came through the control
//! socket or was made here; there is no path to open.

pub mod builder;
pub mod bus;
pub mod control;
pub mod cpuid;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod jail;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod mptable;
pub mod seccomp;
pub mod serial;
pub mod stats;
pub mod vcpu;
pub mod virtio;

use crate::builder::BootFds;
use crate::control::Server;
use crate::error::{Error, Result};
use crate::machine::{Filter, Machine};
use crate::seccomp::Class;
use crate::stats::Launch;
use atoll_spec::vm::{LAYER_WINDOW_EXTENTS, VmReply, VmSpec};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// The control socket.
const CONTROL_FD: RawFd = 3;

/// Runs one machine from its boot request to its end. Returns the exit status and a line for stderr.
pub fn run() -> Result<(i32, Option<String>)> {
    let mut launch = Launch::begin();
    close_inherited()?;
    // SAFETY: descriptor 3 is the control socket by contract, and nothing else in this process owns it.
    let mut server = Server::new(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) })?;
    let (spec, fds, peer) = server.wait_for_boot()?.into_parts();
    launch.done("request");
    match boot(&spec, fds, launch) {
        Ok(mut machine) => {
            machine.run();
            server.answer_boot(peer, &VmReply::Ok);
            let outcome = server.serve(&machine);
            // The threads still use it, and the process is about to exit: the kernel takes everything back at once.
            std::mem::forget(machine);
            outcome
        }
        Err(error) => {
            server.answer_boot(peer, &VmReply::Error { message: error.chain() });
            Err(error)
        }
    }
}

/// Everything up to the first instruction of the guest.
fn boot(spec: &VmSpec, fds: Vec<OwnedFd>, mut launch: Launch) -> Result<Machine> {
    builder::check(spec)?;
    let fds = BootFds::new(spec, fds)?;
    let filter = match spec.uid {
        Some(uid) => {
            jail::enter(uid, limits(spec, &fds)?)?;
            Filter::On
        }
        None => Filter::Off,
    };
    launch.done("jail");
    let mut machine = builder::build(spec, fds, launch)?;
    machine.start(filter)?;
    if filter == Filter::On {
        seccomp::install(Class::Main, &seccomp::compile(Class::Main)?)?;
    }
    Ok(machine)
}

fn limits(spec: &VmSpec, fds: &BootFds) -> Result<jail::Limits> {
    // Two for each processor, and what the machine, the control socket and a packet need.
    let own = 2 * u64::from(spec.vcpus) + 64;
    Ok(jail::Limits {
        descriptors: LAYER_WINDOW_EXTENTS as u64 + own,
        file_bytes: fds.scratch_bytes()?.max(serial::MAX_OUTPUT),
        threads: u64::from(spec.vcpus) + 16,
    })
}

/// Whatever the parent forgot to close is not ours to have.
fn close_inherited() -> Result<()> {
    // SAFETY: takes no pointers; nothing in this process owns a descriptor above the control socket yet.
    match unsafe { libc::close_range(CONTROL_FD as u32 + 1, u32::MAX, 0) } {
        0 => Ok(()),
        _ => Err(Error::system("close inherited descriptors")(std::io::Error::last_os_error())),
    }
}
