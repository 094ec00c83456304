//! A pod's sandbox as the runtime takes it ◇.
//!
//! Invariant: made of the pod and the node's settings alone, so that every call of the pod's life carries the same.

use super::actual::{POD_NAME, POD_NAMESPACE, POD_UID};
use super::desired::Desired;
use super::dns::{self, ClusterDns};
use super::{resources, storage_limits};
use atoll_cri::v1;
use k8s_openapi::api::core::v1 as api;
use serde::Serialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Annotation: volumes that live in the guest, as JSON.
pub const SCRATCH_VOLUMES: &str = "atoll.dev/scratch-volumes";
/// Annotation: bytes that the pod may write altogether.
pub const STORAGE_LIMIT: &str = "atoll.dev/storage-limit-bytes";
/// Annotation: group that owns the pod's volumes.
pub const FS_GROUP: &str = "atoll.dev/fs-group";

/// Directories of the node.
#[derive(Debug, Clone)]
pub struct Directories {
    /// Files of pods, and what stands for their volumes that live in the guest.
    pub pods: PathBuf,
    /// Volumes of pods with content: Secrets are among them, so it is in memory.
    pub volumes: PathBuf,
    /// Logs of containers.
    pub logs: PathBuf,
}

impl Directories {
    /// Everything of one pod that may lie on the disk.
    pub fn pod(&self, uid: &str) -> PathBuf {
        self.pods.join(uid)
    }

    /// Everything of one pod that may not.
    pub fn in_memory(&self, uid: &str) -> PathBuf {
        self.volumes.join(uid)
    }

    /// What stands for a volume that lives in the guest.
    pub fn empty_dir(&self, uid: &str, name: &str) -> PathBuf {
        self.pod(uid).join("volumes/kubernetes.io~empty-dir").join(name)
    }

    /// A volume with content.
    pub fn volume(&self, uid: &str, kind: &str, name: &str) -> PathBuf {
        self.in_memory(uid).join("volumes").join(format!("kubernetes.io~{kind}")).join(name)
    }

    /// Logs of a pod.
    pub fn pod_logs(&self, desired: &Desired) -> PathBuf {
        let key = &desired.key;
        self.logs.join(format!("{}_{}_{}", key.namespace, key.name, key.uid))
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ScratchVolume<'a> {
    path: &'a Path,
    medium: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    size_limit_bytes: Option<i64>,
}

/// The sandbox.
pub fn sandbox(
    desired: &Desired,
    attempt: u32,
    dirs: &Directories,
    cluster: &ClusterDns,
) -> v1::PodSandboxConfig {
    let key = &desired.key;
    let meta = &desired.pod.metadata;
    let mut labels: HashMap<String, String> = meta.labels.clone().unwrap_or_default().into_iter().collect();
    labels.insert(POD_NAME.into(), key.name.clone());
    labels.insert(POD_NAMESPACE.into(), key.namespace.clone());
    labels.insert(POD_UID.into(), key.uid.clone());
    let mut annotations: HashMap<String, String> =
        meta.annotations.clone().unwrap_or_default().into_iter().collect();
    // Said by the node alone, whatever the pod's author wrote.
    annotations.insert(SCRATCH_VOLUMES.into(), scratch_volumes(desired, dirs));
    annotations.remove(FS_GROUP);
    annotations.remove(STORAGE_LIMIT);
    if let Some(limit) = storage_limits::of_pod(desired) {
        annotations.insert(STORAGE_LIMIT.into(), limit.to_string());
    }
    let context = desired.spec().security_context.clone().unwrap_or_default();
    if let Some(group) = context.fs_group {
        annotations.insert(FS_GROUP.into(), group.to_string());
    }
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: key.name.clone(),
            uid: key.uid.clone(),
            namespace: key.namespace.clone(),
            attempt,
        }),
        hostname: dns::hostname(desired, &cluster.domain).0,
        log_directory: dirs.pod_logs(desired).display().to_string(),
        dns_config: Some(dns::resolver(desired, cluster)),
        port_mappings: Vec::new(),
        labels,
        annotations,
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: String::new(),
            sysctls: context
                .sysctls
                .iter()
                .flatten()
                .map(|s| (s.name.replace('/', "."), s.value.clone()))
                .collect(),
            overhead: Some(resources::overhead(desired.spec())),
            resources: Some(resources::of_pod(desired)),
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(desired.spec())),
                run_as_user: context.run_as_user.map(|value| v1::Int64Value { value }),
                run_as_group: context.run_as_group.map(|value| v1::Int64Value { value }),
                supplemental_groups: groups(&context),
                seccomp: Some(v1::SecurityProfile::default()),
                ..Default::default()
            }),
        }),
        windows: None,
    }
}

