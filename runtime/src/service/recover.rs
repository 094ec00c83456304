//! State over restarts: `state.json` of each sandbox, and what to make of it at start-up.
//!
//! Called by the owner at every transition and once at start. A VMM that still runs is found in its cgroup and taken
//! over through its control socket; its guest dials again. One that does not leaves a sandbox that is not ready, whose
//! containers have exited. Invariants: a file is replaced whole or not at all; what cannot be read is put aside,
//! never guessed.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::service::confidential::{self, Confidential, Words};
use crate::service::container::{ContainerPhase, Ended};
use crate::service::guests::Attention;
use crate::service::owner::{Container, Owner, Sandbox};
use crate::service::sandbox::SandboxPhase;
use crate::spec::{ContainerSpec, SandboxSpec};
use crate::vm::address::PodCidr;
use crate::vm::client::VmmClient;
use crate::vm::guest::GuestLink;
use crate::vm::launch::{self, Remains};
use crate::vm::network::Port;
use crate::vm::pod::PodVm;
use crate::vm::window::Window;
use crate::volumes::watch::watch_again;
use atoll_spec::guest::{Layer, Process};
use atoll_spec::ids::{ContainerId, SandboxId};
use atoll_spec::units::GuestCid;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

const FILE: &str = "state.json";
const CIDR_FILE: &str = "pod-cidr";
const VERSION: u32 = 1;
/// How often a record may be replaced while it is synced.
const SYNC_TRIES: usize = 8;

/// `state.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    id: SandboxId,
    spec: SandboxSpec,
    phase: SandboxRecord,
    created_ns: i64,
    cid: GuestCid,
    tap: String,
    address: Ipv4Addr,
    mac: [u8; 6],
    trees: BTreeMap<String, PathBuf>,
    extents: BTreeMap<String, Layer>,
    containers: Vec<ContainerRecord>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SandboxRecord {
    Launching,
    Ready,
    Stopping,
    NotReady { reason: String },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContainerRecord {
    id: ContainerId,
    spec: ContainerSpec,
    phase: PhaseRecord,
    created_ns: i64,
    image_id: String,
    image_ref: String,
    process: Option<Process>,
    log_path: Option<PathBuf>,
    stop_signal: i32,
    copy_back: Vec<(String, PathBuf)>,
    stdio_stream: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PhaseRecord {
    Created,
    Starting,
    Running { started_ns: i64 },
    Exited { started_ns: i64, code: i32, reason: String, message: String, finished_ns: i64 },
}

impl PhaseRecord {
    /// `None` for what a restart need not know: half made or half removed.
    fn of(phase: &ContainerPhase) -> Option<Self> {
        Some(match phase {
            ContainerPhase::Creating | ContainerPhase::Removing { .. } => return None,
            ContainerPhase::Created => Self::Created,
            ContainerPhase::Starting => Self::Starting,
            ContainerPhase::Running { started_ns } => Self::Running { started_ns: *started_ns },
            ContainerPhase::Exited { started_ns, ended } => Self::Exited {
                started_ns: *started_ns,
                code: ended.code,
                reason: ended.reason.clone(),
                message: ended.message.clone(),
                finished_ns: ended.finished_ns,
            },
        })
    }

    fn phase(self) -> ContainerPhase {
        match self {
            Self::Created => ContainerPhase::Created,
            Self::Starting => ContainerPhase::Starting,
            Self::Running { started_ns } => ContainerPhase::Running { started_ns },
            Self::Exited { started_ns, code, reason, message, finished_ns } => {
                ContainerPhase::Exited { started_ns, ended: Ended { code, reason, message, finished_ns } }
            }
        }
    }
}

/// Replaced whole, but not synced: a record matters while its VM lives, and a power cut ends every VM. What a cut leaves
/// of a record that was never written before is unreadable, and its sandbox is cleared away as one without a record. The
/// end of a container matters longer, and has [`sync`].
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, content).map_err(Error::io("write", &new))?;
    fs::rename(&new, path).map_err(Error::io("replace", path))
}

