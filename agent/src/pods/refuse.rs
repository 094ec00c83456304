//! What this node does not do, said before anything runs ◇.
//!
//! Called by `worker` for a pod it has not started, and by `start` for an ephemeral container. A refused pod is Failed with reason and message and is never
//! tried again: half of what was asked for is worse than nothing.

use super::desired;
use k8s_openapi::api::core::v1 as api;

/// Why a pod is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// In a word, for `status.reason`.
    pub reason: &'static str,
    /// In a sentence.
    pub message: String,
}

/// Sysctls that a pod may set: each counts for its own microVM only.
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// Looks for something this node does not do.
pub fn check(pod: &api::Pod) -> Option<Refusal> {
    let spec = pod.spec.as_ref()?;
    let first = platform(spec)
        .or_else(|| host(spec))
        .or_else(|| spec.security_context.as_ref().and_then(pod_security))
        .or_else(|| spec.volumes.iter().flatten().find_map(volume))
        .or_else(|| all_containers(spec).find_map(container));
    if let Some(message) = first {
        return Some(Refusal {
            reason: "Unsupported",
            message: format!("This node cannot run the pod: {message}."),
        });
    }
    sysctls(spec)
}

/// Looks for something this node does not do for an ephemeral container. It comes when its pod runs already, so it alone
/// does not start.
pub fn check_ephemeral(pod: &api::Pod, name: &str) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let found = spec.ephemeral_containers.iter().flatten().find(|c| c.name == name)?;
    if found.target_container_name.is_some() && !yes(spec.share_process_namespace) {
        return Some(
            "targetContainerName is not supported: with shareProcessNamespace in its spec a pod's containers see \
             each other's processes"
                .into(),
        );
    }
    // What cannot be read was refused with the pod.
    container_fields(&desired::ordinary(found).ok()?)
}

fn all_containers(spec: &api::PodSpec) -> impl Iterator<Item = &api::Container> {
    spec.init_containers.iter().flatten().chain(&spec.containers)
}

fn yes(flag: Option<bool>) -> bool {
    flag == Some(true)
}

fn platform(spec: &api::PodSpec) -> Option<String> {
    let os = spec.os.as_ref().map(|os| os.name.as_str()).filter(|os| *os != "linux");
    if let Some(os) = os {
        return Some(format!("spec.os.name is {os}, and the node runs linux"));
    }
    if spec.resource_claims.as_ref().is_some_and(|c| !c.is_empty()) {
        return Some("spec.resourceClaims (dynamic resources) are not supported".into());
    }
    None
}

fn host(spec: &api::PodSpec) -> Option<String> {
    let shared = [
        (spec.host_network, "hostNetwork", "network"),
        (spec.host_pid, "hostPID", "processes"),
        (spec.host_ipc, "hostIPC", "IPC"),
    ];
    let (_, field, what) = shared.into_iter().find(|(flag, _, _)| yes(*flag))?;
    Some(format!(
        "spec.{field} asks for the host's {what}, and every pod here has a virtual machine of its own"
    ))
}

fn pod_security(context: &api::PodSecurityContext) -> Option<String> {
    let at = "spec.securityContext";
    if context.se_linux_options.is_some() {
        return Some(format!("{at}.seLinuxOptions is not supported"));
    }
    if context.windows_options.is_some() {
        return Some(format!("{at}.windowsOptions is for Windows"));
    }
    if context.supplemental_groups_policy.as_deref() == Some("Strict") {
        return Some(format!("{at}.supplementalGroupsPolicy Strict is not supported"));
    }
    profiles(at, context.seccomp_profile.as_ref(), context.app_armor_profile.as_ref())
}

fn profiles(
    at: &str,
    seccomp: Option<&api::SeccompProfile>,
    apparmor: Option<&api::AppArmorProfile>,
) -> Option<String> {
    if seccomp.is_some_and(|p| p.type_ == "Localhost") {
        return Some(format!("{at}.seccompProfile names a file of the host: use RuntimeDefault"));
    }
    if apparmor.is_some_and(|p| p.type_ == "Localhost") {
        return Some(format!(
            "{at}.appArmorProfile names a profile of the host, and guests have no AppArmor"
        ));
    }
    None
}

