//! The EFI system partition: made for a new image, opened in place to write a machine config.

use crate::error::{Error, Result};
use std::io::{self, Read, Seek, SeekFrom, Write};

/// Serial number of the file system, fixed so that the same image has the same bytes.
const VOLUME_ID: u32 = 0xa701_1001;

/// A range of a file or device that acts as a file.
pub struct Window<F> {
    file: F,
    offset: u64,
    size: u64,
    position: u64,
}

impl<F: Seek> Window<F> {
    /// The `size` bytes at `offset`.
    pub fn new(file: F, offset: u64, size: u64) -> Self {
        Self { file, offset, size, position: 0 }
    }

    /// Seeks and says how many of `wanted` bytes are left.
    fn at(&mut self, wanted: usize) -> io::Result<usize> {
        self.file.seek(SeekFrom::Start(self.offset + self.position))?;
        let left = usize::try_from(self.size - self.position).unwrap_or(usize::MAX);
        Ok(wanted.min(left))
    }
}

impl<F: Read + Seek> Read for Window<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.at(buffer.len())?;
        let count = self.file.read(&mut buffer[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}

impl<F: Write + Seek> Write for Window<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.at(bytes.len())?;
        let count = self.file.write(&bytes[..count])?;
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl<F: Seek> Seek for Window<F> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(n) => self.size.checked_add_signed(n),
            SeekFrom::Current(n) => self.position.checked_add_signed(n),
        };
        match target.filter(|n| *n <= self.size) {
            Some(n) => {
                self.position = n;
                Ok(n)
            }
            None => Err(io::Error::new(io::ErrorKind::InvalidInput, "outside the partition")),
        }
    }
}

/// Makes the file system and writes `files` (path, content) into it.
pub fn make<F: Read + Write + Seek>(mut partition: Window<F>, files: &[(String, &[u8])]) -> Result<()> {
    let failed = Error::file("make the file system of", "ESP");
    let options = fatfs::FormatVolumeOptions::new().fat_type(fatfs::FatType::Fat32);
    let options = options.volume_id(VOLUME_ID).volume_label(*b"ATOLL ESP  ").bytes_per_cluster(4096);
    fatfs::format_volume(&mut partition, options).map_err(failed)?;
    for (path, content) in files {
        write(&mut partition, path, content)?;
    }
    Ok(())
}

/// Writes a file, and the directories above it, into an existing file system. The new content is complete under
/// another name before the old goes.
pub fn write<F: Read + Write + Seek>(partition: &mut Window<F>, path: &str, content: &[u8]) -> Result<()> {
    partition.position = 0;
    let write = |partition: &mut Window<F>| -> io::Result<()> {
        let fs = fatfs::FileSystem::new(partition, fatfs::FsOptions::new())?;
        {
            let root = fs.root_dir();
            let mut at = 0;
            while let Some(next) = path[at..].find('/') {
                at += next;
                root.create_dir(&path[..at])?;
                at += 1;
            }
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            let dir = if dir.is_empty() { root } else { root.open_dir(dir)? };
            let new = format!("{name}.new");
            let mut file = dir.create_file(&new)?;
            file.truncate()?;
            file.write_all(content)?;
            file.flush()?;
            drop(file);
            match dir.remove(name) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            dir.rename(&new, &dir, name)?;
        }
        fs.unmount()
    };
    write(partition).map_err(Error::file("write to the ESP", path))?;
    partition.flush().map_err(Error::file("write to the ESP", path))
}

/// Reads a file.
pub fn read<F: Read + Write + Seek>(partition: &mut Window<F>, path: &str) -> Result<Vec<u8>> {
    partition.position = 0;
    let read = |partition: &mut Window<F>| -> io::Result<Vec<u8>> {
        let fs = fatfs::FileSystem::new(partition, fatfs::FsOptions::new())?;
        let mut content = Vec::new();
        fs.root_dir().open_file(path)?.read_to_end(&mut content)?;
        Ok(content)
    };
    read(partition).map_err(Error::file("read from the ESP", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    const SIZE: u64 = 280 << 20;

    fn made() -> Vec<u8> {
        let mut disk = Cursor::new(vec![0; (SIZE + 1024) as usize]);
        let long = vec![42; 100_000];
        let files = [("EFI/Linux/atoll-0.1.0+3.efi".to_string(), long.as_slice()), ("loader/loader.conf".into(), b"x")];
        make(Window::new(&mut disk, 512, SIZE), &files).unwrap();
        disk.into_inner()
    }

    #[test]
    fn files_are_replaced_and_neighbours_stay() {
        let mut disk = Cursor::new(made());
        let mut esp = Window::new(&mut disk, 512, SIZE);
        write(&mut esp, "machine.yaml", b"one: and longer").unwrap();
        write(&mut esp, "machine.yaml", b"two").unwrap();
        assert_eq!(read(&mut esp, "machine.yaml").unwrap(), b"two");
        assert_eq!(read(&mut esp, "EFI/Linux/atoll-0.1.0+3.efi").unwrap(), vec![42; 100_000]);
        assert!(read(&mut esp, "machine.yaml.new").is_err());
        let bytes = disk.into_inner();
        assert_eq!((&bytes[..512], &bytes[bytes.len() - 512..]), ([0; 512].as_slice(), [0; 512].as_slice()));
    }

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        assert!(made() == made());
    }
}
