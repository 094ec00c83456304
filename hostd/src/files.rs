//! Small files that other processes read: replaced whole, never seen half-written.

use crate::error::{Context, Result};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Whether a file must survive a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It is made anew at each boot.
    Volatile,
    /// It is on a disk and must be whole after a power cut.
    Durable,
}

/// Replaces `path` by a file with this content, mode and owner.
pub fn replace(
    path: &Path,
    content: &[u8],
    mode: u32,
    owner: Option<u32>,
    durability: Durability,
) -> Result<()> {
    let temporary = path.with_extension("new");
    // A leftover of a crash may have other rights: always a new file.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("remove", temporary.display());
        }
        _ => {}
    }
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .context("create", temporary.display())?;
    let written = (|| {
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        if let Some(owner) = owner.filter(|_| rustix::process::geteuid().is_root()) {
            let (uid, gid) = (rustix::fs::Uid::from_raw(owner), rustix::fs::Gid::from_raw(owner));
            match rustix::fs::fchown(&file, Some(uid), Some(gid)) {
                // In a user namespace that does not have this user.
                Err(rustix::io::Errno::INVAL) => {}
                other => other?,
            }
        }
        if durability == Durability::Durable { file.sync_all() } else { Ok(()) }
    })();
    written.context("write", temporary.display())?;
    fs::rename(&temporary, path).context("replace", path.display())?;
    match path.parent().filter(|_| durability == Durability::Durable) {
        Some(parent) => File::open(parent).and_then(|d| d.sync_all()).context("write", parent.display()),
        None => Ok(()),
    }
}

/// The same, unless the file has this content already. Returns whether it was replaced.
pub fn keep(
    path: &Path,
    content: &[u8],
    mode: u32,
    owner: Option<u32>,
    durability: Durability,
) -> Result<bool> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    replace(path, content, mode, owner, durability).map(|()| true)
}

/// Reads at most `limit` bytes; a longer file is an error, a missing one is `None`.
pub fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    use std::io::Read;
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("open", path.display()),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).context("read", path.display())?;
    if bytes.len() as u64 > limit {
        let error = std::io::Error::other(format!("it has more than {limit} bytes"));
        return Err(error).context("read", path.display());
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        fs::write(path.with_extension("new"), "left over").unwrap();
        replace(&path, b"one", 0o400, None, Durability::Durable).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o400);
        assert!(!keep(&path, b"one", 0o400, None, Durability::Volatile).unwrap());
        assert!(keep(&path, b"two", 0o400, None, Durability::Volatile).unwrap());
        assert_eq!(read(&path, 3).unwrap().unwrap(), b"two");
        assert!(read(&path, 2).is_err());
        assert_eq!(read(&directory.path().join("none"), 3).unwrap(), None);
    }
}
