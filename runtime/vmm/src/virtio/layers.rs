//! The layer window: one read-only disk of 1 TiB into which the runtime maps image layers while the guest runs.
//!
//! The table of extents is shared between the control socket, which adds to it, and the disk's thread, which reads it
//! for every request. Invariant: extents are sorted, do not overlap, lie inside the window and are never taken away, so
//! a guest that has a layer mounted never sees it change.

use super::disk::{Access, Buffers, Disk};
use atoll_spec::vm::{LAYER_WINDOW_BYTES, LAYER_WINDOW_EXTENTS};
use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

/// Extents start and end at multiples of this.
const ALIGN: u64 = 4096;

struct Extent {
    start: u64,
    end: u64,
    file: File,
}

/// Why a layer cannot be mapped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Not a multiple of 4096, empty, or not inside the window.
    #[error(
        "cannot map a layer of {length} bytes at {offset:#x}: use a multiple of 4096 that ends inside the window of {LAYER_WINDOW_BYTES:#x} bytes"
    )]
    Bounds {
        /// As asked for.
        offset: u64,
        /// As asked for.
        length: u64,
    },
    /// Something is there already.
    #[error(
        "cannot map a layer of {length} bytes at {offset:#x}: another one lies there; choose an offset that is free"
    )]
    Overlap {
        /// As asked for.
        offset: u64,
        /// As asked for.
        length: u64,
    },
    /// The window holds no more.
    #[error(
        "cannot map a layer: the window holds {LAYER_WINDOW_EXTENTS} already; use images with fewer layers"
    )]
    Full,
}

/// The extents mapped so far. Clones share them.
#[derive(Clone, Default)]
pub struct Layers(Arc<RwLock<Vec<Extent>>>);

impl Layers {
    /// Maps `file` at `offset`.
    pub fn map(&self, offset: u64, length: u64, file: File) -> Result<(), MapError> {
        let bounds = MapError::Bounds { offset, length };
        let end = length
            .checked_next_multiple_of(ALIGN)
            .and_then(|length| offset.checked_add(length))
            .filter(|end| length > 0 && offset.is_multiple_of(ALIGN) && *end <= LAYER_WINDOW_BYTES)
            .ok_or(bounds)?;
        let mut extents = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if extents.len() >= LAYER_WINDOW_EXTENTS {
            return Err(MapError::Full);
        }
        let at = extents.partition_point(|extent| extent.end <= offset);
        if extents.get(at).is_some_and(|next| next.start < end) {
            return Err(MapError::Overlap { offset, length });
        }
        extents.insert(at, Extent { start: offset, end, file });
        Ok(())
    }
}

