//! The system calls of PID 1 that change the machine, behind one narrow trait, so that boot, mounts and shutdown
//! can be tested without being PID 1. [`Kernel`] is the real one.

use crate::process::Exit;
use crate::reap;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// What the kernel does with the machine at the very end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerAction {
    /// Starts it again.
    Restart,
    /// Switches it off.
    Off,
}

/// Which processes a signal goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// One process.
    Process(u32),
    /// Every process but init.
    Everyone,
}

/// Signals that init sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Please stop.
    Term,
    /// Stop.
    Kill,
}

/// Kernel services that PID 1 needs.
pub trait Syscalls {
    /// Mounts a file system.
    fn mount(&self, source: &str, target: &str, kind: &str, flags: MountFlags, data: &str) -> io::Result<()>;
    /// Moves a mounted file system to another place.
    fn move_mount(&self, from: &str, to: &str) -> io::Result<()>;
    /// Makes a mounted tree the root of this process, of the kernel's helpers and of all children.
    fn enter_root(&self, path: &str) -> io::Result<()>;
    /// Unmounts; with `detach` even what is in use.
    fn unmount(&self, target: &str, detach: bool) -> io::Result<()>;
    /// Makes a mounted file system read-only.
    fn remount_read_only(&self, target: &str) -> io::Result<()>;
    /// Loads a kernel module from a file.
    fn load_module(&self, path: &str) -> io::Result<()>;
    /// Makes a directory, unless it is there, with this mode and owner.
    fn directory(&self, path: &str, mode: u32, owner: u32) -> io::Result<()>;
    /// Reads a small file.
    fn read(&self, path: &str) -> io::Result<String>;
    /// Writes a file, made with mode 0644 if it is not there.
    fn write(&self, path: &str, content: &str) -> io::Result<()>;
    /// Whether a path exists.
    fn exists(&self, path: &str) -> bool;
    /// Names the host.
    fn set_hostname(&self, name: &str) -> io::Result<()>;
    /// Brings up the loopback interface.
    fn loopback_up(&self) -> io::Result<()>;
    /// Has Ctrl-Alt-Del send SIGINT to PID 1 instead of resetting the machine at once.
    fn catch_ctrl_alt_del(&self) -> io::Result<()>;
    /// Sends a signal.
    fn kill(&self, target: Target, signal: Signal) -> io::Result<()>;
    /// Collects one process that has ended: its number and how. `None` when none has.
    fn collect(&self) -> Option<(u32, Exit)>;
    /// Writes all dirty data to the disks.
    fn sync(&self);
    /// Ends the machine's run. Returns only when the kernel refuses.
    fn power(&self, action: PowerAction) -> io::Result<()>;
}

/// The kernel this process runs on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kernel;

impl Syscalls for Kernel {
    fn mount(&self, source: &str, target: &str, kind: &str, flags: MountFlags, data: &str) -> io::Result<()> {
        let data = CString::new(data)?;
        Ok(rustix::mount::mount(source, target, kind, flags, data.as_c_str())?)
    }

