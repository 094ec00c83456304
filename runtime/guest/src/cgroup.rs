//! Cgroups of containers: limits, counters, who was killed for lack of memory, and killing all at once.

use crate::error::{Context as _, Failure, Result};
use atoll_spec::guest::{Limits, Usage};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Controllers that containers are limited by.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The group that holds every container's.
const POD: &str = "pod";
const POLL: Duration = Duration::from_millis(2);

/// Turns the controllers on for containers. Those that this kernel lacks are left out: setting a limit of theirs fails
/// later, by name.
pub fn prepare(root: &Path) -> Result<()> {
    let pod = root.join(POD);
    std::fs::create_dir_all(&pod).during(|| format!("make cgroup {}", pod.display()))?;
    for group in [root, &pod] {
        let path = group.join("cgroup.controllers");
        let there = std::fs::read_to_string(&path).during(|| format!("read {}", path.display()))?;
        for controller in
            CONTROLLERS.iter().filter(|name| there.split_whitespace().any(|word| word == **name))
        {
            write(&group.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
    }
    bound_processes(&pod)
}

/// Containers get half of the processes that this kernel can have: the guest's own threads, by which a container is
/// looked into and ended, have room whatever it forks.
fn bound_processes(pod: &Path) -> Result<()> {
    let path = pod.join("pids.max");
    let allowed = |name: &str| {
        let text = std::fs::read_to_string(Path::new("/proc/sys/kernel").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    match [allowed("threads-max"), allowed("pid_max")].into_iter().flatten().min() {
        Some(most) if path.exists() => write(&path, &(most / 2).max(1).to_string()),
        _ => Ok(()),
    }
}

fn write(path: &Path, value: &str) -> Result<()> {
    std::fs::write(path, value).during(|| format!("write '{value}' to {}", path.display()))
}

/// The cgroup of one container.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes it, with its limits.
    pub fn create(root: &Path, name: &str, limits: &Limits) -> Result<Self> {
        let group = Self(root.join(POD).join(name));
        std::fs::create_dir(&group.0).during(|| format!("make cgroup {}", group.0.display()))?;
        let limited = group.limit(limits).and_then(|()| group.kill_together());
        if limited.is_err() {
            // Reports the first failure; an empty group left behind is removed with the guest.
            let _ = std::fs::remove_dir(&group.0);
        }
        limited.map(|()| group)
    }

    /// A container that runs out of memory ends as a whole: half of it would be neither dead nor working.
    fn kill_together(&self) -> Result<()> {
        let path = self.0.join("memory.oom.group");
        if path.exists() { write(&path, "1") } else { Ok(()) }
    }

    /// Sets the limits that are there; the others stay.
    pub fn limit(&self, limits: &Limits) -> Result<()> {
        for (file, value) in settings(limits) {
            write(&self.0.join(file), &value)?;
        }
        Ok(())
    }

    /// Puts a process into it.
    pub fn add(&self, pid: i32) -> Result<()> {
        write(&self.0.join("cgroup.procs"), &pid.to_string())
    }

    /// Its processes.
    pub fn processes(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Kills every process in it; a cgroup that is gone has none.
    pub fn kill(&self) -> Result<()> {
        let path = self.0.join("cgroup.kill");
        match std::fs::write(&path, "1") {
            Err(error) if error.kind() == ErrorKind::NotFound && !self.0.exists() => Ok(()),
            other => other.during(|| format!("write '1' to {}", path.display())),
        }
    }

    /// Whether the kernel killed for lack of memory here.
    pub fn saw_oom_kill(&self) -> bool {
        self.field("memory.events", "oom_kill").is_some_and(|count| count > 0)
    }

    /// Removes it, waiting at most `limit` for killed processes to go.
    pub fn remove(&self, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        loop {
            match std::fs::remove_dir(&self.0) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < until => {}
                other => return other.during(|| format!("remove cgroup {}", self.0.display())),
            }
            std::thread::sleep(POLL);
        }
    }

    /// Counters, without those of the writable layer.
    pub fn usage(&self) -> Usage {
        let memory = self.number("memory.current");
        Usage {
            cpu_ns: self.field("cpu.stat", "usage_usec").unwrap_or(0).saturating_mul(1000),
            memory_bytes: memory,
            working_set_bytes: memory.saturating_sub(self.field("memory.stat", "inactive_file").unwrap_or(0)),
            rss_bytes: self.field("memory.stat", "anon").unwrap_or(0),
            page_faults: self.field("memory.stat", "pgfault").unwrap_or(0),
            major_page_faults: self.field("memory.stat", "pgmajfault").unwrap_or(0),
            pids: self.number("pids.current"),
            ..Usage::default()
        }
    }

    fn number(&self, file: &str) -> u64 {
        let text = std::fs::read_to_string(self.0.join(file)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    fn field(&self, file: &str, key: &str) -> Option<u64> {
        field(&std::fs::read_to_string(self.0.join(file)).ok()?, key)
    }
}

/// Value of `key` in lines of `key value`.
pub fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Files to write for the limits that are set.
fn settings(limits: &Limits) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    match (limits.cpu_quota_us, limits.cpu_period_us) {
        (Some(quota), period) => settings.push(("cpu.max", format!("{quota} {}", period.unwrap_or(100_000)))),
        (None, Some(period)) => settings.push(("cpu.max", format!("max {period}"))),
        (None, None) => {}
    }
    let plain =
        [("cpu.weight", limits.cpu_weight), ("memory.max", limits.memory_bytes), ("pids.max", limits.pids)];
    settings.extend(plain.into_iter().filter_map(|(file, value)| Some((file, value?.to_string()))));
    settings
}

/// Refuses limits that the kernel would misread.
pub fn check(limits: &Limits) -> Result<()> {
    if limits.cpu_weight.is_some_and(|weight| !(1..=10_000).contains(&weight)) {
        return Err(Failure::invalid("cpu weight must be 1 to 10000"));
    }
    if limits.memory_bytes == Some(0) {
        return Err(Failure::invalid("a memory limit of 0 leaves nothing to run in"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_files() {
        let limits = Limits { cpu_quota_us: Some(50_000), memory_bytes: Some(1 << 20), ..Limits::default() };
        assert_eq!(settings(&limits), [("cpu.max", "50000 100000".into()), ("memory.max", "1048576".into())]);
        assert!(settings(&Limits::default()).is_empty());
        assert!(check(&Limits { cpu_weight: Some(0), ..Limits::default() }).is_err());
    }

    #[test]
    fn fields_are_whole_words() {
        let text = "oom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(field(text, "oom"), Some(3));
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "max"), None);
    }
}
