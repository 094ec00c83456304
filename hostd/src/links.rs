//! Owns the network of the host: observes, plans, applies, keeps a DHCP client on each link that wants one, and listens
//! to the IPv6 routers of each.

use crate::dhcp::client::{self, News};
use crate::dhcp::packet::Lease;
use crate::error::{Context, Result, chain};
use crate::plan::network::{self as plan, Desired, LeaseState, Link, Step};
use crate::routers::{self, Names};
use crate::{apply, observe};
use atoll_spec::machine::domain::Machine;
use futures_util::StreamExt;
use rtnetlink::{Handle, MulticastGroup};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long one look and its steps may take.
const DEADLINE: Duration = Duration::from_secs(20);
/// Changes of links come in bursts; they are looked at together.
const BURST: Duration = Duration::from_millis(100);

/// The links and their DHCP clients.
pub struct Links {
    netlink: Handle,
    sys: PathBuf,
    clients: BTreeMap<u32, JoinHandle<()>>,
    leases: BTreeMap<u32, (LeaseState, Option<Instant>)>,
    /// What to tell of links whose server gave an address that somebody has.
    taken: BTreeMap<u32, String>,
    /// Who listens to IPv6 routers.
    listeners: BTreeMap<u32, JoinHandle<()>>,
    /// What those say.
    names: BTreeMap<u32, Names>,
    /// How often each link had got a peer at the last look. Counted by the kernel: a look may miss a short absence.
    plugged: BTreeMap<u32, u32>,
    senders: Senders,
}

/// Where the tasks of links tell what changes.
#[derive(Clone)]
pub struct Senders {
    /// Each change of a lease.
    pub leases: mpsc::Sender<client::Change>,
    /// Each change of what IPv6 routers say.
    pub names: mpsc::Sender<Names>,
    /// Each change of a link or an address.
    pub wake: mpsc::Sender<()>,
}

/// How the network is after a look.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// What every selected link should be.
    pub desired: Vec<Desired>,
    /// What the links were before the steps.
    pub links: Vec<Link>,
    /// Steps that failed.
    pub problems: Vec<String>,
}

impl Links {
    /// Opens netlink.
    pub fn open(sys: PathBuf, senders: Senders) -> Result<Self> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let wake = senders.wake.clone();
        let opened = rtnetlink::new_multicast_connection(&groups);
        let (connection, netlink, mut messages) = opened.context("open", "netlink")?;
        tokio::spawn(connection);
        tokio::spawn(async move {
            while messages.next().await.is_some() {
                tokio::time::sleep(BURST).await;
                while let Ok(_another) = messages.try_recv() {}
                if wake.send(()).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            netlink,
            sys,
            clients: BTreeMap::new(),
            leases: BTreeMap::new(),
            taken: BTreeMap::new(),
            listeners: BTreeMap::new(),
            names: BTreeMap::new(),
            plugged: BTreeMap::new(),
            senders,
        })
    }

    /// The steps that `machine` asks for, without doing them.
    pub async fn plan(&self, machine: &Machine) -> Result<Vec<Step>> {
        let links = observe::network::observe(&self.netlink, &self.sys).await?;
        let desired = plan::desired(machine, &links, &self.lease_states());
        Ok(plan::plan(&desired, &links, &[]))
    }

    /// Brings the links to what `machine` and the leases say. `hostname` is told to DHCP servers.
    pub async fn reconcile(&mut self, machine: &Machine, hostname: Option<&str>) -> View {
        match tokio::time::timeout(DEADLINE, self.try_reconcile(machine, hostname)).await {
            Ok(Ok(view)) => view,
            Ok(Err(error)) => View { problems: vec![chain(&error)], ..View::default() },
            Err(_) => View { problems: vec!["netlink does not answer".into()], ..View::default() },
        }
    }

    async fn try_reconcile(&mut self, machine: &Machine, hostname: Option<&str>) -> Result<View> {
        self.clients.retain(|_, client| !client.is_finished());
        let links = observe::network::observe(&self.netlink, &self.sys).await?;
        self.restart_replugged(&links);
        let desired = plan::desired(machine, &links, &self.lease_states());
        let clients: Vec<u32> = self.clients.keys().copied().collect();
        let mut problems: Vec<String> = self.taken.values().cloned().collect();
        for step in plan::plan(&desired, &links, &clients) {
            tracing::info!("{step}");
            match &step {
                Step::StartDhcp(link) => {
                    if let Some(mac) = links.iter().find(|l| l.index == link.index).and_then(|l| l.mac) {
                        self.start(
                            client::Link { index: link.index, name: link.name.clone(), mac },
                            hostname,
                        );
                    }
                }
                Step::StopDhcp(link) => {
                    self.leases.remove(&link.index);
                    self.taken.remove(&link.index);
                    if let Some(client) = self.clients.remove(&link.index) {
                        client.abort();
                    }
                }
                _ => {
                    if let Err(error) = apply::network::apply(&self.netlink, &step).await {
                        problems.push(chain(&error));
                    }
                }
            }
        }
        self.listen(&desired, &links);
        Ok(View { desired, links, problems })
    }

