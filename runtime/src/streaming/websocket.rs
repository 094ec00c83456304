//! WebSocket: the channel protocols `v5.channel.k8s.io`, `v4.channel.k8s.io`, their base64 forms and their ancestors.
//!
//! A message is one channel byte and data. Called by `server`. Invariants: version 5's close message ends one channel;
//! the status goes out on the error channel before the socket is closed.

use super::Streams;
use super::remote::{Out, Size, parse_sizes};
use crate::console::Output;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// Version 5: the next byte names a channel that has ended.
const CLOSE: u8 = 255;

/// Largest message.
pub(super) const MAX_MESSAGE: usize = 1 << 20;
/// Largest piece of data in one message.
const PIECE: usize = 32 << 10;
/// How long the peer may take to close.
const LINGER: Duration = Duration::from_secs(5);

/// A variant of the channel protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    /// Its name.
    pub name: &'static str,
    base64: bool,
    json: bool,
    closes: bool,
}

const fn protocol(name: &'static str, base64: bool, json: bool, closes: bool) -> Protocol {
    Protocol { name, base64, json, closes }
}

/// What exec and attach speak.
pub const REMOTE: [Protocol; 5] = [
    protocol("v5.channel.k8s.io", false, true, true),
    protocol("v4.channel.k8s.io", false, true, false),
    protocol("v4.base64.channel.k8s.io", true, true, false),
    protocol("channel.k8s.io", false, false, false),
    protocol("base64.channel.k8s.io", true, false, false),
];

/// What port forwarding speaks.
pub const FORWARD: [Protocol; 2] = [
    protocol("v4.channel.k8s.io", false, true, false),
    protocol("v4.base64.channel.k8s.io", true, true, false),
];

/// What a client that names none gets.
pub const UNNAMED: Protocol = protocol("", false, false, false);

/// A connection.
pub struct Socket {
    stream: WebSocketStream<TokioIo<Upgraded>>,
    protocol: Protocol,
}

/// Receives data of channels.
pub struct Receiver {
    stream: SplitStream<WebSocketStream<TokioIo<Upgraded>>>,
    protocol: Protocol,
}

/// Sends data on channels.
pub struct Sender {
    sink: SplitSink<WebSocketStream<TokioIo<Upgraded>>, Message>,
    protocol: Protocol,
}

/// What a client sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// Data of a channel.
    Data(u8, Bytes),
    /// A channel has ended.
    Closed(u8),
}

impl Socket {
    /// Takes an upgraded connection.
    pub async fn new(upgraded: Upgraded, protocol: Protocol) -> Self {
        let config = Some(config());
        let stream = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, config).await;
        Self { stream, protocol }
    }

    /// Both directions apart.
    pub fn split(self) -> (Sender, Receiver) {
        let (sink, stream) = self.stream.split();
        (Sender { sink, protocol: self.protocol }, Receiver { stream, protocol: self.protocol })
    }
}

/// Bounds of what a client may send.
pub(super) fn config() -> WebSocketConfig {
    WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE))
}

impl Receiver {
    /// The next data; `None` at the end. Cancel-safe, as the socket keeps what is half received.
    pub async fn next(&mut self) -> Option<Received> {
        loop {
            let message = match self.stream.next().await? {
                Ok(Message::Binary(data)) => data,
                Ok(Message::Text(text)) => Bytes::from(text.as_bytes().to_vec()),
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => continue,
            };
            if let Some(received) = decode(self.protocol, &message) {
                return Some(received);
            }
        }
    }
}

pub(super) fn decode(protocol: Protocol, message: &Bytes) -> Option<Received> {
    let (&channel, data) = message.split_first()?;
    if protocol.closes && channel == CLOSE {
        return data.first().map(|c| Received::Closed(*c));
    }
    if protocol.base64 {
        let data = STANDARD.decode(data).ok()?;
        return Some(Received::Data(channel.checked_sub(b'0')?, data.into()));
    }
    Some(Received::Data(channel, message.slice(1..)))
}

