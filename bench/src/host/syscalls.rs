//! What a VMM asks of the host until its guest is ready: system calls, counted by the kernel's own tracing, page faults,
//! and the exits that KVM counts. Counting costs time, so it is done in a start of its own.

use crate::figure::{Figure, Unit};
use anyhow::Context;
use rustix::mount::{MountFlags, mount};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Where the bench mounts tracefs.
const TRACING: &str = "/run/atoll-bench/tracing";
/// Where the bench mounts debugfs.
const DEBUG: &str = "/run/atoll-bench/debug";
/// KVM's counters of a virtual machine, by the names of their files (Documentation/virt/kvm/api.rst, 4.136, tells how
/// they are made), and ours.
const KVM: [(&str, &str); 7] = [
    ("exits", "all"),
    ("io_exits", "port"),
    ("mmio_exits", "register"),
    ("halt_exits", "halt"),
    ("irq_exits", "interrupt"),
    ("pf_taken", "nested-page-fault"),
    ("insn_emulation", "emulated"),
];
/// Counts by thread (Documentation/trace/histogram.rst of the kernel).
const HISTOGRAM: &str = "hist:keys=common_pid:size=8192";

/// A count that is under way; ends with this value.
pub struct Count(PathBuf);

impl Count {
    /// Begins to count the system calls of every thread.
    ///
    /// # Errors
    /// When the kernel has no tracing.
    pub fn begin() -> anyhow::Result<Self> {
        std::fs::create_dir_all(TRACING).context("cannot make a directory for tracing")?;
        std::fs::create_dir_all(DEBUG).context("cannot make a directory for KVM's counters")?;
        let nothing: Option<&std::ffi::CStr> = None;
        mount("bench", TRACING, "tracefs", MountFlags::empty(), nothing).context("cannot mount tracefs")?;
        mount("bench", DEBUG, "debugfs", MountFlags::empty(), nothing).context("cannot mount debugfs")?;
        let event = Path::new(TRACING).join("events/raw_syscalls/sys_enter");
        std::fs::write(event.join("trigger"), HISTOGRAM).context("cannot count system calls")?;
        Ok(Self(event))
    }

    /// What a process asked of the host since then.
    ///
    /// # Errors
    /// When it is gone.
    pub fn of(&self, pid: u32) -> anyhow::Result<Vec<Figure>> {
        let counted = std::fs::read_to_string(self.0.join("hist")).context("cannot read the system calls")?;
        let mut threads = BTreeSet::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/task")).context("the VMM is gone")? {
            threads.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("the VMM is gone")?;
        let mut figures = vec![
            Figure::new("vmm.system-calls", sum(&counted, &threads), Unit::Count),
            Figure::new("vmm.page-faults", page_faults(&stat), Unit::Count),
        ];
        let machine = machine_of(pid)?;
        for (file, name) in KVM {
            let path = machine.join(file);
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let count = text.trim().parse().with_context(|| format!("{} is no number", path.display()))?;
            figures.push(Figure::new(format!("vmm.kvm-exits.{name}"), count, Unit::Count));
        }
        Ok(figures)
    }
}

/// The directory that KVM keeps for a process's virtual machine: `PID-DESCRIPTOR`.
fn machine_of(pid: u32) -> anyhow::Result<PathBuf> {
    let all = Path::new(DEBUG).join("kvm");
    let machines = std::fs::read_dir(&all).with_context(|| format!("cannot list {}", all.display()))?;
    let its = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.split_once('-').is_some_and(|(owner, _)| owner == pid.to_string())
    };
    machines.flatten().map(|entry| entry.path()).find(its).context("KVM counts nothing of the VMM")
}

impl Drop for Count {
    fn drop(&mut self) {
        // The machine is thrown away in any case.
        let _ = std::fs::write(self.0.join("trigger"), format!("!{HISTOGRAM}"));
        let _ = rustix::mount::unmount(TRACING, rustix::mount::UnmountFlags::DETACH);
        let _ = rustix::mount::unmount(DEBUG, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Sums lines of `{ common_pid: 178 } hitcount: 45` over some threads.
fn sum(histogram: &str, threads: &BTreeSet<u32>) -> f64 {
    let count = |line: &str| -> Option<f64> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |name: &str| words.iter().skip_while(|word| **word != name).nth(1).copied();
        let thread = after("common_pid:")?.parse().ok()?;
        threads.contains(&thread).then(|| after("hitcount:")?.parse().ok()).flatten()
    };
    histogram.lines().filter_map(count).sum()
}

/// Minor and major faults of the process: fields 10 and 12 of proc_pid_stat(5). The name before them may hold spaces.
fn page_faults(stat: &str) -> f64 {
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let field =
        |number: usize| fields.get(number - 3).and_then(|n| n.parse::<f64>().ok()).unwrap_or_default();
    field(10) + field(12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_the_processes_own_threads_are_summed() {
        let text = "# event histogram\n{ common_pid:        178 } hitcount:         45\n{ common_pid:        179 } hitcount:          5\n{ common_pid:          1 } hitcount:        900\n\nTotals:\n    Hits: 950\n";
        assert_eq!(sum(text, &BTreeSet::from([178, 179])), 50.0);
    }

    #[test]
    fn faults_are_found_behind_any_name() {
        assert_eq!(page_faults("178 (a ) b) S 1 2 3 4 5 6 1000 0 7 0 1 2"), 1007.0);
    }
}
