//! Tests of the block device: a mock driver's requests against a file and against the layer window, honest and hostile.

use super::*;
use crate::virtio::disk::FileDisk;
use crate::virtio::layers::Layers;
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;

const W: u32 = VRING_DESC_F_WRITE;
const HEADER_AT: u64 = 0x10_0000;
const DATA_AT: u64 = 0x11_0000;
const STATUS_AT: u64 = 0x1f_0000;
const DISK_BYTES: u64 = 1 << 20;
const UNTOUCHED: u8 = 0xee;

struct Rig<D: Disk> {
    ram: Arc<GuestRam>,
    worker: Worker<D>,
    device: Block,
    counters: Arc<Counters>,
    interrupt: Arc<Interrupt>,
}

fn rig<D: Disk>(disk: D) -> Rig<D> {
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap());
    let interrupt = Arc::new(Interrupt::new(false).unwrap());
    let counters = Arc::new(Counters::default());
    let kick = EventFd::new(0).unwrap();
    let (device, worker) = new(disk, ram.clone(), interrupt.clone(), kick, counters.clone());
    Rig { ram, worker, device, counters, interrupt }
}

fn file_rig() -> (Rig<FileDisk>, File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES + 100).unwrap();
    (rig(FileDisk::new(file.try_clone().unwrap()).unwrap()), file)
}

fn descriptor(address: u64, bytes: u64, flags: u32) -> RawDescriptor {
    RawDescriptor::from(Descriptor::new(address, bytes as u32, flags as u16, 0))
}

impl<D: Disk> Rig<D> {
    /// Sends one chain; returns (status byte, bytes used).
    fn send(&self, kind: u32, sector: u64, descriptors: &[RawDescriptor]) -> (u8, u32) {
        self.ram.write_obj(kind, GuestAddress(HEADER_AT)).unwrap();
        self.ram.write_obj(sector, GuestAddress(HEADER_AT + 8)).unwrap();
        self.ram.write_obj(UNTOUCHED, GuestAddress(STATUS_AT)).unwrap();
        let mock = MockSplitQueue::new(self.ram.as_ref(), 16);
        // The mock lies at address 0 each time: forget the chain before.
        self.ram.write_obj(0u16, mock.avail_addr().unchecked_add(2)).unwrap();
        self.ram.write_obj(0u16, mock.used_addr().unchecked_add(2)).unwrap();
        mock.build_desc_chain(descriptors).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        self.worker.serve(&mut queue).unwrap();
        assert_eq!(mock.used().idx().load(), 1, "every chain is given back");
        let used = mock.used().ring().ref_at(0).unwrap().load().len();
        (self.ram.read_obj(GuestAddress(STATUS_AT)).unwrap(), used)
    }

    /// An ordinary request: header, one data descriptor, status.
    fn request(&self, kind: u32, sector: u64, bytes: u64, flags: u32) -> (u8, u32) {
        self.send(
            kind,
            sector,
            &[descriptor(HEADER_AT, 16, 0), descriptor(DATA_AT, bytes, flags), descriptor(STATUS_AT, 1, W)],
        )
    }
}

use vm_memory::Address;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const FAILED: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;

#[test]
fn what_is_written_is_read_back() {
    let (rig, file) = file_rig();
    rig.ram.write_slice(&[7; 1024], GuestAddress(DATA_AT)).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 3, 1024, 0), (OK, 1));
    let mut bytes = [0; 1024];
    file.read_exact_at(&mut bytes, 3 * 512).unwrap();
    assert_eq!(bytes, [7; 1024]);
    rig.ram.write_slice(&[0; 1024], GuestAddress(DATA_AT)).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, 1024, W), (OK, 1025));
    rig.ram.read_slice(&mut bytes, GuestAddress(DATA_AT)).unwrap();
    assert_eq!(bytes, [7; 1024]);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, 0, 0), (OK, 1));
    assert_eq!(rig.counters.block_written_bytes.load(Ordering::Relaxed), 1024);
    assert_eq!(rig.counters.block_read_bytes.load(Ordering::Relaxed), 1024);
    assert!(rig.interrupt.event().read().unwrap() > 0);
}

#[test]
fn a_request_may_be_cut_into_descriptors_anyhow() {
    let (rig, file) = file_rig();
    file.write_all_at(&[9; 512], 512).unwrap();
    let cut = [
        descriptor(HEADER_AT, 5, 0),
        descriptor(HEADER_AT + 5, 11, 0),
        descriptor(DATA_AT, 100, W),
        // The rest of the data and the status in one.
        descriptor(STATUS_AT - 412, 413, W),
    ];
    assert_eq!(rig.send(VIRTIO_BLK_T_IN, 1, &cut), (OK, 513));
    assert_eq!(rig.ram.read_obj::<[u8; 32]>(GuestAddress(DATA_AT + 68)).unwrap(), [9; 32]);
    assert_eq!(rig.ram.read_obj::<u8>(GuestAddress(STATUS_AT - 1)).unwrap(), 9);
}

