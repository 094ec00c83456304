//! A process on its way into a container: `atoll-guest stage`, spawned by PID 1, ends in `execve` of the
//! container's command.
//!
//! A program of its own (the same binary) because what it does (mounts, users, memory allocation) must not
//! happen in the child of a fork of a process with threads. It is spawned inside the right PID namespace, waits for
//! its plan until it is in its cgroup, and reports over the socket that is its standard input.
//!
//! ```text
//! plan ─► namespaces ─► mount tree ─► pivot ─► terminal ─► system calls ─► who (user, groups, capabilities) ─► execve
//! ```

mod command;
mod filesystem;
mod identity;
pub mod plan;
mod syscalls;

use crate::error::{Context as _, Failure, Result};
use crate::sys;
use plan::{MAX_REPORT, Plan, Report};
use rustix::io::IoSliceMut;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use rustix::thread::ThreadNameSpaceType;
use std::io::{Read as _, Seek as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

/// Descriptors that come with the plan.
struct Descriptors {
    plan: OwnedFd,
    stdio: Stdio,
    /// Of the container to enter.
    container: Option<OwnedFd>,
}

/// Standard descriptors of the process to be; none with a terminal.
struct Stdio(Vec<OwnedFd>);

/// Entry of the stage. Returns only on failure.
pub fn main() -> i32 {
    let control = match sys::adopt(0).and_then(|zero| Ok(rustix::io::fcntl_dupfd_cloexec(&zero, 3)?)) {
        Ok(control) => control,
        Err(_) => return 2,
    };
    let Err(failure) = run(&control);
    report(&control, &Report::Failed { kind: failure.kind, message: failure.message });
    1
}

enum Never {}

fn run(control: &OwnedFd) -> std::result::Result<Never, Failure> {
    // What runs here must not be inspected from inside the container before it is the container's own.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .during(|| "protect the stage".into())?;
    let Descriptors { plan, stdio, container } = receive(control)?;
    let Plan { tree, process } = read_plan(plan)?;
    rustix::process::setsid().during(|| "start a session".into())?;
    identity::set_oom_score(process.oom_score_adj)?;
    match (&tree, container) {
        (Some(tree), None) => {
            sys::unshare_mounts_and_cgroup().during(|| "make the container's namespaces".into())?;
            filesystem::enter(tree, &process.cwd)?;
        }
        (None, Some(pidfd)) => enter(&pidfd)?,
        _ => return Err(Failure::system("the stage got a plan that makes no sense")),
    }
    let stdio = if process.tty { open_terminal(control, tree.is_some())? } else { stdio };
    identity::limit_resources()?;
    let who = identity::look_up(&process.user)?;
    identity::own_stdio(&stdio.0, who.uid)?;
    command::change_directory(&process.cwd)?;
    let prepared = command::Prepared::new(&process, &who)?;
    syscalls::confine(&process)?;
    identity::assume(&who, &process)?;
    connect_stdio(stdio)?;
    let program = prepared.find()?;
    report(control, &Report::Ready);
    sys::reset_signals();
    Err(prepared.exec(&program))
}

/// The descriptors come in one packet: plan, then three of stdio unless there is a terminal, then perhaps a pidfd. The
/// first byte says how many of stdio.
fn receive(control: &OwnedFd) -> Result<Descriptors> {
    let mut byte = [0u8; 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let message = recvmsg(control, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .during(|| "receive the plan".into())?;
    if message.bytes == 0 {
        return Err(Failure::system("PID 1 withdrew the plan"));
    }
    let mut fds = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    let count = usize::from(byte[0]);
    if fds.len() < 1 + count {
        return Err(Failure::system("the plan came without its descriptors"));
    }
    let mut rest = fds.split_off(1);
    let container = (rest.len() > count).then(|| rest.split_off(count).remove(0));
    Ok(Descriptors { plan: fds.remove(0), stdio: Stdio(rest), container })
}

fn read_plan(file: OwnedFd) -> Result<Plan> {
    let mut file = std::fs::File::from(file);
    let mut text = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut text)).during(|| "read the plan".into())?;
    serde_json::from_slice(&text).during(|| "understand the plan".into())
}

fn report(control: &OwnedFd, report: &Report) {
    let mut text = serde_json::to_vec(report).unwrap_or_default();
    text.truncate(MAX_REPORT);
    // When PID 1 does not listen any more there is nobody else to tell.
    let _ = send(control, &text, SendFlags::NOSIGNAL);
}

fn enter(pidfd: &OwnedFd) -> Result<()> {
    // The PID namespace was entered before the stage was spawned.
    let spaces = ThreadNameSpaceType::MOUNT | ThreadNameSpaceType::CONTROL_GROUP;
    rustix::thread::move_into_thread_name_spaces(std::os::fd::AsFd::as_fd(pidfd), spaces)
        .during(|| "enter the container".into())
}

/// A terminal of the container's own `/dev/pts`; its master goes to PID 1, its other end becomes ours.
fn open_terminal(control: &OwnedFd, console: bool) -> Result<Stdio> {
    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master =
        rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty()).during(|| "open /dev/pts/ptmx".into())?;
    unlockpt(&master).during(|| "unlock the terminal".into())?;
    let peer = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .during(|| "open the terminal".into())?;
    if console {
        filesystem::mount_console(&peer)?;
    }
    rustix::process::ioctl_tiocsctty(&peer).during(|| "take the terminal".into())?;
    send_terminal(control, &master)?;
    let copy = || rustix::io::fcntl_dupfd_cloexec(&peer, 3).during(|| "copy the terminal".into());
    Ok(Stdio(vec![copy()?, copy()?, copy()?]))
}

fn send_terminal(control: &OwnedFd, master: &OwnedFd) -> Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
    let text = serde_json::to_vec(&Report::Terminal).during(|| "write a report".into())?;
    let fds = [std::os::fd::AsFd::as_fd(master)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(control, &[std::io::IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL)
        .during(|| "hand over the terminal".into())
        .map(drop)
}

fn connect_stdio(stdio: Stdio) -> Result<()> {
    let what = || "connect the standard descriptors".to_owned();
    let [stdin, stdout, stderr] = <[OwnedFd; 3]>::try_from(stdio.0)
        .map_err(|_| Failure::system("the plan came without three standard descriptors"))?;
    rustix::stdio::dup2_stdin(&stdin).during(what)?;
    rustix::stdio::dup2_stdout(&stdout).during(what)?;
    rustix::stdio::dup2_stderr(&stderr).during(what)
}

/// First process of a PID namespace that the pod's containers share: reaps orphans, and holds nothing that a container
/// could reach through it: its root is the empty directory `empty`.
pub fn pause(empty: &str) -> i32 {
    let kept = rustix::process::chroot(empty)
        .and_then(|()| rustix::process::chdir("/"))
        .and_then(|()| identity::drop_everything());
    if kept.is_err() {
        return 1;
    }
    // A name for `ps`; without it the process works as well.
    let _ = rustix::thread::set_name(c"pause");
    sys::block_child_signal();
    loop {
        while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {}
        sys::wait_for_child_signal(std::time::Duration::from_secs(3600));
    }
}
