//! Counters of the VM: exits by class, bytes of the disks, time of the launch steps. Counted with relaxed atomics by
//! whoever does the work, read by `control.rs`.

use atoll_spec::vm::VmStats;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Classes of exits to the VMM. The order is that of [`Exit::NAMES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Port input.
    IoIn,
    /// Port output.
    IoOut,
    /// Register read of a device.
    MmioRead,
    /// Register write of a device.
    MmioWrite,
    /// Halt, with the in-kernel APIC only for a processor that will never wake.
    Halt,
    /// Interrupted by a signal (pause, resume).
    Interrupted,
    /// Triple fault.
    Shutdown,
    /// Anything else.
    Other,
}

impl Exit {
    /// Names in [`VmStats::exits`].
    pub const NAMES: [&'static str; 8] =
        ["io-in", "io-out", "mmio-read", "mmio-write", "hlt", "interrupted", "shutdown", "other"];
}

/// Counters shared by all threads.
#[derive(Debug, Default)]
pub struct Counters {
    exits: [AtomicU64; Exit::NAMES.len()],
    /// Bytes that the disks gave to the guest.
    pub block_read_bytes: AtomicU64,
    /// Bytes that the guest wrote to the disks.
    pub block_written_bytes: AtomicU64,
    /// Bytes of guest memory that went back to the host.
    pub memory_returned_bytes: AtomicU64,
}

impl Counters {
    /// Counts one exit.
    pub fn exit(&self, class: Exit) {
        self.exits[class as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Everything, for the runtime. Classes that never occurred are left out.
    pub fn snapshot(&self, launch: &Launch) -> VmStats {
        let exits = Exit::NAMES
            .iter()
            .zip(&self.exits)
            .map(|(name, count)| ((*name).to_owned(), count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect();
        VmStats {
            exits,
            block_read_bytes: self.block_read_bytes.load(Ordering::Relaxed),
            block_written_bytes: self.block_written_bytes.load(Ordering::Relaxed),
            memory_returned_bytes: self.memory_returned_bytes.load(Ordering::Relaxed),
            launch_us: launch.steps.clone(),
        }
    }
}

/// Times of the launch steps, from the start of the process.
#[derive(Debug, Clone)]
pub struct Launch {
    start: Instant,
    steps: Vec<(String, u64)>,
}

impl Launch {
    /// The clock starts.
    pub fn begin() -> Self {
        Self { start: Instant::now(), steps: Vec::with_capacity(12) }
    }

    /// The step that was done last.
    pub fn last(&self) -> Option<&str> {
        self.steps.last().map(|(step, _)| step.as_str())
    }

    /// A step is done.
    pub fn done(&mut self, step: &str) {
        self.steps.push((step.to_owned(), self.start.elapsed().as_micros() as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_counted_by_name() {
        let counters = Counters::default();
        counters.exit(Exit::IoOut);
        counters.exit(Exit::IoOut);
        counters.exit(Exit::Other);
        let mut launch = Launch::begin();
        launch.done("request");
        let stats = counters.snapshot(&launch);
        assert_eq!(stats.exits.into_iter().collect::<Vec<_>>(), [("io-out".into(), 2), ("other".into(), 1)]);
        assert_eq!(stats.launch_us[0].0, "request");
    }
}
