//! What a container sees: its root with `/proc`, `/dev`, `/sys`, the pod's files and its volumes, in a mount
//! namespace of its own that nothing else is left in.
//!
//! Devices are bind mounts of the guest's own nodes on a file system that allows none, and every other mount
//! forbids them too: a container that makes a device node cannot open it.

use super::plan::{PlannedMount, Source, Tree};
use crate::error::{Context as _, Result};
use crate::mount::Detached;
use crate::resolve::{self, Kind};
use crate::rootfs::from_the_top;
use crate::sys::{self, MountAttributes};
use rustix::fs::{AtFlags, Mode, OFlags, chmodat, symlinkat};
use rustix::mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags, mount_change, unmount};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

const LOCKED: u64 = MountAttributes::NO_SUID | MountAttributes::NO_DEV | MountAttributes::NO_EXEC;

fn locked() -> MountAttrFlags {
    MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC
}

/// Builds the tree and makes it this process's root.
pub fn enter(tree: &Tree, cwd: &str) -> Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .during(|| "make the container's mounts private".into())?;
    let root = open_directory(&tree.root)?;
    if !tree.privileged {
        sys::set_mount_attributes(&root, MountAttributes(MountAttributes::NO_DEV), false)
            .during(|| "forbid devices on the root".into())?;
    }
    mount_kernel_interfaces(&root, tree)?;
    mount_devices(&root, tree)?;
    for planned in tree.etc.iter().chain(&tree.mounts) {
        mount_planned(&root, planned).during(|| format!("mount {}", planned.target))?;
    }
    make_working_directory(&root, cwd)?;
    protect(&root, tree)?;
    pivot(&root)
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during(|| format!("open {}", path.display()))
}

fn target(root: &OwnedFd, path: &str, kind: Kind) -> Result<OwnedFd> {
    resolve::ensure(root, Path::new(path), kind).during(|| format!("make {path} in the container"))
}

fn mount_kernel_interfaces(root: &OwnedFd, tree: &Tree) -> Result<()> {
    let proc = Detached::filesystem("proc", &[], locked())?;
    proc.attach(target(root, "/proc", Kind::Directory)?)?;
    let protection =
        if tree.privileged { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_RDONLY };
    let sys = Detached::filesystem("sysfs", &[], locked() | protection)?;
    sys.attach(target(root, "/sys", Kind::Directory)?)?;
    let cgroup = Detached::filesystem("cgroup2", &[], locked() | protection)?;
    cgroup.attach(target(root, "/sys/fs/cgroup", Kind::Directory)?)
}

fn mount_devices(root: &OwnedFd, tree: &Tree) -> Result<()> {
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let dev = if tree.privileged {
        Detached::filesystem("devtmpfs", &[], attributes)?
    } else {
        let options = [("mode", "0755"), ("size", "65536k")];
        Detached::filesystem("tmpfs", &options, attributes | MountAttrFlags::MOUNT_ATTR_NODEV)?
    };
    dev.attach(target(root, "/dev", Kind::Directory)?)?;
    let dev = target(root, "/dev", Kind::Directory)?;
    if !tree.privileged {
        for name in DEVICES {
            let device = Detached::bind(&Path::new("/dev").join(name))?;
            device.attach(target(root, &format!("/dev/{name}"), Kind::File)?)?;
        }
    }
    for (to, name) in LINKS {
        match symlinkat(to, &dev, name) {
            // devtmpfs, one for the whole guest, may have it from another container, or as a device.
            Err(rustix::io::Errno::EXIST) => {}
            other => other.during(|| format!("make the link /dev/{name}"))?,
        }
    }
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Detached::filesystem("devpts", &[("mode", "0620"), ("ptmxmode", "0666"), ("gid", "5")], attributes)?
        .attach(target(root, "/dev/pts", Kind::Directory)?)?;
    Detached::filesystem("mqueue", &[], locked())?.attach(target(root, "/dev/mqueue", Kind::Directory)?)?;
    Detached::bind(&tree.shm)?.with(LOCKED)?.attach(target(root, "/dev/shm", Kind::Directory)?)
}

