//! The slow work of the service: what waits for a guest, a VMM, a disk.
//!
//! Spawned by the owner, one job per request, so no pod waits for another. A job changes no state: it answers a result,
//! which the owner applies. Invariants: every wait has a deadline; a failed creation leaves nothing behind in the guest
//! or the image store.

use crate::console::{Console, Receipts};
use crate::error::{Error, Result, within};
use crate::images::Image;
use crate::logs::{LogPlace, LogWriter};
use crate::roots::Roots;
use crate::service::Shared;
use crate::service::owner::Done;
use crate::service::process::{self, SIGKILL, SIGTERM};
use crate::service::recover;
use crate::spec::{ContainerSpec, MountSpec, Resources, SandboxSpec};
use crate::vm::guest::Expected;
use crate::vm::pod::{CALL_DEADLINE, PodVm};
use crate::volumes::watch::{self, Watched};
use crate::volumes::{self, Served};
use atoll_spec::guest::{self, Call, GuestErrorKind, Layer, MountSource, Process, Reply};
use atoll_spec::ids::{ContainerId, SandboxId};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Deadline of creating and starting in the guest.
const CREATE_DEADLINE: Duration = Duration::from_secs(60);
/// How long the last output of a container may take to reach the log.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
/// How long a killed container may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// How long a guest may refuse to take a start back: longer than a start takes there.
const UNDO_DEADLINE: Duration = Duration::from_secs(40);
/// Pause before it is asked again.
const UNDO_PAUSE: Duration = Duration::from_millis(500);

/// Making a container.
pub(super) struct Making {
    pub shared: Arc<Shared>,
    pub vm: Arc<PodVm>,
    pub id: ContainerId,
    pub spec: ContainerSpec,
    pub sandbox: SandboxSpec,
    pub known_trees: Vec<String>,
    pub stdio_stream: u64,
}

/// A container that was made.
pub(super) struct Made {
    pub image_id: String,
    pub image_ref: String,
    pub process: Process,
    pub stop_signal: i32,
    pub copy_back: Vec<(String, PathBuf)>,
    pub trees: Vec<(String, PathBuf, Watched)>,
    pub extents: BTreeMap<String, Layer>,
}

impl Making {
    pub async fn run(self) -> Result<Made> {
        let result = self.make().await;
        if result.is_err() {
            self.shared.images.release(self.id.as_str());
        }
        result
    }

    fn image(&self, name: &str) -> Result<Image> {
        let missing = || crate::images::ImageError::NotFound(name.to_owned());
        Ok(self.shared.images.status(name).ok_or_else(missing)?)
    }

    async fn map(&self, image: &Image) -> Result<Vec<Layer>> {
        let files = self.shared.images.hold(self.id.as_str(), &image.id)?;
        self.vm.map(&files).await
    }

    async fn make(&self) -> Result<Made> {
        let image = self.image(&self.spec.image)?;
        let process = process::container_process(&self.spec, &image.config, self.sandbox.guest_hostname())?;
        let layers = self.map(&image).await?;
        let mut served = Vec::with_capacity(self.spec.mounts.len());
        for mount in &self.spec.mounts {
            served
                .push((mount, volumes::classify(mount, &self.sandbox.scratch_volumes, &self.shared.roots)?));
        }
        let trees = self.publish(&served).await?;
        let mut mounts = Vec::with_capacity(served.len());
        let mut copy_back = Vec::new();
        for (mount, how) in served {
            let source = match how {
                Served::Scratch(source) => source,
                Served::Tree { name, .. } => MountSource::Tree { tree: name, sub_path: String::new() },
                Served::Image { image } => {
                    let image = self.image(&image)?;
                    MountSource::Image { layers: self.map(&image).await? }
                }
                Served::File { file, copy_back: back } => {
                    if back {
                        copy_back.push((mount.container_path.clone(), file.path().to_owned()));
                    }
                    volumes::read_file(&file)?
                }
            };
            let target = mount.container_path.clone();
            mounts.push(guest::Mount { target, source, read_only: mount.read_only });
        }
        let call = Call::CreateContainer(Box::new(self.guest_spec(layers, process.clone(), mounts)));
        self.vm.link.call(call, CREATE_DEADLINE).await?;
        Ok(Made {
            image_id: image.id.to_string(),
            image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string()),
            process,
            stop_signal: process::signal_number(&image.config.stop_signal).unwrap_or(SIGTERM),
            copy_back,
            trees,
            extents: self.vm.extents().await,
        })
    }

    /// Publishes the trees that the pod does not have yet.
    async fn publish(&self, served: &[(&MountSpec, Served)]) -> Result<Vec<(String, PathBuf, Watched)>> {
        let mut trees: Vec<(String, PathBuf, Watched)> = Vec::new();
        for (_, how) in served {
            let Served::Tree { name, directory } = how else { continue };
            if self.known_trees.contains(name) || trees.iter().any(|(n, _, _)| n == name) {
                continue;
            }
            let path = directory.path().to_owned();
            let watched =
                watch::publish_and_watch(self.vm.link.clone(), name.clone(), directory.clone()).await?;
            trees.push((name.clone(), path, watched));
        }
        Ok(trees)
    }

    fn guest_spec(
        &self,
        layers: Vec<Layer>,
        process: Process,
        mounts: Vec<guest::Mount>,
    ) -> guest::ContainerSpec {
        let spec = &self.spec;
        guest::ContainerSpec {
            container: self.id.clone(),
            layers,
            read_only_root: spec.read_only_root,
            process,
            mounts,
            limits: spec.resources.limits(),
            masked_paths: spec.masked_paths.clone(),
            read_only_paths: spec.read_only_paths.clone(),
            privileged: false,
            stdio_stream: self.stdio_stream,
            stdin: spec.stdin,
            stdin_once: spec.stdin_once,
        }
    }
}

