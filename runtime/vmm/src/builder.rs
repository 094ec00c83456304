//! From a [`VmSpec`] and its descriptors to a machine that is ready to run. `lib.rs` calls it once, inside the jail.
//!
//! The order is fixed: interrupt controllers, memory, devices (the kernel's command line names them), kernel,
//! processors (the first starts at the kernel's entry). Nothing runs before
//! [`Machine::start`](crate::machine::Machine::start).

use crate::bus::Bus;
use crate::cpuid::Topology;
use crate::error::{Error, Result};
use crate::kernel::{self, DeviceSlot, Entry};
use crate::machine::{DiskWorker, Machine};
use crate::memory::{self, GuestRam, KVM_IDENTITY_MAP, KVM_TSS, MMIO_BASE, MMIO_STEP};
use crate::mptable;
use crate::serial::{self, Console};
use crate::stats::{Counters, Launch};
use crate::vcpu::Vcpu;
use crate::virtio::balloon::Balloon;
use crate::virtio::disk::{Disk, FileDisk};
use crate::virtio::layers::Layers;
use crate::virtio::mmio::{NOTIFY, Transport};
use crate::virtio::rng::Rng;
use crate::virtio::vhost::Vhost;
use crate::virtio::{Device, Interrupt, block};
use atoll_spec::vm::{BootFd, VmSpec};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Most processors of a guest.
pub const MAX_VCPUS: u8 = 32;
/// Interrupt line of the first virtio device; the next ones follow. 0 to 4 are the timer, the keyboard, the second
/// interrupt controller and the serial ports, by tradition.
const FIRST_IRQ: u32 = 5;

/// The descriptors of a boot request, by what they are.
pub struct BootFds(HashMap<BootFd, OwnedFd>);

impl BootFds {
    /// Pairs names with descriptors; refuses a request in which they do not fit each other or the rest of the spec.
    pub fn new(spec: &VmSpec, fds: Vec<OwnedFd>) -> Result<Self> {
        if spec.fds.len() != fds.len() {
            let (named, sent) = (spec.fds.len(), fds.len());
            return Err(Error::Spec(format!("{named} descriptors are named, {sent} were sent")));
        }
        let fds: HashMap<_, _> = spec.fds.iter().copied().zip(fds).collect();
        if fds.len() != spec.fds.len() {
            return Err(Error::Spec("a descriptor is named twice".into()));
        }
        let boot = Self(fds);
        for always in [BootFd::Kvm, BootFd::Kernel, BootFd::Initramfs, BootFd::VhostVsock] {
            boot.require(always)?;
        }
        if spec.mac.is_some() {
            boot.require(BootFd::VhostNet)?;
            boot.require(BootFd::Tap)?;
        }
        Ok(boot)
    }

    fn require(&self, fd: BootFd) -> Result<()> {
        if self.0.contains_key(&fd) { Ok(()) } else { Err(Error::MissingFd(fd)) }
    }

    fn optional(&mut self, fd: BootFd) -> Option<File> {
        self.0.remove(&fd).map(File::from)
    }

    fn take(&mut self, fd: BootFd) -> Result<File> {
        self.optional(fd).ok_or(Error::MissingFd(fd))
    }

    /// Bytes of the scratch disk, or zero without one.
    pub fn scratch_bytes(&self) -> Result<u64> {
        let Some(fd) = self.0.get(&BootFd::Scratch) else { return Ok(0) };
        let stat = rustix::fs::fstat(fd).map_err(Error::system("find the size of the scratch disk"))?;
        Ok(stat.st_size as u64)
    }
}

/// Refuses what no machine can be made of.
pub fn check(spec: &VmSpec) -> Result<()> {
    if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
        return Err(Error::Spec(format!("{} processors are not between 1 and {MAX_VCPUS}", spec.vcpus)));
    }
    if matches!(spec.uid, Some(0 | u32::MAX)) {
        return Err(Error::Spec("the VMM cannot run as user 0; give it a user of its own".into()));
    }
    Ok(())
}

