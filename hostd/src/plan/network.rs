//! Links, addresses and routes: from the config and the leases to what should be, and to the steps there. ◇
//!
//! Only links that a rule selects are touched, and on them only IPv4 addresses, the config's IPv6 addresses, and the
//! routes that carry our marks: pods' taps and routes belong to the runtime.

use crate::dhcp::packet::Lease;
use atoll_spec::machine::domain::{LinkRule, Machine};
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// A link as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: Option<[u8; 6]>,
    /// The driver of its card.
    pub driver: Option<String>,
    /// Whether it is an Ethernet card (or stands for one), not a tap, bridge or tunnel.
    pub card: bool,
    /// Whether it is the loopback.
    pub loopback: bool,
    /// Whether it is switched on.
    pub up: bool,
    /// Whether there is a peer.
    pub carrier: bool,
    /// How often it got one.
    pub plugged: u32,
    /// Its MTU.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Its routes that carry our marks.
    pub routes: Vec<Route>,
}

/// An address on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// With prefix length.
    pub net: IpNet,
    /// Seconds until it goes away; `None` is for ever.
    pub seconds: Option<u32>,
}

/// Who wants a route; the kernel keeps it with the route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The machine config.
    Config,
    /// A DHCP server.
    Dhcp,
}

/// A route through a link.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Destination.
    pub to: IpNet,
    /// Gateway; `None` when the destination is on the link.
    pub via: Option<IpAddr>,
    /// The smaller goes first.
    pub metric: u32,
    /// Whose it is.
    pub origin: Origin,
    /// Whether the gateway is in no network of the link and is on it all the same.
    pub onlink: bool,
}

/// What DHCP has said on a link so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseState {
    /// Nothing yet: what a previous run of hostd set up stays.
    Asking,
    /// This, for so many seconds more.
    Held(Box<Lease>, Option<u32>),
    /// There was a lease and it is gone.
    Lost,
}

/// A link as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether a DHCP client runs on it.
    pub dhcp: bool,
    /// Its MTU; `None` leaves it.
    pub mtu: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Whether addresses that end by themselves stay although they are not listed.
    pub keep_leased: bool,
    /// Its routes.
    pub routes: Vec<Route>,
}

/// A step towards what should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Set the MTU.
    SetMtu(Target, u32),
    /// Switch the link on.
    Up(Target),
    /// Add an address, or renew its time.
    SetAddress(Target, Address),
    /// Take an address away.
    RemoveAddress(Target, IpNet),
    /// Add a route.
    AddRoute(Target, Route),
    /// Take a route away.
    RemoveRoute(Target, Route),
    /// Ask for an address by DHCP.
    StartDhcp(Target),
    /// Stop asking.
    StopDhcp(Target),
}

/// A link in a step: the index is what counts, the name is for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetMtu(link, mtu) => write!(f, "{}: set MTU {mtu}", link.name),
            Self::Up(link) => write!(f, "{}: switch on", link.name),
            Self::SetAddress(link, Address { net, seconds: None }) => {
                write!(f, "{}: address {net}", link.name)
            }
            Self::SetAddress(link, Address { net, seconds: Some(s) }) => {
                write!(f, "{}: address {net} for {s} s", link.name)
            }
            Self::RemoveAddress(link, net) => write!(f, "{}: remove address {net}", link.name),
            Self::AddRoute(link, route) => write!(f, "{}: route {route}", link.name),
            Self::RemoveRoute(link, route) => write!(f, "{}: remove route {route}", link.name),
            Self::StartDhcp(link) => write!(f, "{}: ask for an address by DHCP", link.name),
            Self::StopDhcp(link) => write!(f, "{}: stop DHCP", link.name),
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.via {
            Some(via) => write!(f, "{} via {via} metric {}", self.to, self.metric),
            None => write!(f, "{} metric {}", self.to, self.metric),
        }
    }
}

/// The rule for a link: the first that covers it, or DHCP on every card when there are none.
fn rule_for<'a>(machine: &'a Machine, link: &Link, fallback: &'a LinkRule) -> Option<&'a LinkRule> {
    if link.loopback {
        None
    } else if machine.links.is_empty() {
        link.card.then_some(fallback)
    } else {
        machine.links.iter().find(|rule| rule.matches.covers(&link.name, link.mac, link.driver.as_deref()))
    }
}