fn encode(protocol: Protocol, channel: u8, data: &[u8]) -> Message {
    if protocol.base64 {
        return Message::text(format!("{}{}", char::from(b'0' + channel), STANDARD.encode(data)));
    }
    let mut message = Vec::with_capacity(1 + data.len());
    message.push(channel);
    message.extend_from_slice(data);
    Message::binary(message)
}

impl Sender {
    /// Data of a channel; none is a message, too.
    pub async fn send(&mut self, channel: u8, data: &[u8]) -> Result<(), WsError> {
        let mut pieces = data.chunks(PIECE);
        let mut next = Some(pieces.next().unwrap_or_default());
        while let Some(piece) = next {
            self.sink.feed(encode(self.protocol, channel, piece)).await?;
            next = pieces.next();
        }
        self.sink.flush().await
    }

    /// Says goodbye, as clients want to hear it: normal closure.
    pub async fn close(mut self) {
        let goodbye = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        let close = async {
            self.sink.send(Message::Close(Some(goodbye))).await?;
            self.sink.flush().await
        };
        let _ = tokio::time::timeout(LINGER, close).await; // gone is closed, too
    }
}

/// Carries exec and attach.
pub(super) async fn serve_remote(
    socket: Socket,
    streams: Streams,
    stdin: mpsc::Sender<Bytes>,
    sizes: mpsc::Sender<Size>,
    mut outgoing: mpsc::Receiver<Out>,
) {
    let json = socket.protocol.json;
    let (mut sender, mut receiver) = socket.split();
    let first = if streams.stdout {
        STDOUT
    } else if streams.stderr {
        STDERR
    } else {
        ERROR
    };
    // Tells the client that the connection stands.
    if sender.send(first, &[]).await.is_err() {
        return;
    }
    let receive = async {
        let mut stdin = Some(stdin);
        let mut buffer = Vec::new();
        while let Some(received) = receiver.next().await {
            match received {
                Received::Data(STDIN, data) => {
                    if let Some(stdin) = &stdin {
                        let _ = stdin.send(data).await; // the command may have ended
                    }
                }
                Received::Data(RESIZE, data) => {
                    for size in parse_sizes(&mut buffer, &data) {
                        let _ = sizes.send(size).await; // as above
                    }
                }
                Received::Closed(STDIN) => stdin = None,
                Received::Data(..) | Received::Closed(_) => {}
            }
        }
    };
    let send = async {
        while let Some(out) = outgoing.recv().await {
            match out {
                Out::Output(Output::Stdout(data)) if streams.stdout => sender.send(STDOUT, &data).await?,
                Out::Output(Output::Stderr(data)) if streams.stderr => sender.send(STDERR, &data).await?,
                Out::Output(_) => {}
                Out::Status(ending) => {
                    let text = if json { ending.json() } else { ending.text() };
                    if !text.is_empty() {
                        sender.send(ERROR, text.as_bytes()).await?;
                    }
                    break;
                }
            }
        }
        Ok::<_, WsError>(sender)
    };
    tokio::pin!(receive);
    // The client's end ends the session; the session's end closes the socket, and waits for the client to do so, too.
    tokio::select! {
        () = &mut receive => {}
        sender = send => if let Ok(sender) = sender {
            sender.close().await;
            let _ = tokio::time::timeout(LINGER, receive).await; // the peer closes, or is closed
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn messages_survive_the_wire(channel in 0u8..10, data in proptest::collection::vec(any::<u8>(), 0..100)) {
            for protocol in REMOTE {
                let bytes = match encode(protocol, channel, &data) {
                    Message::Binary(bytes) => bytes,
                    Message::Text(text) => Bytes::from(text.as_bytes().to_vec()),
                    _ => unreachable!(),
                };
                prop_assert_eq!(decode(protocol, &bytes), Some(Received::Data(channel, data.clone().into())));
            }
        }
    }

    #[test]
    fn only_version_five_closes_channels() {
        let message = Bytes::from_static(&[255, 0]);
        assert_eq!(decode(REMOTE[0], &message), Some(Received::Closed(0)));
        assert_eq!(decode(REMOTE[1], &message), Some(Received::Data(255, Bytes::from_static(&[0]))));
        assert_eq!(decode(REMOTE[0], &Bytes::new()), None);
    }
}
