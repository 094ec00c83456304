//! What PID 1 tells a stage: the same binary on both sides, so this format has no version.

use atoll_spec::guest::{GuestErrorKind, Process};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything a stage does before it becomes the container's process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The mount tree to build, or `None` to enter the one of a running container by the pidfd that came along.
    pub tree: Option<Tree>,
    /// What to run.
    pub process: Process,
}

/// The mount tree of a new container.
#[derive(Debug, Serialize, Deserialize)]
pub struct Tree {
    /// Its stacked root, already mounted.
    pub root: PathBuf,
    /// Nothing on it can be changed.
    pub read_only_root: bool,
    /// All devices, and kernel interfaces writable.
    pub privileged: bool,
    /// `/dev/shm` of the pod.
    pub shm: PathBuf,
    /// Files under `/etc` that the pod brings where no mount does.
    pub etc: Vec<PlannedMount>,
    /// What the runtime asked for, in order.
    pub mounts: Vec<PlannedMount>,
    /// Paths to hide.
    pub masked_paths: Vec<String>,
    /// Paths to protect.
    pub read_only_paths: Vec<String>,
}

/// One mount.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlannedMount {
    /// Path in the container.
    pub target: String,
    /// What to put there.
    pub source: Source,
    /// Read-only.
    pub read_only: bool,
}

/// What a mount shows, as paths of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub enum Source {
    /// `sub_path` below `base`, looked up without leaving it.
    Inside {
        /// A directory of ours.
        base: PathBuf,
        /// From the pod; made as a directory when missing if `make`.
        sub_path: String,
        /// Whether it may be made.
        make: bool,
    },
    /// A file of ours.
    File(PathBuf),
    /// Mounted layers, lowest first, stacked read-only.
    Layers(Vec<PathBuf>),
    /// An empty tmpfs.
    Tmpfs(Option<u64>),
}

/// What a stage tells PID 1, one packet each. Without `Ready` before the end, the stage died.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The terminal's master comes along as a descriptor.
    Terminal,
    /// The next thing is `execve`; silence from here on is success.
    Ready,
    /// It did not work.
    Failed {
        /// Kind of failure.
        kind: GuestErrorKind,
        /// One line.
        message: String,
    },
}

/// Longest packet either way; the plan itself is in a file.
pub const MAX_REPORT: usize = 16 * 1024;