/// What every selected link should be.
pub fn desired(machine: &Machine, links: &[Link], leases: &BTreeMap<u32, LeaseState>) -> Vec<Desired> {
    let fallback = LinkRule {
        matches: Default::default(),
        dhcp4: true,
        addresses: Vec::new(),
        mtu: None,
        routes: Vec::new(),
    };
    let each = links.iter().filter_map(|link| Some((link, rule_for(machine, link, &fallback)?)));
    each.map(|(link, rule)| desired_link(link, rule, leases.get(&link.index))).collect()
}

fn desired_link(link: &Link, rule: &LinkRule, lease: Option<&LeaseState>) -> Desired {
    // Several links may each have a default route: the one with the lowest index wins, always the same.
    let metric = 100 + link.index.min(800);
    let mut addresses: Vec<Address> =
        rule.addresses.iter().map(|net| Address { net: *net, seconds: None }).collect();
    let mut routes: Vec<Route> = rule
        .routes
        .iter()
        .map(|r| Route { to: r.to, via: Some(r.via), metric, origin: Origin::Config, onlink: false })
        .collect();
    let lease = lease.filter(|_| rule.dhcp4);
    let mut mtu = rule.mtu;
    if let Some(LeaseState::Held(lease, seconds)) = lease {
        mtu = mtu.or(lease.mtu);
        addresses.push(Address { net: lease.address.into(), seconds: *seconds });
        routes.extend(lease.routes.iter().map(|(to, via)| Route {
            to: (*to).into(),
            via: (!via.is_unspecified()).then_some(IpAddr::V4(*via)),
            metric,
            origin: Origin::Dhcp,
            onlink: false,
        }));
    }
    for route in &mut routes {
        route.onlink = route.via.is_some_and(|via| !addresses.iter().any(|a| a.net.contains(&via)));
    }
    routes.sort();
    routes.dedup_by(|a, b| (a.to, a.metric) == (b.to, b.metric));
    Desired {
        index: link.index,
        name: link.name.clone(),
        dhcp: rule.dhcp4 && link.mac.is_some(),
        mtu,
        addresses,
        keep_leased: rule.dhcp4 && matches!(lease, None | Some(LeaseState::Asking)),
        routes,
    }
}

/// The steps from `links` to `desired`. `clients` are the links on which a DHCP client runs.
pub fn plan(desired: &[Desired], links: &[Link], clients: &[u32]) -> Vec<Step> {
    let mut steps = Vec::new();
    for link in links.iter().filter(|l| l.loopback && !l.up) {
        steps.push(Step::Up(target(link.index, &link.name)));
    }
    for want in desired {
        if let Some(have) = links.iter().find(|l| l.index == want.index) {
            plan_link(want, have, clients.contains(&want.index), &mut steps);
        }
    }
    for client in clients.iter().filter(|c| !desired.iter().any(|d| d.index == **c && d.dhcp)) {
        let name = links.iter().find(|l| l.index == *client).map_or("link that is gone", |l| &l.name);
        steps.push(Step::StopDhcp(target(*client, name)));
    }
    steps
}

fn target(index: u32, name: &str) -> Target {
    Target { index, name: name.to_owned() }
}

fn plan_link(want: &Desired, have: &Link, client: bool, steps: &mut Vec<Step>) {
    let link = || target(want.index, &want.name);
    if let Some(mtu) = want.mtu.filter(|mtu| *mtu != have.mtu) {
        steps.push(Step::SetMtu(link(), mtu));
    }
    if !have.up {
        steps.push(Step::Up(link()));
    }
    for route in have.routes.iter().filter(|r| !is_wanted(r, want)) {
        steps.push(Step::RemoveRoute(link(), route.clone()));
    }
    for address in &have.addresses {
        let listed = want.addresses.iter().any(|a| a.net == address.net);
        let kept = want.keep_leased && address.seconds.is_some();
        if !listed && !kept && address.net.addr().is_ipv4() {
            steps.push(Step::RemoveAddress(link(), address.net));
        }
    }
    for address in &want.addresses {
        if !have.addresses.iter().any(|a| a.net == address.net && lasts_as_long(a.seconds, address.seconds)) {
            steps.push(Step::SetAddress(link(), address.clone()));
        }
    }
    // Switching a link on, or losing the address they were made for, also loses routes: those come back here.
    for route in &want.routes {
        if !have.up || !have.routes.iter().any(|r| same_route(r, route)) {
            steps.push(Step::AddRoute(link(), route.clone()));
        }
    }
    // Without a peer nobody would hear it; the link wakes us when it has one.
    if want.dhcp && !client && have.carrier {
        steps.push(Step::StartDhcp(link()));
    }
}

