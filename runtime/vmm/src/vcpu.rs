//! One virtual processor and the thread that runs it.
//!
//! ```text
//!            resume             run
//! Parked ──────────────► Running ───► (exit to user space) ──► Running
//!   ▲                      │ pause: signal, EINTR
//!   └──────────────────────┘
//! ```
//!
//! A thread starts parked. Whoever pauses sets the wish, then signals until every thread has parked: a signal that
//! arrives just before the processor enters the guest is lost, the next one is not, so no signal handler has to touch
//! KVM's shared page.

use crate::bus::{Bus, Effect};
use crate::cpuid::{self, Topology};
use crate::error::{Error, Result};
use crate::kernel::Entry;
use crate::memory::START_INFO;
use crate::stats::{Counters, Exit};
use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Why the machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest reset the machine, its way of powering off.
    Stopped,
    /// The guest crashed.
    Crashed,
    /// A processor could not go on.
    Failed(String),
}

/// Whether the processors may run, and how many do not.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    open: bool,
    parked: usize,
}

impl Gate {
    /// Returns once the gate is open, and whether it was closed before.
    fn pass(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.open {
            return false;
        }
        state.parked += 1;
        self.changed.notify_all();
        while !state.open {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        true
    }

    /// Lets the processors run.
    pub fn open(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).open = true;
        self.changed.notify_all();
    }

    /// Closes the gate and waits until `count` threads have parked, calling `nudge` to get them out of the guest.
    /// Returns whether they all did before the deadline.
    pub fn close(&self, count: usize, deadline: Duration, nudge: impl Fn()) -> bool {
        let until = Instant::now() + deadline;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.open = false;
        while state.parked < count {
            if Instant::now() >= until {
                return false;
            }
            nudge();
            let tick = Duration::from_millis(1);
            state = self.changed.wait_timeout(state, tick).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// A processor, ready to run.
pub struct Vcpu {
    fd: VcpuFd,
}

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;

impl Vcpu {
    /// Makes processor `id` and sets the state it starts in. Only the first has an entry: the others wait for the
    /// kernel's startup interrupt in KVM's APIC.
    pub fn new(
        vm: &VmFd,
        id: u8,
        topology: Topology,
        supported: &[kvm_cpuid_entry2],
        entry: Entry,
    ) -> Result<Self> {
        let fd = vm.create_vcpu(u64::from(id)).map_err(Error::kvm("make a virtual processor"))?;
        let cpuid = cpuid::to_kvm(&cpuid::for_vcpu(supported, id, topology))
            .ok_or_else(|| Error::Vcpu { cpu: id, reason: "KVM supports too many CPUID leaves".into() })?;
        fd.set_cpuid2(&cpuid).map_err(Error::kvm("set the processor's CPUID"))?;
        set_msrs(&fd);
        set_lapic(&fd)?;
        if id == 0 {
            set_boot_state(&fd, entry)?;
        }
        Ok(Self { fd })
    }

    /// Runs until the machine ends. Called on the processor's own thread, which keeps the processor after that too: its
    /// filter does not let it close descriptors.
    pub fn run(&mut self, id: u8, bus: &Bus, gate: &Gate, counters: &Counters) -> End {
        loop {
            if gate.pass() {
                // Tells the guest that it was stopped, lest its watchdogs bark. Refused before its clock is set up, when
                // there is nothing to tell.
                let _ = self.fd.kvmclock_ctrl();
            }
            match self.step(id, bus, counters) {
                None => {}
                Some(end) => return end,
            }
        }
    }

    fn step(&mut self, id: u8, bus: &Bus, counters: &Counters) -> Option<End> {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                counters.exit(Exit::IoIn);
                bus.io_in(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                counters.exit(Exit::IoOut);
                if bus.io_out(port, data) == Effect::Reset {
                    return Some(End::Stopped);
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                counters.exit(Exit::MmioRead);
                bus.mmio_read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                counters.exit(Exit::MmioWrite);
                bus.mmio_write(address, data);
            }
            Ok(VcpuExit::Hlt) => counters.exit(Exit::Halt),
            Ok(VcpuExit::Shutdown) => {
                counters.exit(Exit::Shutdown);
                return Some(End::Crashed);
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Some(End::Failed(format!(
                    "processor {id} could not enter the guest ({reason:#x} on {cpu})"
                )));
            }
            Ok(VcpuExit::InternalError) => {
                return Some(End::Failed(format!("processor {id} met an internal error of KVM")));
            }
            Ok(_) => counters.exit(Exit::Other),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                counters.exit(Exit::Interrupted);
            }
            Err(error) => return Some(End::Failed(format!("processor {id} cannot run: {error}"))),
        }
        None
    }
}

/// Fast strings on, memory write-back by default. KVM may refuse some registers on some hosts: the kernel of the guest
/// copes with the defaults, so a refusal is no failure.
fn set_msrs(fd: &VcpuFd) {
    for (index, data) in [(MSR_MISC_ENABLE, 1), (MSR_MTRR_DEFAULT, 0x806)] {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        if let Ok(msrs) = Msrs::from_entries(&[entry]) {
            // See above: a register that the host does not have is left alone.
            let _ = fd.set_msrs(&msrs);
        }
    }
}

/// Wires the local interrupt pins as the MP table says: LINT0 to the old interrupt controller, LINT1 to NMI.
fn set_lapic(fd: &VcpuFd) -> Result<()> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const DELIVER_EXT_INT: u32 = 0x700;
    const DELIVER_NMI: u32 = 0x400;
    let mut lapic = fd.get_lapic().map_err(Error::kvm("read the processor's APIC"))?;
    for (register, mode) in [(LVT_LINT0, DELIVER_EXT_INT), (LVT_LINT1, DELIVER_NMI)] {
        let bytes = &mut lapic.regs[register..register + 4];
        let mut value = u32::from_le_bytes([bytes[0] as u8, bytes[1] as u8, bytes[2] as u8, bytes[3] as u8]);
        value = (value & !0x700) | mode;
        for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *byte = new as _;
        }
    }
    fd.set_lapic(&lapic).map_err(Error::kvm("set the processor's APIC"))
}

