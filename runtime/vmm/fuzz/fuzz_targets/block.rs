//! Any content of guest memory with rings in it, against a scratch disk and the layer window: `cargo +nightly fuzz run block`.
//!
//! Guest memory is the input itself, so descriptors, rings, headers and data overlap as the fuzzer likes.
#![no_main]

use atoll_vmm::memory::GuestRam;
use atoll_vmm::stats::Counters;
use atoll_vmm::virtio::disk::{Disk, FileDisk};
use atoll_vmm::virtio::layers::Layers;
use atoll_vmm::virtio::queue::QueueSetup;
use atoll_vmm::virtio::{Interrupt, block};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const RAM: usize = 0x1_0000;
const DISK: u64 = 0x8000;

fn serve(disk: impl Disk, data: &[u8]) {
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap());
    ram.write_slice(&data[..data.len().min(RAM)], GuestAddress(0)).unwrap();
    let interrupt = Arc::new(Interrupt::new(false).unwrap());
    let counters = Arc::new(Counters::default());
    let (_, worker) = block::new(disk, ram.clone(), interrupt, EventFd::new(0).unwrap(), counters);
    let setup = QueueSetup { size: 16, descriptors: 0, available: 0x100, used: 0x200, ..QueueSetup::new(128) };
    let setup = QueueSetup { ready: true, ..setup };
    for event_idx in [false, true] {
        let mut queue = setup.build(&ram, event_idx).unwrap();
        // A ring that makes no sense is an error, never a crash.
        let _ = worker.serve(&mut queue);
    }
}

fuzz_target!(|data: &[u8]| {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK).unwrap();
    serve(FileDisk::new(file.try_clone().unwrap()).unwrap(), data);
    assert_eq!(file.metadata().unwrap().len(), DISK);
    let layers = Layers::default();
    layers.map(0x1000, DISK, file).unwrap();
    serve(layers, data);
});
