//! DHCP messages as bytes, and the lease that a server's answer describes. ◇

use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
const HEADER: usize = 236;

/// What a message is (option 53).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Client looks for servers.
    Discover,
    /// Server offers an address.
    Offer,
    /// Client asks for an address, or to keep it.
    Request,
    /// Client found the address in use.
    Decline,
    /// Server agrees.
    Ack,
    /// Server refuses.
    Nak,
    /// Client gives the address back.
    Release,
}

impl Kind {
    const ALL: [(u8, Self); 7] = [
        (1, Self::Discover),
        (2, Self::Offer),
        (3, Self::Request),
        (4, Self::Decline),
        (5, Self::Ack),
        (6, Self::Nak),
        (7, Self::Release),
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.iter().find(|(code, _)| *code == byte).map(|(_, kind)| *kind)
    }

    fn byte(self) -> u8 {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or(0, |(code, _)| *code)
    }
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// From a server.
    pub reply: bool,
    /// What it is.
    pub kind: Kind,
    /// Which exchange it belongs to.
    pub xid: u32,
    /// Seconds since the client began.
    pub secs: u16,
    /// The client's address, when it has one.
    pub ciaddr: Ipv4Addr,
    /// The address the server gives.
    pub yiaddr: Ipv4Addr,
    /// The client's hardware address.
    pub mac: [u8; 6],
    /// The other options, by number; parts of a long option are joined.
    pub options: BTreeMap<u8, Vec<u8>>,
}

impl Message {
    /// The message as it goes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER];
        out[0] = if self.reply { 2 } else { 1 };
        out[1] = 1;
        out[2] = 6;
        out[4..8].copy_from_slice(&self.xid.to_be_bytes());
        out[8..10].copy_from_slice(&self.secs.to_be_bytes());
        out[12..16].copy_from_slice(&self.ciaddr.octets());
        out[16..20].copy_from_slice(&self.yiaddr.octets());
        out[28..34].copy_from_slice(&self.mac);
        out.extend(COOKIE);
        out.extend([53, 1, self.kind.byte()]);
        for (code, value) in &self.options {
            for part in value.chunks(255) {
                out.extend([*code, part.len() as u8]);
                out.extend(part);
            }
        }
        out.push(255);
        // Some relays drop what is shorter than a BOOTP message.
        out.resize(out.len().max(300), 0);
        out
    }

    /// Reads a message; `None` for anything that is not a DHCP message over Ethernet.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let header = bytes.get(..HEADER)?;
        if !matches!(header[0], 1 | 2)
            || header[1] != 1
            || header[2] != 6
            || bytes.get(HEADER..HEADER + 4)? != COOKIE
        {
            return None;
        }
        let mut options = BTreeMap::new();
        read_options(bytes.get(HEADER + 4..)?, &mut options);
        // Options may go on in the two name fields (option 52): 1 is `file`, 2 is `sname`, 3 is both, `file` first.
        let overload = options.remove(&52).and_then(|v: Vec<u8>| v.first().copied()).unwrap_or(0);
        if overload & 1 != 0 {
            read_options(&header[108..236], &mut options);
        }
        if overload & 2 != 0 {
            read_options(&header[44..108], &mut options);
        }
        let kind = options.remove(&53).filter(|v| v.len() == 1).and_then(|v| Kind::from_byte(v[0]))?;
        let ip = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
        Some(Self {
            reply: header[0] == 2,
            kind,
            xid: u32::from_be_bytes(header[4..8].try_into().ok()?),
            secs: u16::from_be_bytes(header[8..10].try_into().ok()?),
            ciaddr: ip(12),
            yiaddr: ip(16),
            mac: header[28..34].try_into().ok()?,
            options,
        })
    }

    /// The one address an option holds.
    pub fn address(&self, code: u8) -> Option<Ipv4Addr> {
        self.addresses(code).first().copied()
    }

    fn addresses(&self, code: u8) -> Vec<Ipv4Addr> {
        let value = self.options.get(&code).map(Vec::as_slice).unwrap_or_default();
        value.chunks_exact(4).map(|c| Ipv4Addr::new(c[0], c[1], c[2], c[3])).collect()
    }

    fn number(&self, code: u8) -> Option<u32> {
        match self.options.get(&code)?.as_slice() {
            [a, b] => Some(u32::from(u16::from_be_bytes([*a, *b]))),
            [a, b, c, d] => Some(u32::from_be_bytes([*a, *b, *c, *d])),
            _ => None,
        }
    }

    /// A name, lower case, when it is one that can be used as host name or domain.
    fn name(&self, code: u8) -> Option<String> {
        let text = std::str::from_utf8(self.options.get(&code)?).ok()?;
        let text = text.trim_end_matches('\0').trim_end_matches('.').to_ascii_lowercase();
        let label = |l: &str| {
            !l.is_empty()
                && l.len() <= 63
                && !l.starts_with('-')
                && !l.ends_with('-')
                && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        (text.len() <= 253 && text.split('.').all(label)).then_some(text)
    }
}

