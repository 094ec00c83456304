//! Fuzz targets of the VMM: everything that the guest or the control socket's peer can say, one function for each.
//!
//! Called by the tests below (the corpus and a second of mutations) and by `fuzz/targets` (hours). The network card and
//! the vsock device are served by the host's kernel: of those the VMM reads registers (`mmio`) and where the rings lie
//! (`queue`), and nothing else.

use crate::builder;
use crate::control::receive;
use crate::memory::GuestRam;
use crate::stats::Counters;
use crate::virtio::balloon::Balloon;
use crate::virtio::disk::{Disk, FileDisk};
use crate::virtio::layers::Layers;
use crate::virtio::mmio::Transport;
use crate::virtio::queue::{QueueSetup, part_bytes};
use crate::virtio::rng::Rng;
use crate::virtio::{Device, F_VERSION_1, Interrupt, block};
use atoll_spec::vm::{MAX_MESSAGE, VmReply, VmRequest};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use std::fs::File;
use std::sync::Arc;
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const RAM: usize = 0x1_0000;
/// Bytes of the disk behind the block devices.
const DISK: u64 = 0x8000;
/// Where the drivers of these tests put their rings.
const RINGS: QueueSetup =
    QueueSetup { max_size: 0, size: 16, descriptors: 0, available: 0x100, used: 0x200, ready: true };

fn disk_file() -> File {
    let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("a memfd can be made");
    ftruncate(&file, DISK).expect("a memfd grows");
    file.into()
}

/// Guest memory whose content is the input: descriptors, rings, headers and data overlap as the fuzzer likes.
fn ram(data: &[u8]) -> Arc<GuestRam> {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).expect("64 KiB can be mapped");
    ram.write_slice(&data[..data.len().min(RAM)], GuestAddress(0)).expect("it fits");
    Arc::new(ram)
}

fn interrupt() -> Arc<Interrupt> {
    Arc::new(Interrupt::new(false).expect("an eventfd can be made"))
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd can be made")
}

fn serve_block(disk: impl Disk, data: &[u8]) {
    let ram = ram(data);
    let (_, worker) = block::new(disk, ram.clone(), interrupt(), event(), Arc::default());
    for event_idx in [false, true] {
        let setup = QueueSetup { max_size: 128, ..RINGS };
        let mut queue = setup.build(&ram, event_idx).expect("these rings are fit");
        // A ring that makes no sense is an error, never a crash.
        let _ = worker.serve(&mut queue);
    }
}

/// A guest's memory against the scratch disk, which must neither grow nor shrink.
pub fn block(data: &[u8]) {
    let file = disk_file();
    let copy = file.try_clone().expect("a descriptor can be copied");
    serve_block(FileDisk::new(copy).expect("a memfd has a size"), data);
    assert_eq!(file.metadata().expect("a memfd has a size").len(), DISK);
}

/// A guest's memory against the layer window, whose files must not change.
pub fn layers(data: &[u8]) {
    let file = disk_file();
    let layers = Layers::default();
    for offset in [0x1000, 0x1_0000] {
        let copy = file.try_clone().expect("a descriptor can be copied");
        layers.map(offset, DISK, copy).expect("there is room");
    }
    serve_block(layers, data);
    let mut content = vec![1; DISK as usize];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 0).expect("a memfd can be read");
    assert!(content.iter().all(|byte| *byte == 0), "a layer was written to");
}

/// Rings of a device that is served where it is notified.
fn serve_device(mut device: impl Device, ram: &GuestRam) {
    let queues = device
        .queue_sizes()
        .iter()
        .map(|size| QueueSetup { max_size: *size, ..RINGS }.build(ram, false).ok());
    let queues: Vec<_> = queues.collect();
    let count = queues.len() as u32;
    device.activate(F_VERSION_1, queues).expect("all rings are there");
    // One more than there are.
    (0..=count).for_each(|queue| device.notify(queue));
    device.reset();
    device.notify(0);
}

/// A guest's memory against the entropy device.
pub fn rng(data: &[u8]) {
    let ram = ram(data);
    serve_device(Rng::new(ram.clone(), interrupt()), &ram);
}

