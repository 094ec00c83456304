//! Why a microVM could not be built or run. One variant per kind of operation; every message names the operation, the
//! object and what to do about it. The source is never repeated in the text: `main` prints the chain once.

use atoll_spec::vm::BootFd;
use std::io;

/// Failures of the VMM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The boot request contradicts itself or a limit.
    #[error("refused the boot request: {0}")]
    Spec(String),
    /// A descriptor that the machine needs was not in the packet.
    #[error(
        "refused the boot request: descriptor {0:?} is missing; send it in the packet and name it in `fds`"
    )]
    MissingFd(BootFd),
    /// KVM refused.
    #[error("cannot {operation}: is virtualization on in firmware, and the kvm module loaded?")]
    Kvm {
        /// What was asked of KVM.
        operation: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// A system call on an object of the VMM failed.
    #[error("cannot {operation}")]
    System {
        /// What was tried, with the object.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Guest memory could not be made.
    #[error("cannot map {mib} MiB of guest memory: {reason}; give the pod less memory")]
    Memory {
        /// How much.
        mib: u32,
        /// What the memory crate said.
        reason: String,
    },
    /// Something of the boot protocol did not fit into guest memory.
    #[error("cannot write {what} at guest address {address:#x}: {reason}")]
    GuestWrite {
        /// What was to be written.
        what: &'static str,
        /// Where.
        address: u64,
        /// What the memory crate said.
        reason: String,
    },
    /// The kernel image is unfit.
    #[error("cannot load the guest kernel: {0}; it must be an uncompressed x86-64 ELF built with CONFIG_PVH")]
    Kernel(String),
    /// The kernel command line is unfit.
    #[error("cannot use the kernel command line: {0}")]
    Cmdline(String),
    /// A vhost backend refused.
    #[error("cannot {operation} of the {device} device: is its vhost module loaded?")]
    Vhost {
        /// `net` or `vsock`.
        device: &'static str,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: vhost::Error,
    },
    /// A step of the jail failed; the guest must not run.
    #[error("cannot enter the jail at step '{step}': the host kernel must allow it to uid {uid}")]
    Jail {
        /// Which step.
        step: &'static str,
        /// Who the VMM should have become.
        uid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A seccomp filter could not be made or installed.
    #[error("cannot install the seccomp filter of the {thread} thread: {reason}")]
    Seccomp {
        /// Which class of thread.
        thread: &'static str,
        /// Why.
        reason: String,
    },
    /// The peer on the control socket did not do its part.
    #[error(
        "no boot request on the control socket within {seconds} seconds: the runtime must connect and send one"
    )]
    NoBoot {
        /// The deadline.
        seconds: u64,
    },
    /// Descriptor 3 is not a listening socket.
    #[error(
        "cannot listen on descriptor 3: start atoll-vmm with a listening SOCK_SEQPACKET socket as descriptor 3"
    )]
    NoListener(#[source] io::Error),
    /// The processor of the guest stopped in a way that KVM cannot go on from.
    #[error("the guest's processor {cpu} failed: {reason}")]
    Vcpu {
        /// Which.
        cpu: u8,
        /// How.
        reason: String,
    },
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The error and its sources on one line.
    pub fn chain(&self) -> String {
        let mut line = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            line.push_str(": ");
            line.push_str(&cause.to_string());
            source = cause.source();
        }
        line.replace('\n', " ")
    }

    /// For `map_err` on KVM calls.
    pub(crate) fn kvm(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { operation, source }
    }

    /// For `map_err` on system calls.
    pub(crate) fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { operation, source: source.into() }
    }
}
