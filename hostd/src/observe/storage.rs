//! Disks and partitions from sysfs (there is no udev), what is on them, and what is mounted.

use crate::error::{Context, Result};
use crate::gpt;
use crate::plan::storage::{BACKUPS, BEGINNING, Content, Disk, Observed, Partition, content, is_backup};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where the kernel's views are; other directories in tests.
#[derive(Debug, Clone)]
pub struct Sources {
    /// `/sys`.
    pub sys: PathBuf,
    /// `/dev`.
    pub dev: PathBuf,
    /// `/proc/self/mountinfo`.
    pub mountinfo: PathBuf,
    /// Ids that partitions had when the firmware saw them, and have now: a line each, with a space between.
    pub changed_ids: PathBuf,
}

/// Variable of the boot loader that names the partition it was loaded from.
const BOOT_VARIABLE: &str = "LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// Kinds of block devices that are never a machine's disk.
const NOT_DISKS: [&str; 4] = ["ram", "zram", "fd", "sr"];

/// Looks at everything.
pub fn observe(from: &Sources) -> Result<Observed> {
    let (mounted, sources) = mounts(&from.mountinfo)?;
    let disks = disks(from)?;
    let named = boot_partition(&from.sys.join("firmware/efi/efivars").join(BOOT_VARIABLE));
    let changed = fs::read_to_string(&from.changed_ids).unwrap_or_default();
    Ok(Observed { boot_partition: named.map(|uuid| id_now(uuid, &changed, &disks)), disks, mounted, sources })
}

fn disks(from: &Sources) -> Result<Vec<Disk>> {
    let class = from.sys.join("class/block");
    let mut disks = BTreeMap::new();
    let mut partitions = Vec::new();
    let entries = match fs::read_dir(&class) {
        Ok(entries) => entries,
        // No block layer, no disks: a diskless machine.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("list", class.display()),
    };
    for entry in entries.flatten() {
        let directory = entry.path();
        let uevent = uevent(&directory);
        let Some(name) = uevent.get("DEVNAME").cloned() else { continue };
        match uevent.get("DEVTYPE").map(String::as_str) {
            Some("disk") if !NOT_DISKS.iter().any(|kind| name.starts_with(kind)) => {
                let disk = Disk {
                    device: from.dev.join(&name),
                    bytes: number(&directory, "size") * 512,
                    removable: number(&directory, "removable") == 1,
                    by_backup: false,
                    ids_of_the_image: false,
                    partitions: Vec::new(),
                };
                disks.insert(name, disk);
            }
            Some("partition") => {
                // The link leads to .../block/vda/vda3.
                let parent =
                    fs::canonicalize(&directory).ok().and_then(|p| p.parent().map(Path::to_path_buf));
                let parent = parent.and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
                partitions.push((parent.unwrap_or_default(), partition(from, &directory, &name, &uevent)));
            }
            _ => {}
        }
    }
    for (parent, partition) in partitions {
        if let Some(disk) = disks.get_mut(&parent) {
            disk.partitions.push(partition);
        }
    }
    let mut disks: Vec<Disk> = disks.into_values().collect();
    for disk in &mut disks {
        disk.partitions.sort_by_key(|p| p.number);
        look_inside(disk);
    }
    Ok(disks)
}

