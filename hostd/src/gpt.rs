//! The GUID partition table, as far as hostd needs it: find partitions, make the last one reach the disk's end, give a
//! flashed disk ids of its own. ◇
//!
//! Pure: bytes in, bytes out. `apply/storage.rs` reads and writes the disk. The writes come in an order that a power
//! cut cannot spoil: first the backup at the disk's end, then the primary. A primary that is not whole, as a cut between
//! its two writes leaves it, is made anew from the backup.

use atoll_spec::disk::{self, Guid};

/// What is wrong with a table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GptError {
    /// No header, or not one that can be used.
    #[error("there is no GPT: {0}")]
    NotGpt(&'static str),
    /// The checksum of the header or of the entries does not fit.
    #[error(
        "the checksum of its {0} does not fit, nor is there a whole backup at its end: flash the disk again"
    )]
    Checksum(&'static str),
    /// The partition to grow is not there.
    #[error("there is no partition {0}")]
    NoPartition(u32),
    /// Another partition lies behind the one to grow.
    #[error("partition {0} is not the last on the disk, so it cannot grow")]
    NotLast(u32),
    /// The disk ends before the table says it does.
    #[error("the disk is smaller than the table says: the image was cut short when it was written")]
    DiskTooSmall,
}

/// Bytes at the beginning of a disk that hold the primary table, and at its end that hold the backup, at most.
pub const TABLE_BYTES: usize = 64 * 1024;
const SIGNATURE: &[u8; 8] = b"EFI PART";
const ALIGNMENT: u64 = 1024 * 1024;

/// One entry that is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Partition number, from 1.
    pub number: u32,
    /// Unique id, as text in the usual mixed-endian form, lower case.
    pub uuid: String,
    /// First sector.
    pub first: u64,
    /// Last sector, inclusive.
    pub last: u64,
    /// Label.
    pub label: String,
}

/// The parts of a disk that hold its tables.
#[derive(Debug, Clone, Copy)]
pub struct Ends<'a> {
    /// Its first [`TABLE_BYTES`].
    pub start: &'a [u8],
    /// Its last ones.
    pub end: &'a [u8],
    /// Its size in bytes.
    pub bytes: u64,
    /// The size of its sectors.
    pub sector: usize,
}

/// Which of its two tables a disk was read by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The one behind the first sector.
    Primary,
    /// The one at the end, because the primary is not whole.
    Backup,
}

/// A checked table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    source: Source,
    sector: usize,
    header: Vec<u8>,
    entries: Vec<u8>,
    entry_size: usize,
}

/// What gives a disk ids of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Offset and content of each write, to be done in this order.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// The partitions' ids until now, and from then on.
    pub ids: Vec<(String, String)>,
}

/// Bytes to write, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Growth {
    /// Offset and content of each write.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// Where the partition begins, in bytes.
    pub start: u64,
    /// Its new length in bytes.
    pub length: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

impl Table {
    /// Reads the primary table, or its backup when the primary is not whole.
    pub fn parse(disk: Ends) -> Result<Self, GptError> {
        let Ends { start, end, bytes, sector } = disk;
        if !(512..=4096).contains(&sector) || !sector.is_power_of_two() {
            return Err(GptError::NotGpt("its sectors have an odd size"));
        }
        let primary = start.get(sector..2 * sector).ok_or(GptError::NotGpt("the disk is too small"));
        let primary = primary.and_then(|header| {
            Self::check(header, sector, Source::Primary, 1, |at, length| {
                if at != 2 {
                    return Err(GptError::NotGpt("its entries are not behind its header"));
                }
                start.get(2 * sector..2 * sector + length).ok_or(GptError::NotGpt("the disk is too small"))
            })
        });
        primary.or_else(|wrong| {
            // Of both, what is wrong with the primary is what a person can do something about.
            let last = (bytes / sector as u64).checked_sub(1).ok_or_else(|| wrong.clone())?;
            let whole = &end[end.len() % sector..];
            let header = whole.len().checked_sub(sector).and_then(|at| whole.get(at..));
            let header = header.ok_or_else(|| wrong.clone())?;
            let first = last + 1 - (whole.len() / sector) as u64;
            Self::check(header, sector, Source::Backup, last, |at, length| {
                let offset = at.checked_sub(first).and_then(|sectors| usize::try_from(sectors).ok());
                let offset = offset.and_then(|sectors| sectors.checked_mul(sector));
                let entries = offset.and_then(|from| whole.get(from..from.checked_add(length)?));
                entries.ok_or(GptError::NotGpt("its entries are not before its header"))
            })
            .map_err(|_| wrong)
        })
    }

