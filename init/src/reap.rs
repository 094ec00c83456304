//! Signals and the ends of processes. PID 1 inherits every orphan: all are collected, and those that were services
//! are told by number.

use crate::error::{Error, Result};
use crate::process::Exit;
use crate::sys;
use rustix::process::WaitOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Processes have ended.
    Reap,
    /// Power off (SIGTERM, SIGPWR).
    PowerOff,
    /// Reboot (SIGINT: Ctrl-Alt-Del).
    Reboot,
    /// Nothing.
    Nothing,
}

/// The signals of PID 1, as a descriptor.
#[derive(Debug)]
pub struct Signals {
    descriptor: OwnedFd,
}

impl Signals {
    /// The signals must have been blocked, see [`sys::block_signals`].
    ///
    /// # Errors
    /// When descriptors have run out.
    pub fn open() -> Result<Self> {
        Ok(Self {
            descriptor: sys::signal_descriptor().map_err(Error::system("open a descriptor for signals"))?,
        })
    }

    /// What the next pending signal asks for; `None` when none is pending.
    pub fn next(&self) -> Option<Asked> {
        let signal = sys::next_signal(self.descriptor.as_fd()).ok()?;
        Some(match signal {
            libc::SIGCHLD => Asked::Reap,
            libc::SIGTERM | libc::SIGPWR => Asked::PowerOff,
            libc::SIGINT => Asked::Reboot,
            _ => Asked::Nothing,
        })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Collects one process that has ended: its number and how. `None` when none has.
pub fn collect() -> Option<(u32, Exit)> {
    let (pid, status) = rustix::process::wait(WaitOptions::NOHANG).ok()??;
    let exit = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        // Stopped or continued, which was not asked for.
        (None, None) => return None,
    };
    Some((pid.as_raw_nonzero().get().unsigned_abs(), exit))
}
