//! The kernel interfaces that rustix does not wrap, each behind a safe function. All `unsafe` code that is not
//! about spawning lives here.

use rustix::io::Errno;
use std::ffi::{CString, c_char, c_int};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

/// Runs the program with the arguments that `main` got from the C runtime.
#[expect(
    clippy::not_unsafe_ptr_arg_deref,
    reason = "called by `main` alone, with what the C runtime gave it"
)]
pub fn start(argc: c_int, argv: *const *const c_char) -> c_int {
    let count = usize::try_from(argc).unwrap_or(0);
    let args: Vec<String> = (0..count)
        .map(|index| {
            // SAFETY: the C runtime passes `argc` valid pointers to NUL-terminated strings.
            let text = unsafe { std::ffi::CStr::from_ptr(*argv.add(index)) };
            text.to_string_lossy().into_owned()
        })
        .collect();
    crate::run(&args)
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Connects a stream socket to a vsock port of the host.
pub fn connect_vsock(cid: u32, port: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is checked before use.
    let raw = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: `raw` was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: all-zero bytes are a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the pointer and length describe `address`, which lives through the call.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

/// A datagram pair, close-on-exec, for parent and stage.
pub fn seqpacket_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
}

/// Takes over a descriptor that the parent put at a fixed number, and marks it close-on-exec.
pub fn adopt(raw: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD takes no pointer; it fails harmlessly when `raw` is not open.
    check(unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the spawn contract gives `raw` to this process alone, and it is adopted once.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Attributes for [`set_mount_attributes`].
#[derive(Debug, Clone, Copy, Default)]
pub struct MountAttributes(pub u64);

impl MountAttributes {
    /// Read-only.
    pub const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    /// Set-user-id bits have no effect.
    pub const NO_SUID: u64 = libc::MOUNT_ATTR_NOSUID;
    /// Device nodes cannot be opened.
    pub const NO_DEV: u64 = libc::MOUNT_ATTR_NODEV;
    /// Nothing can be executed.
    pub const NO_EXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
}

/// Sets attributes of the mount that `fd` stands on, with all mounts below when `recursive`.
pub fn set_mount_attributes(fd: impl AsFd, set: MountAttributes, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set.0, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: path and attributes outlive the call and the size is that of the structure.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

#[repr(C)]
struct BlkpgArgument {
    operation: c_int,
    flags: c_int,
    data_length: c_int,
    data: *mut BlkpgPartition,
}

const BLKPG: libc::c_ulong = 0x1269;
const BLKPG_ADD_PARTITION: c_int = 1;

/// Makes bytes `start..start + length` of a block device its partition `number`.
pub fn add_partition(device: impl AsFd, number: u8, start: u64, length: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut partition = BlkpgPartition {
        start: i64::try_from(start).map_err(invalid)?,
        length: i64::try_from(length).map_err(invalid)?,
        number: c_int::from(number),
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let mut argument = BlkpgArgument {
        operation: BLKPG_ADD_PARTITION,
        flags: 0,
        data_length: size_of::<BlkpgPartition>() as c_int,
        data: &raw mut partition,
    };
    // SAFETY: both structures have the kernel's layout (linux/blkpg.h) and outlive the call.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKPG, &raw mut argument) }).map(drop)
}

/// Replaces this process. Returns only on failure.
pub fn execve(path: &std::ffi::CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| {
        list.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect::<Vec<*const c_char>>()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end in NULL and point to NUL-terminated strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Sets every signal back to its default and blocks none: the state a new program expects.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL installs no code; the kernel refuses the two that cannot change.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let mut empty = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set before it is read; the old set is not asked for.
    unsafe {
        libc::sigemptyset(empty.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, empty.as_ptr(), std::ptr::null_mut());
    }
}

/// Ignores SIGPIPE: a peer that went away is an error code, not a death.
pub fn ignore_broken_pipes() {
    // SAFETY: SIG_IGN installs no code.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

fn child_set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set; sigaddset changes it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD);
        set.assume_init()
    }
}

/// Blocks SIGCHLD in this thread and those it makes, so that [`wait_for_child_signal`] gets it.
pub fn block_child_signal() {
    let set = child_set();
    // SAFETY: `set` is initialised; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Waits until a child changed state, at most `limit`.
pub fn wait_for_child_signal(limit: Duration) {
    let set = child_set();
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(limit.subsec_nanos()),
    };
    // SAFETY: set and timeout are initialised and outlive the call; no details are asked for.
    unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const timeout) };
}

/// Sends a signal by number: rustix knows only the named ones. A negative `pid` means the process group.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Sends a signal by number to the process of a pidfd.
pub fn pidfd_kill(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: the information pointer may be null; no other pointer is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Adds a system call filter to this thread and what it becomes. Needs CAP_SYS_ADMIN; unlike seccompiler's own way it
/// does not set no_new_privs.
pub fn install_filter(program: &[seccompiler::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let filter = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel copies `len` instructions from `filter`, which `program` keeps alive, and writes none; the
    // two types of an instruction have the layout of the kernel's `struct sock_filter`.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the system clock.
pub fn set_clock(unix_ns: i64) -> Result<(), Errno> {
    rustix::time::clock_settime(
        rustix::time::ClockId::Realtime,
        rustix::time::Timespec {
            tv_sec: unix_ns.div_euclid(1_000_000_000),
            tv_nsec: unix_ns.rem_euclid(1_000_000_000),
        },
    )
}

/// The system clock, nanoseconds since 1970.
pub fn clock() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}

/// Microseconds since the machine started.
pub fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

/// Children of this thread start in a new PID namespace.
pub fn unshare_pid_namespace() -> Result<(), Errno> {
    // SAFETY: CLONE_NEWPID does not change this thread's own view of memory, files or file system.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID) }
}

/// This process gets mounts and cgroup root of its own. Only for a process with one thread.
pub fn unshare_mounts_and_cgroup() -> Result<(), Errno> {
    use rustix::thread::UnshareFlags;
    // SAFETY: no other thread shares the file-system state that CLONE_NEWNS parts.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWCGROUP) }
}

/// Children of this thread start in the PID namespace of the process behind `pidfd`.
pub fn enter_pid_namespace(pidfd: std::os::fd::BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::thread::move_into_thread_name_spaces(pidfd, rustix::thread::ThreadNameSpaceType::PROCESS_ID)
}