    /// Checks the header that should be in sector `own` and the entries, which `entries` gives by sector and length.
    fn check<'a>(
        header: &[u8],
        sector: usize,
        source: Source,
        own: u64,
        entries: impl FnOnce(u64, usize) -> Result<&'a [u8], GptError>,
    ) -> Result<Self, GptError> {
        if &header[..8] != SIGNATURE {
            return Err(GptError::NotGpt("the signature is missing"));
        }
        let size = u32_at(header, 12) as usize;
        if !(92..=512).contains(&size) {
            return Err(GptError::NotGpt("its header has an odd size"));
        }
        if header_checksum(header) != u32_at(header, 16) {
            return Err(GptError::Checksum("header"));
        }
        let (count, entry_size) = (u32_at(header, 80) as usize, u32_at(header, 84) as usize);
        if !(128..=1024).contains(&entry_size) || !entry_size.is_power_of_two() || count == 0 || count > 512 {
            return Err(GptError::NotGpt("its entries have an odd size or number"));
        }
        if u64_at(header, 24) != own {
            return Err(GptError::NotGpt("its header is not where it says"));
        }
        let entries = entries(u64_at(header, 72), count * entry_size)?.to_vec();
        if crc32fast::hash(&entries) != u32_at(header, 88) {
            return Err(GptError::Checksum("entries"));
        }
        Ok(Self { source, sector, header: header.to_vec(), entries, entry_size })
    }

    /// Which of the two tables this is.
    pub fn source(&self) -> Source {
        self.source
    }

    /// What to write, in this order, so that the primary says what the backup does; nothing when it is whole. The entries
    /// come first: until the header fits them, the backup counts.
    pub fn restore(&self) -> Vec<(u64, Vec<u8>)> {
        if self.source == Source::Primary {
            return Vec::new();
        }
        let (own, last_usable) = (u64_at(&self.header, 24), u64_at(&self.header, 48));
        let header = self.header_for(&self.entries, 1, own, 2, last_usable);
        let sector = self.sector as u64;
        vec![(2 * sector, self.entries.clone()), (sector, header)]
    }

    /// The entries in use.
    pub fn entries(&self) -> Vec<Entry> {
        let all = self.entries.chunks_exact(self.entry_size).enumerate();
        let used = all.filter(|(_, bytes)| bytes[..16] != [0; 16]);
        used.map(|(i, bytes)| Entry {
            number: i as u32 + 1,
            uuid: uuid_text(&bytes[16..32]),
            first: u64_at(bytes, 32),
            last: u64_at(bytes, 40),
            label: label_text(&bytes[56..128]),
        })
        .collect()
    }

    /// What to write so that partition `number` reaches the end of a disk of `disk_bytes`; `None` when it does.
    pub fn grow(&self, number: u32, disk_bytes: u64) -> Result<Option<Growth>, GptError> {
        let entries = self.entries();
        let entry = entries.iter().find(|e| e.number == number).ok_or(GptError::NoPartition(number))?;
        if entries.iter().any(|other| other.number != number && other.last >= entry.first) {
            return Err(GptError::NotLast(number));
        }
        let sector = self.sector as u64;
        let last_usable = self.last_usable(disk_bytes)?;
        if entry.first > last_usable || entry.last < entry.first {
            return Err(GptError::DiskTooSmall);
        }
        let aligned = (last_usable + 1) / (ALIGNMENT / sector) * (ALIGNMENT / sector);
        let new_last = aligned.max(1) - 1;
        if new_last <= entry.last {
            return if entry.last <= last_usable { Ok(None) } else { Err(GptError::DiskTooSmall) };
        }
        let mut bytes = self.entries.clone();
        put(&mut bytes, (number as usize - 1) * self.entry_size + 40, &new_last.to_le_bytes());
        Ok(Some(Growth {
            writes: self.both(bytes, disk_bytes / sector, last_usable),
            start: entry.first * sector,
            length: (new_last + 1 - entry.first) * sector,
        }))
    }

    /// Whether any of its ids is one that all disks have which were flashed with the same image.
    pub fn has_ids_of_the_image(&self) -> bool {
        let used = self.entries.chunks_exact(self.entry_size).filter(|bytes| bytes[..16] != [0; 16]);
        let mut all = used.map(|bytes| guid(bytes, 16)).chain([guid(&self.header, 56)]);
        all.any(|id| disk::is_of_the_image(&id))
    }

    /// What to write so that disk and partitions have ids that no other disk has, in place of those of the image. Others,
    /// which somebody chose, stay. `random` gives random bytes.
    pub fn with_own_ids(
        &self,
        disk_bytes: u64,
        mut random: impl FnMut() -> Guid,
    ) -> Result<Identity, GptError> {
        let last_usable = self.last_usable(disk_bytes)?;
        if self.entries().iter().any(|entry| entry.last > last_usable) {
            return Err(GptError::DiskTooSmall);
        }
        let mut own = |bytes: &mut [u8], at: usize| {
            if disk::is_of_the_image(&guid(bytes, at)) {
                put(bytes, at, &disk::own(random()));
            }
        };
        let mut table = self.clone();
        own(&mut table.header, 56);
        let used = table.entries.chunks_exact_mut(self.entry_size).filter(|bytes| bytes[..16] != [0; 16]);
        used.for_each(|bytes| own(bytes, 16));
        let uuids = |table: &Self| table.entries().into_iter().map(|entry| entry.uuid).collect::<Vec<_>>();
        let ids = uuids(self).into_iter().zip(uuids(&table)).collect();
        let writes = table.both(table.entries.clone(), disk_bytes / self.sector as u64, last_usable);
        Ok(Identity { writes, ids })
    }

    /// The last sector that partitions may use: the backup's header is in the disk's last, its entries before it.
    fn last_usable(&self, disk_bytes: u64) -> Result<u64, GptError> {
        let sector = self.sector as u64;
        let table_sectors = (self.entries.len() as u64).div_ceil(sector);
        (disk_bytes / sector).checked_sub(table_sectors + 2).ok_or(GptError::DiskTooSmall)
    }

    /// The writes of both tables: first the backup at the disk's end, then the primary.
    fn both(&self, entries: Vec<u8>, disk_sectors: u64, last_usable: u64) -> Vec<(u64, Vec<u8>)> {
        let sector = self.sector as u64;
        let backup_entries_at = last_usable + 1;
        let primary = self.header_for(&entries, 1, disk_sectors - 1, 2, last_usable);
        let backup = self.header_for(&entries, disk_sectors - 1, 1, backup_entries_at, last_usable);
        vec![
            (backup_entries_at * sector, entries.clone()),
            ((disk_sectors - 1) * sector, backup),
            (2 * sector, entries),
            (sector, primary),
        ]
    }

    fn header_for(&self, entries: &[u8], own: u64, other: u64, entries_at: u64, last_usable: u64) -> Vec<u8> {
        let mut header = self.header.clone();
        put(&mut header, 24, &own.to_le_bytes());
        put(&mut header, 32, &other.to_le_bytes());
        put(&mut header, 48, &last_usable.to_le_bytes());
        put(&mut header, 72, &entries_at.to_le_bytes());
        put(&mut header, 88, &crc32fast::hash(entries).to_le_bytes());
        let checksum = header_checksum(&header);
        put(&mut header, 16, &checksum.to_le_bytes());
        header
    }
}