fn read_options(mut bytes: &[u8], options: &mut BTreeMap<u8, Vec<u8>>) {
    while let Some((&code, rest)) = bytes.split_first() {
        match code {
            0 => bytes = rest,
            255 => return,
            _ => {
                let Some((&length, rest)) = rest.split_first() else { return };
                let Some((value, rest)) = rest.split_at_checked(usize::from(length)) else { return };
                options.entry(code).or_default().extend(value);
                bytes = rest;
            }
        }
    }
}

/// What a server granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The address with its network's prefix length.
    pub address: Ipv4Net,
    /// Who granted it.
    pub server: Ipv4Addr,
    /// Destinations and gateways; an unspecified gateway means the destination is on the link.
    pub routes: Vec<(Ipv4Net, Ipv4Addr)>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Domain for names without a dot.
    pub domain: Option<String>,
    /// NTP servers.
    pub ntp: Vec<Ipv4Addr>,
    /// The name the server has for this host.
    pub hostname: Option<String>,
    /// The link's MTU.
    pub mtu: Option<u32>,
    /// Seconds until it ends; `None` is for ever.
    pub seconds: Option<u32>,
    /// Seconds until it should be renewed with the server that granted it.
    pub renew_after: u32,
    /// Seconds until any server may renew it.
    pub rebind_after: u32,
}

/// Shortest lease that is honoured; a server that hands out less would keep the host busy with renewing.
const MIN_LEASE: u32 = 30;

impl Lease {
    /// Reads an offer or an acknowledgement; `None` when it cannot be used.
    pub fn from_message(message: &Message) -> Option<Self> {
        let ip = message.yiaddr;
        if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() || ip.is_loopback() {
            return None;
        }
        let mask = message.address(1).map_or(classful(ip), u32::from);
        let prefix = mask.leading_ones();
        if mask.checked_shl(prefix).unwrap_or(0) != 0 || prefix == 0 {
            return None;
        }
        let address = Ipv4Net::new(ip, prefix as u8).ok()?;
        let seconds = message.number(51).filter(|s| *s != u32::MAX).map(|s| s.max(MIN_LEASE));
        let whole = seconds.unwrap_or(u32::MAX);
        let rebind_after = message.number(59).filter(|t| *t < whole).unwrap_or(whole / 8 * 7);
        let renew_after =
            message.number(58).filter(|t| *t < rebind_after).unwrap_or((whole / 2).min(rebind_after));
        let classless = message.options.get(&121).map(|bytes| classless_routes(bytes)).unwrap_or_default();
        // RFC 3442: a server's classless routes replace its routers.
        let routes = if classless.is_empty() {
            message.addresses(3).first().map(|router| (Ipv4Net::default(), *router)).into_iter().collect()
        } else {
            classless
        };
        Some(Self {
            address,
            server: message.address(54)?,
            routes,
            dns: message.addresses(6),
            domain: message.name(15),
            ntp: message.addresses(42),
            hostname: message.name(12),
            mtu: message.number(26).filter(|mtu| (576..=9216).contains(mtu)),
            seconds,
            renew_after,
            rebind_after,
        })
    }
}

fn classful(ip: Ipv4Addr) -> u32 {
    match ip.octets()[0] {
        0..=127 => 0xff00_0000,
        128..=191 => 0xffff_0000,
        _ => 0xffff_ff00,
    }
}

