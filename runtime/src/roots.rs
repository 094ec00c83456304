//! Host paths that a client names, and how far they may lead.
//!
//! A client of CRI names directories to mount and files to log into, and the runtime, which is root, opens them. The node
//! agent, which talks to the network, must not become root by that. So nothing is opened but what lies below a declared
//! root, found from the root's own descriptor; what was opened is looked at and worked on by its descriptor, for whoever
//! owns the directories may exchange what a path means at any time. Called by `volumes` and `logs`. Invariants: no link
//! leads out of a root; what is opened belongs to the root's owner, so that a hard link gives nobody the file of another.

use crate::config::Config;
use crate::error::{Error, Result};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// Opening again a name that others move about: the kernel asks for it, rarely.
const TRIES: usize = 16;

/// The directories below which a client may name paths.
#[derive(Debug, Clone)]
pub struct Roots {
    volumes: Vec<PathBuf>,
    logs: Vec<PathBuf>,
}

/// A file or directory below a root, opened as a place only: nothing has been read, nothing happens to a device.
#[derive(Debug)]
pub struct Found {
    path: PathBuf,
    place: OwnedFd,
    stat: Stat,
}

impl Found {
    /// What it was called.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// Its permissions.
    pub fn mode(&self) -> u32 {
        self.stat.st_mode & 0o7777
    }

    /// Its length in bytes, when it was opened.
    pub fn length(&self) -> u64 {
        u64::try_from(self.stat.st_size).unwrap_or_default()
    }

    /// Whose it is, as all that lies in it must be.
    pub fn owner(&self) -> u32 {
        self.stat.st_uid
    }

    /// The very same file or directory, to be read or written.
    pub fn open(&self, flags: OFlags) -> io::Result<File> {
        reopen(self.place.as_fd(), flags)
    }

    /// A path that means the very same directory as long as this value lives.
    pub fn stable_path(&self) -> PathBuf {
        descriptor_path(self.place.as_fd())
    }
}

fn descriptor_path(descriptor: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into()
}

/// Opens what a descriptor of a place stands for.
pub fn reopen(place: BorrowedFd<'_>, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
    Ok(rustix::fs::open(descriptor_path(place), flags, Mode::empty())?.into())
}

impl Roots {
    /// As the settings have them.
    pub fn new(config: &Config) -> Self {
        Self { volumes: config.volume_roots.clone(), logs: config.log_roots.clone() }
    }

    /// Two directories, for tests.
    #[cfg(test)]
    pub fn below(volumes: &Path, logs: &Path) -> Self {
        Self { volumes: vec![volumes.to_owned()], logs: vec![logs.to_owned()] }
    }

    /// What a mount names. Links are followed (`key → ..data/key`), but not out of the root.
    pub fn volume(&self, path: &Path) -> Result<Found> {
        let (root, inside) = below(&self.volumes, path, "mounts", "--volume-root")?;
        let directory = open_root(root)?;
        let owner = stat(directory.as_fd(), root)?.st_uid;
        let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let place = open_inside(directory.as_fd(), inside, OFlags::PATH, resolve)
            .map_err(|error| not_opened(error, "mount", path, root))?;
        let stat = stat(place.as_fd(), path)?;
        if stat.st_uid != owner {
            return Err(foreign(path, stat.st_uid, root, owner));
        }
        Ok(Found { path: path.to_owned(), place, stat })
    }

    /// Whether logs may go to this path, or below it.
    pub fn check_log(&self, path: &Path) -> Result<()> {
        below(&self.logs, path, "logs", "--log-root").map(|_| ())
    }

