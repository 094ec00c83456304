//! The disk of a machine that is off, seen and changed from outside: what damages a disk, or a person who mounts it
//! elsewhere, does to it.

use crate::process::run_ok;
use anyhow::{Context, ensure};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(120);
const SECTOR: u64 = 512;

/// A partition on the disk of a machine.
#[derive(Debug, Clone)]
pub struct Volume {
    disk: PathBuf,
    /// Where it begins, in bytes.
    offset: u64,
    /// Its size in the image. The host makes DATA larger.
    bytes: u64,
}

impl Volume {
    /// The partition of this label. `image` is what the overlay `disk` was made from: the host moves no beginning.
    ///
    /// # Errors
    /// When the image has no such partition.
    pub fn find(image: &Path, disk: &Path, label: &str) -> anyhow::Result<Self> {
        let mut file =
            std::fs::File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
        let mut table = [0; 128 * 128];
        file.seek(SeekFrom::Start(2 * SECTOR))?;
        file.read_exact(&mut table)?;
        let word = |entry: &[u8], at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&entry[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let name = |entry: &[u8]| {
            let units = entry[56..128].chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
            String::from_utf16_lossy(&units.take_while(|unit| *unit != 0).collect::<Vec<_>>())
        };
        let entry = table.chunks_exact(128).find(|entry| name(entry) == label);
        let entry = entry.with_context(|| format!("{} has no partition {label}", image.display()))?;
        let (first, last) = (word(entry, 32), word(entry, 40));
        ensure!(last > first, "partition {label} of {} is empty", image.display());
        Ok(Self { disk: disk.to_owned(), offset: first * SECTOR, bytes: (last + 1 - first) * SECTOR })
    }

    /// Overwrites a part with one byte value.
    ///
    /// # Errors
    /// When qemu-io fails.
    pub fn overwrite(&self, at: u64, length: u64, value: u8) -> anyhow::Result<()> {
        let write = format!("write -q -P {value} {} {length}", self.offset + at);
        run_ok(Command::new("qemu-io").args(["-f", "qcow2", "-c", &write]).arg(&self.disk), DEADLINE)
            .map(drop)
    }

    /// What is in a part.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn read(&self, at: u64, length: u64) -> anyhow::Result<Vec<u8>> {
        let copy = self.disk.with_extension("part");
        let part = Self { offset: self.offset + at, bytes: length, ..self.clone() };
        part.copy_out(&copy)?;
        std::fs::read(&copy).with_context(|| format!("cannot read {}", copy.display()))
    }

    /// Puts a file into the root of a FAT file system, in place of one of the same name.
    ///
    /// # Errors
    /// When qemu-img or mtools fail.
    pub fn put_file(&self, name: &str, content: &str) -> anyhow::Result<()> {
        let (copy, source) = (self.disk.with_extension("fat"), self.disk.with_extension("file"));
        self.copy_out(&copy)?;
        std::fs::write(&source, content)?;
        let mut command = Command::new("mcopy");
        command.args(["-o", "-i"]).arg(&copy).arg(&source).arg(format!("::{name}"));
        run_ok(&mut command, DEADLINE)?;
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-n", "-f", "raw", "--target-image-opts"]).arg(&copy).arg(self.options());
        run_ok(&mut command, DEADLINE).map(drop)
    }

    fn copy_out(&self, to: &Path) -> anyhow::Result<()> {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-O", "raw", "--image-opts"]).arg(self.options()).arg(to);
        run_ok(&mut command, DEADLINE).map(drop)
    }

    fn options(&self) -> String {
        format!(
            "driver=raw,offset={},size={},file.driver=qcow2,file.file.driver=file,file.file.filename={}",
            self.offset,
            self.bytes,
            self.disk.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    /// An image of 8 MiB with a FAT partition `ESP` from 1 MiB on, and an overlay of it.
    fn disk(directory: &Path) -> (PathBuf, PathBuf) {
        let (image, overlay) = (directory.join("image.raw"), directory.join("disk.qcow2"));
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(8 << 20).unwrap();
        let mut entry = [0_u8; 128];
        entry[32..40].copy_from_slice(&2048_u64.to_le_bytes());
        entry[40..48].copy_from_slice(&(2048 + 8191_u64).to_le_bytes());
        for (unit, at) in "ESP".encode_utf16().zip((56..).step_by(2)) {
            entry[at..at + 2].copy_from_slice(&unit.to_le_bytes());
        }
        file.write_all_at(&entry, 2 * SECTOR + 128).unwrap();
        let at = format!("{}@@1M", image.display());
        run_ok(
            Command::new("mformat").args(["-i", &at, "-T", "8192", "-h", "16", "-s", "32", "::"]),
            DEADLINE,
        )
        .unwrap();
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&image).arg(&overlay).arg("16M");
        run_ok(&mut command, DEADLINE).unwrap();
        (image, overlay)
    }

    #[test]
    fn a_partition_of_the_overlay_is_changed_and_the_image_is_not() {
        let directory = std::env::temp_dir().join(format!("atoll-disk-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (image, overlay) = disk(&directory);
        let before = std::fs::read(&image).unwrap();
        assert!(Volume::find(&image, &overlay, "DATA").is_err());
        let esp = Volume::find(&image, &overlay, "ESP").unwrap();
        for text in ["first\n", "a longer second one\n"] {
            esp.put_file("machine.yaml", text).unwrap();
            let copy = directory.join("copy.fat");
            std::fs::write(&copy, esp.read(0, 4 << 20).unwrap()).unwrap();
            let shown =
                run_ok(Command::new("mtype").arg("-i").arg(&copy).arg("::machine.yaml"), DEADLINE).unwrap();
            assert_eq!(shown, text);
        }
        esp.overwrite(4096, 2048, 0x5a).unwrap();
        assert_eq!(esp.read(4096, 2048).unwrap(), [0x5a; 2048]);
        assert_ne!(esp.read(4096 + 2048, 512).unwrap(), [0x5a; 512]);
        assert!(std::fs::read(&image).unwrap() == before);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
