//! The virtio block device: parses requests, checks them, lets a [`Disk`] do them. One thread per disk sleeps on the
//! queue's ioeventfd.
//!
//! Everything in a request is hostile: the header is copied once, lengths and sectors are checked against the disk
//! before it is touched, and a chain that makes no sense costs the guest that request and nothing else.

use super::disk::{Access, Buffers, Disk, MAX_VECTORS, SECTOR};
use super::{Device, F_EVENT_IDX, F_INDIRECT, F_VERSION_1, Interrupt};
use crate::memory::GuestRam;
use crate::stats::Counters;
use std::io;
use std::ops::Deref;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_bindings::virtio_blk::*;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

/// Number of requests in flight, and so of requests that the guest's driver keeps memory for.
const QUEUE_SIZES: [u16; 1] = [128];
/// Most data segments of a request that the driver is told about.
const SEGMENTS: u32 = 126;
/// Most bytes of one request; a driver that is told [`SEGMENTS`] stays far below.
const MAX_REQUEST: u64 = 64 << 20;
/// Most sectors of one discard, and of one write-zeroes.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
const HEADER: u64 = 16;
const RANGE: u64 = 16;

/// The queue while the driver uses it. Reset takes it away from the worker.
type Shared = Arc<Mutex<Option<Queue>>>;

fn lock(shared: &Shared) -> MutexGuard<'_, Option<Queue>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device as its transport sees it.
pub struct Block {
    features: u64,
    config: [u8; 60],
    queue: Shared,
}

/// The thread behind the device.
pub struct Worker<D> {
    disk: D,
    ram: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    kick: EventFd,
    counters: Arc<Counters>,
    queue: Shared,
}

/// A block device over `disk`. `kick` is the queue's ioeventfd, blocking.
pub fn new<D: Disk>(
    disk: D,
    ram: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    kick: EventFd,
    counters: Arc<Counters>,
) -> (Block, Worker<D>) {
    let mut features = F_VERSION_1
        | F_INDIRECT
        | F_EVENT_IDX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY;
    features |= match disk.access() {
        Access::ReadOnly => 1 << VIRTIO_BLK_F_RO,
        Access::ReadWrite => {
            1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    };
    let queue = Shared::default();
    let device = Block { features, config: config(&disk), queue: queue.clone() };
    (device, Worker { disk, ram, interrupt, kick, counters, queue })
}

/// The configuration space (struct virtio_blk_config): logical blocks of 512 bytes, physical ones of 4096.
fn config(disk: &impl Disk) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(disk.bytes() / SECTOR).to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[3]);
    put(26, &8u16.to_le_bytes());
    put(34, &1u16.to_le_bytes());
    for at in [36, 48] {
        put(at, &MAX_RANGE_SECTORS.to_le_bytes());
        put(at + 4, &1u32.to_le_bytes());
    }
    put(44, &8u32.to_le_bytes());
    put(56, &[1]);
    config
}

impl Device for Block {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn activate(&mut self, _features: u64, mut queues: Vec<Option<Queue>>) -> io::Result<()> {
        let queue = queues.pop().flatten().ok_or(io::ErrorKind::InvalidInput)?;
        *lock(&self.queue) = Some(queue);
        Ok(())
    }
    fn reset(&mut self) {
        // Waits for the request that the worker is at.
        *lock(&self.queue) = None;
    }
}

impl<D: Disk> Worker<D> {
    /// Serves requests for the life of the process.
    pub fn run(self) {
        loop {
            // A blocking eventfd fails only when interrupted: look at the queue anyway.
            drop(self.kick.read());
            let mut queue = lock(&self.queue);
            let Some(active) = queue.as_mut() else { continue };
            if let Err(_broken) = self.serve(active) {
                // The driver broke its ring: it gets no more answers until it resets the device.
                *queue = None;
            }
        }
    }

    /// Serves what is available, until nothing is.
    pub fn serve(&self, queue: &mut Queue) -> Result<(), virtio_queue::Error> {
        let ram: &GuestRam = &self.ram;
        loop {
            queue.disable_notification(ram)?;
            // The iterator notices a ring whose indices make no sense; taking chains one by one would hide it.
            while let Some(chain) = virtio_queue::QueueOwnedT::iter(queue, ram)?.next() {
                let head = chain.head_index();
                let written = self.request(chain);
                queue.add_used(ram, head, written)?;
                if queue.needs_notification(ram)? {
                    self.interrupt.ring();
                }
            }
            if !queue.enable_notification(ram)? {
                return Ok(());
            }
        }
    }

    /// Does one request and returns the number of bytes written into guest memory.
    fn request<M>(&self, chain: DescriptorChain<M>) -> u32
    where
        M: Deref<Target = GuestRam> + Clone,
    {
        let Some(request) = Request::parse(&self.ram, chain) else { return 0 };
        let into_guest = u32::try_from(request.into_guest.len()).unwrap_or(u32::MAX);
        let status = request.status;
        let (code, data) = match self.execute(request) {
            Ok(()) => (VIRTIO_BLK_S_OK, into_guest),
            Err(Refused::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refused::Failed) => (VIRTIO_BLK_S_IOERR, 0),
        };
        match self.ram.write_obj(code as u8, status) {
            Ok(()) => data.saturating_add(1),
            Err(_) => 0,
        }
    }