/// Starting a container.
pub(super) struct Starting {
    pub vm: Arc<PodVm>,
    pub id: ContainerId,
    pub stdio: Option<Expected>,
    pub log: Option<LogPlace>,
    pub tty: bool,
}

impl Starting {
    pub async fn run(self) -> Result<Arc<Console>> {
        // First, so that a log that cannot be written is an error of the start, and nothing is lost.
        let log = match self.log {
            Some(place) => Some(LogWriter::open(place).await?),
            None => None,
        };
        let stdio =
            self.stdio.ok_or_else(|| Error::State(format!("container {} was started already", self.id)))?;
        self.vm.link.call(Call::StartContainer { container: self.id.clone() }, CREATE_DEADLINE).await?;
        let number = stdio.number();
        let stream = stdio.take().await?;
        let receipts = Receipts { link: self.vm.link.clone(), container: self.id, stream: number };
        Ok(Console::start(stream, self.tty, log, receipts))
    }
}

/// A start of which nobody knows what became.
pub(super) struct Unsure {
    /// Why not.
    pub why: String,
    /// Who asked for it, and what to answer; nobody after a restart of the runtime.
    pub asker: Option<(Error, crate::service::Reply<()>)>,
}

/// Removes from its guest a container that may have been started there, or be about to.
pub(super) async fn undo_start(vm: Option<Arc<PodVm>>, id: &ContainerId) {
    let Some(vm) = vm else { return };
    let until = tokio::time::Instant::now() + UNDO_DEADLINE;
    loop {
        let call = Call::RemoveContainer { container: id.clone() };
        let error = match vm.link.call(call, CALL_DEADLINE).await {
            Ok(_) | Err(Error::Guest { kind: GuestErrorKind::NotFound, .. }) => return,
            Err(_) if vm.link.is_closed() => return,
            Err(error) => error,
        };
        if tokio::time::Instant::now() >= until {
            tracing::error!(container = %id, %error, "its guest does not take its start back: its virtual machine is killed");
            return vm.stop(false).await;
        }
        // Mostly because it is still starting it.
        tokio::time::sleep(UNDO_PAUSE).await;
    }
}

/// The end of a container: its last output and its files.
pub(super) struct Ending {
    pub vm: Option<Arc<PodVm>>,
    pub id: ContainerId,
    pub console: Option<Arc<Console>>,
    pub copy_back: Vec<(String, PathBuf)>,
    pub roots: Arc<Roots>,
}

impl Ending {
    pub async fn run(self) {
        if let Some(console) = &self.console {
            console.drained(DRAIN_DEADLINE).await;
        }
        let Some(vm) = self.vm else { return };
        for (target, path) in self.copy_back {
            let call = Call::ReadFile { container: self.id.clone(), target };
            let result = match vm.link.call(call, CALL_DEADLINE).await {
                Ok(Reply::File { base64 }) => volumes::write_back(&self.roots, &path, &base64),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                tracing::warn!(container = %self.id, path = %path.display(), %error, "cannot copy a file back");
            }
        }
    }
}

/// Stopping a container: signal, wait, kill.
pub(super) struct Stopping {
    pub vm: Arc<PodVm>,
    pub id: ContainerId,
    pub signal: i32,
    pub timeout: Duration,
    pub exited: tokio::sync::watch::Receiver<bool>,
}

impl Stopping {
    pub async fn run(mut self) -> Result<()> {
        if !self.timeout.is_zero()
            && self.signal(self.signal, false).await.is_ok()
            && tokio::time::timeout(self.timeout, self.exited.wait_for(|e| *e)).await.is_ok()
        {
            return Ok(());
        }
        let killed = self.signal(SIGKILL, true).await;
        // An error of the wait means that the container has been forgotten, so it has ended.
        if killed.is_ok() && tokio::time::timeout(KILL_DEADLINE, self.exited.wait_for(|e| *e)).await.is_ok() {
            return Ok(());
        }
        // A guest that does not obey is broken or hostile; what is left to take from it is its machine.
        tracing::error!(
            container = %self.id,
            "its guest does not end it: its virtual machine is killed, with every container in it"
        );
        self.vm.stop(false).await;
        let what = || format!("waiting for container {} to end with its virtual machine", self.id);
        within(KILL_DEADLINE, what, self.exited.wait_for(|e| *e)).await.map(|_| ())
    }

