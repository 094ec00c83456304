//! The stdio of one running container: from the guest's stream to the log and to whoever is attached, and back.
//!
//! Made when a container starts, and again for running containers after a restart. Invariants: the log gets everything,
//! attached or not; a session that does not read is dropped after [`SLOW_DEADLINE`] and cannot hold up the container for
//! longer.

use crate::error::{Error, Result};
use crate::logs::{Finished, LogWriter, Source};
use crate::vm::wire::{self, GuestStream};
use atoll_spec::guest::Channel;
use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{BufReader, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};

/// How long a session may leave output unread.
const SLOW_DEADLINE: Duration = Duration::from_secs(10);

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

type Writer = WriteHalf<GuestStream>;

/// The stdio of one container.
pub struct Console {
    sessions: Mutex<Vec<mpsc::Sender<Output>>>,
    input: tokio::sync::Mutex<Option<Writer>>,
    log: Mutex<Option<LogWriter>>,
    drained: watch::Sender<bool>,
}

impl Console {
    /// Takes the guest's stream; `log` gets what comes out. A terminal has no error output.
    pub fn start(stream: GuestStream, tty: bool, log: Option<(LogWriter, Finished)>) -> Arc<Self> {
        let (from, to) = tokio::io::split(stream);
        let from = BufReader::with_capacity(BUFFER, from);
        let (writer, finished) = log.unzip();
        let console = Arc::new(Self {
            sessions: Mutex::default(),
            input: tokio::sync::Mutex::new(Some(to)),
            log: Mutex::new(writer.clone()),
            drained: watch::Sender::new(false),
        });
        // Ends with the stream.
        let outputs = if tty { 1 } else { 2 };
        tokio::spawn(console.clone().read(from, outputs, writer, finished));
        console
    }

    async fn read(
        self: Arc<Self>,
        mut from: BufReader<ReadHalf<GuestStream>>,
        mut open: u8,
        log: Option<LogWriter>,
        finished: Option<Finished>,
    ) {
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

    async fn send(&self, channel: Channel, data: &[u8]) -> Result<()> {
        let mut input = self.input.lock().await;
        let writer =
            input.as_mut().ok_or_else(|| Error::State("the container's input is closed".to_owned()))?;
        wire::write_packets(writer, channel, data)
            .await
            .map_err(Error::os("write to", "the container's stream"))
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

struct Sessions<'a>(std::sync::MutexGuard<'a, Vec<mpsc::Sender<Output>>>);

impl Sessions<'_> {
    fn take(mut self) {
        self.0.clear();
    }
}
