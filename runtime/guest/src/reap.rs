//! The main thread: reaps every process that ends, and tells who waits for it.
//!
//! Invariant: a process is registered before it can be reaped, because [`Processes::launch`] holds the table
//! while it spawns and [`Processes::reap`] holds it while it reaps.

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, wait};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How a process ended, once it has; its descriptor becomes readable then.
pub struct Ending {
    code: OnceLock<i32>,
    wake: OwnedFd,
}

impl Ending {
    /// Of a process that runs; `wake` is an eventfd of its own.
    pub(crate) fn of(wake: OwnedFd) -> Self {
        Self { code: OnceLock::new(), wake }
    }

    /// Exit status, or 128 + signal; `None` while it runs.
    pub fn code(&self) -> Option<i32> {
        self.code.get().copied()
    }

    /// Readable from the end on.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn set(&self, code: i32) {
        // Set once by the reaper.
        let _ = self.code.set(code);
        // Adding 1 to an eventfd cannot fail short of 2^64.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Every process somebody waits for.
#[derive(Default)]
pub struct Processes {
    table: Mutex<HashMap<Pid, Arc<Ending>>>,
    reaped: Condvar,
}

impl Processes {
    /// Runs `spawn` and registers the process it made; gives its number, a pidfd and its end.
    pub fn launch<E: From<Errno>>(
        &self,
        spawn: impl FnOnce() -> Result<Pid, E>,
    ) -> Result<(Pid, OwnedFd, Arc<Ending>), E> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = spawn()?;
        // Not reaped yet, so it exists, even if it has ended.
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let ending = Arc::new(Ending::of(wake));
        table.insert(pid, Arc::clone(&ending));
        Ok((pid, pidfd, ending))
    }

    /// Waits until every registered process has been reaped, at most `limit`; says whether they were.
    pub fn all_gone(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        while !table.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            table = self.reaped.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Reaps all that have ended; returns when none is left to reap now.
    pub fn reap(&self) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let code = status
                .exit_status()
                .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
                .unwrap_or(255);
            // Others are orphans that containers left to us.
            if let Some(ending) = table.remove(&pid) {
                ending.set(code);
                self.reaped.notify_all();
            }
        }
    }
}
