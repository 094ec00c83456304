//! The cage of the unpack helper: resource limits, its own network namespace, another user, Landlock, seccomp.
//!
//! Called once at the start of the helper process, before it reads a byte of the archive; mkfs.erofs, which the helper
//! runs, inherits all of it. Order: each step needs a right that a later one takes away.

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus,
};
use rustix::process::{Gid, Resource, Rlimit, Uid};
use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// CPU seconds of the helper, and again of mkfs.erofs.
const CPU_SECONDS: u64 = 1800;
/// Address space of each.
const ADDRESS_SPACE: u64 = 4 << 30;

/// What the cage leaves open.
pub struct Openings<'a> {
    /// The one directory that can be written to.
    pub work: &'a Path,
    /// What can be read and executed: the program and its libraries.
    pub programs: &'a [PathBuf],
    /// Who to become.
    pub uid: Option<u32>,
}

/// Closes the cage around this process. The error is one line.
pub fn close(openings: &Openings<'_>) -> Result<(), String> {
    limit_resources()?;
    // When memory is short, an unpacking layer goes before anything else. Raising the score needs no right.
    std::fs::write("/proc/self/oom_score_adj", "800")
        .map_err(|error| format!("cannot offer itself: {error}"))?;
    if let Some(uid) = openings.uid {
        leave_the_network()?;
        become_user(uid)?;
    }
    rustix::thread::set_no_new_privs(true).map_err(|error| format!("cannot set no_new_privs: {error}"))?;
    restrict_files(openings)?;
    restrict_calls()?;
    end_with_the_parent().map_err(|error| format!("cannot tie itself to the runtime: {error}"))
}

/// A runtime that is killed leaves no helper behind. Not before the change of users, which would undo it.
fn end_with_the_parent() -> std::io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
}

/// Makes what a command starts end with this process, which has one thread.
pub fn tie(command: &mut std::process::Command) -> &mut std::process::Command {
    // SAFETY: between fork and exec nothing is done but one system call.
    unsafe { std::os::unix::process::CommandExt::pre_exec(command, end_with_the_parent) }
}

/// Not the size of files: mkfs.erofs makes a sparse one as large as can be. The scanner bounds what is written.
fn limit_resources() -> Result<(), String> {
    let limits = [
        (Resource::Core, 0),
        (Resource::Cpu, CPU_SECONDS),
        (Resource::As, ADDRESS_SPACE),
        (Resource::Nofile, 256),
    ];
    for (resource, limit) in limits {
        let limit = Some(limit);
        rustix::process::setrlimit(resource, Rlimit { current: limit, maximum: limit })
            .map_err(|error| format!("cannot limit {resource:?}: {error}"))?;
    }
    Ok(())
}

/// A network namespace with nothing in it, not even an address for the loopback device.
fn leave_the_network() -> Result<(), String> {
    use rustix::thread::UnshareFlags;
    let flags = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: this process has one thread, and none of these namespaces holds memory or file-system state.
    unsafe { rustix::thread::unshare_unsafe(flags) }
        .map_err(|error| format!("cannot leave the network (does the runtime have CAP_SYS_ADMIN?): {error}"))
}

fn become_user(uid: u32) -> Result<(), String> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    let change = || {
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(group, group, group)?;
        rustix::thread::set_thread_res_uid(user, user, user)
    };
    change().map_err(|error| format!("cannot become user {uid}: {error}"))
}

fn restrict_files(openings: &Openings<'_>) -> Result<(), String> {
    let abi = ABI::V5;
    let refused = |error: landlock::RulesetError| format!("cannot restrict files: {error}");
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(landlock::Ruleset::create)
        .map_err(refused)?;
    let mut open = |path: &Path, access: BitFlags<AccessFs>| -> Result<(), String> {
        let Ok(fd) = PathFd::new(path) else { return Ok(()) };
        (&mut rules).add_rule(PathBeneath::new(fd, access)).map(drop).map_err(refused)
    };
    for program in openings.programs {
        open(program, AccessFs::from_read(abi))?;
    }
    open(Path::new("/dev/null"), AccessFs::ReadFile | AccessFs::WriteFile)?;
    open(openings.work, AccessFs::from_all(abi) & !AccessFs::Execute)?;
    let status = rules.restrict_self().map_err(refused)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        eprintln!("warning: this kernel has no Landlock: the helper can read what its user can");
    }
    Ok(())
}

/// Calls that neither a decompressor nor mkfs.erofs has any use for: they answer "not permitted".
const REFUSED: [i64; 62] = [
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bind,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_settime,
    libc::SYS_connect,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_inotify_init1,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_listen,
    libc::SYS_memfd_secret,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_open,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_sendmmsg,
    libc::SYS_sendto,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_shmat,
    libc::SYS_shmget,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vmsplice,
];

fn restrict_calls() -> Result<(), String> {
    let mut rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> =
        REFUSED.iter().map(|number| (*number, Vec::new())).collect();
    // A unix pair is how the standard library hears of a failed exec; every other socket is refused.
    rules.insert(libc::SYS_socket, Vec::new());
    let refused = |error: &dyn std::fmt::Display| format!("cannot restrict system calls: {error}");
    let errno = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, errno, TargetArch::x86_64)
        .map_err(|error| refused(&error))?;
    let program: seccompiler::BpfProgram =
        filter.try_into().map_err(|error: seccompiler::BackendError| refused(&error))?;
    seccompiler::apply_filter(&program).map_err(|error| refused(&error))
}

#[cfg(test)]
mod tests;