    async fn signal(&self, signal: i32, all: bool) -> Result<()> {
        let call = Call::SignalContainer { container: self.id.clone(), signal, all };
        match self.vm.link.call(call, CALL_DEADLINE).await {
            // It has ended meanwhile, with or without its VM.
            Err(Error::Guest { kind: GuestErrorKind::NotFound | GuestErrorKind::WrongState, .. })
            | Err(Error::Lost { .. }) => Ok(()),
            other => other.map(|_| ()),
        }
    }
}

/// Removes a container from its guest; without a VM there is nothing to remove it from.
pub(super) async fn remove(vm: Option<Arc<PodVm>>, id: &ContainerId) -> Result<()> {
    let Some(vm) = vm else { return Ok(()) };
    match vm.link.call(Call::RemoveContainer { container: id.clone() }, CREATE_DEADLINE).await {
        Err(Error::Guest { kind: GuestErrorKind::NotFound, .. }) | Err(Error::Lost { .. }) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Removes from a guest what the runtime does not know.
pub(super) async fn discard(vm: Arc<PodVm>, ids: Vec<ContainerId>) -> Done {
    for id in ids {
        tracing::info!(container = %id, "removing a container that a restart left half made or half removed");
        if let Err(error) = remove(Some(vm.clone()), &id).await {
            tracing::warn!(container = %id, %error, "cannot remove it");
        }
    }
    Done::Nothing
}

/// Changes limits; without a VM only the record changes.
pub(super) async fn update_limits(
    vm: Option<Arc<PodVm>>,
    id: &ContainerId,
    resources: &Resources,
) -> Result<()> {
    let Some(vm) = vm else { return Ok(()) };
    let call = Call::UpdateLimits { container: id.clone(), limits: resources.limits() };
    vm.link.call(call, CALL_DEADLINE).await.map(|_| ())
}

/// Keeps the ends of containers, as the record has them, over a power cut.
pub(super) fn keep(root: &Path, sandbox: SandboxId, containers: Vec<ContainerId>) -> Done {
    let result = recover::sync(root, &sandbox);
    Done::ExitsKept(sandbox, containers, result)
}

/// Tells the guest that events up to `sequence` are kept.
pub(super) async fn acknowledge(sandbox: SandboxId, vm: Arc<PodVm>, sequence: u64) -> Done {
    // When this fails, the guest sends them again, which changes nothing.
    let _ = vm.link.call(Call::AckEvents { sequence }, CALL_DEADLINE).await;
    Done::Acknowledged(sandbox)
}

/// Asks a guest for its containers.
pub(super) async fn list(sandbox: SandboxId, vm: Arc<PodVm>) -> Done {
    match vm.link.call(Call::List, CALL_DEADLINE).await {
        Ok(Reply::Containers { containers }) => Done::Reconciled(sandbox, Some(containers)),
        Ok(_) => Done::Reconciled(sandbox, None),
        Err(error) => {
            tracing::warn!(%sandbox, %error, "cannot compare containers with the guest");
            Done::Reconciled(sandbox, None)
        }
    }
}

/// What became of the stdio of a container that was to be opened again.
pub(super) enum Reopened {
    /// It is open.
    Open(Arc<Console>),
    /// Its guest does not have the container.
    Gone,
    /// Another try may help.
    Failed,
}

/// Opens the stdio of a running container again.
pub(super) async fn reopen_stdio(
    vm: Arc<PodVm>,
    id: &ContainerId,
    log: Option<LogPlace>,
    tty: bool,
) -> Reopened {
    let reopen = async {
        let log = match log {
            Some(place) => Some(LogWriter::open(place).await?),
            None => None,
        };
        let (number, stream) = vm.link.expect_stream();
        vm.link.call(Call::OpenStdio { container: id.clone(), stream: number }, CALL_DEADLINE).await?;
        let receipts = Receipts { link: vm.link.clone(), container: id.clone(), stream: number };
        Ok::<_, Error>(Console::start(stream.take().await?, tty, log, receipts))
    };
    match reopen.await {
        Ok(console) => Reopened::Open(console),
        Err(error) => {
            tracing::warn!(container = %id, %error, "cannot open the output of a container again");
            match error {
                Error::Guest { kind: GuestErrorKind::NotFound, .. } => Reopened::Gone,
                _ => Reopened::Failed,
            }
        }
    }
}
