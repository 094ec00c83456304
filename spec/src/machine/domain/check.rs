//! One check per field of the machine config. Every message says what would be right, and none holds a secret.

use super::super::problem::{Findings, did_you_mean};
use super::super::{JoinSection, LinkSection, MatchSection, RegistrySection, RouteSection};
use super::{DEFAULT_MAX_PODS, Join, LinkMatch, LinkRule, Registry, Route};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Text from the file, cut to what fits in a message, control characters taken out.
pub(super) fn shown(text: &str) -> String {
    let mut cut: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).take(60).collect();
    if text.chars().nth(60).is_some() {
        cut.push('…');
    }
    cut
}

fn is_dns_label(label: &str) -> bool {
    let bytes = label.as_bytes();
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

/// Whether this is a lower-case domain name, as Kubernetes takes for object names.
fn is_dns_name(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_label)
}

pub(super) fn hostname(name: String) -> Result<String, String> {
    if name.len() > 63 {
        return Err(format!("'{}' has {} characters: at most 63 fit", shown(&name), name.len()));
    }
    if is_dns_name(&name) {
        return Ok(name);
    }
    let lower = name.to_ascii_lowercase();
    let hint = if is_dns_name(&lower) { format!(": write '{lower}'") } else { String::new() };
    Err(format!("'{}' is not a host name (a-z, 0-9, '-' and '.', such as 'node-1'){hint}", shown(&name)))
}

pub(super) fn links(sections: Vec<LinkSection>, found: &mut Findings) -> Vec<LinkRule> {
    let mut seen: BTreeMap<IpAddr, String> = BTreeMap::new();
    let mut rules = Vec::with_capacity(sections.len());
    for (i, section) in sections.into_iter().enumerate() {
        let path = format!("network.links[{i}]");
        let dhcp4 = section.dhcp4.unwrap_or(section.addresses.is_empty());
        let mut addresses = Vec::new();
        for (j, text) in section.addresses.iter().enumerate() {
            let place = format!("{path}.addresses[{j}]");
            let Some(address) = found.keep(&place, interface_address(text)) else { continue };
            match seen.insert(address.addr(), place.clone()) {
                Some(first) => found.add(place, format!("{} stands at {first} already", address.addr())),
                None => addresses.push(address),
            }
        }
        if let Some(mtu) = section.mtu.filter(|mtu| !(576..=9216).contains(mtu)) {
            found.add(format!("{path}.mtu"), format!("{mtu} is out of range: 576 to 9216"));
        }
        // A gateway can only be checked against the addresses when DHCP adds none that are unknown here.
        let known = (!dhcp4 && addresses.len() == section.addresses.len()).then_some(&addresses);
        let mut routes = Vec::new();
        for (j, section) in section.routes.iter().enumerate() {
            routes.extend(route(section, &format!("{path}.routes[{j}]"), known, found));
        }
        let matches = link_match(section.matches, &format!("{path}.match"), found);
        rules.push(LinkRule { matches, dhcp4, addresses, mtu: section.mtu, routes });
    }
    rules
}

