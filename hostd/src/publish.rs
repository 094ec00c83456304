//! What hostd tells the agent, the runtime and the resolver: made from config, leases and clock (pure), then written.
//!
//! The resolver is told at once, because time servers and the config's URL may be names. Agent and runtime start when
//! hostd is ready and are told then.

use crate::clock;
use crate::error::Result;
use crate::files::{self, Durability};
use atoll_spec::machine::domain::Machine;
use atoll_spec::node::{AgentConfig, JoinConfig, RegistriesConfig, RegistryConfig};
use atoll_spec::places::AGENT_UID;
use std::net::IpAddr;
use std::path::Path;

/// Everything that other processes are told.
#[derive(Clone, PartialEq, Eq)]
pub struct Publication {
    /// For the agent.
    pub agent: AgentConfig,
    /// For the runtime.
    pub registries: RegistriesConfig,
}

/// What is known of the host, beyond the config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The node's name.
    pub node: String,
    /// The host's addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// Whether the clock was set from a server.
    pub clock_synchronised: bool,
    /// 32 hexadecimal digits.
    pub machine_id: String,
    /// The system's name and version.
    pub system: String,
}

impl Publication {
    /// Puts config and facts together.
    pub fn new(machine: &Machine, facts: Facts) -> Self {
        let agent = AgentConfig {
            node_name: facts.node,
            addresses: facts.addresses,
            join: machine.join.as_ref().map(|join| JoinConfig {
                server: join.server.clone(),
                token: join.token.clone(),
                ca_pins: join.ca_pins.clone(),
            }),
            labels: machine.labels.clone(),
            taints: machine.taints.clone(),
            max_pods: machine.max_pods,
            clock_synchronised: facts.clock_synchronised,
            machine_id: facts.machine_id,
            os_image: facts.system,
        };
        let registries = machine.registries.iter().map(|(host, registry)| {
            let (username, password) = registry.login.clone().unzip();
            let config = RegistryConfig {
                plain_http: registry.plain_http,
                ca_pem: registry.ca_pem.clone(),
                username,
                password,
            };
            (host.clone(), config)
        });
        Self { agent, registries: RegistriesConfig { registries: registries.collect() } }
    }

    /// Writes what changed. The agent's file holds a token and the runtime's may hold passwords: owners only.
    pub fn write(&self, run: &Path) -> Result<()> {
        let as_io = |error: serde_json::Error| crate::error::Error::Io {
            operation: "encode",
            object: "a config file".into(),
            source: error.into(),
        };
        let agent = serde_json::to_vec_pretty(&self.agent).map_err(as_io)?;
        let registries = serde_json::to_vec_pretty(&self.registries).map_err(as_io)?;
        let volatile = Durability::Volatile;
        let hostname = format!("{}\n", self.agent.node_name);
        files::keep(&run.join("net/hostname"), hostname.as_bytes(), 0o644, None, volatile)?;
        files::keep(&run.join("runtime/registries.json"), &registries, 0o400, None, volatile)?;
        files::keep(&run.join("agent/config.json"), &agent, 0o400, Some(AGENT_UID), volatile)?;
        Ok(())
    }
}

/// The config's name servers before the leases', each once, three at most.
pub fn name_servers(machine: &Machine, leased: &[IpAddr]) -> Vec<IpAddr> {
    distinct(machine.dns_servers.iter().chain(leased), 3)
}

/// The config's time servers and, of those of the leases, the others.
pub fn time_servers(machine: &Machine, leased: &[String]) -> clock::Servers {
    let configured = distinct(machine.time_servers.iter(), 8);
    let others = leased.iter().filter(|server| !configured.contains(server));
    clock::Servers { leased: distinct(others, 8), configured }
}

fn distinct<'a, T: Clone + PartialEq + 'a>(items: impl Iterator<Item = &'a T>, most: usize) -> Vec<T> {
    let mut out: Vec<T> = Vec::new();
    for item in items {
        if out.len() < most && !out.contains(item) {
            out.push(item.clone());
        }
    }
    out
}

/// The resolver's file: servers and domains of the config before those of the leases.
pub fn resolv_conf(machine: &Machine, leased_dns: &[IpAddr], leased_domains: &[String]) -> String {
    let mut text = String::new();
    let search = distinct(machine.dns_search.iter().chain(leased_domains), 6);
    if !search.is_empty() {
        text += &format!("search {}\n", search.join(" "));
    }
    for server in name_servers(machine, leased_dns) {
        text += &format!("nameserver {server}\n");
    }
    text + "options timeout:2 attempts:2\n"
}