    /// Opens a log to append to (and to see how it ends), and makes it and its directories where they are missing. Logs can hold anything, so they
    /// are for root and for whoever owns the directory (the agent, which serves them) alone.
    pub fn log(&self, path: &Path) -> Result<File> {
        let (root, inside) = below(&self.logs, path, "logs", "--log-root")?;
        let (Some(parent), Some(name)) = (inside.parent(), inside.file_name()) else {
            return Err(Error::Invalid(format!("log path {} names no file", path.display())));
        };
        let failed = |error: Errno| not_opened(error, "open log", path, root);
        let mut directory = open_root(root)?;
        for step in parent.components() {
            directory = enter(directory.as_fd(), Path::new(step.as_os_str())).map_err(failed)?;
        }
        // A FIFO must not hold us up.
        let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::NONBLOCK;
        let file = open_inside(directory.as_fd(), Path::new(name), flags, NO_LINKS).map_err(failed)?;
        let (of_file, of_directory) = (stat(file.as_fd(), path)?, stat(directory.as_fd(), path)?);
        if FileType::from_raw_mode(of_file.st_mode) != FileType::RegularFile {
            return Err(Error::Refused(format!(
                "{} is no file that a log can be written to",
                path.display()
            )));
        }
        if of_file.st_uid != of_directory.st_uid {
            // Made just now, or by a predecessor that came no further; a file of ours that is linked to here is not.
            let own = rustix::process::geteuid().as_raw();
            if of_file.st_uid != own || of_file.st_size != 0 || of_file.st_nlink != 1 {
                return Err(foreign(path, of_file.st_uid, root, of_directory.st_uid));
            }
            give(file.as_fd(), &of_directory).map_err(failed)?;
        }
        Ok(file.into())
    }
}

/// For logs, nothing of whose way the owner may make a link.
const NO_LINKS: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);

/// The root that a path lies below, and its way from there.
fn below<'a>(roots: &'a [PathBuf], path: &'a Path, what: &str, flag: &str) -> Result<(&'a Path, &'a Path)> {
    if !path.is_absolute() || path.components().any(|c| matches!(c, Component::ParentDir)) {
        return Err(Error::Invalid(format!("host path '{}' must be absolute, without '..'", path.display())));
    }
    let found = roots.iter().find_map(|root| Some((root.as_path(), path.strip_prefix(root).ok()?)));
    found.ok_or_else(|| {
        let roots: Vec<String> = roots.iter().map(|root| root.display().to_string()).collect();
        let roots = roots.join(" or ");
        Error::Refused(format!(
            "{} is not below {roots}, the only place on the host for {what}: put it there, or start the runtime with \
             {flag} for where it is",
            path.display()
        ))
    })
}

/// Roots are the settings', and nobody but root can exchange what they name.
fn open_root(root: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(root, flags, Mode::empty()).map_err(|e| Error::io("open", root)(e.into()))
}

fn open_inside(
    directory: BorrowedFd<'_>,
    inside: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    let mode = if flags.contains(OFlags::CREATE) { Mode::from_raw_mode(0o640) } else { Mode::empty() };
    for _ in 0..TRIES {
        match rustix::fs::openat2(directory, inside, flags, mode, resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
    }
    Err(Errno::AGAIN)
}

/// The next directory of a log's way, made where it is missing and then given to the owner of the one that it is in.
fn enter(directory: BorrowedFd<'_>, name: &Path) -> rustix::io::Result<OwnedFd> {
    let open = || open_inside(directory, name, OFlags::RDONLY | OFlags::DIRECTORY, NO_LINKS);
    match open() {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    let made = rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o755));
    if !matches!(made, Ok(()) | Err(Errno::EXIST)) {
        made?;
    }
    let new = open()?;
    if made.is_ok() {
        give(new.as_fd(), &rustix::fs::fstat(directory)?)?;
    }
    Ok(new)
}

/// Only root can give files away; as anybody else they stay one's own.
fn give(file: BorrowedFd<'_>, to: &Stat) -> rustix::io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let (uid, gid) = (rustix::fs::Uid::from_raw(to.st_uid), rustix::fs::Gid::from_raw(to.st_gid));
    rustix::fs::fchown(file, Some(uid), Some(gid))
}

fn stat(file: BorrowedFd<'_>, path: &Path) -> Result<Stat> {
    rustix::fs::fstat(file).map_err(|e| Error::io("look at", path)(e.into()))
}

