//! Any sequence of register accesses to the devices that live in the VMM: `cargo +nightly fuzz run mmio`.
#![no_main]

use arbitrary::Arbitrary;
use atoll_vmm::memory::GuestRam;
use atoll_vmm::stats::Counters;
use atoll_vmm::virtio::balloon::Balloon;
use atoll_vmm::virtio::layers::Layers;
use atoll_vmm::virtio::mmio::Transport;
use atoll_vmm::virtio::rng::Rng;
use atoll_vmm::virtio::{Device, Interrupt, block};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

#[derive(Debug, Arbitrary)]
enum Step {
    Read { offset: u16, width: u8 },
    Write { offset: u16, value: [u8; 8], width: u8 },
    /// A whole register, so that the fuzzer finds the driver's steps sooner.
    Set { register: u8, value: u16 },
    /// The driver's steps up to an active device.
    Activate { features: u64, queues: u8 },
    Memory { at: u16, bytes: [u8; 16] },
}

const RAM: usize = 0x1_0000;

fn set(transport: &mut Transport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

fn activate(transport: &mut Transport, features: u64, queues: u8) {
    for status in [0, 1, 3] {
        set(transport, 0x70, status);
    }
    for word in [0, 1] {
        set(transport, 0x24, word);
        set(transport, 0x20, ((features | 1 << 32) >> (32 * word)) as u32);
    }
    set(transport, 0x70, 11);
    for queue in 0..u32::from(queues % 4) {
        for (register, value) in [(0x30, queue), (0x38, 16), (0x80, 0), (0x90, 0x100), (0xa0, 0x200), (0x44, 1)] {
            set(transport, register, value);
        }
    }
    set(transport, 0x70, 15);
}

fuzz_target!(|input: (u8, Vec<Step>)| {
    let (which, steps) = input;
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap());
    let interrupt = Arc::new(Interrupt::new(which & 4 != 0).unwrap());
    let counters = Arc::new(Counters::default());
    let device: Box<dyn Device> = match which % 3 {
        0 => Box::new(Rng::new(ram.clone(), interrupt.clone())),
        1 => Box::new(Balloon::new(ram.clone(), interrupt.clone(), counters)),
        _ => {
            let kick = EventFd::new(0).unwrap();
            Box::new(block::new(Layers::default(), ram.clone(), interrupt.clone(), kick, counters).0)
        }
    };
    let mut transport = Transport::new(device, ram.clone(), interrupt);
    for step in steps.iter().take(256) {
        let mut data = [0; 8];
        match step {
            Step::Read { offset, width } => transport.read(u64::from(offset % 0x1000), &mut data[..(width % 9) as usize]),
            Step::Write { offset, value, width } => {
                transport.write(u64::from(offset % 0x1000), &value[..(width % 9) as usize]);
            }
            Step::Set { register, value } => set(&mut transport, u64::from(register & !3), u32::from(*value)),
            Step::Activate { features, queues } => activate(&mut transport, *features, *queues),
            Step::Memory { at, bytes } => {
                let _ = ram.write(bytes, GuestAddress(u64::from(*at)));
            }
        }
    }
});