#[test]
fn the_disk_ends_at_its_last_whole_sector() {
    let (rig, _) = file_rig();
    let last = DISK_BYTES / SECTOR - 1;
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, last, 512, W).0, OK);
    for (sector, bytes) in
        [(last, 1024), (last + 1, 512), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100), (0, 513)]
    {
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, sector, bytes, W).0, FAILED, "{sector} {bytes}");
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, sector, bytes, 0).0, FAILED, "{sector} {bytes}");
    }
}

#[test]
fn unknown_and_missing_operations_are_told_apart() {
    let (rig, _) = file_rig();
    assert_eq!(rig.request(99, 0, 512, W), (UNSUPPORTED, 1));
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, 20, W), (OK, 21));
    assert_eq!(&rig.ram.read_obj::<[u8; 8]>(GuestAddress(DATA_AT)).unwrap(), b"scratch\0");
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, 4, W), (OK, 5), "a short buffer gets what fits");
}

#[test]
fn chains_that_make_no_sense_are_given_back_untouched() {
    let (rig, _) = file_rig();
    let header = descriptor(HEADER_AT, 16, 0);
    let status = descriptor(STATUS_AT, 1, W);
    let cases: [&[RawDescriptor]; 6] = [
        &[header],
        &[status],
        &[descriptor(HEADER_AT, 15, 0), status],
        &[status, header],
        &[header, descriptor(0xffff_0000, 512, W), status],
        &[header, descriptor(u64::MAX, 512, W), status],
    ];
    for case in cases {
        assert_eq!(rig.send(VIRTIO_BLK_T_IN, 0, case), (UNTOUCHED, 0), "{case:?}");
    }
}

fn allocated(file: &File) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn discard_gives_space_back_and_write_zeroes_keeps_to_its_flag() {
    let (rig, file) = file_rig();
    file.write_all_at(&[5; 1 << 18], 0).unwrap();
    let before = allocated(&file);
    let range = |sector: u64, sectors: u32, flags: u32| {
        rig.ram.write_obj(sector, GuestAddress(DATA_AT)).unwrap();
        rig.ram.write_obj(sectors, GuestAddress(DATA_AT + 8)).unwrap();
        rig.ram.write_obj(flags, GuestAddress(DATA_AT + 12)).unwrap();
    };
    range(0, 256, 0);
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, 16, 0), (OK, 1));
    let mut bytes = [1; 512];
    file.read_exact_at(&mut bytes, 255 * 512).unwrap();
    assert_eq!(bytes, [0; 512]);
    file.read_exact_at(&mut bytes, 256 * 512).unwrap();
    assert_eq!(bytes, [5; 512]);
    assert!(allocated(&file) < before);
    range(256, 8, 1);
    assert_eq!(rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 16, 0), (OK, 1));
    file.read_exact_at(&mut bytes, 263 * 512).unwrap();
    assert_eq!(bytes, [0; 512]);
    range(0, 8, 1);
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, 16, 0).0, UNSUPPORTED);
    range(0, 8, 2);
    assert_eq!(rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 16, 0).0, UNSUPPORTED);
    range(0, 0, 0);
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, 16, 0).0, FAILED);
    range(u64::MAX / 4, 8, 0);
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, 16, 0).0, FAILED);
    range(DISK_BYTES / 512 - 1, 2, 0);
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, 16, 0).0, FAILED);
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, 32, 0).0, UNSUPPORTED, "two ranges, one was offered");
}

#[test]
fn the_layer_window_takes_reads_and_nothing_else() {
    let layers = Layers::default();
    let rig = rig(layers.clone());
    assert_ne!(rig.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(rig.device.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 8, 512, W), (OK, 513));
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[3; 700], 0).unwrap();
    layers.map(4096, 700, file).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 8, 1024, W), (OK, 1025));
    let bytes: [u8; 1024] = {
        let mut bytes = [0; 1024];
        rig.ram.read_slice(&mut bytes, GuestAddress(DATA_AT)).unwrap();
        bytes
    };
    assert!(bytes[..700].iter().all(|byte| *byte == 3) && bytes[700..].iter().all(|byte| *byte == 0));
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(rig.request(kind, 0, 512, 0).0, UNSUPPORTED, "{kind}");
    }
}

#[test]
fn reset_takes_the_queue_away() {
    let (mut rig, _) = file_rig();
    let mock = MockSplitQueue::new(rig.ram.as_ref(), 16);
    let queue: Queue = mock.create_queue().unwrap();
    assert!(rig.device.activate(F_VERSION_1, vec![None]).is_err(), "a disk without a queue is none");
    rig.device.activate(F_VERSION_1, vec![Some(queue)]).unwrap();
    assert!(lock(&rig.worker.queue).is_some());
    rig.device.reset();
    assert!(lock(&rig.worker.queue).is_none());
}

