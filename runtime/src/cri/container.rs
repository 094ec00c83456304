//! Container RPCs, translation only.

use super::{Cri, missing, sandbox::matches_labels, status};
use crate::exec;
use crate::service::container::ContainerPhase;
use crate::service::process::signal_number;
use crate::service::{Command, ContainerView};
use crate::spec::{ContainerSpec, MountSpec, Resources, UserSpec};
use atoll_cri::v1::SupplementalGroupsPolicy;
use atoll_cri::v1::security_profile::ProfileType;
use atoll_cri::v1::{
    Container, ContainerConfig, ContainerFilter, ContainerMetadata, ContainerResources, ContainerState,
    ContainerStatus, ContainerStatusRequest, ContainerStatusResponse, CreateContainerRequest,
    CreateContainerResponse, ExecSyncRequest, ExecSyncResponse, ImageSpec, LinuxContainerResources,
    LinuxContainerSecurityContext, Mount, MountPropagation, NamespaceMode, RemoveContainerRequest,
    RemoveContainerResponse, ReopenContainerLogRequest, ReopenContainerLogResponse, Signal,
    StartContainerRequest, StartContainerResponse, StopContainerRequest, StopContainerResponse,
    UpdateContainerResourcesRequest, UpdateContainerResourcesResponse,
};
use atoll_spec::guest::SystemCalls;
use std::collections::HashMap;
use std::time::Duration;
use tonic::Status;

