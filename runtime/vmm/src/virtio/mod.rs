//! Virtio devices over MMIO (Virtual I/O Device specification 1.x, modern interface only).
//!
//! ```text
//! vCPU exit ──► bus ──► mmio::Transport ──► Device        registers, negotiation, activation
//! ioeventfd ──────────► block worker, or vhost in the kernel   queue notifications
//! irqfd     ◄────────── Interrupt, or vhost in the kernel      completions
//! ```

pub mod balloon;
pub mod block;
pub mod disk;
pub mod layers;
pub mod mmio;
pub mod queue;
pub mod rng;
pub mod vhost;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The device speaks virtio 1.0 or later: always offered, always required.
pub const F_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// Descriptors may refer to a table of descriptors.
pub const F_INDIRECT: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// Both sides say at which index they want to be told.
pub const F_EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// The interrupt line of one device.
///
/// A vhost backend raises the line itself, through the irqfd, and the VMM never learns of it: so such a device always
/// reports the ring bit in its interrupt status. The driver then looks at its rings, finds what there is (or nothing)
/// and is done; a bit that told the truth would need an exit to the VMM for every completion.
pub struct Interrupt {
    status: AtomicU32,
    raised_by_kernel: bool,
    event: EventFd,
}

impl Interrupt {
    const RING: u32 = 1;
    const CONFIG: u32 = 2;

    /// A line that is not raised. `raised_by_kernel` for vhost devices.
    pub fn new(raised_by_kernel: bool) -> io::Result<Self> {
        Ok(Self { status: AtomicU32::new(0), raised_by_kernel, event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// The event that KVM or vhost takes.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Buffers were used.
    pub fn ring(&self) {
        self.raise(Self::RING);
    }

    /// The configuration, or the device's health, changed.
    pub fn config(&self) {
        self.raise(Self::CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // The only failure is a full counter: then KVM has an edge waiting already.
        drop(self.event.write(1));
    }

    fn status(&self) -> u32 {
        let always = if self.raised_by_kernel { Self::RING } else { 0 };
        self.status.load(Ordering::SeqCst) | always
    }

    fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    fn clear(&self) {
        self.status.store(0, Ordering::SeqCst);
    }
}

/// What a transport needs of the device behind it. Called with the transport's lock held, on a vCPU thread.
pub trait Device: Send {
    /// Virtio device type.
    fn kind(&self) -> u32;
    /// Largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// Features offered.
    fn features(&self) -> u64;
    /// Configuration space.
    fn config(&self) -> &[u8];
    /// The driver is ready. `features` were agreed on; `queues` has an entry per queue, `None` for one that the driver
    /// did not set up. On an error the device asks to be reset.
    fn activate(&mut self, features: u64, queues: Vec<Option<Queue>>) -> io::Result<()>;
    /// The driver lets go: after the return nothing touches the queues any more.
    fn reset(&mut self);
    /// A notification that no ioeventfd took.
    fn notify(&mut self, _queue: u32) {}
}