#[test]
fn a_ring_with_impossible_indices_is_noticed() {
    let (rig, _) = file_rig();
    let mock = MockSplitQueue::new(rig.ram.as_ref(), 16);
    let mut queue: Queue = mock.create_queue().unwrap();
    rig.ram.write_obj(1000u16, mock.avail_addr().unchecked_add(2)).unwrap();
    assert!(rig.worker.serve(&mut queue).is_err());
}

#[test]
fn config_space_is_laid_out_as_the_driver_reads_it() {
    let (rig, _) = file_rig();
    let config = rig.device.config();
    assert_eq!(config[..8], (DISK_BYTES / 512).to_le_bytes());
    assert_eq!(config[12..16], SEGMENTS.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[36..44], [&MAX_RANGE_SECTORS.to_le_bytes()[..], &1u32.to_le_bytes()].concat());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    /// Any chain of descriptors, any header: the chain is given back, nothing panics, nothing outside the disk changes.
    #[test]
    fn any_request_is_survived(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..4096, any::<u64>()],
        chain in prop::collection::vec(
            (prop_oneof![Just(HEADER_AT), Just(DATA_AT), Just(STATUS_AT), 0u64..0x30_0000, any::<u64>()],
             prop_oneof![Just(1u64), Just(16), Just(512), 0u64..8192, 0u64..u64::from(u32::MAX)],
             prop_oneof![Just(0), Just(W)]),
            1..8),
    ) {
        let (rig, file) = file_rig();
        // The rings lie below 0x1000; a chain that overwrites them is the driver's own problem, not this test's.
        let chain: Vec<_> = chain.into_iter()
            .map(|(address, bytes, flags)| descriptor(address.max(0x1_0000), bytes, flags | VRING_DESC_F_NEXT))
            .collect();
        let (status, _) = rig.send(kind, sector, &chain);
        prop_assert!(matches!(status, OK | FAILED | UNSUPPORTED | UNTOUCHED) || kind == VIRTIO_BLK_T_IN || kind == VIRTIO_BLK_T_GET_ID);
        prop_assert_eq!(file.metadata().unwrap().len(), DISK_BYTES + 100);
    }
}

/// A guest that kicks without end: its disk answers what there is, raises no line for nothing, and lets go at a reset.
/// The processor time of it is the pod's: the threads are in its cgroup, whose `cpu.max` bounds them.
#[test]
fn a_flood_of_kicks_costs_no_interrupt_and_no_request() {
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};
    const REQUESTS: u16 = 16;
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap());
    let interrupt = Arc::new(Interrupt::new(false).unwrap());
    let kick = EventFd::new(0).unwrap();
    let flood = kick.try_clone().unwrap();
    let (mut device, worker) =
        new(FileDisk::new(file).unwrap(), ram.clone(), interrupt.clone(), kick, Arc::default());
    // Never ends, as in the VMM.
    std::thread::spawn(move || worker.run());
    let over = Arc::new(AtomicBool::new(false));
    let (until, kicks) = (over.clone(), flood.try_clone().unwrap());
    let flooding = std::thread::spawn(move || {
        let mut count = 0_u64;
        while !until.load(Ordering::Relaxed) {
            kicks.write(1).unwrap();
            count += 1;
        }
        count
    });

    let mock = MockSplitQueue::new(ram.as_ref(), 16);
    ram.write_obj(VIRTIO_BLK_T_IN, GuestAddress(HEADER_AT)).unwrap();
    let chain = [descriptor(HEADER_AT, 16, 0), descriptor(DATA_AT, 512, W), descriptor(STATUS_AT, 1, W)];
    device.activate(F_VERSION_1, vec![Some(mock.create_queue().unwrap())]).unwrap();
    let answered = |count: u16| {
        let started = Instant::now();
        while mock.used().idx().load() != count {
            assert!(started.elapsed() < Duration::from_secs(10), "request {count} is not answered");
            std::thread::yield_now();
        }
    };
    for count in 1..=REQUESTS {
        // One slot of the ring after the other, all for the same chain.
        if count == 1 {
            mock.build_desc_chain(&chain).unwrap();
        } else {
            mock.avail().ring().ref_at(usize::from(count - 1)).unwrap().store(0);
            mock.avail().idx().store(count);
        }
        answered(count);
    }
    let started = Instant::now();
    device.reset();
    assert!(started.elapsed() < Duration::from_secs(10), "the reset took {:?}", started.elapsed());
    // After it nothing is served, however often it is kicked.
    mock.avail().ring().ref_at(0).unwrap().store(0);
    mock.avail().idx().store(REQUESTS + 1);
    let seen = Instant::now();
    while seen.elapsed() < Duration::from_millis(100) {
        assert_eq!(mock.used().idx().load(), REQUESTS);
    }
    over.store(true, Ordering::Relaxed);
    let kicked = flooding.join().unwrap();
    let raised = interrupt.event().read().unwrap();
    assert!(kicked > 10 * u64::from(REQUESTS), "only {kicked} kicks");
    assert!(raised <= u64::from(REQUESTS), "the line was raised {raised} times for {REQUESTS} requests");
}
