//! What was asked for: the immutable input of a sandbox and of a container.
//!
//! Made by `cri` from requests, kept by the service, written to `state.json` by `recover` as it is: these types are input,
//! not state, so they carry serde derives here instead of having a twin in `recover`. Invariant: never changed after
//! creation, except limits by UpdateContainerResources.

use atoll_spec::guest::{Limits, SystemCalls};
use atoll_spec::units::MiB;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Labels or annotations.
pub type Map = BTreeMap<String, String>;

/// Who a sandbox is, to the one who asked for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SandboxName {
    /// Name of the pod.
    pub name: String,
    /// Uid of the pod.
    pub uid: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Counts the sandboxes of this pod.
    pub attempt: u32,
}

/// DNS settings of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl Dns {
    /// As a `resolv.conf`; `None` when nothing was asked for.
    pub fn resolv_conf(&self) -> Option<String> {
        if self.servers.is_empty() && self.searches.is_empty() && self.options.is_empty() {
            return None;
        }
        let mut text = String::new();
        if !self.searches.is_empty() {
            text += &format!("search {}\n", self.searches.join(" "));
        }
        for server in &self.servers {
            text += &format!("nameserver {server}\n");
        }
        if !self.options.is_empty() {
            text += &format!("options {}\n", self.options.join(" "));
        }
        Some(text)
    }
}

/// A host directory that is a volume of the pod, kept in the guest (annotation `atoll.dev/scratch-volumes`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScratchVolume {
    /// The host directory that stands for it.
    pub path: String,
    /// `Memory`, or empty for the scratch disk.
    #[serde(default)]
    pub medium: String,
    /// Limit in bytes.
    #[serde(default, rename = "sizeLimitBytes")]
    pub size_limit_bytes: Option<u64>,
}

/// A sandbox to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// Its name.
    pub name: SandboxName,
    /// Host name of the guest; empty takes the pod's name.
    pub hostname: String,
    /// Where its containers' logs go; empty means nowhere.
    pub log_directory: String,
    /// DNS settings.
    pub dns: Dns,
    /// Labels.
    pub labels: Map,
    /// Annotations.
    pub annotations: Map,
    /// Sysctls.
    pub sysctls: Map,
    /// Runtime handler, answered as it came.
    pub handler: String,
    /// Containers see each other's processes.
    pub share_pids: bool,
    /// Guest memory.
    pub memory: MiB,
    /// Virtual processors.
    pub vcpus: u8,
    /// Volumes kept in the guest.
    pub scratch_volumes: Vec<ScratchVolume>,
    /// What its containers may write altogether, in bytes (annotation `atoll.dev/storage-limit-bytes`).
    #[serde(default)]
    pub storage_limit: Option<u64>,
}

impl SandboxSpec {
    /// Host name of the guest.
    pub fn guest_hostname(&self) -> &str {
        if self.hostname.is_empty() { &self.name.name } else { &self.hostname }
    }
}

/// What a mount shows, as asked for; `volumes` decides how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// Path in the container.
    pub container_path: String,
    /// Path on the host; empty for an image.
    pub host_path: String,
    /// Image to mount, by id or name; empty for a host path.
    pub image: String,
    /// Path inside the image.
    pub image_sub_path: String,
    /// Read-only.
    pub read_only: bool,
}

/// How a user was named.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserSpec {
    /// By number.
    pub uid: Option<u32>,
    /// Group; only with a user.
    pub gid: Option<u32>,
    /// By name.
    pub name: String,
    /// More groups.
    pub groups: Vec<u32>,
}

/// Resources as they came, to be answered in the status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Microseconds; 0 is unset, as in all of these.
    pub cpu_period: i64,
    /// Microseconds.
    pub cpu_quota: i64,
    /// Weight of cgroup v1.
    pub cpu_shares: i64,
    /// Bytes.
    pub memory_bytes: i64,
    /// OOM score adjustment.
    pub oom_score_adj: i64,
    /// Extra cgroup v2 settings, as they came.
    pub unified: Map,
}