fn classless_routes(mut bytes: &[u8]) -> Vec<(Ipv4Net, Ipv4Addr)> {
    let mut routes = Vec::new();
    while let Some((&prefix, rest)) = bytes.split_first() {
        let significant = usize::from(prefix).div_ceil(8);
        if prefix > 32 || rest.len() < significant + 4 {
            break;
        }
        let mut network = [0; 4];
        network[..significant].copy_from_slice(&rest[..significant]);
        let via = &rest[significant..significant + 4];
        if let Ok(net) = Ipv4Net::new(network.into(), prefix) {
            routes.push((net.trunc(), Ipv4Addr::new(via[0], via[1], via[2], via[3])));
        }
        bytes = &rest[significant + 4..];
    }
    routes
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn offer(kind: Kind, xid: u32, options: &[(u8, &[u8])]) -> Message {
        let mut all = BTreeMap::from([(54, vec![10, 0, 0, 1]), (1, vec![255, 255, 255, 0])]);
        all.extend(options.iter().map(|(code, value)| (*code, value.to_vec())));
        Message {
            reply: true,
            kind,
            xid,
            secs: 0,
            ciaddr: Ipv4Addr::UNSPECIFIED,
            yiaddr: Ipv4Addr::new(10, 0, 0, 7),
            mac: [2, 0, 0, 0, 0, 1],
            options: all,
        }
    }

    #[test]
    fn a_lease_holds_what_the_options_say() {
        let message = offer(
            Kind::Ack,
            1,
            &[
                (51, &3600u32.to_be_bytes()),
                (3, &[10, 0, 0, 1]),
                (6, &[10, 0, 0, 2, 10, 0, 0, 3]),
                (12, b"Node-7"),
                (15, b"example.org."),
                (26, &[5, 220]),
                (42, &[10, 0, 0, 4]),
            ],
        );
        let lease = Lease::from_message(&message).unwrap();
        assert_eq!(lease.address.to_string(), "10.0.0.7/24");
        assert_eq!(lease.routes, [(Ipv4Net::default(), Ipv4Addr::new(10, 0, 0, 1))]);
        assert_eq!((lease.dns.len(), lease.ntp.len(), lease.mtu), (2, 1, Some(1500)));
        assert_eq!(
            (lease.hostname.as_deref(), lease.domain.as_deref()),
            (Some("node-7"), Some("example.org"))
        );
        assert_eq!((lease.seconds, lease.renew_after, lease.rebind_after), (Some(3600), 1800, 3150));
    }

    #[test]
    fn classless_routes_replace_the_router() {
        let routes = [24, 192, 168, 5, 10, 0, 0, 9, 0, 10, 0, 0, 1, 32, 169, 254, 169, 254, 0, 0, 0, 0];
        let lease =
            Lease::from_message(&offer(Kind::Ack, 1, &[(3, &[10, 0, 0, 99]), (121, &routes)])).unwrap();
        let text: Vec<String> = lease.routes.iter().map(|(to, via)| format!("{to} {via}")).collect();
        assert_eq!(text, ["192.168.5.0/24 10.0.0.9", "0.0.0.0/0 10.0.0.1", "169.254.169.254/32 0.0.0.0"]);
        assert_eq!(lease.seconds, None);
    }

    #[test]
    fn unusable_leases_are_refused() {
        let mut message = offer(Kind::Ack, 1, &[]);
        message.yiaddr = Ipv4Addr::UNSPECIFIED;
        assert_eq!(Lease::from_message(&message), None);
        assert_eq!(Lease::from_message(&offer(Kind::Ack, 1, &[(1, &[255, 0, 255, 0])])), None);
        assert_eq!(Lease::from_message(&offer(Kind::Ack, 1, &[(12, b"-bad name")])).unwrap().hostname, None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(head in any::<bool>(), bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
            let mut all = if head { offer(Kind::Ack, 1, &[]).encode()[..240].to_vec() } else { Vec::new() };
            all.extend(bytes);
            if let Some(message) = Message::parse(&all) { let _ = Lease::from_message(&message); }
        }

        #[test]
        fn what_is_written_is_read(xid in any::<u32>(), secs in any::<u16>(), mac in any::<[u8; 6]>(), long in
            proptest::collection::vec(any::<u8>(), 1..600), code in 54u8..254) {
            let mut message = offer(Kind::Offer, xid, &[(code, &long)]);
            (message.mac, message.secs) = (mac, secs);
            prop_assert_eq!(Message::parse(&message.encode()), Some(message));
        }
    }
}
