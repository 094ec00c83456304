//! Fuzz targets of what clients of exec, attach and port forwarding send.
//!
//! Called by the tests below (the corpus and a second of mutations) and by `fuzz/targets` (hours).

use super::remote::parse_sizes;
use super::spdy::{Connection, Reader};
use super::websocket;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

fn block<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime of one thread can be made").block_on(work)
}

/// SPDY frames, and a connection that is made of them; its streams are read to their ends.
pub fn spdy(data: &[u8]) {
    block(async {
        let mut reader = Reader::new(data);
        while let Ok(Some(_)) = reader.next().await {}

        let (client, ours) = tokio::io::duplex(1 << 16);
        let Connection { mut incoming, writer } = Connection::start(ours);
        let speak = async {
            let (mut from, mut to) = tokio::io::split(client);
            let _ = to.write_all(data).await;
            let _ = to.shutdown().await;
            let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
        };
        let take = async {
            let mut readers = tokio::task::JoinSet::new();
            while let Some(mut stream) = incoming.recv().await {
                readers.spawn(async move { while stream.data.recv().await.is_some() {} });
            }
            drop(writer);
            readers.join_all().await;
        };
        tokio::join!(speak, take);
    });
}

/// WebSocket frames, and the channel messages in them.
pub fn websocket(data: &[u8]) {
    for protocol in websocket::REMOTE {
        let _ = websocket::decode(protocol, &Bytes::copy_from_slice(data));
    }
    let mut buffer = Vec::new();
    for piece in data.chunks(7) {
        parse_sizes(&mut buffer, piece);
        assert!(buffer.len() <= 4096 + 7);
    }
    block(async {
        let (mut client, ours) = tokio::io::duplex(data.len() + 1);
        let _ = client.write_all(data).await;
        let _ = client.shutdown().await;
        let config = Some(websocket::config());
        let mut socket = WebSocketStream::from_raw_socket(ours, Role::Server, config).await;
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Binary(data) = message {
                assert!(data.len() <= websocket::MAX_MESSAGE);
                let _ = websocket::decode(websocket::REMOTE[0], &data);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::spdy::{Encoder, Frame};
    use super::*;
    use atoll_fuzz::replay;

    #[test]
    fn spdy_connections_come_to_an_end() {
        let headers = |kind: &str| vec![("streamtype".to_owned(), kind.to_owned())];
        let open = |stream, kind, fin| Frame::SynStream { stream, headers: headers(kind), fin };
        let data = |stream, fin| Frame::Data { stream, data: Bytes::from_static(b"some input"), fin };
        let sessions = [
            vec![open(1, "error", true), open(3, "stdin", false), data(3, false), data(3, true)],
            vec![open(1, "stdout", false), Frame::Reset { stream: 1, status: 5 }, data(1, true)],
            vec![
                Frame::Ping(1),
                Frame::Ping(2),
                Frame::GoAway { last: 9 },
                open(5, "x", false),
                open(5, "y", false),
            ],
            vec![Frame::SynReply { stream: 2, headers: headers("stdin") }, data(7, false)],
        ];
        let seeds = sessions.iter().map(|frames| {
            let mut encoder = Encoder::default();
            frames.iter().flat_map(|frame| encoder.encode(frame).unwrap()).collect()
        });
        replay("streaming_spdy", seeds.collect(), spdy);
    }

    /// A frame as clients send them, masked with zeros.
    fn frame(kind: u8, data: &[u8]) -> Vec<u8> {
        [&[0x80 | kind, 0x80 | data.len() as u8, 0, 0, 0, 0][..], data].concat()
    }

    #[test]
    fn websockets_come_to_an_end() {
        let seeds = vec![
            [frame(2, b"\x00input"), frame(2, &[255, 0]), frame(8, &[3, 232])].concat(),
            [frame(2, b"\x04{\"Width\":80,\"Height\":24}"), frame(9, b"ping"), frame(10, b"")].concat(),
            [frame(1, b"0aW5wdXQ="), frame(1, b"4e30="), frame(8, b"")].concat(),
            [vec![0x02, 0x81, 0, 0, 0, 0, 0], vec![0x80, 0x82, 0, 0, 0, 0, b'a', b'b']].concat(),
            [vec![0x82, 0xff], u64::MAX.to_be_bytes().to_vec(), vec![0; 4]].concat(),
        ];
        replay("streaming_websocket", seeds, websocket);
    }
}
