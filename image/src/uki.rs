//! The unified kernel image: sections appended to systemd's EFI stub. Pure: bytes in, bytes out.
//!
//! Order matters: `.linux` is last, because the kernel takes more room in memory than in the file and unpacks
//! itself behind its own end. Invariant: each section lies at the next free address that the stub's alignment
//! allows, so the same parts always give the same file.

use crate::error::{Error, Result};

/// A section to append.
pub struct Section<'a> {
    /// At most eight characters, with the dot.
    pub name: &'static str,
    /// Its content.
    pub content: &'a [u8],
}

/// Bytes of a section header.
const HEADER: usize = 40;
/// Initialised data, readable.
const CHARACTERISTICS: u32 = 0x4000_0040;

/// Appends sections to an EFI program.
pub fn link(stub: &[u8], sections: &[Section<'_>]) -> Result<Vec<u8>> {
    let pe = Headers::read(stub)?;
    let table_end = pe.table + (pe.count + sections.len()) * HEADER;
    if table_end > pe.headers_size {
        return Err(Error::format(
            "systemd's EFI stub",
            format!("no room for {} more section headers", sections.len()),
        ));
    }
    let mut image = stub.to_vec();
    let mut address = pe.end_of_image(stub)?;
    for (index, section) in sections.iter().enumerate() {
        address = address.next_multiple_of(pe.section_alignment);
        image.resize(image.len().next_multiple_of(pe.file_alignment), 0);
        let raw_size = section.content.len().next_multiple_of(pe.file_alignment);
        let mut header = [0; HEADER];
        header[..section.name.len()].copy_from_slice(section.name.as_bytes());
        for (offset, value) in [(8, section.content.len()), (12, address), (16, raw_size), (20, image.len())]
        {
            header[offset..offset + 4].copy_from_slice(&small(value)?.to_le_bytes());
        }
        header[36..].copy_from_slice(&CHARACTERISTICS.to_le_bytes());
        let at = pe.table + (pe.count + index) * HEADER;
        image[at..at + HEADER].copy_from_slice(&header);
        image.extend_from_slice(section.content);
        image.resize(image.len().next_multiple_of(pe.file_alignment), 0);
        address += section.content.len();
    }
    let count = u16::try_from(pe.count + sections.len()).expect("a handful of sections");
    image[pe.start + 6..pe.start + 8].copy_from_slice(&count.to_le_bytes());
    let size_of_image = small(address.next_multiple_of(pe.section_alignment))?;
    image[pe.start + 24 + 56..pe.start + 24 + 60].copy_from_slice(&size_of_image.to_le_bytes());
    // Firmware does not look at the checksum of an application; 0 means none.
    image[pe.start + 24 + 64..pe.start + 24 + 68].fill(0);
    Ok(image)
}

fn small(value: usize) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::format("unified kernel image", "larger than 4 GiB"))
}

/// What matters of a PE file's headers.
struct Headers {
    start: usize,
    count: usize,
    table: usize,
    section_alignment: usize,
    file_alignment: usize,
    headers_size: usize,
}

impl Headers {
    fn read(file: &[u8]) -> Result<Self> {
        let start = u32_at(file, 0x3c)?;
        if file.get(start..start + 4) != Some(b"PE\0\0") || u16_at(file, start + 24)? != 0x20b {
            return Err(Error::format("systemd's EFI stub", "not a PE32+ program"));
        }
        let alignment = |offset| match u32_at(file, start + 24 + offset)? {
            n if n.is_power_of_two() => Ok(n),
            n => Err(Error::format("systemd's EFI stub", format!("alignment {n}"))),
        };
        Ok(Self {
            start,
            count: u16_at(file, start + 6)?,
            table: start + 24 + u16_at(file, start + 20)?,
            section_alignment: alignment(32)?,
            file_alignment: alignment(36)?,
            headers_size: u32_at(file, start + 24 + 60)?,
        })
    }

