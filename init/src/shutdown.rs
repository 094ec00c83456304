//! The way down, once services were asked to stop: pods, what is left of everything, disks, and at the very end
//! reboot(2). Every step has a deadline that the guard enforces, so the whole has one: [`WORST_CASE`].

use crate::cgroups;
use crate::clock;
use crate::console::Console;
use crate::error::{Error, chain};
use crate::sys::{PowerAction, Signal, Syscalls, Target};
use crate::watchdog::{self, Guard};
use atoll_spec::control::{PODS_CGROUP, REBOOT_CAUSE_FILE, RebootCause, SERVICES_CGROUP, ShutdownAction};
use std::time::Duration;

/// Services, in the opposite order of their needs; each has its own stop deadline within this.
pub const SERVICES_WITHIN: Duration = Duration::from_secs(50);
const PODS_ASKED: Duration = Duration::from_secs(3);
const KILLED_WITHIN: Duration = Duration::from_secs(5);
const DISKS_WITHIN: Duration = Duration::from_secs(20);
const SYNC_WITHIN: Duration = Duration::from_secs(15);
const POWER_WITHIN: Duration = Duration::from_secs(10);

/// No shutdown takes longer than this: the sum of all steps, each ended by force, and the hardware watchdog if even
/// that fails.
pub const WORST_CASE: Duration = Duration::from_secs(
    SERVICES_WITHIN.as_secs()
        + PODS_ASKED.as_secs()
        + KILLED_WITHIN.as_secs()
        + DISKS_WITHIN.as_secs()
        + SYNC_WITHIN.as_secs()
        + POWER_WITHIN.as_secs()
        + watchdog::BITES_AFTER_S as u64,
);

/// What a shutdown works on.
pub struct Machine<'a> {
    /// The kernel.
    pub sys: &'a dyn Syscalls,
    /// Where progress is told.
    pub console: &'a Console,
    /// Who ends a step that hangs.
    pub guard: &'a Guard,
}

/// Leaves behind why the machine goes down, for the next boot to tell.
pub fn record_cause(
    sys: &dyn Syscalls,
    console: &Console,
    action: ShutdownAction,
    source: &str,
    reason: &str,
) {
    let mounted = sys.read("/proc/self/mounts").unwrap_or_default();
    if !mounted.lines().any(|line| line.split(' ').nth(1) == Some("/state")) {
        console.say("the cause of this shutdown is not recorded: /state is not mounted");
        return;
    }
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let cause = RebootCause {
        action,
        source: source.to_owned(),
        reason: reason.to_owned(),
        uptime_s: clock::uptime().as_secs(),
        unix_time_s: since_epoch.as_secs(),
    };
    let written = serde_json::to_string_pretty(&cause)
        .map_err(std::io::Error::from)
        .and_then(|text| sys.write(REBOOT_CAUSE_FILE, &(text + "\n")));
    if let Err(source) = written {
        let error = Error::file("write", REBOOT_CAUSE_FILE)(source);
        console.say(format!("the cause of this shutdown is not recorded: {}", chain(&error)));
    }
}

/// Everything after the services, to the end. Returns only when the kernel refuses to reboot.
pub fn finish(machine: &Machine<'_>, action: ShutdownAction) {
    let Machine { sys, console, guard } = machine;
    step(machine, action, "stop pods", PODS_ASKED + KILLED_WITHIN, || end_processes(*sys));
    step(machine, action, "unmount disks", DISKS_WITHIN, || unmount_disks(*sys, console));
    step(machine, action, "sync", SYNC_WITHIN, || sys.sync());
    let word = match action {
        ShutdownAction::Reboot => "reboot",
        ShutdownAction::PowerOff => "power off",
    };
    guard.promise(word, POWER_WITHIN, Duration::ZERO, action);
    console.say(word);
    console.flush(Duration::from_secs(2));
    if let Err(error) = sys.power(power_action(action)) {
        console.say(format!("cannot {word}: {error}"));
    }
}

/// The short way, when something is wrong with init itself or the boot failed: what was written is kept, and that
/// is all.
pub fn force(machine: &Machine<'_>, action: ShutdownAction, reason: &str) {
    machine.guard.promise("the forced shutdown", SYNC_WITHIN, Duration::ZERO, action);
    record_cause(machine.sys, machine.console, action, "init", reason);
    machine.sys.sync();
    machine.console.flush(Duration::from_secs(2));
    if let Err(error) = machine.sys.power(power_action(action)) {
        machine.console.say(format!("cannot end the machine's run: {error}"));
    }
}

/// What reboot(2) is asked for.
pub fn power_action(action: ShutdownAction) -> PowerAction {
    match action {
        ShutdownAction::Reboot => PowerAction::Restart,
        ShutdownAction::PowerOff => PowerAction::Off,
    }
}

fn step(machine: &Machine<'_>, action: ShutdownAction, name: &str, within: Duration, run: impl FnOnce()) {
    let started = clock::uptime();
    machine.guard.promise(&format!("shutdown step {name}"), within, Duration::ZERO, action);
    run();
    let took = clock::millis(clock::uptime().saturating_sub(started));
    machine.console.say(format!("shutdown: {name} done in {took} ms"));
}

/// Pods are asked, then killed; whatever else is left is killed.
fn end_processes(sys: &dyn Syscalls) {
    for pid in processes_below(sys, PODS_CGROUP) {
        // It may have ended in the meantime.
        let _ = sys.kill(Target::Process(pid), Signal::Term);
    }
    wait_empty(sys, PODS_CGROUP, PODS_ASKED);
    for group in [PODS_CGROUP, SERVICES_CGROUP] {
        // The sweep below gets those that this does not.
        let _ = cgroups::kill(sys, group);
    }
    // There being nobody left is no failure.
    let _ = sys.kill(Target::Everyone, Signal::Kill);
    wait_empty(sys, PODS_CGROUP, KILLED_WITHIN / 2);
    wait_empty(sys, SERVICES_CGROUP, KILLED_WITHIN / 2);
}

