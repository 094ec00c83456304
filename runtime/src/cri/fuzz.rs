//! Fuzz target of CRI requests: any message, up to what the service is asked to do.
//!
//! Called by the tests below (the corpus and a second of mutations) and by `fuzz/targets` (hours). The property: what is
//! taken can be written to `state.json` and read again, so that no request is lost, or another, after a restart.

use super::container::{container_spec, resources};
use super::image::auth;
use super::sandbox::{Defaults, sandbox_spec};
use crate::images::ImageRef;
use crate::spec::{ContainerSpec, SandboxSpec};
use atoll_cri::v1::{
    AuthConfig, ContainerConfig, CreateContainerRequest, LinuxContainerResources, PodSandboxConfig,
    PullImageRequest,
};
use atoll_spec::units::MiB;
use prost::Message as _;

const DEFAULTS: Defaults = Defaults { memory: MiB(512), overhead: MiB(128), host_cpus: 4 };

fn sandbox(config: PodSandboxConfig) {
    let Ok(spec) = sandbox_spec(config, "", &DEFAULTS) else { return };
    assert!((128..=1 << 20).contains(&spec.memory.0) && (1..=4).contains(&spec.vcpus), "{spec:?}");
    let text = serde_json::to_vec(&spec).expect("a spec can be written");
    assert_eq!(serde_json::from_slice::<SandboxSpec>(&text).expect("and read"), spec);
}

fn container(config: ContainerConfig) {
    let Ok(spec) = container_spec(config) else { return };
    let text = serde_json::to_vec(&spec).expect("a spec can be written");
    assert_eq!(serde_json::from_slice::<ContainerSpec>(&text).expect("and read"), spec);
}

/// The first byte names the message.
pub fn requests(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 5 {
        0 => drop(PodSandboxConfig::decode(data).map(sandbox)),
        1 => drop(ContainerConfig::decode(data).map(container)),
        2 => {
            if let Ok(request) = CreateContainerRequest::decode(data) {
                request.config.into_iter().for_each(container);
                request.sandbox_config.into_iter().for_each(sandbox);
            }
        }
        3 => {
            if let Ok(request) = PullImageRequest::decode(data) {
                drop(request.auth.map(|config: AuthConfig| auth(config)));
                drop(request.image.map(|image| image.image.parse::<ImageRef>()));
                request.sandbox_config.into_iter().for_each(sandbox);
            }
        }
        _ => {
            if let Ok(linux) = LinuxContainerResources::decode(data) {
                // Any numbers become limits.
                let _ = resources(linux).limits();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_cri::v1::*;
    use atoll_fuzz::replay;

    fn seeds() -> Vec<Vec<u8>> {
        let metadata =
            PodSandboxMetadata { name: "p".into(), uid: "u".into(), namespace: "n".into(), attempt: 1 };
        let resources = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 150_000,
            cpu_shares: 1024,
            memory_limit_in_bytes: 256 << 20,
            unified: [("pids.max".to_owned(), "10".to_owned())].into(),
            ..Default::default()
        };
        let pod = PodSandboxConfig {
            metadata: Some(metadata),
            hostname: "p".into(),
            log_directory: "/log/p".into(),
            annotations: [(
                "atoll.dev/scratch-volumes".to_owned(),
                r#"[{"path":"/v","medium":"Memory"}]"#.to_owned(),
            )]
            .into(),
            dns_config: Some(DnsConfig { servers: vec!["10.0.0.1".into()], ..Default::default() }),
            linux: Some(LinuxPodSandboxConfig {
                sysctls: [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into(),
                resources: Some(resources.clone()),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption { pid: 1, ..Default::default() }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let container = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(ImageSpec { image: "busybox".into(), ..Default::default() }),
            command: vec!["sh".into()],
            envs: vec![KeyValue { key: "A".into(), value: b"\xff1".to_vec() }],
            mounts: vec![Mount {
                container_path: "/m".into(),
                host_path: "/h".into(),
                readonly: true,
                ..Default::default()
            }],
            log_path: "c/0.log".into(),
            linux: Some(LinuxContainerConfig {
                resources: Some(resources.clone()),
                security_context: Some(LinuxContainerSecurityContext {
                    run_as_user: Some(Int64Value { value: 1000 }),
                    supplemental_groups: vec![5, -1],
                    capabilities: Some(Capability {
                        add_capabilities: vec!["NET_ADMIN".into()],
                        ..Default::default()
                    }),
                    masked_paths: vec!["/proc/kcore".into()],
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        let create = CreateContainerRequest {
            pod_sandbox_id: "ab".into(),
            config: Some(container.clone()),
            sandbox_config: Some(pod.clone()),
        };
        let pull = PullImageRequest {
            image: Some(ImageSpec { image: "r.example/a:1".into(), ..Default::default() }),
            auth: Some(AuthConfig { auth: "dTpw".into(), ..Default::default() }),
            sandbox_config: None,
        };
        let with = |kind: u8, bytes: Vec<u8>| [vec![kind], bytes].concat();
        vec![
            with(0, pod.encode_to_vec()),
            with(1, container.encode_to_vec()),
            with(2, create.encode_to_vec()),
            with(3, pull.encode_to_vec()),
            with(4, resources.encode_to_vec()),
        ]
    }

    #[test]
    fn requests_are_taken_or_refused() {
        replay("cri_requests", seeds(), requests);
    }
}
