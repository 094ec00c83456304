//! The stdio of one running container: from the guest's stream to the log and to whoever is attached, and back.
//!
//! Made when a container starts, and again for running containers after a restart. Invariants: the log gets everything,
//! attached or not; a session that does not read is dropped after [`SLOW_DEADLINE`] and cannot hold up the container for
//! longer; input goes in whole packets, whenever a session ends.

use crate::error::{Error, Result};
use crate::logs::{Finished, LogWriter, Source, Written};
use crate::vm::guest::GuestLink;
use crate::vm::wire::{self, GuestStream};
use atoll_spec::guest::{Call, Channel, GuestErrorKind, OUTPUT_WINDOW, Reply};
use atoll_spec::ids::ContainerId;
use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

/// How long a session may leave output unread.
const SLOW_DEADLINE: Duration = Duration::from_secs(10);

/// Output acknowledged at once when there is much: a quarter of what the guest keeps.
const RECEIPT_BYTES: u64 = OUTPUT_WINDOW as u64 / 4;
/// How long less than that may wait.
const RECEIPT_PAUSE: Duration = Duration::from_millis(100);
/// Pause before a receipt that failed is sent again.
const RECEIPT_RETRY: Duration = Duration::from_secs(1);
/// Time for a receipt.
const RECEIPT_DEADLINE: Duration = Duration::from_secs(20);

/// Bytes read at once: small packets would cost several system calls each.
const BUFFER: usize = 32 << 10;

/// Output of a container or an exec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Standard output, or the terminal.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
}

/// Packets of input that may wait for a container that does not read.
const INPUT_PACKETS: usize = 4;

/// Where to acknowledge output, so that the guest need not keep it for the next runtime.
pub struct Receipts {
    /// The guest.
    pub link: Arc<GuestLink>,
    /// The container.
    pub container: ContainerId,
    /// Number of the stream.
    pub stream: u64,
}

impl Receipts {
    /// Acknowledges what is in the log until no more comes.
    async fn send(self, mut written: watch::Receiver<Written>) {
        let mut sent = Written::default();
        let mut open = true;
        while open {
            open = written.changed().await.is_ok();
            if open {
                // Many lines, one receipt. Waiting longer than this gains little.
                let enough = written.wait_for(|now| now.total() - sent.total() >= RECEIPT_BYTES);
                open = !matches!(tokio::time::timeout(RECEIPT_PAUSE, enough).await, Ok(Err(_)));
            }
            loop {
                let now = *written.borrow_and_update();
                if now == sent {
                    break;
                }
                match self.acknowledge(now).await {
                    Ok(_) => {
                        sent = now;
                        break;
                    }
                    // The container is gone, or the VM is.
                    Err(Error::Guest { kind: GuestErrorKind::NotFound, .. }) => return,
                    Err(_) if self.link.is_closed() => return,
                    // Once its window is full the guest says no more until it hears of this: nobody else would wake us.
                    Err(_) => tokio::time::sleep(RECEIPT_RETRY).await,
                }
            }
        }
    }

    async fn acknowledge(&self, now: Written) -> Result<Reply> {
        let Written { stdout, stderr } = now;
        let (container, stream) = (self.container.clone(), self.stream);
        self.link.call(Call::AckOutput { container, stream, stdout, stderr }, RECEIPT_DEADLINE).await
    }
}

/// Where output goes.
struct Sink {
    log: Option<LogWriter>,
    finished: Option<Finished>,
    /// Counts what comes while there is no log.
    read: watch::Sender<Written>,
}

/// The stdio of one container.
pub struct Console {
    sessions: Mutex<Vec<mpsc::Sender<Output>>>,
    input: mpsc::Sender<Vec<u8>>,
    writer: AbortHandle,
    log: Mutex<Option<LogWriter>>,
    drained: watch::Sender<bool>,
}

impl Console {
    /// Takes the guest's stream; `log` gets what comes out. A terminal has no error output.
    pub fn start(
        stream: GuestStream,
        tty: bool,
        log: Option<(LogWriter, Finished)>,
        receipts: Receipts,
    ) -> Arc<Self> {
        let (from, to) = tokio::io::split(stream);
        let from = BufReader::with_capacity(BUFFER, from);
        let (writer, finished) = log.unzip();
        // Without a log, what was read is as safe as it will ever be.
        let (read, unlogged) = watch::channel(Written::default());
        let written = writer.as_ref().map_or(unlogged, LogWriter::written);
        // Ends with the writer, or with the reader.
        tokio::spawn(receipts.send(written));
        let (input, packets) = mpsc::channel(INPUT_PACKETS);
        let console = Arc::new(Self {
            sessions: Mutex::default(),
            input,
            writer: tokio::spawn(write(to, packets)).abort_handle(),
            log: Mutex::new(writer.clone()),
            drained: watch::Sender::new(false),
        });
        // Ends with the stream.
        let outputs = if tty { 1 } else { 2 };
        tokio::spawn(console.clone().read(from, outputs, Sink { log: writer, finished, read }));
        console
    }