fn wait_empty(sys: &dyn Syscalls, group: &str, within: Duration) {
    let end = clock::uptime() + within;
    loop {
        while sys.collect().is_some() {}
        if !cgroups::is_populated(sys, group) || clock::uptime() >= end {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn processes_below(sys: &dyn Syscalls, group: &str) -> Vec<u32> {
    let mut found = Vec::new();
    let mut pending = vec![group.to_owned()];
    while let Some(group) = pending.pop() {
        let text = sys.read(&format!("{group}/cgroup.procs")).unwrap_or_default();
        found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        // A group that is gone has no processes.
        let Ok(entries) = std::fs::read_dir(&group) else { continue };
        let groups = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        pending.extend(groups.map(|entry| entry.path().display().to_string()));
    }
    found
}

fn unmount_disks(sys: &dyn Syscalls, console: &Console) {
    sys.sync();
    let mounts = sys.read("/proc/self/mounts").unwrap_or_default();
    for target in disks(&mounts) {
        let Err(error) = sys.unmount(&target, false) else { continue };
        // In use by something that cannot be killed: at least nothing more is written, and it is clean on disk.
        let read_only = sys.remount_read_only(&target).is_ok();
        let detached = sys.unmount(&target, true).is_ok();
        console.say(format!(
            "cannot unmount {target}: {error}; read-only instead: {}, detached: {}",
            yes(read_only),
            yes(detached)
        ));
    }
}

fn yes(it: bool) -> &'static str {
    if it { "yes" } else { "no" }
}

/// Mount points of disks in `/proc/self/mounts`, and of all that is mounted below them, last one first.
fn disks(mounts: &str) -> Vec<String> {
    let rows: Vec<(&str, String)> = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?, unescape(words.next()?)))
        })
        .collect();
    let is_disk = |source: &str, target: &str| source.starts_with("/dev/") && target != "/";
    let roots: Vec<&String> =
        rows.iter().filter(|(source, target)| is_disk(source, target)).map(|(_, target)| target).collect();
    let mut targets: Vec<String> = rows
        .iter()
        .map(|(_, target)| target)
        .filter(|target| roots.iter().any(|root| target == root || target.starts_with(&format!("{root}/"))))
        .cloned()
        .collect();
    targets.reverse();
    targets
}

fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fake::Fake;

    const MOUNTS: &str = "/system.erofs / erofs ro 0 0\nproc /proc proc rw 0 0\n/dev/vda2 /state ext4 rw 0 0\n\
                          /dev/vda3 /data ext4 rw 0 0\ntmpfs /data/x\\040y tmpfs rw 0 0\ntmpfs /run tmpfs rw 0 0\n";

    fn with_machine(fake: &Fake, run: impl FnOnce(&Machine<'_>)) {
        let (console, guard) = (Console::start(), Guard::default());
        run(&Machine { sys: fake, console: &console, guard: &guard });
    }

    #[test]
    fn only_disks_are_unmounted_and_the_last_first() {
        assert_eq!(disks(MOUNTS), ["/data/x y", "/data", "/state"]);
        assert!(disks("").is_empty());
    }

    #[test]
    fn the_order_is_processes_disks_sync_power() {
        let fake = Fake::default();
        fake.file("/proc/self/mounts", MOUNTS);
        fake.file("/sys/fs/cgroup/atoll/pods/cgroup.procs", "4711\n");
        with_machine(&fake, |machine| finish(machine, ShutdownAction::PowerOff));
        assert_eq!(
            fake.calls(),
            [
                "kill Process(4711) Term",
                "write /sys/fs/cgroup/atoll/pods/cgroup.kill 1",
                "write /sys/fs/cgroup/atoll/services/cgroup.kill 1",
                "kill Everyone Kill",
                "sync",
                "unmount /data/x y",
                "unmount /data",
                "unmount /state",
                "sync",
                "power Off"
            ]
        );
    }

    #[test]
    fn a_busy_disk_becomes_read_only() {
        let fake = Fake::default();
        fake.file("/proc/self/mounts", MOUNTS);
        fake.fail("unmount /data", std::io::ErrorKind::ResourceBusy);
        with_machine(&fake, |machine| finish(machine, ShutdownAction::Reboot));
        let calls = fake.calls();
        assert!(calls.contains(&"remount_read_only /data".to_owned()), "{calls:?}");
        assert!(calls.contains(&"unmount /data detach".to_owned()), "{calls:?}");
        assert_eq!(calls.last().unwrap(), "power Restart");
    }

    #[test]
    fn the_cause_is_left_on_state_when_that_is_mounted() {
        let record = |machine: &Machine<'_>| {
            record_cause(machine.sys, machine.console, ShutdownAction::Reboot, "control", "a test");
        };
        let fake = Fake::default();
        with_machine(&fake, record);
        assert!(!fake.exists(REBOOT_CAUSE_FILE));
        fake.file("/proc/self/mounts", MOUNTS);
        with_machine(&fake, record);
        let text = fake.read(REBOOT_CAUSE_FILE).unwrap();
        let cause: RebootCause = serde_json::from_str(&text).unwrap();
        assert_eq!((cause.action, cause.reason.as_str()), (ShutdownAction::Reboot, "a test"));
    }
}