impl Cri {
    pub(super) async fn create(
        &self,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse, Status> {
        let spec = container_spec(request.config.ok_or_else(|| missing("config"))?)?;
        let sandbox = request.pod_sandbox_id;
        let create = |reply| Command::CreateContainer(sandbox, Box::new(spec), reply);
        let id = self.service.ask(create).await.map_err(status)?;
        Ok(CreateContainerResponse { container_id: id.into() })
    }

    pub(super) async fn start(
        &self,
        request: StartContainerRequest,
    ) -> Result<StartContainerResponse, Status> {
        let id = request.container_id;
        self.service.ask(|reply| Command::StartContainer(id, reply)).await.map_err(status)?;
        Ok(StartContainerResponse {})
    }

    pub(super) async fn stop(&self, request: StopContainerRequest) -> Result<StopContainerResponse, Status> {
        let (id, timeout) = (request.container_id, Duration::from_secs(request.timeout.max(0) as u64));
        self.service.ask(|reply| Command::StopContainer(id, timeout, reply)).await.map_err(status)?;
        Ok(StopContainerResponse {})
    }

    pub(super) async fn remove(
        &self,
        request: RemoveContainerRequest,
    ) -> Result<RemoveContainerResponse, Status> {
        let id = request.container_id;
        self.service.ask(|reply| Command::RemoveContainer(id, reply)).await.map_err(status)?;
        Ok(RemoveContainerResponse {})
    }

    pub(super) async fn list(&self, filter: Option<ContainerFilter>) -> Result<Vec<Container>, Status> {
        let filter = filter.unwrap_or_default();
        let views = self.service.ask(Command::ListContainers).await.map_err(status)?;
        let wanted = |view: &ContainerView| {
            (filter.id.is_empty() || view.id.as_str().starts_with(&filter.id))
                && (filter.pod_sandbox_id.is_empty()
                    || view.sandbox.as_str().starts_with(&filter.pod_sandbox_id))
                && filter.state.is_none_or(|s| s.state == state(&view.phase) as i32)
                && matches_labels(&view.spec.labels, &filter.label_selector)
        };
        Ok(views.iter().filter(|v| wanted(v)).map(listed).collect())
    }

    pub(super) async fn status(
        &self,
        request: ContainerStatusRequest,
    ) -> Result<ContainerStatusResponse, Status> {
        let id = request.container_id;
        let view = self.service.ask(|reply| Command::ContainerStatus(id, reply)).await.map_err(status)?;
        let mut info = HashMap::new();
        if request.verbose {
            let text = serde_json::json!({ "sandboxID": view.sandbox.as_str(), "phase": format!("{:?}", view.phase) });
            info.insert("info".to_owned(), text.to_string());
        }
        Ok(ContainerStatusResponse { status: Some(container_status(&view)), info })
    }

    pub(super) async fn update(
        &self,
        request: UpdateContainerResourcesRequest,
    ) -> Result<UpdateContainerResourcesResponse, Status> {
        let id = request.container_id;
        let linux = request.linux.ok_or_else(|| missing("linux"))?;
        let resources = Box::new(resources(linux));
        self.service.ask(|reply| Command::UpdateContainer(id, resources, reply)).await.map_err(status)?;
        Ok(UpdateContainerResourcesResponse {})
    }

    pub(super) async fn reopen_log(
        &self,
        request: ReopenContainerLogRequest,
    ) -> Result<ReopenContainerLogResponse, Status> {
        let id = request.container_id;
        let container = self.service.ask(|reply| Command::UseContainer(id, reply)).await.map_err(status)?;
        if let Some(console) = container.console {
            console.reopen_log().await.map_err(status)?;
        }
        Ok(ReopenContainerLogResponse {})
    }

    pub(super) async fn exec_to_end(&self, request: ExecSyncRequest) -> Result<ExecSyncResponse, Status> {
        let id = request.container_id;
        let container = self.service.ask(|reply| Command::UseContainer(id, reply)).await.map_err(status)?;
        let timeout = u64::try_from(request.timeout).ok().filter(|t| *t > 0).map(Duration::from_secs);
        let finished = exec::run(&container, request.cmd, timeout).await.map_err(status)?;
        Ok(ExecSyncResponse { stdout: finished.stdout, stderr: finished.stderr, exit_code: finished.code })
    }
}

fn state(phase: &ContainerPhase) -> ContainerState {
    match phase {
        ContainerPhase::Creating | ContainerPhase::Created | ContainerPhase::Starting => {
            ContainerState::ContainerCreated
        }
        ContainerPhase::Running { .. } => ContainerState::ContainerRunning,
        ContainerPhase::Exited { .. } | ContainerPhase::Removing { .. } => ContainerState::ContainerExited,
    }
}

fn metadata(view: &ContainerView) -> ContainerMetadata {
    ContainerMetadata { name: view.spec.name.clone(), attempt: view.spec.attempt }
}

fn image_spec(view: &ContainerView) -> ImageSpec {
    ImageSpec {
        image: view.spec.image.clone(),
        annotations: view.spec.image_annotations.clone().into_iter().collect(),
        user_specified_image: view.spec.user_image.clone(),
        ..ImageSpec::default()
    }
}

fn listed(view: &ContainerView) -> Container {
    Container {
        id: view.id.to_string(),
        pod_sandbox_id: view.sandbox.to_string(),
        metadata: Some(metadata(view)),
        image: Some(image_spec(view)),
        image_ref: view.image_ref.clone(),
        state: state(&view.phase).into(),
        created_at: view.created_ns,
        labels: view.spec.labels.clone().into_iter().collect(),
        annotations: view.spec.annotations.clone().into_iter().collect(),
        image_id: view.image_id.clone(),
    }
}

pub(super) fn container_status(view: &ContainerView) -> ContainerStatus {
    let told = match &view.phase {
        ContainerPhase::Removing { before } => before,
        phase => phase,
    };
    let (started_at, ended) = match told {
        ContainerPhase::Running { started_ns } => (*started_ns, None),
        ContainerPhase::Exited { started_ns, ended } => (*started_ns, Some(ended.clone())),
        _ => (0, None),
    };
    ContainerStatus {
        id: view.id.to_string(),
        metadata: Some(metadata(view)),
        state: state(&view.phase).into(),
        created_at: view.created_ns,
        started_at,
        finished_at: ended.as_ref().map_or(0, |e| e.finished_ns),
        exit_code: ended.as_ref().map_or(0, |e| e.code),
        image: Some(image_spec(view)),
        image_ref: view.image_ref.clone(),
        reason: ended.as_ref().map(|e| e.reason.clone()).unwrap_or_default(),
        message: ended.map(|e| e.message).unwrap_or_default(),
        labels: view.spec.labels.clone().into_iter().collect(),
        annotations: view.spec.annotations.clone().into_iter().collect(),
        mounts: view.spec.mounts.iter().map(wire_mount).collect(),
        log_path: view.log_path.as_ref().map(|p| p.display().to_string()).unwrap_or_default(),
        resources: Some(ContainerResources {
            linux: Some(wire_resources(&view.spec.resources)),
            windows: None,
        }),
        image_id: view.image_id.clone(),
        user: None,
        stop_signal: wire_signal(view.stop_signal).into(),
    }
}

fn wire_mount(mount: &MountSpec) -> Mount {
    let image =
        (!mount.image.is_empty()).then(|| ImageSpec { image: mount.image.clone(), ..ImageSpec::default() });
    Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.clone(),
        readonly: mount.read_only,
        image,
        image_sub_path: mount.image_sub_path.clone(),
        ..Mount::default()
    }
}

