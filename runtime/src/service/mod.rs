//! The service: one task owns the state of every sandbox and container; jobs do the slow work beside it.
//!
//! ```text
//! cri ──Command──► owner ──spawns──► job (launch, create, start, stop, …) ──Done──► owner
//!                   │  ▲                                        guests ──GuestNews──┘
//!                   └──┴─ admission, transitions, state.json, replies, events
//! ```
//!
//! Called by `cri` and `streaming` through [`Service`]. Invariants: only the owner changes state, and it never waits
//! for a guest, a VMM or a network; so status is answered at once, and no pod waits for another.

pub mod admission;
mod confidential;
pub mod container;
mod containers;
mod guests;
mod jobs;
mod network;
mod owner;
pub mod process;
mod recover;
pub mod sandbox;
mod sandboxes;

pub use owner::Owner;

use crate::config::Config;
use crate::console::Console;
use crate::error::{Error, Result};
use crate::images::ImageStore;
use crate::roots::Roots;
use crate::service::container::ContainerPhase;
use crate::service::sandbox::SandboxPhase;
use crate::spec::{ContainerSpec, Resources, SandboxSpec};
use crate::vm::address::PodCidr;
use crate::vm::launch::Launcher;
use crate::vm::pod::PodVm;
use atoll_spec::guest::Process;
use atoll_spec::ids::{ContainerId, SandboxId};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, oneshot};

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// Everything that can be asked of the owner.
pub enum Command {
    /// Launch a sandbox.
    RunSandbox(Box<SandboxSpec>, Reply<SandboxId>),
    /// Take its VM down.
    StopSandbox(String, Reply<()>),
    /// Forget it.
    RemoveSandbox(String, Reply<()>),
    /// One sandbox and its containers.
    SandboxStatus(String, Reply<(SandboxView, Vec<ContainerView>)>),
    /// Every sandbox.
    ListSandboxes(Reply<Vec<SandboxView>>),
    /// Make a container.
    CreateContainer(String, Box<ContainerSpec>, Reply<ContainerId>),
    /// Run it.
    StartContainer(String, Reply<()>),
    /// Signal it, wait, kill it.
    StopContainer(String, Duration, Reply<()>),
    /// Forget it.
    RemoveContainer(String, Reply<()>),
    /// Change its limits.
    UpdateContainer(String, Box<Resources>, Reply<()>),
    /// One container.
    ContainerStatus(String, Reply<ContainerView>),
    /// Every container.
    ListContainers(Reply<Vec<ContainerView>>),
    /// What exec, attach and statistics of one running container need.
    UseContainer(String, Reply<RunningContainer>),
    /// The VM of a ready sandbox.
    UseSandbox(String, Reply<RunningSandbox>),
    /// The node has got its pod CIDR.
    SetPodCidr(PodCidr, Reply<()>),
    /// Whether pods can have a network.
    NetworkReady(Reply<std::result::Result<(), String>>),
}

/// A sandbox as the owner sees it now.
#[derive(Debug, Clone)]
pub struct SandboxView {
    /// Its id.
    pub id: SandboxId,
    /// What was asked for.
    pub spec: SandboxSpec,
    /// Where it is.
    pub phase: SandboxPhase,
    /// Nanoseconds since 1970.
    pub created_ns: i64,
    /// The pod's address.
    pub address: Ipv4Addr,
}

/// A container as the owner sees it now.
#[derive(Debug, Clone)]
pub struct ContainerView {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox: SandboxId,
    /// What was asked for.
    pub spec: ContainerSpec,
    /// Id of its image.
    pub image_id: String,
    /// Its image by digest, where known.
    pub image_ref: String,
    /// Where it is.
    pub phase: ContainerPhase,
    /// Nanoseconds since 1970.
    pub created_ns: i64,
    /// Its log file.
    pub log_path: Option<PathBuf>,
    /// Signal of StopContainer.
    pub stop_signal: i32,
}

/// A running container, to be used.
#[derive(Clone)]
pub struct RunningContainer {
    /// Its id.
    pub id: ContainerId,
    /// Its VM.
    pub vm: Arc<PodVm>,
    /// What it runs.
    pub process: Process,
    /// What was asked for.
    pub spec: ContainerSpec,
    /// Its stdio.
    pub console: Option<Arc<Console>>,
}

/// A ready sandbox, to be used.
#[derive(Clone)]
pub struct RunningSandbox {
    /// Its VM.
    pub vm: Arc<PodVm>,
    /// Its address.
    pub address: Ipv4Addr,
}

/// What happened, for GetContainerEvents.
#[derive(Debug, Clone)]
pub struct ServiceEvent {
    /// The container, or the sandbox itself.
    pub id: String,
    /// What.
    pub kind: EventKind,
    /// Nanoseconds since 1970.
    pub at_ns: i64,
    /// The sandbox as it is then.
    pub sandbox: SandboxView,
    /// Its containers as they are then.
    pub containers: Vec<ContainerView>,
}

/// Kinds of [`ServiceEvent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// Made.
    Created,
    /// Runs.
    Started,
    /// Ended.
    Stopped,
    /// Forgotten.
    Deleted,
}

/// What the owner and its jobs share.
pub struct Shared {
    /// Settings.
    pub config: Config,
    /// How far the paths of clients may lead.
    pub roots: Arc<Roots>,
    /// Images.
    pub images: ImageStore,
    /// How to launch a VM.
    pub launcher: Arc<Launcher>,
    /// Who listens to events.
    pub events: broadcast::Sender<ServiceEvent>,
}

/// The handle that `cri` and `streaming` use.
#[derive(Clone)]
pub struct Service {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

impl Service {
    /// A handle, and the owner's end of it.
    pub fn new(shared: Arc<Shared>) -> (Self, mpsc::Receiver<Command>) {
        let (commands, receiver) = mpsc::channel(64);
        (Self { commands, shared }, receiver)
    }

    /// Sends a command and waits for its answer.
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (sender, receiver) = oneshot::channel();
        self.commands.send(make(sender)).await.map_err(|_| Error::Stopping)?;
        receiver.await.map_err(|_| Error::Stopping)?
    }

    /// The image store.
    pub fn images(&self) -> &ImageStore {
        &self.shared.images
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<ServiceEvent> {
        self.shared.events.subscribe()
    }

    /// Why no VM can run here.
    pub fn check_host(&self) -> std::result::Result<(), String> {
        self.shared.launcher.host.check()
    }
}

/// A new identifier: 128 random bits in hexadecimal.
pub fn random_hex() -> Result<String> {
    let mut bytes = [0u8; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(Error::os("get", "random numbers"))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::spec::{Map, UserSpec};
    use atoll_spec::guest::SystemCalls;

    /// A container that asks for nothing.
    pub fn container_spec() -> ContainerSpec {
        ContainerSpec {
            name: "c".into(),
            attempt: 0,
            image: "i".into(),
            user_image: String::new(),
            image_annotations: Map::new(),
            command: vec![],
            args: vec![],
            working_dir: String::new(),
            envs: vec![],
            mounts: vec![],
            labels: Map::new(),
            annotations: Map::new(),
            log_path: String::new(),
            stdin: false,
            stdin_once: false,
            tty: false,
            resources: Resources::default(),
            user: UserSpec::default(),
            add_capabilities: vec![],
            drop_capabilities: vec![],
            no_new_privileges: false,
            system_calls: SystemCalls::Any,
            read_only_root: false,
            masked_paths: vec![],
            read_only_paths: vec![],
            stop_signal: 0,
        }
    }
}
