//! The state of the host and the one place where it changes: [`Host::handle`] takes events in, [`Host::refresh`]
//! brings links, files and status to what is known.

use crate::clock::{self, Clock};
use crate::config::{self, Loaded, Origin};
use crate::dhcp::client::Change;
use crate::error::{Context, Result, chain};
use crate::files::{self, Durability};
use crate::links::{Leased, Links, View};
use crate::notify::Notifier;
use crate::options::Options;
use crate::plan::Step;
use crate::plan::network::{awaits_lease, host_addresses, link_addresses};
use crate::publish::{self, Facts, Publication};
use crate::routers::Names;
use crate::status::{Area, LinkStatus, Status};
use crate::{boot_reason, console, crash_log, metrics};
use atoll_spec::control::ServiceStatus;
use atoll_spec::machine::domain::Machine;
use atoll_spec::node::AgentStatus;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Looks at the host even when nothing happened.
const REGULARLY: Duration = Duration::from_secs(30);

/// Everything that happens.
pub enum Event {
    /// A link or an address changed.
    Wake,
    /// A lease came or went.
    Lease(Change),
    /// IPv6 routers said something else than before.
    Heard(Names),
    /// The clock was set, or could not be.
    Clock(Clock),
    /// Why no name server answers; `None` when one does.
    Names(Option<String>),
    /// The agent said something.
    Agent(Option<AgentStatus>),
    /// A service changed.
    Services(Vec<ServiceStatus>),
    /// The config at the URL was fetched, or could not be.
    Fetched(Result<Box<Loaded>, String>),
}

/// Where the lists of servers go that tasks of their own ask.
pub struct Asked {
    /// Time servers.
    pub time: watch::Sender<clock::Servers>,
    /// Name servers.
    pub names: watch::Sender<Vec<IpAddr>>,
}

/// The state.
pub struct Host {
    options: Options,
    machine: Machine,
    /// A URL decides the config and has given none yet.
    url_awaited: bool,
    /// Why not.
    url_failure: String,
    links: Links,
    view: View,
    machine_id: String,
    named_before: Option<String>,
    /// Name servers and domains that an earlier run of hostd left, until DHCP has spoken to this one.
    resolver_before: (Vec<IpAddr>, Vec<String>),
    asked: Asked,
    /// The last ones that were not none.
    addresses: Vec<IpAddr>,
    status: Status,
    deadline: Instant,
    announced: bool,
}

impl Host {
    /// Loads the config of this machine. The status has the storage in it already.
    pub fn new(options: Options, mut status: Status, links: Links, asked: Asked) -> Self {
        let sources = options.config_sources();
        status.boot_reason = boot_reason::read(&options.state);
        note_crash(&options, &mut status);
        let mut host = Self {
            deadline: Instant::now() + Duration::from_secs(options.network_deadline),
            machine_id: read_line(&options.run.join("machine-id")).unwrap_or_default(),
            named_before: read_line(&options.state.join("machine/node-name")),
            resolver_before: publish::read_resolv_conf(&options.run),
            machine: Machine::default(),
            url_awaited: config::url(&sources).is_some(),
            url_failure: String::new(),
            links,
            view: View::default(),
            asked,
            addresses: Vec::new(),
            status,
            announced: false,
            options,
        };
        let loaded = config::load_local(&sources);
        host.take_config(&loaded);
        host
    }