fn mount_planned(root: &OwnedFd, planned: &PlannedMount) -> Result<()> {
    let mut attributes = MountAttributes::NO_DEV;
    if matches!(planned.source, Source::Tmpfs(_)) {
        attributes |= MountAttributes::NO_SUID;
    }
    if planned.read_only {
        attributes |= MountAttributes::READ_ONLY;
    }
    let (mount, kind) = match &planned.source {
        Source::Inside { base, sub_path, make } => {
            let base = open_directory(base)?;
            let sub_path = Path::new(sub_path);
            let found = if *make {
                resolve::ensure(&base, sub_path, Kind::Directory)
            } else {
                resolve::open(&base, sub_path)
            };
            let found = found.during(|| format!("find '{}' in the volume", sub_path.display()))?;
            let kind = if resolve::is_directory(&found) { Kind::Directory } else { Kind::File };
            (Detached::bind_fd(&found)?, kind)
        }
        Source::File(path) => (Detached::bind(path)?, Kind::File),
        Source::Layers(layers) => (stack(layers)?, Kind::Directory),
        Source::Tmpfs(size) => {
            let size = size.map(|bytes| bytes.to_string());
            let mut options = vec![("mode", "1777")];
            options.extend(size.as_deref().map(|size| ("size", size)));
            (Detached::filesystem("tmpfs", &options, MountAttrFlags::empty())?, Kind::Directory)
        }
    };
    mount.with(attributes)?.attach(target(root, &planned.target, kind)?)
}

/// Layers without a writable one on top. Overlayfs wants two at least.
fn stack(layers: &[std::path::PathBuf]) -> Result<Detached> {
    let texts = from_the_top(layers);
    if let [only] = texts.as_slice() {
        return Detached::bind(Path::new(only));
    }
    let options: Vec<(&str, &str)> = texts.iter().map(|path| ("lowerdir+", path.as_str())).collect();
    Detached::filesystem("overlay", &options, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// The working directory is made while the root can still be written to.
fn make_working_directory(root: &OwnedFd, cwd: &str) -> Result<()> {
    match resolve::open(root, Path::new(cwd)) {
        Ok(_) => Ok(()),
        // On a read-only volume it cannot be made; entering it will say so.
        Err(_) => resolve::ensure(root, Path::new(cwd), Kind::Directory)
            .map(drop)
            .during(|| format!("make the working directory {cwd}")),
    }
}

fn protect(root: &OwnedFd, tree: &Tree) -> Result<()> {
    for path in &tree.read_only_paths {
        let Ok(found) = resolve::open(root, Path::new(path)) else { continue };
        let what = || format!("make {path} read-only");
        Detached::bind_fd(&found)
            .and_then(|mount| mount.with(MountAttributes::READ_ONLY))
            .and_then(|mount| mount.attach(&found))
            .during(what)?;
    }
    for path in &tree.masked_paths {
        let Ok(found) = resolve::open(root, Path::new(path)) else { continue };
        let cover = if resolve::is_directory(&found) {
            Detached::filesystem("tmpfs", &[("size", "4k")], locked() | MountAttrFlags::MOUNT_ATTR_RDONLY)
        } else {
            Detached::bind(Path::new("/dev/null"))
        };
        cover.and_then(|mount| mount.attach(&found)).during(|| format!("hide {path}"))?;
    }
    if tree.read_only_root {
        sys::set_mount_attributes(root, MountAttributes(MountAttributes::READ_ONLY), false)
            .during(|| "make the root read-only".into())?;
    }
    Ok(())
}

/// The new root replaces the old one, which is then let go of with everything mounted below it.
fn pivot(root: &OwnedFd) -> Result<()> {
    rustix::process::fchdir(root.as_fd()).during(|| "enter the container's root".into())?;
    rustix::process::pivot_root(".", ".").during(|| "pivot into the container's root".into())?;
    unmount(".", UnmountFlags::DETACH).during(|| "let go of the guest's root".into())?;
    rustix::process::chdir("/").during(|| "enter /".into())
}

/// `/dev/console` is the container's terminal.
pub fn mount_console(terminal: &OwnedFd) -> Result<()> {
    let root = open_directory(Path::new("/"))?;
    let console = target(&root, "/dev/console", Kind::File)?;
    Detached::bind_fd(terminal)?.attach(console)?;
    chmodat(rustix::fs::CWD, "/dev/console", Mode::from_raw_mode(0o620), AtFlags::empty())
        .during(|| "set the mode of /dev/console".into())
}
