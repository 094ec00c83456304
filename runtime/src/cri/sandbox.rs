//! PodSandbox RPCs, translation only.

use super::{Cri, missing, status};
use crate::service::sandbox::SandboxPhase;
use crate::service::{Command, SandboxView};
use crate::spec::{Dns, SandboxName, SandboxSpec, ScratchVolume};
use atoll_cri::v1::{
    LinuxPodSandboxConfig, LinuxPodSandboxStatus, Namespace, NamespaceMode, NamespaceOption, PodSandbox,
    PodSandboxConfig, PodSandboxFilter, PodSandboxMetadata, PodSandboxNetworkStatus, PodSandboxState,
    PodSandboxStatus, PodSandboxStatusRequest, PodSandboxStatusResponse, RemovePodSandboxRequest,
    RemovePodSandboxResponse, RunPodSandboxRequest, RunPodSandboxResponse, StopPodSandboxRequest,
    StopPodSandboxResponse,
};
use atoll_spec::units::MiB;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Duration;
use tonic::Status;

/// Annotation that lists the host directories which are volumes in the guest.
const SCRATCH_ANNOTATION: &str = "atoll.dev/scratch-volumes";
/// Annotation: bytes that the pod's containers may write altogether, so that its scratch disk is no larger than it has to be.
const LIMIT_ANNOTATION: &str = "atoll.dev/storage-limit-bytes";
/// Most virtual processors of a VM.
const MAX_VCPUS: u64 = 32;
/// Most memory that is given to one VM without questions, MiB.
const MAX_MEMORY_MIB: u32 = 1 << 20;

/// Sizes that a pod without limits gets.
pub(super) struct Defaults {
    pub memory: MiB,
    pub overhead: MiB,
    pub host_cpus: u64,
}

impl Cri {
    pub(super) async fn run_sandbox(
        &self,
        request: RunPodSandboxRequest,
    ) -> Result<RunPodSandboxResponse, Status> {
        let config = request.config.ok_or_else(|| missing("config"))?;
        let settings = self.service.config();
        let defaults = Defaults {
            memory: MiB(settings.default_memory_mib),
            overhead: MiB(settings.guest_overhead_mib),
            host_cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
        };
        let spec = sandbox_spec(config, &request.runtime_handler, &defaults)?;
        let id =
            self.service.ask(|reply| Command::RunSandbox(Box::new(spec), reply)).await.map_err(status)?;
        Ok(RunPodSandboxResponse { pod_sandbox_id: id.into() })
    }

    pub(super) async fn stop_sandbox(
        &self,
        request: StopPodSandboxRequest,
    ) -> Result<StopPodSandboxResponse, Status> {
        let id = request.pod_sandbox_id;
        self.service.ask(|reply| Command::StopSandbox(id, reply)).await.map_err(status)?;
        Ok(StopPodSandboxResponse {})
    }

    pub(super) async fn remove_sandbox(
        &self,
        request: RemovePodSandboxRequest,
    ) -> Result<RemovePodSandboxResponse, Status> {
        let id = request.pod_sandbox_id;
        self.service.ask(|reply| Command::RemoveSandbox(id, reply)).await.map_err(status)?;
        Ok(RemovePodSandboxResponse {})
    }

    pub(super) async fn sandbox_status(
        &self,
        request: PodSandboxStatusRequest,
    ) -> Result<PodSandboxStatusResponse, Status> {
        let id = request.pod_sandbox_id;
        let (view, containers) =
            self.service.ask(|reply| Command::SandboxStatus(id, reply)).await.map_err(status)?;
        let mut info = HashMap::new();
        if request.verbose {
            let reason = match &view.phase {
                SandboxPhase::NotReady { reason } => reason.clone(),
                phase => format!("{phase:?}"),
            };
            let machine = self.machine(&view).await;
            let (memory, vcpus) = (view.spec.memory.0, view.spec.vcpus);
            let text = json!({ "phase": reason, "memoryMiB": memory, "vcpus": vcpus, "machine": machine });
            info.insert("info".to_owned(), text.to_string());
        }
        Ok(PodSandboxStatusResponse {
            status: Some(sandbox_status(&view)),
            info,
            containers_statuses: containers.iter().map(super::container::container_status).collect(),
            timestamp: crate::vm::launch::unix_ns(),
        })
    }

    /// What a running machine can tell of its launch and of its exits to the VMM; null when there is none.
    async fn machine(&self, view: &SandboxView) -> Value {
        let Ok(vm) = self.vm_of(view.id.as_str()).await else { return Value::Null };
        let launch = vm.launched.map(|times| {
            let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
            json!({
                "claimUs": us(times.claim),
                "jailUs": us(times.jail),
                "guestUs": us(times.guest),
                "configureUs": us(times.configure),
            })
        });
        let stats = vm.vmm_stats().await.ok();
        let (exits, steps) = stats.map(|s| (s.exits, s.launch_us)).unzip();
        json!({ "vmmPid": vm.process.pid, "launch": launch, "exits": exits, "vmmStepsUs": steps })
    }

