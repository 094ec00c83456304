//! A container as the runtime takes it ◇.
//!
//! Called by `start` with everything looked up: environment, image, where each volume lies on the host.

use super::actual::{
    CONTAINER_HASH, CONTAINER_NAME, MESSAGE_PATH, MESSAGE_POLICY, POD_NAME, POD_NAMESPACE, POD_UID,
    RESTART_COUNT,
};
use super::desired::{Container, Desired};
use super::sandbox_config::{groups, namespaces};
use super::{env, resources};
use atoll_cri::v1;
use k8s_openapi::api::core::v1 as api;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// Paths of /proc and /sys that a container does not see, as every Kubernetes runtime hides them.
const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/firmware",
];
/// Paths of /proc that a container cannot write.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Where the parts of a container lie on the host.
#[derive(Debug, Clone)]
pub struct Places {
    /// Each volume of the pod: its directory, and whether containers may write to it.
    pub volumes: BTreeMap<String, (PathBuf, bool)>,
    /// The pod's hosts file.
    pub hosts: PathBuf,
    /// File for the container's last words.
    pub message: PathBuf,
}

/// Everything a container is made of.
pub struct Parts<'a> {
    /// The pod.
    pub desired: &'a Desired,
    /// The container.
    pub container: &'a Container,
    /// How often it was started before.
    pub restarts: u32,
    /// The image as the runtime has it.
    pub image: &'a v1::Image,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Places on the host.
    pub places: &'a Places,
    /// Memory of the node, in bytes.
    pub node_memory: u64,
}

/// The container.
///
/// # Errors
/// A sentence for `CreateContainerConfigError`.
pub fn container(parts: Parts<'_>) -> Result<v1::ContainerConfig, String> {
    let Parts { desired, container, restarts, image, env, places, node_memory } = parts;
    let spec = &container.spec;
    let values: BTreeMap<String, String> = env.iter().cloned().collect();
    let expand =
        |list: &Option<Vec<String>>| list.iter().flatten().map(|a| env::expand(a, &values)).collect();
    let key = &desired.key;
    let labels = [
        (POD_NAME, &key.name),
        (POD_NAMESPACE, &key.namespace),
        (POD_UID, &key.uid),
        (CONTAINER_NAME, &container.name),
    ];
    let annotations = [
        (CONTAINER_HASH, format!("{:x}", container.hash)),
        (RESTART_COUNT, restarts.to_string()),
        (MESSAGE_PATH, message_path(spec).to_owned()),
        (MESSAGE_POLICY, spec.termination_message_policy.clone().unwrap_or_else(|| "File".into())),
    ];
    let qos = resources::qos(desired.spec());
    Ok(v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: container.name.clone(), attempt: restarts }),
        image: Some(v1::ImageSpec {
            image: image.id.clone(),
            user_specified_image: container.image.clone(),
            ..Default::default()
        }),
        command: expand(&spec.command),
        args: expand(&spec.args),
        working_dir: spec.working_dir.clone().unwrap_or_default(),
        mounts: mounts(spec, places, &values)?,
        envs: env.into_iter().map(|(key, value)| v1::KeyValue { key, value: value.into() }).collect(),
        labels: labels.map(|(name, value)| (name.to_owned(), value.clone())).into(),
        annotations: annotations.map(|(name, value)| (name.to_owned(), value)).into(),
        log_path: log_path(&container.name, restarts),
        stdin: spec.stdin == Some(true),
        stdin_once: spec.stdin_once == Some(true),
        tty: spec.tty == Some(true),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(resources::of_container(container, qos, node_memory)),
            security_context: Some(security(desired.spec(), spec, image)?),
        }),
        ..Default::default()
    })
}

/// Where a container's log lies, below the pod's log directory.
pub fn log_path(name: &str, restarts: u32) -> String {
    format!("{name}/{restarts}.log")
}

/// Where a container leaves its last words.
pub fn message_path(spec: &api::Container) -> &str {
    spec.termination_message_path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/dev/termination-log")
}

fn mounts(
    spec: &api::Container,
    places: &Places,
    env: &BTreeMap<String, String>,
) -> Result<Vec<v1::Mount>, String> {
    let mut mounts = Vec::new();
    let mut hosts_taken = false;
    for mount in spec.volume_mounts.iter().flatten() {
        let (directory, writable) = places
            .volumes
            .get(&mount.name)
            .ok_or_else(|| format!("mount {}: the pod has no volume '{}'", mount.mount_path, mount.name))?;
        let part = sub_path(mount, env)?;
        let host = if part.as_os_str().is_empty() { directory.clone() } else { directory.join(part) };
        hosts_taken |= mount.mount_path.trim_end_matches('/') == "/etc/hosts";
        mounts.push(v1::Mount {
            container_path: absolute(&mount.mount_path),
            host_path: host.display().to_string(),
            readonly: mount.read_only == Some(true) || !writable,
            ..Default::default()
        });
    }
    let file = |container: &str, host: &Path, readonly| v1::Mount {
        container_path: container.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Default::default()
    };
    if !hosts_taken {
        // Read-only: the node writes it anew at every start, so what a container wrote would be lost anyway.
        mounts.push(file("/etc/hosts", &places.hosts, true));
    }
    mounts.push(file(message_path(spec), &places.message, false));
    Ok(mounts)
}