/// A guest's memory against the balloon.
pub fn balloon(data: &[u8]) {
    let ram = ram(data);
    let counters = Arc::new(Counters::default());
    serve_device(Balloon::new(ram.clone(), interrupt(), counters), &ram);
}

/// Takes numbers off the front of the input; zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let take = N.min(self.0.len());
        bytes[..take].copy_from_slice(&self.0[..take]);
        self.0 = &self.0[take..];
        bytes
    }

    fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }
}

/// Where a driver says its rings are: what is built lies in RAM, each part in one piece, for the kernel's backends.
pub fn queue(data: &[u8]) {
    let mut input = Input(data);
    let near = input.byte();
    let ranges = [(GuestAddress(0), RAM), (GuestAddress(0x10_0000), RAM)];
    let ram = GuestRam::from_ranges(&ranges).expect("128 KiB can be mapped");
    let mut address = |mask: u64| {
        let address = u64::from_le_bytes(input.bytes());
        if near & 1 == 0 { address } else { (address % 0x12_0000) & mask }
    };
    let (descriptors, available, used) = (address(!0xf), address(!1), address(!3));
    let size = u32::from_le_bytes(input.bytes());
    let size = if near & 2 == 0 { size } else { 1 << (size % 10) };
    let setup = QueueSetup { max_size: 256, size, descriptors, available, used, ready: true };
    let Ok(mut queue) = setup.build(&ram, near & 4 != 0) else { return };
    assert!(queue.size() <= 256 && queue.size().is_power_of_two() && queue.is_valid(&ram));
    let parts = part_bytes(queue.size());
    for (start, bytes) in [(descriptors, parts.0), (available, parts.1), (used, parts.2)] {
        let end = start + bytes as u64;
        assert!(end <= 0x1_0000 || (start >= 0x10_0000 && end <= 0x11_0000), "{setup:?}");
    }
    // The rest of the input is what the rings hold; looking at it must come to an end.
    let _ = ram.write(input.0, GuestAddress(descriptors));
    for _ in 0..4 {
        let Some(chain) = queue.pop_descriptor_chain(&ram) else { break };
        assert!(chain.count() <= usize::from(u16::MAX));
    }
}

const STATUS: u64 = 0x70;

