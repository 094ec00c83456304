//! What the runtime tells the guest to make: its own identity, containers, processes, mounts, limits.

use crate::ids::{ContainerId, ExecId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

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
    /// Which system calls it may make.
    #[serde(default)]
    pub system_calls: SystemCalls,
}

/// Which system calls a process may make.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SystemCalls {
    /// Whatever the guest's kernel has.
    #[default]
    Any,
    /// Without those that a container has no business with.
    Default,
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
    /// A tree sent by [`super::Call::PublishTree`].
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
        /// Base64 (standard alphabet, padded), at most [`super::MAX_FILE`] bytes decoded.
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
