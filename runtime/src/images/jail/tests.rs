//! The cage, tried from inside: a child closes it around itself and tries what must not work.

use super::*;
use std::ffi::CStr;
use std::os::unix::fs::PermissionsExt as _;

const USER: u32 = 65534;

/// Runs `inside` in a caged child; gives the status with which it ended: 0 for success.
fn caged(work: &Path, inside: impl FnOnce() -> i32) -> i32 {
    assert!(rustix::process::geteuid().is_root(), "only root can close the cage: run the tests as root");
    // SAFETY: the child does little more than system calls and ends with _exit; glibc keeps malloc usable after fork.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork");
    if pid == 0 {
        let openings =
            Openings { work, programs: &["/usr".into(), "/lib".into(), "/lib64".into()], uid: Some(USER) };
        let code = match close(&openings) {
            Ok(()) => inside(),
            Err(_) => 99,
        };
        // SAFETY: ends the child without running the test harness's destructors.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above; the status outlives the call.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFSIGNALED(status) { 1000 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

/// The number of the first check that does not hold, counted from 1.
fn first_false(checks: &[bool]) -> i32 {
    checks.iter().position(|check| !check).map_or(0, |at| at as i32 + 1)
}

fn refused(result: i64) -> bool {
    result == -1 && matches!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

fn open(path: &CStr, flags: i32) -> i64 {
    // SAFETY: the path is a C string.
    i64::from(unsafe { libc::open(path.as_ptr(), flags, 0o600) })
}

fn work() -> tempfile::TempDir {
    let work = tempfile::tempdir().unwrap();
    std::fs::set_permissions(work.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    work
}

#[test]
fn files_outside_its_directory_cannot_be_touched() {
    let (work, other) = (work(), work());
    std::fs::write(other.path().join("secret"), "x").unwrap();
    std::fs::set_permissions(other.path().join("secret"), std::fs::Permissions::from_mode(0o666)).unwrap();
    let secret = std::ffi::CString::new(other.path().join("secret").to_str().unwrap()).unwrap();
    let new = std::ffi::CString::new(other.path().join("new").to_str().unwrap()).unwrap();
    let own = work.path().join("own");
    let code = caged(work.path(), || {
        first_false(&[
            std::fs::write(&own, "mine").is_ok() && std::fs::read(&own).is_ok(),
            // Open to everybody, but for the cage.
            refused(open(&secret, libc::O_RDONLY)),
            refused(open(&secret, libc::O_WRONLY)),
            refused(open(&new, libc::O_CREAT | libc::O_WRONLY)),
            refused(open(c"/etc/passwd", libc::O_RDONLY)),
            refused(open(c"/dev/shm/atoll-new", libc::O_CREAT | libc::O_WRONLY)),
            refused(open(c"/usr/atoll-new", libc::O_CREAT | libc::O_WRONLY)),
            refused(open(c"/dev/zero", libc::O_RDONLY)),
            std::fs::read_dir(other.path()).is_err(),
            std::fs::hard_link(&own, other.path().join("link")).is_err(),
            std::fs::rename(&own, other.path().join("moved")).is_err(),
        ])
    });
    assert_eq!(code, 0);
}

#[test]
fn it_is_nobody_and_can_become_nobody_else() {
    // SAFETY: none of these calls takes a pointer that is used.
    let code = caged(work().path(), || unsafe {
        first_false(&[
            libc::getuid() == USER && libc::geteuid() == USER && libc::getgid() == USER,
            libc::getgroups(0, std::ptr::null_mut()) == 0,
            refused(i64::from(libc::setuid(0))),
            refused(i64::from(libc::setgid(0))),
            libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
            rustix::thread::capabilities(None)
                .is_ok_and(|sets| sets.effective.is_empty() && sets.permitted.is_empty()),
        ])
    });
    assert_eq!(code, 0);
}

#[test]
fn there_is_no_network() {
    // SAFETY: none of these calls takes a pointer that is used.
    let code = caged(work().path(), || unsafe {
        let socket = |family, kind| refused(i64::from(libc::socket(family, kind, 0)));
        let mut pair = [0; 2];
        first_false(&[
            socket(libc::AF_INET, libc::SOCK_STREAM),
            socket(libc::AF_INET6, libc::SOCK_DGRAM),
            socket(libc::AF_UNIX, libc::SOCK_STREAM),
            socket(libc::AF_NETLINK, libc::SOCK_RAW),
            socket(libc::AF_VSOCK, libc::SOCK_STREAM),
            // With a pair of its own it can only speak to itself.
            libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()) == 0,
            refused(libc::syscall(libc::SYS_connect, pair[0], 0, 0)),
            refused(libc::syscall(libc::SYS_bind, pair[0], 0, 0)),
        ])
    });
    assert_eq!(code, 0);
}

#[test]
fn every_refused_system_call_answers_not_permitted() {
    let code = caged(work().path(), || {
        for (at, number) in REFUSED.iter().enumerate() {
            // SAFETY: the filter answers before any argument is looked at.
            let result = unsafe { libc::syscall(*number, 0, 0, 0, 0, 0, 0) };
            if result != -1 || std::io::Error::last_os_error().raw_os_error() != Some(libc::EPERM) {
                return at as i32 + 1;
            }
        }
        0
    });
    assert_eq!(code, 0, "the call after position {code} of the list is not refused");
}

#[test]
fn other_processes_get_no_signal_and_show_no_memory() {
    let parent = std::process::id() as i32;
    // SAFETY: none of these calls takes a pointer that is used.
    let code = caged(work().path(), || unsafe {
        first_false(&[
            [0, libc::SIGTERM, libc::SIGKILL, libc::SIGSTOP]
                .iter()
                .all(|s| refused(i64::from(libc::kill(parent, *s)))),
            refused(libc::ptrace(libc::PTRACE_ATTACH, parent, 0, 0)),
            refused(libc::syscall(libc::SYS_process_vm_readv, parent, 0, 0, 0, 0, 0)),
            refused(libc::syscall(libc::SYS_pidfd_open, parent, 0)),
            std::fs::File::open(format!("/proc/{parent}/mem")).is_err(),
            std::fs::File::open(format!("/proc/{parent}/environ")).is_err(),
        ])
    });
    assert_eq!(code, 0);
}

#[test]
fn only_programs_it_was_given_can_be_run() {
    let (work, other) = (work(), work());
    for directory in [work.path(), other.path()] {
        std::fs::copy("/bin/true", directory.join("program")).unwrap();
    }
    let run = |path: &Path| std::process::Command::new(path).status();
    let code = caged(work.path(), || {
        first_false(&[
            run(Path::new("/usr/bin/true")).is_ok_and(|status| status.success()),
            // What an archive brings along cannot be executed.
            run(&work.path().join("program")).is_err(),
            run(&other.path().join("program")).is_err(),
        ])
    });
    assert_eq!(code, 0);
}

#[test]
fn memory_and_descriptors_are_bounded() {
    // SAFETY: a mapping that is refused, and duplicates of standard error.
    let code = caged(work().path(), || unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let huge = libc::mmap(std::ptr::null_mut(), 5 << 30, libc::PROT_READ, flags, -1, 0);
        let mut opened = 0;
        while libc::dup(2) >= 0 {
            opened += 1;
        }
        first_false(&[
            huge == libc::MAP_FAILED,
            opened < 256,
            refused(i64::from(libc::setrlimit(
                libc::RLIMIT_AS,
                &libc::rlimit { rlim_cur: 8 << 30, rlim_max: 8 << 30 },
            ))),
        ])
    });
    assert_eq!(code, 0);
}

#[test]
fn it_ends_with_its_parent() {
    let code = caged(work().path(), || match rustix::process::parent_process_death_signal() {
        Ok(Some(rustix::process::Signal::KILL)) => 0,
        _ => 1,
    });
    assert_eq!(code, 0);
}