    fn execute(&self, mut request: Request<'_>) -> Result<(), Refused> {
        let writable = self.disk.access() == Access::ReadWrite;
        match request.kind {
            VIRTIO_BLK_T_IN => {
                let (offset, bytes) = self.range(request.sector, request.into_guest.len())?;
                self.disk.read(offset, &mut request.into_guest)?;
                self.counters.block_read_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            VIRTIO_BLK_T_OUT if writable => {
                let (offset, bytes) = self.range(request.sector, request.from_guest.len())?;
                self.disk.write(offset, &mut request.from_guest)?;
                self.counters.block_written_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            VIRTIO_BLK_T_FLUSH if writable => self.disk.flush()?,
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; ID_BYTES];
                let name = self.disk.serial().as_bytes();
                id[..name.len()].copy_from_slice(name);
                let mut at = 0;
                for slice in request.into_guest.take(ID_BYTES as u64) {
                    let part = &id[at..at + slice.len()];
                    slice.copy_from(part);
                    at += slice.len();
                }
            }
            VIRTIO_BLK_T_DISCARD if writable => self.ranges(request, Clear::Discard)?,
            VIRTIO_BLK_T_WRITE_ZEROES if writable => self.ranges(request, Clear::Zero)?,
            _ => return Err(Refused::Unsupported),
        }
        Ok(())
    }

    /// Checks that whole sectors of the disk are meant.
    fn range(&self, sector: u64, bytes: u64) -> Result<(u64, u64), Refused> {
        let offset = sector.checked_mul(SECTOR).ok_or(Refused::Failed)?;
        let end = offset.checked_add(bytes).ok_or(Refused::Failed)?;
        let whole = bytes.is_multiple_of(SECTOR) && bytes > 0 && bytes <= MAX_REQUEST;
        if whole && end <= self.disk.bytes() { Ok((offset, bytes)) } else { Err(Refused::Failed) }
    }

    /// Discard and write-zeroes: one range of (sector, sectors, flags), as the configuration space says.
    fn ranges(&self, mut request: Request<'_>, clear: Clear) -> Result<(), Refused> {
        const UNMAP: u32 = 1;
        if request.from_guest.len() != RANGE {
            return Err(Refused::Unsupported);
        }
        let bytes = copy::<{ RANGE as usize }>(&mut request.from_guest);
        let sector = u64::from_le_bytes(part(&bytes, 0));
        let sectors = u32::from_le_bytes(part(&bytes, 8));
        let flags = u32::from_le_bytes(part(&bytes, 12));
        if flags & !UNMAP != 0 || (clear == Clear::Discard && flags != 0) || sectors > MAX_RANGE_SECTORS {
            return Err(Refused::Unsupported);
        }
        let offset = sector.checked_mul(SECTOR).ok_or(Refused::Failed)?;
        let bytes = u64::from(sectors) * SECTOR;
        if bytes == 0 || offset.checked_add(bytes).is_none_or(|end| end > self.disk.bytes()) {
            return Err(Refused::Failed);
        }
        match clear {
            Clear::Zero if flags & UNMAP == 0 => self.disk.zero(offset, bytes)?,
            Clear::Zero | Clear::Discard => self.disk.punch(offset, bytes)?,
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clear {
    Discard,
    Zero,
}

/// Why a request got no service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    Unsupported,
    Failed,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Self::Unsupported,
            _ => Self::Failed,
        }
    }
}

/// A request whose memory has been found. The driver may have cut it into descriptors as it liked.
struct Request<'a> {
    kind: u32,
    sector: u64,
    from_guest: Buffers<'a>,
    into_guest: Buffers<'a>,
    status: GuestAddress,
}

impl<'a> Request<'a> {
    /// `None` for a chain without a header, without a status byte, with memory that is not there, or with readable
    /// descriptors behind writable ones.
    fn parse<M>(ram: &'a GuestRam, chain: DescriptorChain<M>) -> Option<Self>
    where
        M: Deref<Target = GuestRam> + Clone,
    {
        let mut readable = Vec::new();
        let mut writable: Vec<(GuestAddress, usize)> = Vec::new();
        for descriptor in chain {
            let (address, bytes) = (descriptor.addr(), descriptor.len() as usize);
            if bytes == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                writable.push((address, bytes));
            } else if writable.is_empty() {
                readable.push((address, bytes));
            } else {
                return None;
            }
        }
        let (address, bytes) = writable.last_mut()?;
        *bytes -= 1;
        let status = GuestAddress(address.0.checked_add(*bytes as u64)?);
        let mut from_guest = Buffers::new(slices(ram, &readable)?);
        let into_guest = Buffers::new(slices(ram, &writable)?);
        if from_guest.len() < HEADER {
            return None;
        }
        let header = copy::<{ HEADER as usize }>(&mut from_guest);
        let kind = u32::from_le_bytes(part(&header, 0));
        let sector = u64::from_le_bytes(part(&header, 8));
        Some(Self { kind, sector, from_guest, into_guest, status })
    }
}

fn slices<'a>(ram: &'a GuestRam, pieces: &[(GuestAddress, usize)]) -> Option<Vec<VolatileSlice<'a>>> {
    let mut slices = Vec::with_capacity(pieces.len());
    for (address, bytes) in pieces {
        for slice in GuestMemoryBackend::get_slices(ram, *address, *bytes) {
            slices.push(slice.ok()?);
        }
    }
    (slices.len() <= MAX_VECTORS).then_some(slices)
}

/// Consumes and copies the first `N` bytes; what is missing is zero.
fn copy<const N: usize>(buffers: &mut Buffers<'_>) -> [u8; N] {
    let mut bytes = [0; N];
    let mut at = 0;
    for slice in buffers.take(N as u64) {
        at += slice.copy_to(&mut bytes[at..]);
    }
    bytes
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
