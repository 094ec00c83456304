//! The GUID partition table: written for `atoll.raw`, read back before anything is written to a disk.
//!
//! GUIDs are derived from what they name, so that the same image has the same bytes.

use crate::error::{Error, Result};
use crate::layout::{Kind, Layout, SECTOR};
use atoll_spec::disk::{self, Guid};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

/// Entries of the table, as every GPT has.
const ENTRIES: u64 = 128;
/// Bytes of an entry.
const ENTRY: usize = 128;
/// Sectors of the entries.
const ENTRY_SECTORS: u64 = ENTRIES * ENTRY as u64 / SECTOR;
/// Bytes of a header that count.
const HEADER: usize = 92;

const ESP: [u8; 16] = guid(0xc12a_7328, 0xf81f, 0x11d2, 0xba4b_00a0_c93e_c93b);
const LINUX: [u8; 16] = guid(0x0fc6_3daf, 0x8483, 0x4772, 0x8e79_3d69_d847_7de4);

/// A GUID's bytes on disk: the first three groups little endian.
const fn guid(a: u32, b: u16, c: u16, d: u64) -> [u8; 16] {
    let (a, b, c, d) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// The GUID that stands for a name.
fn derived(name: &str) -> Guid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&Sha256::digest(format!("atoll {name}").as_bytes())[..16]);
    disk::of_the_image(bytes)
}

/// Writes the protective MBR and both tables.
pub fn write(disk: &mut (impl Write + Seek), layout: &Layout) -> std::io::Result<()> {
    let mut entries = vec![0; (ENTRIES as usize) * ENTRY];
    for (index, partition) in layout.partitions.iter().enumerate() {
        let entry = &mut entries[index * ENTRY..(index + 1) * ENTRY];
        entry[..16].copy_from_slice(match partition.kind {
            Kind::Esp => &ESP,
            Kind::Linux => &LINUX,
        });
        entry[16..32].copy_from_slice(&derived(partition.label));
        entry[32..40].copy_from_slice(&partition.first.to_le_bytes());
        entry[40..48].copy_from_slice(&partition.last.to_le_bytes());
        for (at, unit) in partition.label.encode_utf16().enumerate() {
            entry[56 + at * 2..58 + at * 2].copy_from_slice(&unit.to_le_bytes());
        }
    }
    let last = layout.sectors - 1;
    let mut at = |sector: u64, bytes: &[u8]| {
        disk.seek(SeekFrom::Start(sector * SECTOR))?;
        disk.write_all(bytes)
    };
    at(0, &protective_mbr(layout.sectors))?;
    at(1, &header(layout, &entries, 1, last, 2))?;
    at(2, &entries)?;
    at(last - ENTRY_SECTORS, &entries)?;
    at(last, &header(layout, &entries, last, 1, last - ENTRY_SECTORS))
}

