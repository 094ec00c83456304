//! What hostd tells the agent and the runtime about the host, and what the agent reports back.
//!
//! Each type is one JSON file under `/run/atoll`, replaced atomically by its writer and read (and watched) by its
//! reader.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// `/run/atoll/agent/config.json`: hostd → agent. Holds the join token, so mode 0400.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// Node name; a DNS-1123 subdomain.
    pub node_name: String,
    /// Addresses of the host, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// How to join; `None` when the machine config has no `join` section.
    pub join: Option<JoinConfig>,
    /// Labels to register with.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Taints to register with, as `key=value:Effect`.
    #[serde(default)]
    pub taints: Vec<String>,
    /// Most pods on this node.
    pub max_pods: u32,
    /// Whether the clock was set from a time server since boot.
    pub clock_synchronised: bool,
    /// The host's machine id, 32 hexadecimal digits.
    pub machine_id: String,
    /// Version of the running image.
    pub os_image: String,
}

impl std::fmt::Debug for AgentConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentConfig")
            .field("node_name", &self.node_name)
            .field("addresses", &self.addresses)
            .field("join", &self.join.as_ref().map(|j| &j.server))
            .finish_non_exhaustive()
    }
}

/// How to join a Supervisor: kubeadm's token flow.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinConfig {
    /// `https://host:port` of the API server.
    pub server: String,
    /// Bootstrap token, `[a-z0-9]{6}.[a-z0-9]{16}`.
    pub token: String,
    /// Pins of the cluster's CA: `sha256:<hex of the SHA-256 of its SPKI>`. At least one.
    pub ca_pins: Vec<String>,
}

/// `/run/atoll/runtime/registries.json`: hostd → runtime. May hold passwords, so mode 0400.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistriesConfig {
    /// Settings by registry host (`host` or `host:port`).
    pub registries: BTreeMap<String, RegistryConfig>,
}

/// Settings of one registry.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryConfig {
    /// Speak plain HTTP. Only for registries on a trusted network.
    #[serde(default)]
    pub plain_http: bool,
    /// PEM certificates to trust instead of the system's.
    #[serde(default)]
    pub ca_pem: Option<String>,
    /// User name for basic or token authentication.
    #[serde(default)]
    pub username: Option<String>,
    /// Its password.
    #[serde(default)]
    pub password: Option<String>,
}

/// `/run/atoll/agent/status.json`: agent → hostd, shown on the console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentStatus {
    /// Where the agent is on its way into the cluster.
    pub join: JoinState,
    /// Whether the API server has the node as Ready.
    pub node_ready: bool,
    /// Pods running now.
    pub pods_running: u32,
    /// Last error in one line, with what to do; `None` when all is well.
    pub last_error: Option<String>,
}

/// Steps of joining.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JoinState {
    /// No `join` section and no stored identity.
    NotConfigured,
    /// Verifying the control plane and asking for a certificate.
    Joining,
    /// Has a client certificate.
    Joined,
    /// Refused, see `last_error`; tried again with back-off.
    Failed,
}
