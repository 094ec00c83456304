//! Messages between the runtime and the guest's PID 1, over vsock.
//!
//! The guest dials, it never listens: it connects to the host (CID 2) at [`HOST_PORT`] and sends a [`Hello`] as
//! its first frame. The runtime knows which sandbox speaks from the peer's CID, which the guest cannot forge.
//!
//! *Frame*: 4 bytes length, little endian, at most [`MAX_FRAME`], then that many bytes of JSON.
//!
//! *Control connection* ([`Hello::Control`]): the host sends [`Request`] frames, the guest [`FromGuest`] frames.
//! When it breaks (the runtime restarted), the guest dials again; nothing in the guest stops meanwhile.
//!
//! *Stream connection* ([`Hello::Stream`]): after the hello it carries [`packets`](Channel): 1 byte channel,
//! 4 bytes length (little endian, at most [`MAX_PACKET`]), payload. The host asks for each by a number of its
//! choice in a request; the guest dials it before it answers that request.
//!
//! *Tree connection* (also [`Hello::Stream`], for [`Call::PublishTree`]): after the hello the host sends a
//! plain tar archive, then shuts down its side.

mod make;
mod stats;

pub use make::*;
pub use stats::*;

use crate::ids::{ContainerId, ExecId};
use serde::{Deserialize, Serialize};

/// Vsock port of the runtime on the host.
pub const HOST_PORT: u32 = 1025;
/// Version of this protocol; the runtime refuses a guest with another major version.
pub const PROTOCOL: u32 = 2;
/// Largest frame either side accepts, in bytes.
pub const MAX_FRAME: usize = 1 << 20;
/// Largest stream packet, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;
/// Output of a container that the guest keeps until the host has it for certain, in bytes. With this much kept the
/// container's output waits.
pub const OUTPUT_WINDOW: usize = 256 * 1024;

/// First frame of every connection, guest → host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "hello", rename_all = "kebab-case")]
pub enum Hello {
    /// This is the control connection.
    Control {
        /// [`PROTOCOL`] of the guest.
        protocol: u32,
        /// Microseconds of the guest's monotonic clock at which it was ready.
        ready_us: u64,
    },
    /// This is the stream that the host asked for.
    Stream {
        /// The number from the request.
        stream: u64,
    },
}

/// Channel of a stream packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Channel {
    /// Host → guest: input. An empty packet closes it.
    Stdin = 0,
    /// Guest → host: output. An empty packet says that it has ended.
    Stdout = 1,
    /// Guest → host: error output (never with a terminal). An empty packet says that it has ended.
    Stderr = 2,
    /// Host → guest: terminal size, 4 bytes: columns, rows, each u16 little endian.
    Resize = 3,
    /// Guest → host, exec only, last packet: exit code, i32 little endian.
    Exit = 4,
}

impl TryFrom<u8> for Channel {
    type Error = u8;
    fn try_from(byte: u8) -> Result<Self, u8> {
        Ok(match byte {
            0 => Self::Stdin,
            1 => Self::Stdout,
            2 => Self::Stderr,
            3 => Self::Resize,
            4 => Self::Exit,
            other => return Err(other),
        })
    }
}

/// Host → guest. `id` numbers requests; the answer carries the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the host, never 0.
    pub id: u64,
    /// What to do.
    pub call: Call,
}

/// Guest → host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum FromGuest {
    /// Answer to the request of the same `id`.
    Answer {
        /// The request's id.
        id: u64,
        /// What came of it.
        result: Result<Reply, GuestError>,
    },
    /// Something happened. Events are kept and sent again after a reconnect until [`Call::AckEvents`].
    Event {
        /// Counts up from 1 per guest.
        sequence: u64,
        /// What happened.
        event: Event,
    },
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestError {
    /// What kind of failure, for the runtime to act on.
    pub kind: GuestErrorKind,
    /// One line: operation, object, remedy.
    pub message: String,
}

/// Kinds of [`GuestError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestErrorKind {
    /// No such container, exec or stream.
    NotFound,
    /// The state does not allow it.
    WrongState,
    /// The command does not exist in the image (exit code 127 elsewhere).
    CommandNotFound,
    /// The command exists but cannot be executed (126 elsewhere).
    CommandNotExecutable,
    /// A bad argument.
    Invalid,
    /// The kernel refused.
    System,
}