fn link_match(section: MatchSection, path: &str, found: &mut Findings) -> LinkMatch {
    if section.name.is_none() && section.mac.is_none() && section.driver.is_none() {
        found.add(path, "says nothing: give 'name', 'mac' or 'driver' (name: \"*\" matches every link)");
    }
    let named = |text: &str| {
        !text.is_empty() && text.len() < 64 && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
    };
    if let Some(name) = section.name.as_deref()
        && (!named(name) || name.len() > 15)
    {
        found.add(
            format!("{path}.name"),
            format!("'{}' is not a link name: 1 to 15 characters, such as 'eth0' or 'en*'", shown(name)),
        );
    }
    if let Some(driver) = section.driver.as_deref().filter(|d| !named(d)) {
        found.add(
            format!("{path}.driver"),
            format!("'{}' is not a driver name, such as 'virtio_net'", shown(driver)),
        );
    }
    let mac = section.mac.and_then(|text| found.keep(format!("{path}.mac"), mac(&text)));
    LinkMatch { name: section.name, mac, driver: section.driver }
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("'{}' is not a hardware address such as '52:54:00:12:34:56'", shown(text));
    let mut bytes = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut bytes {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() { Err(wrong()) } else { Ok(bytes) }
}

fn interface_address(text: &str) -> Result<IpNet, String> {
    let net: IpNet = text.parse().map_err(|_| match text.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => {
            format!("'{ip}' lacks its prefix length: write '{ip}/24' if that is the network's")
        }
        Ok(IpAddr::V6(ip)) => {
            format!("'{ip}' lacks its prefix length: write '{ip}/64' if that is the network's")
        }
        Err(_) => format!("'{}' is not an address with prefix length, such as '192.0.2.10/24'", shown(text)),
    })?;
    let ip = net.addr();
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() {
        return Err(format!("{ip} cannot be a link's address: it is unspecified, multicast or loopback"));
    }
    if net.prefix_len() == 0 {
        return Err(format!("'{net}' has prefix length 0: give the network's, such as '{ip}/24'"));
    }
    if let IpNet::V4(v4) = net
        && v4.prefix_len() < 31
        && (v4.addr() == v4.network() || v4.addr() == v4.broadcast())
    {
        return Err(format!(
            "{ip} is the network's own or its broadcast address: give the host's, {} to {} are left",
            Ipv4Addr::from(u32::from(v4.network()).saturating_add(1)),
            Ipv4Addr::from(u32::from(v4.broadcast()).saturating_sub(1))
        ));
    }
    Ok(net)
}

fn route(
    section: &RouteSection,
    path: &str,
    known: Option<&Vec<IpNet>>,
    found: &mut Findings,
) -> Option<Route> {
    let via: Option<IpAddr> = found.keep(
        format!("{path}.via"),
        section
            .via
            .parse()
            .map_err(|_| format!("'{}' is not an address such as '192.0.2.1'", shown(&section.via))),
    );
    let to = found.keep(format!("{path}.to"), destination(&section.to, via));
    let (via, to) = (via?, to?);
    if via.is_ipv4() != to.addr().is_ipv4() {
        found.add(format!("{path}.via"), format!("{via} is of another address family than {to}"));
        return None;
    }
    if let Some(addresses) = known
        && !addresses.iter().any(|net| net.contains(&via))
        && !matches!(via, IpAddr::V6(ip) if ip.is_unicast_link_local())
    {
        found
            .add(format!("{path}.via"), format!("{via} is in none of the networks of this link's addresses"));
    }
    Some(Route { to, via })
}

fn destination(text: &str, via: Option<IpAddr>) -> Result<IpNet, String> {
    if text == "default" {
        return Ok(match via {
            Some(IpAddr::V6(_)) => Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into(),
            _ => Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into(),
        });
    }
    let net: IpNet = text
        .parse()
        .map_err(|_| format!("'{}' is not a network such as '10.0.0.0/8', nor 'default'", shown(text)))?;
    if net.trunc() == net {
        Ok(net)
    } else {
        Err(format!("'{net}' has host bits set: write '{}'", net.trunc()))
    }
}

pub(super) fn dns_servers(texts: Vec<String>, found: &mut Findings) -> Vec<IpAddr> {
    if texts.len() > 3 {
        found.add("network.dns.servers", format!("{} name servers: at most three are used", texts.len()));
    }
    let parse = |text: &String| {
        text.parse().map_err(|_| format!("'{}' is not an address such as '192.0.2.53'", shown(text)))
    };
    let each = texts.iter().enumerate();
    each.filter_map(|(i, text)| found.keep(format!("network.dns.servers[{i}]"), parse(text))).collect()
}

pub(super) fn dns_search(names: Vec<String>, found: &mut Findings) -> Vec<String> {
    if names.len() > 6 {
        found.add("network.dns.search", format!("{} search domains: at most six are used", names.len()));
    }
    for (i, name) in names.iter().enumerate().filter(|(_, name)| !is_dns_name(name)) {
        found.add(
            format!("network.dns.search[{i}]"),
            format!("'{}' is not a domain such as 'example.org'", shown(name)),
        );
    }
    names
}

