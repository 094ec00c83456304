//! From the kernel's first program to a guest that serves: descriptors, a root that can be pivoted away from,
//! the kernel's file systems, the main threads.
//!
//! Invariant: whatever fails here is one line on the console, then the machine resets; the kernel never sees
//! its first process end.

use crate::error::{Context as _, Result};
use crate::guest::Guest;
use crate::options::Options;
use crate::{cgroup, log, network, power, rpc, sys};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_move};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long the main thread sleeps when no child ends: a bound, not a rhythm.
const NAP: Duration = Duration::from_secs(60);

/// PID 1 of a microVM.
pub fn machine(options: Options) -> i32 {
    std::panic::set_hook(Box::new(|panic| log::line(&panic.to_string())));
    let outcome = std::panic::catch_unwind(|| {
        let prepared = mount_early().and_then(|()| mount_rest());
        prepared.and_then(|()| serve(options))
    });
    match outcome {
        Ok(Ok(())) => log::line("the guest's main thread ended"),
        Ok(Err(failure)) => log::line(&failure.message),
        Err(_) => log::line("the guest's main thread failed"),
    }
    power::reset(true)
}

/// The same without a machine, for tests: the caller made the namespaces.
pub fn rehearsal(options: Options) -> i32 {
    let prepared = rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .during(|| "become the reaper of orphans".into())
        .and_then(|()| {
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
                .during(|| "make the mounts private".into())
        });
    match prepared.and_then(|()| serve(options)) {
        Ok(()) => 0,
        Err(failure) => {
            log::line(&failure.message);
            1
        }
    }
}

/// A tmpfs becomes the root, because `pivot_root` refuses to leave the initial one, and `/dev` appears, so that
/// the standard descriptors and the log exist from here on.
fn mount_early() -> Result<()> {
    let root = "/root";
    make_directory(root)?;
    mount("tmpfs", root, "tmpfs", MountFlags::NOSUID, c"mode=0755,size=64m")
        .during(|| "mount a tmpfs for the root".into())?;
    for name in ["dev", "proc", "sys", "run", "tmp"] {
        make_directory(format!("{root}/{name}"))?;
    }
    mount("dev", "/root/dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=0755")
        .during(|| "mount /dev".into())?;
    rustix::process::chdir(root).during(|| "enter the new root".into())?;
    mount_move(".", "/").during(|| "move the new root over the old one".into())?;
    rustix::process::chroot(".").during(|| "change into the new root".into())?;
    rustix::process::chdir("/").during(|| "enter /".into())?;
    open_standard_descriptors()?;
    log::to_kernel();
    Ok(())
}

/// Makes 0, 1 and 2 valid: the kernel starts us without them when there is no console.
fn open_standard_descriptors() -> Result<()> {
    loop {
        let null =
            rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()).during(|| "open /dev/null".into())?;
        // `open` takes the lowest free number: the gaps fill up in order.
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(());
        }
        std::mem::forget(null);
    }
}

fn mount_rest() -> Result<()> {
    let locked = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    make_directory("/dev/pts")?;
    let table: [(&str, &str, &str, MountFlags, &std::ffi::CStr); 5] = [
        ("proc", "/proc", "proc", locked, c""),
        ("sysfs", "/sys", "sysfs", locked, c""),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", locked, c"nsdelegate,memory_recursiveprot"),
        ("devpts", "/dev/pts", "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=0620,ptmxmode=0666"),
        ("run", "/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755"),
    ];
    for (source, target, kind, flags, data) in table {
        mount(source, target, kind, flags, data).during(|| format!("mount {kind} on {target}"))?;
    }
    network::configure_loopback()
}

fn make_directory(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(error).during(|| format!("make directory {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Serves the runtime; the calling thread reaps. Returns only on failure.
fn serve(options: Options) -> Result<()> {
    sys::ignore_broken_pipes();
    sys::block_child_signal();
    cgroup::prepare(&options.cgroup)?;
    let guest = Arc::new(Guest::new(options)?);
    let server = Arc::clone(&guest);
    std::thread::Builder::new()
        .name("rpc".into())
        .spawn(move || {
            loop {
                let serving = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| rpc::serve(&server)));
                if serving.is_err() {
                    log::line("talking to the runtime failed; dialling again");
                }
            }
        })
        .during(|| "start the thread that talks to the runtime".into())?;
    loop {
        guest.processes.reap();
        sys::wait_for_child_signal(NAP);
    }
}