/// Writes a sandbox's record.
pub(super) fn save<'a>(
    config: &Config,
    sandbox: &Sandbox,
    containers: impl Iterator<Item = &'a Container>,
) -> Result<()> {
    let phase = match &sandbox.phase {
        SandboxPhase::Launching => SandboxRecord::Launching,
        SandboxPhase::Ready => SandboxRecord::Ready,
        SandboxPhase::Stopping => SandboxRecord::Stopping,
        SandboxPhase::NotReady { reason } => SandboxRecord::NotReady { reason: reason.clone() },
        SandboxPhase::Removing => SandboxRecord::NotReady { reason: "being removed".to_owned() },
    };
    let mut words = Words::new();
    let containers = containers
        .filter_map(|c| {
            let phase = PhaseRecord::of(&c.phase)?;
            let (mut spec, mut process) = (c.spec.clone(), c.process.clone());
            words.insert(c.id.clone(), Confidential::take(&mut spec, &mut process));
            Some(ContainerRecord {
                id: c.id.clone(),
                spec,
                phase,
                created_ns: c.created_ns,
                image_id: c.image_id.clone(),
                image_ref: c.image_ref.clone(),
                process,
                log_path: c.log_path.clone(),
                stop_signal: c.stop_signal,
                copy_back: c.copy_back.clone(),
                stdio_stream: c.stdio_stream,
            })
        })
        .collect();
    let record = Record {
        version: VERSION,
        id: sandbox.id.clone(),
        spec: sandbox.spec.clone(),
        phase,
        created_ns: sandbox.created_ns,
        cid: sandbox.cid,
        tap: sandbox.port.tap.clone(),
        address: sandbox.port.address,
        mac: sandbox.port.mac,
        trees: sandbox.trees.clone(),
        extents: sandbox.extents.clone(),
        containers,
    };
    let json = serde_json::to_vec(&record).map_err(|e| Error::Invalid(e.to_string()))?;
    // First what the record needs.
    confidential::keep(config, &sandbox.id, &words)?;
    replace(&config.sandboxes().join(sandbox.id.as_str()).join(FILE), &json)
}

/// Makes a sandbox's record, as it is now or newer, outlive a power cut.
pub(super) fn sync(root: &Path, id: &SandboxId) -> Result<()> {
    let directory = root.join(id.as_str());
    let path = directory.join(FILE);
    for _ in 0..SYNC_TRIES {
        let file = fs::File::open(&path).map_err(Error::io("open", &path))?;
        let number = || Ok((file.metadata()?.ino(), fs::metadata(&path)?.ino()));
        let synced =
            || file.sync_all().and_then(|()| fs::File::open(&directory)?.sync_all()).and_then(|()| number());
        let (old, new) = synced().map_err(Error::io("sync", &path))?;
        // Otherwise the owner has replaced it meanwhile, with one that knows at least as much.
        if old == new {
            return Ok(());
        }
    }
    Err(Error::State(format!("{} is replaced faster than it can be synced", path.display())))
}

/// Removes a sandbox's directory. Its record goes before it, so that half a removal is finished at the next start.
pub(super) fn delete(config: &Config, id: &SandboxId) -> Result<()> {
    let directory = config.sandboxes().join(id.as_str());
    confidential::forget(config, id)?;
    for result in [fs::remove_file(directory.join(FILE)), fs::remove_dir_all(&directory)] {
        match result {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", &directory)(e)),
            _ => {}
        }
    }
    Ok(())
}

/// Keeps the pod CIDR over a restart.
pub(super) fn save_cidr(root: &Path, cidr: PodCidr) -> Result<()> {
    replace(&root.join(CIDR_FILE), cidr.to_string().as_bytes())
}

fn load_cidr(root: &Path) -> Option<PodCidr> {
    PodCidr::parse(fs::read_to_string(root.join(CIDR_FILE)).ok()?.trim()).ok()
}