fn volume(volume: &api::Volume) -> Option<String> {
    let kind = volume_kind(volume);
    let refused = match kind {
        "emptyDir" => {
            let medium = volume.empty_dir.as_ref()?.medium.as_deref().unwrap_or_default();
            (!matches!(medium, "" | "Memory")).then(|| format!("emptyDir medium {medium} is not supported"))
        }
        "configMap" | "secret" | "downwardAPI" => None,
        "projected" => volume
            .projected
            .as_ref()?
            .sources
            .iter()
            .flatten()
            .any(|s| s.cluster_trust_bundle.is_some() || s.pod_certificate.is_some())
            .then(|| "projected sources clusterTrustBundle and podCertificate are not supported".into()),
        "hostPath" => Some("hostPath asks for files of the host".into()),
        other => Some(format!("volumes of kind {other} are not supported")),
    };
    refused.map(|why| format!("volume {}: {why}", volume.name))
}

/// What a volume is, by its field in the API.
fn volume_kind(volume: &api::Volume) -> &'static str {
    let kinds = [
        (volume.empty_dir.is_some(), "emptyDir"),
        (volume.config_map.is_some(), "configMap"),
        (volume.secret.is_some(), "secret"),
        (volume.downward_api.is_some(), "downwardAPI"),
        (volume.projected.is_some(), "projected"),
        (volume.host_path.is_some(), "hostPath"),
        (volume.persistent_volume_claim.is_some(), "persistentVolumeClaim"),
        (volume.csi.is_some(), "csi"),
        (volume.ephemeral.is_some(), "ephemeral"),
        (volume.image.is_some(), "image"),
        (volume.nfs.is_some(), "nfs"),
        (volume.iscsi.is_some(), "iscsi"),
    ];
    kinds.into_iter().find(|(is, _)| *is).map_or("unknown", |(_, name)| name)
}

fn container(container: &api::Container) -> Option<String> {
    container_fields(container).map(|why| format!("container {}: {why}", container.name))
}

fn container_fields(container: &api::Container) -> Option<String> {
    if let Some(port) = container.ports.iter().flatten().find(|p| p.host_port.is_some_and(|h| h > 0)) {
        return Some(format!("port {} asks for a hostPort, which is not supported", port.container_port));
    }
    if container.volume_devices.as_ref().is_some_and(|d| !d.is_empty()) {
        return Some("volumeDevices are not supported".into());
    }
    for mount in container.volume_mounts.iter().flatten() {
        if mount.mount_propagation.as_deref().is_some_and(|p| p != "None") {
            return Some(format!("mount {}: mountPropagation is not supported", mount.mount_path));
        }
    }
    if container.restart_policy_rules.iter().flatten().any(|r| r.action != "Restart") {
        return Some("restartPolicyRules may only have the action Restart".into());
    }
    if container.resources.as_ref().is_some_and(|r| r.claims.as_ref().is_some_and(|c| !c.is_empty())) {
        return Some("resources.claims are not supported".into());
    }
    let context = container.security_context.as_ref()?;
    if yes(context.privileged) {
        return Some("securityContext.privileged is not supported".into());
    }
    if context.se_linux_options.is_some() {
        return Some("securityContext.seLinuxOptions is not supported".into());
    }
    if context.windows_options.is_some() {
        return Some("securityContext.windowsOptions is for Windows".into());
    }
    if context.proc_mount.as_deref().is_some_and(|p| p != "Default") {
        return Some("securityContext.procMount is not supported".into());
    }
    profiles("securityContext", context.seccomp_profile.as_ref(), context.app_armor_profile.as_ref())
}

