//! The owner task: all state, one loop.
//!
//! Sandbox commands are in `sandboxes`, container commands in `containers`; what takes time is in `jobs`. Invariants: a
//! transition is written to `state.json` before its reply is sent; a job's result is applied by looking the object up
//! again, as it may have moved on meanwhile.

use crate::console::Console;
use crate::error::{Error, Result};
use crate::notify;
use crate::service::container::{ContainerEvent, ContainerPhase, Ended};
use crate::service::guests::Attention;
use crate::service::jobs;
use crate::service::network::{Installation, Installed};
use crate::service::recover;
use crate::service::sandbox::{SandboxEvent, SandboxPhase};
use crate::service::{Command, ContainerView, EventKind, Reply, SandboxView, ServiceEvent, Shared};
use crate::spec::{ContainerSpec, SandboxSpec};
use crate::vm::address::Pool;
use crate::vm::guest::{Expected, GuestNews};
use crate::vm::launch::{Remains, unix_ns};
use crate::vm::network::Port;
use crate::vm::pod::PodVm;
use crate::volumes::watch::Watched;
use atoll_spec::guest::{ContainerState, Layer, Process};
use atoll_spec::ids::{ContainerId, SandboxId};
use atoll_spec::units::GuestCid;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// How long running jobs may take to end at shutdown.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// A sandbox.
pub(super) struct Sandbox {
    pub id: SandboxId,
    pub spec: SandboxSpec,
    pub phase: SandboxPhase,
    pub created_ns: i64,
    pub cid: GuestCid,
    pub port: Port,
    /// Host directories of the published trees, by name.
    pub trees: BTreeMap<String, PathBuf>,
    /// The layer window.
    pub extents: BTreeMap<String, Layer>,
    pub vm: Option<Arc<PodVm>>,
    pub watches: HashMap<String, Watched>,
    /// Ends a launch that is no longer wanted.
    pub cancel: watch::Sender<bool>,
    /// Its record is on disk as it is.
    pub saved: bool,
    /// The VM's remains are being cleaned up.
    pub unwinding: bool,
    pub stop_waiters: Vec<Reply<()>>,
    pub remove_waiters: Vec<Reply<()>>,
    pub attention: Attention,
}

/// A container.
pub(super) struct Container {
    pub id: ContainerId,
    pub sandbox: SandboxId,
    pub spec: ContainerSpec,
    pub phase: ContainerPhase,
    pub created_ns: i64,
    pub image_id: String,
    pub image_ref: String,
    pub process: Option<Process>,
    pub log_path: Option<PathBuf>,
    pub stop_signal: i32,
    /// Files to copy back at its end: path in the container, path on the host.
    pub copy_back: Vec<(String, PathBuf)>,
    /// Number of its stdio stream, and the stream until it comes.
    pub stdio_stream: u64,
    pub stdio: Option<Expected>,
    pub console: Option<Arc<Console>>,
    /// A job starts it, or takes a start back.
    pub in_start: bool,
    /// The console is being opened again, after a restart of the runtime, or will be.
    pub reopening: bool,
    /// How often that has failed.
    pub reopen_failures: u32,
    /// Its end is on disk for good.
    pub kept: bool,
    /// The guest has told its end; its last output is being written.
    pub ending: Option<Ended>,
    /// Tells jobs that wait for its end.
    pub exited: watch::Sender<bool>,
    pub remove_waiters: Vec<Reply<()>>,
}

/// What a job reports.
pub(super) enum Done {
    Launched(SandboxId, Result<Arc<PodVm>>, Reply<SandboxId>),
    VmEnded(SandboxId, i32),
    Unwound(SandboxId),
    SandboxRemoved(SandboxId, Result<()>),
    ContainerMade(ContainerId, Result<jobs::Made>, Reply<ContainerId>),
    ContainerStarted(ContainerId, Result<Arc<Console>>, Reply<()>),
    StartUndone(ContainerId, jobs::Unsure),
    ContainerEnded(ContainerId, Ended),
    ContainerRemoved(ContainerId, Result<()>),
    LimitsChanged(ContainerId, Box<crate::spec::Resources>, Result<()>, Reply<()>),
    Acknowledged(SandboxId),
    ExitsKept(SandboxId, Vec<ContainerId>, Result<()>),
    KeepExitsAgain(SandboxId),
    Reconciled(SandboxId, Option<Vec<ContainerState>>),
    CompareAgain(SandboxId),
    ConsoleBack(ContainerId, jobs::Reopened),
    ReopenAgain(ContainerId),
    NetworkInstalled(Installed),
    Nothing,
}

/// The owner of all state.
pub struct Owner {
    pub(super) shared: Arc<Shared>,
    pub(super) sandboxes: BTreeMap<SandboxId, Sandbox>,
    pub(super) containers: BTreeMap<ContainerId, Container>,
    pub(super) pool: Pool,
    pub(super) network: std::result::Result<(), String>,
    pub(super) installation: Installation,
    pub(super) next_cid: u32,
    pub(super) jobs: JoinSet<Done>,
    /// One task per VM that waits for its end, and what is to be tried again. Not waited for at shutdown: VMs outlive us.
    pub(super) watchers: JoinSet<Done>,
}

