//! Storage steps: partition tables, mkfs, fsck, mount.

use super::program::{PATIENCE, Patience, run};
use crate::error::{Context, Error, Result};
use crate::files::{self, Durability};
use crate::observe::storage::read_table;
use crate::plan::storage::{Mounting, Step};
use crate::sys;
use rustix::mount::{MountFlags, mount};
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

/// For those that are one call of the kernel: not enforced, only told.
const OTHER_DEADLINE: Duration = Duration::from_secs(30);

/// How long a step may take, or until it is told how far it is.
pub fn within(step: &Step) -> Duration {
    match step {
        Step::Format { .. } | Step::Check { .. } | Step::GrowFilesystem { .. } => {
            PATIENCE.silent + PATIENCE.grace * 2
        }
        Step::RestoreTable { .. }
        | Step::OwnIds { .. }
        | Step::GrowPartition { .. }
        | Step::Mount { .. }
        | Step::MountMemory { .. }
        | Step::Directory { .. } => OTHER_DEADLINE,
    }
}

/// Does one step. `tell` is told how far it is when it takes long.
pub async fn apply(step: &Step, tell: &(dyn Fn(&str) + Sync)) -> Result<()> {
    match step {
        Step::RestoreTable { disk } => restore_table(disk),
        Step::OwnIds { disk, changed_ids } => give_own_ids(disk, changed_ids),
        Step::GrowPartition { disk, number } => grow_partition(disk, *number),
        Step::Format { device, label } => format(device, label, tell).await,
        Step::Check { device, whole } => check(device, *whole, &PATIENCE, tell).await,
        Step::Mount { device, target, how } => mount_volume(device, target, *how),
        Step::GrowFilesystem { device } => {
            let outcome = run("resize2fs", &[device.as_os_str()], device, &PATIENCE, tell).await?;
            outcome.expect_success("resize2fs", device)
        }
        Step::MountMemory { target, percent } => {
            let options = format!("size={percent}%,mode=0755");
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
            let options = std::ffi::CString::new(options).map_err(std::io::Error::other);
            let options = options.context("mount memory at", target.display())?;
            mount("tmpfs", target, "tmpfs", flags, options.as_c_str())
                .context("mount memory at", target.display())
        }
        Step::Directory { path, mode, owner } => directory(path, *mode, *owner),
    }
}

fn restore_table(disk: &Path) -> Result<()> {
    let table = read_table(disk)?;
    let file = OpenOptions::new().write(true).open(disk).context("open for writing", disk.display())?;
    write_table(&file, disk, &table.restore())
}

/// In this order, each safely on the disk before the next: a power cut leaves one whole table.
fn write_table(file: &fs::File, disk: &Path, writes: &[(u64, Vec<u8>)]) -> Result<()> {
    for (offset, content) in writes {
        file.write_all_at(content, *offset).context("write the partition table of", disk.display())?;
        file.sync_all().context("write the partition table of", disk.display())?;
    }
    Ok(())
}

fn give_own_ids(disk: &Path, changed_ids: &Path) -> Result<()> {
    let shown = disk.display();
    let table = read_table(disk)?;
    let file = OpenOptions::new().read(true).write(true).open(disk).context("open for writing", &shown)?;
    let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).context("measure", &shown)?;
    let mut failed = None;
    let random = || {
        let mut id = [0; 16];
        failed = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()).err().or(failed);
        id
    };
    let identity = table
        .with_own_ids(bytes, random)
        .map_err(|source| Error::PartitionTable { device: shown.to_string(), source })?;
    failed.map_or(Ok(()), Err).context("get random ids for", &shown)?;
    // First written down: hostd may be started again in between, and then looks for the disk by what the firmware said.
    let lines: String = identity.ids.iter().map(|(old, new)| format!("{old} {new}\n")).collect();
    files::replace(changed_ids, lines.as_bytes(), 0o600, None, Durability::Volatile)?;
    write_table(&file, disk, &identity.writes)
}

fn grow_partition(disk: &Path, number: u32) -> Result<()> {
    let shown = disk.display();
    let table = read_table(disk)?;
    let file = OpenOptions::new().read(true).write(true).open(disk).context("open for writing", &shown)?;
    let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).context("measure", &shown)?;
    let growth = table
        .grow(number, bytes)
        .map_err(|source| Error::PartitionTable { device: shown.to_string(), source })?;
    let Some(growth) = growth else { return Ok(()) };
    write_table(&file, disk, &growth.writes)?;
    sys::resize_partition(&file, number, growth.start, growth.length).context("resize a partition of", &shown)
}

async fn format(device: &Path, label: &str, tell: &(dyn Fn(&str) + Sync)) -> Result<()> {
    let device_argument = device.as_os_str();
    let arguments = ["-q", "-F", "-L", label, "-m", "1", "-E", "nodiscard", "-O", "metadata_csum,64bit"];
    let mut all: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    all.push(device_argument);
    run("mkfs.ext4", &all, device, &PATIENCE, tell).await?.expect_success("mkfs.ext4", device)
}

