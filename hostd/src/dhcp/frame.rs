//! IPv4 and UDP around a DHCP message, for the time before the link has an address. ◇

use std::net::Ipv4Addr;

/// Where clients listen.
pub const CLIENT_PORT: u16 = 68;
/// Where servers listen.
pub const SERVER_PORT: u16 = 67;

/// The message as a packet from nobody to everybody, from the IP header on.
pub fn broadcast(payload: &[u8]) -> Vec<u8> {
    let udp_length = (payload.len() + 8) as u16;
    let mut packet = vec![0x45, 0x10];
    packet.extend((udp_length + 20).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet.extend(Ipv4Addr::UNSPECIFIED.octets());
    packet.extend(Ipv4Addr::BROADCAST.octets());
    let checksum = finish(sum(&packet, 0));
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut udp = Vec::with_capacity(payload.len() + 8);
    udp.extend(CLIENT_PORT.to_be_bytes());
    udp.extend(SERVER_PORT.to_be_bytes());
    udp.extend(udp_length.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    let pseudo = sum(&packet[12..20], 17 + u32::from(udp_length));
    let checksum = match finish(sum(&udp, pseudo)) {
        0 => 0xffff,
        other => other,
    };
    udp[6..8].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(udp);
    packet
}

/// What a packet to the client's port carries. The UDP checksum is not looked at: between virtual links the kernel
/// leaves it unfinished, and the message has its own identity to match.
pub fn payload(packet: &[u8]) -> Option<&[u8]> {
    let first = *packet.first()?;
    let header = usize::from(first & 0xf) * 4;
    let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    if first >> 4 != 4 || header < 20 || total < header + 8 {
        return None;
    }
    let packet = packet.get(..total)?;
    if packet[9] != 17 || finish(sum(&packet[..header], 0)) != 0 {
        return None;
    }
    let udp = &packet[header..];
    let length = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
    if u16::from_be_bytes([udp[2], udp[3]]) != CLIENT_PORT || length < 8 {
        return None;
    }
    udp.get(8..length)
}

fn sum(bytes: &[u8], start: u32) -> u32 {
    let word = |c: &[u8]| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]));
    bytes.chunks(2).fold(start, |total, chunk| total + word(chunk))
}

fn finish(mut total: u32) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn checksums_add_up(data in proptest::collection::vec(any::<u8>(), 0..600)) {
            let packet = broadcast(&data);
            prop_assert_eq!(finish(sum(&packet[..20], 0)), 0);
            let udp_length = packet.len() as u32 - 20;
            prop_assert_eq!(finish(sum(&packet[20..], sum(&packet[12..20], 17 + udp_length))), 0);
            // To the client's port instead of the server's, it is taken apart again.
            let mut packet = packet;
            packet[23] = 68;
            prop_assert_eq!(payload(&packet), Some(&data[..]));
        }

        #[test]
        fn no_bytes_make_it_panic(first in any::<bool>(), mut data in proptest::collection::vec(any::<u8>(), 0..100)) {
            if first && !data.is_empty() { data[0] = 0x45; }
            let _ = payload(&data);
        }
    }
}
