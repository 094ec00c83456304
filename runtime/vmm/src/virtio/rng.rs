//! The virtio entropy device: fills the guest's buffers from the host's generator.
//!
//! Requests are rare and small (the guest's kernel seeds its own generator), so the notification is served on the vCPU
//! thread that made it: no thread and no ioeventfd. A request gets at most [`MAX_REQUEST`] bytes, which the
//! specification allows, so the time spent here is bounded.

use super::{Device, F_INDIRECT, F_VERSION_1, Interrupt};
use crate::memory::GuestRam;
use std::io;
use std::sync::Arc;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;

const QUEUE_SIZES: [u16; 1] = [16];
/// Most bytes given for one request.
const MAX_REQUEST: usize = 4096;

/// The device.
pub struct Rng {
    ram: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    queue: Option<Queue>,
}

impl Rng {
    /// A device that no driver has touched.
    pub fn new(ram: Arc<GuestRam>, interrupt: Arc<Interrupt>) -> Self {
        Self { ram, interrupt, queue: None }
    }

    fn serve(&mut self) -> Result<(), virtio_queue::Error> {
        let Some(queue) = self.queue.as_mut() else { return Ok(()) };
        let ram: &GuestRam = &self.ram;
        let mut bytes = [0; MAX_REQUEST];
        // At most a queue's worth per notification: a driver that adds while it is served notifies again.
        for _ in 0..QUEUE_SIZES[0] {
            let Some(chain) = queue.iter(ram)?.next() else { break };
            let head = chain.head_index();
            let mut given = 0;
            for descriptor in chain.writable() {
                let want = (descriptor.len() as usize).min(MAX_REQUEST - given);
                let part = &mut bytes[..want];
                if want == 0 || fill(part).is_err() || ram.write_slice(part, descriptor.addr()).is_err() {
                    break;
                }
                given += want;
            }
            queue.add_used(ram, head, given as u32)?;
        }
        if queue.needs_notification(ram)? {
            self.interrupt.ring();
        }
        Ok(())
    }
}

fn fill(bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: the pointer and the length are those of one slice.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    // Requests above 256 bytes may be cut short by a signal; the guest asks again.
    if usize::try_from(got) == Ok(bytes.len()) { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Device for Rng {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_RNG
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn features(&self) -> u64 {
        // Without event indices every notification comes, and the queue need not be told when.
        F_VERSION_1 | F_INDIRECT
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn activate(&mut self, _features: u64, mut queues: Vec<Option<Queue>>) -> io::Result<()> {
        self.queue = Some(queues.pop().flatten().ok_or(io::ErrorKind::InvalidInput)?);
        Ok(())
    }
    fn reset(&mut self) {
        self.queue = None;
    }
    fn notify(&mut self, _queue: u32) {
        if self.serve().is_err() {
            // The driver broke its ring: no answers until it resets the device.
            self.queue = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;

    fn serve(descriptors: &[RawDescriptor]) -> (Arc<GuestRam>, Arc<Interrupt>, u32) {
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap());
        let interrupt = Arc::new(Interrupt::new(false).unwrap());
        let mock = MockSplitQueue::new(ram.as_ref(), 16);
        mock.build_desc_chain(descriptors).unwrap();
        let mut rng = Rng::new(ram.clone(), interrupt.clone());
        rng.activate(F_VERSION_1, vec![Some(mock.create_queue().unwrap())]).unwrap();
        rng.notify(0);
        let used = mock.used().ring().ref_at(0).unwrap().load().len();
        (ram, interrupt, used)
    }

    fn descriptor(address: u64, bytes: u32, flags: u32) -> RawDescriptor {
        RawDescriptor::from(Descriptor::new(address, bytes, flags as u16, 0))
    }

    #[test]
    fn buffers_are_filled_and_the_line_is_raised() {
        let (ram, interrupt, used) = serve(&[descriptor(0x10_0000, 64, VRING_DESC_F_WRITE)]);
        assert_eq!((used, interrupt.status()), (64, 1));
        let bytes: [u8; 32] = ram.read_obj(GuestAddress(0x10_0000)).unwrap();
        assert_ne!(bytes, [0; 32]);
    }

    #[test]
    fn a_request_is_bounded_and_hostile_buffers_get_nothing() {
        assert_eq!(serve(&[descriptor(0x10_0000, 1 << 20, VRING_DESC_F_WRITE)]).2, MAX_REQUEST as u32);
        assert_eq!(serve(&[descriptor(0xffff_ffff_0000, 64, VRING_DESC_F_WRITE)]).2, 0);
        assert_eq!(serve(&[descriptor(0x10_0000, 64, 0)]).2, 0);
    }
}
