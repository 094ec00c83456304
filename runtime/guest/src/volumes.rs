//! What containers mount beside their image: published trees, directories that the pod's containers share, files.
//!
//! Names come from the runtime and become file names, so they are checked. Invariant: the directory of a tree or a
//! volume, once made, keeps its inode for the life of the guest, because containers have it mounted.

use crate::error::{Context as _, Failure, Result};
use crate::mount::Detached;
use crate::stats::tree_size;
use crate::tree;
use base64::Engine as _;
use rustix::mount::MountAttrFlags;
use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Longest name of a tree or volume.
const MAX_NAME: usize = 200;

/// The pod's volumes.
pub struct Volumes {
    /// On a tmpfs.
    trees: PathBuf,
    /// Mount points of volumes in memory.
    memory: PathBuf,
    /// Volumes on the scratch disk.
    disk: PathBuf,
    mounted: Mutex<HashSet<(String, bool)>>,
    publishing: Mutex<u64>,
}

fn check_name(name: &str) -> Result<&str> {
    let ok = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.bytes().all(ok) {
        return Err(Failure::invalid(format!(
            "'{name}' is not a name for a volume: use 1 to {MAX_NAME} of a-z, A-Z, 0-9, '-', '_' and '.'"
        )));
    }
    Ok(name)
}

impl Volumes {
    /// Makes the directories; `run` is in memory, `scratch` is where containers write.
    pub fn new(run: &Path, scratch: &Path) -> Result<Self> {
        let volumes = Self {
            trees: run.join("trees"),
            memory: run.join("memory"),
            disk: scratch.join("volumes"),
            mounted: Mutex::default(),
            publishing: Mutex::default(),
        };
        for directory in [&volumes.trees, &volumes.memory, &volumes.disk] {
            std::fs::create_dir_all(directory)
                .during(|| format!("make directory {}", directory.display()))?;
        }
        Ok(volumes)
    }

    /// Replaces a tree by what the archive holds. Archives of different trees may arrive at once; the exchange itself is
    /// done by one at a time.
    pub fn publish(&self, name: &str, archive: impl Read) -> Result<()> {
        let live = self.trees.join(check_name(name)?);
        let number = {
            let mut counter = self.publishing.lock().unwrap_or_else(PoisonError::into_inner);
            *counter += 1;
            *counter
        };
        let fresh = self.trees.join(format!(".fresh-{number}"));
        std::fs::create_dir(&fresh).during(|| format!("make directory {}", fresh.display()))?;
        let outcome = tree::unpack(archive, &fresh).and_then(|()| {
            let _alone = self.publishing.lock().unwrap_or_else(PoisonError::into_inner);
            std::fs::create_dir_all(&live).during(|| format!("make directory {}", live.display()))?;
            tree::replace(&live, &fresh)
        });
        let removed = std::fs::remove_dir_all(&fresh).during(|| format!("delete {}", fresh.display()));
        outcome.and(removed)
    }

    /// Directory of a published tree.
    pub fn tree(&self, name: &str) -> Result<PathBuf> {
        let path = self.trees.join(check_name(name)?);
        if path.is_dir() {
            Ok(path)
        } else {
            Err(Failure::not_found(format!("no tree '{name}' was published")))
        }
    }

    /// Directory of a shared volume, made at its first use.
    pub fn scratch(&self, name: &str, memory: bool, size_bytes: Option<u64>) -> Result<PathBuf> {
        let base = if memory { &self.memory } else { &self.disk };
        let path = base.join(check_name(name)?);
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (name.to_owned(), memory);
        if mounted.contains(&key) {
            return Ok(path);
        }
        std::fs::create_dir_all(&path).during(|| format!("make directory {}", path.display()))?;
        if memory {
            let size = size_bytes.map(|bytes| bytes.to_string());
            let mut options = vec![("mode", "1777")];
            options.extend(size.as_deref().map(|size| ("size", size)));
            let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
            Detached::filesystem("tmpfs", &options, attributes)?.attach_at(&path)?;
        }
        // Every user of every container of the pod may write here, whatever the umask.
        set_mode(&path, 0o777)?;
        mounted.insert(key);
        Ok(path)
    }

    /// Bytes in each volume on the scratch disk. Those in memory have their limit from the file system.
    pub fn usage(&self) -> BTreeMap<String, u64> {
        let mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<String> =
            mounted.iter().filter(|(_, memory)| !memory).map(|(name, _)| name.clone()).collect();
        // Looking takes its time: nobody who starts a container has to wait for it.
        drop(mounted);
        let size = |name: String| {
            let (bytes, _) = tree_size(&self.disk.join(&name));
            (name, bytes)
        };
        names.into_iter().map(size).collect()
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .during(|| format!("set the mode of {}", path.display()))
}

/// Decodes and writes a file that will be mounted.
pub fn write_file(path: &Path, base64: &str, mode: u32) -> Result<()> {
    let content = base64::engine::general_purpose::STANDARD
        .decode(base64)
        .map_err(|error| Failure::invalid(format!("the content of a mounted file is not base64: {error}")))?;
    if content.len() > atoll_spec::guest::MAX_FILE {
        return Err(Failure::invalid(format!("a mounted file has {} bytes, too many", content.len())));
    }
    std::fs::write(path, content).during(|| format!("write {}", path.display()))?;
    set_mode(path, mode & 0o7777)
}

/// Reads such a file back.
pub fn read_file(path: &Path) -> Result<String> {
    let limit = atoll_spec::guest::MAX_FILE as u64;
    let mut content = Vec::new();
    let file = std::fs::File::open(path).during(|| format!("open {}", path.display()))?;
    file.take(limit).read_to_end(&mut content).during(|| format!("read {}", path.display()))?;
    Ok(base64::engine::general_purpose::STANDARD.encode(content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_names() {
        for bad in ["", ".", "..", ".fresh-1", "a/b", "a\0b", &"x".repeat(201)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_name("default-token_1.x").is_ok());
    }

    #[test]
    fn volumes_on_the_disk_are_measured() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(&dir.path().join("run"), &dir.path().join("scratch")).unwrap();
        let path = volumes.scratch("v-1", false, None).unwrap();
        volumes.scratch("v-2", false, None).unwrap();
        std::fs::write(path.join("file"), vec![1; 1 << 20]).unwrap();
        let usage = volumes.usage();
        assert!(usage["v-1"] >= 1 << 20 && usage["v-2"] < 1 << 20, "{usage:?}");
    }

    #[test]
    fn files_come_back_as_they_went() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_file(&path, "aGVsbG8=", 0o666).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666);
        assert_eq!(read_file(&path).unwrap(), "aGVsbG8=");
        assert!(write_file(&path, "%", 0o666).is_err());
    }
}
