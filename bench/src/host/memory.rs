//! What processes and pods hold of the host's memory.

use crate::figure::{Figure, Unit, median};
use anyhow::Context;
use std::path::Path;

const MIB: f64 = 1024.0;
/// Where the runtime keeps a cgroup for each VMM.
const PODS: &str = "/sys/fs/cgroup/atoll/pods";

/// A process of the host's, by its program.
fn processes() -> anyhow::Result<Vec<(u32, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").context("cannot list /proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end while it is looked at.
        if let Ok(program) = std::fs::read_link(entry.path().join("exe")) {
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.push((pid, name));
        }
    }
    Ok(found)
}

/// A field of a file with lines of `Name:  number kB`, in KiB.
fn field(path: &Path, name: &str) -> f64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(':')));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or_default()
}

/// Resident memory of the host's services, and of all VMMs what one holds.
///
/// # Errors
/// When /proc cannot be read.
pub fn services(pods: usize) -> anyhow::Result<Vec<Figure>> {
    let processes = processes()?;
    let mut figures = Vec::new();
    for service in ["init", "hostd", "runtime", "agent"] {
        let program = format!("atoll-{service}");
        let found = processes.iter().find(|(_, name)| *name == program).map(|(pid, _)| *pid);
        // The first process was executed by another name.
        let first = (service == "init").then_some(1);
        let pid = first.or(found).with_context(|| format!("{program} does not run"))?;
        let rss = field(Path::new(&format!("/proc/{pid}/status")), "VmRSS");
        figures.push(Figure::new(format!("memory.{service}.pods-{pods}"), rss / MIB, Unit::Mib));
    }
    Ok(figures)
}

/// Memory that is not available to anybody else, in KiB.
pub fn in_use() -> f64 {
    let meminfo = Path::new("/proc/meminfo");
    field(meminfo, "MemTotal") - field(meminfo, "MemAvailable")
}

/// What a VMM holds: `(private without the guest's memory, the guest's memory)`, in KiB.
pub fn vmm(pid: u32) -> (f64, f64) {
    split_smaps(&std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default())
}

/// The guest's memory is the one large mapping that no file lies behind.
fn split_smaps(text: &str) -> (f64, f64) {
    const LARGE: f64 = 64.0 * 1024.0;
    let (mut own, mut guest) = (0.0, 0.0);
    let (mut unnamed, mut of_guest) = (false, false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let number = words.next().and_then(|n| n.parse::<f64>().ok()).unwrap_or_default();
        match first {
            "Size:" => of_guest = unnamed && number >= LARGE,
            "Private_Clean:" | "Private_Dirty:" if of_guest => guest += number,
            "Private_Clean:" | "Private_Dirty:" => own += number,
            // The head of a mapping: `begin-end rights offset device inode name`.
            _ if !first.ends_with(':') => unnamed = line.split_whitespace().count() == 5,
            _ => {}
        }
    }
    (own, guest)
}

/// One idle pod, from its VMM and its cgroup; the middle of all that run.
///
/// # Errors
/// When the cgroups cannot be read.
pub fn pods() -> anyhow::Result<Vec<Figure>> {
    let vmms: Vec<(f64, f64)> =
        processes()?.into_iter().filter(|(_, name)| name == "atoll-vmm").map(|(pid, _)| vmm(pid)).collect();
    let mut groups = Vec::new();
    for entry in std::fs::read_dir(PODS).context("cannot list the pods' cgroups")? {
        let directory = entry?.path();
        let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap_or_default();
        let current: f64 = read("memory.current").trim().parse().unwrap_or_default();
        if current > 0.0 {
            groups.push((current / 1024.0, page_tables(&read("memory.stat")) / 1024.0));
        }
    }
    let middle = |pick: &dyn Fn(&(f64, f64)) -> f64, all: &[(f64, f64)]| {
        median(&all.iter().map(pick).collect::<Vec<_>>())
    };
    Ok(vec![
        Figure::new("memory.vmm.private", middle(&|v| v.0, &vmms) / MIB, Unit::Mib),
        Figure::new("memory.vmm.guest", middle(&|v| v.1, &vmms) / MIB, Unit::Mib),
        Figure::new("memory.pod.cgroup", middle(&|g| g.0, &groups) / MIB, Unit::Mib),
        Figure::new("memory.pod.page-tables", middle(&|g| g.1, &groups) / MIB, Unit::Mib),
    ])
}

/// The process's page tables and KVM's, in bytes.
fn page_tables(stat: &str) -> f64 {
    stat.lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| ["pagetables", "sec_pagetables"].contains(name))
        .filter_map(|(_, bytes)| bytes.parse::<f64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_told_from_the_vmms_own() {
        let text = "7f00-7f10 rw-p 00000000 00:00 0\nSize: 262144 kB\nPrivate_Clean: 4 kB\nPrivate_Dirty: 100 kB\n\
                    7f20-7f30 rw-p 00000000 00:00 0\nSize: 8192 kB\nPrivate_Dirty: 2 kB\n\
                    7f40-7f50 r--p 00000000 00:02 6 /layer\nSize: 900000 kB\nShared_Clean: 900 kB\nPrivate_Clean: 8 kB\n";
        assert_eq!(split_smaps(text), (10.0, 104.0));
    }

    #[test]
    fn page_tables_are_those_of_the_process_and_of_kvm() {
        assert_eq!(page_tables("anon 5\npagetables 4096\nsec_pagetables 8192\nshmem 1\n"), 12288.0);
    }
}
