//! Streams of a SPDY connection, server side: the peer opens them, all are accepted.
//!
//! Called by `remote` and `forward`. Invariants: a stream's data arrives in order; a stream whose reader is gone is read
//! and dropped, so it does not hold up the others; of all streams together, no more than [`HELD`] bytes are held for
//! their readers, however many streams and however long frames the peer sends. What is over that stays in the socket,
//! and TCP holds the peer back.

use super::frame::{Encoder, Frame, Headers, PIECE, Reader};
use bytes::Bytes;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Frames that wait to be written.
const OUTGOING: usize = 64;
/// Pieces of data of one stream that wait to be read.
const QUEUED: usize = 64;
/// Bytes of one connection that wait to be read, or that a reader has and has not dropped.
const HELD: usize = 4 << 20;
/// Most streams of one connection.
const MOST_STREAMS: usize = 1024;
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
            // Smaller than what peers accept.
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

/// Data that counts as held until it is dropped.
struct Held {
    data: Bytes,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

/// Waits for room, and takes it. `None`: never, for the connection ends.
async fn hold(room: &Arc<Semaphore>, data: Bytes) -> Option<Bytes> {
    let length = u32::try_from(data.len()).ok()?;
    let room = Arc::clone(room).acquire_many_owned(length).await.ok()?;
    Some(Bytes::from_owner(Held { data, _room: room }))
}

async fn read(
    mut reader: Reader<impl AsyncRead + Unpin>,
    opened: mpsc::Sender<Incoming>,
    frames: mpsc::WeakSender<Frame>,
) -> io::Result<()> {
    let mut streams: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    let room = Arc::new(Semaphore::new(HELD));
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
                // A reader that is gone wants nothing more, and needs no room.
                let wanted = streams.get(&stream).filter(|sender| !data.is_empty() && !sender.is_closed());
                if let Some(sender) = wanted
                    && let Some(data) = hold(&room, data).await
                {
                    let _ = sender.send(data).await; // gone meanwhile
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const STREAMS: u32 = 40;
    const FRAME: usize = 1 << 20;

    /// What a peer sends: streams, each with one long frame.
    async fn flood(to: impl AsyncWrite, sent: Arc<AtomicUsize>) {
        let mut to = std::pin::pin!(to);
        let mut encoder = Encoder::default();
        for n in 0..STREAMS {
            let stream = 2 * n + 1;
            let open = encoder.encode(&Frame::SynStream { stream, headers: Headers::new(), fin: false });
            let data = Frame::Data { stream, data: vec![n as u8; FRAME].into(), fin: true };
            let data = encoder.encode(&data).unwrap();
            for piece in [open.unwrap(), data].iter().flat_map(|bytes| bytes.chunks(1024)) {
                to.write_all(piece).await.unwrap();
                sent.fetch_add(piece.len(), Ordering::Relaxed);
            }
        }
    }

    /// All of a peer's streams while nobody reads them, and what the peer has got rid of by then.
    async fn unread() -> (Vec<Incoming>, usize, Writer) {
        let (client, ours) = tokio::io::duplex(64 << 10);
        let (mut from, to) = tokio::io::split(client);
        tokio::spawn(async move { tokio::io::copy(&mut from, &mut tokio::io::sink()).await });
        let sent: Arc<AtomicUsize> = Arc::default();
        tokio::spawn(flood(to, Arc::clone(&sent)));
        let mut connection = Connection::start(ours);
        let (mut streams, mut before, mut quiet) = (Vec::new(), 0, 0);
        // One thread and no clock: when all tasks have had many turns and nothing moved, nothing will.
        while quiet < 1000 {
            tokio::task::yield_now().await;
            let now = sent.load(Ordering::Relaxed) + streams.len();
            quiet = if now == before { quiet + 1 } else { 0 };
            before = now;
            streams.extend(connection.incoming.try_recv().ok());
        }
        let sent = sent.load(Ordering::Relaxed);
        tokio::spawn(async move { while connection.incoming.recv().await.is_some() {} });
        (streams, sent, connection.writer)
    }

    fn block<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    #[test]
    fn what_nobody_reads_is_not_taken_from_the_peer() {
        block(async {
            let (streams, sent, _writer) = unread().await;
            // The pipe's own buffer, the reader's, a piece that waits for room, heads of frames.
            let most = HELD + (64 << 10) + (8 << 10) + PIECE + (64 << 10);
            assert!(sent <= most, "{sent} bytes were taken, {most} at most");
            assert!(sent >= HELD, "{sent} bytes were taken, there is room for {HELD}");
            assert!(streams.len() >= 4, "{}", streams.len());
        });
    }

    #[test]
    fn what_is_read_makes_room_and_nothing_is_lost() {
        block(async {
            let (streams, _, _writer) = unread().await;
            for mut stream in streams {
                let mut read = 0;
                while let Some(data) = stream.data.recv().await {
                    assert!(data.iter().all(|byte| u32::from(*byte) == (stream.stream - 1) / 2));
                    read += data.len();
                }
                assert_eq!(read, FRAME, "stream {}", stream.stream);
            }
        });
    }
}