/// The part of the volume that is mounted, with its variables replaced.
///
/// # Errors
/// When it would leave the volume.
pub fn sub_path(mount: &api::VolumeMount, env: &BTreeMap<String, String>) -> Result<PathBuf, String> {
    let text = match (&mount.sub_path, &mount.sub_path_expr) {
        (Some(path), _) if !path.is_empty() => path.clone(),
        (_, Some(pattern)) if !pattern.is_empty() => {
            let expanded = env::expand(pattern, env);
            if expanded.contains("$(") {
                return Err(format!("subPathExpr '{pattern}' names a variable that is not set"));
            }
            expanded
        }
        _ => return Ok(PathBuf::new()),
    };
    let path = PathBuf::from(text);
    let inside = path.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    if inside { Ok(path) } else { Err(format!("subPath '{}' leaves its volume", path.display())) }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

fn security(
    pod: &api::PodSpec,
    spec: &api::Container,
    image: &v1::Image,
) -> Result<v1::LinuxContainerSecurityContext, String> {
    let of_pod = pod.security_context.clone().unwrap_or_default();
    let own = spec.security_context.clone().unwrap_or_default();
    let user = own.run_as_user.or(of_pod.run_as_user).or(image.uid.as_ref().map(|u| u.value));
    let (uid, name) = match (user, image.username.as_str()) {
        (Some(uid), _) => (Some(uid), String::new()),
        (None, "") => (Some(0), String::new()),
        (None, name) => (None, name.to_owned()),
    };
    if own.run_as_non_root.or(of_pod.run_as_non_root) == Some(true) {
        if uid == Some(0) {
            return Err("container has runAsNonRoot and image will run as root".into());
        }
        if uid.is_none() {
            return Err(format!(
                "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root"
            ));
        }
    }
    let capabilities = own.capabilities.clone().unwrap_or_default();
    let strict = of_pod.supplemental_groups_policy.as_deref() == Some("Strict");
    let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    Ok(v1::LinuxContainerSecurityContext {
        capabilities: Some(v1::Capability {
            add_capabilities: capabilities.add.unwrap_or_default(),
            drop_capabilities: capabilities.drop.unwrap_or_default(),
            ..Default::default()
        }),
        namespace_options: Some(namespaces(pod)),
        run_as_user: uid.map(|value| v1::Int64Value { value }),
        run_as_group: own.run_as_group.or(of_pod.run_as_group).map(|value| v1::Int64Value { value }),
        run_as_username: name,
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        supplemental_groups: groups(&of_pod),
        supplemental_groups_policy: if strict {
            v1::SupplementalGroupsPolicy::Strict
        } else {
            v1::SupplementalGroupsPolicy::Merge
        } as i32,
        no_new_privs: own.allow_privilege_escalation == Some(false),
        masked_paths: owned(&MASKED),
        readonly_paths: owned(&READ_ONLY),
        seccomp: Some(seccomp(own.seccomp_profile.or(of_pod.seccomp_profile).as_ref())),
        ..Default::default()
    })
}

/// Without a profile a container is not confined, as everywhere in Kubernetes.
fn seccomp(profile: Option<&api::SeccompProfile>) -> v1::SecurityProfile {
    let kind = match profile.map(|p| p.type_.as_str()) {
        Some("RuntimeDefault") => v1::security_profile::ProfileType::RuntimeDefault,
        _ => v1::security_profile::ProfileType::Unconfined,
    };
    v1::SecurityProfile { profile_type: kind as i32, localhost_ref: String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod;

    fn make(spec: &str, image: v1::Image) -> Result<v1::ContainerConfig, String> {
        let desired = pod(spec);
        let places = Places {
            volumes: [("v".into(), ("/p/v".into(), true)), ("c".into(), ("/p/c".into(), false))].into(),
            hosts: "/p/hosts".into(),
            message: "/p/m".into(),
        };
        container(Parts {
            desired: &desired,
            container: &desired.containers[0],
            restarts: 2,
            image: &image,
            env: vec![("A".into(), "1".into())],
            places: &places,
            node_memory: 1 << 30,
        })
    }

    #[test]
    fn mounts_arguments_and_names() {
        let made = make(
            "{containers: [{name: a, image: i, command: [sh], args: ['$(A)'], volumeMounts: [
               {name: v, mountPath: /v, subPathExpr: 'x/$(A)'}, {name: c, mountPath: /c}]}]}",
            v1::Image { id: "sha256:1".into(), ..Default::default() },
        )
        .unwrap();
        assert_eq!(made.args, ["1"]);
        assert_eq!(made.log_path, "a/2.log");
        assert_eq!(made.annotations[RESTART_COUNT], "2");
        let mounts: Vec<_> = made
            .mounts
            .iter()
            .map(|m| (m.host_path.as_str(), m.container_path.as_str(), m.readonly))
            .collect();
        let want = [
            ("/p/v/x/1", "/v", false),
            ("/p/c", "/c", true),
            ("/p/hosts", "/etc/hosts", true),
            ("/p/m", "/dev/termination-log", false),
        ];
        assert_eq!(mounts, want);
    }

    #[test]
    fn a_sub_path_stays_in_its_volume() {
        for path in ["../x", "/etc", "a/../../b"] {
            let spec = format!(
                "{{containers: [{{name: a, image: i, volumeMounts: [{{name: v, mountPath: /v, subPath: {path}}}]}}]}}"
            );
            assert!(make(&spec, v1::Image::default()).unwrap_err().contains("leaves its volume"), "{path}");
        }
    }

    #[test]
    fn run_as_non_root_is_checked() {
        let spec = "{securityContext: {runAsNonRoot: true}, containers: [{name: a, image: i}]}";
        let named = v1::Image { username: "web".into(), ..Default::default() };
        assert!(make(spec, v1::Image::default()).unwrap_err().contains("will run as root"));
        assert!(make(spec, named).unwrap_err().contains("non-numeric user (web)"));
        let number = v1::Image { uid: Some(v1::Int64Value { value: 5 }), ..Default::default() };
        let user = make(spec, number).unwrap().linux.unwrap().security_context.unwrap().run_as_user;
        assert_eq!(user.unwrap().value, 5);
    }
}