impl Resources {
    /// Takes over what `new` sets.
    pub fn change(&mut self, new: Resources) {
        let set = |old: &mut i64, new: i64| {
            if new != 0 {
                *old = new;
            }
        };
        set(&mut self.cpu_period, new.cpu_period);
        set(&mut self.cpu_quota, new.cpu_quota);
        set(&mut self.cpu_shares, new.cpu_shares);
        set(&mut self.memory_bytes, new.memory_bytes);
        set(&mut self.oom_score_adj, new.oom_score_adj);
        self.unified.extend(new.unified);
    }

    /// As limits of the guest's cgroup.
    pub fn limits(&self) -> Limits {
        let positive = |value: i64| u64::try_from(value).ok().filter(|v| *v > 0);
        Limits {
            cpu_quota_us: positive(self.cpu_quota),
            cpu_period_us: positive(self.cpu_period),
            cpu_weight: positive(self.cpu_shares).map(weight),
            memory_bytes: positive(self.memory_bytes),
            pids: self.unified.get("pids.max").and_then(|v| v.parse().ok()),
        }
    }
}

/// `cpu.weight` (1 to 10000) for shares of cgroup v1 (2 to 262144), linear as the kubelet's documents have it.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// A container to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Its name in the pod.
    pub name: String,
    /// Counts the containers of this name.
    pub attempt: u32,
    /// The image, as it was named.
    pub image: String,
    /// The image as the user wrote it.
    pub user_image: String,
    /// Annotations of the image field.
    pub image_annotations: Map,
    /// Replaces the image's entry point.
    pub command: Vec<String>,
    /// Replaces the image's arguments.
    pub args: Vec<String>,
    /// Replaces the image's working directory.
    pub working_dir: String,
    /// Added to the image's environment.
    pub envs: Vec<(String, String)>,
    /// Mounts.
    pub mounts: Vec<MountSpec>,
    /// Labels.
    pub labels: Map,
    /// Annotations.
    pub annotations: Map,
    /// Relative to the sandbox's log directory.
    pub log_path: String,
    /// Keep stdin open.
    pub stdin: bool,
    /// Close stdin after the first attach.
    pub stdin_once: bool,
    /// With a terminal.
    pub tty: bool,
    /// Resources.
    pub resources: Resources,
    /// User.
    pub user: UserSpec,
    /// Capabilities beside the default ones.
    pub add_capabilities: Vec<String>,
    /// Capabilities not to have.
    pub drop_capabilities: Vec<String>,
    /// Set no_new_privs.
    pub no_new_privileges: bool,
    /// Which system calls it may make.
    #[serde(default)]
    pub system_calls: SystemCalls,
    /// No writable layer.
    pub read_only_root: bool,
    /// Paths to hide.
    pub masked_paths: Vec<String>,
    /// Paths to make read-only.
    pub read_only_paths: Vec<String>,
    /// Signal of StopContainer; 0 takes the image's, else SIGTERM.
    pub stop_signal: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_what_was_asked_for() {
        assert_eq!(Dns::default().resolv_conf(), None);
        let dns = Dns {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["a.b".into(), "b".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(dns.resolv_conf().unwrap(), "search a.b b\nnameserver 10.0.0.10\noptions ndots:5\n");
    }

    #[test]
    fn limits_leave_out_what_is_unset_or_unlimited() {
        let resources =
            Resources { cpu_quota: -1, cpu_shares: 1024, memory_bytes: 7, ..Resources::default() };
        let limits = resources.limits();
        assert_eq!((limits.cpu_quota_us, limits.cpu_period_us, limits.memory_bytes), (None, None, Some(7)));
        assert_eq!(limits.cpu_weight, Some(39));
        assert_eq!((weight(2), weight(262_144), weight(0)), (1, 10_000, 1));
    }
}