fn uevent(directory: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(directory.join("uevent")).unwrap_or_default();
    text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn number(directory: &Path, file: &str) -> u64 {
    fs::read_to_string(directory.join(file)).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

fn partition(from: &Sources, directory: &Path, name: &str, uevent: &BTreeMap<String, String>) -> Partition {
    Partition {
        device: from.dev.join(name),
        number: uevent.get("PARTN").and_then(|n| n.parse().ok()).unwrap_or(0),
        label: uevent.get("PARTNAME").cloned().unwrap_or_default(),
        uuid: uevent.get("PARTUUID").map(|u| u.to_ascii_lowercase()),
        start: number(directory, "start") * 512,
        bytes: number(directory, "size") * 512,
        content: Content::Blank,
    }
}

/// Reads the beginning of our partitions, and the partition table: whether it is whole, and ids that the kernel does not
/// tell.
fn look_inside(disk: &mut Disk) {
    let ours = disk.partitions.iter().any(|p| p.label == "STATE");
    for partition in &mut disk.partitions {
        if ours && matches!(partition.label.as_str(), "ESP" | "STATE" | "DATA") {
            partition.content = inside(&partition.device, &partition.label)
                .unwrap_or_else(|error| Content::Unreadable(error.to_string()));
        }
    }
    if !ours && disk.partitions.iter().all(|p| p.uuid.is_some()) {
        return;
    }
    let Ok(table) = read_table(&disk.device) else { return };
    disk.by_backup = table.source() == gpt::Source::Backup;
    disk.ids_of_the_image = table.has_ids_of_the_image();
    for entry in table.entries() {
        if let Some(partition) = disk.partitions.iter_mut().find(|p| p.number == entry.number) {
            partition.uuid.get_or_insert(entry.uuid);
        }
    }
}

/// What is on a partition that should be our volume of this label.
pub fn inside(device: &Path, label: &str) -> std::io::Result<Content> {
    let mut file = File::open(device)?;
    let mut bytes = Vec::new();
    file.by_ref().take(BEGINNING).read_to_end(&mut bytes)?;
    let found = content(&bytes);
    let ours = |at: &u64| {
        let mut backup = [0; 1024];
        // Beyond the end of a small partition there is none.
        file.read_exact_at(&mut backup, *at).is_ok() && is_backup(&backup, label)
    };
    Ok(if found == Content::Unknown && BACKUPS.iter().any(ours) { Content::Damaged } else { found })
}

/// Reads and checks the partition table of a disk.
pub fn read_table(device: &Path) -> Result<gpt::Table> {
    let disk = File::open(device).context("open", device.display())?;
    let sector = rustix::fs::ioctl_blksszget(&disk).unwrap_or(512) as usize;
    let bytes = rustix::fs::seek(&disk, rustix::fs::SeekFrom::End(0)).context("measure", device.display())?;
    let mut start = vec![0; gpt::TABLE_BYTES];
    let mut end = start.clone();
    disk.read_exact_at(&mut start, 0)
        .and_then(|()| disk.read_exact_at(&mut end, bytes.saturating_sub(gpt::TABLE_BYTES as u64)))
        .context("read the partition table of", device.display())?;
    gpt::Table::parse(gpt::Ends { start: &start, end: &end, bytes, sector }).map_err(|source| {
        crate::error::Error::PartitionTable { device: device.display().to_string(), source }
    })
}

/// Four bytes of attributes, then text in UTF-16.
fn boot_partition(variable: &Path) -> Option<String> {
    let bytes = fs::read(variable).ok()?;
    let units: Vec<u16> = bytes.get(4..)?.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
    let text = String::from_utf16(&units).ok()?;
    Some(text.trim_end_matches('\0').to_ascii_lowercase()).filter(|t| !t.is_empty())
}

/// The id that the partition has now which had `uuid` when the firmware saw it. It was written down before it was given,
/// so it counts only when some partition has it.
fn id_now(uuid: String, changed: &str, disks: &[Disk]) -> String {
    let changed = changed.lines().filter_map(|line| line.split_once(' '));
    let mut now = changed.filter(|(old, _)| *old == uuid).map(|(_, now)| now.to_owned());
    let has = |id: &String| disks.iter().flat_map(|d| &d.partitions).any(|p| p.uuid.as_ref() == Some(id));
    now.rfind(has).unwrap_or(uuid)
}

/// Where something is mounted, and what. A line: `22 1 0:20 / /state rw,noatime - ext4 /dev/vda3 rw`.
fn mounts(mountinfo: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let text = fs::read_to_string(mountinfo).context("read", mountinfo.display())?;
    let targets = text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect();
    let source = |line: &str| Some(PathBuf::from(line.split_once(" - ")?.1.split(' ').nth(1)?));
    Ok((targets, text.lines().filter_map(source).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysfs_becomes_disks_and_partitions() {
        let root = tempfile::tempdir().unwrap();
        let sys = root.path().join("sys");
        let disk = sys.join("devices/pci/block/vda");
        let part = disk.join("vda3");
        fs::create_dir_all(&part).unwrap();
        fs::create_dir_all(sys.join("class/block")).unwrap();
        fs::create_dir_all(sys.join("firmware/efi/efivars")).unwrap();
        fs::write(disk.join("uevent"), "MAJOR=254\nDEVNAME=vda\nDEVTYPE=disk\n").unwrap();
        fs::write(disk.join("size"), "2048\n").unwrap();
        fs::write(
            part.join("uevent"),
            "DEVNAME=vda3\nDEVTYPE=partition\nPARTN=3\nPARTNAME=STATE\nPARTUUID=AB\n",
        )
        .unwrap();
        fs::write(part.join("start"), "64\n").unwrap();
        fs::write(part.join("size"), "128\n").unwrap();
        for (name, to) in [("vda", &disk), ("vda3", &part)] {
            std::os::unix::fs::symlink(to, sys.join("class/block").join(name)).unwrap();
        }
        let text: Vec<u8> = "AB-CD\0".encode_utf16().flat_map(u16::to_le_bytes).collect();
        fs::write(sys.join("firmware/efi/efivars").join(BOOT_VARIABLE), [&[6, 0, 0, 0], &text[..]].concat())
            .unwrap();
        let mountinfo = root.path().join("mountinfo");
        fs::write(&mountinfo, "22 1 0:20 / /state rw,noatime - ext4 /dev/vda3 rw\n").unwrap();
        let changed_ids = root.path().join("changed-ids");
        let from = Sources { sys, dev: "/dev".into(), mountinfo, changed_ids };
        let observed = observe(&from).unwrap();
        assert_eq!(observed.boot_partition.as_deref(), Some("ab-cd"));
        // Written down, then the power was cut or the write failed: the old one counts.
        fs::write(&from.changed_ids, "ef 01\nab-cd other\n").unwrap();
        assert_eq!(observe(&from).unwrap().boot_partition.as_deref(), Some("ab-cd"));
        fs::write(&from.changed_ids, "ef 01\nab-cd ab\n").unwrap();
        assert_eq!(
            observe(&from).unwrap().boot_partition.as_deref(),
            Some("ab"),
            "what the partition has now"
        );
        assert_eq!(observed.mounted, [PathBuf::from("/state")]);
        assert_eq!(observed.sources, [PathBuf::from("/dev/vda3")]);
        let found = &observed.disks[0];
        assert_eq!((found.device.as_path(), found.bytes), (Path::new("/dev/vda"), 1 << 20));
        let partition = &found.partitions[0];
        assert_eq!((partition.number, partition.label.as_str(), partition.start), (3, "STATE", 32768));
        assert!(matches!(partition.content, Content::Unreadable(_) | Content::Blank | Content::Other(_)));
    }
}