pub(super) fn resources(linux: LinuxContainerResources) -> Resources {
    Resources {
        cpu_period: linux.cpu_period,
        cpu_quota: linux.cpu_quota,
        cpu_shares: linux.cpu_shares,
        memory_bytes: linux.memory_limit_in_bytes,
        oom_score_adj: linux.oom_score_adj,
        unified: linux.unified.into_iter().collect(),
    }
}

fn wire_resources(resources: &Resources) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory_limit_in_bytes: resources.memory_bytes,
        oom_score_adj: resources.oom_score_adj,
        unified: resources.unified.clone().into_iter().collect(),
        ..LinuxContainerResources::default()
    }
}

/// The number of a CRI signal; 0 for the default.
fn signal_of(signal: i32) -> i32 {
    let Ok(signal) = Signal::try_from(signal) else { return 0 };
    let name = signal.as_str_name().trim_start_matches("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-");
    signal_number(&name).unwrap_or(0)
}

fn wire_signal(number: i32) -> Signal {
    (1..=65)
        .filter_map(|value| Signal::try_from(value).ok())
        .find(|signal| signal_of(*signal as i32) == number)
        .unwrap_or(Signal::RuntimeDefault)
}

fn refuse(why: String) -> Status {
    Status::invalid_argument(why)
}

fn mount(mount: Mount) -> Result<MountSpec, Status> {
    let at = &mount.container_path;
    if mount.propagation != MountPropagation::PropagationPrivate as i32 {
        return Err(refuse(format!(
            "mount {at}: mount propagation is not possible, a pod is a virtual machine and shares no mounts with the host"
        )));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(refuse(format!("mount {at}: id-mapped mounts are not supported")));
    }
    if !mount.mount_options.is_empty() {
        return Err(refuse(format!("mount {at}: mount options are not supported")));
    }
    let image =
        mount.image.map(|i| if i.image_ref.is_empty() { i.image } else { i.image_ref }).unwrap_or_default();
    Ok(MountSpec {
        container_path: mount.container_path,
        host_path: mount.host_path,
        // An image cannot be written to, whatever was asked for.
        read_only: mount.readonly || !image.is_empty(),
        image,
        image_sub_path: mount.image_sub_path,
    })
}

fn user(security: &LinuxContainerSecurityContext) -> Result<UserSpec, Status> {
    let id = |value: i64, what: &str| {
        u32::try_from(value).map_err(|_| refuse(format!("{what} {value} is not between 0 and {}", u32::MAX)))
    };
    Ok(UserSpec {
        uid: security.run_as_user.as_ref().map(|v| id(v.value, "run_as_user")).transpose()?,
        gid: security.run_as_group.as_ref().map(|v| id(v.value, "run_as_group")).transpose()?,
        name: security.run_as_username.clone(),
        groups: security.supplemental_groups.iter().map(|g| id(*g, "group")).collect::<Result<_, _>>()?,
    })
}

