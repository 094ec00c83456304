//! The scratch disk of a pod: a sparse copy of an empty ext4 file system that is made once for each size.
//!
//! Called by `vm::launch`. Invariants: a template that exists is whole (it gets its name when it is finished), so a copy
//! is a file system that mounts at once; whatever a pod writes, its disk is the most that it takes of the host's.

use crate::error::{Error, Result, within};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::OnceCell;

/// Longest run of `mkfs.ext4`.
const MKFS_DEADLINE: Duration = Duration::from_secs(120);

/// Room on a disk beside what a pod may write: those who look at its use must see that it is more than allowed, and
/// the file system has tables of its own.
const SLACK: u64 = 64 << 20;

/// The smallest disk, in MiB.
pub const LEAST_MIB: u32 = 64;

/// Makes scratch disks.
pub struct Scratch {
    mkfs: PathBuf,
    directory: PathBuf,
    most_mib: u32,
    /// By size in MiB.
    made: Mutex<BTreeMap<u32, Arc<OnceCell<()>>>>,
}

impl Scratch {
    /// Disks of at most `most_mib` MiB; the templates lie in `directory`.
    pub fn new(mkfs: &Path, directory: &Path, most_mib: u32) -> Self {
        Self { mkfs: mkfs.to_owned(), directory: directory.to_owned(), most_mib, made: Mutex::default() }
    }

    /// A new disk at `path`, opened read-write, for a pod that may write `limit` bytes.
    pub async fn copy_to(&self, path: &Path, limit: Option<u64>) -> Result<File> {
        let template = self.template(disk_mib(limit, self.most_mib)).await?;
        let path = path.to_owned();
        let copy = tokio::task::spawn_blocking(move || {
            sparse_copy(&template, &path).map_err(Error::io("make scratch disk", &path))
        });
        copy.await.map_err(|e| Error::Invalid(e.to_string()))?
    }

    /// Makes the template of a pod without limit.
    pub async fn prepare(&self) -> Result<()> {
        self.template(self.most_mib).await.map(drop)
    }

    /// The template of this size, made where it is missing; callers at the same time wait for one making.
    async fn template(&self, mib: u32) -> Result<PathBuf> {
        let path = self.directory.join(format!("scratch-{mib}.template"));
        let cell = self.made.lock().unwrap_or_else(PoisonError::into_inner).entry(mib).or_default().clone();
        cell.get_or_try_init(|| self.make_template(&path, u64::from(mib) << 20)).await?;
        Ok(path)
    }

    async fn make_template(&self, template: &Path, bytes: u64) -> Result<()> {
        if template.metadata().is_ok_and(|m| m.len() == bytes) {
            return Ok(());
        }
        let unfinished = template.with_extension("new");
        let file = File::create(&unfinished).map_err(Error::io("create", &unfinished))?;
        file.set_len(bytes).map_err(Error::io("size", &unfinished))?;
        drop(file);
        // No journal: nobody mounts this disk again after a crash of its guest.
        let features = "^has_journal,^resize_inode,extent,sparse_super2";
        let child = tokio::process::Command::new(&self.mkfs)
            .args([
                "-q",
                "-F",
                "-m",
                "0",
                "-O",
                features,
                "-E",
                "lazy_itable_init=1,nodiscard,root_owner=0:0",
            ])
            // Left to itself it gives a small disk small blocks, and each page of a file several of them.
            .args(["-b", "4096", "-U", "random", "-L", "scratch"])
            .arg(&unfinished)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .output();
        let output = within(MKFS_DEADLINE, || "mkfs.ext4".to_owned(), child).await?;
        let output = output.map_err(Error::io("run", &self.mkfs))?;
        if !output.status.success() {
            return Err(Error::Step {
                operation: "make scratch template with",
                object: self.mkfs.display().to_string(),
                why: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
        std::fs::rename(&unfinished, template).map_err(Error::io("rename", &unfinished))
    }
}

/// Size of the disk of a pod that may write `limit` bytes: a power of two, so that there are few templates.
fn disk_mib(limit: Option<u64>, most_mib: u32) -> u32 {
    let Some(limit) = limit else { return most_mib };
    let bytes = limit.saturating_add(limit / 4).saturating_add(SLACK);
    let mib = u32::try_from(bytes.div_ceil(1 << 20)).ok().and_then(u32::checked_next_power_of_two);
    mib.map_or(most_mib, |mib| mib.min(most_mib))
}

/// The largest disk of a pod: what was asked for, but never more than half of the file system of `data`, so that no pod
/// fills it alone.
pub fn most_mib(asked: u32, data: &Path) -> Result<u32> {
    let stat = rustix::fs::statvfs(data).map_err(|e| Error::io("measure", data)(e.into()))?;
    let half = (stat.f_blocks.saturating_mul(stat.f_frsize) / 2) >> 20;
    Ok(asked.min(u32::try_from(half).unwrap_or(u32::MAX)).max(LEAST_MIB))
}

/// Copies the data of a sparse file and keeps its holes.
fn sparse_copy(from: &Path, to: &Path) -> io::Result<File> {
    use rustix::fs::{SeekFrom, seek};
    let source = File::open(from)?;
    let target = File::options().read(true).write(true).create(true).truncate(true).open(to)?;
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut at = 0;
    while at < length {
        let data = match seek(source.as_fd(), SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let hole = seek(source.as_fd(), SeekFrom::Hole(data))?;
        let (mut from_offset, mut to_offset) = (data, data);
        while from_offset < hole {
            let chunk = usize::try_from(hole - from_offset).unwrap_or(usize::MAX).min(64 << 20);
            let copied = rustix::fs::copy_file_range(
                source.as_fd(),
                Some(&mut from_offset),
                target.as_fd(),
                Some(&mut to_offset),
                chunk,
            )?;
            if copied == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = hole;
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_disk_is_larger_than_what_may_be_written_and_never_larger_than_the_most() {
        const MOST: u32 = 10 << 10;
        assert_eq!(disk_mib(None, MOST), MOST);
        assert_eq!(disk_mib(Some(1), MOST), 128);
        assert_eq!(disk_mib(Some(64 << 20), MOST), 256);
        assert_eq!(disk_mib(Some(2 << 30), MOST), 4096);
        assert_eq!(disk_mib(Some(9 << 30), MOST), MOST);
        assert_eq!(disk_mib(Some(u64::MAX), MOST), MOST);
    }

    #[test]
    fn no_disk_is_larger_than_half_of_data() {
        let stat = rustix::fs::statvfs("/").unwrap();
        let half = u32::try_from((stat.f_blocks * stat.f_frsize / 2) >> 20).unwrap();
        assert_eq!(most_mib(u32::MAX, Path::new("/")).unwrap(), half);
        assert_eq!(most_mib(64, Path::new("/")).unwrap(), 64);
    }

    #[test]
    fn a_sparse_copy_has_the_data_and_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut file = File::create(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        file.seek(io::SeekFrom::Start(1 << 29)).unwrap();
        file.write_all(b"middle").unwrap();
        drop(file);
        let mut copy = sparse_copy(&path, &dir.path().join("b")).unwrap();
        assert_eq!(copy.metadata().unwrap().len(), 1 << 30);
        assert!(copy.metadata().unwrap().blocks() * 512 < 1 << 20);
        copy.seek(io::SeekFrom::Start(1 << 29)).unwrap();
        let mut text = [0; 6];
        copy.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"middle");
    }
}
