//! Paths inside a root that cannot be trusted: images and volumes bring symbolic links that point anywhere.
//!
//! Every lookup goes through `openat2` with `RESOLVE_IN_ROOT`, so the kernel keeps it below the root even
//! while a container changes the tree. Missing parts are made one at a time in directories that were looked up
//! that way.

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2, readlinkat};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

/// Links followed by our own hand when a dangling one is in the way.
const MAX_LINKS: u32 = 40;

/// What to make when nothing is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory, mode 0755.
    Directory,
    /// An empty file, mode 0644.
    File,
}

/// Opens what `path` means below `root`, for use as a mount point (`O_PATH`).
pub fn open(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    open_with(root, path, OFlags::PATH)
}

/// Opens what `path` means below `root` with the given flags.
pub fn open_with(root: impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let relative = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        // EAGAIN: something was renamed during the lookup, so that the kernel cannot tell whether it left the root.
        match openat2(&root, relative, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
}

/// As [`open`], making what is missing, parents included.
pub fn ensure(root: impl AsFd, path: &Path, kind: Kind) -> Result<OwnedFd, Errno> {
    ensure_following(root.as_fd(), path, kind, MAX_LINKS)
}

fn ensure_following(root: impl AsFd + Copy, path: &Path, kind: Kind, links: u32) -> Result<OwnedFd, Errno> {
    match open(root, path) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let path = lexical(path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::NOENT) };
    let directory = ensure_following(root, parent, Kind::Directory, links)?;
    // A dangling link: make what it points to, seen from its directory but never above the root.
    if let Ok(target) = readlinkat(&directory, name, Vec::new()) {
        let target = Path::new(std::ffi::OsStr::from_bytes(target.as_bytes()));
        let links = links.checked_sub(1).ok_or(Errno::LOOP)?;
        return ensure_following(root, &parent.join(target), kind, links);
    }
    match kind {
        Kind::Directory => match mkdirat(&directory, name, Mode::from_raw_mode(0o755)) {
            Err(error) if error != Errno::EXIST => return Err(error),
            _ => {}
        },
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(&directory, name, flags, Mode::from_raw_mode(0o644)).map(drop)?;
        }
    }
    open(root, &path)
}

/// The path from the root without `.`, with `..` taken back by name. Used only for parts that do not exist yet,
/// where a name is all there is.
fn lexical(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Whether an opened thing is a directory.
pub fn is_directory(fd: impl AsFd) -> bool {
    fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        (dir, fd)
    }

    #[test]
    fn missing_parts_are_made_inside() {
        let (dir, fd) = root();
        ensure(&fd, Path::new("/a/b/c"), Kind::File).unwrap();
        assert!(dir.path().join("a/b/c").is_file());
        ensure(&fd, Path::new("/a/../d/./e"), Kind::Directory).unwrap();
        assert!(dir.path().join("d/e").is_dir());
        ensure(&fd, Path::new("/"), Kind::Directory).unwrap();
    }

    #[test]
    fn links_do_not_lead_out() {
        let (dir, fd) = root();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), dir.path().join("abs")).unwrap();
        symlink("../../../../../../../..", dir.path().join("up")).unwrap();
        symlink("/etc/there", dir.path().join("file")).unwrap();
        ensure(&fd, Path::new("/abs/x"), Kind::File).unwrap();
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0, "nothing was made outside");
        assert!(dir.path().join(outside.path().strip_prefix("/").unwrap()).join("x").is_file());
        ensure(&fd, Path::new("/up/y"), Kind::File).unwrap();
        assert!(dir.path().join("y").is_file());
        ensure(&fd, Path::new("/file"), Kind::File).unwrap();
        assert!(dir.path().join("etc/there").is_file());
    }

    #[test]
    fn link_loops_end() {
        let (dir, fd) = root();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        assert!(ensure(&fd, Path::new("/a/x"), Kind::File).is_err());
    }
}