    async fn read(self: Arc<Self>, mut from: BufReader<ReadHalf<GuestStream>>, mut open: u8, sink: Sink) {
        let Sink { log, finished, read } = sink;
        while open > 0 {
            let (source, data) = match wire::read_packet(&mut from).await {
                Ok(Some((Channel::Stdout, data))) => (Source::Stdout, data),
                Ok(Some((Channel::Stderr, data))) => (Source::Stderr, data),
                Ok(Some(_)) => continue,
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(%error, "a container's stream broke");
                    break;
                }
            };
            if data.is_empty() {
                open -= 1;
                if let Some(log) = &log {
                    log.end(source).await;
                }
                continue;
            }
            if let Some(log) = &log {
                log.data(source, data.clone()).await;
            } else {
                read.send_modify(|read| read.count(source, data.len() as u64));
            }
            self.show(source, data).await;
        }
        drop(log);
        self.sessions().take();
        self.log.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(finished) = finished {
            let _ = finished.await; // it only fails when it was aborted, at shutdown
        }
        self.drained.send_replace(true);
    }

    fn sessions(&self) -> Sessions<'_> {
        Sessions(self.sessions.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn show(&self, source: Source, data: Bytes) {
        let sessions = self.sessions().0.clone();
        for session in sessions {
            let output = match source {
                Source::Stdout => Output::Stdout(data.clone()),
                Source::Stderr => Output::Stderr(data.clone()),
            };
            if session.send_timeout(output, SLOW_DEADLINE).await.is_err() {
                self.sessions().0.retain(|s| !s.same_channel(&session));
            }
        }
    }

    /// Follows the output from now on. The channel closes when the output ends.
    pub fn attach(&self) -> mpsc::Receiver<Output> {
        let (sender, receiver) = mpsc::channel(64);
        if !*self.drained.borrow() {
            self.sessions().0.push(sender);
        }
        receiver
    }

    /// Input for the container.
    pub async fn input(&self, data: &[u8]) -> Result<()> {
        self.send(Channel::Stdin, data).await
    }

    /// Ends the input.
    pub async fn close_input(&self) -> Result<()> {
        self.send(Channel::Stdin, &[]).await
    }

    /// A new terminal size.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let [a, b] = columns.to_le_bytes();
        let [c, d] = rows.to_le_bytes();
        self.send(Channel::Resize, &[a, b, c, d]).await
    }

    /// Cancel-safe: a packet is handed over whole or not at all.
    async fn send(&self, channel: Channel, data: &[u8]) -> Result<()> {
        for packet in wire::packets(channel, data) {
            let closed = |_| Error::State("the container's input is closed".to_owned());
            self.input.send(packet).await.map_err(closed)?;
        }
        Ok(())
    }

    /// Opens the log file again.
    pub async fn reopen_log(&self) -> Result<()> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match log {
            Some(log) => log.reopen().await,
            None => Err(Error::State("the container has no open log".to_owned())),
        }
    }

    /// Whether the output has ended.
    pub fn is_drained(&self) -> bool {
        *self.drained.borrow()
    }

    /// Waits until everything has been read and written to the log.
    pub async fn drained(&self, deadline: Duration) {
        let mut drained = self.drained.subscribe();
        // Giving up only means that the exit is told before the last line.
        let _ = tokio::time::timeout(deadline, drained.wait_for(|d| *d)).await;
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // It may wait for a guest that does not read, and holds the stream.
        self.writer.abort();
    }
}

/// Writes input, alone, so that whoever gives up cuts no packet in two. Ends with the stream, or the console.
async fn write(mut to: WriteHalf<GuestStream>, mut packets: mpsc::Receiver<Vec<u8>>) {
    while let Some(packet) = packets.recv().await {
        let written = async {
            to.write_all(&packet).await?;
            to.flush().await
        };
        if let Err(error) = written.await {
            tracing::debug!(%error, "a container's input broke");
            return;
        }
    }
}

struct Sessions<'a>(std::sync::MutexGuard<'a, Vec<mpsc::Sender<Output>>>);

impl Sessions<'_> {
    fn take(mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn a_session_that_leaves_in_the_middle_of_its_input_cuts_no_packet() {
        let (news, _) = mpsc::channel(1);
        let sandbox = "ab".repeat(32).parse().unwrap();
        let container = "cd".repeat(32).parse().unwrap();
        let receipts = Receipts { link: GuestLink::new(sandbox, news), container, stream: 1 };
        let (ours, mut guest) = tokio::io::duplex(1000);
        let console = Console::start(Box::new(ours), false, None, receipts);
        let first = vec![1; 1 << 20];
        // The guest does not read: this one waits when it leaves, and half a packet is on its way.
        assert!(console.input(&first).now_or_never().is_none());
        tokio::task::yield_now().await;
        let second = tokio::spawn(async move {
            console.input(b"second").await.unwrap();
            console.close_input().await.unwrap();
            console
        });
        let mut input = Vec::new();
        let read = async {
            loop {
                let (channel, data) = wire::read_packet(&mut guest).await.unwrap().unwrap();
                assert_eq!(channel, Channel::Stdin);
                if data.is_empty() {
                    return;
                }
                input.extend_from_slice(&data);
            }
        };
        tokio::time::timeout(Duration::from_secs(20), read).await.expect("the input did not end");
        let (rest, last) = input.split_at(input.len() - 6);
        assert_eq!(last, b"second");
        assert!(!rest.is_empty() && first.starts_with(rest));
        drop(second.await.unwrap());
    }
}
