//! Starting programs: services with everything they may and may not do, and short commands with a deadline.
//!
//! A child is made by clone3 straight into its cgroup and gets a pidfd. Between clone and exec it may only use what
//! was prepared before: other threads exist, and any lock of theirs (the allocator's too) may be held for ever in
//! the child. So no allocation, no formatting, system calls alone; what fails is told to the parent over a pipe.

use crate::clock;
use crate::error::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Longest time from clone to exec: reading a program from a compressed file system under memory pressure.
const EXEC_DEADLINE: Duration = Duration::from_secs(10);
/// As the kernel has it; the C library's own constant does not fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// Highest capability number asked to be dropped; the kernel says where its own end is.
const LAST_CAPABILITY: u32 = 63;

/// Who a program runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

/// What a program gets and what is kept from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confinement {
    /// Who it runs as.
    pub user: User,
    /// Capabilities that it and its children can ever have, one bit each.
    pub capabilities: u64,
    /// Most open files.
    pub open_files: u64,
    /// Who dies first when memory is short: −1000 never, 1000 first.
    pub oom_score_adj: i16,
    /// Directories that it sees empty. Gives it a mount namespace of its own when there are any.
    pub hidden: Vec<String>,
}

/// A program to start.
#[derive(Debug)]
pub struct Program<'a> {
    /// Path and arguments.
    pub command: &'a [String],
    /// Environment, `NAME=value` each.
    pub environment: &'a [String],
    /// Its limits; `None` runs it as init itself, for init's own tools.
    pub confinement: Option<&'a Confinement>,
    /// Cgroup to be born in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Standard output and error.
    pub output: BorrowedFd<'a>,
}

/// A started program.
#[derive(Debug)]
pub struct Child {
    /// Its process.
    pub pid: u32,
    /// Readable once it has ended; never another process, even when the number is used again.
    pub pidfd: OwnedFd,
}

/// Steps between clone and exec, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Session,
    Streams,
    Oom,
    Limits,
    Mounts,
    Capabilities,
    Identity,
    NoNewPrivileges,
    Exec,
}

const STEPS: [(Step, &str); 9] = [
    (Step::Session, "start the session"),
    (Step::Streams, "connect the standard streams"),
    (Step::Oom, "set the out-of-memory score"),
    (Step::Limits, "set the resource limits"),
    (Step::Mounts, "make the mount namespace"),
    (Step::Capabilities, "drop the capabilities"),
    (Step::Identity, "change to the user"),
    (Step::NoNewPrivileges, "forbid new privileges"),
    (Step::Exec, "run the program file"),
];

/// Everything the child needs, prepared before it exists.
struct Prepared<'a> {
    path: CString,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    confinement: Option<&'a Confinement>,
    oom: Vec<u8>,
    hidden: Vec<CString>,
    null: OwnedFd,
    output: BorrowedFd<'a>,
    report: OwnedFd,
}

