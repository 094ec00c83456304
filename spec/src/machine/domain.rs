//! The machine config as hostd works with it: everything parsed, defaults filled in, nothing half-right.
//!
//! The only way in is `TryFrom<MachineFile>`, which reports every problem. Not `Serialize`: these types change freely.

mod check;

use super::problem::{Findings, Problems};
use super::{API_VERSION, KIND, MachineFile};
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// How many pods a node takes when the config does not say.
pub const DEFAULT_MAX_PODS: u32 = 110;

/// A checked machine config. The default is what a machine without any config does: DHCP on every Ethernet link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Host and node name, when the config decides it.
    pub hostname: Option<String>,
    /// Rules for links, first match wins; empty means DHCP on every Ethernet link.
    pub links: Vec<LinkRule>,
    /// Name servers before DHCP's.
    pub dns_servers: Vec<IpAddr>,
    /// Search domains before DHCP's.
    pub dns_search: Vec<String>,
    /// NTP servers before DHCP's.
    pub time_servers: Vec<String>,
    /// How to join.
    pub join: Option<Join>,
    /// Node labels.
    pub labels: BTreeMap<String, String>,
    /// Node taints, as `key=value:Effect` or `key:Effect`.
    pub taints: Vec<String>,
    /// Most pods.
    pub max_pods: u32,
    /// Registries by `host` or `host:port`.
    pub registries: BTreeMap<String, Registry>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            hostname: None,
            links: Vec::new(),
            dns_servers: Vec::new(),
            dns_search: Vec::new(),
            time_servers: Vec::new(),
            join: None,
            labels: BTreeMap::new(),
            taints: Vec::new(),
            max_pods: DEFAULT_MAX_PODS,
            registries: BTreeMap::new(),
        }
    }
}

/// One rule for links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkRule {
    /// Which links.
    pub matches: LinkMatch,
    /// Whether to ask for an IPv4 address by DHCP.
    pub dhcp4: bool,
    /// Static addresses.
    pub addresses: Vec<IpNet>,
    /// MTU, when the config decides it.
    pub mtu: Option<u32>,
    /// Static routes.
    pub routes: Vec<Route>,
}

/// Which links a rule is for: all that is given must match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkMatch {
    /// Name, with `*` for any characters.
    pub name: Option<String>,
    /// Hardware address.
    pub mac: Option<[u8; 6]>,
    /// Kernel driver.
    pub driver: Option<String>,
}

impl LinkMatch {
    /// Whether a link with these properties is meant.
    pub fn covers(&self, name: &str, mac: Option<[u8; 6]>, driver: Option<&str>) -> bool {
        self.name.as_deref().is_none_or(|pattern| glob(pattern.as_bytes(), name.as_bytes()))
            && self.mac.is_none_or(|wanted| mac == Some(wanted))
            && self.driver.as_deref().is_none_or(|wanted| driver == Some(wanted))
    }
}

/// `*` matches any run of bytes; everything else itself. Linear in time: only the last star is ever retried.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t, mut retry) = (0, 0, None);
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            retry = Some((p, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            p += 1;
            t += 1;
        } else if let Some((star, from)) = retry {
            retry = Some((star, from + 1));
            p = star + 1;
            t = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

/// One static route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination; prefix length 0 is the default route.
    pub to: IpNet,
    /// Gateway, of the same family.
    pub via: IpAddr,
}

/// How to join a cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct Join {
    /// `https://host:port`.
    pub server: String,
    /// Bootstrap token.
    pub token: String,
    /// `sha256:<hex>`, one at least.
    pub ca_pins: Vec<String>,
}

impl std::fmt::Debug for Join {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Join").field("server", &self.server).finish_non_exhaustive()
    }
}

/// What is special about a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Registry {
    /// Plain HTTP instead of TLS.
    pub plain_http: bool,
    /// PEM certificates to trust instead of the system's.
    pub ca_pem: Option<String>,
    /// User name and password.
    pub login: Option<(String, String)>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("plain_http", &self.plain_http).finish_non_exhaustive()
    }
}

impl TryFrom<MachineFile> for Machine {
    type Error = Problems;

    fn try_from(file: MachineFile) -> Result<Self, Problems> {
        let mut found = Findings::default();
        if file.api_version != API_VERSION {
            found.add(
                "apiVersion",
                format!("must be '{API_VERSION}', not '{}'", check::shown(&file.api_version)),
            );
        }
        if file.kind != KIND {
            found.add("kind", format!("must be '{KIND}', not '{}'", check::shown(&file.kind)));
        }
        let hostname = file.hostname.and_then(|name| found.keep("hostname", check::hostname(name)));
        let machine = Self {
            hostname,
            links: check::links(file.network.links, &mut found),
            dns_servers: check::dns_servers(file.network.dns.servers, &mut found),
            dns_search: check::dns_search(file.network.dns.search, &mut found),
            time_servers: check::time_servers(file.time.servers, &mut found),
            join: file.join.map(|join| check::join(join, &mut found)),
            labels: check::labels(file.node.labels, &mut found),
            taints: check::taints(file.node.taints, &mut found),
            max_pods: check::max_pods(file.node.max_pods, &mut found),
            registries: check::registries(file.registries, &mut found),
        };
        found.or(machine)
    }
}
