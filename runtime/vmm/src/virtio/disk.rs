//! What a block device reads from and writes to. `block.rs` checks requests and calls a [`Disk`]; a disk moves bytes
//! between guest memory and a file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::VolatileSlice;

/// Bytes of a sector, the unit of the block protocol.
pub const SECTOR: u64 = 512;

/// Guest memory of one request, consumed from the front.
pub struct Buffers<'a> {
    slices: Vec<VolatileSlice<'a>>,
    first: usize,
}

impl<'a> Buffers<'a> {
    /// In this order.
    pub fn new(slices: Vec<VolatileSlice<'a>>) -> Self {
        Self { slices, first: 0 }
    }

    /// Bytes not consumed yet.
    pub fn len(&self) -> u64 {
        self.slices[self.first..].iter().map(|slice| slice.len() as u64).sum()
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Consumes the first `bytes`, or what is left.
    pub fn take(&mut self, bytes: u64) -> Vec<VolatileSlice<'a>> {
        let taken = self.front(bytes);
        self.skip(bytes);
        taken
    }

    /// The first `bytes`, or what is left.
    fn front(&self, mut bytes: u64) -> Vec<VolatileSlice<'a>> {
        let mut front = Vec::new();
        for slice in &self.slices[self.first..] {
            if bytes == 0 {
                break;
            }
            let whole = slice.len() as u64;
            // A cut inside the slice cannot fail.
            front.extend(if whole <= bytes { Some(*slice) } else { slice.subslice(0, bytes as usize).ok() });
            bytes = bytes.saturating_sub(whole);
        }
        front
    }

    /// Consumes the first `bytes`.
    fn skip(&mut self, mut bytes: u64) {
        while let Some(slice) = self.slices.get_mut(self.first).filter(|_| bytes > 0) {
            let whole = slice.len() as u64;
            match slice.offset(bytes.min(whole) as usize) {
                Ok(rest) if bytes < whole => *slice = rest,
                _ => self.first += 1,
            }
            bytes = bytes.saturating_sub(whole);
        }
    }

    /// Consumes the first `bytes` and makes them zero.
    pub fn zero(&mut self, bytes: u64) {
        const ZEROS: [u8; 4096] = [0; 4096];
        for slice in self.take(bytes) {
            let mut at = 0;
            while at < slice.len() {
                let chunk = ZEROS.len().min(slice.len() - at);
                if let Ok(part) = slice.subslice(at, chunk) {
                    part.copy_from(&ZEROS[..chunk]);
                }
                at += chunk;
            }
        }
    }

    /// Consumes the first `bytes`, filling them from `file` at `offset`; past its end they are zeros.
    pub fn fill_from(&mut self, file: &File, mut offset: u64, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            let read = transfer(Direction::Read, file, offset, &self.front(bytes))?;
            if read == 0 {
                self.zero(bytes);
                return Ok(());
            }
            self.skip(read);
            (offset, bytes) = (offset + read, bytes - read);
        }
        Ok(())
    }

    /// Consumes everything, writing it to `file` at `offset`.
    pub fn drain_to(&mut self, file: &File, mut offset: u64) -> io::Result<()> {
        let mut bytes = self.len();
        while bytes > 0 {
            let written = transfer(Direction::Write, file, offset, &self.front(bytes))?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.skip(written);
            (offset, bytes) = (offset + written, bytes - written);
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

/// One `preadv` or `pwritev`; may be short.
fn transfer(direction: Direction, file: &File, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<u64> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let (fd, count) = (file.as_raw_fd(), vectors.len().min(MAX_VECTORS) as i32);
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    loop {
        // SAFETY: every vector is a piece of guest RAM that the guards keep mapped; the guest may change the bytes at
        // any time, which only the guest can notice.
        let moved = unsafe {
            match direction {
                Direction::Read => libc::preadv(fd, vectors.as_ptr(), count, offset),
                Direction::Write => libc::pwritev(fd, vectors.as_ptr(), count, offset),
            }
        };
        match u64::try_from(moved) {
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Most vectors that the kernel takes at once (`IOV_MAX`).
pub const MAX_VECTORS: usize = 1024;

/// Whether a disk takes writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It does not.
    ReadOnly,
    /// It does.
    ReadWrite,
}

/// A disk. Offsets and lengths are in bytes, whole sectors, and inside the disk: the caller has checked.
pub trait Disk: Send {
    /// Size in bytes.
    fn bytes(&self) -> u64;
    /// Whether it takes writes, flushes and discards.
    fn access(&self) -> Access;
    /// Name, at most 20 bytes.
    fn serial(&self) -> &'static str;
    /// Fills the buffers.
    fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()>;
    /// Writes the buffers.
    fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()>;
    /// Makes what was written durable.
    fn flush(&self) -> io::Result<()>;
    /// Gives the space back; it reads zeros after.
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Makes it read zeros, keeping the space.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()>;
}

/// A raw file, of the size it has when the machine starts.
pub struct FileDisk {
    file: File,
    bytes: u64,
}

impl FileDisk {
    /// What is past the last whole sector of the file is not part of the disk.
    pub fn new(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len() / SECTOR * SECTOR;
        Ok(Self { file, bytes })
    }

    fn allocate(&self, mode: i32, offset: u64, bytes: u64) -> io::Result<()> {
        let (offset, bytes) = (offset as i64, bytes as i64);
        // SAFETY: fallocate takes no pointers; offset and length lie inside the disk.
        match unsafe {
            libc::fallocate(self.file.as_raw_fd(), mode | libc::FALLOC_FL_KEEP_SIZE, offset, bytes)
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Disk for FileDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn access(&self) -> Access {
        Access::ReadWrite
    }
    fn serial(&self) -> &'static str {
        "scratch"
    }
    fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        buffers.fill_from(&self.file, offset, buffers.len())
    }
    fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        buffers.drain_to(&self.file, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, bytes)
    }
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.allocate(libc::FALLOC_FL_ZERO_RANGE, offset, bytes)
    }
}