/// Starts a program and waits until it runs its own code, or has failed to.
///
/// # Errors
/// When it cannot be started, with the step that failed.
pub fn spawn(program: &Program<'_>) -> Result<Child> {
    let name = program.command.first().cloned().unwrap_or_default();
    let failed = |step: &'static str| {
        let program = name.clone();
        move |source: io::Error| Error::Spawn { program, step, source }
    };
    let strings = |words: &[String]| -> io::Result<Vec<CString>> {
        words.iter().map(|word| Ok(CString::new(word.as_str())?)).collect()
    };
    let arguments = strings(program.command).map_err(failed("prepare the arguments"))?;
    let environment = strings(program.environment).map_err(failed("prepare the environment"))?;
    let (report_read, report) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed("make a pipe for the start")(e.into()))?;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
    let prepared = Prepared {
        path: arguments.first().cloned().unwrap_or_default(),
        argv: pointers(&arguments),
        envp: pointers(&environment),
        confinement: program.confinement,
        oom: program.confinement.map(|c| c.oom_score_adj.to_string().into_bytes()).unwrap_or_default(),
        hidden: strings(program.confinement.map_or(&[][..], |c| &c.hidden))
            .map_err(failed("prepare the mount namespace"))?,
        null: null.map_err(failed("open /dev/null for the streams"))?.into(),
        output: program.output,
        report,
    };
    let child = clone_into(program.cgroup, &prepared).map_err(failed("make a process for the start"))?;
    drop(prepared);
    match read_report(&report_read) {
        Ok(None) => Ok(child),
        outcome => {
            end(&child);
            let (step, source) = match outcome {
                Ok(Some((step, source))) => (step, source),
                Err(source) => ("wait for the start", source),
                Ok(None) => ("wait for the start", io::ErrorKind::Other.into()),
            };
            Err(failed(step)(source))
        }
    }
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Kills a child that never became a program and collects it.
fn end(child: &Child) {
    // It may have ended by itself; then there is nothing to kill.
    let _ = rustix::process::pidfd_send_signal(&child.pidfd, Signal::KILL);
    let _ = wait_status(child, EXEC_DEADLINE);
}