    /// Takes in what happened.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Wake => {}
            Event::Lease(change) => self.links.leased(change),
            Event::Heard(names) => self.links.heard(names),
            Event::Clock(clock) => {
                if clock != self.status.clock
                    && let Clock::Unreachable(why) = &clock
                {
                    tracing::warn!("the clock is not synchronised, the machine's own is used: {why}");
                }
                self.status.clock = clock;
            }
            Event::Names(dead) => {
                if dead.is_none() {
                    tracing::info!("DNS answers again");
                }
                self.status.set_problems(Area::Names, dead.map(|why| no_name_server(&why)));
            }
            Event::Agent(agent) => {
                self.status.agent = agent;
                self.announce();
            }
            Event::Services(services) => self.status.services = services,
            Event::Fetched(Ok(loaded)) => {
                self.url_awaited = false;
                self.take_or_complain(&loaded);
            }
            Event::Fetched(Err(reason)) => self.url_failure = reason,
        }
    }

    /// With no file from the URL and no last good one, what this machine has is the best there is.
    fn take_or_complain(&mut self, loaded: &Loaded) {
        if loaded.origin == Origin::None { self.complain(loaded) } else { self.take_config(loaded) }
    }

    /// The time to wait for the URL is over.
    fn give_up_url(&mut self) {
        self.url_awaited = false;
        let reason = std::mem::take(&mut self.url_failure);
        let loaded = config::without_url(&reason, &self.options.config_sources());
        self.take_or_complain(&loaded);
    }

    /// The line that says that the host does what it is for.
    fn announce(&mut self) {
        let ready = self.status.agent.as_ref().is_some_and(|a| a.node_ready);
        if ready && !self.announced {
            self.announced = true;
            console::say(&[format!("node {} joined and Ready", self.status.node)]);
        }
    }

    fn take_config(&mut self, loaded: &Loaded) {
        self.status.config = loaded.origin.to_string();
        self.status.join_server = loaded.machine.join.as_ref().map(|j| j.server.clone());
        self.machine = loaded.machine.clone();
        self.complain(loaded);
        let decides = !self.url_awaited || loaded.origin == Origin::Url;
        if decides && let Err(error) = loaded.remember(&self.options.config_sources()) {
            self.status.set_problems(Area::Files, [chain(&error)]);
        }
    }

    fn complain(&mut self, loaded: &Loaded) {
        for problem in &loaded.problems {
            tracing::error!("{problem}");
        }
        self.status.set_problems(Area::Config, loaded.problems.clone());
    }

    /// When to look again although nothing happened.
    pub fn next_look(&self) -> Instant {
        let regularly = Instant::now() + REGULARLY;
        if self.status.ready { regularly } else { regularly.min(self.deadline) }
    }

    /// Ends what hostd runs. What it set up stays.
    pub fn stop(&mut self) {
        self.links.stop();
    }

    /// Brings everything to what is known.
    pub async fn refresh(&mut self, told: &watch::Sender<Status>, notifier: &Notifier) {
        let late = Instant::now() >= self.deadline;
        if late && self.url_awaited {
            self.give_up_url();
        }
        let hostname = self.machine.hostname.clone().or_else(|| self.named_before.clone());
        self.view = self.links.reconcile(&self.machine, hostname.as_deref()).await;
        let mut leased = Leased::of(&self.links.held());
        // Pods have no IPv6: where DHCP names servers, they are spared those that they cannot reach.
        if leased.dns.is_empty() {
            leased.dns.extend(self.links.router_names());
        }
        self.keep_resolver(&mut leased);
        self.note_links(&leased);
        let resolv_conf = publish::resolv_conf(&self.machine, &leased.dns, &leased.domains);
        let resolver = publish::write_resolv_conf(&self.options.run, &resolv_conf);
        self.note_time_servers(&leased);
        self.note_name_servers();
        let addresses = host_addresses(&self.view.desired, &self.view.links);
        self.note_network(&addresses);
        let was_ready = self.status.ready;
        if !was_ready && (late || self.settled(&addresses)) {
            self.say_what_is_missing(&addresses);
            self.status.ready = true;
        }
        self.note_clock();
        self.note_space();
        let published = if self.status.ready { self.publish(addresses, leased) } else { Ok(()) };
        let failed = [resolver, published].into_iter().filter_map(Result::err);
        self.status.set_problems(Area::Files, failed.map(|error| chain(&error)));
        match (was_ready, self.status.ready) {
            (false, true) => notifier.ready(&self.status.summary()),
            _ if *told.borrow() != self.status => notifier.status(&self.status.summary()),
            _ => {}
        }
        told.send_if_modified(|old| {
            let changed = *old != self.status;
            old.clone_from(&self.status);
            changed
        });
    }

    /// Whether there is nothing left to wait for.
    fn settled(&self, addresses: &[IpAddr]) -> bool {
        let clock = match self.status.clock {
            Clock::Synchronised { .. } => true,
            // DHCP may still name a server.
            Clock::NoServer => self.asked.time.borrow().is_empty() && !self.links.asking(),
            Clock::Asking | Clock::Unreachable(_) => false,
        };
        !addresses.is_empty() && clock && !self.url_awaited
    }

    fn say_what_is_missing(&self, addresses: &[IpAddr]) {
        let seconds = self.options.network_deadline;
        if addresses.is_empty() {
            console::say(&[format!("no address after {seconds} s: going on without, still trying")]);
        } else if self.status.dns.is_empty() {
            console::say(&[format!("no name server is known, by DHCP or from an IPv6 router: {BY_HAND}")]);
        }
        match &self.status.clock {
            Clock::Synchronised { .. } => {}
            Clock::NoServer | Clock::Asking => {
                console::say(&["no time server is configured, nor named by DHCP: the clock of the machine is used; give \
                    'time.servers' in machine.yaml".into()]);
            }
            Clock::Unreachable(why) => {
                console::say(&[format!(
                    "no time server answers ({why}): the clock of the machine is used, still trying"
                )]);
            }
        }
    }

    /// A pod keeps for life the resolver's file that it was made with, so that must not be empty only because hostd was
    /// started again. When the look failed, nothing is known that speaks against it.
    fn keep_resolver(&mut self, leased: &mut Leased) {
        let View { desired, links, problems } = &self.view;
        let failed = desired.is_empty() && !problems.is_empty();
        if failed || awaits_lease(desired, links, !self.links.held().is_empty()) {
            leased.dns.extend(&self.resolver_before.0);
            leased.domains.extend_from_slice(&self.resolver_before.1);
        } else {
            self.resolver_before = Default::default();
        }
    }

    fn note_links(&mut self, leased: &Leased) {
        let carrier = |index: u32| self.view.links.iter().any(|l| l.index == index && l.carrier);
        self.status.links = self
            .view
            .desired
            .iter()
            .map(|link| LinkStatus {
                name: link.name.clone(),
                carrier: carrier(link.index),
                dhcp: link.dhcp,
                addresses: link_addresses(link, &self.view.links),
            })
            .collect();
        let routes = self.view.desired.iter().flat_map(|d| &d.routes);
        self.status.gateways = routes.filter(|r| r.to.prefix_len() == 0).filter_map(|r| r.via).collect();
        self.status.dns = publish::name_servers(&self.machine, &leased.dns);
    }

    /// What IPv6 routers want matters only to a host that lacks what they would give.
    fn note_network(&mut self, addresses: &[IpAddr]) {
        let lacks = addresses.is_empty() || self.status.dns.is_empty();
        let notes = self.links.router_notes().filter(|_| lacks).map(|note| format!("{note}: {BY_HAND}"));
        let problems: Vec<String> = self.view.problems.iter().cloned().chain(notes).collect();
        self.status.set_problems(Area::Network, problems);
    }

    fn note_time_servers(&mut self, leased: &Leased) {
        // With servers but no address yet, asking would only fail.
        let reachable = self.view.desired.iter().any(|d| !d.addresses.is_empty());
        let servers = if reachable {
            publish::time_servers(&self.machine, &leased.time)
        } else {
            clock::Servers::default()
        };
        let none_known = servers.is_empty();
        self.asked.time.send_if_modified(|old| {
            let changed = *old != servers;
            *old = servers;
            changed
        });
        if !none_known && self.status.clock == Clock::NoServer {
            self.status.clock = Clock::Asking;
        }
    }

    /// Without an address, asking would only fail.
    fn note_name_servers(&self) {
        let reachable = self.view.desired.iter().any(|d| !d.addresses.is_empty());
        let servers = if reachable { self.status.dns.clone() } else { Vec::new() };
        self.asked.names.send_if_modified(|old| {
            let changed = *old != servers;
            *old = servers;
            changed
        });
    }

    /// A clock that nobody set and that cannot be right fails every certificate, far from here.
    fn note_clock(&mut self) {
        let trusted = matches!(self.status.clock, Clock::Synchronised { .. });
        let wrong = self.status.ready && !trusted && clock::is_impossible();
        self.status.set_problems(Area::Clock, wrong.then(|| WRONG_CLOCK.to_owned()));
    }

    /// The agent tells the cluster at the same mark (`DiskPressure`).
    fn note_space(&mut self) {
        let space = if self.status.persistent { metrics::space(&self.options.data) } else { None };
        let full = space.filter(|(all, free)| free.saturating_mul(10) < *all);
        self.status.set_problems(Area::Space, full.map(|(all, free)| too_little_space(all, free)));
    }

    fn publish(&mut self, addresses: Vec<IpAddr>, leased: Leased) -> Result<()> {
        // Between two leases there is none: the old one is as good as any until there is the next.
        if !addresses.is_empty() {
            self.addresses = addresses;
        }
        let before = self.named_before.as_deref();
        let node = publish::node_name(&self.machine, before, leased.hostname.as_deref(), &self.machine_id);
        if self.named_before.as_deref() != Some(&node) {
            let path = self.options.state.join("machine/node-name");
            files::keep(&path, format!("{node}\n").as_bytes(), 0o644, None, Durability::Durable)?;
            self.named_before = Some(node.clone());
        }
        self.status.node.clone_from(&node);
        if rustix::system::uname().nodename().to_bytes() != node.as_bytes() {
            tracing::info!("{}", Step::SetHostname(node.clone()));
            rustix::system::sethostname(node.as_bytes()).context("set the host name to", &node)?;
        }
        let facts = Facts {
            node,
            addresses: self.addresses.clone(),
            clock_synchronised: matches!(self.status.clock, Clock::Synchronised { .. }),
            machine_id: self.machine_id.clone(),
            system: self.status.system.clone(),
        };
        Publication::new(&self.machine, facts).write(&self.options.run)
    }
}

