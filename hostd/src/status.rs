//! The truth about the host at this moment, as the app knows it: what the console, the metrics and init are told. ◇

use crate::clock::Clock;
use atoll_spec::control::ServiceStatus;
use atoll_spec::node::AgentStatus;
use std::net::IpAddr;

/// Everything there is to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The system's name and version.
    pub system: String,
    /// The node's name; empty until it is decided.
    pub node: String,
    /// Whether hostd has told init that the host can be used.
    pub ready: bool,
    /// Links that a rule selects.
    pub links: Vec<LinkStatus>,
    /// Gateways of the default routes.
    pub gateways: Vec<IpAddr>,
    /// Name servers in use.
    pub dns: Vec<IpAddr>,
    /// The clock.
    pub clock: Clock,
    /// Where the machine config came from.
    pub config: String,
    /// Where data is kept.
    pub storage: String,
    /// Whether it outlives a reboot.
    pub persistent: bool,
    /// Services, as init reports them; empty while it does not.
    pub services: Vec<ServiceStatus>,
    /// The API server in the config.
    pub join_server: Option<String>,
    /// What the agent reports; `None` until it does.
    pub agent: Option<AgentStatus>,
    /// Why the machine booted.
    pub boot_reason: String,
    /// What is wrong with the config, the storage, the network: one line each, with what to do.
    pub problems: Vec<Problem>,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where it came up; a newer problem of the same area replaces it.
    pub area: Area,
    /// What it is and what to do.
    pub text: String,
}

/// Where a problem came up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Area {
    /// Disks and file systems.
    Storage,
    /// The machine config.
    Config,
    /// Links, addresses, routes.
    Network,
    /// Room on DATA.
    Space,
    /// Name servers.
    Names,
    /// The clock.
    Clock,
    /// The files for other processes.
    Files,
}

/// One link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkStatus {
    /// Its name.
    pub name: String,
    /// Whether it has a peer.
    pub carrier: bool,
    /// Whether it asks by DHCP.
    pub dhcp: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl Status {
    /// Before anything is known.
    pub fn new(system: String) -> Self {
        Self {
            system,
            node: String::new(),
            ready: false,
            links: Vec::new(),
            gateways: Vec::new(),
            dns: Vec::new(),
            clock: Clock::Asking,
            config: String::new(),
            storage: String::new(),
            persistent: false,
            services: Vec::new(),
            join_server: None,
            agent: None,
            boot_reason: String::new(),
            problems: Vec::new(),
        }
    }

    /// Puts the problems of one area in place of its former ones.
    pub fn set_problems(&mut self, area: Area, texts: impl IntoIterator<Item = String>) {
        self.problems.retain(|p| p.area != area);
        self.problems.extend(texts.into_iter().map(|text| Problem { area, text }));
        self.problems.sort_by_key(|p| p.area);
    }

    /// One line for init.
    pub fn summary(&self) -> String {
        let addresses: usize = self.links.iter().map(|l| l.addresses.len()).sum();
        let clock = match self.clock {
            Clock::Synchronised { .. } => "clock synchronised",
            Clock::NoServer | Clock::Asking | Clock::Unreachable(_) => "clock not synchronised",
        };
        let count =
            |n: usize, one: &str, many: &str| if n == 1 { format!("1 {one}") } else { format!("{n} {many}") };
        let mut text = format!("{}, {clock}", count(addresses, "address", "addresses"));
        if !self.problems.is_empty() {
            text += &format!(", {}", count(self.problems.len(), "problem", "problems"));
        }
        text
    }
}