fn read_report(pipe: &OwnedFd) -> io::Result<Option<(&'static str, io::Error)>> {
    if !wait_readable(pipe.as_fd(), EXEC_DEADLINE)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut report = [0_u8; 5];
    match rustix::io::retry_on_intr(|| rustix::io::read(pipe, &mut report))? {
        0 => Ok(None),
        5 => {
            let step =
                STEPS.iter().find(|(step, _)| *step as u8 == report[0]).map_or("start", |(_, name)| name);
            let errno = i32::from_ne_bytes([report[1], report[2], report[3], report[4]]);
            Ok(Some((step, io::Error::from_raw_os_error(errno))))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Waits until a descriptor is readable; `false` when the deadline came first.
fn wait_readable(fd: BorrowedFd<'_>, deadline: Duration) -> io::Result<bool> {
    let end = clock::uptime() + deadline;
    loop {
        let left = end.saturating_sub(clock::uptime());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn clone_into(cgroup: Option<BorrowedFd<'_>>, prepared: &Prepared<'_>) -> io::Result<Child> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: all zeroes is a valid clone_args: no flags, no pointers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::try_from(libc::CLONE_PIDFD).unwrap_or(0);
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = u64::try_from(libc::SIGCHLD).unwrap_or(0);
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).unwrap_or(0);
    }
    // SAFETY: without CLONE_VM the child runs on a copy of this memory and this stack. The arguments are valid for
    // the length given. The child calls nothing but `become_program`, which keeps to system calls and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    match pid {
        0 => become_program(prepared),
        pid if pid > 0 => {
            // SAFETY: the kernel has just stored this descriptor for us and nobody else has it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Child { pid: u32::try_from(pid).unwrap_or(0), pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// The child's way to its program. System calls alone, see the head of this file.
fn become_program(prepared: &Prepared<'_>) -> ! {
    let (step, error) = match try_become(prepared) {
        Err(failure) => failure,
        Ok(()) => (Step::Exec, libc::EINVAL),
    };
    let mut report = [step as u8, 0, 0, 0, 0];
    report[1..].copy_from_slice(&error.to_ne_bytes());
    // Nobody left to tell when this fails: the parent sees the child end.
    let _ = rustix::io::write(&prepared.report, &report);
    // SAFETY: ends this process at once, without running anything of the parent's.
    unsafe { libc::_exit(127) }
}

type Failure = (Step, i32);

fn at<T, E: Into<io::Error>>(
    step: Step,
    result: std::result::Result<T, E>,
) -> std::result::Result<T, Failure> {
    result.map_err(|error| (step, error.into().raw_os_error().unwrap_or(libc::EINVAL)))
}

fn try_become(prepared: &Prepared<'_>) -> std::result::Result<(), Failure> {
    at(Step::Session, rustix::process::setsid())?;
    at(Step::Session, reset_signals())?;
    for (fd, target) in
        [(prepared.null.as_raw_fd(), 0), (prepared.output.as_raw_fd(), 1), (prepared.output.as_raw_fd(), 2)]
    {
        // SAFETY: dup2 takes two integers; both descriptors of ours stay open.
        at(Step::Streams, check(unsafe { libc::dup2(fd, target) }.into()))?;
    }
    if let Some(confinement) = prepared.confinement {
        confine(prepared, confinement)?;
    }
    // SAFETY: the path and both arrays were prepared by the parent, are NUL- and null-terminated and still alive in
    // this copy of its memory.
    unsafe { libc::execve(prepared.path.as_ptr(), prepared.argv.as_ptr(), prepared.envp.as_ptr()) };
    at(Step::Exec, Err(io::Error::last_os_error()))
}

fn confine(prepared: &Prepared<'_>, confinement: &Confinement) -> std::result::Result<(), Failure> {
    at(Step::Oom, write_file(c"/proc/self/oom_score_adj", &prepared.oom))?;
    at(Step::Limits, limit(libc::RLIMIT_NOFILE, confinement.open_files))?;
    at(Step::Limits, limit(libc::RLIMIT_CORE, 0))?;
    if !prepared.hidden.is_empty() {
        at(Step::Mounts, hide(&prepared.hidden))?;
    }
    for capability in 0..=LAST_CAPABILITY {
        if confinement.capabilities & (1 << capability) == 0 {
            // SAFETY: prctl with integers only.
            let dropped =
                unsafe { libc::syscall(libc::SYS_prctl, libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            match check(dropped) {
                // The kernel's last capability is behind us.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
                outcome => at(Step::Capabilities, outcome)?,
            }
        }
    }
    at(Step::Identity, change_user(&confinement.user))?;
    // SAFETY: prctl with integers only.
    let set = unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    at(Step::NoNewPrivileges, check(set))
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Default handling of all signals and none blocked: what was blocked or ignored would outlive exec.
fn reset_signals() -> io::Result<()> {
    // SAFETY: SIG_DFL is a valid disposition for every signal, and the kernel refuses those that have none. The
    // sigset is initialised before use. Both run in the child's only thread.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()).into())
    }
}

fn write_file(path: &CStr, content: &[u8]) -> io::Result<()> {
    use rustix::fs::{Mode, OFlags};
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, content).map(drop)?;
    Ok(())
}

fn limit(resource: libc::__rlimit_resource_t, most: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: setrlimit reads one rlimit, which lives across the call.
    check(unsafe { libc::setrlimit(resource, &raw const limit) }.into())
}

fn hide(directories: &[CString]) -> io::Result<()> {
    // SAFETY: unshare takes an integer. CLONE_NEWNS also gives this process its own root and working directory.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into())?;
    // Mounts that hostd makes later still arrive here; none of ours leave.
    rustix::mount::mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    for directory in directories {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
        rustix::mount::mount(c"none", directory.as_c_str(), c"tmpfs", flags, c"size=4k,mode=0555")?;
    }
    Ok(())
}

/// Raw system calls: the C library's versions ask all threads of the process to follow, and in this child those are
/// a memory of the parent's.
fn change_user(user: &User) -> io::Result<()> {
    // PID 1 is root without further groups: nothing to change.
    if user.uid == 0 && user.gid == 0 && user.groups.is_empty() {
        return Ok(());
    }
    // SAFETY: the groups live across the call and their count is right.
    check(unsafe { libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()) })?;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, user.gid, user.gid, user.gid) })?;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid) })
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// From what waitid says.
    pub fn from_status(status: &WaitIdStatus) -> Self {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Code(-1),
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with code {code}"),
            Self::Signal(libc::SIGKILL) => f.write_str("was killed (SIGKILL)"),
            Self::Signal(libc::SIGSEGV) => f.write_str("crashed (SIGSEGV)"),
            Self::Signal(libc::SIGABRT) => f.write_str("aborted (SIGABRT)"),
            Self::Signal(signal) => write!(f, "ended by signal {signal}"),
        }
    }
}