fn set(transport: &mut Transport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

/// The driver's steps up to an active device.
fn activate(transport: &mut Transport, features: u64, queues: u8) {
    for status in [0, 1, 3] {
        set(transport, STATUS, status);
    }
    for word in [0, 1] {
        set(transport, 0x24, word);
        set(transport, 0x20, ((features | F_VERSION_1) >> (32 * word)) as u32);
    }
    set(transport, STATUS, 11);
    for queue in 0..u32::from(queues % 4) {
        let registers = [(0x30, queue), (0x38, 16), (0x80, 0), (0x90, 0x100), (0xa0, 0x200), (0x44, 1)];
        registers.iter().for_each(|(register, value)| set(transport, *register, *value));
    }
    set(transport, STATUS, 15);
}

/// Any sequence of register accesses to the devices that live in the VMM.
pub fn mmio(data: &[u8]) {
    let mut input = Input(data);
    let which = input.byte();
    let (ram, interrupt) =
        (ram(&[]), Arc::new(Interrupt::new(which & 4 != 0).expect("an eventfd can be made")));
    let counters = Arc::new(Counters::default());
    let device: Box<dyn Device> = match which % 3 {
        0 => Box::new(Rng::new(ram.clone(), interrupt.clone())),
        1 => Box::new(Balloon::new(ram.clone(), interrupt.clone(), counters)),
        _ => Box::new(block::new(Layers::default(), ram.clone(), interrupt.clone(), event(), counters).0),
    };
    let mut transport = Transport::new(device, ram.clone(), interrupt);
    for _ in 0..256 {
        if input.0.is_empty() {
            break;
        }
        match input.byte() % 5 {
            0 => {
                let offset = u64::from(u16::from_le_bytes(input.bytes())) % 0x1000;
                let width = usize::from(input.byte() % 9);
                transport.read(offset, &mut [0; 8][..width]);
            }
            1 => {
                let offset = u64::from(u16::from_le_bytes(input.bytes())) % 0x1000;
                let width = usize::from(input.byte() % 9);
                transport.write(offset, &input.bytes::<8>()[..width]);
            }
            // A whole register, so that the fuzzer finds the driver's steps sooner.
            2 => {
                let register = u64::from(input.byte() & !3);
                set(&mut transport, register, u32::from(u16::from_le_bytes(input.bytes())));
            }
            3 => {
                let features = u64::from_le_bytes(input.bytes());
                activate(&mut transport, features, input.byte());
            }
            _ => {
                let at = u64::from(u16::from_le_bytes(input.bytes()));
                // Beyond the end of memory nothing is written.
                let _ = ram.write(&input.bytes::<16>(), GuestAddress(at));
            }
        }
    }
}

/// One packet on the control socket, up to what is done with it before a machine is touched.
pub fn control(data: &[u8]) {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .expect("a socket pair can be made");
    if send(&theirs, data, SendFlags::NOSIGNAL).is_err() {
        // Larger than a socket takes.
        return;
    }
    let Ok(Some(packet)) = receive(&ours, &mut vec![0; MAX_MESSAGE]) else { return };
    let reply = match packet.request {
        Ok(VmRequest::Boot(spec)) => match builder::check(&spec) {
            Ok(()) => VmReply::Ok,
            Err(error) => VmReply::Error { message: error.chain() },
        },
        Ok(VmRequest::MapLayer { offset, length }) => {
            match Layers::default().map(offset, length, disk_file()) {
                Ok(()) => VmReply::Ok,
                Err(error) => VmReply::Error { message: error.to_string() },
            }
        }
        Ok(_) => VmReply::Ok,
        Err(message) => VmReply::Error { message },
    };
    let bytes = serde_json::to_vec(&reply).expect("replies can be written");
    assert!(bytes.len() <= MAX_MESSAGE, "a reply of {} bytes fits no packet", bytes.len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_fuzz::replay;
    use atoll_spec::vm::{BootFd, VmSpec};

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    /// Memory with a table of (address, length, flags, next) and the heads made available.
    fn memory(descriptors: &[(u64, u32, u16, u16)], heads: &[u16], data: &[(usize, &[u8])]) -> Vec<u8> {
        let mut memory = vec![0; 0x4000];
        for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
            let at = 16 * index;
            memory[at..at + 8].copy_from_slice(&address.to_le_bytes());
            memory[at + 8..at + 12].copy_from_slice(&length.to_le_bytes());
            memory[at + 12..at + 14].copy_from_slice(&flags.to_le_bytes());
            memory[at + 14..at + 16].copy_from_slice(&next.to_le_bytes());
        }
        memory[0x102..0x104].copy_from_slice(&(heads.len() as u16).to_le_bytes());
        for (index, head) in heads.iter().enumerate() {
            memory[0x104 + 2 * index..][..2].copy_from_slice(&head.to_le_bytes());
        }
        for (at, bytes) in data {
            memory[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        memory
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    fn block_seeds() -> Vec<Vec<u8>> {
        let chain = |flags| [(0x400, 16, NEXT, 1), (0x1000, 512, NEXT | flags, 2), (0x3000, 1, WRITE, 0)];
        let mut seeds = Vec::new();
        // Read, write, flush, identity, discard, zeroes, and a kind that there is not.
        for (kind, flags) in [(0, WRITE), (1, 0), (4, 0), (8, WRITE), (11, 0), (13, 0), (99, WRITE)] {
            seeds.push(memory(&chain(flags), &[0], &[(0x400, &header(kind, 9))]));
        }
        let range = [&8u64.to_le_bytes()[..], &1u32.to_le_bytes(), &0u32.to_le_bytes()].concat();
        let short = [(0x400, 16, NEXT, 1), (0x1000, 16, NEXT, 2), (0x3000, 1, WRITE, 0)];
        seeds.push(memory(&short, &[0], &[(0x400, &header(11, 0)), (0x1000, &range)]));
        // A table of descriptors elsewhere; a chain that bites its tail; the same head many times.
        let table = memory(&chain(WRITE), &[], &[]);
        seeds.push(memory(
            &[(0x800, 48, INDIRECT, 0)],
            &[0],
            &[(0x800, &table[..48]), (0x400, &header(0, 9))],
        ));
        seeds.push(memory(&[(0x400, 16, NEXT, 1), (0x1000, 16, NEXT, 0)], &[0], &[]));
        seeds.push(memory(&chain(WRITE), &[0, 0, 0, 0, 0, 0], &[(0x400, &header(0, 9))]));
        seeds
    }

    fn ring_seeds() -> Vec<Vec<u8>> {
        let buffers = [(0x1000, 64, WRITE | NEXT, 1), (0x2000, 0x1000, WRITE, 0), (0x3000, 64, 0, 0)];
        vec![
            memory(&buffers, &[0, 2], &[]),
            memory(&[(0x1000, 0x1000, WRITE, 0)], &[0; 16], &[]),
            memory(&[(0xffff_ffff_f000, u32::MAX, WRITE, 0)], &[0], &[]),
        ]
    }

    #[test]
    fn block_survives_any_guest_memory() {
        replay("vmm_block", block_seeds(), block);
    }

    #[test]
    fn layers_survive_any_guest_memory() {
        replay("vmm_layers", block_seeds(), layers);
    }

    #[test]
    fn rng_survives_any_guest_memory() {
        replay("vmm_rng", ring_seeds(), rng);
    }

    #[test]
    fn balloon_survives_any_guest_memory() {
        replay("vmm_balloon", ring_seeds(), balloon);
    }

    #[test]
    fn queues_lie_in_guest_memory_or_are_refused() {
        let setup = |near: u8, parts: [u64; 3], size: u32| {
            let parts = parts.iter().flat_map(|part| part.to_le_bytes());
            let head: Vec<u8> = [near].into_iter().chain(parts).chain(size.to_le_bytes()).collect();
            [head, memory(&[(0x1000, 64, NEXT, 1), (0x2000, 64, WRITE, 0)], &[0], &[])].concat()
        };
        let seeds = vec![
            setup(0, [0x1000, 0x2000, 0x3000], 16),
            setup(7, [0x1000, 0x1100, 0x1200], 4),
            setup(0, [0xfff0, 0x2000, 0x3000], 256),
            setup(0, [u64::MAX - 15, u64::MAX - 1, u64::MAX - 3], 1),
            setup(0, [0x10_0000, 0, 0x10_f000], 128),
        ];
        replay("vmm_queue", seeds, queue);
    }

    #[test]
    fn mmio_survives_any_driver() {
        let active = [&[3][..], &[0xff; 8], &[1]].concat();
        let notify = [2, 0x50, 0, 0];
        let memory: &[u8] = &[4, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 2, 0, 0, 0];
        let seeds = (0..3u8)
            .flat_map(|which| {
                [
                    [&[which][..], &active, memory, &notify].concat(),
                    [&[which | 4][..], &[0, 0, 0, 4], &active, &[2, 0x70, 0, 0], &active, &notify].concat(),
                    [&[which][..], &[1, 0x70, 0, 4, 1, 0, 0, 0, 0, 0, 0, 0], &[0, 0, 1, 8]].concat(),
                ]
            })
            .collect();
        replay("vmm_mmio", seeds, mmio);
    }

    #[test]
    fn control_packets_are_requests_or_errors() {
        let spec = VmSpec {
            sandbox: "s1".parse().unwrap(),
            vcpus: 2,
            memory: atoll_spec::units::MiB(256),
            cid: atoll_spec::units::GuestCid::new(7).unwrap(),
            mac: Some([2, 0, 0, 0, 0, 1]),
            cmdline: "quiet".into(),
            fds: vec![BootFd::Kvm, BootFd::Kernel],
            uid: Some(100_000),
        };
        let requests = [
            VmRequest::Boot(Box::new(spec)),
            VmRequest::MapLayer { offset: 4096, length: 8192 },
            VmRequest::MapLayer { offset: u64::MAX, length: u64::MAX },
            VmRequest::Pause,
            VmRequest::Resume,
            VmRequest::Stats,
            VmRequest::Kill,
        ];
        let seeds = requests.iter().map(|request| serde_json::to_vec(request).unwrap()).collect();
        replay("vmm_control", seeds, control);
    }
}
