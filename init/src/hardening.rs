//! Kernel settings that every host gets at boot, each with its reason. What a single link gets is hostd's.

use crate::error::{Error, Result};
use crate::sys::Syscalls;
use std::io;

const UNPLUGGED: &str = "a route through a pulled cable gives way to one through a link that is up";

/// Path under `/proc/sys`, value, reason.
const SETTINGS: [(&str, &str, &str); 31] = [
    ("kernel/panic", "10", "a kernel that panicked boots again after its text was read"),
    ("kernel/panic_on_oops", "1", "a kernel that is known to be damaged must not go on serving pods"),
    ("kernel/hung_task_timeout_secs", "120", "tasks stuck in the kernel show in its log"),
    ("kernel/kptr_restrict", "2", "kernel addresses help nobody but an attacker"),
    ("kernel/dmesg_restrict", "1", "the kernel log is for the host's own services"),
    ("kernel/unprivileged_bpf_disabled", "2", "no service without capabilities needs BPF"),
    ("net/core/bpf_jit_harden", "2", "compiled BPF is not a place to spray code into"),
    (
        "net/ipv4/tcp_mtu_probing",
        "1",
        "a path that drops large packets without a word must not stall connections",
    ),
    // `all` counts for every link of IPv4, and is written through to those of IPv6; `default` is what new ones begin with.
    ("net/ipv4/conf/all/ignore_routes_with_linkdown", "1", UNPLUGGED),
    ("net/ipv4/conf/default/ignore_routes_with_linkdown", "1", UNPLUGGED),
    ("net/ipv6/conf/all/ignore_routes_with_linkdown", "1", UNPLUGGED),
    ("net/ipv6/conf/default/ignore_routes_with_linkdown", "1", UNPLUGGED),
    ("kernel/perf_event_paranoid", "3", "performance counters leak what runs beside"),
    ("kernel/kexec_load_disabled", "1", "the signed image is the only kernel that ever boots"),
    ("kernel/io_uring_disabled", "2", "nothing on the host uses io_uring, a large attack surface"),
    ("kernel/sysrq", "0", "a keyboard or serial line is no debugger of the kernel"),
    ("kernel/yama/ptrace_scope", "1", "a process traces its own children only"),
    ("kernel/randomize_va_space", "2", "address layout is random everywhere"),
    ("kernel/core_pattern", "", "no core files: they would hold secrets"),
    ("fs/suid_dumpable", "0", "no dumps of processes that changed identity"),
    ("fs/protected_symlinks", "1", "links in shared directories are followed by their owner only"),
    ("fs/protected_hardlinks", "1", "no hard links to what one could not write"),
    ("fs/protected_fifos", "2", "no foreign FIFOs opened for writing in shared directories"),
    ("fs/protected_regular", "2", "no foreign files opened for writing in shared directories"),
    ("vm/unprivileged_userfaultfd", "0", "page faults handled by others make kernel races exploitable"),
    ("vm/mmap_min_addr", "65536", "a null pointer stays a fault"),
    ("vm/overcommit_memory", "1", "guest memory is mapped in full and used in part; cgroups bound it"),
    ("dev/tty/ldisc_autoload", "0", "line disciplines are not loaded on anybody's request"),
    ("fs/inotify/max_user_instances", "8192", "one watch set for each of many pods"),
    ("fs/inotify/max_user_watches", "524288", "published volumes are watched, one directory each"),
    ("kernel/pid_max", "4194304", "thousands of VMM threads, and identifiers that are not used again soon"),
];

/// Applies all settings. One that this kernel does not have is passed over.
///
/// # Errors
/// All those that the kernel refused.
pub fn apply(sys: &dyn Syscalls) -> Result<()> {
    let mut failures = Vec::new();
    for (name, value, _) in SETTINGS {
        let path = format!("/proc/sys/{name}");
        match sys.write(&path, &format!("{value}\n")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failures.push(Error::file("set", path)(error)),
            Ok(()) => {}
        }
    }
    Error::all(failures)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fake::Fake;

    #[test]
    fn a_pulled_cable_takes_its_routes_with_it_on_links_of_now_and_later() {
        let fake = Fake::default();
        apply(&fake).unwrap();
        for family in ["ipv4", "ipv6"] {
            for links in ["all", "default"] {
                let path = format!("/proc/sys/net/{family}/conf/{links}/ignore_routes_with_linkdown");
                assert_eq!(fake.read(&path).ok().as_deref(), Some("1\n"), "{path}");
            }
        }
    }

    #[test]
    fn a_setting_that_the_kernel_lacks_is_passed_over_and_a_refused_one_keeps_no_other_from_it() {
        let fake = Fake::default();
        fake.fail("write /proc/sys/net/ipv6/", io::ErrorKind::NotFound);
        apply(&fake).unwrap();
        fake.fail("write /proc/sys/kernel/panic ", io::ErrorKind::PermissionDenied);
        let error = apply(&fake).unwrap_err().to_string();
        assert!(error.contains("/proc/sys/kernel/panic") && !error.contains("; "), "{error}");
        assert!(fake.calls().last().unwrap().starts_with("write /proc/sys/kernel/pid_max "));
    }

    #[test]
    fn every_setting_says_why() {
        for (name, _, reason) in SETTINGS {
            assert!(reason.len() > 15 && !name.starts_with('/'), "{name}");
        }
    }
}