/// Mends what can be mended: first what is certain, then everything, because nobody can answer questions here.
async fn check(device: &Path, whole: bool, patience: &Patience, tell: &(dyn Fn(&str) + Sync)) -> Result<()> {
    for mode in ["-p", "-y"] {
        let arguments = check_arguments(mode, device, whole);
        let outcome = run("e2fsck", &arguments, device, patience, tell).await?;
        match outcome.code {
            Some(0) => return Ok(()),
            // Mended; 2 asks for a reboot only when the file system was mounted, which it was not.
            Some(1..=3) => {
                tracing::warn!(device = %device.display(), "file system had errors and was mended");
                return Ok(());
            }
            // Also one that cannot be used at all (8): without questions, it looks for a backup of the superblock.
            Some(_) if mode == "-p" => {
                tracing::warn!(device = %device.display(), words = outcome.words, "file system needs a full repair");
            }
            _ => {
                return outcome
                    .expect_success("e2fsck", device)
                    .map_err(|error| beyond_repair(device, &error));
            }
        }
    }
    Ok(())
}

/// How far it is comes on its output, among its words.
fn check_arguments<'a>(mode: &'a str, device: &'a Path, whole: bool) -> Vec<&'a OsStr> {
    let whole = whole.then_some("-f").into_iter();
    whole.chain(["-C", "1", mode]).map(OsStr::new).chain([device.as_os_str()]).collect()
}

fn beyond_repair(device: &Path, error: &Error) -> Error {
    Error::Host(format!(
        "the file system on {} cannot be repaired and is left as it is ({error}): save what is on it with another \
         system, or flash the disk again, which empties it, and boot again",
        device.display()
    ))
}

fn mount_volume(device: &Path, target: &Path, how: Mounting) -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let (kind, flags, options) = match how {
        // The ESP may hold a join token: root only.
        Mounting::Esp => ("vfat", safe | MountFlags::NOEXEC | MountFlags::RDONLY, c"fmask=0177,dmask=0077"),
        Mounting::Ext4 => ("ext4", safe | MountFlags::NOATIME, c"errors=remount-ro"),
    };
    fs::create_dir_all(target)
        .or_else(|error| if target.is_dir() { Ok(()) } else { Err(error) })
        .context("create", target.display())?;
    mount(device, target, kind, flags, options)
        .context("mount", format_args!("{} ({kind}) at {}", device.display(), target.display()))
}

fn directory(path: &Path, mode: u32, owner: u32) -> Result<()> {
    fs::create_dir_all(path).context("create", path.display())?;
    // Only root can give directories away; as anyone else (on a development machine) they stay one's own.
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (rustix::fs::Uid::from_raw(owner), rustix::fs::Gid::from_raw(owner));
        match rustix::fs::chown(path, Some(uid), Some(gid)) {
            // In a user namespace that does not have this user.
            Err(rustix::io::Errno::INVAL) => {}
            other => other.context("change the owner of", path.display())?,
        }
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).context("change the mode of", path.display())
}

#[cfg(test)]
mod tests {
    use super::super::program::Progress;
    use super::*;
    use crate::gpt::Source;
    use crate::observe::storage::inside;
    use crate::plan::storage::{BACKUPS, BEGINNING, Content};
    use std::process::Command as Blocking;

    /// A volume of ours with a file in it, in a file; of blocks of 1 KiB when small.
    async fn volume(directory: &Path, mib: u64) -> std::path::PathBuf {
        let path = directory.join(format!("{mib}.ext4"));
        fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
        format(&path, "DATA", &|_| {}).await.unwrap();
        fs::write(directory.join("precious"), "precious").unwrap();
        debugfs(&path, &["-w", "-R", &format!("write {} precious", directory.join("precious").display())]);
        path
    }

    fn debugfs(path: &Path, arguments: &[&str]) -> String {
        let output = Blocking::new("debugfs").args(arguments).arg(path).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
        OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
    }

    /// A disk with one partition, whose primary table is not there.
    fn disk_with_a_backup(path: &Path) {
        let last = 4095u64;
        fs::File::create(path).unwrap().set_len((last + 1) * 512).unwrap();
        let mut entries = vec![0; 128 * 128];
        entries[..16].fill(1);
        entries[16..32].copy_from_slice(&atoll_spec::disk::of_the_image([1; 16]));
        entries[32..40].copy_from_slice(&2048u64.to_le_bytes());
        entries[40..48].copy_from_slice(&4000u64.to_le_bytes());
        let mut header =
            [&b"EFI PART"[..], &0x10000u32.to_le_bytes(), &92u32.to_le_bytes(), &[0; 8]].concat();
        for word in [last, 1, 34, last - 33, 7, 7, last - 32, 128 | 128 << 32] {
            header.extend(word.to_le_bytes());
        }
        header.extend(crc32fast::hash(&entries).to_le_bytes());
        let sum = crc32fast::hash(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        overwrite(path, (last - 32) * 512, &entries);
        overwrite(path, last * 512, &header);
    }

    #[test]
    fn a_primary_table_that_is_gone_is_restored_from_the_backup() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        disk_with_a_backup(&path);
        let found = read_table(&path).unwrap();
        assert_eq!((found.source(), found.entries()[0].last), (Source::Backup, 4000));
        restore_table(&path).unwrap();
        let restored = read_table(&path).unwrap();
        assert_eq!((restored.source(), restored.entries()), (Source::Primary, found.entries()));
    }

