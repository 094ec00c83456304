//! `atoll-image config`: writes a machine config into the ESP of an image or of the disk it was copied to.
//!
//! A disk also gets ids of its own, an image does not: it may be flashed more than once.
//!
//! Invariant: nothing is written before the partition table has shown to be ours and the config to be right.

use crate::error::{Error, Result};
use crate::{esp, gpt};
use atoll_spec::disk::Guid;
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Labels that make a disk ours, in their order.
const LABELS: [&str; 3] = ["ESP", "STATE", "DATA"];

/// Checks `config` and writes it as `machine.yaml`.
pub fn write(disk: &Path, config: &[u8]) -> Result<()> {
    atoll_spec::machine::document::parse(config)
        .map_err(|e| Error::input("machine config", format!("\n{e}")))?;
    let meta = std::fs::metadata(disk).map_err(Error::file("open", disk))?;
    let is_disk = meta.file_type().is_block_device();
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if is_disk {
        // A device that something mounted or uses cannot be opened exclusively.
        options.custom_flags(OFlags::EXCL.bits().cast_signed());
    }
    let mut file = options.open(disk).map_err(Error::file("open (is it mounted?)", disk))?;
    let partition = find_esp(&mut file, disk)?;
    let mut window = esp::Window::new(&mut file, partition.offset, partition.size);
    esp::write(&mut window, "machine.yaml", config)?;
    if is_disk {
        gpt::give_own_ids(&mut file, random).map_err(Error::file("give ids of its own to", disk))?;
    }
    file.sync_all().map_err(Error::file("write", disk))
}

fn random() -> std::io::Result<Guid> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    Ok(id)
}

/// The ESP of a disk with our partitions.
fn find_esp(file: &mut File, disk: &Path) -> Result<gpt::Found> {
    let not_ours = |problem: String| Error::NotOurs { path: disk.to_path_buf(), problem };
    let found = gpt::read(file).map_err(|e| not_ours(e.to_string()))?;
    let labels: Vec<&str> = found.iter().map(|p| p.label.as_str()).collect();
    if labels != LABELS {
        return Err(not_ours(format!("its partitions are {labels:?}, not {LABELS:?}")));
    }
    Ok(found[0].clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{SECTOR, layout};
    use crate::profile::Disk;

    const CONFIG: &[u8] = include_bytes!("../../examples/machine.yaml");

    fn image(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("disk.raw");
        let layout = layout(Disk { esp: 40, state: 1, data: 1 });
        let mut file =
            File::options().create(true).read(true).write(true).truncate(true).open(&path).unwrap();
        file.set_len(layout.sectors * SECTOR).unwrap();
        gpt::write(&mut file, &layout).unwrap();
        let esp = layout.partitions[0];
        esp::tests::format(esp::Window::new(&mut file, esp.offset(), esp.size()));
        path
    }

    #[test]
    fn the_config_lands_on_the_esp() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path());
        write(&path, CONFIG).unwrap();
        let mut file = File::options().read(true).write(true).open(&path).unwrap();
        let esp = find_esp(&mut file, &path).unwrap();
        let mut window = esp::Window::new(&mut file, esp.offset, esp.size);
        assert_eq!(esp::read(&mut window, "machine.yaml").unwrap(), CONFIG);
    }

    #[test]
    fn a_wrong_config_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path());
        let before = std::fs::read(&path).unwrap();
        assert!(write(&path, b"hostnam: x\n").unwrap_err().to_string().contains("hostnam"));
        assert!(before == std::fs::read(&path).unwrap());
    }

    #[test]
    fn a_strange_disk_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("other");
        let before = vec![1; 100_000];
        std::fs::write(&path, &before).unwrap();
        let error = write(&path, CONFIG).unwrap_err().to_string();
        assert!(error.contains("not an Atoll disk"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}
