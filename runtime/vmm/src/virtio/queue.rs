//! What the driver says about a queue, and the checks before anything uses it. Everything here comes from the guest
//! and is hostile until checked.

use crate::memory::GuestRam;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Registers of one queue, as the driver wrote them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// Largest size that the device takes.
    pub max_size: u16,
    /// Number of descriptors.
    pub size: u32,
    /// Descriptor table.
    pub descriptors: u64,
    /// Ring of available descriptors.
    pub available: u64,
    /// Ring of used descriptors.
    pub used: u64,
    /// The driver has set it up.
    pub ready: bool,
}

/// Which part of a queue is unfit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    /// Not a power of two, zero, or larger than the device's largest.
    Size,
    /// The descriptor table is misaligned or not in RAM.
    Descriptors,
    /// The ring of available descriptors is misaligned or not in RAM.
    Available,
    /// The ring of used descriptors is misaligned or not in RAM.
    Used,
}

/// Bytes of the three parts of a queue of `size` descriptors: table, available ring, used ring (with its event index).
pub fn part_bytes(size: u16) -> (usize, usize, usize) {
    let size = usize::from(size);
    (16 * size, 6 + 2 * size, 6 + 8 * size)
}

impl QueueSetup {
    /// A queue that the driver has not touched.
    pub fn new(max_size: u16) -> Self {
        Self { max_size, size: u32::from(max_size), ..Self::default() }
    }

    /// The queue, ready to use. Each part must lie in one region of RAM: vhost turns an address into a pointer once and
    /// goes on from there, beyond the region if it were let.
    pub fn build(&self, ram: &GuestRam, event_idx: bool) -> Result<Queue, Unfit> {
        let size = u16::try_from(self.size).map_err(|_| Unfit::Size)?;
        let mut queue = Queue::new(self.max_size).map_err(|_| Unfit::Size)?;
        queue.try_set_size(size).map_err(|_| Unfit::Size)?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).map_err(|_| Unfit::Descriptors)?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).map_err(|_| Unfit::Available)?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).map_err(|_| Unfit::Used)?;
        let (descriptors, available, used) = part_bytes(size);
        for (address, bytes, unfit) in [
            (self.descriptors, descriptors, Unfit::Descriptors),
            (self.available, available, Unfit::Available),
            (self.used, used, Unfit::Used),
        ] {
            ram.get_slice(GuestAddress(address), bytes).map_err(|_| unfit)?;
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000), (GuestAddress(0x10_0000), 0x1_0000)]).unwrap()
    }

    fn good() -> QueueSetup {
        QueueSetup { size: 8, descriptors: 0x1000, available: 0x2000, used: 0x3000, ..QueueSetup::new(16) }
    }

    #[test]
    fn a_good_queue_is_built() {
        let queue = good().build(&ram(), true).unwrap();
        assert_eq!((queue.size(), queue.ready(), queue.event_idx_enabled()), (8, true, true));
    }

    #[test]
    fn unfit_queues_are_refused() {
        let cases = [
            (QueueSetup { size: 0, ..good() }, Unfit::Size),
            (QueueSetup { size: 7, ..good() }, Unfit::Size),
            (QueueSetup { size: 32, ..good() }, Unfit::Size),
            (QueueSetup { size: 0x1_0008, ..good() }, Unfit::Size),
            (QueueSetup { descriptors: 0x1001, ..good() }, Unfit::Descriptors),
            (QueueSetup { descriptors: 0xfff0, ..good() }, Unfit::Descriptors),
            (QueueSetup { available: 0x2001, ..good() }, Unfit::Available),
            (QueueSetup { available: 0xfffe, ..good() }, Unfit::Available),
            (QueueSetup { used: 0x3002, ..good() }, Unfit::Used),
            (QueueSetup { used: u64::MAX - 3, ..good() }, Unfit::Used),
            (QueueSetup { used: 0x8_0000, ..good() }, Unfit::Used),
        ];
        for (setup, unfit) in cases {
            assert_eq!(setup.build(&ram(), false).err(), Some(unfit), "{setup:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_built_lies_in_ram(size: u32, descriptors: u64, available: u64, used: u64, near in any::<bool>()) {
            let fit = |address: u64| if near { address % 0x12_0000 } else { address };
            let setup = QueueSetup {
                size: if near { 1 << (size % 6) } else { size },
                descriptors: fit(descriptors) & !0xf,
                available: fit(available) & !1,
                used: fit(used) & !3,
                ..QueueSetup::new(16)
            };
            let ram = ram();
            if let Ok(queue) = setup.build(&ram, false) {
                prop_assert!(queue.is_valid(&ram));
                prop_assert!(queue.size() <= 16 && queue.size().is_power_of_two());
            }
        }
    }
}
