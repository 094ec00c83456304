//! The cgroup tree: `atoll/services/<name>` for the host plane, `atoll/pods/<sandbox>` for everything it hosts.
//! Memory of the host plane is kept for it, and pods together can never take all of the machine, so that the
//! supervisors outlive what they supervise.

use crate::error::{Error, Result};
use crate::services::{Limits, Service};
use crate::sys::Syscalls;
use atoll_spec::control::{PODS_CGROUP, SERVICES_CGROUP};
use rustix::fs::{Mode, OFlags};
use std::os::fd::OwnedFd;

const ROOT: &str = "/sys/fs/cgroup";
const ATOLL: &str = "/sys/fs/cgroup/atoll";
const CONTROLLERS: [&str; 5] = ["cpu", "memory", "pids", "io", "cpuset"];
const MIB: u64 = 1024 * 1024;
/// Memory kept for init, the kernel and short tools beside what the services have for certain, in MiB.
const RESERVE_MIB: u64 = 96;

/// Makes the tree and its limits.
///
/// # Errors
/// When a group cannot be made; limits that a kernel does not have are told as one error after all were tried.
pub fn prepare(sys: &dyn Syscalls, services: &[Service]) -> Result<()> {
    let mut failures = Vec::new();
    delegate(sys, ROOT, &mut failures);
    for group in [ATOLL, SERVICES_CGROUP, PODS_CGROUP] {
        sys.directory(group, 0o755, 0).map_err(Error::file("make the cgroup", group))?;
        delegate(sys, group, &mut failures);
    }
    let kept_mib: u64 = services.iter().map(|service| service.limits.memory_min_mib).sum();
    let mut set = |path: String, value: String| {
        failures.extend(sys.write(&path, &value).err().map(Error::file("set", path)));
    };
    for group in [ATOLL, SERVICES_CGROUP] {
        set(format!("{group}/memory.min"), (kept_mib * MIB).to_string());
    }
    set(format!("{SERVICES_CGROUP}/cpu.weight"), "500".into());
    if let Some(total_mib) = sys.read("/proc/meminfo").ok().as_deref().and_then(total_memory_mib) {
        let most_mib = total_mib.saturating_sub(kept_mib + RESERVE_MIB).max(total_mib / 2);
        set(format!("{PODS_CGROUP}/memory.max"), (most_mib * MIB).to_string());
    }
    for service in services {
        let group = group_of(&service.name);
        sys.directory(&group, 0o755, 0).map_err(Error::file("make the cgroup", &group))?;
        for (file, value) in settings(service.limits) {
            set(format!("{group}/{file}"), value);
        }
    }
    Error::all(failures)
}

fn delegate(sys: &dyn Syscalls, group: &str, failures: &mut Vec<Error>) {
    let path = format!("{group}/cgroup.subtree_control");
    for controller in CONTROLLERS {
        // One at a time: a controller that is not there would take the others with it.
        failures.extend(sys.write(&path, &format!("+{controller}")).err().map(Error::file("add to", &path)));
    }
}

fn settings(limits: Limits) -> [(&'static str, String); 3] {
    [
        ("memory.min", (limits.memory_min_mib * MIB).to_string()),
        ("memory.max", (limits.memory_max_mib * MIB).to_string()),
        ("pids.max", limits.processes.to_string()),
    ]
}

fn total_memory_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? / 1024)
}

/// Path of a service's cgroup.
pub fn group_of(service: &str) -> String {
    format!("{SERVICES_CGROUP}/{service}")
}

/// A descriptor of a service's cgroup, to be born into; `None` when there is none, as outside a booted host.
pub fn open(service: &str) -> Option<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::open(group_of(service), flags, Mode::empty()).ok()
}

/// Ends every process in a cgroup and below.
///
/// # Errors
/// When the kernel does not let us; there being no such group is fine.
pub fn kill(sys: &dyn Syscalls, group: &str) -> Result<()> {
    let path = format!("{group}/cgroup.kill");
    match sys.write(&path, "1") {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::file("write", path)(error)),
        _ => Ok(()),
    }
}

/// How many processes of a service were killed because its memory ran out, since boot.
pub fn out_of_memory_kills(sys: &dyn Syscalls, service: &str) -> u64 {
    let text = sys.read(&format!("{}/memory.events", group_of(service))).unwrap_or_default();
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// Whether a cgroup or one below it has any process.
pub fn is_populated(sys: &dyn Syscalls, group: &str) -> bool {
    sys.read(&format!("{group}/cgroup.events"))
        .is_ok_and(|text| text.lines().any(|line| line == "populated 1"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fake::Fake;

    #[test]
    fn pods_never_get_what_the_host_plane_needs() {
        let fake = Fake::default();
        fake.file("/proc/meminfo", "MemTotal:        4096000 kB\nMemFree: 1 kB\n");
        prepare(&fake, &crate::services::table()).unwrap();
        let value = |path: &str| fake.read(path).unwrap();
        assert_eq!(value("/sys/fs/cgroup/atoll/services/memory.min"), (160 * MIB).to_string());
        assert_eq!(value("/sys/fs/cgroup/atoll/pods/memory.max"), ((4000 - 160 - 96) * MIB).to_string());
        assert_eq!(value("/sys/fs/cgroup/atoll/services/agent/pids.max"), "512");
    }

    #[test]
    fn one_missing_controller_does_not_take_the_others_along() {
        let fake = Fake::default();
        fake.fail("write /sys/fs/cgroup/cgroup.subtree_control +io", std::io::ErrorKind::NotFound);
        let error = prepare(&fake, &crate::services::table()).unwrap_err();
        assert!(error.to_string().contains("/sys/fs/cgroup/cgroup.subtree_control"), "{error}");
        assert!(fake.calls().iter().any(|call| call.contains("+cpuset")));
        assert!(fake.calls().iter().any(|call| call.contains("services/agent/memory.max")));
    }
}