/// Name servers and domains of the resolver's file, as an earlier run of hostd left it; none without one.
pub fn read_resolv_conf(run: &Path) -> (Vec<IpAddr>, Vec<String>) {
    let text = files::read(&run.join("net/resolv.conf"), 64 * 1024).ok().flatten().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let values = |key: &str| {
        let lines = text.lines().filter_map(|line| line.split_once(' ')).filter(|(word, _)| *word == key);
        lines.flat_map(|(_, rest)| rest.split(' ')).map(str::to_owned).collect::<Vec<_>>()
    };
    let servers = values("nameserver").iter().filter_map(|server| server.parse().ok()).collect();
    (servers, values("search"))
}

/// Writes the resolver's file when it changed.
pub fn write_resolv_conf(run: &Path, text: &str) -> Result<()> {
    files::keep(&run.join("net/resolv.conf"), text.as_bytes(), 0o644, None, Durability::Volatile).map(drop)
}

/// The node's name: the config's, else the one used before, else DHCP's, else one made from the machine id.
pub fn node_name(machine: &Machine, before: Option<&str>, leased: Option<&str>, machine_id: &str) -> String {
    // The kernel takes 64 characters; a longer name from DHCP is cut to its first label.
    let fitting = |name: &&str| !name.is_empty() && name.len() <= 63;
    let leased =
        leased.map(|name| if fitting(&name) { name } else { name.split('.').next().unwrap_or_default() });
    let known = machine.hostname.as_deref().or(before.filter(fitting)).or(leased.filter(fitting));
    let id: String = machine_id.chars().filter(char::is_ascii_hexdigit).take(8).collect();
    let made = if id.is_empty() { "atoll".to_owned() } else { format!("atoll-{}", id.to_ascii_lowercase()) };
    known.map_or(made, str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            node: "node-1".into(),
            addresses: vec!["10.0.0.7".parse().unwrap()],
            clock_synchronised: true,
            machine_id: "0".repeat(32),
            system: "Atoll 0.1.0".into(),
        }
    }

    #[test]
    fn the_resolver_asks_the_config_first() {
        let machine = Machine {
            dns_servers: vec!["192.0.2.53".parse().unwrap(), "10.0.0.1".parse().unwrap()],
            dns_search: vec!["example.org".into()],
            ..Machine::default()
        };
        let leased = ["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()];
        let found = resolv_conf(&machine, &leased, &["lab.example".into()]);
        assert_eq!(
            found,
            "search example.org lab.example\nnameserver 192.0.2.53\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions \
             timeout:2 attempts:2\n"
        );
    }

    #[test]
    fn the_resolvers_file_is_read_back_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read_resolv_conf(directory.path()), (vec![], vec![]));
        std::fs::create_dir(directory.path().join("net")).unwrap();
        let machine = Machine { dns_servers: vec!["192.0.2.53".parse().unwrap()], ..Machine::default() };
        let (dns, domains) = (["10.0.0.1".parse().unwrap()], ["lab.example".into(), "example.org".into()]);
        let text = resolv_conf(&machine, &dns, &domains);
        write_resolv_conf(directory.path(), &text).unwrap();
        let (servers, search) = read_resolv_conf(directory.path());
        assert_eq!((servers.len(), search.as_slice()), (2, &domains[..]));
        assert_eq!(resolv_conf(&machine, &servers, &search), text);
    }

    #[test]
    fn the_configs_time_servers_are_a_group_of_their_own() {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let machine =
            Machine { time_servers: owned(&["time.example.org", "10.0.0.1"]), ..Machine::default() };
        let found = time_servers(&machine, &owned(&["10.0.0.1", "10.0.0.2", "10.0.0.2"]));
        assert_eq!(found.configured, machine.time_servers);
        assert_eq!(found.leased, ["10.0.0.2"]);
        assert!(time_servers(&Machine::default(), &[]).is_empty());
    }

    #[test]
    fn the_node_keeps_its_name() {
        let mut machine = Machine::default();
        assert_eq!(node_name(&machine, None, None, "ABCDEF0123456789"), "atoll-abcdef01");
        assert_eq!(node_name(&machine, None, Some("from-dhcp"), "a"), "from-dhcp");
        assert_eq!(node_name(&machine, Some("before"), Some("from-dhcp"), "a"), "before");
        machine.hostname = Some("config".into());
        assert_eq!(node_name(&machine, Some("before"), None, "a"), "config");
        let long = format!("a.{}", "b".repeat(63));
        assert_eq!(node_name(&Machine::default(), None, Some(&long), "a"), "a");
    }

    #[test]
    fn files_are_for_their_readers_only() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        for name in ["net", "agent", "runtime"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        Publication::new(&Machine::default(), facts()).write(directory.path()).unwrap();
        for name in ["agent/config.json", "runtime/registries.json"] {
            let mode = std::fs::metadata(directory.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o400, "{name}");
        }
        let agent = std::fs::read(directory.path().join("agent/config.json")).unwrap();
        assert_eq!(serde_json::from_slice::<AgentConfig>(&agent).unwrap().max_pods, 110);
    }
}
