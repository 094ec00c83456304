//! The system calls that have no safe wrapper: the tap ioctl, the clone of a VMM, watching a descriptor.
//!
//! Called by `vm::jail` and `vm::network`. Invariant: all `unsafe` of this crate outside the unpack helper is here.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use tokio::io::unix::AsyncFd;

/// Flag of clone3(2); the constant of `libc` is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Longest name of a network interface.
const NAME_BYTES: usize = libc::IFNAMSIZ;

/// Makes the file `tun` (`/dev/net/tun`) the tap device `name`; it is gone when its last descriptor is.
pub fn attach_tap(tun: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    if name.is_empty() || name.len() >= NAME_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name too long"));
    }
    // SAFETY: ifreq is plain data, for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open for the call, and the kernel reads and writes one ifreq, which lives on this stack.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers a non-blocking descriptor with the event loop.
pub fn watch_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor, nobody can reach it mutably, and an OwnedFd stays open until it is dropped.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// A process to start apart from ours: in its own pid namespace and cgroup, with no descriptor but the given.
pub struct Detached<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments, without its name.
    pub args: &'a [&'a str],
    /// Becomes descriptor 3.
    pub fd3: BorrowedFd<'a>,
    /// Becomes descriptors 1 and 2; 0 is /dev/null.
    pub output: BorrowedFd<'a>,
    /// The cgroup's directory, when it is to be born in one.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Give it a pid namespace of its own.
    pub own_pids: bool,
}

/// Starts the process; answers its pid and pidfd. Errors of the exec are reported here, too.
pub fn spawn_detached(what: &Detached<'_>) -> io::Result<(i32, OwnedFd)> {
    let program = cstring(what.program.as_os_str().as_encoded_bytes())?;
    let mut argv: Vec<CString> = vec![program.clone()];
    for arg in what.args {
        argv.push(cstring(arg.as_bytes())?);
    }
    let mut argv_pointers: Vec<*const libc::c_char> = argv.iter().map(|a| a.as_ptr()).collect();
    argv_pointers.push(std::ptr::null());
    let envp: [*const libc::c_char; 1] = [std::ptr::null()];
    let null = std::fs::File::open("/dev/null")?;
    let (errors, errors_in) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;

    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain data, for which all zeros is a valid value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_PIDFD as u64;
    if what.own_pids {
        args.flags |= libc::CLONE_NEWPID as u64;
    }
    if let Some(cgroup) = what.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: no CLONE_VM, so this is a fork: the child has a copy of our memory and only its own thread. Until execve it
    // calls nothing but async-signal-safe functions and allocates nothing.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_mut(&mut args),
            std::mem::size_of::<libc::clone_args>(),
        )
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        // SAFETY: we are the child described above; the pointers were made before the clone and are NUL-terminated.
        unsafe {
            child(
                [null.as_raw_fd(), what.output.as_raw_fd(), what.fd3.as_raw_fd(), errors_in.as_raw_fd()],
                program.as_ptr(),
                argv_pointers.as_ptr(),
                envp.as_ptr(),
            )
        }
    }
    drop(errors_in);
    // SAFETY: the kernel has put a new descriptor there, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let mut errno = [0u8; 4];
    match rustix::io::read(&errors, &mut errno) {
        Ok(4) => {
            let _ = wait_exit(&pidfd); // it has exited already; its status is the errno we have
            Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
        }
        _ => Ok((pid as i32, pidfd)),
    }
}

/// The child between clone and exec: descriptors 0 to 3 in place, all others closed at exec.
///
/// # Safety
/// Only in a freshly cloned child, with valid descriptors and NUL-terminated strings and lists.
unsafe fn child(
    [null, output, fd3, errors]: [libc::c_int; 4],
    program: *const libc::c_char,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
) -> ! {
    // SAFETY: system calls on descriptors of this process and the caller's valid strings. The sources are first moved above
    // 9, so that no dup2 overwrites one that is still needed.
    unsafe {
        libc::setsid();
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
        let errors = libc::fcntl(errors, libc::F_DUPFD_CLOEXEC, 10);
        let null = libc::fcntl(null, libc::F_DUPFD_CLOEXEC, 10);
        let output = libc::fcntl(output, libc::F_DUPFD_CLOEXEC, 10);
        let fd3 = libc::fcntl(fd3, libc::F_DUPFD_CLOEXEC, 10);
        libc::dup2(null, 0);
        libc::dup2(output, 1);
        libc::dup2(output, 2);
        libc::dup2(fd3, 3);
        libc::syscall(libc::SYS_close_range, 4, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        libc::execve(program, argv, envp);
        let errno = (*libc::__errno_location()).to_ne_bytes();
        libc::write(errors, errno.as_ptr().cast(), errno.len());
        libc::_exit(127)
    }
}

fn cstring(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "NUL in an argument"))
}

/// Exit status of a child that has ended, `128 + signal` when killed; `None` when it is not ours to wait for.
pub fn wait_exit(pidfd: &OwnedFd) -> Option<i32> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let status = waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(pidfd)), WaitIdOptions::EXITED).ok()??;
    status.exit_status().or_else(|| status.terminating_signal().map(|s| 128 + s))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::fd::AsFd;

    fn run(program: &str, args: &[&str]) -> io::Result<(Option<i32>, String)> {
        let mut output = tempfile::tempfile()?;
        let null = std::fs::File::open("/dev/null")?;
        let detached = Detached {
            program: Path::new(program),
            args,
            fd3: null.as_fd(),
            output: output.as_fd(),
            cgroup: None,
            own_pids: false,
        };
        let (_, pidfd) = spawn_detached(&detached)?;
        let status = wait_exit(&pidfd);
        output.rewind()?;
        let mut text = String::new();
        output.read_to_string(&mut text)?;
        Ok((status, text))
    }

    #[test]
    fn a_detached_process_has_four_descriptors_and_no_environment() {
        let (status, text) = run("/bin/sh", &["-c", "ls /proc/self/fd | wc -l; env; exit 7"]).unwrap();
        assert_eq!(status, Some(7));
        // 0 to 3, and the one ls itself opens.
        assert_eq!(text.lines().next(), Some("5"), "{text}");
        assert!(!text.contains("HOME="), "{text}");
    }

    #[test]
    fn a_missing_program_is_an_error_of_the_spawn() {
        assert_eq!(run("/does/not/exist", &[]).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn tap_names_are_checked() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(attach_tap(null.as_fd(), "a-name-that-is-too-long").is_err());
    }
}