fn protective_mbr(sectors: u64) -> [u8; SECTOR as usize] {
    let mut mbr = [0; SECTOR as usize];
    let size = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    mbr[446..454].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    mbr[454..458].copy_from_slice(&1u32.to_le_bytes());
    mbr[458..462].copy_from_slice(&size.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

fn header(layout: &Layout, entries: &[u8], own: u64, other: u64, table: u64) -> [u8; SECTOR as usize] {
    let mut header = [0; SECTOR as usize];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
    header[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
    header[24..32].copy_from_slice(&own.to_le_bytes());
    header[32..40].copy_from_slice(&other.to_le_bytes());
    header[40..48].copy_from_slice(&(2 + ENTRY_SECTORS).to_le_bytes());
    header[48..56].copy_from_slice(&(layout.sectors - 2 - ENTRY_SECTORS).to_le_bytes());
    header[56..72].copy_from_slice(&derived("disk"));
    header[72..80].copy_from_slice(&table.to_le_bytes());
    header[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
    header[84..88].copy_from_slice(&(ENTRY as u32).to_le_bytes());
    header[88..92].copy_from_slice(&crc32fast::hash(entries).to_le_bytes());
    let sum = crc32fast::hash(&header[..HEADER]);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    header
}

/// Gives a disk and its partitions ids of their own where they have those of the image, so that two disks flashed with
/// it can be told apart. Returns whether there were any. The table must have been read before. The backup comes first:
/// whatever happens in between, one of the two tables is whole.
pub fn give_own_ids(
    disk: &mut File,
    mut random: impl FnMut() -> std::io::Result<Guid>,
) -> std::io::Result<bool> {
    let mut entries = vec![0; ENTRIES as usize * ENTRY];
    let (mut primary, mut backup) = ([0; SECTOR as usize], [0; SECTOR as usize]);
    disk.read_exact_at(&mut primary, SECTOR)?;
    disk.read_exact_at(&mut entries, u64_at(&primary, 72) * SECTOR)?;
    let backup_at = u64_at(&primary, 32).saturating_mul(SECTOR);
    disk.read_exact_at(&mut backup, backup_at)?;
    let table_at = u64_at(&backup, 72).saturating_mul(SECTOR);
    if &backup[..8] != b"EFI PART" || table_at.checked_add(entries.len() as u64) > Some(backup_at) {
        return Err(std::io::Error::other("the backup of the partition table is damaged: flash it again"));
    }
    let mut own = |bytes: &mut [u8]| -> std::io::Result<bool> {
        let mut id = [0; 16];
        id.copy_from_slice(bytes);
        let replaced = disk::is_of_the_image(&id);
        if replaced {
            bytes.copy_from_slice(&disk::own(random()?));
        }
        Ok(replaced)
    };
    let mut changed = own(&mut primary[56..72])?;
    for entry in entries.chunks_exact_mut(ENTRY).filter(|e| e[..16] != [0; 16]) {
        changed |= own(&mut entry[16..32])?;
    }
    backup[56..72].copy_from_slice(&primary[56..72]);
    for header in [&mut primary, &mut backup] {
        header[88..92].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
        header[16..20].fill(0);
        let sum = crc32fast::hash(&header[..HEADER]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
    }
    let primary_table = u64_at(&primary, 72) * SECTOR;
    let writes: [(u64, &[u8]); 4] =
        [(table_at, &entries), (backup_at, &backup), (primary_table, &entries), (SECTOR, &primary)];
    for (at, bytes) in writes.into_iter().filter(|_| changed) {
        disk.write_all_at(bytes, at).and_then(|()| disk.sync_all())?;
    }
    Ok(changed)
}

/// A partition as found on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its label.
    pub label: String,
    /// Where it starts, in bytes.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Reads the primary table of a disk. Everything in it is checked before it is believed.
pub fn read(disk: &mut (impl Read + Seek)) -> Result<Vec<Found>> {
    let wrong = |problem: &str| Error::format("partition table", problem);
    let mut header = [0; SECTOR as usize];
    let mut at = |sector: u64, bytes: &mut [u8]| {
        disk.seek(SeekFrom::Start(sector * SECTOR)).and_then(|_| disk.read_exact(bytes))
    };
    at(1, &mut header).map_err(|_| wrong("too short for one"))?;
    let sum = u32::from_le_bytes([header[16], header[17], header[18], header[19]]);
    header[16..20].fill(0);
    if &header[..8] != b"EFI PART" || crc32fast::hash(&header[..HEADER]) != sum {
        return Err(wrong("no GPT with 512-byte sectors"));
    }
    let (table, size) = (u64_at(&header, 72), u64_at(&header, 80));
    if size != (ENTRY as u64) << 32 | ENTRIES || table > 1 << 40 {
        return Err(wrong("an unusual GPT"));
    }
    let mut entries = vec![0; ENTRIES as usize * ENTRY];
    at(table, &mut entries).map_err(|_| wrong("its entries cannot be read"))?;
    if crc32fast::hash(&entries).to_le_bytes() != header[88..92] {
        return Err(wrong("its entries are damaged"));
    }
    let used = entries.chunks_exact(ENTRY).filter(|e| e[..16] != [0; 16]);
    used.map(|entry| {
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let units = entry[56..].chunks_exact(2).map(|u| u16::from_le_bytes([u[0], u[1]]));
        let label: Vec<u16> = units.take_while(|u| *u != 0).collect();
        let sectors = last
            .checked_sub(first)
            .filter(|_| last < 1 << 40)
            .ok_or_else(|| wrong("a partition ends before it starts"))?;
        Ok(Found {
            label: String::from_utf16_lossy(&label),
            offset: first * SECTOR,
            size: (sectors + 1) * SECTOR,
        })
    })
    .collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::layout;
    use crate::profile::Disk;
    use std::io::Cursor;

    fn disk() -> Cursor<Vec<u8>> {
        let layout = layout(Disk { esp: 3, state: 2, data: 1 });
        let mut disk = Cursor::new(vec![0; (layout.sectors * SECTOR) as usize]);
        write(&mut disk, &layout).unwrap();
        disk
    }

    #[test]
    fn what_is_written_is_read() {
        let found = read(&mut disk()).unwrap();
        let labels: Vec<&str> = found.iter().map(|f| f.label.as_str()).collect();
        assert_eq!(labels, ["ESP", "STATE", "DATA"]);
        assert_eq!((found[0].offset, found[0].size), (1 << 20, 3 << 20));
    }

    #[test]
    fn the_backup_is_at_the_end() {
        let bytes = disk().into_inner();
        let last = &bytes[bytes.len() - 512..];
        assert_eq!(&last[..8], b"EFI PART");
        assert_eq!(u64_at(last, 32), 1);
        assert_eq!(bytes[1024..1024 + 16384], bytes[bytes.len() - 512 - 16384..bytes.len() - 512]);
    }

    #[test]
    fn a_flashed_disk_gets_ids_of_its_own_in_both_tables_once() {
        let mut bytes = disk().into_inner();
        let size = bytes.len();
        // Larger than its image: the backup stays where the image ended.
        bytes.resize(size + (1 << 20), 0);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let partitions = read(&mut file).unwrap();
        let mut seed = 0;
        let mut random = || {
            seed += 1;
            Ok([seed; 16])
        };
        assert!(give_own_ids(&mut file, &mut random).unwrap());
        assert!(!give_own_ids(&mut file, &mut random).unwrap(), "it has them");
        assert_eq!(read(&mut file).unwrap(), partitions, "and its partitions as before");
        let mut now = vec![0; bytes.len()];
        file.read_exact_at(&mut now, 0).unwrap();
        let ids = |bytes: &[u8], header: usize, table: usize| {
            let at = |at: usize| <Guid>::try_from(&bytes[at..at + 16]).unwrap();
            [at(header + 56), at(table + 16), at(table + 144), at(table + 272)]
        };
        let (old, new) = (ids(&bytes, 512, 1024), ids(&now, 512, 1024));
        assert!(old.iter().all(disk::is_of_the_image) && !new.iter().any(disk::is_of_the_image));
        assert_eq!(ids(&now, size - 512, size - 512 - 16384), new, "the backup");
        for header in [512, size - 512] {
            let mut copy = now[header..header + HEADER].to_vec();
            copy[16..20].fill(0);
            assert_eq!(crc32fast::hash(&copy).to_le_bytes(), now[header + 16..header + 20]);
        }
        let differ = (0..bytes.len()).filter(|at| bytes[*at] != now[*at]).count();
        assert!(differ <= 2 * (4 * 16 + 8), "{differ} bytes differ");
    }

    #[test]
    fn damage_is_seen() {
        let mut bytes = disk().into_inner();
        bytes[1024 + 33] ^= 1;
        assert!(read(&mut Cursor::new(bytes)).is_err());
        assert!(read(&mut Cursor::new(vec![0; 4096])).is_err());
        assert!(read(&mut Cursor::new(vec![0; 100])).is_err());
    }
}