pub(super) fn time_servers(names: Vec<String>, found: &mut Findings) -> Vec<String> {
    if names.len() > 8 {
        found.add("time.servers", format!("{} time servers: at most eight are used", names.len()));
    }
    for (i, name) in names.iter().enumerate() {
        if name.parse::<IpAddr>().is_err() && !is_dns_name(name) {
            let message =
                format!("'{}' is not a host name or address, such as 'ntp.example.org'", shown(name));
            found.add(format!("time.servers[{i}]"), message);
        }
    }
    names
}

pub(super) fn join(section: JoinSection, found: &mut Findings) -> Join {
    if let Err(message) = api_server(&section.server) {
        found.add("join.server", message);
    }
    let is_part = |part: &str, len| {
        part.len() == len && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    if !section.token.split_once('.').is_some_and(|(id, secret)| is_part(id, 6) && is_part(secret, 16)) {
        let message = "is not a bootstrap token: 6 and 16 characters of a-z and 0-9 with a dot between, such as \
                       'abcdef.0123456789abcdef'";
        found.add("join.token", message);
    }
    if section.ca_pins.is_empty() {
        let message = "needs at least one pin: the token is never sent to a server that no pin vouches for; \
                       'atoll-supervisor token create' prints it";
        found.add("join.caPins", message);
    }
    for (i, pin) in section.ca_pins.iter().enumerate() {
        let hex = pin.strip_prefix("sha256:").unwrap_or_default();
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            let message =
                format!("'{}' is not a pin: 'sha256:' and 64 lower-case hexadecimal digits", shown(pin));
            found.add(format!("join.caPins[{i}]"), message);
        }
    }
    Join {
        server: section.server.trim_end_matches('/').to_owned(),
        token: section.token,
        ca_pins: section.ca_pins,
    }
}

