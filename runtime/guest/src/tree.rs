//! Published trees: read-only directories that the runtime sends as tar archives and sends again when they change.
//!
//! Containers have the tree's directory mounted, so that directory must stay; what is in it is replaced entry by
//! entry, each by one rename or exchange. A tree of the kind that Kubernetes volumes are (`key -> ..data/key`,
//! `..data -> ..<timestamp>`) changes in the order that makes the one exchange of `..data` the moment of change:
//!
//! ```text
//! new ..<timestamp> directory ─► ..data ─► names ─► what is no longer there goes
//! ```
//!
//! Trees live in memory: secrets never reach a disk.

use crate::error::{Context as _, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Most entries of one archive.
const MAX_ENTRIES: usize = 100_000;

/// Unpacks an archive into an empty directory. Owners, modes and links are kept; nothing leaves the directory.
pub fn unpack(archive: impl Read, directory: &Path) -> Result<()> {
    let mut archive = tar::Archive::new(archive);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(rustix::process::geteuid().is_root());
    archive.set_overwrite(true);
    let entries = archive.entries().during(|| "read the tree's archive".into())?;
    for (count, entry) in entries.enumerate() {
        let mut entry = entry.during(|| "read the tree's archive".into())?;
        if count >= MAX_ENTRIES {
            return Err(crate::error::Failure::invalid(format!(
                "the tree has more than {MAX_ENTRIES} entries"
            )));
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if entry.header().entry_type().is_dir() && matches!(name.trim_end_matches('/'), "" | ".") {
            set_attributes(directory, entry.header())?;
            continue;
        }
        // `false` means that the name would leave the directory; such an entry is no part of a tree.
        let inside = entry.unpack_in(directory).during(|| format!("unpack '{name}' of the tree"))?;
        if !inside {
            return Err(crate::error::Failure::invalid(format!("the tree's entry '{name}' leads out of it")));
        }
    }
    Ok(())
}

/// The tree's own directory, which the archive calls `.`.
fn set_attributes(directory: &Path, header: &tar::Header) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let what = || format!("set the attributes of {}", directory.display());
    if rustix::process::geteuid().is_root() {
        let id = |id: std::io::Result<u64>| id.ok().and_then(|id| u32::try_from(id).ok());
        std::os::unix::fs::chown(directory, id(header.uid()), id(header.gid())).during(what)?;
    }
    let mode = header.mode().during(what)?;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(mode & 0o7777)).during(what)
}

/// When an entry is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    Versions,
    Pointer,
    Names,
}

fn turn(name: &OsStr) -> Turn {
    match name.as_bytes() {
        b"..data" => Turn::Pointer,
        name if name.starts_with(b"..") => Turn::Versions,
        _ => Turn::Names,
    }
}

fn entries(directory: &Path) -> Result<BTreeSet<OsString>> {
    let what = || format!("list {}", directory.display());
    let list = std::fs::read_dir(directory).during(what)?;
    list.map(|entry| entry.map(|entry| entry.file_name())).collect::<std::io::Result<_>>().during(what)
}

/// Makes `live` show what `fresh` has; `fresh` is left with what is no longer needed. Both are on one file system.
pub fn replace(live: &Path, fresh: &Path) -> Result<()> {
    let mut incoming: Vec<OsString> = entries(fresh)?.into_iter().collect();
    incoming.sort_by_key(|name| turn(name));
    for name in &incoming {
        let (new, old) = (fresh.join(name), live.join(name));
        let same_link = match (std::fs::read_link(&new), std::fs::read_link(&old)) {
            (Ok(new), Ok(old)) => new == old,
            _ => false,
        };
        if same_link {
            continue;
        }
        let flags = match std::fs::symlink_metadata(&old) {
            Ok(_) => RenameFlags::EXCHANGE,
            Err(_) => RenameFlags::NOREPLACE,
        };
        renameat_with(CWD, &new, CWD, &old, flags).during(|| format!("publish {}", old.display()))?;
    }
    let keep: BTreeSet<OsString> = incoming.into_iter().collect();
    for name in entries(live)?.difference(&keep) {
        remove(&live.join(name))?;
    }
    copy_attributes(fresh, live)
}