fn is_wanted(route: &Route, want: &Desired) -> bool {
    let kept = want.keep_leased && route.origin == Origin::Dhcp;
    kept || want.routes.iter().any(|r| same_route(r, route))
}

/// The kernel reports `onlink` only as a flag of the next hop, so it does not take part.
fn same_route(a: &Route, b: &Route) -> bool {
    (a.to, a.via, a.metric) == (b.to, b.via, b.metric)
}

/// Whether an address needs no renewal: its time is within half a minute of the wanted one, or longer.
fn lasts_as_long(have: Option<u32>, want: Option<u32>) -> bool {
    match (have, want) {
        (None, None) => true,
        (Some(have), Some(want)) => have.saturating_add(30) >= want,
        (None, Some(_)) | (Some(_), None) => false,
    }
}

/// The addresses of a link: those it should have, those of a lease from before this start of hostd that are kept until
/// DHCP has spoken, and what IPv6 gave it by itself.
pub fn link_addresses(desired: &Desired, links: &[Link]) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = desired.addresses.iter().map(|a| a.net.addr()).collect();
    let have = links.iter().filter(|l| l.index == desired.index).flat_map(|l| &l.addresses);
    for address in have {
        if is_kept(desired, address) && !all.contains(&address.net.addr()) {
            all.push(address.net.addr());
        }
        if let IpAddr::V6(ip) = address.net.addr()
            && !ip.is_unicast_link_local()
            // fec0::/10, deprecated and private to the site.
            && ip.segments()[0] & 0xffc0 != 0xfec0
            && !all.contains(&ip.into())
        {
            all.push(ip.into());
        }
    }
    all
}

/// Whether an address is of a lease from before this start of hostd, kept until DHCP has spoken.
fn is_kept(desired: &Desired, address: &Address) -> bool {
    desired.keep_leased && address.seconds.is_some() && address.net.addr().is_ipv4()
}

/// Whether what a run of hostd before this one learned from DHCP still counts: until there is a lease, and then as long
/// as another link has the address of its old one. `leased` says whether there is a lease.
pub fn awaits_lease(desired: &[Desired], links: &[Link], leased: bool) -> bool {
    desired.iter().any(|want| {
        let have = links.iter().filter(|l| l.index == want.index).flat_map(|l| &l.addresses);
        want.keep_leased && (!leased || have.into_iter().any(|address| is_kept(want, address)))
    })
}

