//! The jail: what the VMM gives up before it looks at the first byte of a guest.
//!
//! The process starts as root (the runtime made it, in its cgroup and PID namespace, with no descriptor but its control
//! socket) and gets every resource as a descriptor. Then, in this order, each step depending on those before it:
//!
//! 1. limits, and an own session
//! 2. no groups, then the VMM's own uid and gid: from here on nothing is done as root
//! 3. namespaces: user (which maps that one uid), mount, network, IPC, UTS, cgroup, owned by the unprivileged user
//! 4. an empty, read-only tmpfs as the root directory; the old root is detached
//! 5. all capabilities dropped, bounding and ambient sets too; no privileges can be gained; not traceable
//! 6. Landlock, where the kernel has it: no file, no TCP port, no signal or abstract socket outside
//!
//! The user namespace must be made while the process has one thread, and vhost's and KVM's workers count as threads: so
//! the jail comes before the machine. The seccomp filters (`seccomp.rs`) close the door behind it, after the machine is
//! built. Invariant: an error in any step ends the process; there is no half a jail.

use crate::error::Error;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, Scope,
};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::ffi::CString;
use std::io;

/// Bounds of the process.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Open descriptors: the machine's own plus every layer that can be mapped.
    pub descriptors: u64,
    /// Largest file that can be written: the scratch disk, which never grows.
    pub file_bytes: u64,
    /// Threads: processors, disks and the kernel's workers.
    pub threads: u64,
}

/// Enters the jail for good as user and group `uid`.
pub fn enter(uid: u32, limits: Limits) -> Result<(), Error> {
    let at = |step: &'static str| move |error: Errno| Error::Jail { step, uid, source: error.into() };
    set_limits(limits).map_err(at("set limits"))?;
    become_user(uid).map_err(|source| Error::Jail { step: "become the user", uid, source })?;
    unshare().map_err(|source| Error::Jail { step: "make namespaces", uid, source })?;
    map_user(uid).map_err(|source| Error::Jail { step: "map the user", uid, source })?;
    empty_root().map_err(at("empty the root directory"))?;
    drop_privileges().map_err(|source| Error::Jail { step: "drop privileges", uid, source })?;
    restrict().map_err(|error| Error::Jail { step: "restrict", uid, source: io::Error::other(error) })
}

fn set_limits(limits: Limits) -> rustix::io::Result<()> {
    for (resource, bound) in [
        (Resource::Core, 0),
        (Resource::Nofile, limits.descriptors),
        (Resource::Fsize, limits.file_bytes),
        (Resource::Nproc, limits.threads),
        (Resource::Msgqueue, 0),
    ] {
        setrlimit(resource, Rlimit { current: Some(bound), maximum: Some(bound) })?;
    }
    Ok(())
}

/// Real, effective and saved ids at once, so that nothing is left to go back to.
fn become_user(uid: u32) -> io::Result<()> {
    // Id 0 would keep every privilege, and the all-ones id means "unchanged".
    if matches!(uid, 0 | u32::MAX) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // glibc's wrappers would signal other threads; there are none, and the calls themselves say what they do.
    // SAFETY: none of the three calls takes a pointer that is used (the list of groups has no element).
    let results = unsafe {
        [
            libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()),
            libc::syscall(libc::SYS_setresgid, uid, uid, uid),
            libc::syscall(libc::SYS_setresuid, uid, uid, uid),
        ]
    };
    if results != [0, 0, 0] {
        return Err(io::Error::last_os_error());
    }
    // Changing ids made /proc/self root's; the user needs it once more, for its maps.
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    Ok(())
}

fn unshare() -> io::Result<()> {
    let namespaces = libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    // SAFETY: unshare takes no pointers; the process has one thread, which holds nothing of the old namespaces but
    // descriptors.
    match unsafe { libc::unshare(namespaces) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The new user namespace knows one user and one group: the VMM's own, under their own numbers.
fn map_user(uid: u32) -> io::Result<()> {
    let map = format!("{uid} {uid} 1");
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", &map)?;
    std::fs::write("/proc/self/gid_map", &map)
}

/// Stacks an empty tmpfs over the root and drops what is below. `/proc` serves as mount point because the step before
/// has just used it.
fn empty_root() -> rustix::io::Result<()> {
    const POINT: &str = "/proc";
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = CString::new("size=4096,nr_inodes=1,mode=0555").map_err(|_| Errno::INVAL)?;
    mount("none", POINT, "tmpfs", flags, options.as_c_str())?;
    rustix::process::chdir(POINT)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    mount_remount("/", flags | MountFlags::BIND | MountFlags::RDONLY, "")?;
    rustix::process::chdir("/")
}

fn drop_privileges() -> io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    for number in 0..64u32 {
        // SAFETY: PR_CAPBSET_DROP takes a number.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // The kernel knows no more capabilities.
                Some(libc::EINVAL) if number > 0 => break,
                _ => return Err(error),
            }
        }
    }
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    rustix::thread::set_no_new_privs(true)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// A second lock on the same door, for the day when a bug in one of the others opens it. Descriptors that are open keep
/// their rights; nothing can be opened, bound, connected or signalled any more. An older kernel does what it can.
fn restrict() -> Result<(), RulesetError> {
    let handled = ABI::V6;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(handled))?
        .handle_access(AccessNet::from_all(handled))?
        .scope(Scope::from_all(handled))?
        .create()?
        .restrict_self()?;
    Ok(())
}