/// The state that the PVH boot protocol asks for: 32-bit protected mode, flat segments, paging off, the address of
/// the start info in EBX.
fn set_boot_state(fd: &VcpuFd, entry: Entry) -> Result<()> {
    const CR0_PROTECTED: u64 = 1;
    const CR0_EXTENSION_TYPE: u64 = 1 << 4;
    const RFLAGS_ALWAYS_ONE: u64 = 2;
    let flat = |selector: u16, type_: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = fd.get_sregs().map_err(Error::kvm("read the processor's system registers"))?;
    sregs.cs = flat(0x08, 0xb);
    let data = flat(0x10, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    (sregs.cr4, sregs.efer) = (0, 0);
    fd.set_sregs(&sregs).map_err(Error::kvm("set the processor's system registers"))?;
    let regs =
        kvm_regs { rflags: RFLAGS_ALWAYS_ONE, rbx: START_INFO.0, rip: entry.address.0, ..Default::default() };
    fd.set_regs(&regs).map_err(Error::kvm("set the processor's registers"))?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    fd.set_fpu(&fpu).map_err(Error::kvm("set the processor's floating-point state"))
}

/// Where the processors' threads say how the machine ended; the first word counts.
#[derive(Default)]
pub struct Ending(Mutex<Option<End>>);

impl Ending {
    /// Says it, unless it has been said.
    pub fn say(&self, end: End) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
    }

    /// What was said.
    pub fn heard(&self) -> Option<End> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn gate_parks_and_lets_go() {
        let gate = Arc::new(Gate::default());
        let passes = Arc::new(Mutex::new(0u64));
        for _ in 0..2 {
            let (gate, passes) = (gate.clone(), passes.clone());
            std::thread::spawn(move || {
                loop {
                    gate.pass();
                    *passes.lock().unwrap() += 1;
                    std::thread::yield_now();
                }
            });
        }
        assert!(gate.close(2, Duration::from_secs(10), || ()), "threads start parked");
        assert_eq!(*passes.lock().unwrap(), 0);
        gate.open();
        assert!(gate.close(2, Duration::from_secs(10), || ()));
        let paused_at = *passes.lock().unwrap();
        assert_eq!(*passes.lock().unwrap(), paused_at);
        assert!(!gate.close(3, Duration::from_millis(5), || ()), "a thread that never parks is noticed");
    }

    #[test]
    fn the_first_ending_counts() {
        let ending = Ending::default();
        ending.say(End::Stopped);
        ending.say(End::Crashed);
        assert_eq!(ending.heard(), Some(End::Stopped));
    }
}
