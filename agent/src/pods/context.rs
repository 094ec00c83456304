//! What every pod's worker shares: clients, directories, and the facts of the node.

use super::desired::Desired;
use super::dns::ClusterDns;
use super::env::Facts;
use super::images::Images;
use super::sandbox_config::Directories;
use super::statuses::Statuses;
use crate::app::Shared;
use crate::cri::Cri;
use crate::events::Recorder;
use crate::volumes::Volumes;

/// Port of an API server whose address names none.
const HTTPS: u16 = 443;

/// Shared by all workers.
pub struct Context {
    /// Shared by the whole agent.
    pub shared: Shared,
    /// The runtime.
    pub cri: Cri,
    /// Events.
    pub events: Recorder,
    /// Volumes.
    pub volumes: Volumes,
    /// Images.
    pub images: Images,
    /// The only writer of statuses.
    pub statuses: Statuses,
    /// Directories of the node.
    pub dirs: Directories,
    /// Name of the runtime, the scheme of container ids.
    pub runtime: String,
}

impl Context {
    /// What the downward API may tell a pod with these addresses.
    pub fn facts(&self, desired: &Desired, pod_ips: &[String]) -> Facts {
        let config = self.shared.config.borrow().clone();
        let capacity = &self.shared.capacity;
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Facts {
            node_name: desired.spec().node_name.clone().unwrap_or_else(|| config.node_name.clone()),
            host_ips: self.host_ips(),
            pod_ips: pod_ips.to_vec(),
            node_cpu_millis: number(capacity.allocatable_cpu_millis()),
            node_memory: number(capacity.allocatable_memory_bytes()),
            node_storage: number(capacity.allocatable_storage_bytes()),
            api_server: config.join.as_ref().and_then(|join| host_and_port(&join.server)),
        }
    }

    /// Addresses of the node.
    pub fn host_ips(&self) -> Vec<String> {
        self.shared.config.borrow().addresses.iter().map(ToString::to_string).collect()
    }

    /// Where pods resolve names.
    pub fn cluster_dns(&self) -> ClusterDns {
        let options = &self.shared.options;
        ClusterDns {
            // Read every time: hostd replaces it when a lease changes.
            node: std::fs::read_to_string(&options.resolv_conf).unwrap_or_default(),
            server: options.cluster_dns.map(|ip| ip.to_string()),
            domain: options.cluster_domain.clone(),
        }
    }

    /// The runtime handler: every pod is a microVM, so there is one, and it has no name.
    pub fn handler(&self, _desired: &Desired) -> String {
        String::new()
    }
}

fn host_and_port(server: &str) -> Option<(String, u16)> {
    let uri: http::Uri = server.parse().ok()?;
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']').to_owned();
    Some((host, uri.port_u16().unwrap_or(HTTPS)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_server_is_taken_apart() {
        assert_eq!(host_and_port("https://10.0.2.2:6443"), Some(("10.0.2.2".into(), 6443)));
        assert_eq!(host_and_port("https://[fd00::1]:6443/x"), Some(("fd00::1".into(), 6443)));
        assert_eq!(host_and_port("https://api.example"), Some(("api.example".into(), 443)));
    }
}
