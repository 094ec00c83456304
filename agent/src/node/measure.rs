//! Measures the machine: processors, memory, storage, processes.

use super::capacity::Capacity;
use crate::error::{Error, Result};
use std::path::Path;

/// Memory kept for the host's own services, and the least that must stay free, in bytes.
const HOST_MEMORY: u64 = 256 << 20;
const FREE_MEMORY: u64 = 100 << 20;
/// Share of the storage that must stay free, in percent.
const FREE_STORAGE_PERCENT: u64 = 10;
/// Processor time kept for the host, in thousandths.
const HOST_CPU_MILLIS: u64 = 100;

/// What the machine has. `data` is any path on the file system of images and scratch disks.
///
/// # Errors
/// When /proc or the file system cannot be read.
pub fn capacity(data: &Path, pods: u32) -> Result<Capacity> {
    let (memory_bytes, _) = memory()?;
    let (storage_bytes, _) = storage(data)?;
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    Ok(Capacity {
        cpu_millis: processors * 1000,
        memory_bytes,
        storage_bytes,
        pods,
        reserved_cpu_millis: HOST_CPU_MILLIS,
        reserved_memory_bytes: HOST_MEMORY + FREE_MEMORY,
        reserved_storage_bytes: storage_bytes * FREE_STORAGE_PERCENT / 100,
    })
}

/// Total and available memory, in bytes.
pub(super) fn memory() -> Result<(u64, u64)> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
        what: "memory",
        path: path.into(),
        source,
    })?;
    Ok((meminfo_bytes(&text, "MemTotal").unwrap_or(0), meminfo_bytes(&text, "MemAvailable").unwrap_or(0)))
}

/// A field of /proc/meminfo (proc_meminfo(5)), which counts in KiB.
fn meminfo_bytes(text: &str, field: &str) -> Option<u64> {
    let line =
        text.lines().find(|line| line.strip_prefix(field).is_some_and(|rest| rest.starts_with(':')))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// Size of a file system and what is free for us, in bytes.
pub(super) fn storage(path: &Path) -> Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(path).map_err(|error| Error::Read {
        what: "size of the file system of",
        path: path.into(),
        source: error.into(),
    })?;
    Ok((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
}

/// Processes now and at most.
pub(super) fn processes() -> Option<(u64, u64)> {
    // Fourth field of /proc/loadavg (proc_loadavg(5)): runnable/total.
    let loadavg = std::fs::read_to_string("/proc/loadavg").ok()?;
    let now = loadavg.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()?;
    let most = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok()?.trim().parse().ok()?;
    Some((now, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kib() {
        let text = "MemTotal:       2048 kB\nMemTotalX: 1 kB\nMemAvailable:    1024 kB\n";
        assert_eq!(meminfo_bytes(text, "MemTotal"), Some(2 << 20));
        assert_eq!(meminfo_bytes(text, "MemAvailable"), Some(1 << 20));
        assert_eq!(meminfo_bytes(text, "Swap"), None);
    }

    #[test]
    fn this_machine_has_something() {
        let capacity = capacity(Path::new("/"), 110).unwrap();
        assert!(capacity.cpu_millis >= 1000 && capacity.memory_bytes > 0 && capacity.storage_bytes > 0);
        assert!(capacity.allocatable_storage_bytes() < capacity.storage_bytes);
    }
}
