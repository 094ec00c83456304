//! A virtual machine that never runs, held so that the start of a pod disturbs no other pod.
//!
//! KVM keeps jump labels (kernel doc: static-keys) for what no virtual processor needs at the moment. The first virtual
//! machine of a host turns the scheduler's preemption notifiers on, and every virtual processor begins with its local
//! APIC disabled by software, which turns those checks on until a second after the guest has enabled it. Each change
//! rewrites the kernel's code with three rounds of interrupts to all processors, and so throws every guest of the host
//! out for a moment. One processor that never enables its APIC holds both where they are, for some 100 KiB of kernel
//! memory.
//!
//! QEMU's emulation of several processors is not sound while code is rewritten that another processor runs: hosts
//! under it died of stray breakpoints (int3) at these very places.

use crate::error::{Error, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::path::Path;

/// The machine; it is gone when this is dropped.
pub struct Keeper {
    _processor: VcpuFd,
    _machine: VmFd,
}

impl Keeper {
    /// Makes it with the hypervisor device at `kvm`.
    pub fn new(kvm: &Path) -> Result<Self> {
        let failed = |error: kvm_ioctls::Error| Error::io("hold a virtual machine with", kvm)(error.into());
        let path = std::ffi::CString::new(kvm.as_os_str().as_encoded_bytes())
            .map_err(|_| failed(kvm_ioctls::Error::new(libc::EINVAL)))?;
        let machine = Kvm::new_with_path(path).and_then(|kvm| kvm.create_vm()).map_err(failed)?;
        // The APIC of a processor is KVM's own only when there is this.
        machine.create_irq_chip().map_err(failed)?;
        let processor = machine.create_vcpu(0).map_err(failed)?;
        Ok(Self { _processor: processor, _machine: machine })
    }
}