    /// The first free address behind the existing sections.
    fn end_of_image(&self, file: &[u8]) -> Result<usize> {
        let mut end = self.headers_size;
        for index in 0..self.count {
            let at = self.table + index * HEADER;
            end = end.max(u32_at(file, at + 12)? + u32_at(file, at + 8)?);
        }
        Ok(end)
    }
}

fn u32_at(file: &[u8], at: usize) -> Result<usize> {
    let bytes = file.get(at..at + 4).and_then(|b| b.first_chunk());
    bytes.map(|b| u32::from_le_bytes(*b) as usize).ok_or_else(|| Error::format("EFI program", "cut short"))
}

fn u16_at(file: &[u8], at: usize) -> Result<usize> {
    let bytes = file.get(at..at + 2).and_then(|b| b.first_chunk());
    bytes
        .map(|b| usize::from(u16::from_le_bytes(*b)))
        .ok_or_else(|| Error::format("EFI program", "cut short"))
}

/// Names, addresses and contents of a PE file's sections: what the loader will see.
pub fn sections(file: &[u8]) -> Result<Vec<(String, usize, &[u8])>> {
    let pe = Headers::read(file)?;
    let mut found = Vec::new();
    for index in 0..pe.count {
        let at = pe.table + index * HEADER;
        let name = file.get(at..at + 8).ok_or_else(|| Error::format("EFI program", "cut short"))?;
        let (size, address, raw) = (u32_at(file, at + 8)?, u32_at(file, at + 12)?, u32_at(file, at + 20)?);
        let size = size.min(u32_at(file, at + 16)?);
        let content = file.get(raw..raw + size).ok_or_else(|| Error::format("EFI program", "cut short"))?;
        found.push((String::from_utf8_lossy(name).trim_end_matches('\0').to_string(), address, content));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A PE32+ file with one section, enough for the fields that matter.
    fn stub() -> Vec<u8> {
        let mut file = vec![0; 0x600];
        let put =
            |file: &mut Vec<u8>, at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(&mut file, 0x3c, &0x80u32.to_le_bytes());
        put(&mut file, 0x80, b"PE\0\0");
        put(&mut file, 0x86, &1u16.to_le_bytes());
        put(&mut file, 0x94, &240u16.to_le_bytes());
        put(&mut file, 0x98, &0x20bu16.to_le_bytes());
        put(&mut file, 0x98 + 32, &0x1000u32.to_le_bytes());
        put(&mut file, 0x98 + 36, &0x200u32.to_le_bytes());
        put(&mut file, 0x98 + 60, &0x400u32.to_le_bytes());
        let table = 0x98 + 240;
        put(&mut file, table, b".text\0\0\0");
        put(&mut file, table + 8, &0x123u32.to_le_bytes());
        put(&mut file, table + 12, &0x1000u32.to_le_bytes());
        put(&mut file, table + 16, &0x200u32.to_le_bytes());
        put(&mut file, table + 20, &0x400u32.to_le_bytes());
        file
    }

    #[test]
    fn sections_follow_each_other_aligned() {
        let linux = vec![7; 5000];
        let parts =
            [Section { name: ".osrel", content: b"ID=atoll\n" }, Section { name: ".linux", content: &linux }];
        let image = link(&stub(), &parts).unwrap();
        let seen = sections(&image).unwrap();
        let shape: Vec<(&str, usize, usize)> =
            seen.iter().map(|(n, a, c)| (n.as_str(), *a, c.len())).collect();
        assert_eq!(shape, [(".text", 0x1000, 0x123), (".osrel", 0x2000, 9), (".linux", 0x3000, 5000)]);
        assert_eq!(seen[2].2, linux);
        assert_eq!(u32_at(&image, 0x98 + 56).unwrap(), 0x5000);
        assert_eq!(image.len() % 0x200, 0);
    }

    #[test]
    fn a_stub_without_room_and_a_stranger_are_refused() {
        let parts: Vec<Section<'_>> = (0..30).map(|_| Section { name: ".x", content: b"" }).collect();
        assert!(link(&stub(), &parts).is_err());
        assert!(link(b"MZ not a program", &[]).is_err());
    }
}