    fn move_mount(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::mount::mount_move(from, to)?)
    }

    fn enter_root(&self, path: &str) -> io::Result<()> {
        rustix::process::chdir(path)?;
        rustix::mount::mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        rustix::process::chdir("/")?;
        // Services with a mount namespace of their own still see what hostd mounts later.
        Ok(rustix::mount::mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)?)
    }

    fn unmount(&self, target: &str, detach: bool) -> io::Result<()> {
        let flags = if detach { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        Ok(rustix::mount::unmount(target, flags | UnmountFlags::NOFOLLOW)?)
    }

    fn remount_read_only(&self, target: &str) -> io::Result<()> {
        Ok(rustix::mount::mount_remount(target, MountFlags::RDONLY, c"")?)
    }

    fn load_module(&self, path: &str) -> io::Result<()> {
        let file = std::fs::File::open(path)?;
        Ok(rustix::system::finit_module(&file, c"", 0)?)
    }

    fn directory(&self, path: &str, mode: u32, owner: u32) -> io::Result<()> {
        match std::fs::DirBuilder::new().mode(mode).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let metadata = std::fs::symlink_metadata(path)?;
        if !metadata.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        if metadata.uid() != owner {
            std::os::unix::fs::chown(path, Some(owner), Some(owner))?;
        }
        if metadata.mode() & 0o7777 != mode {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    }

    fn read(&self, path: &str) -> io::Result<String> {
        std::fs::read_to_string(path)
    }

    fn write(&self, path: &str, content: &str) -> io::Result<()> {
        // Not `fs::write`: kernel files take the value in one write and some refuse O_TRUNC.
        let mut options = std::fs::OpenOptions::new();
        options.write(true).mode(0o644);
        let kernel_file = path.starts_with("/proc/") || path.starts_with("/sys/");
        let mut file = options.create(!kernel_file).truncate(!kernel_file).open(path)?;
        io::Write::write_all(&mut file, content.as_bytes())
    }

    fn exists(&self, path: &str) -> bool {
        Path::new(path).exists()
    }

    fn set_hostname(&self, name: &str) -> io::Result<()> {
        Ok(rustix::system::sethostname(name.as_bytes())?)
    }

    fn loopback_up(&self) -> io::Result<()> {
        loopback_up()
    }

    fn catch_ctrl_alt_del(&self) -> io::Result<()> {
        Ok(rustix::system::reboot(rustix::system::RebootCommand::CadOff)?)
    }

    fn kill(&self, target: Target, signal: Signal) -> io::Result<()> {
        let pid = match target {
            Target::Everyone => -1,
            // 0 and 1 would be init itself or its group.
            Target::Process(pid) => match libc::pid_t::try_from(pid) {
                Ok(pid) if pid > 1 => pid,
                _ => return Err(io::ErrorKind::InvalidInput.into()),
            },
        };
        let signal = match signal {
            Signal::Term => libc::SIGTERM,
            Signal::Kill => libc::SIGKILL,
        };
        // SAFETY: kill takes two integers and touches no memory of ours.
        check(unsafe { libc::kill(pid, signal) })
    }

    fn collect(&self) -> Option<(u32, Exit)> {
        reap::collect()
    }

    fn sync(&self) {
        rustix::fs::sync();
    }

    fn power(&self, action: PowerAction) -> io::Result<()> {
        let command = match action {
            PowerAction::Restart => rustix::system::RebootCommand::Restart,
            PowerAction::Off => rustix::system::RebootCommand::PowerOff,
        };
        Ok(rustix::system::reboot(command)?)
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(0);
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives across the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}

/// Signals that reach PID 1 as events instead of interrupting it.
const CAUGHT: [libc::c_int; 5] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGPWR, libc::SIGHUP];

/// Blocks the caught signals for this thread and those it starts. Call before any thread exists.
///
/// # Errors
/// When the kernel refuses, which it does not.
pub fn block_signals() -> io::Result<()> {
    let set = signal_set();
    // SAFETY: both pointers are valid or null, and the set lives across the call.
    let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if failed == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(failed)) }
}