fn wait_status(child: &Child, deadline: Duration) -> io::Result<Option<Exit>> {
    if !wait_readable(child.pidfd.as_fd(), deadline)? {
        return Ok(None);
    }
    let status = rustix::process::waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED)?;
    Ok(status.as_ref().map(Exit::from_status))
}

/// Runs one of init's own tools to its end, as long as it keeps the deadline. Its output is thrown away. One that
/// overruns goes on, and is collected like any orphan: a kill could break what the kernel does for it.
///
/// # Errors
/// When it cannot be started, or has overrun.
pub fn run(command: &[String], deadline: Duration) -> Result<Exit> {
    let program = command.first().cloned().unwrap_or_default();
    let null =
        std::fs::File::options().write(true).open("/dev/null").map_err(Error::file("open", "/dev/null"))?;
    let environment = ["PATH=/usr/sbin:/usr/bin".to_owned()];
    let child = spawn(&Program {
        command,
        environment: &environment,
        confinement: None,
        cgroup: None,
        output: null.as_fd(),
    })?;
    match wait_status(&child, deadline) {
        Ok(Some(exit)) => Ok(exit),
        Ok(None) => Err(Error::Overrun { program, deadline }),
        Err(source) => Err(Error::Spawn { program, step: "wait for the end", source }),
    }
}

/// A pidfd for a process that exists already.
///
/// # Errors
/// When there is none.
pub fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn runs_a_program_and_tells_how_it_ended() {
        let deadline = Duration::from_secs(20);
        assert_eq!(run(&words(&["/bin/true"]), deadline).unwrap(), Exit::Code(0));
        assert_eq!(run(&words(&["/bin/sh", "-c", "kill -9 $$"]), deadline).unwrap(), Exit::Signal(9));
    }

    #[test]
    fn says_what_is_missing() {
        let error = run(&words(&["/nowhere/atoll-hostd"]), Duration::from_secs(20)).unwrap_err();
        let text = crate::error::chain(&error);
        assert!(text.contains("run the program file of /nowhere/atoll-hostd: No such file"), "{text}");
    }

    #[test]
    fn what_overruns_is_told_and_goes_on_even_without_any_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let script = r#"until [ -e "$0" ]; do sleep 0.02; done; : > "$1""#;
        let error =
            run(&words(&["/bin/sh", "-c", script, &path("go"), &path("done")]), Duration::ZERO).unwrap_err();
        assert!(matches!(error, Error::Overrun { .. }), "{error:?}");
        std::fs::write(path("go"), "").unwrap();
        let end = clock::uptime() + Duration::from_secs(20);
        while !std::path::Path::new(&path("done")).exists() {
            assert!(clock::uptime() < end, "it did not go on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_child_starts_with_clean_signals_and_its_own_environment() {
        crate::sys::block_signals().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let child = spawn(&Program {
            command: &words(&["/bin/sh", "-c", "echo $X; grep -E 'SigBlk|SigIgn' /proc/self/status"]),
            environment: &words(&["X=y"]),
            confinement: None,
            cgroup: None,
            output: writer.as_fd(),
        })
        .unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("y\n"), "{text}");
        assert!(text.contains("SigBlk:\t0000000000000000"), "{text}");
        let ignored = text.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        let ignored = u64::from_str_radix(ignored, 16).unwrap();
        assert_eq!(ignored & (1 << (libc::SIGPIPE - 1)), 0, "{text}");
        assert_eq!(wait_status(&child, Duration::from_secs(20)).unwrap(), Some(Exit::Code(0)));
    }
}