    pub(super) async fn list_sandboxes(
        &self,
        filter: Option<PodSandboxFilter>,
    ) -> Result<Vec<PodSandbox>, Status> {
        let filter = filter.unwrap_or_default();
        let views = self.service.ask(Command::ListSandboxes).await.map_err(status)?;
        let wanted = |view: &SandboxView| {
            (filter.id.is_empty() || view.id.as_str().starts_with(&filter.id))
                && filter.state.is_none_or(|s| s.state == state(view) as i32)
                && matches_labels(&view.spec.labels, &filter.label_selector)
        };
        Ok(views.iter().filter(|v| wanted(v)).map(listed).collect())
    }
}

/// Whether all of `selector` is in `labels`.
pub(super) fn matches_labels(labels: &crate::spec::Map, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn state(view: &SandboxView) -> PodSandboxState {
    match view.phase {
        SandboxPhase::Ready => PodSandboxState::SandboxReady,
        _ => PodSandboxState::SandboxNotready,
    }
}

pub(super) fn metadata(name: &SandboxName) -> PodSandboxMetadata {
    PodSandboxMetadata {
        name: name.name.clone(),
        uid: name.uid.clone(),
        namespace: name.namespace.clone(),
        attempt: name.attempt,
    }
}

fn listed(view: &SandboxView) -> PodSandbox {
    PodSandbox {
        id: view.id.to_string(),
        metadata: Some(metadata(&view.spec.name)),
        state: state(view).into(),
        created_at: view.created_ns,
        labels: view.spec.labels.clone().into_iter().collect(),
        annotations: view.spec.annotations.clone().into_iter().collect(),
        runtime_handler: view.spec.handler.clone(),
    }
}

pub(super) fn sandbox_status(view: &SandboxView) -> PodSandboxStatus {
    let options = NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: if view.spec.share_pids { NamespaceMode::Pod } else { NamespaceMode::Container }.into(),
        ipc: NamespaceMode::Pod.into(),
        ..NamespaceOption::default()
    };
    let ready = view.phase == SandboxPhase::Ready;
    PodSandboxStatus {
        id: view.id.to_string(),
        metadata: Some(metadata(&view.spec.name)),
        state: state(view).into(),
        created_at: view.created_ns,
        network: ready
            .then(|| PodSandboxNetworkStatus { ip: view.address.to_string(), additional_ips: vec![] }),
        linux: Some(LinuxPodSandboxStatus { namespaces: Some(Namespace { options: Some(options) }) }),
        labels: view.spec.labels.clone().into_iter().collect(),
        annotations: view.spec.annotations.clone().into_iter().collect(),
        runtime_handler: view.spec.handler.clone(),
    }
}

fn refuse(why: &str) -> Status {
    Status::invalid_argument(format!("{why}: a pod is a virtual machine of its own"))
}

/// Reads a sandbox config; refuses what a VM cannot honestly give.
pub(super) fn sandbox_spec(
    config: PodSandboxConfig,
    handler: &str,
    defaults: &Defaults,
) -> Result<SandboxSpec, Status> {
    if !["", super::runtime::RUNTIME_NAME].contains(&handler) {
        return Err(Status::invalid_argument(format!(
            "unknown runtime handler '{handler}': use '' or 'atoll'"
        )));
    }
    let name = config.metadata.ok_or_else(|| missing("config.metadata"))?;
    if let Some(port) = config.port_mappings.iter().find(|p| p.host_port != 0) {
        return Err(refuse(&format!("hostPort {} is not supported", port.host_port)));
    }
    let linux = config.linux.unwrap_or_default();
    let share_pids = check_namespaces(&linux)?;
    let scratch_volumes = match config.annotations.get(SCRATCH_ANNOTATION) {
        None => Vec::new(),
        Some(text) => scratch_volumes(text)?,
    };
    let storage_limit = config.annotations.get(LIMIT_ANNOTATION).map(|t| storage_limit(t)).transpose()?;
    let (memory, vcpus) = size(&linux, defaults);
    let dns = config.dns_config.unwrap_or_default();
    Ok(SandboxSpec {
        name: SandboxName {
            name: name.name,
            uid: name.uid,
            namespace: name.namespace,
            attempt: name.attempt,
        },
        hostname: config.hostname,
        log_directory: config.log_directory,
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        sysctls: linux.sysctls.into_iter().collect(),
        handler: handler.to_owned(),
        share_pids,
        memory,
        vcpus,
        scratch_volumes,
        storage_limit,
    })
}

fn storage_limit(text: &str) -> Result<u64, Status> {
    text.parse().map_err(|_| {
        Status::invalid_argument(format!("annotation {LIMIT_ANNOTATION} '{text}' is not a number of bytes"))
    })
}

fn scratch_volumes(text: &str) -> Result<Vec<ScratchVolume>, Status> {
    serde_json::from_str(text).map_err(|e| {
        Status::invalid_argument(format!(
            "annotation {SCRATCH_ANNOTATION} is not a JSON list of {{\"path\": …, \"medium\": …, \"sizeLimitBytes\": …}}: {e}"
        ))
    })
}

