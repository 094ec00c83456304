//! Counters of the guest and its containers.

use crate::cgroup::field;
use crate::container::Containers;
use crate::volumes::Volumes;
use atoll_spec::guest::{GuestStats, NetworkUsage, Usage};
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Most entries looked at for the size of one writable layer: beyond it the figure is a lower bound.
const MAX_ENTRIES: usize = 50_000;

/// Everything, now.
pub fn collect(containers: &Containers, volumes: Option<&Volumes>, cgroup_root: &Path) -> GuestStats {
    let all = containers.all();
    let containers = all.iter().map(|one| (one.spec.container.to_string(), one.usage())).collect();
    GuestStats {
        total: total(cgroup_root),
        network: network(&read("/proc/net/dev")),
        containers,
        volumes: volumes.map(Volumes::usage).unwrap_or_default(),
    }
}

fn read(path: impl AsRef<Path>) -> String {
    // A counter that cannot be read is 0: statistics are not worth a failed call.
    std::fs::read_to_string(path).unwrap_or_default()
}

fn total(cgroup_root: &Path) -> Usage {
    let memory = read("/proc/meminfo");
    let kib = |key| meminfo(&memory, key).saturating_mul(1024);
    let events = read("/proc/vmstat");
    let used = kib("MemTotal").saturating_sub(kib("MemFree"));
    Usage {
        cpu_ns: field(&read(cgroup_root.join("cpu.stat")), "usage_usec").unwrap_or(0).saturating_mul(1000),
        memory_bytes: used,
        working_set_bytes: used.saturating_sub(kib("Inactive(file)")),
        rss_bytes: kib("AnonPages"),
        page_faults: field(&events, "pgfault").unwrap_or(0),
        major_page_faults: field(&events, "pgmajfault").unwrap_or(0),
        pids: read("/proc/loadavg").split(['/', ' ']).nth(4).and_then(|text| text.parse().ok()).unwrap_or(0),
        ..Usage::default()
    }
}

fn meminfo(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn network(text: &str) -> NetworkUsage {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("eth0:"));
    let numbers: Vec<u64> =
        line.unwrap_or("").split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
    let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
    NetworkUsage { rx_bytes: at(0), rx_errors: at(2) + at(3), tx_bytes: at(8), tx_errors: at(10) + at(11) }
}

/// Bytes and inodes below a directory, hard links counted once.
pub fn tree_size(top: &Path) -> (u64, u64) {
    let (mut bytes, mut inodes, mut seen) = (0u64, 0u64, 0usize);
    let mut linked = HashSet::new();
    let mut waiting: Vec<PathBuf> = vec![top.to_owned()];
    while let Some(directory) = waiting.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            seen += 1;
            if seen > MAX_ENTRIES {
                return (bytes, inodes);
            }
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert(metadata.ino()) {
                continue;
            }
            bytes += metadata.blocks() * 512;
            inodes += 1;
            if metadata.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    (bytes, inodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_counters() {
        let text = "Inter-|\n face |\n    lo: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n  eth0: 100 2 3 4 0 0 0 0 500 6 7 8 0 0 0 0\n";
        let usage = network(text);
        assert_eq!((usage.rx_bytes, usage.rx_errors, usage.tx_bytes, usage.tx_errors), (100, 7, 500, 15));
        assert_eq!(network(""), NetworkUsage::default());
    }

    #[test]
    fn memory_lines() {
        assert_eq!(meminfo("MemTotal:  12 kB\nMemFree: 3 kB\n", "MemFree"), 3);
        assert_eq!(meminfo("", "MemFree"), 0);
    }

    #[test]
    fn hard_links_count_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), vec![1; 8192]).unwrap();
        std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert_eq!(tree_size(dir.path()).1, 1);
    }
}