impl Owner {
    /// Takes over what a predecessor left. To be called once, before [`Owner::run`].
    pub async fn recover(&mut self) -> Result<()> {
        let root = self.shared.config.sandboxes();
        confidential::forget_strays(&self.shared.config)?;
        let entries = fs::read_dir(&root).map_err(Error::io("read", &root))?;
        for entry in entries {
            let entry = entry.map_err(Error::io("read", &root))?;
            let Some(id) = entry.file_name().to_str().and_then(|n| n.parse::<SandboxId>().ok()) else {
                continue;
            };
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                self.recover_sandbox(&root, id).await;
            }
        }
        let given = self.shared.config.pod_cidr.as_deref().and_then(|c| PodCidr::parse(c).ok());
        if let Some(cidr) = load_cidr(&root).or(given) {
            self.recover_network(cidr).await;
        }
        Ok(())
    }

    async fn recover_sandbox(&mut self, root: &Path, id: SandboxId) {
        let path = root.join(id.as_str()).join(FILE);
        let record = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Record>(&bytes).map_err(|e| e.to_string()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err("it has none".to_owned()),
            Err(e) => Err(e.to_string()),
        };
        match record {
            Ok(mut record) if record.version == VERSION && record.id == id => {
                let mut words = confidential::recall(&self.shared.config, &id);
                for container in &mut record.containers {
                    if let Some(words) = words.remove(&container.id) {
                        words.put(&mut container.spec, &mut container.process);
                    }
                }
                self.take_over(record).await;
            }
            other => {
                let why = other.err().unwrap_or_else(|| "it is of another version".to_owned());
                tracing::warn!(sandbox = %id, why, "sandbox without a usable state is removed");
                if let Err(error) = self.shared.launcher.host.clear(&id).await {
                    tracing::error!(sandbox = %id, %error, "cannot clean up");
                }
                if let Err(error) = delete(&self.shared.config, &id) {
                    tracing::error!(sandbox = %id, %error, "cannot remove");
                }
            }
        }
    }

    async fn take_over(&mut self, record: Record) {
        let launching = matches!(record.phase, SandboxRecord::Launching);
        let was_ready = matches!(record.phase, SandboxRecord::Ready);
        let (sandbox, containers) = restore(record);
        let (id, remains) = (sandbox.id.clone(), self.remains(&sandbox));
        let extents = sandbox.extents.clone();
        let trees = sandbox.trees.clone();
        let had_vm = sandbox.phase.has_vm();
        self.next_cid = self.next_cid.max(sandbox.cid.get() + 1);
        self.sandboxes.insert(id.clone(), sandbox);
        for mut container in containers {
            if !container.image_id.is_empty() {
                self.hold_image(&container);
            }
            container.exited.send_replace(matches!(container.phase, ContainerPhase::Exited { .. }));
            container.stdio = None;
            self.containers.insert(container.id.clone(), container);
        }
        if was_ready {
            match self.adopt(&remains, extents) {
                Ok(Some(vm)) => {
                    tracing::info!(sandbox = %id, pid = vm.process.pid, "took a running virtual machine over");
                    self.pool.adopt(remains.port.address);
                    self.expect_stdio(&id, &vm);
                    self.watch_trees(&id, &vm, trees);
                    self.watch_vm(&id, vm);
                    return;
                }
                Ok(None) => tracing::warn!(sandbox = %id, "its virtual machine is gone"),
                Err(error) => tracing::error!(sandbox = %id, %error, "cannot take its virtual machine over"),
            }
        }
        launch::unwind(&self.shared.launcher, &remains).await;
        if launching {
            self.sandboxes.remove(&id);
            if let Err(error) = delete(&self.shared.config, &id) {
                tracing::error!(sandbox = %id, %error, "cannot remove a sandbox's directory");
            }
        } else if had_vm {
            let reason = "the host or the runtime was restarted without it".to_owned();
            if let Some(sandbox) = self.sandboxes.get_mut(&id) {
                sandbox.phase = SandboxPhase::NotReady { reason: reason.clone() };
            }
            self.end_containers(&id, false, &reason);
            self.save(&id);
        }
    }

    fn hold_image(&self, container: &Container) {
        let image = self.shared.images.status(&container.image_id);
        let held = image.map(|image| self.shared.images.hold(container.id.as_str(), &image.id));
        if !matches!(held, Some(Ok(_))) {
            tracing::warn!(container = %container.id, image = container.image_id, "its image is gone");
        }
    }

    fn adopt(&self, remains: &Remains, extents: BTreeMap<String, Layer>) -> Result<Option<Arc<PodVm>>> {
        let launcher = &self.shared.launcher;
        let Some(process) = launcher.host.adopt_vmm(&remains.sandbox)? else { return Ok(None) };
        let vmm = VmmClient::connect(&remains.sandbox, &remains.socket)?;
        let link = GuestLink::new(remains.sandbox.clone(), launcher.news.clone());
        launcher.door.admit(remains.cid, link.clone());
        let window = Window::restore(extents);
        let (sandbox, host) = (remains.sandbox.clone(), launcher.host.clone());
        Ok(Some(PodVm::new(sandbox, remains.cid, link, vmm, process, host, window, None)))
    }

    /// Containers that were made but not started dial the stream that they were told then.
    fn expect_stdio(&mut self, id: &SandboxId, vm: &PodVm) {
        let waiting = self.containers.values_mut().filter(|c| c.sandbox == *id);
        for container in waiting.filter(|c| matches!(c.phase, ContainerPhase::Created)) {
            container.stdio = Some(vm.link.expect_number(container.stdio_stream));
        }
    }

    fn watch_trees(&mut self, id: &SandboxId, vm: &PodVm, trees: BTreeMap<String, PathBuf>) {
        for (name, directory) in trees {
            let found = self.shared.roots.volume(&directory).map(Arc::new);
            match found.and_then(|found| watch_again(vm.link.clone(), name.clone(), found)) {
                Ok(watched) => {
                    if let Some(sandbox) = self.sandboxes.get_mut(id) {
                        sandbox.watches.insert(name, watched);
                    }
                }
                Err(error) => tracing::warn!(sandbox = %id, %error, "cannot watch a volume again"),
            }
        }
    }
}

