//! Sends a container's log: tail, since, timestamps, limit, follow across rotation until the container ends.

use super::logline::{LogLine, parse};
use super::routes::Query;
use super::{Api, Body, Refusal, find};
use atoll_cri::v1;
use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::{Response, StatusCode};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use std::io::SeekFrom;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;

/// Interval at which a follower looks for more.
const FOLLOW: Duration = Duration::from_millis(100);
/// How long a log may be away while it is rotated: renamed, and not yet opened anew by the runtime.
const ROTATION: Duration = Duration::from_secs(3);
/// A follower asks the runtime whether the container still runs once in this many looks.
const LOOKS_PER_STATUS: u32 = 10;
/// Bytes read at once.
const CHUNK: usize = 64 * 1024;
/// Longest line; the runtime breaks lines at 16 KiB.
const MAX_LINE: usize = 1 << 20;
/// Chunks between reader and network.
const QUEUE: usize = 8;

/// What of the log is wanted.
#[derive(Debug, Clone, Default)]
pub(super) struct LogOptions {
    follow: bool,
    previous: bool,
    timestamps: bool,
    tail_lines: Option<u64>,
    since: Option<Timestamp>,
    limit_bytes: Option<u64>,
    stream: Option<&'static str>,
}

impl LogOptions {
    /// Reads the kubelet's query parameters; 400 names the one that is wrong.
    pub(super) fn parse(query: &Query) -> Result<Self, Refusal> {
        let bad =
            |name: &str, want: &str| Refusal::new(StatusCode::BAD_REQUEST, format!("{name}: give {want}"));
        let number = |name: &str| match query.one(name).filter(|text| !text.is_empty()) {
            None => Ok(None),
            Some(text) => {
                text.parse::<u64>().map(Some).map_err(|_| bad(name, "a whole number of at least 0"))
            }
        };
        let since = match (query.one("sinceTime").filter(|t| !t.is_empty()), number("sinceSeconds")?) {
            (Some(time), _) => Some(time.parse().map_err(|_| bad("sinceTime", "an RFC 3339 time"))?),
            (None, Some(seconds)) => {
                let seconds = i64::try_from(seconds).map_err(|_| bad("sinceSeconds", "a smaller number"))?;
                Some(
                    Timestamp::now()
                        .checked_sub(jiff::SignedDuration::from_secs(seconds))
                        .unwrap_or(Timestamp::MIN),
                )
            }
            (None, None) => None,
        };
        let stream = match query.one("stream") {
            None | Some("" | "All") => None,
            Some("Stdout") => Some("stdout"),
            Some("Stderr") => Some("stderr"),
            Some(_) => return Err(bad("stream", "All, Stdout or Stderr")),
        };
        Ok(Self {
            follow: query.flag("follow"),
            previous: query.flag("previous"),
            timestamps: query.flag("timestamps"),
            tail_lines: number("tailLines")?,
            since,
            limit_bytes: number("limitBytes")?,
            stream,
        })
    }
}

/// Answers with the log as a stream.
pub(super) async fn serve(
    api: &Api,
    pod: &Pod,
    container: &str,
    options: &LogOptions,
) -> Result<Response<Body>, Refusal> {
    find::check_name(pod, container)?;
    let status = wanted_attempt(api, pod, container, options.previous).await?;
    let path = PathBuf::from(&status.log_path);
    let file = open(&path).await?;
    let (sender, mut receiver) = mpsc::channel::<std::io::Result<Bytes>>(QUEUE);
    let running = status.state() == v1::ContainerState::ContainerRunning;
    let reader = Reader {
        follow: options.follow && running && !options.previous,
        options: options.clone(),
        cri: api.cri.clone(),
        id: status.id,
        path,
        sent: 0,
        sender,
        at_line_start: true,
    };
    tokio::spawn(reader.run(file));
    let stream = futures_util::stream::poll_fn(move |context| receiver.poll_recv(context));
    let frames = futures_util::StreamExt::map(stream, |chunk| chunk.map(Frame::data));
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)));
    response
        .headers_mut()
        .insert("content-type", http::HeaderValue::from_static("text/plain; charset=utf-8"));
    Ok(response)
}

/// Opens a log. The runtime makes it before it starts the container, so that it is there whenever there is something
/// to read, except for a moment while it is rotated.
async fn open(path: &Path) -> Result<File, Refusal> {
    let deadline = tokio::time::Instant::now() + ROTATION;
    loop {
        match File::open(path).await {
            Ok(file) => return Ok(file),
            Err(_) if tokio::time::Instant::now() < deadline => tokio::time::sleep(FOLLOW).await,
            Err(error) => {
                let message = format!("cannot open the log {}: {error}", path.display());
                return Err(Refusal::new(StatusCode::NOT_FOUND, message));
            }
        }
    }
}

