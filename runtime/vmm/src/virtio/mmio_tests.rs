//! Tests of the virtio-mmio transport: a driver's steps, in order and out of it.

use super::*;
use proptest::prelude::*;
use std::io;
use std::sync::Mutex;
use vm_memory::GuestAddress;

#[derive(Default)]
struct Seen {
    activated: Vec<(u64, Vec<bool>)>,
    resets: usize,
    notified: Vec<u32>,
}

struct Probe {
    seen: Arc<Mutex<Seen>>,
    refuse: bool,
}

const OFFERED: u64 = F_VERSION_1 | F_EVENT_IDX | 1 << 5;

impl Device for Probe {
    fn kind(&self) -> u32 {
        2
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4, 5, 6]
    }
    fn activate(&mut self, features: u64, queues: Vec<Option<Queue>>) -> io::Result<()> {
        self.seen.lock().unwrap().activated.push((features, queues.iter().map(Option::is_some).collect()));
        if self.refuse { Err(io::Error::other("refused")) } else { Ok(()) }
    }
    fn reset(&mut self) {
        self.seen.lock().unwrap().resets += 1;
    }
    fn notify(&mut self, queue: u32) {
        self.seen.lock().unwrap().notified.push(queue);
    }
}

fn transport(refuse: bool) -> (Transport, Arc<Mutex<Seen>>, Arc<Interrupt>) {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap());
    let interrupt = Arc::new(Interrupt::new(false).unwrap());
    let device = Box::new(Probe { seen: seen.clone(), refuse });
    (Transport::new(device, ram, interrupt.clone()), seen, interrupt)
}

fn get(transport: &mut Transport, register: u32) -> u32 {
    let mut data = [0; 4];
    transport.read(u64::from(register), &mut data);
    u32::from_le_bytes(data)
}

fn set(transport: &mut Transport, register: u32, value: u32) {
    transport.write(u64::from(register), &value.to_le_bytes());
}

fn negotiate(transport: &mut Transport, features: u64) {
    set(transport, VIRTIO_MMIO_STATUS, 0);
    set(transport, VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    set(transport, VIRTIO_MMIO_STATUS, DRIVER);
    for word in 0..2 {
        set(transport, VIRTIO_MMIO_DRIVER_FEATURES_SEL, word);
        set(transport, VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * word)) as u32);
    }
    set(transport, VIRTIO_MMIO_STATUS, FEATURES_OK);
}

fn set_up(transport: &mut Transport, queue: u32, descriptors: u32) {
    set(transport, VIRTIO_MMIO_QUEUE_SEL, queue);
    for (register, value) in [
        (VIRTIO_MMIO_QUEUE_NUM, 8),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000),
        (VIRTIO_MMIO_QUEUE_READY, 1),
    ] {
        set(transport, register, value);
    }
}

