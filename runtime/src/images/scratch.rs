//! Files and directories that exist only while something is under way: below `tmp` of the store, deleted when
//! dropped, and all together when the store is opened.

use super::error::ImageError;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Directory of the store for them.
const TMP: &str = "tmp";
const MAX_TRIES: u32 = 100;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

static NUMBER: AtomicU64 = AtomicU64::new(0);

fn unique(root: &Path, prefix: &str) -> PathBuf {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    root.join(TMP).join(format!("{prefix}-{}-{number}", std::process::id()))
}

/// Deletes what others left, and makes the directory. Others may pass through it, not look.
pub fn clear(root: &Path) -> Result<(), ImageError> {
    let tmp = root.join(TMP);
    let mut tries = 0;
    loop {
        tries += 1;
        match std::fs::remove_dir_all(&tmp) {
            Ok(()) => break,
            Err(error) if error.kind() == ErrorKind::NotFound => break,
            // A helper of a runtime that was killed may still be writing; without its input it ends soon.
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && tries < MAX_TRIES => {
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(ImageError::io("empty", &tmp)(error)),
        }
    }
    std::fs::DirBuilder::new().mode(0o711).create(&tmp).map_err(ImageError::io("make directory", &tmp))
}

/// A path that is deleted with this value.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// A new file.
    pub fn file(root: &Path, prefix: &str) -> Result<(Self, File), ImageError> {
        let path = unique(root, prefix);
        let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = opened.map_err(ImageError::io("make", &path))?;
        Ok((Self { path }, file))
    }

    /// A new directory, owned by the user that will work in it.
    pub fn directory(root: &Path, uid: Option<u32>) -> Result<Self, ImageError> {
        let path = unique(root, "work");
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(ImageError::io("make directory", &path))?;
        let scratch = Self { path };
        if uid.is_some() {
            let chown = std::os::unix::fs::chown(&scratch.path, uid, uid);
            chown.map_err(ImageError::io("change the owner of", &scratch.path))?;
        }
        Ok(scratch)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = match std::fs::symlink_metadata(&self.path) {
            Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(&self.path),
            Ok(_) => std::fs::remove_file(&self.path),
            // Moved away: what it was for.
            Err(_) => return,
        };
        if let Err(error) = removed {
            tracing::warn!("cannot delete {}: {error}; the next start will", self.path.display());
        }
    }
}
