//! Launching: PID 1's side of a stage (see [`crate::stage`]).
//!
//! ```text
//! spawn in the PID namespace ─► into the cgroup ─► plan and descriptors sent ─► Terminal? ─► Ready ─► end of file: runs
//!                                                                        └─────► Failed, or an early end: killed
//! ```
//!
//! Invariant: when [`launch`] returns an error, no process of it is left.

use crate::cgroup::Cgroup;
use crate::error::{Context as _, Failure, Result};
use crate::reap::{Ending, Processes};
use crate::stage::plan::{MAX_REPORT, Plan, Report};
use crate::sys;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::MemfdFlags;
use rustix::io::IoSliceMut;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use rustix::process::Pid;
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest way of a stage to its program.
const DEADLINE: Duration = Duration::from_secs(30);

/// In which PID namespace a process starts.
#[derive(Clone, Copy)]
pub enum PidNamespace<'a> {
    /// One of its own, whose first process it is.
    New,
    /// The one of the process behind this pidfd.
    Of(BorrowedFd<'a>),
}

/// What to launch.
pub struct Launch<'a> {
    /// Where it sees itself.
    pub namespace: PidNamespace<'a>,
    /// What limits it.
    pub cgroup: &'a Cgroup,
    /// What it does.
    pub plan: &'a Plan,
    /// Its standard descriptors: three, or none for a terminal.
    pub stdio: Vec<OwnedFd>,
    /// The running container whose mounts it enters.
    pub container: Option<BorrowedFd<'a>>,
}

/// A process that runs.
pub struct Launched {
    /// Its number here.
    pub pid: Pid,
    /// Stands for it also when the number has been given to another.
    pub pidfd: OwnedFd,
    /// Its end, some time.
    pub ending: Arc<Ending>,
    /// Its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
}

/// Launches and waits until the program runs.
pub fn launch(processes: &Processes, launch: Launch<'_>) -> Result<Launched> {
    let (ours, theirs) = sys::seqpacket_pair().during(|| "make a socket pair".into())?;
    let (pid, pidfd, ending) = processes.launch(|| spawn(&["stage"], launch.namespace, Some(theirs)))?;
    let terminal = prepare(&ours, pid, launch);
    if terminal.is_err() {
        // It may be gone already.
        let _ = sys::kill(pid.as_raw_nonzero().get(), libc::SIGKILL);
    }
    Ok(Launched { pid, pidfd, ending, terminal: terminal? })
}

/// Spawns this program in a PID namespace, with a socket as its standard input.
pub fn spawn(role: &[&str], namespace: PidNamespace<'_>, control: Option<OwnedFd>) -> Result<Pid> {
    // Entering a PID namespace concerns the children of one thread: this one, which ends at once.
    std::thread::scope(|scope| {
        let spawner = std::thread::Builder::new().name("spawn".into()).spawn_scoped(scope, move || {
            match namespace {
                PidNamespace::New => sys::unshare_pid_namespace().during(|| "make a PID namespace".into())?,
                PidNamespace::Of(pidfd) => sys::enter_pid_namespace(pidfd)
                    .during(|| "enter the PID namespace of the container".into())?,
            }
            let mut command = Command::new("/proc/self/exe");
            command.args(role).env_clear().stdout(Stdio::null());
            command.stdin(control.map_or_else(Stdio::null, Stdio::from));
            let child = command.spawn().during(|| format!("spawn {role:?}"))?;
            // The reaper waits for it, not this handle.
            i32::try_from(child.id())
                .ok()
                .and_then(Pid::from_raw)
                .ok_or_else(|| Failure::system("spawned no process"))
        });
        let spawner = spawner.during(|| "start a thread to spawn from".into())?;
        spawner.join().unwrap_or_else(|_| Err(Failure::system("the spawning thread failed")))
    })
}

fn prepare(ours: &OwnedFd, pid: Pid, launch: Launch<'_>) -> Result<Option<OwnedFd>> {
    launch.cgroup.add(pid.as_raw_nonzero().get())?;
    send_plan(ours, &launch)?;
    drop(launch.stdio);
    let until = Instant::now() + DEADLINE;
    let (mut terminal, mut ready) = (None, false);
    loop {
        match receive(ours, until)? {
            Some((Report::Terminal, Some(master))) => terminal = Some(master),
            Some((Report::Terminal, None)) => return Err(Failure::system("the stage sent no terminal")),
            Some((Report::Ready, _)) => ready = true,
            Some((Report::Failed { kind, message }, _)) => return Err(Failure { kind, message }),
            None if ready => return Ok(terminal),
            None => {
                return Err(Failure::system(
                    "the container's first process died before its command could run",
                ));
            }
        }
    }
}

fn send_plan(ours: &OwnedFd, launch: &Launch<'_>) -> Result<()> {
    let what = || "send the plan".to_owned();
    let memory = rustix::fs::memfd_create("plan", MemfdFlags::CLOEXEC).during(what)?;
    let mut file = std::fs::File::from(memory);
    let text = serde_json::to_vec(launch.plan).during(what)?;
    file.write_all(&text).during(what)?;
    let mut fds = vec![file.as_fd()];
    fds.extend(launch.stdio.iter().map(OwnedFd::as_fd));
    fds.extend(launch.container);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    // Three at most.
    let count = [launch.stdio.len() as u8];
    sendmsg(ours, &[std::io::IoSlice::new(&count)], &mut ancillary, SendFlags::NOSIGNAL)
        .during(what)
        .map(drop)
}

/// The next report; `None` when the stage has closed its end.
fn receive(ours: &OwnedFd, until: Instant) -> Result<Option<(Report, Option<OwnedFd>)>> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = rustix::event::Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
        tv_nsec: i64::from(left.subsec_nanos()),
    };
    let mut polled = [PollFd::new(ours, PollFlags::IN)];
    match poll(&mut polled, Some(&timeout)) {
        Ok(0) => {
            return Err(Failure::system(format!(
                "the container's command did not start within {} s",
                DEADLINE.as_secs()
            )));
        }
        Err(rustix::io::Errno::INTR) => return receive(ours, until),
        other => other.during(|| "wait for the stage".into())?,
    };
    let mut buffer = vec![0; MAX_REPORT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(ours, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
    let bytes = match received {
        Ok(message) => message.bytes,
        Err(rustix::io::Errno::CONNRESET) => 0,
        Err(error) => return Err(error).during(|| "hear from the stage".into()),
    };
    if bytes == 0 {
        return Ok(None);
    }
    let fd = ancillary.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let report = serde_json::from_slice(&buffer[..bytes]).during(|| "understand the stage".into())?;
    Ok(Some((report, fd)))
}
