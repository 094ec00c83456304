//! Devices whose queues the host kernel serves: network and vsock. The VMM negotiates and hands over; after that no byte
//! of a packet passes through it.
//!
//! Order matters on activation: features, memory table, rings, and only then the backend (network) or the running flag
//! (vsock), which starts the kernel's worker on them. Reset stops the worker first, and returns when it has stopped.

use super::{Device, F_EVENT_IDX, F_INDIRECT, F_VERSION_1, Interrupt};
use crate::error::{Error, Result};
use crate::memory::GuestRam;
use atoll_spec::units::GuestCid;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{
    VHOST_NET_SET_BACKEND, VHOST_VSOCK_SET_GUEST_CID, VHOST_VSOCK_SET_RUNNING, vhost_vring_file,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_net::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

const NET_QUEUES: [u16; 2] = [256, 256];
/// Receive, transmit, and the event queue, which the kernel's backend leaves alone.
const VSOCK_QUEUES: [u16; 3] = [256, 256, 256];
/// Queues of either device that the kernel serves: the first two.
const SERVED: usize = 2;
/// Size of the header before every packet, for virtio 1.x.
const NET_HEADER: i32 = 12;

/// What the guest's network card can have done by the other side; each needs a tap with `IFF_VNET_HDR`.
const NET_OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;

/// An open vhost device.
struct Backend {
    file: File,
    ram: Arc<GuestRam>,
}

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Backend {
    type AS = Arc<GuestRam>;
    fn mem(&self) -> &Self::AS {
        &self.ram
    }
}

enum Kind {
    Net { tap: File },
    Vsock,
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Self::Net { .. } => "net",
            Self::Vsock => "vsock",
        }
    }
}

/// A network card or a vsock device.
pub struct Vhost {
    kind: Kind,
    backend: Backend,
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    features: u64,
    config: Vec<u8>,
    activated: bool,
}

impl Vhost {
    /// A network card on `tap`.
    pub fn net(
        file: File,
        tap: File,
        mac: [u8; 6],
        ram: Arc<GuestRam>,
        interrupt: Arc<Interrupt>,
        kicks: Vec<EventFd>,
    ) -> Result<Self> {
        set_tap(&tap, TUNSETVNETHDRSZ, &NET_HEADER)
            .map_err(Error::system("set the packet header size of the tap"))?;
        let mut device = Self::open(Kind::Net { tap }, file, ram, interrupt, kicks)?;
        let merged = device.features & 1 << VIRTIO_NET_F_MRG_RXBUF;
        device.features |= NET_OFFLOADS | 1 << VIRTIO_NET_F_MAC | merged;
        device.config = mac.to_vec();
        Ok(device)
    }

    /// A vsock device with address `cid`. Fails here, not in the guest, when the address is taken.
    pub fn vsock(
        file: File,
        cid: GuestCid,
        ram: Arc<GuestRam>,
        interrupt: Arc<Interrupt>,
        kicks: Vec<EventFd>,
    ) -> Result<Self> {
        let mut device = Self::open(Kind::Vsock, file, ram, interrupt, kicks)?;
        let cid = u64::from(cid.get());
        // SAFETY: the request takes a pointer to 64 bits, which `cid` is.
        let result = unsafe { ioctl_with_ref(&device.backend, VHOST_VSOCK_SET_GUEST_CID(), &cid) };
        check(result).map_err(Error::system("take the guest's vsock address; another guest may have it"))?;
        device.config = cid.to_le_bytes().to_vec();
        Ok(device)
    }

    fn open(
        kind: Kind,
        file: File,
        ram: Arc<GuestRam>,
        interrupt: Arc<Interrupt>,
        kicks: Vec<EventFd>,
    ) -> Result<Self> {
        let device = kind.name();
        let failed = |operation| move |source| Error::Vhost { device, operation, source };
        let backend = Backend { file, ram };
        backend.set_owner().map_err(failed("become the owner"))?;
        let offered = backend.get_features().map_err(failed("read the features"))?;
        let ring = F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | 1 << VIRTIO_NET_F_MRG_RXBUF;
        let mask =
            if matches!(kind, Kind::Net { .. }) { ring } else { ring & !(1 << VIRTIO_NET_F_MRG_RXBUF) };
        let features = offered & mask;
        Ok(Self { kind, backend, interrupt, kicks, features, config: Vec::new(), activated: false })
    }

