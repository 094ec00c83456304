//! Frames and stream packets on connections from the guest.
//!
//! Called by `vm::guest` (frames) and by whoever moves a container's stdio (packets). Invariant: what the guest sends is
//! untrusted; a length above the limit ends the connection before anything is allocated for it.

use atoll_spec::guest::{Channel, MAX_FRAME, MAX_PACKET};
use bytes::{Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Any byte stream from a guest: vsock, or a unix socket in tests.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// One connection from a guest.
pub type GuestStream = Box<dyn Duplex>;

fn bad(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// Reads one frame; `None` at a clean end.
pub async fn read_frame<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<T>> {
    let mut length = [0u8; 4];
    if from.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut length[1..]).await?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(bad(format!("frame of {length} bytes, at most {MAX_FRAME} are allowed")));
    }
    let mut frame = vec![0; length];
    from.read_exact(&mut frame).await?;
    serde_json::from_slice(&frame).map(Some).map_err(|e| bad(format!("unreadable frame: {e}")))
}

/// One frame as bytes.
pub fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).map_err(|e| bad(e.to_string()))?;
    let length = bytes.len() - 4;
    if length > MAX_FRAME {
        return Err(bad(format!("request of {length} bytes, at most {MAX_FRAME} fit a frame")));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// Reads one packet; `None` at a clean end.
pub async fn read_packet(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<(Channel, Bytes)>> {
    let mut head = [0u8; 5];
    if from.read(&mut head[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..]).await?;
    let channel = Channel::try_from(head[0]).map_err(|byte| bad(format!("unknown channel {byte}")))?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > MAX_PACKET {
        return Err(bad(format!("packet of {length} bytes, at most {MAX_PACKET} are allowed")));
    }
    let mut payload = BytesMut::zeroed(length);
    from.read_exact(&mut payload).await?;
    Ok(Some((channel, payload.freeze())))
}

/// Data as packets of at most [`MAX_PACKET`] bytes; no data is one empty packet.
pub fn packets(channel: Channel, data: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let mut chunks = data.chunks(MAX_PACKET);
    let first = chunks.next().unwrap_or_default();
    std::iter::once(first).chain(chunks).map(move |chunk| {
        let mut packet = Vec::with_capacity(5 + chunk.len());
        packet.push(channel as u8);
        packet.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        packet.extend_from_slice(chunk);
        packet
    })
}

/// Writes data as [`packets`]. Not cancel-safe: what follows half a packet is read as the rest of it.
pub async fn write_packets(
    to: &mut (impl AsyncWrite + Unpin),
    channel: Channel,
    data: &[u8],
) -> io::Result<()> {
    for packet in packets(channel, data) {
        to.write_all(&packet).await?;
    }
    to.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_spec::guest::Hello;
    use proptest::prelude::*;

    fn block<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    proptest! {
        #[test]
        fn anything_read_is_a_packet_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = block(read_packet(&mut &bytes[..]));
            let _ = block(read_frame::<Hello>(&mut &bytes[..]));
        }

        #[test]
        fn packets_survive_the_wire(data in proptest::collection::vec(any::<u8>(), 0..200_000)) {
            let mut wire = Vec::new();
            block(write_packets(&mut wire, Channel::Stdin, &data)).unwrap();
            let mut rest = &wire[..];
            let mut back = Vec::new();
            while let Some((channel, payload)) = block(read_packet(&mut rest)).unwrap() {
                prop_assert_eq!(channel, Channel::Stdin);
                back.extend_from_slice(&payload);
            }
            prop_assert_eq!(back, data);
        }
    }

    #[test]
    fn a_large_length_is_refused_before_it_is_allocated() {
        let mut wire: &[u8] = &[0xff, 0xff, 0xff, 0x7f, 0];
        assert!(block(read_frame::<Hello>(&mut wire)).is_err());
    }

    #[test]
    fn a_frame_is_read_back() {
        let hello = Hello::Stream { stream: 7 };
        let bytes = frame(&hello).unwrap();
        assert_eq!(block(read_frame::<Hello>(&mut &bytes[..])).unwrap(), Some(hello));
    }
}
