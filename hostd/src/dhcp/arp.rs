//! ARP as far as a probe for an address needs it (RFC 5227): whether somebody on the link has it already. ◇

use std::net::Ipv4Addr;

/// Bytes of a packet for IPv4 over Ethernet.
const LENGTH: usize = 28;
/// Hardware Ethernet, protocol IPv4, their addresses' lengths.
const HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// Asks everybody on the link for an address, saying nothing of one's own.
pub fn probe(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut packet = Vec::with_capacity(LENGTH);
    packet.extend(HEAD);
    packet.extend([0, 1]);
    packet.extend(mac);
    packet.extend(Ipv4Addr::UNSPECIFIED.octets());
    packet.extend([0; 6]);
    packet.extend(address.octets());
    packet
}

/// Who else has the address, or is about to take it, by a packet that was seen on the link.
pub fn owner(packet: &[u8], mac: [u8; 6], address: Ipv4Addr) -> Option<[u8; 6]> {
    let packet: &[u8; LENGTH] = packet.get(..LENGTH)?.try_into().ok()?;
    let sender: [u8; 6] = packet[8..14].try_into().ok()?;
    let ip = |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
    let (request, reply) = (packet[6..8] == [0, 1], packet[6..8] == [0, 2]);
    let probes = request && ip(14).is_unspecified() && ip(24) == address;
    let has = (request || reply) && ip(14) == address;
    (packet[..6] == HEAD && sender != mac && (has || probes)).then_some(sender)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ME: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);

    /// A packet of the other's, changed.
    fn packet(operation: u8, sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let mut packet = probe(OTHER, ADDRESS);
        packet[7] = operation;
        packet[14..18].copy_from_slice(&sender);
        packet[24..28].copy_from_slice(&target);
        packet
    }

    #[test]
    fn whoever_speaks_as_the_address_or_probes_for_it_is_its_owner() {
        let (mine, none) = (ADDRESS.octets(), [0; 4]);
        assert_eq!(owner(&packet(2, mine, none), ME, ADDRESS), Some(OTHER), "an answer");
        assert_eq!(owner(&packet(1, mine, mine), ME, ADDRESS), Some(OTHER), "an announcement");
        assert_eq!(owner(&probe(OTHER, ADDRESS), ME, ADDRESS), Some(OTHER), "another's probe");
        assert_eq!(owner(&probe(ME, ADDRESS), ME, ADDRESS), None, "one's own probe");
        assert_eq!(owner(&packet(1, [10, 0, 0, 8], mine), ME, ADDRESS), None, "someone asks for it");
        assert_eq!(owner(&packet(2, [10, 0, 0, 8], none), ME, ADDRESS), None, "another address");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            owner(&bytes, ME, ADDRESS);
        }
    }
}
