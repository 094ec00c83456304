//! Stream packets as bytes: 1 byte channel, 4 bytes length (little endian), payload.

use atoll_spec::guest::Channel;

/// Bytes before the payload.
pub const HEADER: usize = 5;

/// One packet.
pub fn packet(channel: Channel, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(HEADER + payload.len());
    packet.push(channel as u8);
    // At most MAX_PACKET.
    packet.extend((payload.len() as u32).to_le_bytes());
    packet.extend(payload);
    packet
}

/// Splits a whole packet off: channel, payload, rest.
pub fn next_packet(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
    let length = usize::try_from(length).ok()?;
    let (payload, rest) = rest.split_at_checked(length)?;
    Some((header[0], payload, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_split_where_they_were_joined() {
        let mut bytes = packet(Channel::Stdin, b"abc");
        bytes.extend(packet(Channel::Resize, &[80, 0, 24, 0]));
        let (channel, payload, rest) = next_packet(&bytes).unwrap();
        assert_eq!((channel, payload), (0, &b"abc"[..]));
        let (channel, payload, rest) = next_packet(rest).unwrap();
        assert_eq!((channel, payload.len(), rest.len()), (3, 4, 0));
        assert!(next_packet(&bytes[..6]).is_none());
        assert!(next_packet(&[0, 255, 255, 255, 255, 0]).is_none());
    }
}
