//! The EFI system partition: made for a new image (by mkfs.fat and mtools, which make no mistakes in directories
//! that firmware or fsck could stumble over), opened in place to write a machine config.

use crate::error::{Error, Result};
use crate::program::Tools;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The time of every file that is written in place: some firmware refuses to rename a file without a valid one, and the boot loader counts
/// its tries by renaming.
#[derive(Debug)]
struct FixedTime;

impl fatfs::TimeProvider for FixedTime {
    fn get_current_date(&self) -> fatfs::Date {
        fatfs::Date { year: 2026, month: 1, day: 1 }
    }

    fn get_current_date_time(&self) -> fatfs::DateTime {
        let time = fatfs::Time { hour: 0, min: 0, sec: 0, millis: 0 };
        fatfs::DateTime { date: self.get_current_date(), time }
    }
}

fn open<F: Read + Write + Seek>(partition: &mut Window<F>) -> io::Result<fatfs::FileSystem<&mut Window<F>>> {
    partition.position = 0;
    fatfs::FileSystem::new(partition, fatfs::FsOptions::new().time_provider(&FixedTime))
}

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

/// Makes the file system of `size` bytes in a new file and puts `files` (path, content) into it.
pub fn make(tools: &Tools, image: &Path, size: u64, files: &[(String, PathBuf)]) -> Result<()> {
    let file = File::create(image).map_err(Error::file("write", image))?;
    file.set_len(size).map_err(Error::file("write", image))?;
    // 4 KiB clusters; --invariant fixes serial number and times.
    let format = tools.mkfs_fat().args(["-F", "32", "-s", "8", "--invariant", "-n", "ATOLL ESP"]);
    format.arg(image).run()?;
    let mut made: Vec<&str> = Vec::new();
    for (path, content) in files {
        for (at, _) in path.match_indices('/') {
            if !made.contains(&&path[..at]) {
                tools.mtools("mmd").arg("-i").arg(image).arg(format!("::{}", &path[..at])).run()?;
                made.push(&path[..at]);
            }
        }
        tools.mtools("mcopy").arg("-i").arg(image).arg(content).arg(format!("::{path}")).run()?;
    }
    Ok(())
}

/// Copies a file into another at an offset, leaving holes where it has zeros.
pub fn embed(image: &Path, disk: &mut File, offset: u64) -> io::Result<()> {
    let mut image = File::open(image)?;
    let mut block = vec![0; 64 * 1024];
    let mut at = offset;
    loop {
        let count = image.read(&mut block)?;
        if count == 0 {
            return Ok(());
        }
        if block[..count].iter().any(|byte| *byte != 0) {
            disk.seek(SeekFrom::Start(at))?;
            disk.write_all(&block[..count])?;
        }
        at += count as u64;
    }
}

/// Writes a file into the root directory of an existing file system. The new content is complete under another
/// name before the old goes.
pub fn write<F: Read + Write + Seek>(partition: &mut Window<F>, name: &str, content: &[u8]) -> Result<()> {
    let write = |partition: &mut Window<F>| -> io::Result<()> {
        let fs = open(partition)?;
        {
            let root = fs.root_dir();
            let new = format!("{name}.new");
            let mut file = root.create_file(&new)?;
            file.truncate()?;
            file.write_all(content)?;
            file.flush()?;
            drop(file);
            match root.remove(name) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            root.rename(&new, &root, name)?;
        }
        fs.unmount()
    };
    write(partition).map_err(Error::file("write to the ESP", name))?;
    partition.flush().map_err(Error::file("write to the ESP", name))
}

/// Reads a file.
pub fn read<F: Read + Write + Seek>(partition: &mut Window<F>, path: &str) -> Result<Vec<u8>> {
    let read = |partition: &mut Window<F>| -> io::Result<Vec<u8>> {
        let fs = open(partition)?;
        let mut content = Vec::new();
        fs.root_dir().open_file(path)?.read_to_end(&mut content)?;
        Ok(content)
    };
    read(partition).map_err(Error::file("read from the ESP", path))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Cursor;

    /// An empty file system in memory, for tests that must not run programs.
    pub(crate) fn format<F: Read + Write + Seek>(mut partition: Window<F>) {
        let options =
            fatfs::FormatVolumeOptions::new().fat_type(fatfs::FatType::Fat32).bytes_per_cluster(512);
        fatfs::format_volume(&mut partition, options).unwrap();
    }

    #[test]
    fn files_are_replaced_and_neighbours_stay() {
        const SIZE: u64 = 40 << 20;
        let mut disk = Cursor::new(vec![0; (SIZE + 1024) as usize]);
        format(Window::new(&mut disk, 512, SIZE));
        let mut esp = Window::new(&mut disk, 512, SIZE);
        let long = vec![42; 100_000];
        write(&mut esp, "neighbour.bin", &long).unwrap();
        write(&mut esp, "machine.yaml", b"one: and longer").unwrap();
        write(&mut esp, "machine.yaml", b"two").unwrap();
        assert_eq!(read(&mut esp, "machine.yaml").unwrap(), b"two");
        assert_eq!(read(&mut esp, "neighbour.bin").unwrap(), long);
        assert!(read(&mut esp, "machine.yaml.new").is_err());
        let bytes = disk.into_inner();
        assert_eq!((&bytes[..512], &bytes[bytes.len() - 512..]), ([0; 512].as_slice(), [0; 512].as_slice()));
    }
}