/// Refuses host namespaces and privileged pods; answers whether processes are shared.
fn check_namespaces(linux: &LinuxPodSandboxConfig) -> Result<bool, Status> {
    let security = linux.security_context.clone().unwrap_or_default();
    if security.privileged {
        return Err(refuse("privileged pods are not supported"));
    }
    let Some(options) = security.namespace_options else { return Ok(false) };
    for (mode, what) in [(options.network, "network"), (options.pid, "PID"), (options.ipc, "IPC")] {
        if mode == NamespaceMode::Node as i32 {
            return Err(refuse(&format!("the host's {what} namespace cannot be shared with a pod")));
        }
    }
    if options.userns_options.is_some_and(|u| u.mode == NamespaceMode::Pod as i32) {
        return Err(refuse("user namespaces on the host are not supported, nor needed"));
    }
    Ok(options.pid == NamespaceMode::Pod as i32)
}

/// Memory and processors of the VM.
fn size(linux: &LinuxPodSandboxConfig, defaults: &Defaults) -> (MiB, u8) {
    let resources = linux.resources.clone().unwrap_or_default();
    let overhead = linux.overhead.as_ref().map_or(0, |o| o.memory_limit_in_bytes.max(0)) as u64;
    let limit = u64::try_from(resources.memory_limit_in_bytes).unwrap_or(0);
    let memory = if limit == 0 {
        defaults.memory
    } else {
        MiB::holding(limit.saturating_add(overhead.max(defaults.overhead.bytes())))
    };
    let period = if resources.cpu_period > 0 { resources.cpu_period as u64 } else { 100_000 };
    let quota = u64::try_from(resources.cpu_quota).unwrap_or(0);
    let vcpus = if quota == 0 { defaults.host_cpus.min(2) } else { quota.div_ceil(period) };
    let vcpus = vcpus.clamp(1, MAX_VCPUS.min(defaults.host_cpus.max(1)));
    (MiB(memory.0.clamp(128, MAX_MEMORY_MIB)), vcpus as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_cri::v1::{LinuxContainerResources, LinuxSandboxSecurityContext, PortMapping};

    const DEFAULTS: Defaults = Defaults { memory: MiB(512), overhead: MiB(128), host_cpus: 4 };

    fn config() -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata { name: "p".into(), ..PodSandboxMetadata::default() }),
            ..PodSandboxConfig::default()
        }
    }

    fn check(change: impl FnOnce(&mut PodSandboxConfig)) -> Result<SandboxSpec, Status> {
        let mut config = config();
        change(&mut config);
        sandbox_spec(config, "", &DEFAULTS)
    }

    fn with_namespaces(options: NamespaceOption) -> Result<SandboxSpec, Status> {
        check(|c| {
            let security_context =
                Some(LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
            c.linux = Some(LinuxPodSandboxConfig { security_context, ..Default::default() });
        })
    }

    #[test]
    fn what_a_vm_cannot_give_is_refused_with_a_reason() {
        let node: i32 = NamespaceMode::Node.into();
        for options in [
            NamespaceOption { network: node, ..Default::default() },
            NamespaceOption { pid: node, ..Default::default() },
            NamespaceOption { ipc: node, ..Default::default() },
        ] {
            assert!(with_namespaces(options).unwrap_err().message().contains("virtual machine"));
        }
        let port = PortMapping { host_port: 80, ..Default::default() };
        assert!(check(|c| c.port_mappings.push(port)).unwrap_err().message().contains("hostPort 80"));
        assert!(sandbox_spec(config(), "runc", &DEFAULTS).is_err());
        assert!(check(|c| c.metadata = None).is_err());
        assert!(check(|c| _ = c.annotations.insert(SCRATCH_ANNOTATION.into(), "{".into())).is_err());
    }

    #[test]
    fn sizes_follow_limits() {
        let size_of = |memory: i64, quota: i64| {
            let resources = LinuxContainerResources {
                memory_limit_in_bytes: memory,
                cpu_quota: quota,
                cpu_period: 100_000,
                ..Default::default()
            };
            let spec = check(|c| {
                c.linux = Some(LinuxPodSandboxConfig { resources: Some(resources), ..Default::default() })
            });
            let spec = spec.unwrap();
            (spec.memory.0, spec.vcpus)
        };
        assert_eq!(size_of(0, 0), (512, 2));
        assert_eq!(size_of(256 << 20, 150_000), (384, 2));
        assert_eq!(size_of(1, 1), (129, 1));
        assert_eq!(size_of(0, 10_000_000), (512, 4));
    }

    #[test]
    fn scratch_volumes_are_read_from_the_annotation() {
        let text = r#"[{"path":"/p/v","medium":"Memory","sizeLimitBytes":5},{"path":"/p/w"}]"#;
        let spec = check(|c| _ = c.annotations.insert(SCRATCH_ANNOTATION.into(), text.into())).unwrap();
        assert_eq!(spec.scratch_volumes.len(), 2);
        assert_eq!(spec.scratch_volumes[0].size_limit_bytes, Some(5));
    }
}