/// The container's newest attempt that was started, or the one before the newest; 400 says why there is none, in the
/// kubelet's words, because people search for them.
async fn wanted_attempt(
    api: &Api,
    pod: &Pod,
    container: &str,
    previous: bool,
) -> Result<v1::ContainerStatus, Refusal> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let attempts = find::attempts(api, pod, container).await?;
    let waiting = waiting_reason(pod, container).is_some();
    let attempt = chosen(&attempts, previous, waiting).ok_or_else(|| {
        let message = if previous {
            format!("previous terminated container \"{container}\" in pod \"{name}\" not found")
        } else {
            let reason = waiting_reason(pod, container).unwrap_or("ContainerCreating");
            format!("container \"{container}\" in pod \"{name}\" is waiting to start: {reason}")
        };
        Refusal::new(StatusCode::BAD_REQUEST, message)
    })?;
    let status = api.cri.container_status(&attempt.id).await.map_err(find::runtime_failed)?;
    status.ok_or_else(|| {
        Refusal::new(
            StatusCode::NOT_FOUND,
            format!("container \"{container}\" in pod \"{name}\" was removed just now"),
        )
    })
}

/// An attempt that was made and not started has no log yet: what there is to read is from the one before. While the
/// next attempt is waited for (CrashLoopBackOff), the last one to end is the previous one.
fn chosen(attempts: &[v1::Container], previous: bool, waiting: bool) -> Option<&v1::Container> {
    if previous && waiting {
        return attempts.iter().find(|attempt| attempt.state() == v1::ContainerState::ContainerExited);
    }
    if previous {
        return attempts.get(1);
    }
    attempts.iter().find(|attempt| attempt.state() != v1::ContainerState::ContainerCreated)
}

fn waiting_reason<'a>(pod: &'a Pod, container: &str) -> Option<&'a str> {
    let status = pod.status.as_ref()?;
    let all =
        status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten());
    let state = all.into_iter().find(|s| s.name == container)?.state.as_ref()?;
    state.waiting.as_ref()?.reason.as_deref()
}

/// Reads the file and sends what is wanted of it.
struct Reader {
    options: LogOptions,
    follow: bool,
    cri: crate::cri::Cri,
    id: String,
    path: PathBuf,
    sent: u64,
    sender: mpsc::Sender<std::io::Result<Bytes>>,
    at_line_start: bool,
}

/// Why reading ended before the file did.
enum Ended {
    /// The caller went away, or has as many bytes as it wanted.
    Enough,
    Failed(std::io::Error),
}

impl From<std::io::Error> for Ended {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error)
    }
}

impl Reader {
    async fn run(mut self, mut file: File) {
        if let Err(Ended::Failed(error)) = self.send_all(&mut file).await {
            tracing::warn!("log {}: {error}", self.path.display());
            // The caller may be gone, and then needs no error.
            let _ = self.sender.send(Err(error)).await;
        }
    }

    async fn send_all(&mut self, file: &mut File) -> Result<(), Ended> {
        if let Some(lines) = self.options.tail_lines {
            let start = tail_start(file, lines).await?;
            file.seek(SeekFrom::Start(start)).await?;
        }
        let mut rest = Vec::new();
        let mut looks = 0;
        loop {
            self.send_to_end(file, &mut rest).await?;
            if !self.follow {
                return Ok(());
            }
            if self.sender.is_closed() {
                return Err(Ended::Enough);
            }
            if let Some(next) = rotated(file, &self.path).await? {
                // The old file may have got its last lines after it was read to its end.
                self.send_to_end(file, &mut rest).await?;
                *file = next;
                continue;
            }
            looks += 1;
            if looks % LOOKS_PER_STATUS == 0 && !self.still_running().await {
                // The last lines came before the exit was known.
                self.follow = false;
                continue;
            }
            tokio::time::sleep(FOLLOW).await;
        }
    }

    async fn still_running(&self) -> bool {
        match self.cri.container_status(&self.id).await {
            Ok(status) => status.is_some_and(|s| s.state() == v1::ContainerState::ContainerRunning),
            // A runtime that restarts comes back: the container goes on meanwhile.
            Err(error) => {
                tracing::debug!("log {}: {error}", self.path.display());
                true
            }
        }
    }