/// The sandbox and containers of a record, without what only a running process has.
fn restore(record: Record) -> (Sandbox, Vec<Container>) {
    let phase = match record.phase {
        SandboxRecord::Launching => SandboxPhase::Launching,
        SandboxRecord::Ready => SandboxPhase::Ready,
        SandboxRecord::Stopping => SandboxPhase::Stopping,
        SandboxRecord::NotReady { reason } => SandboxPhase::NotReady { reason },
    };
    let containers = record.containers.into_iter().map(|c| Container {
        id: c.id,
        sandbox: record.id.clone(),
        spec: c.spec,
        phase: c.phase.phase(),
        created_ns: c.created_ns,
        image_id: c.image_id,
        image_ref: c.image_ref,
        process: c.process,
        log_path: c.log_path,
        stop_signal: c.stop_signal,
        copy_back: c.copy_back,
        stdio_stream: c.stdio_stream,
        stdio: None,
        console: None,
        in_start: false,
        reopening: false,
        reopen_failures: 0,
        kept: false,
        ending: None,
        exited: watch::Sender::new(false),
        remove_waiters: Vec::new(),
    });
    let containers = containers.collect();
    let sandbox = Sandbox {
        id: record.id,
        spec: record.spec,
        phase,
        created_ns: record.created_ns,
        cid: record.cid,
        port: Port { tap: record.tap, address: record.address, mac: record.mac },
        trees: record.trees,
        extents: record.extents,
        vm: None,
        watches: HashMap::new(),
        cancel: watch::Sender::new(false),
        saved: true,
        unwinding: false,
        stop_waiters: Vec::new(),
        remove_waiters: Vec::new(),
        attention: Attention::default(),
    };
    (sandbox, containers)
}
