//! What the runtime has of a pod ◇.
//!
//! Read from CRI by `observe`, looked at by `plan` and `status`. Labels and annotations written at creation let a
//! restarted agent know its pods again.

use atoll_cri::v1;
use jiff::Timestamp;

/// Label: name of the pod.
pub const POD_NAME: &str = "io.kubernetes.pod.name";
/// Label: namespace of the pod.
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// Label: uid of the pod.
pub const POD_UID: &str = "io.kubernetes.pod.uid";
/// Label: name of the container.
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// Annotation: [`super::desired::Container::hash`] of the container that was asked for.
pub const CONTAINER_HASH: &str = "io.kubernetes.container.hash";
/// Annotation: how often the container was started before.
pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
/// Annotation: where the container leaves its last words.
pub const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
/// Annotation: whether the log may stand in for them.
pub const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";

/// State of a container in the runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Made, not started.
    Created,
    /// Running.
    Running,
    /// Ended.
    Exited,
    /// The runtime does not know.
    Unknown,
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// Runtime's id.
    pub id: String,
    /// Which one of the pod, from 0.
    pub attempt: u32,
    /// Its microVM runs.
    pub ready: bool,
    /// When it was made, in nanoseconds since 1970.
    pub created: i64,
    /// Addresses, the primary one first.
    pub ips: Vec<String>,
}

/// A container that was made at some time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Runtime's id.
    pub id: String,
    /// Its sandbox.
    pub sandbox: String,
    /// Name in the pod.
    pub name: String,
    /// How often the container was started before this one.
    pub restarts: u32,
    /// State.
    pub state: State,
    /// When it was made, in nanoseconds since 1970.
    pub created: i64,
    /// When it was started, likewise; 0: not.
    pub started: i64,
    /// When it ended, likewise; 0: not.
    pub finished: i64,
    /// How it ended.
    pub exit_code: i32,
    /// Why it ended, in a word.
    pub reason: String,
    /// Its last words.
    pub message: String,
    /// Image as the pod names it.
    pub image: String,
    /// Image as the runtime has it.
    pub image_ref: String,
    /// Hash of what was asked for; `None`: not made by this agent.
    pub hash: Option<u64>,
    /// Log file on the host.
    pub log_path: String,
    /// User the first process runs as.
    pub user: Option<(i64, i64, Vec<i64>)>,
}

impl Ran {
    /// From the runtime's words. The sandbox is only in lists, not in a status.
    pub fn read(status: v1::ContainerStatus, sandbox: String) -> Self {
        let metadata = status.metadata.unwrap_or_default();
        let state = match status.state {
            s if s == v1::ContainerState::ContainerCreated as i32 => State::Created,
            s if s == v1::ContainerState::ContainerRunning as i32 => State::Running,
            s if s == v1::ContainerState::ContainerExited as i32 => State::Exited,
            _ => State::Unknown,
        };
        let user = status.user.and_then(|u| u.linux).map(|u| (u.uid, u.gid, u.supplemental_groups));
        Self {
            id: status.id,
            sandbox,
            restarts: status
                .annotations
                .get(RESTART_COUNT)
                .and_then(|n| n.parse().ok())
                .unwrap_or(metadata.attempt),
            hash: status.annotations.get(CONTAINER_HASH).and_then(|h| u64::from_str_radix(h, 16).ok()),
            name: metadata.name,
            state,
            created: status.created_at,
            started: status.started_at,
            finished: status.finished_at,
            exit_code: status.exit_code,
            reason: status.reason,
            message: status.message,
            image: status
                .image
                .map(|i| if i.user_specified_image.is_empty() { i.image } else { i.user_specified_image })
                .unwrap_or_default(),
            image_ref: status.image_ref,
            log_path: status.log_path,
            user,
        }
    }

    /// When it ended; for a container that never started, when it was made.
    pub fn ended(&self) -> Timestamp {
        timestamp(if self.finished > 0 { self.finished } else { self.created })
    }
}

/// A CRI time. CRI counts nanoseconds.
pub fn timestamp(nanoseconds: i64) -> Timestamp {
    Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Everything the runtime has of one pod, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Actual {
    /// Sandboxes.
    pub sandboxes: Vec<Sandbox>,
    /// Containers.
    pub containers: Vec<Ran>,
}

impl Actual {
    /// Puts the newest first.
    pub fn new(sandboxes: Vec<Sandbox>, containers: Vec<Ran>) -> Self {
        let mut actual = Self { sandboxes, containers };
        actual.sort();
        actual
    }

    /// The newest first.
    pub fn sort(&mut self) {
        self.sandboxes.sort_by_key(|s| std::cmp::Reverse((s.attempt, s.created)));
        self.containers.sort_by_key(|c| std::cmp::Reverse((c.restarts, c.created)));
    }

    /// The sandbox that containers run in.
    pub fn sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first().filter(|s| s.ready)
    }

    /// Runs of one container, newest first.
    pub fn runs<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Ran> {
        self.containers.iter().filter(move |c| c.name == name)
    }

    /// The newest run of a container.
    pub fn current(&self, name: &str) -> Option<&Ran> {
        self.containers.iter().find(|c| c.name == name)
    }

    /// Containers that have a process.
    pub fn running(&self) -> impl Iterator<Item = &Ran> {
        self.containers.iter().filter(|c| c.state == State::Running)
    }

    /// The same without what has been made since `since` of a container that is just being started: until its start
    /// is done, hooks and all, it does not count, even when it has ended already.
    #[must_use]
    pub fn without_starting(&self, name: Option<&str>, since: i64) -> Self {
        let mut rest = self.clone();
        if let Some(name) = name {
            rest.containers.retain(|c| c.name != name || c.created < since);
        }
        rest
    }
}
