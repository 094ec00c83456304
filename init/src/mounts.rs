//! The file systems that exist on every host, in order. Disks are hostd's.

use crate::error::{Error, Result};
use crate::sys::Syscalls;
use atoll_spec::places;
use rustix::mount::MountFlags;

/// One row of the table.
#[derive(Debug)]
pub struct Mount {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    data: &'static str,
    /// A host without it is worse, yet a host.
    optional: bool,
}

const NO_SUID_DEV: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const DATA_ONLY: MountFlags = NO_SUID_DEV.union(MountFlags::NOEXEC);

const fn required(
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    data: &'static str,
) -> Mount {
    Mount { source, target, kind, flags, data, optional: false }
}

const fn optional(
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
) -> Mount {
    Mount { source, target, kind, flags, data: "", optional: true }
}

/// What init itself needs before the system tree is there.
const FIRST: [Mount; 3] = [
    required("proc", "/proc", "proc", DATA_ONLY, ""),
    required("sysfs", "/sys", "sysfs", DATA_ONLY, ""),
    // No NODEV here, and no NOEXEC: /dev/kvm and its like, and programs that map devices executable.
    required("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755,size=4m,nr_inodes=64k"),
];

/// Where the early file systems move to, inside the system tree.
const MOVED: [&str; 3] = ["/proc", "/sys", "/dev"];

/// The rest, inside the system tree.
const REST: [Mount; 12] = [
    required(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        "mode=0620,gid=5,ptmxmode=0666",
    ),
    required("tmpfs", "/dev/shm", "tmpfs", DATA_ONLY, "mode=1777,size=64m"),
    required("tmpfs", "/run", "tmpfs", DATA_ONLY, "mode=0755,size=64m,nr_inodes=64k"),
    required("tmpfs", "/tmp", "tmpfs", DATA_ONLY, "mode=1777,size=64m,nr_inodes=64k"),
    required("tmpfs", "/var", "tmpfs", DATA_ONLY, "mode=0755,size=64m,nr_inodes=64k"),
    required("cgroup2", "/sys/fs/cgroup", "cgroup2", DATA_ONLY, "nsdelegate,memory_recursiveprot"),
    optional("securityfs", "/sys/kernel/security", "securityfs", DATA_ONLY),
    optional("pstore", "/sys/fs/pstore", "pstore", DATA_ONLY),
    optional("efivarfs", "/sys/firmware/efi/efivars", "efivarfs", DATA_ONLY),
    optional("debugfs", "/sys/kernel/debug", "debugfs", DATA_ONLY),
    optional("tracefs", "/sys/kernel/tracing", "tracefs", DATA_ONLY),
    optional("fusectl", "/sys/fs/fuse/connections", "fusectl", DATA_ONLY),
];

/// The last, for it lies in one of the directories: owned by the agent (800), whose memory it counts against, so it is
/// smaller than the agent's limit. Each Secret and ConfigMap has at most 1 MiB.
const VOLUMES: Mount = required(
    "tmpfs",
    places::VOLUMES,
    "tmpfs",
    DATA_ONLY,
    "mode=0750,uid=800,gid=800,size=256m,nr_inodes=128k",
);

/// Directories that init makes under `/run` and `/var`: path, mode, owner (user and group).
const DIRECTORIES: [(&str, u32, u32); 12] = [
    ("/run/lock", 0o755, 0),
    ("/run/atoll", 0o755, 0),
    ("/run/atoll/init", 0o755, 0),
    ("/run/atoll/hostd", 0o755, 0),
    ("/run/atoll/net", 0o755, 0),
    // 0755: the agent finds the CRI socket in it, which has its own mode.
    ("/run/atoll/runtime", 0o755, 0),
    ("/run/atoll/agent", 0o700, places::AGENT_UID),
    (places::VOLUMES, 0o750, places::AGENT_UID),
    ("/var/lib", 0o755, 0),
    ("/var/log", 0o755, 0),
    ("/var/tmp", 0o1777, 0),
    ("/var/empty", 0o555, 0),
];

/// Mounts what init needs first, on the initramfs.
///
/// # Errors
/// When any of it fails: nothing works without it.
pub fn first(sys: &dyn Syscalls) -> Result<()> {
    FIRST.iter().try_for_each(|mount| {
        sys.directory(mount.target, 0o755, 0).map_err(Error::file("make", mount.target))?;
        mount_one(sys, mount)
    })
}

/// Mounts the system tree, carries the early file systems over and makes it the root.
///
/// # Errors
/// When the tree is missing or damaged.
pub fn system_tree(sys: &dyn Syscalls) -> Result<()> {
    const IMAGE: &str = "/system.erofs";
    const TREE: &str = "/system";
    sys.directory(TREE, 0o755, 0).map_err(Error::file("make", TREE))?;
    let failed = |source| Error::Mount {
        source_name: IMAGE.into(),
        kind: "erofs".into(),
        target: TREE.into(),
        source,
    };
    sys.mount(IMAGE, TREE, "erofs", MountFlags::RDONLY | NO_SUID_DEV, "").map_err(failed)?;
    for place in MOVED {
        let target = format!("{TREE}{place}");
        sys.move_mount(place, &target).map_err(|source| Error::Mount {
            source_name: place.into(),
            kind: "moved".into(),
            target,
            source,
        })?;
    }
    sys.enter_root(TREE).map_err(|source| Error::Root { path: TREE.into(), source })
}

/// Mounts the rest of the table and makes the directories that services expect.
///
/// # Errors
/// When a required file system fails.
pub fn rest(sys: &dyn Syscalls) -> Result<()> {
    for mount in &REST {
        if mount.target.starts_with("/dev/") {
            sys.directory(mount.target, 0o755, 0).map_err(Error::file("make", mount.target))?;
        }
        match mount_one(sys, mount) {
            // Not every firmware and kernel has each of these.
            Err(_) if mount.optional => {}
            outcome => outcome?,
        }
    }
    DIRECTORIES.iter().try_for_each(|(path, mode, owner)| {
        sys.directory(path, *mode, *owner).map_err(Error::file("make", path))
    })?;
    mount_one(sys, &VOLUMES)
}

fn mount_one(sys: &dyn Syscalls, mount: &Mount) -> Result<()> {
    sys.mount(mount.source, mount.target, mount.kind, mount.flags, mount.data).map_err(|source| {
        Error::Mount {
            source_name: mount.source.into(),
            kind: mount.kind.into(),
            target: mount.target.into(),
            source,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fake::Fake;

    #[test]
    fn volumes_are_in_memory_the_agents_and_fit_in_what_the_agent_may_use() {
        let fake = Fake::default();
        rest(&fake).unwrap();
        let calls = fake.calls();
        let at = |what: &str| calls.iter().position(|call| call.starts_with(what)).unwrap();
        assert!(at("directory /run/atoll/volumes") < at("mount tmpfs /run/atoll/volumes tmpfs"), "{calls:?}");
        let option = |name: &str| {
            let found = VOLUMES.data.split(',').find_map(|option| option.strip_prefix(name));
            found.and_then(|value| value.trim_end_matches('m').parse::<u64>().ok()).unwrap()
        };
        let agent = crate::services::table().into_iter().find(|service| service.name == "agent").unwrap();
        // What is in it counts as the agent's memory.
        assert!(option("size=") * 2 <= agent.limits.memory_max_mib);
        assert_eq!([option("uid="), option("gid=")], [u64::from(places::AGENT_UID); 2]);
    }
}
