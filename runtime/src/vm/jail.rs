//! The cgroup, pid namespace and descriptors that a VMM is born with; it closes the rest of its jail itself.
//!
//! Called by `vm::host`. The cgroup of a sandbox holds its VMM and nothing else, so a restarted runtime finds the
//! process there without trusting a number in a file. Invariant: after [`clear`] no process and no cgroup is left.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::sys::{self, Detached};
use crate::vm::host::{HostUsage, VmmOrder, VmmProcess};
use atoll_spec::ids::SandboxId;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Memory beside the guest's: the VMM itself, page tables, vhost queues, and some page cache.
const VMM_OVERHEAD: u64 = 128 << 20;
/// Threads beside the virtual processors.
const VMM_TASKS: u64 = 64;
/// When the host runs out of memory, a pod goes before any of the host's daemons.
const VMM_OOM_SCORE: &str = "300";
/// How long a killed process may take to leave its cgroup.
const CLEAR_DEADLINE: Duration = Duration::from_secs(10);

fn directory(root: &Path, sandbox: &SandboxId) -> PathBuf {
    root.join(sandbox.as_str())
}

/// Lets the pods' cgroups have controllers. Done at each start; best effort, as each missing controller only leaves one
/// limit unset, which [`spawn`] reports.
pub fn enable_controllers(root: &Path) -> Result<()> {
    fs::create_dir_all(root).map_err(Error::io("make cgroup", root))?;
    let above =
        root.ancestors().take_while(|p| p.join("cgroup.subtree_control").exists()).collect::<Vec<_>>();
    for cgroup in above.into_iter().rev() {
        for controller in ["+cpu", "+memory", "+pids", "+io"] {
            let _ = fs::write(cgroup.join("cgroup.subtree_control"), controller);
        }
    }
    Ok(())
}

/// Starts a VMM in its cgroup and pid namespace.
pub fn spawn(config: &Config, order: &VmmOrder, listener: &OwnedFd) -> Result<VmmProcess> {
    let cgroup = directory(&config.cgroup, &order.sandbox);
    fs::create_dir_all(&cgroup).map_err(Error::io("make cgroup", &cgroup))?;
    let limits = [
        ("memory.max", (order.memory.bytes() + VMM_OVERHEAD).to_string()),
        ("memory.swap.max", "0".to_owned()),
        ("pids.max", (u64::from(order.vcpus) + VMM_TASKS).to_string()),
        ("cpu.max", format!("{} 100000", u64::from(order.vcpus) * 100_000 + 50_000)),
        ("memory.oom.group", "1".to_owned()),
    ];
    for (file, value) in limits {
        if let Err(error) = fs::write(cgroup.join(file), value) {
            tracing::debug!(sandbox = %order.sandbox, file, %error, "cgroup limit not set");
        }
    }
    let cgroup_fd = fs::File::open(&cgroup).map_err(Error::io("open cgroup", &cgroup))?;
    let log_path = order.directory.join("vmm.log");
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(&log_path)
        .map_err(Error::io("open", &log_path))?;
    let detached = Detached {
        program: &config.vmm,
        args: &[],
        fd3: listener.as_fd(),
        output: log.as_fd(),
        cgroup: Some(cgroup_fd.as_fd()),
        own_pids: true,
    };
    let (pid, pidfd) = sys::spawn_detached(&detached).map_err(Error::io("start", &config.vmm))?;
    // The daemons' protection from the OOM killer is not for pods. Best effort: it only decides who goes first.
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), VMM_OOM_SCORE);
    VmmProcess::watch(pid, pidfd)
}

fn processes(cgroup: &Path) -> io::Result<Vec<i32>> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    Ok(text.lines().filter_map(|l| l.trim().parse().ok()).collect())
}

/// The VMM that runs in a sandbox's cgroup.
pub fn adopt(root: &Path, sandbox: &SandboxId) -> Result<Option<VmmProcess>> {
    let cgroup = directory(root, sandbox);
    let pids = match processes(&cgroup) {
        Ok(pids) => pids,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("read", &cgroup)(e)),
    };
    let Some(pid) = pids.first().copied().and_then(Pid::from_raw) else { return Ok(None) };
    match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => VmmProcess::watch(pid.as_raw_nonzero().get(), pidfd).map(Some),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(e) => Err(Error::os("watch VMM of", sandbox.as_str())(e)),
    }
}

/// Kills every process of the sandbox and removes its cgroup. Not there is fine.
pub async fn clear(root: &Path, sandbox: &SandboxId) -> Result<()> {
    let cgroup = directory(root, sandbox);
    let deadline = tokio::time::Instant::now() + CLEAR_DEADLINE;
    loop {
        let kill = cgroup.join("cgroup.kill");
        match fs::write(&kill, "1") {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !cgroup.exists() => return Ok(()),
            _ => {} // what counts is whether the directory can go
        }
        match fs::remove_dir(&cgroup) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if tokio::time::Instant::now() > deadline => {
                return Err(Error::io("remove cgroup", &cgroup)(e));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Counters of the sandbox's cgroup; zeros where there are none.
pub fn usage(root: &Path, sandbox: &SandboxId) -> HostUsage {
    let cgroup = directory(root, sandbox);
    let number = |file: &str| {
        fs::read_to_string(cgroup.join(file)).ok().and_then(|t| t.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let cpu = fs::read_to_string(cgroup.join("cpu.stat")).unwrap_or_default();
    let cpu_us =
        cpu.lines().find_map(|l| l.strip_prefix("usage_usec ")).and_then(|v| v.trim().parse::<u64>().ok());
    HostUsage {
        cpu_ns: cpu_us.unwrap_or(0).saturating_mul(1000),
        memory_bytes: number("memory.current"),
        tasks: number("pids.current"),
    }
}