    #[test]
    fn ids_are_written_down_before_they_are_given() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        disk_with_a_backup(&path);
        let old = read_table(&path).unwrap().entries()[0].uuid.clone();
        let before = fs::read(&path).unwrap();
        give_own_ids(&path, &directory.path().join("missing/changed-ids")).unwrap_err();
        assert!(fs::read(&path).unwrap() == before, "not one byte is changed");
        let changed = directory.path().join("changed-ids");
        give_own_ids(&path, &changed).unwrap();
        let table = read_table(&path).unwrap();
        assert!(!table.has_ids_of_the_image() && table.source() == Source::Primary);
        let new = &table.entries()[0].uuid;
        assert_ne!(&old, new);
        assert_eq!(fs::read_to_string(&changed).unwrap(), format!("{old} {new}\n"));
        disk_with_a_backup(&path);
        give_own_ids(&path, &changed).unwrap();
        assert_ne!(&read_table(&path).unwrap().entries()[0].uuid, new, "no two disks get the same");
    }

    #[tokio::test]
    async fn a_lost_superblock_is_restored_from_its_backup_with_all_files() {
        let directory = tempfile::tempdir().unwrap();
        for mib in [64, 600] {
            let path = volume(directory.path(), mib).await;
            assert!(matches!(inside(&path, "DATA").unwrap(), Content::Ext4(_)));
            overwrite(&path, 1024, &[0; 1024]);
            assert_eq!(inside(&path, "DATA").unwrap(), Content::Damaged, "{mib} MiB");
            assert_eq!(inside(&path, "STATE").unwrap(), Content::Unknown, "another label, another owner");
            check(&path, true, &PATIENCE, &|_| {}).await.unwrap();
            assert_eq!(debugfs(&path, &["-R", "cat precious"]), "precious", "{mib} MiB");
            check(&path, true, &PATIENCE, &|_| {}).await.unwrap();
        }
    }

    #[tokio::test]
    async fn damaged_inode_tables_are_mended() {
        let directory = tempfile::tempdir().unwrap();
        let path = volume(directory.path(), 64).await;
        let tables = debugfs(&path, &["-R", "stats"]);
        let block: u64 = tables
            .lines()
            .find_map(|line| line.split("inode table at ").nth(1))
            .and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
            .unwrap_or_else(|| panic!("{tables}"));
        overwrite(&path, block * 1024, &[0x5a; 16 * 1024]);
        assert!(matches!(inside(&path, "DATA").unwrap(), Content::Ext4(_)));
        check(&path, false, &PATIENCE, &|_| {}).await.unwrap();
        check(&path, true, &PATIENCE, &|_| {}).await.unwrap();
        let clean = Blocking::new("e2fsck").args(["-f", "-n"]).arg(&path).output().unwrap();
        assert!(clean.status.success(), "{}", String::from_utf8_lossy(&clean.stdout));
    }

    #[tokio::test]
    async fn what_cannot_be_repaired_is_left_as_it_is_and_says_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let path = volume(directory.path(), 64).await;
        let noise: Vec<u8> = (0..BEGINNING).map(|n| (n * 7 % 251) as u8).collect();
        overwrite(&path, 0, &noise);
        for at in
            BACKUPS.into_iter().filter(|at| *at < 64 << 20).chain([24_577 << 10, 40_961 << 10, 57_345 << 10])
        {
            overwrite(&path, at, &[0x11; 1024]);
        }
        assert_eq!(inside(&path, "DATA").unwrap(), Content::Unknown);
        let before = fs::read(&path).unwrap();
        let error = check(&path, true, &PATIENCE, &|_| {}).await.unwrap_err().to_string();
        assert!(error.contains("left as it is") && error.contains("flash the disk again"), "{error}");
        assert!(fs::read(&path).unwrap() == before, "not one byte is changed");
    }
    /// That the program whose lines are read is the one there is: their form is nowhere promised.
    #[tokio::test]
    async fn a_check_tells_how_far_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = volume(directory.path(), 600).await;
        let arguments = check_arguments("-p", &path, true);
        let output = Blocking::new("e2fsck").args(arguments).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let passes: Vec<u32> =
            text.lines().filter_map(Progress::parse).map(|progress| progress.pass).collect();
        assert_eq!((passes.first(), passes.last()), (Some(&1), Some(&5)), "{text}");
    }
}