#[test]
fn identity_features_and_config_are_readable() {
    let (mut transport, ..) = transport(false);
    assert_eq!(get(&mut transport, VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(get(&mut transport, VIRTIO_MMIO_VERSION), 2);
    assert_eq!(get(&mut transport, VIRTIO_MMIO_DEVICE_ID), 2);
    let mut features = 0;
    for word in 0..2 {
        set(&mut transport, VIRTIO_MMIO_DEVICE_FEATURES_SEL, word);
        features |= u64::from(get(&mut transport, VIRTIO_MMIO_DEVICE_FEATURES)) << (32 * word);
    }
    assert_eq!(features, OFFERED);
    let mut config = [0xee; 8];
    transport.read(CONFIG, &mut config);
    assert_eq!(config, [1, 2, 3, 4, 5, 6, 0, 0], "past the end reads zeros");
    transport.read(CONFIG + 0xeff, &mut config);
    assert_eq!(config, [0; 8]);
    let mut byte = [0];
    transport.read(CONFIG + 2, &mut byte);
    assert_eq!(byte, [3]);
}

#[test]
fn a_driver_that_keeps_the_order_activates_the_device() {
    let (mut transport, seen, _) = transport(false);
    negotiate(&mut transport, F_VERSION_1 | F_EVENT_IDX);
    assert_eq!(get(&mut transport, VIRTIO_MMIO_STATUS), FEATURES_OK);
    set_up(&mut transport, 0, 0x1000);
    assert_eq!(get(&mut transport, VIRTIO_MMIO_QUEUE_READY), 1);
    set(&mut transport, VIRTIO_MMIO_STATUS, DRIVER_OK);
    assert_eq!(get(&mut transport, VIRTIO_MMIO_STATUS), DRIVER_OK);
    set(&mut transport, VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    set(&mut transport, VIRTIO_MMIO_STATUS, 0);
    assert_eq!(get(&mut transport, VIRTIO_MMIO_QUEUE_READY), 0);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.activated, [(F_VERSION_1 | F_EVENT_IDX, vec![true, false])]);
    assert_eq!((seen.resets, &seen.notified[..]), (1, &[1][..]));
}

#[test]
fn features_not_offered_or_without_version_1_are_refused() {
    for features in [F_VERSION_1 | 1 << 9, F_EVENT_IDX, 0, u64::MAX] {
        let (mut transport, seen, _) = transport(false);
        negotiate(&mut transport, features);
        assert_eq!(get(&mut transport, VIRTIO_MMIO_STATUS), DRIVER, "{features:#x}");
        set(&mut transport, VIRTIO_MMIO_STATUS, DRIVER_OK);
        assert!(seen.lock().unwrap().activated.is_empty());
    }
}

#[test]
fn a_bad_queue_or_a_refusal_asks_for_a_reset() {
    for (refuse, descriptors) in [(false, 0xffff_f000), (false, 0x1001), (true, 0x1000)] {
        let (mut transport, seen, _) = transport(refuse);
        negotiate(&mut transport, F_VERSION_1);
        set_up(&mut transport, 0, descriptors);
        set(&mut transport, VIRTIO_MMIO_STATUS, DRIVER_OK);
        let status = get(&mut transport, VIRTIO_MMIO_STATUS);
        assert_eq!(status & VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_CONFIG_S_NEEDS_RESET);
        assert_eq!(get(&mut transport, VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        set(&mut transport, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert!(seen.lock().unwrap().notified.is_empty(), "a broken device hears nothing");
    }
}

#[test]
fn interrupt_status_is_acknowledged_bit_by_bit() {
    let (mut transport, _, interrupt) = transport(false);
    interrupt.ring();
    interrupt.config();
    assert_eq!(get(&mut transport, VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    set(&mut transport, VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(get(&mut transport, VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    assert_eq!(interrupt.event().read().unwrap(), 2);
}

#[test]
fn a_line_that_the_kernel_raises_always_reports_the_ring_bit() {
    let interrupt = Interrupt::new(true).unwrap();
    interrupt.acknowledge(u32::MAX);
    assert_eq!(interrupt.status(), 1);
}

proptest! {
    /// Whatever is written, in whatever order: no panic, and the device is activated at most once between resets, only
    /// with features that were offered.
    #[test]
    fn any_sequence_of_accesses_is_survived(
        accesses in prop::collection::vec((any::<bool>(), 0u64..0x120, any::<u32>(), 0usize..9, any::<bool>()), 0..200)
    ) {
        let (mut transport, seen, _) = transport(false);
        let interesting = [0, 1, 3, 11, 15, 8, 0x1000];
        for (write, offset, value, width, tame) in accesses {
            let value = if tame { interesting[value as usize % interesting.len()] } else { value };
            let offset = if tame { offset & !3 } else { offset };
            let width = if tame { 4 } else { width };
            let mut data = [0u8; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            if write {
                transport.write(offset, &data[..width]);
            } else {
                transport.read(offset, &mut data[..width]);
            }
        }
        let seen = seen.lock().unwrap();
        prop_assert!(seen.activated.len() <= seen.resets + 1);
        prop_assert!(seen.activated.iter().all(|(features, _)| features & !OFFERED == 0));
    }
}
