//! The jail and the filters, tried from inside: each test forks a child, locks it up, and has it try what must not work.
//!
//! Entering the jail needs root: without it those tests fail and say so. The filters need no privilege.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use atoll_vmm::jail::{self, Limits};
use atoll_vmm::seccomp::{self, Class};
use std::ffi::CStr;
use std::os::fd::AsRawFd;

const UID: u32 = 100_003;
const LIMITS: Limits = Limits { descriptors: 64, file_bytes: 1 << 20, threads: 64 };

/// How a child ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exit(i32),
    Signal(i32),
}

/// Runs `inside` in a child of one thread. It must not panic: it returns a number, 0 for success.
fn child(inside: impl FnOnce() -> i32) -> End {
    // SAFETY: the child does little more than system calls and ends with _exit; glibc keeps malloc usable after fork.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork");
    if pid == 0 {
        let code = inside();
        // SAFETY: ends the child without running the test harness's destructors.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above; the status outlives the call.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Exit(libc::WEXITSTATUS(status))
    }
}

fn jailed(inside: impl FnOnce() -> i32) -> End {
    assert!(rustix::process::geteuid().is_root(), "only root can enter the jail: run the tests as root");
    child(|| match jail::enter(UID, LIMITS) {
        Ok(()) => inside(),
        Err(error) => {
            eprintln!("{}", error.chain());
            99
        }
    })
}