fn signal_set() -> libc::sigset_t {
    // SAFETY: all zeroes is valid memory for a sigset_t, and sigemptyset makes it a valid set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in CAUGHT {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// A descriptor that becomes readable when a caught signal is pending.
///
/// # Errors
/// When descriptors have run out.
pub fn signal_descriptor() -> io::Result<OwnedFd> {
    let set = signal_set();
    // SAFETY: the set lives across the call; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    check(fd)?;
    // SAFETY: the kernel has just given us this descriptor and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The next pending signal, by number.
///
/// # Errors
/// `WouldBlock` when none is pending.
pub fn next_signal(descriptor: BorrowedFd<'_>) -> io::Result<i32> {
    let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
    let read = rustix::io::read(descriptor, &mut info)?;
    if read < 4 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
}

/// What a watchdog device is called and how it was set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchdogFacts {
    /// Name of its driver.
    pub identity: String,
    /// Seconds until it bites.
    pub timeout_s: u32,
    /// Whether the machine was last reset by it.
    pub has_bitten: bool,
}

#[repr(C)]
struct WatchdogInfo {
    options: u32,
    firmware_version: u32,
    identity: [u8; 32],
}

const WDIOC_GETSUPPORT: libc::c_ulong = 0x8028_5700;
const WDIOC_GETBOOTSTATUS: libc::c_ulong = 0x8004_5702;
const WDIOC_SETTIMEOUT: libc::c_ulong = 0xc004_5706;
const WDIOF_CARDRESET: libc::c_int = 0x20;

/// Sets a watchdog's time and asks who it is.
///
/// # Errors
/// When the device is none.
pub fn configure_watchdog(device: BorrowedFd<'_>, timeout_s: u32) -> io::Result<WatchdogFacts> {
    let fd = device.as_raw_fd();
    let mut timeout = libc::c_int::try_from(timeout_s).unwrap_or(60);
    let mut boot_status: libc::c_int = 0;
    let mut info = WatchdogInfo { options: 0, firmware_version: 0, identity: [0; 32] };
    // SAFETY: the kernel reads and writes one int.
    let set = check(unsafe { libc::ioctl(fd, WDIOC_SETTIMEOUT, &raw mut timeout) });
    // SAFETY: the kernel writes one int.
    let status = check(unsafe { libc::ioctl(fd, WDIOC_GETBOOTSTATUS, &raw mut boot_status) });
    // SAFETY: the kernel writes one watchdog_info, which `WatchdogInfo` is laid out as.
    check(unsafe { libc::ioctl(fd, WDIOC_GETSUPPORT, &raw mut info) })?;
    // Drivers with a fixed time or without a boot status are good watchdogs all the same.
    let has_bitten = status.is_ok() && boot_status & WDIOF_CARDRESET != 0;
    let timeout_s = if set.is_ok() { u32::try_from(timeout).unwrap_or(0) } else { 0 };
    let identity = info.identity.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(WatchdogFacts { identity: String::from_utf8_lossy(identity).into_owned(), timeout_s, has_bitten })
}

/// Whether an input device has this key.
pub fn input_device_has_key(device: BorrowedFd<'_>, key: u16) -> bool {
    const EVIOCGBIT_KEY_96: libc::c_ulong = 0x8060_4521;
    let mut bits = [0_u8; 96];
    // SAFETY: the request's size field says 96 bytes, which is what `bits` has.
    let read = unsafe { libc::ioctl(device.as_raw_fd(), EVIOCGBIT_KEY_96, bits.as_mut_ptr()) };
    read >= 0 && bits.get(usize::from(key / 8)).is_some_and(|byte| byte & (1 << (key % 8)) != 0)
}

/// A datagram received on the notify socket, with who sent it.
#[derive(Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Sender's process as the kernel saw it.
    pub pid: u32,
    /// Sender's user.
    pub uid: u32,
    /// Content.
    pub content: Vec<u8>,
}

/// Space for the credentials and a few descriptors, aligned as control messages must be.
#[repr(C, align(8))]
struct ControlSpace([u8; 128]);

/// Receives one datagram together with its sender's credentials. Not rustix, whose credentials cannot hold process
/// number 0, which is what a sender outside this process namespace has.
///
/// # Errors
/// `WouldBlock` when there is none; `InvalidData` for one without credentials.
pub fn receive_with_credentials(socket: BorrowedFd<'_>) -> io::Result<Datagram> {
    let mut content = vec![0_u8; 4096];
    let mut space = ControlSpace([0; 128]);
    let mut part = libc::iovec { iov_base: content.as_mut_ptr().cast(), iov_len: content.len() };
    // SAFETY: all zeroes is a valid msghdr: no name, no parts, no control space.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut space).cast();
    message.msg_controllen = size_of::<ControlSpace>();
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message points to buffers of the lengths it names, which live across the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let Ok(received) = usize::try_from(received) else { return Err(io::Error::last_os_error()) };
    content.truncate(received);
    let mut sender = None;
    // SAFETY: the kernel filled the control space and set its length. The macros walk it within that length, and
    // each kind of message holds what is read from it: one ucred, or as many descriptors as its length says, which
    // nobody else has. Reads are unaligned because control data is only aligned to words.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let data = libc::CMSG_DATA(header);
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_CREDENTIALS {
                sender = Some(data.cast::<libc::ucred>().read_unaligned());
            } else if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                for place in 0..bytes / size_of::<libc::c_int>() {
                    // Nobody asked for descriptors: closed at once.
                    drop(OwnedFd::from_raw_fd(data.cast::<libc::c_int>().add(place).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    let sender = sender.ok_or(io::ErrorKind::InvalidData)?;
    Ok(Datagram { pid: u32::try_from(sender.pid).unwrap_or(0), uid: sender.uid, content })
}

/// User of the process that connected to a stream socket.
///
/// # Errors
/// When the socket is none of that kind.
pub fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `length` bytes, which is the size of `peer`.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    })?;
    Ok(peer.uid)
}

#[cfg(test)]
pub mod fake;