    /// Sends whole lines up to the end of the file; an unfinished one stays in `rest`.
    async fn send_to_end(&mut self, file: &mut File, rest: &mut Vec<u8>) -> Result<(), Ended> {
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = file.read(&mut chunk).await?;
            if read == 0 {
                return Ok(());
            }
            rest.extend_from_slice(&chunk[..read]);
            let mut out = Vec::with_capacity(read);
            let mut start = 0;
            while let Some(length) = rest[start..].iter().position(|byte| *byte == b'\n') {
                self.format(&rest[start..start + length], &mut out);
                start += length + 1;
            }
            rest.drain(..start);
            if rest.len() > MAX_LINE {
                rest.clear();
            }
            self.send(out).await?;
        }
    }

    fn format(&mut self, line: &[u8], out: &mut Vec<u8>) {
        let Some(line) = parse(line) else { return };
        if !self.wanted(&line) {
            return;
        }
        if self.options.timestamps && self.at_line_start {
            out.extend_from_slice(line.time.as_bytes());
            out.push(b' ');
        }
        out.extend_from_slice(line.text);
        if !line.partial {
            out.push(b'\n');
        }
        self.at_line_start = !line.partial;
    }

    fn wanted(&self, line: &LogLine<'_>) -> bool {
        let late_enough = self
            .options
            .since
            .is_none_or(|since| line.time.parse::<Timestamp>().is_ok_and(|time| time >= since));
        late_enough && self.options.stream.is_none_or(|stream| line.stream == stream)
    }

    async fn send(&mut self, mut out: Vec<u8>) -> Result<(), Ended> {
        let mut enough = false;
        if let Some(limit) = self.options.limit_bytes {
            let left = usize::try_from(limit.saturating_sub(self.sent)).unwrap_or(usize::MAX);
            enough = out.len() >= left;
            out.truncate(left);
        }
        self.sent += out.len() as u64;
        if !out.is_empty() && self.sender.send(Ok(out.into())).await.is_err() {
            return Err(Ended::Enough);
        }
        if enough { Err(Ended::Enough) } else { Ok(()) }
    }
}

/// The file that is at `path` now, when it is another than the open one.
async fn rotated(file: &File, path: &Path) -> std::io::Result<Option<File>> {
    let open = file.metadata().await?;
    match tokio::fs::metadata(path).await {
        Ok(now) if (now.dev(), now.ino()) != (open.dev(), open.ino()) => File::open(path).await.map(Some),
        // Between the rename and the new file there is none.
        _ => Ok(None),
    }
}

/// Where the last `lines` lines begin; reads backwards, so that a large file costs no more than its tail.
async fn tail_start(file: &mut File, lines: u64) -> std::io::Result<u64> {
    let end = file.seek(SeekFrom::End(0)).await?;
    if lines == 0 {
        return Ok(end);
    }
    let mut position = end;
    let mut seen = 0;
    let mut chunk = vec![0; CHUNK];
    while position > 0 {
        let length = position.min(CHUNK as u64);
        position -= length;
        file.seek(SeekFrom::Start(position)).await?;
        let part = &mut chunk[..usize::try_from(length).unwrap_or(CHUNK)];
        file.read_exact(part).await?;
        for (index, byte) in part.iter().enumerate().rev() {
            let at = position + index as u64;
            // The newline at the very end closes the last line and begins none.
            if *byte == b'\n' && at + 1 != end {
                seen += 1;
                if seen == lines {
                    return Ok(at + 1);
                }
            }
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    async fn tail_of(text: &str, lines: u64) -> String {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let mut open = File::open(file.path()).await.unwrap();
        let start = tail_start(&mut open, lines).await.unwrap();
        text[usize::try_from(start).unwrap()..].to_owned()
    }

    #[test]
    fn an_attempt_that_was_not_started_has_no_log() {
        use v1::ContainerState::{ContainerCreated, ContainerExited, ContainerRunning};
        let attempts = |states: &[v1::ContainerState]| {
            let made = states.iter().enumerate().map(|(n, state)| v1::Container {
                id: n.to_string(),
                state: (*state).into(),
                ..Default::default()
            });
            made.collect::<Vec<_>>()
        };
        let id = |all: &[v1::Container], previous| chosen(all, previous, false).map(|c| c.id.clone());
        let crashed = attempts(&[ContainerExited]);
        assert_eq!(id(&crashed, true), None);
        assert_eq!(chosen(&crashed, true, true).map(|c| c.id.as_str()), Some("0"));
        let first = attempts(&[ContainerCreated]);
        assert_eq!((id(&first, false), id(&first, true)), (None, None));
        let again = attempts(&[ContainerCreated, ContainerExited, ContainerExited]);
        assert_eq!((id(&again, false), id(&again, true)), (Some("1".into()), Some("1".into())));
        let running = attempts(&[ContainerRunning, ContainerExited]);
        assert_eq!((id(&running, false), id(&running, true)), (Some("0".into()), Some("1".into())));
    }

    #[tokio::test]
    async fn a_log_that_is_being_rotated_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let opening = tokio::spawn({
            let path = path.clone();
            async move { open(&path).await.is_ok() }
        });
        tokio::task::yield_now().await;
        std::fs::write(&path, "line\n").unwrap();
        assert!(opening.await.unwrap());
    }

    #[tokio::test]
    async fn tail_finds_line_starts() {
        assert_eq!(tail_of("a\nb\nc\n", 2).await, "b\nc\n");
        assert_eq!(tail_of("a\nb\nc", 1).await, "c");
        assert_eq!(tail_of("a\nb\n", 9).await, "a\nb\n");
        assert_eq!(tail_of("a\nb\n", 0).await, "");
        assert_eq!(tail_of("", 3).await, "");
        let long = format!("{}\nlast\n", "x".repeat(200_000));
        assert_eq!(tail_of(&long, 1).await, "last\n");
    }
}