fn api_server(text: &str) -> Result<(), String> {
    let example = "such as 'https://10.0.0.1:6443'";
    let Some(authority) = text.strip_prefix("https://") else {
        let hint = match text.strip_prefix("http://") {
            Some(rest) => format!("must use TLS: write 'https://{}'", shown(rest)),
            None => format!("'{}' is not an https URL, {example}", shown(text)),
        };
        return Err(hint);
    };
    let authority = authority.trim_end_matches('/');
    if authority.contains(['/', '?', '#', '@']) {
        return Err(format!("must be only a host and a port, {example}"));
    }
    host_and_port(authority).map_err(|problem| format!("{problem}, {example}"))
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`.
fn host_and_port(text: &str) -> Result<(), String> {
    let wrong = || format!("'{}' is not a host with an optional port", shown(text));
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (ip, rest) = rest.split_once(']').ok_or_else(wrong)?;
        ip.parse::<Ipv6Addr>().map_err(|_| wrong())?;
        ("v6", if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(wrong)?) })
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    if !is_dns_name(&host.to_ascii_lowercase()) {
        return Err(wrong());
    }
    match port {
        Some(port) if !port.parse::<u16>().is_ok_and(|p| p > 0) => {
            Err(format!("'{}' is not a port, 1 to 65535", shown(port)))
        }
        _ => Ok(()),
    }
}

/// A label or taint key: an optional domain, a slash, and a name.
fn key(text: &str) -> Result<(), String> {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    if prefix.is_some_and(|p| !is_dns_name(p)) || name.is_empty() || !is_value(name) {
        return Err(format!("'{}' is not a key such as 'rack' or 'example.org/rack'", shown(text)));
    }
    Ok(())
}

/// A label or taint value: empty, or up to 63 of letters, digits, '-', '_' and '.', with a letter or digit at its ends.
fn is_value(text: &str) -> bool {
    let bytes = text.as_bytes();
    let edge = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Labels under Kubernetes' own domains that a node may set on itself; the API server refuses every other.
fn may_set_itself(label: &str) -> bool {
    let Some((prefix, _)) = label.split_once('/') else { return true };
    let under = |domain: &str| {
        prefix == domain || prefix.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'))
    };
    if !under("kubernetes.io") && !under("k8s.io") {
        return true;
    }
    under("node.kubernetes.io")
        || under("kubelet.kubernetes.io")
        || matches!(label, "topology.kubernetes.io/zone" | "topology.kubernetes.io/region")
}

pub(super) fn labels(labels: BTreeMap<String, String>, found: &mut Findings) -> BTreeMap<String, String> {
    for (name, value) in &labels {
        let path = format!("node.labels[{:?}]", shown(name));
        if let Err(message) = key(name) {
            found.add(path, message);
        } else if !may_set_itself(name) {
            found.add(
                path,
                "a node may not set this label on itself: set it with kubectl, or use a domain of your own",
            );
        } else if !is_value(value) {
            let message = format!(
                "'{}' is not a label value: up to 63 of letters, digits, '-', '_' and '.'",
                shown(value)
            );
            found.add(path, message);
        }
    }
    labels
}

pub(super) fn taints(taints: Vec<String>, found: &mut Findings) -> Vec<String> {
    const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
    for (i, taint) in taints.iter().enumerate() {
        let path = format!("node.taints[{i}]");
        let Some((left, effect)) = taint.rsplit_once(':') else {
            found.add(path, format!("'{}' lacks its effect: write 'key=value:NoSchedule'", shown(taint)));
            continue;
        };
        let (name, value) = left.split_once('=').unwrap_or((left, ""));
        if let Err(message) = key(name) {
            found.add(&path, message);
        }
        if !is_value(value) {
            found.add(&path, format!("'{}' is not a taint value", shown(value)));
        }
        if !EFFECTS.contains(&effect) {
            let hint =
                did_you_mean(effect, EFFECTS).map(|e| format!(": did you mean '{e}'?")).unwrap_or_default();
            found.add(path, format!("'{}' is none of {}{hint}", shown(effect), EFFECTS.join(", ")));
        }
    }
    taints
}

pub(super) fn max_pods(value: Option<u32>, found: &mut Findings) -> u32 {
    let value = value.unwrap_or(DEFAULT_MAX_PODS);
    if !(1..=1000).contains(&value) {
        found.add("node.maxPods", format!("{value} is out of range: 1 to 1000"));
    }
    value
}

pub(super) fn registries(
    sections: BTreeMap<String, RegistrySection>,
    found: &mut Findings,
) -> BTreeMap<String, Registry> {
    let mut registries = BTreeMap::new();
    for (host, section) in sections {
        let path = format!("registries[{:?}]", shown(&host));
        if host.contains("://") {
            found.add(
                &path,
                "must be 'host' or 'host:port' without a scheme; 'plainHttp: true' turns TLS off",
            );
        } else if let Err(message) = host_and_port(&host) {
            found.add(&path, message);
        }
        if section.plain_http && section.ca_pem.is_some() {
            found.add(
                format!("{path}.caPem"),
                "has no meaning with 'plainHttp: true': leave one of the two out",
            );
        }
        if section.ca_pem.as_deref().is_some_and(|pem| !pem.contains("-----BEGIN CERTIFICATE-----")) {
            found.add(format!("{path}.caPem"), "holds no PEM certificate ('-----BEGIN CERTIFICATE-----')");
        }
        let login = match (section.username, section.password) {
            (Some(user), Some(password)) => Some((user, password)),
            (None, None) => None,
            (Some(_), None) => {
                found.add(format!("{path}.password"), "is missing: 'username' needs it");
                None
            }
            (None, Some(_)) => {
                found.add(format!("{path}.username"), "is missing: 'password' needs it");
                None
            }
        };
        registries.insert(host, Registry { plain_http: section.plain_http, ca_pem: section.ca_pem, login });
    }
    registries
}
