//! Container logs in the CRI format: `<RFC3339Nano> stdout|stderr P|F message`.
//!
//! One writer task per running container, fed by `console`. [`Lines`] is pure and turns bytes into log lines; [`LogWriter`]
//! owns the file (`log_file`) and reopens it after a rotation. Invariants: a log line holds at most [`LINE_BYTES`] of the message;
//! bytes come out in the order they came in, none missing; only the last piece of a line is marked `F`.

use crate::error::{Error, Result};
use crate::log_file::{LogFile, Unended};
use crate::roots::Roots;
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};

/// Longest message in one log line.
pub const LINE_BYTES: usize = 16 * 1024;

/// Which stream a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Source {
    /// As log lines have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Cuts both streams into log lines.
#[derive(Debug, Default)]
pub struct Lines {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    unended: Unended,
}

impl Lines {
    /// Takes output; appends finished log lines, stamped `time`, to `out`.
    pub fn feed(&mut self, source: Source, mut data: &[u8], time: &str, out: &mut Vec<u8>) {
        let held = match source {
            Source::Stdout => &mut self.stdout,
            Source::Stderr => &mut self.stderr,
        };
        while !data.is_empty() {
            let room = LINE_BYTES - held.len();
            let end = data.iter().take(room + 1).position(|b| *b == b'\n');
            match end {
                Some(end) => {
                    *self.unended.of(source) = false;
                    held.extend_from_slice(&data[..end]);
                    emit(source, 'F', held, time, out);
                    data = &data[end + 1..];
                }
                None if data.len() > room => {
                    *self.unended.of(source) = true;
                    held.extend_from_slice(&data[..room]);
                    emit(source, 'P', held, time, out);
                    data = &data[room..];
                }
                None => {
                    held.extend_from_slice(data);
                    return;
                }
            }
        }
    }

    /// Bytes of a stream that wait for the end of their line.
    fn held(&self, source: Source) -> u64 {
        match source {
            Source::Stdout => self.stdout.len() as u64,
            Source::Stderr => self.stderr.len() as u64,
        }
    }

    /// Ends a stream: what was not ended by a newline becomes a line.
    pub fn end(&mut self, source: Source, time: &str, out: &mut Vec<u8>) {
        let held = match source {
            Source::Stdout => &mut self.stdout,
            Source::Stderr => &mut self.stderr,
        };
        if !held.is_empty() {
            *self.unended.of(source) = false;
            emit(source, 'F', held, time, out);
        }
    }
}

fn emit(source: Source, tag: char, held: &mut Vec<u8>, time: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("{time} {} {tag} ", source.name()).as_bytes());
    out.append(held);
    out.push(b'\n');
}

/// The time as log lines have it.
pub fn now() -> String {
    format!("{:.9}", jiff::Timestamp::now())
}

enum Message {
    Data(Source, Bytes),
    End(Source),
    Reopen(oneshot::Sender<Result<()>>),
}

/// Bytes of output that are in the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Of output.
    pub stdout: u64,
    /// Of error output.
    pub stderr: u64,
}

impl Written {
    /// Counts more of one.
    pub fn count(&mut self, source: Source, bytes: u64) {
        match source {
            Source::Stdout => self.stdout += bytes,
            Source::Stderr => self.stderr += bytes,
        }
    }

    /// Of both.
    pub fn total(self) -> u64 {
        self.stdout + self.stderr
    }
}

/// Where a container's log is to be.
#[derive(Debug, Clone)]
pub struct LogPlace {
    /// How far the path may lead.
    pub roots: Arc<Roots>,
    /// Its path.
    pub path: PathBuf,
}

/// Handle of a writer task; the task ends when all handles are gone, and has then written everything.
#[derive(Clone)]
pub struct LogWriter {
    sender: mpsc::Sender<Message>,
    written: watch::Receiver<Written>,
}

/// Resolves when the writer has written everything and is gone.
pub type Finished = tokio::task::JoinHandle<()>;

impl LogWriter {
    /// Opens the log, and its directory where it is missing, and starts the writer.
    pub async fn open(place: LogPlace) -> Result<(Self, Finished)> {
        let opened = tokio::task::spawn_blocking(move || LogFile::open(place)).await;
        let file = opened.map_err(|error| Error::Invalid(error.to_string()))??;
        let (sender, receiver) = mpsc::channel(64);
        let (progress, written) = watch::channel(Written::default());
        let task = tokio::spawn(write_all(Shared(Arc::new(Mutex::new(file))), receiver, progress));
        Ok((Self { sender, written }, task))
    }

    /// How much is in the log; the channel closes when the writer has ended.
    pub fn written(&self) -> watch::Receiver<Written> {
        self.written.clone()
    }

    /// Output of the container. Waits while the disk is slow, which in turn slows the container down.
    pub async fn data(&self, source: Source, data: Bytes) {
        let _ = self.sender.send(Message::Data(source, data)).await; // the writer only ends with its handles
    }

    /// A stream has ended.
    pub async fn end(&self, source: Source) {
        let _ = self.sender.send(Message::End(source)).await; // as above
    }

    /// Opens the file again: it has been rotated away.
    pub async fn reopen(&self) -> Result<()> {
        let (sender, receiver) = oneshot::channel();
        let stopping = |()| Error::Stopping;
        self.sender.send(Message::Reopen(sender)).await.map_err(|_| stopping(()))?;
        receiver.await.map_err(|_| stopping(()))?
    }
}