/// Builds the machine.
pub fn build(spec: &VmSpec, mut fds: BootFds, mut launch: Launch) -> Result<Machine> {
    let kvm = fds.take(BootFd::Kvm)?;
    // SAFETY: the descriptor is owned and given away; that it is KVM's is checked with its version.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    if kvm.get_api_version() != 12 {
        return Err(Error::Spec("the descriptor named as /dev/kvm is not KVM with API version 12".into()));
    }
    let vm = create_vm(&kvm)?;
    let ram = Arc::new(memory::create(spec.memory)?);
    memory::register(&vm, &ram)?;
    launch.done("memory");

    let mut board = Board::new(vm, ram);
    let layers = board.populate(spec, &mut fds)?;
    let console = fds.optional(BootFd::Console).map(|output| board.console(output)).transpose()?;
    launch.done("devices");

    let cmdline = kernel::cmdline(&spec.cmdline, console.is_some(), &board.slots)?;
    let (mut image, mut initramfs) = (fds.take(BootFd::Kernel)?, fds.take(BootFd::Initramfs)?);
    let entry = kernel::load(&board.ram, &mut image, &mut initramfs, &cmdline)?;
    mptable::write(&board.ram, spec.vcpus)?;
    launch.done("kernel");

    let vcpus = create_vcpus(&kvm, &board.vm, spec.vcpus, entry)?;
    launch.done("processors");

    Machine::new(
        Arc::new(Bus::new(board.transports, console)),
        vcpus,
        board.disks,
        layers,
        board.counters,
        launch,
        board.vm,
    )
}

/// The VM with KVM's own interrupt controllers. There is no timer chip: the kernel takes its time from kvmclock and the
/// local APIC.
fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(Error::kvm("make a virtual machine"))?;
    vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(Error::kvm("place KVM's identity map"))?;
    vm.set_tss_address(KVM_TSS).map_err(Error::kvm("place KVM's task state"))?;
    vm.create_irq_chip().map_err(Error::kvm("make the interrupt controllers"))?;
    Ok(vm)
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8, entry: Entry) -> Result<Vec<Vcpu>> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("read the CPUID that KVM supports"))?;
    let topology = Topology { vcpus: count, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) };
    (0..count).map(|id| Vcpu::new(vm, id, topology, supported.as_slice(), entry)).collect()
}

/// What a device is wired to, before it exists.
struct Wires {
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
}

/// The machine's devices while they are being made.
struct Board {
    vm: VmFd,
    ram: Arc<GuestRam>,
    slots: Vec<DeviceSlot>,
    transports: Vec<Transport>,
    disks: Vec<DiskWorker>,
    counters: Arc<Counters>,
}

impl Board {
    fn new(vm: VmFd, ram: Arc<GuestRam>) -> Self {
        Self {
            vm,
            ram,
            slots: Vec::new(),
            transports: Vec::new(),
            disks: Vec::new(),
            counters: Arc::default(),
        }
    }

    /// All virtio devices. The guest names disks in this order: the layer window is /dev/vda, the scratch /dev/vdb.
    fn populate(&mut self, spec: &VmSpec, fds: &mut BootFds) -> Result<Layers> {
        let layers = Layers::default();
        let (device, worker) = self.block(layers.clone())?;
        self.disks.push(DiskWorker { name: "layers", run: worker });
        self.plug(device.0, device.1);
        if let Some(scratch) = fds.optional(BootFd::Scratch) {
            let disk = FileDisk::new(scratch).map_err(Error::system("find the size of the scratch disk"))?;
            let (device, worker) = self.block(disk)?;
            self.disks.push(DiskWorker { name: "scratch", run: worker });
            self.plug(device.0, device.1);
        }
        let wires = self.wire(true, &[0, 1])?;
        let interrupt = wires.interrupt.clone();
        let vsock = fds.take(BootFd::VhostVsock)?;
        let vsock = Vhost::vsock(vsock, spec.cid, self.ram.clone(), wires.interrupt, wires.kicks)?;
        self.plug(Box::new(vsock), interrupt);
        if let Some(mac) = spec.mac {
            let wires = self.wire(true, &[0, 1])?;
            let interrupt = wires.interrupt.clone();
            let (net, tap) = (fds.take(BootFd::VhostNet)?, fds.take(BootFd::Tap)?);
            let net = Vhost::net(net, tap, mac, self.ram.clone(), wires.interrupt, wires.kicks)?;
            self.plug(Box::new(net), interrupt);
        }
        let wires = self.wire(false, &[])?;
        let rng = Rng::new(self.ram.clone(), wires.interrupt.clone());
        self.plug(Box::new(rng), wires.interrupt);
        let wires = self.wire(false, &[])?;
        let balloon = Balloon::new(self.ram.clone(), wires.interrupt.clone(), self.counters.clone());
        self.plug(Box::new(balloon), wires.interrupt);
        Ok(layers)
    }