    /// Gives the kernel everything but the start.
    fn prepare(&self, features: u64, queues: &[Option<Queue>]) -> vhost::Result<()> {
        self.backend.set_features(features & self.backend.get_features()?)?;
        self.backend.set_mem_table(&memory_table(&self.backend.ram)?)?;
        for (index, queue) in queues.iter().take(SERVED).enumerate() {
            let (Some(queue), Some(kick)) = (queue, self.kicks.get(index)) else {
                return Err(vhost::Error::InvalidQueue);
            };
            self.set_ring(index, queue, kick)?;
        }
        Ok(())
    }

    fn set_ring(&self, index: usize, queue: &Queue, kick: &EventFd) -> vhost::Result<()> {
        let ring = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        self.backend.set_vring_num(index, queue.size())?;
        self.backend.set_vring_addr(index, &ring)?;
        self.backend.set_vring_base(index, 0)?;
        self.backend.set_vring_call(index, self.interrupt.event())?;
        self.backend.set_vring_kick(index, kick)
    }

    fn start(&self, features: u64) -> io::Result<()> {
        match &self.kind {
            Kind::Net { tap } => {
                set_tap_offloads(tap, offloads(features))?;
                (0..SERVED as u32).try_for_each(|index| self.set_net_backend(index, tap.as_raw_fd()))
            }
            Kind::Vsock => self.set_vsock_running(1),
        }
    }

    fn set_net_backend(&self, index: u32, fd: RawFd) -> io::Result<()> {
        let file = vhost_vring_file { index, fd };
        // SAFETY: the request takes a pointer to this structure.
        check(unsafe { ioctl_with_ref(&self.backend, VHOST_NET_SET_BACKEND(), &file) })
    }

    fn set_vsock_running(&self, running: i32) -> io::Result<()> {
        // SAFETY: the request takes a pointer to an int.
        check(unsafe { ioctl_with_ref(&self.backend, VHOST_VSOCK_SET_RUNNING(), &running) })
    }
}

impl Device for Vhost {
    fn kind(&self) -> u32 {
        match self.kind {
            Kind::Net { .. } => virtio_bindings::virtio_ids::VIRTIO_ID_NET,
            Kind::Vsock => virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK,
        }
    }
    fn queue_sizes(&self) -> &[u16] {
        match self.kind {
            Kind::Net { .. } => &NET_QUEUES,
            Kind::Vsock => &VSOCK_QUEUES,
        }
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, features: u64, queues: Vec<Option<Queue>>) -> io::Result<()> {
        self.prepare(features, &queues).map_err(io::Error::other)?;
        self.activated = true;
        self.start(features)
    }

    fn reset(&mut self) {
        if !std::mem::take(&mut self.activated) {
            return;
        }
        // Stopping cannot fail on a device that was started; and were it to, the driver cannot be told here.
        match self.kind {
            Kind::Net { .. } => (0..SERVED as u32).for_each(|index| drop(self.set_net_backend(index, -1))),
            Kind::Vsock => drop(self.set_vsock_running(0)),
        }
    }
}

fn memory_table(ram: &GuestRam) -> vhost::Result<Vec<VhostUserMemoryRegionInfo>> {
    ram.iter()
        .map(|region| {
            let host =
                ram.get_host_address(region.start_addr()).map_err(|_| vhost::Error::InvalidGuestMemory)?;
            Ok(VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: host as u64,
                ..Default::default()
            })
        })
        .collect()
}

/// Sets the size of the packet header of a tap.
pub const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
/// Sets what a tap may leave to its reader.
pub const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;

fn set_tap(tap: &File, request: libc::c_ulong, value: &i32) -> io::Result<()> {
    // SAFETY: the request takes a pointer to an int.
    check(unsafe { ioctl_with_ref(tap, request, value) })
}

fn set_tap_offloads(tap: &File, flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the request takes a number, not a pointer.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD as _, flags) })
}

/// What the tap may hand to the guest unfinished, from what the guest said it can take.
fn offloads(features: u64) -> libc::c_ulong {
    let has = |bit: u32| features & (1 << bit) != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    for (bit, flag) in [
        (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    ] {
        if has(bit) {
            flags |= flag;
        }
    }
    libc::c_ulong::from(flags)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_follow_the_guest() {
        assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_TSO4), 0, "no segmentation without checksums");
        let all = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        let flags = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        assert_eq!(offloads(all), libc::c_ulong::from(flags));
    }
}
