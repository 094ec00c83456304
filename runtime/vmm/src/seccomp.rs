//! System call filters, one per class of thread, by allow list: anything else kills the process.
//!
//! Compiled at start, installed by each thread on itself once it has everything it needs. A filter is written down as
//! data (`Rule`), so that it can be read in one glance and tested.

use crate::error::{Error, Result};
use crate::virtio::vhost::TUNSETOFFLOAD;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use std::collections::BTreeMap;
use vhost::vhost_kern::vhost_binding as vb;

/// Classes of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The control socket.
    Main,
    /// A virtual processor.
    Vcpu,
    /// A disk.
    Disk,
}

/// One allowed system call, or one allowed form of it.
enum Rule {
    /// With any arguments.
    Any(i64),
    /// With this value in argument `.1`.
    Equal(i64, u8, u64),
    /// With none of the bits `.2` in argument `.1`.
    Without(i64, u8, u64),
}

use Rule::{Any, Equal, Without};

const EXECUTABLE: u64 = libc::PROT_EXEC as u64;
const KVM_RUN: u64 = 0xae80;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;

/// What every thread does: memory (never executable), locks, its own signals, the clock, the end.
fn everywhere() -> Vec<Rule> {
    let mut rules = vec![
        Any(libc::SYS_brk),
        Without(libc::SYS_mmap, 2, EXECUTABLE),
        Without(libc::SYS_mprotect, 2, EXECUTABLE),
        Any(libc::SYS_munmap),
        Any(libc::SYS_mremap),
        Equal(libc::SYS_madvise, 2, libc::MADV_DONTNEED as u64),
        Any(libc::SYS_futex),
        Any(libc::SYS_rt_sigprocmask),
        Any(libc::SYS_rt_sigreturn),
        Any(libc::SYS_sigaltstack),
        Any(libc::SYS_restart_syscall),
        Any(libc::SYS_clock_gettime),
        Any(libc::SYS_sched_yield),
        Any(libc::SYS_getpid),
        Any(libc::SYS_gettid),
        // Standard error, and events.
        Any(libc::SYS_write),
        Any(libc::SYS_exit),
        Any(libc::SYS_exit_group),
    ];
    if cfg!(debug_assertions) {
        // The standard library of a debug build checks descriptors before it closes them.
        rules.push(Equal(libc::SYS_fcntl, 1, libc::F_GETFD as u64));
    }
    rules
}

fn rules(class: Class) -> Vec<Rule> {
    let mut rules = everywhere();
    match class {
        Class::Main => rules.extend([
            Any(libc::SYS_poll),
            Any(libc::SYS_ppoll),
            Any(libc::SYS_accept4),
            Any(libc::SYS_recvmsg),
            Any(libc::SYS_sendto),
            Any(libc::SYS_close),
            Any(libc::SYS_read),
            // Pause: gets the processors out of the guest.
            Any(libc::SYS_tgkill),
        ]),
        Class::Vcpu => {
            rules.push(Equal(libc::SYS_ioctl, 1, KVM_RUN));
            // After a pause.
            rules.push(Equal(libc::SYS_ioctl, 1, KVM_KVMCLOCK_CTRL));
            // The entropy device.
            rules.push(Any(libc::SYS_getrandom));
            // Activation and reset of the vhost devices.
            rules.extend(
                [
                    vb::VHOST_GET_FEATURES(),
                    vb::VHOST_SET_FEATURES(),
                    vb::VHOST_SET_MEM_TABLE(),
                    vb::VHOST_SET_VRING_NUM(),
                    vb::VHOST_SET_VRING_ADDR(),
                    vb::VHOST_SET_VRING_BASE(),
                    vb::VHOST_SET_VRING_CALL(),
                    vb::VHOST_SET_VRING_KICK(),
                    vb::VHOST_NET_SET_BACKEND(),
                    vb::VHOST_VSOCK_SET_RUNNING(),
                    TUNSETOFFLOAD,
                ]
                .map(|request| Equal(libc::SYS_ioctl, 1, request)),
            );
        }
        Class::Disk => rules.extend([
            Any(libc::SYS_read),
            Any(libc::SYS_preadv),
            Any(libc::SYS_pwritev),
            Any(libc::SYS_fdatasync),
            Any(libc::SYS_fallocate),
        ]),
    }
    rules
}

/// The filter of a class of threads, compiled.
pub fn compile(class: Class) -> Result<BpfProgram> {
    let failed =
        |error: seccompiler::BackendError| Error::Seccomp { thread: name(class), reason: error.to_string() };
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules(class) {
        let (call, condition) = match rule {
            Any(call) => (call, None),
            Equal(call, argument, value) => (call, Some((argument, SeccompCmpOp::Eq, value))),
            Without(call, argument, bits) => (call, Some((argument, SeccompCmpOp::MaskedEq(bits), 0))),
        };
        let entry = allowed.entry(call).or_default();
        if let Some((argument, operator, value)) = condition {
            let condition =
                SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).map_err(failed)?;
            entry.push(SeccompRule::new(vec![condition]).map_err(failed)?);
        }
    }
    SeccompFilter::new(allowed, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(failed)
}

/// Installs a filter on the calling thread, for good.
pub fn install(class: Class, filter: &BpfProgram) -> Result<()> {
    seccompiler::apply_filter(filter)
        .map_err(|error| Error::Seccomp { thread: name(class), reason: error.to_string() })
}

fn name(class: Class) -> &'static str {
    match class {
        Class::Main => "main",
        Class::Vcpu => "vcpu",
        Class::Disk => "disk",
    }
}
