//! Partition arithmetic. Pure.

use crate::profile::Disk;

/// Bytes of a sector; the image is for disks with 512-byte logical sectors.
pub const SECTOR: u64 = 512;
/// Sectors of a MiB, to which partitions are aligned.
const MIB: u64 = (1 << 20) / SECTOR;

/// What a partition is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// EFI system partition.
    Esp,
    /// Linux data.
    Linux,
}

/// A partition of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// Its label, by which the host finds it.
    pub label: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// First sector.
    pub first: u64,
    /// Last sector.
    pub last: u64,
}

impl Partition {
    /// Where it starts, in bytes.
    pub fn offset(&self) -> u64 {
        self.first * SECTOR
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        (self.last + 1 - self.first) * SECTOR
    }
}

/// The disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// All sectors.
    pub sectors: u64,
    /// In order.
    pub partitions: Vec<Partition>,
}

/// Lays out ESP, STATE and DATA one after the other, each at a MiB; a MiB before and behind for the tables.
pub fn layout(disk: Disk) -> Layout {
    let mut next = MIB;
    let mut place = |label, kind, mib: u64| {
        let first = next;
        next += mib * MIB;
        Partition { label, kind, first, last: next - 1 }
    };
    let partitions = vec![
        place("ESP", Kind::Esp, disk.esp),
        place("STATE", Kind::Linux, disk.state),
        place("DATA", Kind::Linux, disk.data),
    ];
    Layout { sectors: next + MIB, partitions }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_touch_and_are_aligned() {
        let layout = layout(Disk { esp: 512, state: 64, data: 64 });
        assert_eq!(layout.sectors * SECTOR, (512 + 64 + 64 + 2) << 20);
        let mut next = 2048;
        for p in &layout.partitions {
            assert_eq!((p.first, p.first % 2048), (next, 0), "{}", p.label);
            next = p.last + 1;
        }
        assert_eq!(layout.partitions[2].size(), 64 << 20);
    }
}