fn not_opened(error: Errno, operation: &'static str, path: &Path, root: &Path) -> Error {
    match error {
        Errno::XDEV | Errno::LOOP => Error::Refused(format!(
            "cannot {operation} {}: a link on the way leads out of {}, or may not be there; name what it leads to, below that directory",
            path.display(),
            root.display()
        )),
        error => Error::io(operation, path)(error.into()),
    }
}

fn foreign(path: &Path, uid: u32, root: &Path, owner: u32) -> Error {
    Error::Refused(format!(
        "{} belongs to user {uid}, and what lies below {} must belong to user {owner}: copy it, a link to the file of \
         another gives no right to it",
        path.display(),
        root.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::fs::{MetadataExt, chown, symlink};

    /// Directory of volumes, directory of logs, and a secret outside both.
    fn host() -> (tempfile::TempDir, Roots) {
        let dir = tempfile::tempdir().unwrap();
        for name in ["pods", "log", "root"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("root/secret"), "of root").unwrap();
        let roots = Roots::below(&dir.path().join("pods"), &dir.path().join("log"));
        (dir, roots)
    }

    fn refused<T: std::fmt::Debug>(result: Result<T>) -> String {
        match result {
            Err(Error::Refused(why)) => why,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn what_lies_outside_is_refused_with_path_root_and_remedy() {
        let (dir, roots) = host();
        let secret = dir.path().join("root/secret");
        let (volume, log) = (refused(roots.volume(&secret)), refused(roots.log(&secret)));
        for (why, root, flag) in [(volume, "pods", "--volume-root"), (log, "log", "--log-root")] {
            assert!(why.contains(&secret.display().to_string()), "{why}");
            assert!(why.contains(&dir.path().join(root).display().to_string()), "{why}");
            assert!(why.contains(flag), "{why}");
        }
        // A name that only begins like a root, and a way back up.
        refused(roots.volume(&dir.path().join("pods2")));
        let up = dir.path().join("pods/../root/secret");
        assert!(matches!(roots.volume(&up), Err(Error::Invalid(_))));
        assert!(matches!(roots.log(&up), Err(Error::Invalid(_))));
        assert_eq!(fs::read_to_string(secret).unwrap(), "of root");
    }

    #[test]
    fn links_lead_to_what_is_inside_and_never_out() {
        let (dir, roots) = host();
        let pods = dir.path().join("pods");
        fs::create_dir(pods.join("..1")).unwrap();
        fs::write(pods.join("..1/key"), "value").unwrap();
        symlink("..1", pods.join("..data")).unwrap();
        symlink("..data/key", pods.join("key")).unwrap();
        let mut content = String::new();
        let found = roots.volume(&pods.join("key")).unwrap();
        found.open(OFlags::RDONLY).unwrap().read_to_string(&mut content).unwrap();
        assert_eq!(content, "value");
        for (name, target) in [
            ("absolute", dir.path().join("root")),
            ("relative", "../root".into()),
            ("magic", "/proc/self/root".into()),
        ] {
            symlink(&target, pods.join(name)).unwrap();
            for path in [pods.join(name), pods.join(name).join("secret")] {
                let why = refused(roots.volume(&path));
                assert!(why.contains("leads out of"), "{why}");
            }
        }
    }

    #[test]
    fn a_log_goes_through_no_link_at_all() {
        let (dir, roots) = host();
        let log = dir.path().join("log");
        symlink(dir.path().join("root"), log.join("pod")).unwrap();
        refused(roots.log(&log.join("pod/secret")));
        refused(roots.log(&log.join("pod/new/0.log")));
        symlink(dir.path().join("root/secret"), log.join("0.log")).unwrap();
        refused(roots.log(&log.join("0.log")));
        // Neither one that stays inside: whoever may make it may name what it leads to.
        fs::create_dir(log.join("there")).unwrap();
        symlink("there", log.join("inside")).unwrap();
        refused(roots.log(&log.join("inside/0.log")));
        assert_eq!(fs::read_to_string(dir.path().join("root/secret")).unwrap(), "of root");
        assert_eq!(fs::read_dir(dir.path().join("root")).unwrap().count(), 1);
    }

    #[test]
    fn the_file_of_another_is_no_volume_and_no_log_whatever_its_name() {
        if !rustix::process::geteuid().is_root() {
            return; // it takes two users
        }
        let (dir, roots) = host();
        for root in ["pods", "log"] {
            chown(dir.path().join(root), Some(800), Some(800)).unwrap();
            fs::hard_link(dir.path().join("root/secret"), dir.path().join(root).join("mine")).unwrap();
        }
        for why in [
            refused(roots.volume(&dir.path().join("pods/mine"))),
            refused(roots.log(&dir.path().join("log/mine"))),
        ] {
            assert!(why.contains("belongs to user 0") && why.contains("user 800"), "{why}");
        }
        let metadata = fs::metadata(dir.path().join("root/secret")).unwrap();
        assert_eq!(metadata.uid(), 0, "it was given away");
    }

    #[test]
    fn what_is_found_stays_the_same_whatever_its_path_means_by_then() {
        let (dir, roots) = host();
        let path = dir.path().join("pods/message");
        fs::write(&path, "").unwrap();
        let found = roots.volume(&path).unwrap();
        fs::remove_file(&path).unwrap();
        symlink(dir.path().join("root/secret"), &path).unwrap();
        found.open(OFlags::RDWR).unwrap().write_all(b"overwritten").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("root/secret")).unwrap(), "of root");
    }

    #[test]
    fn directories_exchanged_for_links_at_any_moment_lead_nowhere() {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        let (dir, roots) = host();
        let (log, pods) = (dir.path().join("log"), dir.path().join("pods"));
        for root in [&log, &pods] {
            fs::create_dir(root.join("pod")).unwrap();
            fs::write(root.join("pod/secret"), "of the pod").unwrap();
            symlink("../root", root.join("link")).unwrap();
        }
        let over = std::sync::atomic::AtomicBool::new(false);
        let (mut opened, mut written, mut stolen) = (0, 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    for root in [&log, &pods] {
                        let (pod, link) = (root.join("pod"), root.join("link"));
                        renameat_with(CWD, pod, CWD, link, RenameFlags::EXCHANGE).unwrap();
                    }
                }
            });
            for _ in 0..5000 {
                if let Ok(mut file) = roots.log(&log.join("pod/secret")) {
                    file.write_all(b".").unwrap();
                    written += 1;
                }
                if let Ok(found) = roots.volume(&pods.join("pod/secret")) {
                    let mut content = String::new();
                    found.open(OFlags::RDONLY).unwrap().read_to_string(&mut content).unwrap();
                    opened += usize::from(content == "of the pod");
                    stolen += usize::from(content == "of root");
                }
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(opened > 0 && written > 0, "neither was ever there: {opened} {written}");
        assert_eq!(stolen, 0);
        assert_eq!(fs::read_to_string(dir.path().join("root/secret")).unwrap(), "of root");
    }

    #[test]
    fn a_log_and_its_directories_belong_to_the_owner_of_the_root() {
        let (dir, roots) = host();
        let is_root = rustix::process::geteuid().is_root();
        let owner = if is_root { 800 } else { rustix::process::geteuid().as_raw() };
        chown(dir.path().join("log"), Some(owner), None).unwrap();
        let path = dir.path().join("log/pod/container/0.log");
        drop(roots.log(&path).unwrap());
        for path in path.ancestors().take(3) {
            assert_eq!(fs::metadata(path).unwrap().uid(), owner, "{}", path.display());
        }
        // Made by a predecessor that came no further.
        if is_root {
            chown(&path, Some(0), None).unwrap();
        }
        roots.log(&path).unwrap().write_all(b"x").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().uid(), owner);
        drop(roots.log(&path).unwrap());
    }

    #[test]
    fn a_pipe_in_the_place_of_a_log_holds_nobody_up() {
        let (dir, roots) = host();
        let path = dir.path().join("log/0.log");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        assert!(roots.log(&path).is_err());
        let reader = File::options().read(true).write(true).open(&path).unwrap();
        refused(roots.log(&path));
        drop(reader);
    }
}