const BY_HAND: &str =
    "give an address in 'network.links' and name servers in 'network.dns.servers' of machine.yaml";

/// What the console says while the clock cannot be right.
const WRONG_CLOCK: &str = "the clock says a time before 2025 and no time server has set it, so no certificate counts as \
    valid and joining fails: give 'time.servers' in machine.yaml, or set the clock in the firmware";

fn no_name_server(why: &str) -> String {
    format!(
        "DNS is dead ({why}): names of registries and servers are not found, addresses still work; check the name \
         server, or give 'network.dns.servers' in machine.yaml"
    )
}

fn too_little_space(all: u64, free: u64) -> String {
    // In steps, so that a disk that fills does not fill the console.
    let percent = free.saturating_mul(100) / all.max(1);
    format!(
        "DATA is nearly full ({percent} % free): images cannot be pulled and pods that write to disk fail; delete pods \
         that are not needed, or give the machine a larger disk"
    )
}

/// A kernel crash explains the boot better than that the machine went down by itself.
fn note_crash(options: &Options, status: &mut Status) {
    match crash_log::save(&options.sys.join("fs/pstore"), &options.state.join("crashes")) {
        Ok(None) => {}
        Ok(Some(crash)) => {
            let what =
                if crash.ended { "the last boot ended in a kernel crash" } else { "the kernel had an error" };
            let place = if status.persistent { "STATE" } else { "memory, until the machine is switched off" };
            let log = crash.log.strip_prefix(&options.state).unwrap_or(&crash.log);
            console::say(&[format!("{what}: {}; its log is in {} on {place}", crash.words, log.display())]);
            if crash.ended {
                status.boot_reason =
                    format!("after a kernel crash: {} (log: {} on {place})", crash.words, log.display());
            }
        }
        Err(error) => tracing::warn!(
            "what the kernel said before it crashed is not saved and stays in the firmware: {}",
            chain(&error)
        ),
    }
}

fn read_line(path: &Path) -> Option<String> {
    let bytes = files::read(path, 4096).ok().flatten()?;
    let text = String::from_utf8(bytes).ok()?;
    Some(text.trim().to_owned()).filter(|t| !t.is_empty())
}

/// `PRETTY_NAME` of os-release, else its name and version, else this program's.
pub fn system_name(os_release: &Path) -> String {
    let text = std::fs::read_to_string(os_release).unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim().trim_matches('"').to_owned())
    };
    let pretty =
        value("PRETTY_NAME").or_else(|| Some(format!("{} {}", value("NAME")?, value("VERSION_ID")?)));
    pretty.unwrap_or_else(|| concat!("Atoll ", env!("CARGO_PKG_VERSION")).to_owned())
}