/// Which namespaces a pod's containers share.
pub fn namespaces(spec: &api::PodSpec) -> v1::NamespaceOption {
    let pid = if spec.share_process_namespace == Some(true) {
        v1::NamespaceMode::Pod
    } else {
        v1::NamespaceMode::Container
    };
    v1::NamespaceOption {
        network: v1::NamespaceMode::Pod as i32,
        pid: pid as i32,
        ipc: v1::NamespaceMode::Pod as i32,
        ..Default::default()
    }
}

/// Extra groups of every process of the pod.
pub fn groups(context: &api::PodSecurityContext) -> Vec<i64> {
    let mut groups = context.supplemental_groups.clone().unwrap_or_default();
    groups.extend(context.fs_group);
    groups
}

fn scratch_volumes(desired: &Desired, dirs: &Directories) -> String {
    let of = |volume: &api::Volume| -> Option<serde_json::Value> {
        let source = volume.empty_dir.as_ref()?;
        serde_json::to_value(ScratchVolume {
            path: &dirs.empty_dir(&desired.key.uid, &volume.name),
            medium: source.medium.as_deref().unwrap_or_default(),
            size_limit_bytes: source.size_limit.as_ref().and_then(resources::units).filter(|n| *n > 0),
        })
        .ok()
    };
    let all: Vec<_> = desired.spec().volumes.iter().flatten().filter_map(of).collect();
    serde_json::Value::Array(all).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod;

    #[test]
    fn a_sandbox_carries_labels_scratch_volumes_and_resources() {
        let desired = pod(
            "{shareProcessNamespace: true, securityContext: {fsGroup: 7, supplementalGroups: [8], sysctls: [{name: a/b, value: '1'}]},
              containers: [{name: a, image: i, resources: {limits: {cpu: 1, memory: 64Mi, ephemeral-storage: 1Ki}}}],
              volumes: [{name: v, emptyDir: {medium: Memory, sizeLimit: 1Mi}}, {name: c, configMap: {name: c}}]}",
        );
        let dirs = Directories { pods: "/p".into(), volumes: "/v".into(), logs: "/l".into() };
        let made = sandbox(&desired, 3, &dirs, &ClusterDns::default());
        assert_eq!(made.log_directory, "/l/ns_p_u");
        assert_eq!(made.labels[POD_UID], "u");
        let scratch: serde_json::Value = serde_json::from_str(&made.annotations[SCRATCH_VOLUMES]).unwrap();
        let want = serde_json::json!([{"path": "/p/u/volumes/kubernetes.io~empty-dir/v", "medium": "Memory", "sizeLimitBytes": 1 << 20}]);
        assert_eq!(scratch, want);
        assert_eq!(made.annotations[STORAGE_LIMIT], "1024");
        let linux = made.linux.unwrap();
        assert_eq!(linux.sysctls["a.b"], "1");
        assert_eq!(linux.resources.unwrap().memory_limit_in_bytes, 64 << 20);
        let context = linux.security_context.unwrap();
        assert_eq!(context.supplemental_groups, [8, 7]);
        assert_eq!(context.namespace_options.unwrap().pid, v1::NamespaceMode::Pod as i32);
    }
}