fn sysctls(spec: &api::PodSpec) -> Option<Refusal> {
    let set = spec.security_context.as_ref()?.sysctls.as_ref()?;
    let unsafe_one = set.iter().find(|s| !SAFE_SYSCTLS.contains(&s.name.replace('/', ".").as_str()))?;
    Some(Refusal {
        reason: "SysctlForbidden",
        message: format!("forbidden sysctl: {:?} not allowlisted", unsafe_one.name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod;

    fn check_text(spec: &str) -> Option<String> {
        check(&pod(spec).pod).map(|r| format!("{}: {}", r.reason, r.message))
    }

    #[test]
    fn an_ordinary_pod_is_not_refused() {
        assert_eq!(
            check_text(
                "{containers: [{name: a, image: i, securityContext: {runAsUser: 1, seccompProfile: {type: RuntimeDefault}},
                   ports: [{containerPort: 80}], volumeMounts: [{name: v, mountPath: /v, subPathExpr: $(POD)}]}],
                  volumes: [{name: v, emptyDir: {medium: Memory}}, {name: c, configMap: {name: c}}],
                  securityContext: {sysctls: [{name: net.ipv4.tcp_syncookies, value: '1'}]}}"
            ),
            None
        );
    }

    #[test]
    fn an_ephemeral_container_is_refused_for_itself() {
        let with = |pod_fields: &str, fields: &str| {
            let spec = format!(
                "{{{pod_fields}containers: [{{name: a, image: i}}], ephemeralContainers: [{{name: e, image: i{fields}}}]}}"
            );
            let pod = pod(&spec).pod;
            assert_eq!(check(&pod), None, "the pod runs");
            check_ephemeral(&pod, "e").unwrap_or_default()
        };
        assert_eq!(with("", ""), "");
        assert_eq!(with("shareProcessNamespace: true, ", ", targetContainerName: a"), "");
        assert!(with("", ", targetContainerName: a").starts_with("targetContainerName"));
        assert!(with("", ", securityContext: {privileged: true}").contains("privileged"));
    }

    #[test]
    fn each_refusal_names_its_field() {
        let with = |fields: &str| format!("{{containers: [{{name: a, image: i}}], {fields}}}");
        let of_container = |fields: &str| format!("{{containers: [{{name: a, image: i, {fields}}}]}}");
        let table = [
            (with("hostNetwork: true"), "spec.hostNetwork"),
            (with("hostPID: true"), "spec.hostPID"),
            (with("hostIPC: true"), "spec.hostIPC"),
            (with("os: {name: windows}"), "spec.os.name"),
            (with("securityContext: {supplementalGroupsPolicy: Strict}"), "supplementalGroupsPolicy"),
            (with("resourceClaims: [{name: r}]"), "spec.resourceClaims"),
            (with("volumes: [{name: v, hostPath: {path: /}}]"), "hostPath"),
            (with("volumes: [{name: v, persistentVolumeClaim: {claimName: c}}]"), "persistentVolumeClaim"),
            (with("volumes: [{name: v, csi: {driver: d}}]"), "csi"),
            (with("volumes: [{name: v, emptyDir: {medium: HugePages}}]"), "HugePages"),
            (with("securityContext: {seLinuxOptions: {level: s0}}"), "seLinuxOptions"),
            (
                with("securityContext: {seccompProfile: {type: Localhost, localhostProfile: p}}"),
                "seccompProfile",
            ),
            (with("securityContext: {sysctls: [{name: kernel.msgmax, value: '1'}]}"), "SysctlForbidden"),
            (of_container("securityContext: {privileged: true}"), "securityContext.privileged"),
            (of_container("ports: [{containerPort: 1, hostPort: 1}]"), "hostPort"),
            (of_container("volumeDevices: [{name: d, devicePath: /d}]"), "volumeDevices"),
            (
                of_container("volumeMounts: [{name: v, mountPath: /v, mountPropagation: Bidirectional}]"),
                "mountPropagation",
            ),
        ];
        for (spec, needle) in table {
            let refused = check_text(&spec).unwrap_or_default();
            assert!(refused.contains(needle), "{spec} gave {refused:?}");
        }
    }
}
