//! The virtio-mmio transport: one page of registers per device (version 2, virtio 1.x section 4.2).
//!
//! ```text
//! status   0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK (device activated)
//!          ▲                                               │
//!          └──────────── write 0: device reset ────────────┘   any step may add FAILED or NEEDS_RESET
//! ```
//!
//! Invariant: the device sees only what was negotiated in this order. Features cannot change after FEATURES_OK, nor
//! queues while the device is active.

use super::queue::QueueSetup;
use super::{Device, F_EVENT_IDX, F_VERSION_1, Interrupt};
use crate::memory::GuestRam;
use std::sync::Arc;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::*;
use virtio_queue::Queue;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"ATOL");
/// Where the configuration space starts.
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
/// Offset of the notification register, for the ioeventfd.
pub const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;

/// Registers of one device, and the device.
pub struct Transport {
    device: Box<dyn Device>,
    ram: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    queues: Vec<QueueSetup>,
    status: u32,
    device_features_word: u32,
    driver_features_word: u32,
    driver_features: u64,
    queue: u32,
}

impl Transport {
    /// A device that no driver has touched.
    pub fn new(device: Box<dyn Device>, ram: Arc<GuestRam>, interrupt: Arc<Interrupt>) -> Self {
        let queues = device.queue_sizes().iter().map(|size| QueueSetup::new(*size)).collect();
        Self {
            device,
            ram,
            interrupt,
            queues,
            status: 0,
            device_features_word: 0,
            driver_features_word: 0,
            driver_features: 0,
            queue: 0,
        }
    }

    /// Register read.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            let config = self.device.config();
            data.fill(0);
            let at = usize::try_from(at).unwrap_or(usize::MAX).min(config.len());
            let take = data.len().min(config.len() - at);
            data[..take].copy_from_slice(&config[at..at + take]);
        } else if let (Ok(register), Ok(data)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(&mut *data))
        {
            *data = self.read_register(register).to_le_bytes();
        } else {
            data.fill(0);
        }
    }

    /// Register write. The configuration spaces here have no writable field.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(register), Ok(data)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(register, u32::from_le_bytes(data));
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.kind(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_word {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |queue| u32::from(queue.max_size)),
            VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |queue| u32::from(queue.ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status,
            // No shared memory regions: their length reads as all ones.
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            // The generation of the configuration, which never changes, is 0 too.
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_word = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_word = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue = value,
            VIRTIO_MMIO_QUEUE_NOTIFY if self.status == DRIVER_OK => self.device.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => self.set_up_queue(register, value),
        }
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(self.queue as usize)
    }

    fn accept_features(&mut self, value: u32) {
        if self.status != DRIVER {
            return;
        }
        let (mask, bits) = match self.driver_features_word {
            0 => (u64::from(u32::MAX), u64::from(value)),
            1 => (u64::from(u32::MAX) << 32, u64::from(value) << 32),
            _ => return,
        };
        self.driver_features = (self.driver_features & !mask) | bits;
    }

    fn set_up_queue(&mut self, register: u32, value: u32) {
        if self.status != FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue as usize) else { return };
        let low = |old: u64| (old & !0xffff_ffff) | u64::from(value);
        let high = |old: u64| (old & 0xffff_ffff) | (u64::from(value) << 32);
        match register {
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
            _ if queue.ready => {}
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.descriptors = low(queue.descriptors),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.descriptors = high(queue.descriptors),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.available = low(queue.available),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.available = high(queue.available),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.used = low(queue.used),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.used = high(queue.used),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        match (self.status, value) {
            (_, 0) => self.reset(),
            (0, ACKNOWLEDGE) | (ACKNOWLEDGE, DRIVER) => self.status = value,
            // The bit stays off, and the driver gives up, when it chose what was not offered.
            (DRIVER, FEATURES_OK) if self.features_fit() => self.status = value,
            (FEATURES_OK, DRIVER_OK) => self.activate(),
            (_, value) if value & VIRTIO_CONFIG_S_FAILED != 0 => self.status |= VIRTIO_CONFIG_S_FAILED,
            _ => {}
        }
    }

    fn features_fit(&self) -> bool {
        self.driver_features & !self.device.features() == 0 && self.driver_features & F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let queues: Result<Vec<Option<Queue>>, _> = self
            .queues
            .iter()
            .map(|queue| if queue.ready { queue.build(&self.ram, event_idx).map(Some) } else { Ok(None) })
            .collect();
        let activated = match queues {
            Ok(queues) => self.device.activate(self.driver_features, queues).is_ok(),
            Err(_unfit) => false,
        };
        self.status = DRIVER_OK;
        if !activated {
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            self.interrupt.config();
        }
    }

    fn reset(&mut self) {
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.device.reset();
        }
        self.queues = self.queues.iter().map(|queue| QueueSetup::new(queue.max_size)).collect();
        (self.status, self.driver_features, self.queue) = (0, 0, 0);
        (self.device_features_word, self.driver_features_word) = (0, 0);
        self.interrupt.clear();
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
