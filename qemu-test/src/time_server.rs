//! An SNTP server (RFC 4330 §6) with the machine's own clock, for hosts that set theirs at boot.

use anyhow::Context;
use std::net::UdpSocket;
use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds from 1900, where NTP starts to count, to 1970.
const NTP_TO_UNIX: u64 = 2_208_988_800;

/// Answers until the process ends.
#[derive(Debug)]
pub struct TimeServer;

impl TimeServer {
    /// Binds UDP port 123 of `address` and answers in a thread of its own.
    ///
    /// # Errors
    /// When the port cannot be bound.
    pub fn start(address: &str) -> anyhow::Result<Self> {
        let socket =
            UdpSocket::bind((address, 123)).with_context(|| format!("cannot bind UDP {address}:123"))?;
        std::thread::spawn(move || {
            let mut packet = [0u8; 512];
            while let Ok((length, peer)) = socket.recv_from(&mut packet) {
                if let Some(answer) = answer(&packet[..length], SystemTime::now()) {
                    // A client that went away asks again.
                    let _ = socket.send_to(&answer, peer);
                }
            }
        });
        Ok(Self)
    }
}

/// The answer to a client's packet; `None` for what is not a client request.
fn answer(request: &[u8], now: SystemTime) -> Option<[u8; 48]> {
    let mode = request.first()? & 7;
    if request.len() < 48 || mode != 3 {
        return None;
    }
    let since = now.duration_since(UNIX_EPOCH).ok()?;
    let seconds = u32::try_from((since.as_secs() + NTP_TO_UNIX) & 0xffff_ffff).ok()?;
    let fraction = u32::try_from((u64::from(since.subsec_nanos()) << 32) / 1_000_000_000).ok()?;
    let mut stamp = [0u8; 8];
    stamp[..4].copy_from_slice(&seconds.to_be_bytes());
    stamp[4..].copy_from_slice(&fraction.to_be_bytes());
    let mut packet = [0u8; 48];
    packet[0] = (4 << 3) | 4;
    packet[1] = 2;
    packet[2] = request[2];
    packet[3] = 0xec;
    packet[12..16].copy_from_slice(b"LOCL");
    packet[16..24].copy_from_slice(&stamp);
    packet[24..32].copy_from_slice(&request[40..48]);
    packet[32..40].copy_from_slice(&stamp);
    packet[40..48].copy_from_slice(&stamp);
    Some(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn answers_clients_only_and_echoes_their_stamp() {
        let mut request = [0u8; 48];
        assert_eq!(answer(&request, UNIX_EPOCH), None);
        request[0] = (4 << 3) | 3;
        request[40..48].copy_from_slice(&[7; 8]);
        let packet = answer(&request, UNIX_EPOCH + Duration::from_millis(500)).unwrap();
        assert_eq!(packet[24..32], [7; 8]);
        assert_eq!(u32::from_be_bytes(packet[40..44].try_into().unwrap()), 2_208_988_800);
        assert_eq!(u32::from_be_bytes(packet[44..48].try_into().unwrap()), 1 << 31);
    }
}
