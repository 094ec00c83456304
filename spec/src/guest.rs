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
//! *Tree connection* (also [`Hello::Stream`], for [`Request::PublishTree`]): after the hello the host sends a
//! plain tar archive, then shuts down its side.

use crate::ids::{ContainerId, ExecId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// Vsock port of the runtime on the host.
pub const HOST_PORT: u32 = 1025;
/// Version of this protocol; the runtime refuses a guest with another major version.
pub const PROTOCOL: u32 = 1;
/// Largest frame either side accepts, in bytes.
pub const MAX_FRAME: usize = 1 << 20;
/// Largest stream packet, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

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

/// Identity and devices of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestConfig {
    /// Host name of the pod.
    pub hostname: String,
    /// Its network; `None` for a pod without one.
    pub network: Option<GuestNetwork>,
    /// `/etc/resolv.conf` for containers whose mounts do not bring one.
    pub resolv_conf: String,
    /// Sysctls by name (`net.ipv4.ip_forward`).
    pub sysctls: BTreeMap<String, String>,
    /// Containers of the pod see each other's processes.
    pub share_process_namespace: bool,
    /// Wall clock of the host, nanoseconds since 1970; the guest sets its own from it.
    pub unix_ns: i64,
    /// Whether `/dev/vdb`, ext4, is there to hold what containers write; otherwise memory does.
    pub scratch_disk: bool,
    /// Size of the pod's shared `/dev/shm`, bytes.
    pub shm_bytes: u64,
}

/// The guest's one network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestNetwork {
    /// Address of the pod; its prefix is /32.
    pub address: Ipv4Addr,
    /// Next hop for everything; on link although outside the prefix.
    pub gateway: Ipv4Addr,
    /// Hardware address of the next hop, set as a permanent neighbour.
    pub gateway_mac: [u8; 6],
    /// Bytes.
    pub mtu: u16,
}

/// Where a layer lies in the layer window (`/dev/vda`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Layer {
    /// Bytes from the start; a multiple of 4096.
    pub offset: u64,
    /// Bytes; a multiple of 4096.
    pub length: u64,
}

/// A container to make.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerSpec {
    /// Its id.
    pub container: ContainerId,
    /// Layers of its image, the lowest first. May be empty (an image without layers).
    pub layers: Vec<Layer>,
    /// No writable layer on top.
    pub read_only_root: bool,
    /// What to run.
    pub process: Process,
    /// In this order.
    pub mounts: Vec<Mount>,
    /// Cgroup limits.
    pub limits: Limits,
    /// Paths hidden (files by /dev/null, directories by an empty tmpfs).
    pub masked_paths: Vec<String>,
    /// Paths made read-only.
    pub read_only_paths: Vec<String>,
    /// All devices and kernel interfaces of the guest: a privileged container of its own VM.
    pub privileged: bool,
    /// Stream for stdin, stdout, stderr; dialled when the container starts.
    pub stdio_stream: u64,
    /// Keep stdin open for attach; otherwise it is /dev/null.
    pub stdin: bool,
    /// Close stdin after the first attach that had it ends.
    pub stdin_once: bool,
}

/// A process to run in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Command and arguments, already combined from image and pod; never empty.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Absolute; made when missing.
    pub cwd: String,
    /// Who runs it.
    pub user: User,
    /// With a terminal.
    pub tty: bool,
    /// Capability names (`CAP_CHOWN`) of the bounding, effective and permitted sets (for a user other than root: bounding
    /// and ambient only what was asked for explicitly).
    pub capabilities: Vec<String>,
    /// Set no_new_privs.
    pub no_new_privileges: bool,
    /// For the guest's OOM killer, -1000 to 1000.
    pub oom_score_adj: i32,
}

/// User of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum User {
    /// By numbers. The primary group defaults to the user's entry in the image's /etc/passwd, or 0.
    Ids {
        /// User id.
        uid: u32,
        /// Group id.
        gid: Option<u32>,
        /// More groups, beside those that the image's /etc/group gives the user.
        groups: Vec<u32>,
    },
    /// As an image's config says: `name`, `uid`, `name:group`, `uid:gid`; looked up in the image.
    Name {
        /// The text.
        name: String,
        /// More groups.
        groups: Vec<u32>,
    },
}

/// One mount of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// Absolute path in the container; made when missing, resolved inside the container's root.
    pub target: String,
    /// What is there.
    pub source: MountSource,
    /// Read-only.
    pub read_only: bool,
}

/// What a mount shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "kebab-case")]
pub enum MountSource {
    /// A tree sent by [`Call::PublishTree`].
    Tree {
        /// Its name.
        tree: String,
        /// A path inside it, or empty.
        sub_path: String,
    },
    /// A directory of the pod, shared by its containers, made at first use (emptyDir).
    Scratch {
        /// Its name.
        volume: String,
        /// A path inside it, or empty; made when missing.
        sub_path: String,
        /// In memory instead of on the scratch disk.
        memory: bool,
        /// Limit in bytes, where `memory`.
        size_bytes: Option<u64>,
    },
    /// A file with this content.
    File {
        /// Base64 (standard alphabet, padded), at most [`MAX_FILE`] bytes decoded.
        base64: String,
        /// Permission bits.
        mode: u32,
    },
    /// An empty tmpfs.
    Tmpfs {
        /// Limit in bytes.
        size_bytes: Option<u64>,
    },
    /// A read-only image volume: its layers, lowest first.
    Image {
        /// The layers.
        layers: Vec<Layer>,
    },
}

/// Cgroup v2 limits inside the guest; `None` is unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Microseconds of CPU time per `cpu_period_us`.
    pub cpu_quota_us: Option<u64>,
    /// Microseconds.
    pub cpu_period_us: Option<u64>,
    /// `cpu.weight`, 1 to 10000.
    pub cpu_weight: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// A process to run beside the container's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSpec {
    /// Where.
    pub container: ContainerId,
    /// Its id.
    pub exec: ExecId,
    /// What; empty `env` means the container's own, `user` is always filled.
    pub process: Process,
    /// Its stdio; the exit code is the last packet.
    pub stream: u64,
    /// Whether the host will send input.
    pub stdin: bool,
}

/// Counters of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// The whole guest.
    pub total: Usage,
    /// Interface counters.
    pub network: NetworkUsage,
    /// By container.
    pub containers: BTreeMap<String, Usage>,
}

/// CPU, memory, processes and writable layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Nanoseconds of CPU time since the start.
    pub cpu_ns: u64,
    /// Bytes in use (`memory.current`).
    pub memory_bytes: u64,
    /// Bytes in use that cannot be reclaimed easily: `memory.current` minus inactive file pages.
    pub working_set_bytes: u64,
    /// Resident anonymous bytes.
    pub rss_bytes: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Major page faults.
    pub major_page_faults: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes in the writable layer.
    pub writable_bytes: u64,
    /// Inodes in the writable layer.
    pub writable_inodes: u64,
}

/// Counters of the network device, from the pod's point of view.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkUsage {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets lost or bad on receipt.
    pub rx_errors: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets lost or bad on sending.
    pub tx_errors: u64,
}
