//! The scratch disk of a pod: a sparse copy of an empty ext4 file system that is made once.
//!
//! Called by `vm::launch`. Invariant: a template that exists is whole (it gets its name when it is finished), so a copy
//! is a file system that mounts at once.

use crate::error::{Error, Result, within};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::sync::OnceCell;

/// Longest run of `mkfs.ext4`.
const MKFS_DEADLINE: Duration = Duration::from_secs(120);

/// Makes scratch disks.
pub struct Scratch {
    mkfs: PathBuf,
    template: PathBuf,
    bytes: u64,
    made: OnceCell<()>,
}

impl Scratch {
    /// Disks of `mib` MiB; the template lies in `directory`.
    pub fn new(mkfs: &Path, directory: &Path, mib: u32) -> Self {
        Self {
            mkfs: mkfs.to_owned(),
            template: directory.join(format!("scratch-{mib}.template")),
            bytes: u64::from(mib) << 20,
            made: OnceCell::new(),
        }
    }

    /// A new disk at `path`, opened read-write.
    pub async fn copy_to(&self, path: &Path) -> Result<File> {
        self.prepare().await?;
        let (template, path) = (self.template.clone(), path.to_owned());
        let copy = tokio::task::spawn_blocking(move || {
            sparse_copy(&template, &path).map_err(Error::io("make scratch disk", &path))
        });
        copy.await.map_err(|e| Error::Invalid(e.to_string()))?
    }

    /// Makes the template where it is missing; callers at the same time wait for one making.
    pub async fn prepare(&self) -> Result<()> {
        self.made.get_or_try_init(|| self.make_template()).await.map(|_| ())
    }

    async fn make_template(&self) -> Result<()> {
        if self.template.metadata().is_ok_and(|m| m.len() == self.bytes) {
            return Ok(());
        }
        let unfinished = self.template.with_extension("new");
        let file = File::create(&unfinished).map_err(Error::io("create", &unfinished))?;
        file.set_len(self.bytes).map_err(Error::io("size", &unfinished))?;
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
            .args(["-U", "random", "-L", "scratch"])
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
        std::fs::rename(&unfinished, &self.template).map_err(Error::io("rename", &unfinished))
    }
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