/// The number of the first check that does not hold, counted from 1.
fn first_false(checks: &[bool]) -> i32 {
    checks.iter().position(|check| !check).map_or(0, |at| at as i32 + 1)
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn open(path: &CStr, flags: i32) -> i32 {
    // SAFETY: the path is a C string.
    unsafe { libc::open(path.as_ptr(), flags, 0o600) }
}

#[test]
fn identity_is_the_users_own_and_no_other() {
    // SAFETY: none of these calls takes a pointer that is used.
    let end = jailed(|| unsafe {
        first_false(&[
            libc::getuid() == UID && libc::geteuid() == UID,
            libc::getgid() == UID && libc::getegid() == UID,
            libc::getgroups(0, std::ptr::null_mut()) == 0,
            libc::setuid(0) == -1,
            libc::setgid(0) == -1,
            libc::setresuid(0, 0, 0) == -1,
            libc::setgroups(0, std::ptr::null()) == -1,
        ])
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn no_capability_is_left_nor_can_one_be_gained() {
    let end = jailed(|| {
        let sets = rustix::thread::capabilities(None).unwrap();
        // SAFETY: prctl with these options takes numbers.
        let bounding =
            (0..41).all(|number| unsafe { libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0) } == 0);
        first_false(&[
            sets.effective.is_empty() && sets.permitted.is_empty() && sets.inheritable.is_empty(),
            bounding,
            // SAFETY: as above.
            unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) } == 1,
            // SAFETY: as above.
            unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) } == 0,
        ])
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn the_root_directory_is_empty_and_stays_so() {
    let end = jailed(|| {
        // Landlock forbids to list even an empty directory; to look a name up needs no right.
        let listed = match std::fs::read_dir("/") {
            Ok(names) => names.count() == 0,
            Err(error) => error.raw_os_error() == Some(libc::EACCES),
        };
        let nothing = ["etc", "proc", "dev", "usr", "run", "tmp"].iter().all(|name| {
            std::fs::symlink_metadata(format!("/{name}"))
                .is_err_and(|error| error.raw_os_error() == Some(libc::ENOENT))
        });
        let refused = || matches!(errno(), libc::EROFS | libc::EACCES);
        let enoent = |path| open(path, libc::O_RDONLY) == -1 && errno() == libc::ENOENT;
        first_false(&[
            listed && nothing,
            enoent(c"/etc/passwd"),
            enoent(c"/proc/self/status"),
            enoent(c"/dev/kvm"),
            enoent(c"/../../etc/passwd"),
            open(c"/file", libc::O_CREAT | libc::O_WRONLY) == -1 && refused(),
            // SAFETY: the path is a C string.
            unsafe { libc::mkdir(c"/dir".as_ptr(), 0o700) } == -1 && refused(),
            std::env::current_dir().is_ok_and(|at| at.as_os_str() == "/"),
        ])
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn mounts_chroots_and_namespaces_are_out_of_reach() {
    // SAFETY: all pointers are C strings or null where the kernel allows it.
    let end = jailed(|| unsafe {
        let (none, root, tmpfs) = (c"none".as_ptr(), c"/".as_ptr(), c"tmpfs".as_ptr());
        first_false(&[
            libc::mount(none, root, tmpfs, 0, std::ptr::null()) == -1 && errno() == libc::EPERM,
            libc::mount(none, root, std::ptr::null(), libc::MS_REMOUNT | libc::MS_BIND, std::ptr::null())
                == -1,
            libc::umount2(root, libc::MNT_DETACH) == -1,
            libc::chroot(root) == -1 && errno() == libc::EPERM,
            libc::unshare(libc::CLONE_NEWNET) == -1 && errno() == libc::EPERM,
            libc::sethostname(c"x".as_ptr(), 1) == -1,
        ])
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn the_network_is_empty() {
    let end = jailed(|| {
        let refused = std::net::TcpStream::connect("127.0.0.1:80").is_err();
        let unreachable =
            std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(&[0], "192.0.2.1:9"));
        // SAFETY: the name is a C string.
        let no_card = (1..64).filter(|index| {
            let mut name = [0; libc::IF_NAMESIZE];
            // SAFETY: the buffer has the size that the call asks for.
            !unsafe { libc::if_indextoname(*index, name.as_mut_ptr()) }.is_null()
        });
        first_false(&[refused, unreachable.is_err(), no_card.count() == 1])
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn other_processes_cannot_be_touched() {
    let parent = std::process::id() as i32;
    // SAFETY: none of these calls takes a pointer that is used.
    let end = jailed(|| unsafe {
        first_false(&[libc::kill(parent, 0) == -1, libc::ptrace(libc::PTRACE_ATTACH, parent, 0, 0) == -1])
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn other_pods_memory_and_signals_are_out_of_reach() {
    let secret = [7u8; 64];
    // Another VMM: same jail, another user, as the runtime gives one to each pod.
    let mut pod = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let others = [std::process::id() as i32, pod.id() as i32];
    let address = secret.as_ptr();
    // SAFETY: the kernel refuses before it looks at what is pointed to; every buffer has the size that is named.
    let end = jailed(|| unsafe {
        let mut mine = [0u8; 64];
        let local = libc::iovec { iov_base: mine.as_mut_ptr().cast(), iov_len: mine.len() };
        let remote = libc::iovec { iov_base: address.cast_mut().cast(), iov_len: mine.len() };
        for pid in others {
            let read = libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) == -1;
            let written = libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) == -1;
            let signalled =
                [0, libc::SIGTERM, libc::SIGSTOP, libc::SIGKILL].iter().all(|s| libc::kill(pid, *s) == -1);
            let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32;
            // A handle may be had; what could be done with it may not.
            let sent = pidfd >= 0 && libc::syscall(libc::SYS_pidfd_send_signal, pidfd, 9, 0, 0) == 0;
            let taken = pidfd >= 0 && libc::syscall(libc::SYS_pidfd_getfd, pidfd, 0, 0) >= 0;
            let memory = std::fs::File::open(format!("/proc/{pid}/mem")).is_err();
            let checks = [read, written, signalled, !sent, !taken, memory];
            if first_false(&checks) != 0 {
                return first_false(&checks);
            }
        }
        0
    });
    let alive = pod.try_wait().unwrap().is_none();
    pod.kill().unwrap();
    pod.wait().unwrap();
    assert_eq!((end, alive), (End::Exit(0), true));
}

#[test]
fn limits_bind() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LIMITS.file_bytes).unwrap();
    let fd = file.as_raw_fd();
    // SAFETY: the descriptor is open, the buffer has one byte.
    let end = jailed(|| unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let write = |at| libc::pwrite(fd, [1u8].as_ptr().cast(), 1, at);
        let mut opened = 0;
        while libc::dup(fd) >= 0 {
            opened += 1;
        }
        first_false(&[
            write(LIMITS.file_bytes as i64 - 1) == 1,
            write(LIMITS.file_bytes as i64) == -1,
            opened < LIMITS.descriptors,
            libc::setrlimit(libc::RLIMIT_NOFILE, &libc::rlimit { rlim_cur: 4096, rlim_max: 4096 }) == -1,
        ])
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn nobody_is_jailed_as_root() {
    let end =
        child(|| first_false(&[jail::enter(0, LIMITS).is_err(), jail::enter(u32::MAX, LIMITS).is_err()]));
    assert_eq!(end, End::Exit(0));
}

fn filtered(class: Class, call: impl FnOnce()) -> End {
    let program = seccomp::compile(class).unwrap();
    child(|| {
        if rustix::thread::set_no_new_privs(true).is_err() || seccomp::install(class, &program).is_err() {
            return 99;
        }
        call();
        0
    })
}

/// The filter strikes, or it does not: what the call returns says nothing.
fn ignore<T>(_result: T) {}

const CLASSES: [Class; 3] = [Class::Main, Class::Vcpu, Class::Disk];

#[test]
fn what_no_thread_needs_kills_the_process() {
    // SAFETY: wrong arguments only; no call gets as far as using them.
    let calls: [(&str, fn()); 13] = unsafe {
        [
            ("open", || ignore(open(c"/etc/passwd", libc::O_RDONLY))),
            ("openat", || ignore(libc::syscall(libc::SYS_openat, -1, c"/".as_ptr(), 0))),
            ("socket", || ignore(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0))),
            ("connect", || ignore(libc::connect(-1, std::ptr::null(), 0))),
            ("execve", || ignore(libc::execve(c"/bin/sh".as_ptr(), std::ptr::null(), std::ptr::null()))),
            ("fork", || ignore(libc::syscall(libc::SYS_fork))),
            ("clone3", || ignore(libc::syscall(libc::SYS_clone3, 0, 0))),
            ("ptrace", || ignore(libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0))),
            ("setuid", || ignore(libc::syscall(libc::SYS_setuid, 0))),
            ("bpf", || ignore(libc::syscall(libc::SYS_bpf, 0, 0, 0))),
            ("io_uring_setup", || ignore(libc::syscall(libc::SYS_io_uring_setup, 1, 0))),
            ("process_vm_readv", || ignore(libc::syscall(libc::SYS_process_vm_readv, 1, 0, 0, 0, 0, 0))),
            ("kill", || ignore(libc::syscall(libc::SYS_kill, 1, 0))),
        ]
    };
    for class in CLASSES {
        for (name, call) in calls {
            assert_eq!(filtered(class, call), End::Signal(libc::SIGSYS), "{class:?} {name}");
        }
    }
}

/// Maps a page with these protections and unmaps it.
fn map(protection: i32) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping, given back at once.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0);
        libc::munmap(page, 4096);
    }
}

#[test]
fn memory_can_be_mapped_but_never_executed() {
    let (data, code) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
    for class in CLASSES {
        assert_eq!(filtered(class, || map(data)), End::Exit(0), "{class:?}");
        assert_eq!(filtered(class, || map(code)), End::Signal(libc::SIGSYS), "{class:?}");
        let protect = || {
            // SAFETY: the address is not mapped; the filter strikes first.
            unsafe { libc::mprotect(4096 as *mut _, 4096, code) };
        };
        assert_eq!(filtered(class, protect), End::Signal(libc::SIGSYS), "{class:?}");
    }
}

#[test]
fn each_class_has_only_its_own_calls() {
    fn ioctl(request: u64) {
        // SAFETY: there is no descriptor -1.
        unsafe { libc::ioctl(-1, request as _, 0) };
    }
    const KVM_RUN: u64 = 0xae80;
    const KVM_CREATE_VCPU: u64 = 0xae41;
    const VHOST_SET_OWNER: u64 = 0xaf01;
    const TUNSETIFF: u64 = 0x4004_54ca;
    let killed = End::Signal(libc::SIGSYS);
    assert_eq!(filtered(Class::Vcpu, || ioctl(KVM_RUN)), End::Exit(0));
    for request in [KVM_CREATE_VCPU, VHOST_SET_OWNER, TUNSETIFF, libc::FIONREAD] {
        assert_eq!(filtered(Class::Vcpu, || ioctl(request)), killed, "{request:#x}");
    }
    for class in [Class::Main, Class::Disk] {
        assert_eq!(filtered(class, || ioctl(KVM_RUN)), killed, "{class:?}");
    }
    // SAFETY: there is no descriptor -1, and nothing is pointed to.
    let pread: fn() = || unsafe { ignore(libc::syscall(libc::SYS_preadv, -1, 0, 0, 0, 0)) };
    assert_eq!(filtered(Class::Disk, pread), End::Exit(0));
    assert_eq!(filtered(Class::Vcpu, pread), killed);
    assert_eq!(filtered(Class::Main, pread), killed);
    // SAFETY: as above.
    let accept: fn() = || unsafe { ignore(libc::accept4(-1, std::ptr::null_mut(), std::ptr::null_mut(), 0)) };
    assert_eq!(filtered(Class::Main, accept), End::Exit(0));
    assert_eq!(filtered(Class::Disk, accept), killed);
    assert_eq!(filtered(Class::Vcpu, accept), killed);
}
