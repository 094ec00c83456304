//! What a router says of names (RFC 8106) and of DHCPv6 in its advertisement (RFC 4861); its addresses and routes are the
//! kernel's business. And the question for it. ◇
//!
//! Packets begin at the IPv6 header, for they come from and go to a packet socket.

use std::net::Ipv6Addr;

const HEADER: usize = 40;
const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 133;
const ADVERTISEMENT: u8 = 134;
const NAME_SERVERS: u8 = 25;
/// Only a neighbour can send it: each router on the way would have made it less.
const HOPS: u8 = 255;
/// All routers on the link.
pub const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// An advertisement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advert {
    /// Whose it is.
    pub router: Ipv6Addr,
    /// Whether addresses are to be asked for by DHCPv6.
    pub managed: bool,
    /// Whether the rest, such as name servers, is to be asked for by DHCPv6.
    pub other: bool,
    /// Name servers, and for how many seconds each is good; 0 takes it back.
    pub name_servers: Vec<(Ipv6Addr, u32)>,
}

impl Advert {
    /// Reads a packet; `None` for anything but a whole advertisement of a neighbour.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let header = packet.get(..HEADER)?;
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let message = packet.get(HEADER..HEADER + length)?;
        let router = address(&header[8..24])?;
        if header[0] >> 4 != 6
            || header[6] != ICMPV6
            || header[7] != HOPS
            || !router.is_unicast_link_local()
            || message.len() < 16
            || message[..2] != [ADVERTISEMENT, 0]
            || checksum(&header[8..40], message) != 0
        {
            return None;
        }
        let flags = message[5];
        let mut advert =
            Self { router, managed: flags & 0x80 != 0, other: flags & 0x40 != 0, name_servers: Vec::new() };
        let mut options = &message[16..];
        while let [kind, units, ..] = options {
            // In units of eight bytes; 0 would have no end.
            let (option, rest) = options.split_at_checked(usize::from(*units) * 8).filter(|_| *units > 0)?;
            if *kind == NAME_SERVERS && option.len() >= 24 {
                let seconds = u32::from_be_bytes([option[4], option[5], option[6], option[7]]);
                let servers = option[8..].chunks_exact(16).filter_map(address);
                advert.name_servers.extend(servers.map(|server| (server, seconds)));
            }
            options = rest;
        }
        Some(advert)
    }
}

/// Asks all routers on the link for an advertisement; from nobody, because the link may have no address yet.
pub fn solicitation() -> Vec<u8> {
    let mut message = [SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    let mut packet = vec![0x60, 0, 0, 0, 0, message.len() as u8, ICMPV6, HOPS];
    packet.extend(Ipv6Addr::UNSPECIFIED.octets());
    packet.extend(ALL_ROUTERS.octets());
    let sum = checksum(&packet[8..40], &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    packet.extend(message);
    packet
}

fn address(bytes: &[u8]) -> Option<Ipv6Addr> {
    <[u8; 16]>::try_from(bytes).ok().map(Ipv6Addr::from)
}

/// Over both addresses, the length, the protocol and the message; 0 when the message has the right one in it.
fn checksum(addresses: &[u8], message: &[u8]) -> u16 {
    let word = |c: &[u8]| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]));
    let words = addresses.chunks(2).chain(message.chunks(2)).map(word);
    let mut total = message.len() as u32 + u32::from(ICMPV6) + words.sum::<u32>();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(from: Ipv6Addr, flags: u8, options: &[u8]) -> Vec<u8> {
        let mut message = vec![ADVERTISEMENT, 0, 0, 0, 64, flags, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        message.extend(options);
        let mut packet = vec![0x60, 0, 0, 0, 0, message.len() as u8, ICMPV6, HOPS];
        packet.extend(from.octets());
        packet.extend(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets());
        let sum = checksum(&packet[8..40], &message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        packet.extend(message);
        packet
    }

    fn router() -> Ipv6Addr {
        "fe80::1".parse().unwrap()
    }

    fn servers() -> Vec<u8> {
        let mut option = vec![NAME_SERVERS, 5, 0, 0, 0, 0, 2, 88];
        for server in ["2001:db8::53", "2001:db8::54"] {
            option.extend(server.parse::<Ipv6Addr>().unwrap().octets());
        }
        option
    }

    #[test]
    fn name_servers_and_flags_are_read() {
        let mtu = [5, 1, 0, 0, 0, 0, 5, 220];
        let advert = Advert::parse(&packet(router(), 0x40, &[&mtu[..], &servers()].concat())).unwrap();
        assert_eq!((advert.router, advert.managed, advert.other), (router(), false, true));
        let found: Vec<String> = advert.name_servers.iter().map(|(ip, s)| format!("{ip} {s}")).collect();
        assert_eq!(found, ["2001:db8::53 600", "2001:db8::54 600"]);
        assert!(Advert::parse(&packet(router(), 0x80, &[])).unwrap().managed);
    }

    #[test]
    fn only_whole_advertisements_of_neighbours_count() {
        let good = packet(router(), 0, &servers());
        assert!(Advert::parse(&good).is_some());
        assert_eq!(Advert::parse(&packet("2001:db8::1".parse().unwrap(), 0, &[])), None, "not a neighbour's");
        for (at, value, what) in [
            (7, 64, "from beyond the link"),
            (40, 135, "another message"),
            (70, 1, "its checksum"),
            (6, 17, "UDP"),
        ] {
            let mut packet = good.clone();
            packet[at] = value;
            assert_eq!(Advert::parse(&packet), None, "{what}");
        }
        assert_eq!(Advert::parse(&packet(router(), 0, &[25, 0, 1, 1])), None, "an option without a length");
    }

    #[test]
    fn a_question_has_the_right_checksum() {
        let packet = solicitation();
        assert_eq!(checksum(&packet[8..40], &packet[40..]), 0);
        assert_eq!(packet.len(), 48);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), real in any::<bool>()) {
            let _ = Advert::parse(&bytes);
            // Also past the checksum.
            if real { let _ = Advert::parse(&packet(router(), 0, &bytes)); }
        }
    }
}