/// The tree's own directory keeps its inode, so mode and owner are copied.
fn copy_attributes(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let what = || format!("set the attributes of {}", to.display());
    let metadata = std::fs::metadata(from).during(what)?;
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid())).during(what)?;
    }
    std::fs::set_permissions(to, metadata.permissions()).during(what)
}

fn remove(path: &Path) -> Result<()> {
    let metadata = std::fs::symlink_metadata(path).during(|| format!("look at {}", path.display()))?;
    let removed = if metadata.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    removed.during(|| format!("remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn version(directory: &Path, stamp: &str, keys: &[(&str, &str)]) {
        fs::create_dir_all(directory.join(stamp)).unwrap();
        symlink(stamp, directory.join("..data")).unwrap();
        for (key, value) in keys {
            fs::write(directory.join(stamp).join(key), value).unwrap();
            symlink(format!("..data/{key}"), directory.join(key)).unwrap();
        }
    }

    fn archive(directory: &Path) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        builder.follow_symlinks(false);
        builder.append_dir_all(".", directory).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn a_volume_changes_in_place() {
        let top = tempfile::tempdir().unwrap();
        let (live, first, second) = (top.path().join("live"), top.path().join("1"), top.path().join("2"));
        fs::create_dir(&live).unwrap();
        version(&first, "..2026_1", &[("a", "old"), ("gone", "x")]);
        version(&second, "..2026_2", &[("a", "new"), ("b", "more")]);
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let before = inode(&live);
        for source in [&first, &second] {
            let fresh = top.path().join("fresh");
            fs::create_dir(&fresh).unwrap();
            unpack(archive(source).as_slice(), &fresh).unwrap();
            replace(&live, &fresh).unwrap();
            fs::remove_dir_all(&fresh).unwrap();
        }
        assert_eq!(inode(&live), before, "mounts of the directory stay good");
        assert_eq!(fs::read_to_string(live.join("a")).unwrap(), "new");
        assert_eq!(fs::read_to_string(live.join("b")).unwrap(), "more");
        let names: Vec<_> = entries(&live).unwrap().into_iter().collect();
        assert_eq!(names, ["..2026_2", "..data", "a", "b"]);
    }

    #[test]
    fn the_tree_itself_has_the_mode_it_had() {
        use std::os::unix::fs::PermissionsExt as _;
        let top = tempfile::tempdir().unwrap();
        let (source, fresh) = (top.path().join("source"), top.path().join("fresh"));
        fs::create_dir(&source).unwrap();
        fs::create_dir(&fresh).unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o3770)).unwrap();
        unpack(archive(&source).as_slice(), &fresh).unwrap();
        assert_eq!(fs::metadata(&fresh).unwrap().permissions().mode() & 0o7777, 0o3770);
    }

    #[test]
    fn plain_trees_and_repeats_work() {
        let top = tempfile::tempdir().unwrap();
        let (live, fresh) = (top.path().join("live"), top.path().join("fresh"));
        fs::create_dir_all(live.join("dir")).unwrap();
        fs::write(live.join("dir/old"), "").unwrap();
        fs::create_dir_all(fresh.join("dir")).unwrap();
        fs::write(fresh.join("dir/new"), "").unwrap();
        fs::write(fresh.join("file"), "1").unwrap();
        replace(&live, &fresh).unwrap();
        assert!(
            live.join("dir/new").exists() && !live.join("dir/old").exists() && live.join("file").exists()
        );
    }

    #[test]
    fn archives_that_lead_out_are_refused() {
        let top = tempfile::tempdir().unwrap();
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..9].copy_from_slice(b"../escape");
        header.set_size(0);
        header.set_mode(0o644);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, &[][..]).unwrap();
        let bytes = builder.into_inner().unwrap();
        let inner = top.path().join("inner");
        fs::create_dir(&inner).unwrap();
        assert!(unpack(bytes.as_slice(), &inner).is_err());
        assert!(!top.path().join("escape").exists());
    }
}
