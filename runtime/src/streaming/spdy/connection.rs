//! Streams of a SPDY connection, server side: the peer opens them, all are accepted.
//!
//! Called by `remote` and `forward`. Invariants: a stream's data arrives in order; a stream whose reader is gone is read
//! and dropped, so it does not hold up the others.

use super::frame::{Encoder, Frame, Headers, Reader};
use bytes::Bytes;
use std::collections::HashMap;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// Frames that wait to be written.
const OUTGOING: usize = 64;
/// Data frames of one stream that wait to be read.
const QUEUED: usize = 64;
/// Most streams of one connection.
const MOST_STREAMS: usize = 1024;
/// Largest piece of data in one frame; smaller than what peers accept.
const PIECE: usize = 32 << 10;
/// How long the peer may take to close after we are done.
const LINGER: Duration = Duration::from_secs(10);

/// A stream that the peer opened.
#[derive(Debug)]
pub struct Incoming {
    /// Its number.
    pub stream: u32,
    /// Its headers.
    pub headers: Headers,
    /// Its data; closed when the peer has sent all.
    pub data: mpsc::Receiver<Bytes>,
}

impl Incoming {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// Sends on the streams of a connection.
#[derive(Clone)]
pub struct Writer {
    frames: mpsc::Sender<Frame>,
}

impl Writer {
    /// Data of a stream; `false` when the connection is gone.
    pub async fn data(&self, stream: u32, data: Bytes) -> bool {
        let mut rest = data;
        while !rest.is_empty() {
            let data = rest.split_to(rest.len().min(PIECE));
            if self.frames.send(Frame::Data { stream, data, fin: false }).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Ends our side of a stream.
    pub async fn end(&self, stream: u32) {
        let _ = self.frames.send(Frame::Data { stream, data: Bytes::new(), fin: true }).await; // gone is ended, too
    }

    /// Cuts a stream off.
    pub async fn reset(&self, stream: u32) {
        let _ = self.frames.send(Frame::Reset { stream, status: 5 }).await; // CANCEL; gone is cut off, too
    }

    /// Resolves when the connection is gone.
    pub async fn closed(&self) {
        self.frames.closed().await;
    }
}

/// A connection.
pub struct Connection {
    /// Streams as the peer opens them; ends with the connection.
    pub incoming: mpsc::Receiver<Incoming>,
    /// Sends.
    pub writer: Writer,
}

impl Connection {
    /// Serves `io` until it ends, or until every [`Writer`] is gone and the peer has closed or [`LINGER`] has passed.
    pub fn start(io: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        let (from, to) = tokio::io::split(io);
        let (frames, outgoing) = mpsc::channel(OUTGOING);
        let (opened, incoming) = mpsc::channel(16);
        let reader = read(Reader::new(tokio::io::BufReader::new(from)), opened, frames.downgrade());
        // Ends with the connection, or with the last writer.
        tokio::spawn(async move {
            let write = write(to, outgoing);
            tokio::pin!(reader);
            // Whichever ends first: a broken connection ends both; when the writers are gone the reader waits for the peer.
            tokio::select! {
                result = &mut reader => if let Err(error) = result {
                    tracing::debug!(%error, "SPDY connection broke");
                },
                result = write => if let Err(error) = result {
                    tracing::debug!(%error, "SPDY connection broke");
                } else {
                    let _ = tokio::time::timeout(LINGER, reader).await; // the peer closes, or is closed
                },
            }
        });
        Self { incoming, writer: Writer { frames } }
    }
}

async fn write(mut to: impl AsyncWrite + Unpin, mut outgoing: mpsc::Receiver<Frame>) -> io::Result<()> {
    let mut encoder = Encoder::default();
    while let Some(frame) = outgoing.recv().await {
        to.write_all(&encoder.encode(&frame)?).await?;
        if outgoing.is_empty() {
            to.flush().await?;
        }
    }
    to.write_all(&encoder.encode(&Frame::GoAway { last: 0 })?).await?;
    to.flush().await
}

async fn read(
    mut reader: Reader<impl AsyncRead + Unpin>,
    opened: mpsc::Sender<Incoming>,
    frames: mpsc::WeakSender<Frame>,
) -> io::Result<()> {
    let mut streams: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    let reply = async |frame: Frame| {
        if let Some(frames) = frames.upgrade() {
            let _ = frames.send(frame).await; // the connection is ending
        }
    };
    while let Some(frame) = reader.next().await? {
        match frame {
            Frame::SynStream { stream, .. } if streams.len() >= MOST_STREAMS => {
                reply(Frame::Reset { stream, status: 3 }).await; // REFUSED_STREAM
            }
            Frame::SynStream { stream, headers, fin } => {
                let (sender, data) = mpsc::channel(QUEUED);
                if !fin {
                    streams.insert(stream, sender);
                }
                reply(Frame::SynReply { stream, headers: Headers::new() }).await;
                if opened.send(Incoming { stream, headers, data }).await.is_err() {
                    // Nobody takes streams any more.
                    reply(Frame::Reset { stream, status: 3 }).await;
                    streams.remove(&stream);
                }
            }
            Frame::Data { stream, data, fin } => {
                if let Some(sender) = streams.get(&stream).filter(|_| !data.is_empty()) {
                    let _ = sender.send(data).await; // a reader that is gone wants nothing more
                }
                if fin {
                    streams.remove(&stream);
                }
            }
            Frame::Reset { stream, .. } => drop(streams.remove(&stream)),
            // Ours would be even; we send none.
            Frame::Ping(id) if id % 2 == 1 => reply(Frame::Ping(id)).await,
            Frame::GoAway { .. } | Frame::Ping(_) | Frame::SynReply { .. } | Frame::Other => {}
        }
    }
    Ok(())
}
