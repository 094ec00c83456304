//! A pod's resolver settings, host name and hosts file ◇.

use super::desired::Desired;
use atoll_cri::v1::DnsConfig;
use k8s_openapi::api::core::v1 as api;

/// Most name servers a resolver looks at.
const MAX_SERVERS: usize = 3;
/// Longest host name of Linux.
const MAX_HOSTNAME: usize = 63;

/// Where names are resolved.
#[derive(Debug, Clone, Default)]
pub struct ClusterDns {
    /// Text of the node's `resolv.conf`.
    pub node: String,
    /// The cluster's name server, when it has one.
    pub server: Option<String>,
    /// The cluster's domain.
    pub domain: String,
}

/// Reads a `resolv.conf`.
fn parse(text: &str) -> DnsConfig {
    let mut dns = DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
            Some("search") => dns.searches = words.map(str::to_owned).collect(),
            Some("options") => dns.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    dns
}

/// What goes into the pod's `resolv.conf`.
pub fn resolver(desired: &Desired, cluster: &ClusterDns) -> DnsConfig {
    let spec = desired.spec();
    let mut dns = match (spec.dns_policy.as_deref(), &cluster.server) {
        (Some("None"), _) => DnsConfig::default(),
        (Some("Default"), _) | (_, None) => parse(&cluster.node),
        (_, Some(server)) => {
            let domain = &cluster.domain;
            let own =
                [format!("{}.svc.{domain}", desired.key.namespace), format!("svc.{domain}"), domain.clone()];
            let mut searches: Vec<String> = own.into();
            searches.extend(parse(&cluster.node).searches.into_iter().filter(|s| s != "."));
            DnsConfig { servers: vec![server.clone()], searches, options: vec!["ndots:5".into()] }
        }
    };
    if let Some(extra) = &spec.dns_config {
        add(&mut dns, extra);
    }
    dns.servers.truncate(MAX_SERVERS);
    dns
}

fn add(dns: &mut DnsConfig, extra: &api::PodDNSConfig) {
    let missing = |have: &[String], more: &Option<Vec<String>>| -> Vec<String> {
        more.iter().flatten().filter(|m| !have.contains(m)).cloned().collect()
    };
    let servers = missing(&dns.servers, &extra.nameservers);
    dns.servers.extend(servers);
    let searches = missing(&dns.searches, &extra.searches);
    dns.searches.extend(searches);
    for option in extra.options.iter().flatten() {
        let Some(name) = &option.name else { continue };
        dns.options.retain(|o| o.split(':').next() != Some(name));
        dns.options
            .push(option.value.as_ref().map_or_else(|| name.clone(), |value| format!("{name}:{value}")));
    }
}

/// Host name of the pod, and its domain when it has a subdomain.
pub fn hostname(desired: &Desired, cluster_domain: &str) -> (String, Option<String>) {
    let spec = desired.spec();
    if let Some(name) = spec.hostname_override.as_ref().filter(|n| !n.is_empty()) {
        return (name.clone(), None);
    }
    let own = spec.hostname.as_ref().filter(|h| !h.is_empty()).unwrap_or(&desired.key.name);
    let mut short: String = own.chars().take(MAX_HOSTNAME).collect();
    while short.ends_with(['-', '.']) {
        short.pop();
    }
    let domain = spec.subdomain.as_ref().filter(|s| !s.is_empty());
    let domain = domain.map(|sub| format!("{sub}.{}.svc.{cluster_domain}", desired.key.namespace));
    match (&domain, spec.set_hostname_as_fqdn) {
        (Some(rest), Some(true)) => (format!("{short}.{rest}"), domain),
        _ => (short, domain),
    }
}

/// The pod's `/etc/hosts`.
pub fn hosts_file(desired: &Desired, ips: &[String], cluster_domain: &str) -> String {
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    let (name, domain) = hostname(desired, cluster_domain);
    let short = name.split('.').next().unwrap_or(&name);
    for ip in ips {
        match &domain {
            Some(domain) => text.push_str(&format!("{ip}\t{short}.{domain}\t{short}\n")),
            None => text.push_str(&format!("{ip}\t{name}\n")),
        }
    }
    let aliases: Vec<_> = desired.spec().host_aliases.iter().flatten().collect();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
    }
    for alias in aliases {
        text.push_str(&format!(
            "{}\t{}\n",
            alias.ip,
            alias.hostnames.iter().flatten().cloned().collect::<Vec<_>>().join("\t")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod;

    fn cluster(server: Option<&str>) -> ClusterDns {
        ClusterDns {
            node: "# by hand\nnameserver 192.0.2.1\nsearch lab.example\noptions edns0\n".into(),
            server: server.map(str::to_owned),
            domain: "cluster.local".into(),
        }
    }

    #[test]
    fn policies() {
        let with = |fields: &str| pod(&format!("{{containers: [{{name: a, image: i}}], {fields}}}"));
        let show = |d: &DnsConfig| {
            format!("{} | {} | {}", d.servers.join(","), d.searches.join(","), d.options.join(","))
        };
        let table = [
            ("dnsPolicy: Default", Some("10.96.0.10"), "192.0.2.1 | lab.example | edns0"),
            (
                "dnsPolicy: ClusterFirst",
                Some("10.96.0.10"),
                "10.96.0.10 | ns.svc.cluster.local,svc.cluster.local,cluster.local,lab.example | ndots:5",
            ),
            ("dnsPolicy: ClusterFirst", None, "192.0.2.1 | lab.example | edns0"),
            (
                "dnsPolicy: None, dnsConfig: {nameservers: [192.0.2.9], searches: [x], options: [{name: ndots, value: '2'}, {name: rotate}]}",
                None,
                "192.0.2.9 | x | ndots:2,rotate",
            ),
        ];
        for (fields, server, want) in table {
            assert_eq!(show(&resolver(&with(fields), &cluster(server))), want, "{fields}");
        }
    }

    #[test]
    fn names() {
        let of = |fields: &str| {
            hostname(&pod(&format!("{{containers: [{{name: a, image: i}}], {fields}}}")), "c.l")
        };
        assert_eq!(of("hostname: h"), ("h".into(), None));
        assert_eq!(of("dnsPolicy: Default"), ("p".into(), None));
        assert_eq!(of("subdomain: s"), ("p".into(), Some("s.ns.svc.c.l".into())));
        assert_eq!(of("subdomain: s, setHostnameAsFQDN: true").0, "p.s.ns.svc.c.l");
    }

    #[test]
    fn hosts() {
        let desired =
            pod("{containers: [{name: a, image: i}], hostAliases: [{ip: 192.0.2.7, hostnames: [x, y]}]}");
        let text = hosts_file(&desired, &["10.0.0.2".into()], "c.l");
        assert!(text.contains("\n10.0.0.2\tp\n"));
        assert!(text.ends_with("192.0.2.7\tx\ty\n"));
    }
}
