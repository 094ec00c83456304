//! The default system call filter of a container (`seccompProfile: RuntimeDefault`).
//!
//! The guest kernel is the pod's own, so the filter protects the pod's other containers and the guest's first process,
//! not the host, whose boundary is the virtual machine. It names what a container has no business with, and leaves the
//! rest alone; what a capability stands for is allowed with that capability. Installed before the capabilities go,
//! because a filter without `no_new_privs` needs one, and setuid programs shall go on working.

use crate::error::{Failure, Result};
use crate::sys;
use atoll_spec::guest::{Process, SystemCalls};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use std::collections::BTreeMap;

/// System calls refused unless the container has the capability; the empty name stands for none.
const REFUSED: &[(&str, &[i64])] = &[
    // Keys and rings are not per container; io_uring does work that this filter would not see.
    (
        "",
        &[
            libc::SYS_add_key,
            libc::SYS_keyctl,
            libc::SYS_request_key,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register,
            libc::SYS_userfaultfd,
            libc::SYS_vhangup,
            libc::SYS_uselib,
            libc::SYS_ustat,
            libc::SYS_sysfs,
            libc::SYS__sysctl,
            libc::SYS_nfsservctl,
            libc::SYS_lookup_dcookie,
            libc::SYS_get_mempolicy,
            libc::SYS_kexec_load,
            libc::SYS_kexec_file_load,
        ],
    ),
    (
        "CAP_SYS_ADMIN",
        &[
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_fsopen,
            libc::SYS_fsconfig,
            libc::SYS_fsmount,
            libc::SYS_fspick,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_mount_setattr,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_swapon,
            libc::SYS_swapoff,
            libc::SYS_quotactl,
            libc::SYS_quotactl_fd,
            libc::SYS_fanotify_init,
        ],
    ),
    ("CAP_BPF", &[libc::SYS_bpf]),
    ("CAP_PERFMON", &[libc::SYS_perf_event_open]),
    ("CAP_SYS_MODULE", &[libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module]),
    ("CAP_SYS_BOOT", &[libc::SYS_reboot]),
    ("CAP_SYS_PACCT", &[libc::SYS_acct]),
    ("CAP_SYS_TIME", &[libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_clock_adjtime]),
    ("CAP_SYS_RAWIO", &[libc::SYS_iopl, libc::SYS_ioperm]),
    (
        "CAP_SYS_NICE",
        &[libc::SYS_mbind, libc::SYS_set_mempolicy, libc::SYS_move_pages, libc::SYS_migrate_pages],
    ),
    ("CAP_DAC_READ_SEARCH", &[libc::SYS_open_by_handle_at]),
    ("CAP_SYSLOG", &[libc::SYS_syslog]),
];

/// Flags of clone(2) that make namespaces: user, pid, net, mount, ipc, uts, cgroup.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// Installs the filter that the process asks for.
pub fn confine(process: &Process) -> Result<()> {
    match process.system_calls {
        SystemCalls::Any => Ok(()),
        SystemCalls::Default => {
            let failed =
                |what: String| Failure::system(format!("install the default system call filter: {what}"));
            for program in programs(&process.capabilities).map_err(|error| failed(error.to_string()))? {
                sys::install_filter(&program).map_err(|error| failed(error.to_string()))?;
            }
            Ok(())
        }
    }
}

/// Two filters, because each has one answer: "not permitted", and for clone3, whose flags no filter can see, "no such
/// call", at which the C library takes clone.
fn programs(capabilities: &[String]) -> std::result::Result<Vec<BpfProgram>, seccompiler::BackendError> {
    let has = |name: &str| capabilities.iter().any(|own| own == name);
    let admin = has("CAP_SYS_ADMIN");
    let mut refused: BTreeMap<i64, Vec<SeccompRule>> = REFUSED
        .iter()
        .filter(|(capability, _)| !admin && !has(capability))
        .flat_map(|(_, calls)| calls.iter().map(|call| (*call, Vec::new())))
        .collect();
    // The host listens on vsock, for the guest's first process only.
    let vsock = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::AF_VSOCK as u64)?;
    refused.insert(libc::SYS_socket, vec![SeccompRule::new(vec![vsock])?]);
    if !admin {
        let makes = |flag: i32| {
            let flag = u64::from(flag.unsigned_abs());
            let operator = SeccompCmpOp::MaskedEq(flag);
            SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Qword, operator, flag)?])
        };
        let rules: std::result::Result<Vec<_>, _> = NAMESPACES.into_iter().map(makes).collect();
        refused.insert(libc::SYS_clone, rules?);
    }
    let mut programs = vec![program(refused, libc::EPERM)?];
    if !admin {
        programs.push(program(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), libc::ENOSYS)?);
    }
    Ok(programs)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    errno: i32,
) -> std::result::Result<BpfProgram, seccompiler::BackendError> {
    let answer = SeccompAction::Errno(errno.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, answer, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_takes_its_calls_off_the_list() {
        let count = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            programs(&names).unwrap().iter().map(Vec::len).sum::<usize>()
        };
        let bare = count(&[]);
        assert!(count(&["CAP_SYS_TIME"]) < bare);
        assert!(count(&["CAP_SYS_ADMIN"]) < count(&["CAP_SYS_TIME"]));
        assert_eq!(count(&["CAP_CHOWN"]), bare);
    }
}