/// The checksum of a header, taken with its own field as zero.
fn header_checksum(header: &[u8]) -> u32 {
    let size = (u32_at(header, 12) as usize).min(header.len());
    let mut copy = header[..size].to_vec();
    put(&mut copy, 16, &[0; 4]);
    crc32fast::hash(&copy)
}

fn guid(bytes: &[u8], at: usize) -> Guid {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[at..at + 16]);
    id
}

fn uuid_text(b: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let swapped = |bytes: &[u8]| bytes.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    [swapped(&b[0..4]), swapped(&b[4..6]), swapped(&b[6..8]), hex(&b[8..10]), hex(&b[10..16])].join("-")
}

fn label_text(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).take_while(|u| *u != 0);
    char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(disk: &[u8], bytes: u64) -> Result<Table, GptError> {
        let (start, end) =
            (&disk[..disk.len().min(TABLE_BYTES)], &disk[disk.len().saturating_sub(TABLE_BYTES)..]);
        Table::parse(Ends { start, end, bytes, sector: 512 })
    }

    /// A disk of `sectors` with partitions (first, last, label).
    fn disk(sectors: u64, partitions: &[(u64, u64, &str)]) -> Vec<u8> {
        let mut bytes = vec![0; TABLE_BYTES];
        for (i, (first, last, label)) in partitions.iter().enumerate() {
            let at = 1024 + 128 * i;
            put(&mut bytes, at, &[1; 16]);
            put(&mut bytes, at + 16, &[i as u8 + 1; 16]);
            put(&mut bytes, at + 32, &first.to_le_bytes());
            put(&mut bytes, at + 40, &last.to_le_bytes());
            for (j, unit) in label.encode_utf16().enumerate() {
                put(&mut bytes, at + 56 + 2 * j, &unit.to_le_bytes());
            }
        }
        put(&mut bytes, 512, SIGNATURE);
        put(&mut bytes, 520, &0x10000u32.to_le_bytes());
        put(&mut bytes, 524, &92u32.to_le_bytes());
        for (at, value) in [(24, 1), (32, sectors - 1), (40, 34), (48, sectors - 34), (72, 2)] {
            put(&mut bytes, 512 + at, &u64::to_le_bytes(value));
        }
        put(&mut bytes, 512 + 80, &128u32.to_le_bytes());
        put(&mut bytes, 512 + 84, &128u32.to_le_bytes());
        let crc = crc32fast::hash(&bytes[1024..1024 + 128 * 128]);
        put(&mut bytes, 512 + 88, &crc.to_le_bytes());
        let crc = header_checksum(&bytes[512..1024]);
        put(&mut bytes, 512 + 16, &crc.to_le_bytes());
        bytes
    }

    #[test]
    fn entries_are_read() {
        let table =
            parse(&disk(100_000, &[(2048, 4095, "ESP"), (4096, 8191, "DATA")]), 100_000 * 512).unwrap();
        let entries = table.entries();
        assert_eq!((entries[1].number, entries[1].label.as_str(), entries[1].first), (2, "DATA", 4096));
        assert_eq!(entries[0].uuid, "01010101-0101-0101-0101-010101010101");
    }

    #[test]
    fn ids_are_written_as_the_firmware_writes_them() {
        let system_partition = [40, 115, 42, 193, 31, 248, 210, 17, 186, 75, 0, 160, 201, 62, 201, 59];
        assert_eq!(uuid_text(&system_partition), "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
    }

    #[test]
    fn only_the_last_partition_grows_and_only_when_there_is_room() {
        let table =
            parse(&disk(100_000, &[(2048, 4095, "ESP"), (4096, 8191, "DATA")]), 100_000 * 512).unwrap();
        assert_eq!(table.grow(1, 100_000 * 512), Err(GptError::NotLast(1)));
        assert_eq!(table.grow(3, 100_000 * 512), Err(GptError::NoPartition(3)));
        assert_eq!(table.grow(2, 8000 * 512), Err(GptError::DiskTooSmall));
        assert_eq!(table.grow(2, (8192 + 33) * 512), Ok(None));
    }

    fn write_all(bytes: &mut [u8], writes: &[(u64, Vec<u8>)], count: usize) {
        for (at, content) in writes.iter().take(count) {
            put(bytes, *at as usize, content);
        }
    }

    /// A flashed disk, larger than its image or not: its backup is where the image ended.
    fn flashed(image_sectors: u64, sectors: u64) -> Vec<u8> {
        let mut bytes =
            disk(image_sectors, &[(2048, 4095, "ESP"), (4096, 8191, "DATA"), (8192, 8200, "own")]);
        for (n, at) in [512 + 56, 1024 + 16, 1024 + 128 + 16].into_iter().enumerate() {
            put(&mut bytes, at, &disk::of_the_image([n as u8 + 1; 16]));
        }
        let crc = crc32fast::hash(&bytes[1024..1024 + 128 * 128]);
        put(&mut bytes, 512 + 88, &crc.to_le_bytes());
        let crc = header_checksum(&bytes[512..1024]);
        put(&mut bytes, 512 + 16, &crc.to_le_bytes());
        bytes.resize(sectors as usize * 512, 0);
        bytes
    }

    #[test]
    fn a_flashed_disk_gets_ids_of_its_own_and_keeps_everything_else() {
        for sectors in [12_288, 16_384] {
            let bytes = flashed(12_288, sectors);
            let before = parse(&bytes, sectors * 512).unwrap();
            assert!(before.has_ids_of_the_image());
            let mut seed = 0;
            let identity = before
                .with_own_ids(sectors * 512, || {
                    seed += 1;
                    [0x40 + seed; 16]
                })
                .unwrap();
            assert_eq!(identity.ids.len(), 3);
            // A power cut after any of the writes leaves the old ids or the new ones, and every partition.
            for count in 0..=4 {
                let mut cut = bytes.clone();
                write_all(&mut cut, &identity.writes, count);
                let found = parse(&cut, sectors * 512).unwrap();
                for (entry, (old, new)) in found.entries().iter().zip(&identity.ids) {
                    assert_eq!(&entry.uuid, if count < 3 { old } else { new }, "{count} writes");
                }
                let place = |table: &Table| {
                    table.entries().into_iter().map(|e| (e.first, e.last, e.label)).collect::<Vec<_>>()
                };
                assert_eq!(place(&found), place(&before), "{count} writes");
                write_all(&mut cut, &found.restore(), 2);
                let restored = parse(&cut, sectors * 512).unwrap();
                assert_eq!((restored.source(), restored.entries()), (Source::Primary, found.entries()));
                assert_eq!(
                    restored.has_ids_of_the_image(),
                    count < 3,
                    "{count} writes: it is done until it is done"
                );
            }
            let mut done = bytes.clone();
            write_all(&mut done, &identity.writes, 4);
            assert_ne!(done[512 + 56..512 + 72], bytes[512 + 56..512 + 72], "the disk's own id");
            assert_eq!(identity.ids[2].0, identity.ids[2].1, "one that somebody chose");
            assert!(identity.ids[..2].iter().all(|(old, new)| old != new && new.as_bytes()[14] == b'4'));
        }
        let cut_short = parse(&flashed(12_288, 12_288), 8100 * 512).unwrap();
        assert_eq!(cut_short.with_own_ids(8100 * 512, || [1; 16]), Err(GptError::DiskTooSmall));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000), edits in
            proptest::collection::vec((0usize..2000, any::<u8>()), 0..8)) {
            let _ = parse(&bytes, bytes.len() as u64);
            let _ = parse(&[], 0);
            let mut bytes = disk(100_000, &[(2048, 4095, "ESP"), (4096, 8191, "DATA")]);
            for (at, byte) in edits { bytes[512 + at] = byte; }
            // Also past the checksums, as if someone had made a hostile table.
            let crc = crc32fast::hash(&bytes[1024..1024 + 128 * 128]);
            put(&mut bytes, 512 + 88, &crc.to_le_bytes());
            let crc = header_checksum(&bytes[512..1024]);
            put(&mut bytes, 512 + 16, &crc.to_le_bytes());
            if let Ok(table) = parse(&bytes, 100_000 * 512) {
                for entry in table.entries() { let _ = table.grow(entry.number, 200_000 * 512); }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn growing_keeps_all_but_the_end_and_is_done_once(extra in 2200u64..9000) {
            let sectors = 12_288 + extra;
            let mut bytes = disk(12_288, &[(2048, 4095, "ESP"), (4096, 8191, "DATA")]);
            bytes.resize(sectors as usize * 512, 0);
            let before = parse(&bytes, sectors * 512).unwrap();
            let growth = before.grow(2, sectors * 512).unwrap().unwrap();
            write_all(&mut bytes, &growth.writes, 4);
            let after = parse(&bytes, sectors * 512).unwrap();
            let (old, new) = (before.entries(), after.entries());
            prop_assert_eq!(&old[0], &new[0]);
            prop_assert_eq!((&old[1].uuid, old[1].first, &old[1].label), (&new[1].uuid, new[1].first, &new[1].label));
            prop_assert!(new[1].last > old[1].last && new[1].last + 34 <= sectors);
            prop_assert_eq!(growth.length, (new[1].last + 1 - new[1].first) * 512);
            prop_assert_eq!(after.grow(2, sectors * 512), Ok(None));
            // The backup is a table of its own that says the same.
            let at = (sectors as usize - 1) * 512;
            prop_assert_eq!(header_checksum(&bytes[at..at + 512]), u32_at(&bytes, at + 16));
            let entries_at = u64_at(&bytes, at + 72) as usize * 512;
            prop_assert_eq!(&bytes[entries_at..entries_at + 128 * 128], &bytes[1024..1024 + 128 * 128]);
            // A power cut after any of the writes leaves the old entries or the new ones, never none.
            for count in 0..=4 {
                let mut cut = disk(12_288, &[(2048, 4095, "ESP"), (4096, 8191, "DATA")]);
                cut.resize(sectors as usize * 512, 0);
                write_all(&mut cut, &growth.writes, count);
                let found = parse(&cut, sectors * 512).unwrap();
                prop_assert_eq!(&found.entries(), if count < 3 { &old } else { &new }, "{} writes", count);
                let source = if count == 3 { Source::Backup } else { Source::Primary };
                prop_assert_eq!(found.source(), source, "{} writes", count);
                // Restored, with a power cut in between, and grown, it is as if nothing had been.
                for done in 0..=found.restore().len() {
                    for (at, content) in found.restore().iter().take(done) { put(&mut cut, *at as usize, content); }
                    prop_assert_eq!(&parse(&cut, sectors * 512).unwrap().entries(), &found.entries());
                }
                let restored = parse(&cut, sectors * 512).unwrap();
                prop_assert_eq!(restored.source(), Source::Primary);
                if let Some(growth) = restored.grow(2, sectors * 512).unwrap() { write_all(&mut cut, &growth.writes, 4); }
                prop_assert_eq!(&cut, &bytes);
            }
        }

        #[test]
        fn a_backup_that_is_not_whole_is_not_believed(at in 0usize..92 + 16_384, bit in 0u8..8) {
            let sectors = 16_384;
            let mut bytes = disk(12_288, &[(2048, 4095, "ESP"), (4096, 8191, "DATA")]);
            bytes.resize(sectors as usize * 512, 0);
            let growth = parse(&bytes, sectors * 512).unwrap().grow(2, sectors * 512).unwrap().unwrap();
            write_all(&mut bytes, &growth.writes, 3);
            let header = bytes.len() - 512;
            let byte = if at < 92 { header + at } else { header - 16_384 + at - 92 };
            bytes[byte] ^= 1 << bit;
            prop_assert_eq!(parse(&bytes, sectors * 512), Err(GptError::Checksum("entries")), "that of the primary");
        }
    }
}