    /// Listens to the routers of each link that a rule selects and that has a peer.
    fn listen(&mut self, desired: &[Desired], links: &[Link]) {
        let card =
            |want: &&Desired| links.iter().any(|l| l.index == want.index && l.carrier && l.mac.is_some());
        let wanted: Vec<&Desired> = desired.iter().filter(card).collect();
        let gone = |link: &u32| !wanted.iter().any(|want| want.index == *link);
        for link in self.listeners.keys().copied().filter(gone).collect::<Vec<_>>() {
            self.forget_routers(link);
        }
        self.listeners.retain(|_, task| !task.is_finished());
        for want in wanted {
            let (index, name) = (want.index, want.name.clone());
            let names = &self.senders.names;
            self.listeners.entry(index).or_insert_with(|| {
                let running = routers::run(index, name.clone(), names.clone());
                tokio::spawn(async move {
                    if let Err(error) = running.await {
                        tracing::warn!(link = name, "IPv6 routers are not heard: {}", chain(&error));
                    }
                })
            });
        }
    }

    /// What they said is of a network that may not be there any more.
    fn forget_routers(&mut self, link: u32) {
        self.names.remove(&link);
        if let Some(task) = self.listeners.remove(&link) {
            task.abort();
        }
    }

    /// A link that got a peer may be in another network now: its client begins anew, at once. What it had stays until
    /// a server has spoken.
    fn restart_replugged(&mut self, links: &[Link]) {
        let plugged = links.iter().filter(|l| l.carrier).map(|l| (l.index, l.plugged));
        let now: BTreeMap<u32, u32> = plugged.collect();
        let before = std::mem::replace(&mut self.plugged, now.clone());
        for (link, _) in now.iter().filter(|(link, count)| before.get(link) != Some(count)) {
            if let Some(client) = self.clients.remove(link) {
                client.abort();
            }
            self.forget_routers(*link);
        }
    }

    fn start(&mut self, link: client::Link, hostname: Option<&str>) {
        let (index, name) = (link.index, link.name.clone());
        let running = client::run(link, hostname.map(str::to_owned), self.senders.leases.clone());
        let client = tokio::spawn(async move {
            if let Err(error) = running.await {
                tracing::warn!(link = name, "DHCP stopped and is started again: {}", chain(&error));
            }
        });
        self.clients.insert(index, client);
    }

    /// Takes in what a DHCP client reported.
    pub fn leased(&mut self, change: client::Change) {
        let state = match change.news {
            News::Taken(text) => {
                tracing::warn!("{text}");
                self.taken.insert(change.link, text);
                return;
            }
            News::Held(lease, end) => {
                if !matches!(self.leases.get(&change.link), Some((LeaseState::Held(old, _), _)) if *old == lease)
                {
                    let seconds = lease.seconds.map_or("ever".into(), |s| format!("{s} s"));
                    tracing::info!(server = %lease.server, "DHCP lease of {} for {seconds}", lease.address);
                }
                (LeaseState::Held(lease, None), end)
            }
            News::Lost => {
                tracing::warn!("DHCP lease lost");
                (LeaseState::Lost, None)
            }
        };
        self.taken.remove(&change.link);
        self.leases.insert(change.link, state);
    }

    /// Takes in what the routers of a link say.
    pub fn heard(&mut self, names: Names) {
        let servers: Vec<String> = names.servers.iter().map(ToString::to_string).collect();
        tracing::info!(
            "name servers by IPv6 routers: {}",
            if servers.is_empty() { "none".into() } else { servers.join(", ") }
        );
        self.names.insert(names.link, names);
    }

    /// The name servers that IPv6 routers name.
    pub fn router_names(&self) -> impl Iterator<Item = IpAddr> {
        self.names.values().flat_map(|names| &names.servers).map(|ip| IpAddr::V6(*ip))
    }

    /// What IPv6 routers want that is not done.
    pub fn router_notes(&self) -> impl Iterator<Item = &String> {
        self.names.values().filter_map(|names| names.note.as_ref())
    }

    fn lease_states(&self) -> BTreeMap<u32, LeaseState> {
        let now = Instant::now();
        let state = |state: &LeaseState, end: &Option<Instant>| match (state, end) {
            (LeaseState::Held(_, _), Some(end)) if *end <= now => LeaseState::Lost,
            (LeaseState::Held(lease, _), Some(end)) => {
                LeaseState::Held(lease.clone(), Some((*end - now).as_secs() as u32))
            }
            (other, _) => other.clone(),
        };
        self.leases.iter().map(|(link, (held, end))| (*link, state(held, end))).collect()
    }

    /// The leases that hold now.
    pub fn held(&self) -> Vec<Lease> {
        let states = self.lease_states();
        states
            .into_values()
            .filter_map(|s| if let LeaseState::Held(lease, _) = s { Some(*lease) } else { None })
            .collect()
    }

    /// Whether some link still waits for a first answer by DHCP.
    pub fn asking(&self) -> bool {
        self.clients.keys().any(|link| !self.leases.contains_key(link))
    }

    /// Ends what runs on links. Addresses stay: pods that are being stopped still need them.
    pub fn stop(&mut self) {
        let tasks = [std::mem::take(&mut self.clients), std::mem::take(&mut self.listeners)];
        tasks.into_iter().flat_map(BTreeMap::into_values).for_each(|task| task.abort());
    }
}

/// Name servers, domains, time servers and host name of the leases.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leased {
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Domains.
    pub domains: Vec<String>,
    /// Time servers.
    pub time: Vec<String>,
    /// The name one server has for this host.
    pub hostname: Option<String>,
}

impl Leased {
    /// Gathers what the leases say.
    pub fn of(leases: &[Lease]) -> Self {
        Self {
            dns: leases.iter().flat_map(|l| l.dns.iter().map(|ip| IpAddr::V4(*ip))).collect(),
            domains: leases.iter().filter_map(|l| l.domain.clone()).collect(),
            time: leases.iter().flat_map(|l| l.ntp.iter().map(ToString::to_string)).collect(),
            hostname: leases.iter().find_map(|l| l.hostname.clone()),
        }
    }
}