impl Disk for Layers {
    fn bytes(&self) -> u64 {
        LAYER_WINDOW_BYTES
    }
    fn access(&self) -> Access {
        Access::ReadOnly
    }
    fn serial(&self) -> &'static str {
        "layers"
    }

    fn read(&self, mut offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        let extents = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut at = extents.partition_point(|extent| extent.end <= offset);
        loop {
            let left = buffers.len();
            if left == 0 {
                return Ok(());
            }
            match extents.get(at) {
                Some(extent) if extent.start <= offset => {
                    let bytes = left.min(extent.end - offset);
                    buffers.fill_from(&extent.file, offset - extent.start, bytes)?;
                    offset += bytes;
                    at += 1;
                }
                next => {
                    let bytes = next.map_or(left, |extent| left.min(extent.start - offset));
                    buffers.zero(bytes);
                    offset += bytes;
                }
            }
        }
    }

    fn write(&self, _: u64, _: &mut Buffers<'_>) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use proptest::prelude::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    fn file(byte: u8, bytes: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![byte; bytes]).unwrap();
        file
    }

    fn read(layers: &Layers, offset: u64, bytes: usize) -> Vec<u8> {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        ram.write_slice(&vec![0xee; bytes], GuestAddress(0x100)).unwrap();
        // Two buffers, the first of an odd length.
        let (one, two) = (bytes / 3, bytes - bytes / 3);
        let slices = [(0x100, one), (0x100 + one as u64, two)]
            .map(|(at, bytes)| ram.get_slice(GuestAddress(at), bytes).unwrap());
        let mut buffers = Buffers::new(slices.to_vec());
        layers.read(offset, &mut buffers).unwrap();
        assert!(buffers.is_empty());
        let mut data = vec![0; bytes];
        ram.read_slice(&mut data, GuestAddress(0x100)).unwrap();
        data
    }

    #[test]
    fn outside_every_extent_reads_zeros() {
        let layers = Layers::default();
        assert_eq!(read(&layers, 0, 1024), [0; 1024]);
        layers.map(8192, 5000, file(1, 5000)).unwrap();
        layers.map(0, 4096, file(2, 4096)).unwrap();
        assert_eq!(read(&layers, 4096, 4096), [0; 4096]);
        assert_eq!(read(&layers, LAYER_WINDOW_BYTES - 512, 512), [0; 512]);
    }

    #[test]
    fn a_read_across_extents_gaps_and_ends_of_files_is_put_together() {
        let layers = Layers::default();
        layers.map(16384, 4096, file(3, 100)).unwrap();
        layers.map(4096, 5000, file(1, 5000)).unwrap();
        let mut expected = vec![0; 4096];
        expected.extend([1; 5000]);
        expected.resize(16384, 0);
        expected.extend([3; 100]);
        expected.resize(24576, 0);
        assert_eq!(read(&layers, 0, 24576), expected);
        assert_eq!(read(&layers, 4608, 1024), [1; 1024]);
    }

    #[test]
    fn bad_places_are_refused() {
        let layers = Layers::default();
        layers.map(8192, 8192, file(1, 1)).unwrap();
        let map = |offset, length| layers.map(offset, length, file(1, 1));
        for (offset, length) in [
            (0, 0),
            (1, 4096),
            (LAYER_WINDOW_BYTES, 4096),
            (LAYER_WINDOW_BYTES - 4096, 4097),
            (4096, u64::MAX),
        ] {
            assert_eq!(map(offset, length), Err(MapError::Bounds { offset, length }));
        }
        for (offset, length) in [(8192, 1), (12288, 4096), (4096, 4097), (0, 65536)] {
            assert_eq!(map(offset, length), Err(MapError::Overlap { offset, length }));
        }
        map(0, 8192).unwrap();
        map(16384, 1).unwrap();
    }

    #[test]
    fn the_window_is_bounded() {
        let layers = Layers::default();
        for index in 0..LAYER_WINDOW_EXTENTS as u64 {
            layers.map(index * 4096, 4096, file(1, 1)).unwrap();
        }
        assert_eq!(layers.map(1 << 30, 4096, file(1, 1)), Err(MapError::Full));
    }

    proptest! {
        #[test]
        fn reads_agree_with_a_flat_picture(
            maps in prop::collection::vec((0u64..12, 1u64..12000, 0usize..12000), 0..6),
            offset in 0u64..90, sectors in 1usize..40,
        ) {
            let layers = Layers::default();
            let mut picture = vec![0u8; 1 << 16];
            for (index, (page, length, bytes)) in maps.into_iter().enumerate() {
                let byte = index as u8 + 1;
                if layers.map(page * 4096, length, file(byte, bytes)).is_ok() {
                    let start = page as usize * 4096;
                    let seen = bytes.min(length.next_multiple_of(4096) as usize);
                    picture[start..start + seen].fill(byte);
                }
            }
            let (offset, bytes) = (offset * 512, sectors * 512);
            let end = (offset as usize + bytes).min(picture.len());
            let bytes = end - offset as usize;
            prop_assert_eq!(read(&layers, offset, bytes), &picture[offset as usize..end]);
        }
    }
}
