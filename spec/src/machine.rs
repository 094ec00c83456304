//! Machine config v1: the one file that turns a machine into a node.
//!
//! People write it as YAML (`machine.yaml`), hostd and atollctl read it. This file holds the *wire* types: what may
//! be written, documented for the one who writes it (the doc comments are what `atollctl config explain` prints).
//! [`domain`] holds what hostd works with, checked; `document` (feature `config`) reads YAML and finds every error.
//!
//! Compatibility: within `atoll.dev/v1` a field is only ever added, with a default that keeps old files meaning what
//! they meant.

#[cfg(feature = "config")]
pub mod document;
pub mod domain;
pub mod problem;
#[cfg(feature = "config")]
pub mod shape;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The only `apiVersion` there is.
pub const API_VERSION: &str = "atoll.dev/v1";
/// The only `kind` there is.
pub const KIND: &str = "Machine";

/// The configuration of one Atoll host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct MachineFile {
    /// Version of this format. Always `atoll.dev/v1`.
    pub api_version: String,
    /// Always `Machine`.
    pub kind: String,
    /// Host name, and the name of the node in the cluster. When it is left out, the name that DHCP gives is used,
    /// and without one a name made from the machine id. Whichever it was is kept across reboots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Network links, and how names are resolved. Without it every Ethernet link asks for an address by DHCP.
    #[serde(default)]
    pub network: NetworkSection,
    /// Where the time comes from.
    #[serde(default)]
    pub time: TimeSection,
    /// How to join a cluster. Without it the host starts, and waits for a config that has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join: Option<JoinSection>,
    /// What the node says about itself when it registers.
    #[serde(default)]
    pub node: NodeSection,
    /// Image registries that need something special, by `host` or `host:port` as it stands in image names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub registries: BTreeMap<String, RegistrySection>,
}

/// Network links, and how names are resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NetworkSection {
    /// Rules for links; the first rule that matches a link decides. A link that no rule matches is left alone. When
    /// the list is empty, every Ethernet link uses DHCP.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<LinkSection>,
    /// Name servers and search domains; they go before what DHCP gives.
    #[serde(default)]
    pub dns: DnsSection,
}

/// What to do with the links that `match` selects.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct LinkSection {
    /// Which links this rule is for. Everything that is given must match.
    #[serde(rename = "match")]
    pub matches: MatchSection,
    /// Ask for an IPv4 address by DHCP. Left out, it means `true` when the rule has no `addresses`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dhcp4: Option<bool>,
    /// Static addresses with prefix length, such as `192.0.2.10/24` or `2001:db8::10/64`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// Largest packet in bytes, 576 to 9216. Left out, DHCP's answer or the kernel's default holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Static routes through this link.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<RouteSection>,
}

/// Which links a rule is for. Everything that is given must match; at least one of the three is needed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct MatchSection {
    /// Name of the link, such as `eth0`; `*` stands for any characters (`en*`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Hardware address, such as `52:54:00:12:34:56`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Kernel driver of the card, such as `virtio_net`, `ixgbe` or `mlx5_core`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
}

/// One static route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RouteSection {
    /// Destination network, such as `10.0.0.0/8`, or `default`.
    pub to: String,
    /// Gateway: an address on the same link.
    pub via: String,
}

/// Name servers and search domains.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct DnsSection {
    /// Addresses of name servers, at most three.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<String>,
    /// Domains to try for names without a dot, at most six.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
}

/// Where the time comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TimeSection {
    /// NTP servers by name or address, asked before those that DHCP names. With none from either, the clock of the
    /// machine is trusted, and the console says so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<String>,
}

/// How to join a cluster: kubeadm's token flow. `atoll-supervisor token create` prints this section.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct JoinSection {
    /// The API server, such as `https://10.0.0.1:6443`.
    pub server: String,
    /// Bootstrap token, such as `abcdef.0123456789abcdef`.
    pub token: String,
    /// Pins of the cluster's CA, such as `sha256:` and 64 hexadecimal digits. At least one: the token is never sent
    /// to a server that no pin vouches for.
    pub ca_pins: Vec<String>,
}

impl std::fmt::Debug for JoinSection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinSection").field("server", &self.server).finish_non_exhaustive()
    }
}

/// What the node says about itself when it registers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NodeSection {
    /// Labels of the node object.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Taints of the node object, as `key=value:Effect` or `key:Effect`; the effects are `NoSchedule`,
    /// `PreferNoSchedule` and `NoExecute`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taints: Vec<String>,
    /// Most pods on this node, 1 to 1000. Left out, 110.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pods: Option<u32>,
}

/// What is special about one image registry.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RegistrySection {
    /// Speak plain HTTP. Only for a registry on a network that is trusted.
    #[serde(default)]
    pub plain_http: bool,
    /// PEM certificates to trust for this registry instead of the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_pem: Option<String>,
    /// User name, together with `password`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// Password, together with `username`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

impl std::fmt::Debug for RegistrySection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistrySection")
            .field("plain_http", &self.plain_http)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}