impl Owner {
    /// An owner with nothing.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            sandboxes: BTreeMap::new(),
            containers: BTreeMap::new(),
            pool: Pool::default(),
            network: Err(
                "no pod CIDR yet: it comes with UpdateRuntimeConfig once the node has one".to_owned()
            ),
            installation: Installation::default(),
            next_cid: GuestCid::FIRST.get(),
            jobs: JoinSet::new(),
            watchers: JoinSet::new(),
        }
    }

    /// Serves until every [`super::Service`] handle is gone or `stop` says so, then lets jobs end.
    pub async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut news: mpsc::Receiver<GuestNews>,
        mut stop: watch::Receiver<bool>,
    ) {
        let alive_every = notify::alive_every();
        let mut alive_at = tokio::time::Instant::now();
        loop {
            // Cancel-safe: recv, join_next, sleeping and wait_for lose nothing when another arm wins.
            tokio::select! {
                () = tokio::time::sleep_until(alive_at), if alive_every.is_some() => {
                    // From here, where all state is: init restarts a runtime whose owner hangs.
                    notify::notify("WATCHDOG=1");
                    alive_at = tokio::time::Instant::now() + alive_every.unwrap_or_default();
                }
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => break,
                },
                Some(item) = news.recv() => self.news(item),
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => match done {
                    Ok(done) => self.done(done),
                    Err(error) => tracing::error!(%error, "a job failed"),
                },
                Some(Ok(done)) = self.watchers.join_next(), if !self.watchers.is_empty() => self.done(done),
                _ = stop.wait_for(|s| *s) => break,
            }
        }
        commands.close();
        let deadline = tokio::time::Instant::now() + DRAIN_DEADLINE;
        while let Ok(Some(done)) = tokio::time::timeout_at(deadline, self.jobs.join_next()).await {
            if let Ok(done) = done {
                self.done(done);
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::RunSandbox(spec, reply) => self.run_sandbox(*spec, reply),
            Command::StopSandbox(id, reply) => self.stop_sandbox(&id, reply),
            Command::RemoveSandbox(id, reply) => self.remove_sandbox(&id, reply),
            Command::SandboxStatus(id, reply) => answer(reply, self.sandbox_status(&id)),
            Command::ListSandboxes(reply) => {
                answer(reply, Ok(self.sandboxes.values().map(Sandbox::view).collect()))
            }
            Command::CreateContainer(id, spec, reply) => self.create_container(&id, *spec, reply),
            Command::StartContainer(id, reply) => self.start_container(&id, reply),
            Command::StopContainer(id, timeout, reply) => self.stop_container(&id, timeout, reply),
            Command::RemoveContainer(id, reply) => self.remove_container(&id, reply),
            Command::UpdateContainer(id, resources, reply) => self.update_container(&id, resources, reply),
            Command::ContainerStatus(id, reply) => {
                let view =
                    self.find_container(&id).map(Container::view).ok_or_else(|| Error::no_container(&id));
                answer(reply, view);
            }
            Command::ListContainers(reply) => {
                answer(reply, Ok(self.containers.values().map(Container::view).collect()));
            }
            Command::UseContainer(id, reply) => answer(reply, self.use_container(&id)),
            Command::UseSandbox(id, reply) => answer(reply, self.use_sandbox(&id)),
            Command::SetPodCidr(cidr, reply) => self.set_pod_cidr(cidr, reply),
            Command::NetworkReady(reply) => answer(reply, Ok(self.network.clone())),
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Launched(id, result, reply) => self.launched(&id, result, reply),
            Done::VmEnded(id, status) => self.vm_ended(&id, status),
            Done::Unwound(id) => self.unwound(&id),
            Done::SandboxRemoved(id, result) => self.sandbox_removed(&id, result),
            Done::ContainerMade(id, result, reply) => self.container_made(&id, result, reply),
            Done::ContainerStarted(id, result, reply) => self.container_started(&id, result, reply),
            Done::StartUndone(id, unsure) => self.start_undone(&id, unsure),
            Done::ContainerEnded(id, ended) => self.container_ended(&id, ended),
            Done::ContainerRemoved(id, result) => self.container_removed(&id, result),
            Done::LimitsChanged(id, resources, result, reply) => {
                self.limits_changed(&id, *resources, result, reply)
            }
            Done::Acknowledged(id) => self.acknowledged(&id),
            Done::Reconciled(id, states) => self.reconciled(&id, states.as_deref()),
            Done::ExitsKept(id, containers, result) => self.exits_kept(&id, &containers, result),
            Done::KeepExitsAgain(id) => self.keep_exits(&id),
            Done::CompareAgain(id) => self.compare_with_guest(&id),
            Done::ConsoleBack(id, reopened) => self.console_back(&id, reopened),
            Done::ReopenAgain(id) => self.reopen_again(&id),
            Done::NetworkInstalled(installed) => self.network_installed(installed),
            Done::Nothing => {}
        }
    }

    fn news(&mut self, news: GuestNews) {
        match news {
            GuestNews::Connected { sandbox, ready_us, generation } => {
                tracing::debug!(%sandbox, ready_us, generation, "guest connected");
                self.guest_connected(&sandbox);
            }
            GuestNews::Event { sandbox, sequence, event } => self.guest_event(&sandbox, sequence, event),
        }
    }

    /// The container of that id, which must be the whole one.
    pub(super) fn find_container(&self, id: &str) -> Option<&Container> {
        self.containers.get(&id.parse::<ContainerId>().ok()?)
    }

    /// The sandbox of that id.
    pub(super) fn find_sandbox(&self, id: &str) -> Option<&Sandbox> {
        self.sandboxes.get(&id.parse::<SandboxId>().ok()?)
    }

    /// Applies an event to a sandbox; `false` when it changes nothing.
    pub(super) fn move_sandbox(&mut self, id: &SandboxId, event: &SandboxEvent) -> bool {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return false };
        let Some(next) = sandbox.phase.next(event) else { return false };
        tracing::debug!(sandbox = %id, from = ?sandbox.phase, to = ?next, "sandbox");
        sandbox.phase = next;
        self.save(id);
        true
    }

    /// Applies an event to a container; `false` when it changes nothing.
    pub(super) fn move_container(&mut self, id: &ContainerId, event: &ContainerEvent) -> bool {
        let Some(container) = self.containers.get_mut(id) else { return false };
        let Some(next) = container.phase.next(event) else { return false };
        tracing::debug!(container = %id, from = ?container.phase, to = ?next, "container");
        container.phase = next;
        if matches!(container.phase, ContainerPhase::Exited { .. }) {
            container.exited.send_replace(true);
        }
        let sandbox = container.sandbox.clone();
        self.save(&sandbox);
        true
    }

    /// Writes `state.json`. Not waited for in a job: it is a small file in the page cache, and order matters.
    pub(super) fn save(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let containers = self.containers.values().filter(|c| c.sandbox == *id);
        let result = recover::save(&self.shared.config, sandbox, containers);
        sandbox.saved = result.is_ok();
        if let Err(error) = result {
            tracing::error!(sandbox = %id, %error, "cannot write the sandbox's state: a restart would not find it");
        }
    }

    /// Comes back to something. Not waited for at shutdown.
    pub(super) fn later(&mut self, pause: Duration, done: Done) {
        self.watchers.spawn(async move {
            tokio::time::sleep(pause).await;
            done
        });
    }

    /// Tells listeners.
    pub(super) fn emit(&self, sandbox: &SandboxId, id: &str, kind: EventKind) {
        let Some(sandbox) = self.sandboxes.get(sandbox) else { return };
        let event = ServiceEvent {
            id: id.to_owned(),
            kind,
            at_ns: unix_ns(),
            sandbox: sandbox.view(),
            containers: self.views_of(&sandbox.id),
        };
        let _ = self.shared.events.send(event); // nobody may be listening
    }

    /// The containers of a sandbox.
    pub(super) fn views_of(&self, sandbox: &SandboxId) -> Vec<ContainerView> {
        self.containers.values().filter(|c| c.sandbox == *sandbox).map(Container::view).collect()
    }

    /// What a sandbox's VM may have left on the host.
    pub(super) fn remains(&self, sandbox: &Sandbox) -> Remains {
        Remains {
            sandbox: sandbox.id.clone(),
            cid: sandbox.cid,
            port: sandbox.port.clone(),
            directory: self.shared.config.sandboxes().join(sandbox.id.as_str()),
            socket: self.shared.config.vm_sockets().join(format!("{}.sock", sandbox.id)),
        }
    }
}

impl Sandbox {
    /// As seen from outside.
    pub fn view(&self) -> SandboxView {
        SandboxView {
            id: self.id.clone(),
            spec: self.spec.clone(),
            phase: self.phase.clone(),
            created_ns: self.created_ns,
            address: self.port.address,
        }
    }
}

impl Container {
    /// As seen from outside.
    pub fn view(&self) -> ContainerView {
        ContainerView {
            id: self.id.clone(),
            sandbox: self.sandbox.clone(),
            spec: self.spec.clone(),
            image_id: self.image_id.clone(),
            image_ref: self.image_ref.clone(),
            phase: self.phase.clone(),
            created_ns: self.created_ns,
            log_path: self.log_path.clone(),
            stop_signal: self.stop_signal,
        }
    }
}

/// Answers; whoever asked may have gone away.
pub(super) fn answer<T>(reply: Reply<T>, result: Result<T>) {
    let _ = reply.send(result);
}