/// The host's addresses, the one that the outside most likely sees first.
pub fn host_addresses(desired: &[Desired], links: &[Link]) -> Vec<IpAddr> {
    let metric = |d: &Desired| {
        let defaults = d.routes.iter().filter(|r| r.to.prefix_len() == 0);
        defaults.map(|r| r.metric).min().unwrap_or(u32::MAX)
    };
    let mut sorted: Vec<&Desired> = desired.iter().collect();
    sorted.sort_by_key(|d| (metric(d), d.index));
    let all = sorted.iter().flat_map(|d| link_addresses(d, links));
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = all.partition(IpAddr::is_ipv4);
    v4.into_iter().chain(v6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_spec::machine::document;
    use proptest::prelude::*;

    fn card(index: u32) -> Link {
        Link {
            index,
            name: format!("eth{index}"),
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            card: true,
            carrier: true,
            mtu: 1500,
            ..Link::default()
        }
    }

    fn machine(links: &str) -> Machine {
        let text = format!("apiVersion: atoll.dev/v1\nkind: Machine\nnetwork: {{links: [{links}]}}\n");
        document::parse(text.as_bytes()).unwrap()
    }

    fn lease() -> Lease {
        Lease {
            address: "10.0.0.7/24".parse().unwrap(),
            server: [10, 0, 0, 1].into(),
            routes: vec![("0.0.0.0/0".parse().unwrap(), [10, 0, 0, 1].into())],
            dns: vec![],
            domain: None,
            ntp: vec![],
            hostname: None,
            mtu: Some(1400),
            seconds: Some(3600),
            renew_after: 1800,
            rebind_after: 3150,
        }
    }

    fn steps(
        machine: &Machine,
        links: &[Link],
        leases: &BTreeMap<u32, LeaseState>,
        clients: &[u32],
    ) -> Vec<String> {
        plan(&desired(machine, links, leases), links, clients).iter().map(ToString::to_string).collect()
    }

    /// What the kernel would have after the steps.
    fn apply(links: &mut [Link], steps: &[Step], clients: &mut Vec<u32>) {
        for step in steps {
            let (Step::SetMtu(t, _)
            | Step::Up(t)
            | Step::SetAddress(t, _)
            | Step::RemoveAddress(t, _)
            | Step::AddRoute(t, _)
            | Step::RemoveRoute(t, _)
            | Step::StartDhcp(t)
            | Step::StopDhcp(t)) = step;
            let Some(link) = links.iter_mut().find(|l| l.index == t.index) else {
                clients.retain(|c| *c != t.index);
                continue;
            };
            match step {
                Step::SetMtu(_, mtu) => link.mtu = *mtu,
                Step::Up(_) => link.up = true,
                Step::SetAddress(_, a) => {
                    link.addresses.retain(|b| b.net != a.net);
                    link.addresses.push(a.clone());
                }
                Step::RemoveAddress(_, net) => link.addresses.retain(|a| a.net != *net),
                Step::AddRoute(_, r) => link.routes.push(r.clone()),
                Step::RemoveRoute(_, r) => link.routes.retain(|s| s != r),
                Step::StartDhcp(t) => clients.push(t.index),
                Step::StopDhcp(t) => clients.retain(|c| *c != t.index),
            }
        }
    }

    #[test]
    fn without_rules_every_card_asks_by_dhcp_and_taps_are_left_alone() {
        let tap = Link { index: 9, name: "tap9".into(), mac: Some([2; 6]), ..Link::default() };
        let lo = Link { index: 1, name: "lo".into(), loopback: true, ..Link::default() };
        let found = steps(&Machine::default(), &[lo, card(2), tap], &BTreeMap::new(), &[]);
        assert_eq!(found, ["lo: switch on", "eth2: switch on", "eth2: ask for an address by DHCP"]);
    }

    #[test]
    fn a_lease_becomes_address_route_and_mtu() {
        let mut link = card(2);
        link.up = true;
        let leases = BTreeMap::from([(2, LeaseState::Held(Box::new(lease()), Some(3600)))]);
        let found = steps(&Machine::default(), &[link], &leases, &[2]);
        assert_eq!(
            found,
            [
                "eth2: set MTU 1400",
                "eth2: address 10.0.0.7/24 for 3600 s",
                "eth2: route 0.0.0.0/0 via 10.0.0.1 metric 102",
            ]
        );
    }

    #[test]
    fn a_restart_keeps_the_leased_address_until_dhcp_has_spoken() {
        let mut link = card(2);
        link.up = true;
        link.addresses.push(Address { net: "10.0.0.7/24".parse().unwrap(), seconds: Some(900) });
        let links = [link];
        assert_eq!(steps(&Machine::default(), &links, &BTreeMap::new(), &[2]), [""; 0]);
        let lost = BTreeMap::from([(2, LeaseState::Lost)]);
        assert_eq!(steps(&Machine::default(), &links, &lost, &[2]), ["eth2: remove address 10.0.0.7/24"]);
        let shown = |leases: &BTreeMap<u32, LeaseState>| {
            host_addresses(&desired(&Machine::default(), &links, leases), &links)
        };
        assert_eq!(
            shown(&BTreeMap::new()),
            ["10.0.0.7".parse::<IpAddr>().unwrap()],
            "the agent keeps it as well"
        );
        let awaits = |links: &[Link], leases: &BTreeMap<u32, LeaseState>, leased| {
            awaits_lease(&desired(&Machine::default(), links, leases), links, leased)
        };
        assert!(awaits(&links, &BTreeMap::new(), false), "and the resolver its servers");
        assert!(!awaits(&links, &lost, false));
        // Of two links one has spoken; the other had a lease too, or never had one.
        let held = BTreeMap::from([(3, LeaseState::Held(Box::new(lease()), Some(900)))]);
        assert!(awaits(&[links[0].clone(), card(3)], &held, true));
        assert!(!awaits(&[card(2), card(3)], &held, true));
        assert!(shown(&lost).is_empty());
    }

    #[test]
    fn the_first_rule_that_covers_a_link_decides_and_others_stay_alone() {
        let machine = machine(
            "{match: {mac: '02:00:00:00:00:03'}, addresses: [192.0.2.10/24], mtu: 9000, routes: [{to: default, via: \
             192.0.2.1}]}, {match: {name: eth4}}",
        );
        let found = steps(&machine, &[card(2), card(3), card(4)], &BTreeMap::new(), &[2]);
        assert_eq!(
            found,
            [
                "eth3: set MTU 9000",
                "eth3: switch on",
                "eth3: address 192.0.2.10/24",
                "eth3: route 0.0.0.0/0 via 192.0.2.1 metric 103",
                "eth4: switch on",
                "eth4: ask for an address by DHCP",
                "eth2: stop DHCP",
            ]
        );
    }

    #[test]
    fn a_gateway_outside_every_network_is_on_the_link() {
        let mut lease = lease();
        lease.address = "10.0.0.7/32".parse().unwrap();
        let leases = BTreeMap::from([(2, LeaseState::Held(Box::new(lease), None))]);
        assert!(desired(&Machine::default(), &[card(2)], &leases)[0].routes[0].onlink);
    }

    #[test]
    fn the_address_with_the_default_route_is_the_first() {
        let machine = machine(
            "{match: {name: eth2}, addresses: ['2001:db8::2/64', 10.9.0.2/24]}, {match: {name: eth3}, addresses: \
             [192.0.2.10/24], routes: [{to: default, via: 192.0.2.1}]}",
        );
        let mut links = [card(2), card(3)];
        for net in ["fe80::1/64", "fec0::1/64", "2001:db8:1::3/64"] {
            links[1].addresses.push(Address { net: net.parse().unwrap(), seconds: Some(60) });
        }
        let found = host_addresses(&desired(&machine, &links, &BTreeMap::new()), &links);
        let text: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["192.0.2.10", "10.9.0.2", "2001:db8:1::3", "2001:db8::2"]);
    }

    fn any_link() -> impl Strategy<Value = Link> {
        let address = (0u8..4, proptest::option::of(1u32..4000));
        (2u32..5, any::<bool>(), any::<bool>(), 1400u32..1502, proptest::collection::vec(address, 0..3))
            .prop_map(|(index, up, card_, mtu, addresses)| Link {
                up,
                mtu,
                card: card_,
                addresses: addresses
                    .into_iter()
                    .map(|(n, seconds)| Address { net: format!("10.0.0.{n}/24").parse().unwrap(), seconds })
                    .collect(),
                ..card(index)
            })
    }

    proptest! {
        /// Applying the plan reaches the goal: planning again finds nothing to do.
        #[test]
        fn a_plan_is_complete(mut links in proptest::collection::vec(any_link(), 1..4), state in 0u8..4, rules in any::<bool>()) {
            links.sort_by_key(|l| l.index);
            links.dedup_by_key(|l| l.index);
            let machine = if rules {
                machine("{match: {name: 'eth[2]'}}, {match: {name: 'eth*'}, dhcp4: true, addresses: [10.0.0.3/24], routes: \
                    [{to: 10.1.0.0/16, via: 10.0.0.1}]}")
            } else { Machine::default() };
            let lease_state = match state {
                0 => None,
                1 => Some(LeaseState::Asking),
                2 => Some(LeaseState::Lost),
                _ => Some(LeaseState::Held(Box::new(lease()), Some(3600))),
            };
            let leases = links.iter().filter_map(|l| Some((l.index, lease_state.clone()?))).collect();
            let mut clients = vec![2];
            let first = plan(&desired(&machine, &links, &leases), &links, &clients);
            apply(&mut links, &first, &mut clients);
            let second = plan(&desired(&machine, &links, &leases), &links, &clients);
            prop_assert_eq!(second, vec![]);
        }
    }
}
