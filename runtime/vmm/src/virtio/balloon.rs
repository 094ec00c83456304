//! The virtio balloon, for one purpose: the guest reports pages that it does not use, and the host takes them back.
//!
//! The VMM never inflates: what a pod may use is decided before it starts. A report is a chain of ranges of guest memory;
//! each range is dropped from the host's side and reads zeros if the guest touches it again. Reports are rare (the guest's
//! kernel makes one every few seconds at most), so they are served on the vCPU thread that makes them.

use super::{Device, F_INDIRECT, F_VERSION_1, Interrupt};
use crate::memory::GuestRam;
use crate::stats::Counters;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// The driver reports free pages (VIRTIO_BALLOON_F_REPORTING).
const F_REPORTING: u64 = 1 << 5;
/// Inflate, deflate, reporting: on this transport queues of features that are not offered have no number.
const QUEUE_SIZES: [u16; 3] = [32, 32, 32];
const REPORTING: usize = 2;
const PAGE: u64 = 4096;
/// Most ranges of one report.
const MAX_RANGES: usize = 64;

/// The device.
pub struct Balloon {
    ram: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    counters: Arc<Counters>,
    queues: Vec<Option<Queue>>,
}

impl Balloon {
    /// A device that no driver has touched.
    pub fn new(ram: Arc<GuestRam>, interrupt: Arc<Interrupt>, counters: Arc<Counters>) -> Self {
        Self { ram, interrupt, counters, queues: Vec::new() }
    }

    fn serve(&mut self, index: usize) -> Result<(), virtio_queue::Error> {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(()) };
        let ram: &GuestRam = &self.ram;
        // At most a queue's worth per notification: a driver that adds while it is served notifies again.
        for _ in 0..QUEUE_SIZES[REPORTING] {
            let Some(chain) = queue.iter(ram)?.next() else { break };
            let head = chain.head_index();
            if index == REPORTING {
                for range in chain.writable().take(MAX_RANGES) {
                    if discard(ram, range.addr(), range.len()).is_ok() {
                        self.counters
                            .memory_returned_bytes
                            .fetch_add(u64::from(range.len()), Ordering::Relaxed);
                    }
                }
            }
            queue.add_used(ram, head, 0)?;
        }
        if queue.needs_notification(ram)? {
            self.interrupt.ring();
        }
        Ok(())
    }
}

/// Drops whole pages of guest memory; refuses what is not whole pages inside one region of RAM.
fn discard(ram: &GuestRam, address: GuestAddress, bytes: u32) -> io::Result<()> {
    if bytes == 0 || !address.0.is_multiple_of(PAGE) || !u64::from(bytes).is_multiple_of(PAGE) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let slice = ram.get_slice(address, bytes as usize).map_err(io::Error::other)?;
    let guard = slice.ptr_guard_mut();
    // SAFETY: the range is guest RAM, private and anonymous, and holds nothing of the VMM's own; only the guest can
    // notice that it reads zeros afterwards.
    match unsafe { libc::madvise(guard.as_ptr().cast(), guard.len(), libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn features(&self) -> u64 {
        F_VERSION_1 | F_INDIRECT | F_REPORTING
    }
    /// Pages wanted and pages given: none.
    fn config(&self) -> &[u8] {
        &[0; 16]
    }
    fn activate(&mut self, _features: u64, queues: Vec<Option<Queue>>) -> io::Result<()> {
        self.queues = queues;
        Ok(())
    }
    fn reset(&mut self) {
        self.queues.clear();
    }
    fn notify(&mut self, queue: u32) {
        if self.serve(queue as usize).is_err() {
            // The driver broke its ring: no answers until it resets the device.
            self.queues.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::Bytes;

    const AT: GuestAddress = GuestAddress(0x10_0000);

    /// Reports ranges through `queue`; returns guest memory and the bytes taken back.
    fn report(queue: u32, ranges: &[(u64, u32)]) -> (Arc<GuestRam>, u64) {
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap());
        ram.write_slice(&[7; 0x3000], AT).unwrap();
        let mock = MockSplitQueue::new(ram.as_ref(), 16);
        let chain: Vec<_> = ranges
            .iter()
            .map(|(at, bytes)| {
                RawDescriptor::from(Descriptor::new(*at, *bytes, VRING_DESC_F_WRITE as u16, 0))
            })
            .collect();
        mock.build_desc_chain(&chain).unwrap();
        let counters = Arc::new(Counters::default());
        let interrupt = Arc::new(Interrupt::new(false).unwrap());
        let mut balloon = Balloon::new(ram.clone(), interrupt.clone(), counters.clone());
        let queues = (0..3).map(|_| Some(mock.create_queue().unwrap())).collect();
        balloon.activate(F_VERSION_1, queues).unwrap();
        balloon.notify(queue);
        assert_eq!(mock.used().idx().load(), 1, "every report is given back");
        assert_eq!(interrupt.status(), 1);
        (ram, counters.memory_returned_bytes.load(Ordering::Relaxed))
    }

    #[test]
    fn reported_pages_are_dropped_and_no_others() {
        let (ram, returned) = report(2, &[(AT.0 + 0x1000, 0x1000)]);
        assert_eq!(returned, 0x1000);
        let byte = |offset: u64| ram.read_obj::<u8>(GuestAddress(AT.0 + offset)).unwrap();
        assert_eq!([byte(0), byte(0xfff), byte(0x1000), byte(0x1fff), byte(0x2000)], [7, 7, 0, 0, 7]);
    }

    #[test]
    fn ranges_that_are_not_pages_of_ram_are_left_alone() {
        for range in
            [(AT.0 + 1, 0x1000), (AT.0, 0x1001), (AT.0, 0), (0x1f_f000, 0x2000), (u64::MAX - 0xfff, 0x1000)]
        {
            let (ram, returned) = report(2, &[range]);
            assert_eq!((returned, ram.read_obj::<u8>(AT).unwrap()), (0, 7), "{range:x?}");
        }
    }

    #[test]
    fn the_other_queues_do_nothing() {
        assert_eq!(report(0, &[(AT.0, 0x1000)]).1, 0);
    }
}