/// Operations of the guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "kebab-case")]
pub enum Call {
    /// First call after boot, once: identity, network, scratch disk. Answers [`Reply::Done`]; repeating it with the same
    /// content succeeds.
    Configure(Box<GuestConfig>),
    /// Make the container: layers mounted, root file system stacked, cgroup made; nothing runs yet.
    CreateContainer(Box<ContainerSpec>),
    /// Run it. Its stdio stream was named in the spec.
    StartContainer {
        /// Which.
        container: ContainerId,
    },
    /// Send a signal to its first process, or to all of its processes.
    SignalContainer {
        /// Which.
        container: ContainerId,
        /// Signal number of Linux on x86-64.
        signal: i32,
        /// To every process of the container (used with SIGKILL).
        all: bool,
    },
    /// Unmount and forget it; kills what still runs.
    RemoveContainer {
        /// Which.
        container: ContainerId,
    },
    /// Open (again) the stdio stream of a running container: after a reconnect, or for attach.
    OpenStdio {
        /// Which.
        container: ContainerId,
        /// The stream to dial.
        stream: u64,
    },
    /// What a container said on this stream is safe with the host, so far, and need not be said again on the next one.
    /// Of a stream that is not the container's last one it is passed over.
    AckOutput {
        /// Which.
        container: ContainerId,
        /// The stream.
        stream: u64,
        /// Bytes of output, from the stream's start.
        stdout: u64,
        /// Bytes of error output.
        stderr: u64,
    },
    /// Change cgroup limits.
    UpdateLimits {
        /// Which.
        container: ContainerId,
        /// The new limits; `None` fields stay as they are.
        limits: Limits,
    },
    /// Run a process in a running container; answers [`Reply::Started`] once it runs. Its exit comes on the stream.
    Exec(Box<ExecSpec>),
    /// Kill the process group of an exec.
    KillExec {
        /// Which.
        exec: ExecId,
    },
    /// Replace the published tree `tree` by the tar that the host sends over `stream`; visible at once, atomically, through an
    /// exchanged `..data`-like link where the tree has one.
    PublishTree {
        /// Name of the tree, as used in [`MountSource::Tree`].
        tree: String,
        /// The stream to dial.
        stream: u64,
    },
    /// Content of a file made from [`MountSource::File`], at most [`MAX_FILE`] bytes.
    ReadFile {
        /// Which container.
        container: ContainerId,
        /// Its path in the container, as in the mount.
        target: String,
    },
    /// Counters of the guest and of each container.
    Stats,
    /// State of every container: after a reconnect.
    List,
    /// Events up to this sequence are safe with the host and may be forgotten.
    AckEvents {
        /// The last one seen.
        sequence: u64,
    },
    /// Stop everything: kill what runs, sync, power off.
    PowerOff,
}

/// Largest file carried by [`MountSource::File`] and [`Call::ReadFile`], in bytes.
pub const MAX_FILE: usize = 256 * 1024;

/// Answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Done.
    Done,
    /// A process runs; its number in the guest.
    Started {
        /// As seen by the guest's PID 1.
        pid: i32,
    },
    /// Content of a file, base64 (standard alphabet, padded).
    File {
        /// The content.
        base64: String,
    },
    /// Answer to [`Call::Stats`].
    Stats(Box<GuestStats>),
    /// Answer to [`Call::List`].
    Containers {
        /// Every container the guest knows.
        containers: Vec<ContainerState>,
    },
}

/// What happened in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The first process of a container ended, and with it every other.
    Exited {
        /// Which.
        container: ContainerId,
        /// How.
        exit: Exit,
    },
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status, or 128 + signal.
    pub code: i32,
    /// The kernel's OOM killer struck in its cgroup.
    pub oom_killed: bool,
    /// Wall clock, nanoseconds since 1970.
    pub at_unix_ns: i64,
}

/// State of one container in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    /// Which.
    pub container: ContainerId,
    /// Created, running with this process number, or exited.
    pub phase: ContainerPhase,
}

/// Phases of a container in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "kebab-case")]
pub enum ContainerPhase {
    /// Made, not started.
    Created,
    /// Running.
    Running {
        /// As seen by the guest's PID 1.
        pid: i32,
    },
    /// Ended.
    Exited {
        /// How.
        exit: Exit,
    },
}