/// The file, for the threads that may wait for the disk; one at a time.
struct Shared(Arc<Mutex<LogFile>>);

impl Shared {
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut LogFile) -> T + Send + 'static,
    ) -> Result<T> {
        let file = self.0.clone();
        let work = move || work(&mut file.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(work).await.map_err(|_| Error::Stopping)
    }

    /// Writes what is waiting.
    async fn append(&self, out: &mut Vec<u8>, unended: Unended) {
        let records = std::mem::take(out);
        if !records.is_empty() {
            // It only fails at shutdown.
            let _ = self.with(move |file| file.append(&records, unended)).await;
        }
    }
}

async fn write_all(file: Shared, mut messages: mpsc::Receiver<Message>, progress: watch::Sender<Written>) {
    let mut lines = Lines::default();
    let mut taken = Written::default();
    let mut out = Vec::new();
    let mut batch = Vec::new();
    while messages.recv_many(&mut batch, 32).await > 0 {
        let mut reopened = Vec::new();
        let time = now();
        for message in batch.drain(..) {
            match message {
                Message::Data(source, data) => {
                    taken.count(source, data.len() as u64);
                    lines.feed(source, &data, &time, &mut out);
                }
                Message::End(source) => lines.end(source, &time, &mut out),
                Message::Reopen(reply) => {
                    file.append(&mut out, lines.unended).await;
                    reopened.push(reply);
                }
            }
        }
        file.append(&mut out, lines.unended).await;
        // What was lost to a full disk counts too: it will not fit later either.
        progress.send_replace(Written {
            stdout: taken.stdout - lines.held(Source::Stdout),
            stderr: taken.stderr - lines.held(Source::Stderr),
        });
        for reply in reopened {
            let result = file.with(LogFile::reopen).await.flatten();
            let _ = reply.send(result); // the caller may have given up
        }
    }
    for source in [Source::Stdout, Source::Stderr] {
        lines.end(source, &now(), &mut out);
    }
    file.append(&mut out, lines.unended).await;
    progress.send_replace(taken);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads log lines back into the stream.
    fn parse(log: &[u8], source: &str) -> Vec<u8> {
        let mut data = Vec::new();
        let mut rest = log;
        while !rest.is_empty() {
            // A message can hold no newline, so lines end at the first.
            let end = rest.iter().position(|b| *b == b'\n').unwrap();
            let line = &rest[..end];
            rest = &rest[end + 1..];
            let mut fields = line.splitn(4, |b| *b == b' ');
            let (time, name, tag, message) = (
                fields.next().unwrap(),
                fields.next().unwrap(),
                fields.next().unwrap(),
                fields.next().unwrap(),
            );
            assert_eq!(time, b"T");
            assert!(message.len() <= LINE_BYTES);
            if name != source.as_bytes() {
                continue;
            }
            data.extend_from_slice(message);
            if tag == b"F" {
                data.push(b'\n');
            }
        }
        data
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn logs_hold_exactly_what_was_written(
            pieces in proptest::collection::vec(
                (any::<bool>(), proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..40), 1usize..1000),
                0..12,
            )
        ) {
            let mut lines = Lines::default();
            let (mut log, mut stdout, mut stderr) = (Vec::new(), Vec::new(), Vec::new());
            for (is_out, seed, repeat) in pieces {
                let data = seed.repeat(repeat);
                let (source, all) = if is_out { (Source::Stdout, &mut stdout) } else { (Source::Stderr, &mut stderr) };
                all.extend_from_slice(&data);
                lines.feed(source, &data, "T", &mut log);
            }
            lines.end(Source::Stdout, "T", &mut log);
            lines.end(Source::Stderr, "T", &mut log);
            for (name, mut all) in [("stdout", stdout), ("stderr", stderr)] {
                if all.last().is_some_and(|b| *b != b'\n') {
                    all.push(b'\n');
                }
                prop_assert_eq!(parse(&log, name), all);
            }
        }
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_one_line() {
        let mut lines = Lines::default();
        let mut log = Vec::new();
        let mut data = vec![b'x'; LINE_BYTES];
        data.push(b'\n');
        lines.feed(Source::Stdout, &data, "T", &mut log);
        assert!(log.starts_with(b"T stdout F x"));
        assert_eq!(log.iter().filter(|b| **b == b'\n').count(), 1);
    }

    #[tokio::test]
    async fn a_rotated_log_goes_on_in_a_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c/0.log");
        let roots = Arc::new(Roots::below(dir.path(), dir.path()));
        let place = LogPlace { roots, path: path.clone() };
        let (writer, finished) = LogWriter::open(place).await.unwrap();
        writer.data(Source::Stdout, Bytes::from_static(b"one\n")).await;
        writer.reopen().await.unwrap();
        std::fs::rename(&path, path.with_extension("1")).unwrap();
        writer.reopen().await.unwrap();
        writer.data(Source::Stderr, Bytes::from_static(b"two")).await;
        drop(writer);
        finished.await.unwrap();
        assert!(std::fs::read_to_string(path.with_extension("1")).unwrap().ends_with(" stdout F one\n"));
        assert!(std::fs::read_to_string(&path).unwrap().ends_with(" stderr F two\n"));
    }
}