    #[expect(clippy::type_complexity, reason = "the two halves of a disk, taken apart at once by the caller")]
    fn block<D: Disk + 'static>(
        &mut self,
        disk: D,
    ) -> Result<((Box<dyn Device>, Arc<Interrupt>), Box<dyn FnOnce() + Send>)> {
        let mut wires = self.wire(false, &[0])?;
        let kick = wires.kicks.remove(0);
        let (device, worker) =
            block::new(disk, self.ram.clone(), wires.interrupt.clone(), kick, self.counters.clone());
        Ok(((Box::new(device), wires.interrupt), Box::new(move || worker.run())))
    }

    /// Connects the next slot: its interrupt line to KVM, notifications of `queues` to events. The device that
    /// [`plug`](Self::plug) gets next lives there.
    fn wire(&mut self, raised_by_kernel: bool, queues: &[u32]) -> Result<Wires> {
        let index = self.slots.len() as u32;
        let slot = DeviceSlot { address: MMIO_BASE + u64::from(index) * MMIO_STEP, irq: FIRST_IRQ + index };
        self.slots.push(slot);
        let interrupt =
            Arc::new(Interrupt::new(raised_by_kernel).map_err(Error::system("make an interrupt event"))?);
        self.vm
            .register_irqfd(interrupt.event(), slot.irq)
            .map_err(Error::kvm("connect an interrupt line"))?;
        let mut kicks = Vec::with_capacity(queues.len());
        for queue in queues {
            let kick = EventFd::new(0).map_err(Error::system("make a notification event"))?;
            let register = IoEventAddress::Mmio(slot.address + NOTIFY);
            self.vm
                .register_ioevent(&kick, &register, *queue)
                .map_err(Error::kvm("connect a notification register"))?;
            kicks.push(kick);
        }
        Ok(Wires { interrupt, kicks })
    }

    fn plug(&mut self, device: Box<dyn Device>, interrupt: Arc<Interrupt>) {
        self.transports.push(Transport::new(device, self.ram.clone(), interrupt));
    }

    fn console(&self, output: File) -> Result<Console> {
        let (console, event) = Console::new(output)?;
        self.vm.register_irqfd(&event, serial::IRQ).map_err(Error::kvm("connect the console's line"))?;
        Ok(console)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_spec::units::{GuestCid, MiB};

    fn spec(fds: Vec<BootFd>) -> VmSpec {
        VmSpec {
            sandbox: "test".parse().unwrap(),
            vcpus: 1,
            memory: MiB(128),
            cid: GuestCid::FIRST,
            mac: None,
            cmdline: String::new(),
            fds,
            uid: None,
        }
    }

    fn files(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| tempfile::tempfile().unwrap().into()).collect()
    }

    fn refusal(spec: &VmSpec, sent: usize) -> String {
        BootFds::new(spec, files(sent)).err().unwrap().to_string()
    }

    const NEEDED: [BootFd; 4] = [BootFd::Kvm, BootFd::Kernel, BootFd::Initramfs, BootFd::VhostVsock];

    #[test]
    fn descriptors_must_fit_their_names() {
        assert!(BootFds::new(&spec(NEEDED.to_vec()), files(4)).is_ok());
        assert!(refusal(&spec(NEEDED.to_vec()), 3).contains("4 descriptors are named, 3 were sent"));
        assert!(refusal(&spec(vec![BootFd::Kvm, BootFd::Kvm]), 2).contains("named twice"));
        assert!(refusal(&spec(NEEDED[..3].to_vec()), 3).contains("VhostVsock"));
        let net = VmSpec { mac: Some([2, 0, 0, 0, 0, 1]), ..spec(NEEDED.to_vec()) };
        assert!(refusal(&net, 4).contains("VhostNet"));
    }

    #[test]
    fn impossible_machines_are_refused() {
        for vcpus in [0, 33] {
            assert!(check(&VmSpec { vcpus, ..spec(vec![]) }).is_err());
        }
        for uid in [0, u32::MAX] {
            assert!(check(&VmSpec { uid: Some(uid), ..spec(vec![]) }).is_err());
        }
        check(&VmSpec { uid: Some(100_003), ..spec(vec![]) }).unwrap();
    }

    #[test]
    fn what_is_not_kvm_is_refused() {
        let spec = spec(NEEDED.to_vec());
        let fds = BootFds::new(&spec, files(4)).unwrap();
        assert!(build(&spec, fds, Launch::begin()).err().unwrap().to_string().contains("not KVM"));
    }
}