/// Refuses what would silently not be done.
fn check_profiles(name: &str, security: &LinuxContainerSecurityContext) -> Result<(), Status> {
    if security.supplemental_groups_policy == SupplementalGroupsPolicy::Strict as i32 {
        return Err(refuse(format!("container {name}: supplementalGroupsPolicy Strict is not supported")));
    }
    for (profile, what) in [(&security.seccomp, "seccomp"), (&security.apparmor, "AppArmor")] {
        if let Some(profile) = profile.as_ref().filter(|p| p.profile_type() == ProfileType::Localhost) {
            return Err(refuse(format!(
                "container {name}: {what} profile {} lies on the host, which a virtual machine does not use",
                profile.localhost_ref
            )));
        }
    }
    Ok(())
}

/// Reads a container config; refuses what a VM cannot honestly give.
pub(super) fn container_spec(config: ContainerConfig) -> Result<ContainerSpec, Status> {
    let name = config.metadata.ok_or_else(|| missing("config.metadata"))?;
    let image = config.image.ok_or_else(|| missing("config.image"))?;
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    if security.privileged {
        return Err(refuse(format!("container {}: privileged containers are not supported", name.name)));
    }
    if let Some(device) = config.devices.first() {
        return Err(refuse(format!(
            "device {} of the host cannot be given to a virtual machine",
            device.host_path
        )));
    }
    if let Some(device) = config.cdi_devices.first() {
        return Err(refuse(format!("CDI device {} is not supported", device.name)));
    }
    let pid_mode = security.namespace_options.as_ref().map_or(0, |o| o.pid);
    if pid_mode == NamespaceMode::Node as i32 {
        return Err(refuse("the host's PID namespace cannot be shared with a container".to_owned()));
    }
    check_profiles(&name.name, &security)?;
    let user = user(&security)?;
    let system_calls = match security.seccomp.as_ref().map(|p| p.profile_type()) {
        Some(ProfileType::RuntimeDefault) => SystemCalls::Default,
        _ => SystemCalls::Any,
    };
    let capabilities = security.capabilities.unwrap_or_default();
    let mut add = capabilities.add_capabilities;
    add.extend(capabilities.add_ambient_capabilities);
    let envs = config.envs.into_iter().map(|e| (e.key, String::from_utf8_lossy(&e.value).into_owned()));
    Ok(ContainerSpec {
        name: name.name,
        attempt: name.attempt,
        image: image.image,
        user_image: image.user_specified_image,
        image_annotations: image.annotations.into_iter().collect(),
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        envs: envs.collect(),
        mounts: config.mounts.into_iter().map(mount).collect::<Result<_, _>>()?,
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        log_path: config.log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: resources(linux.resources.unwrap_or_default()),
        user,
        add_capabilities: add,
        drop_capabilities: capabilities.drop_capabilities,
        no_new_privileges: security.no_new_privs,
        system_calls,
        read_only_root: security.readonly_rootfs,
        masked_paths: security.masked_paths,
        read_only_paths: security.readonly_paths,
        stop_signal: signal_of(config.stop_signal),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(ImageSpec { image: "i".into(), ..ImageSpec::default() }),
            ..ContainerConfig::default()
        }
    }

    #[test]
    fn signals_are_translated_both_ways() {
        for (signal, number) in [
            (Signal::RuntimeDefault, 0),
            (Signal::Sigterm, 15),
            (Signal::Sigkill, 9),
            (Signal::Sigrtminplus3, 37),
            (Signal::Sigrtmaxminus1, 63),
        ] {
            assert_eq!(signal_of(signal.into()), number, "{signal:?}");
            assert_eq!(wire_signal(number), signal);
        }
    }

    #[test]
    fn what_a_vm_cannot_give_is_refused() {
        let check = |change: fn(&mut ContainerConfig)| {
            let mut config = config();
            change(&mut config);
            container_spec(config)
        };
        assert!(check(|_| ()).is_ok());
        let bidirectional =
            Mount { propagation: MountPropagation::PropagationBidirectional.into(), ..Mount::default() };
        assert!(mount(bidirectional).unwrap_err().message().contains("propagation"));
        assert!(check(|c| c.devices.push(Default::default())).is_err());
        assert!(check(|c| c.metadata = None).is_err());
        let negative = LinuxContainerSecurityContext {
            run_as_user: Some(atoll_cri::v1::Int64Value { value: -1 }),
            ..Default::default()
        };
        assert!(user(&negative).is_err());
    }
}
