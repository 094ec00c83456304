//! Exec and attach, whatever protocol carries them.
//!
//! `spdy` and `websocket` connections become a [`Remote`]: input and sizes come in, output and one status go out. Called
//! by `server`. Invariant: the status is the last thing sent, after all output; a peer that is gone ends the session.

use super::{Streams, spdy, websocket};
use crate::console::Output;
use crate::error::{Error, Result};
use crate::exec::{Exec, ExecEvent, ExecInput};
use crate::service::{Command, RunningContainer, Service};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::sync::mpsc;

/// How long a client may take to open its streams.
const STREAMS_DEADLINE: Duration = Duration::from_secs(30);

/// Size of a terminal, as it is on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Size {
    /// Columns.
    #[serde(rename = "Width", alias = "width")]
    pub columns: u16,
    /// Rows.
    #[serde(rename = "Height", alias = "height")]
    pub rows: u16,
}

/// What goes to the client.
#[derive(Debug)]
pub enum Out {
    /// Output.
    Output(Output),
    /// How it ended; the last.
    Status(Ending),
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Well.
    Success,
    /// The command ended with this code.
    ExitCode(i32),
    /// Something else went wrong.
    Failure(String),
}

#[derive(Serialize)]
struct WireStatus {
    metadata: Empty,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Details {
    causes: [Cause; 1],
}

#[derive(Serialize)]
struct Cause {
    reason: &'static str,
    message: String,
}

impl Ending {
    /// As protocol versions 4 and later have it: a Kubernetes `Status`.
    pub fn json(&self) -> String {
        let base = WireStatus {
            metadata: Empty {},
            status: "Failure",
            message: None,
            reason: None,
            details: None,
            code: None,
        };
        let status = match self {
            Self::Success => WireStatus { status: "Success", ..base },
            Self::ExitCode(code) => WireStatus {
                message: Some(format!("command terminated with non-zero exit code: exit status {code}")),
                reason: Some("NonZeroExitCode"),
                details: Some(Details { causes: [Cause { reason: "ExitCode", message: code.to_string() }] }),
                ..base
            },
            Self::Failure(why) => WireStatus {
                message: Some(format!("Internal error occurred: {why}")),
                reason: Some("InternalError"),
                code: Some(500),
                ..base
            },
        };
        serde_json::to_string(&status).unwrap_or_default()
    }

    /// As earlier versions have it: words, and only for a failure.
    pub fn text(&self) -> String {
        match self {
            Self::Success => String::new(),
            Self::ExitCode(code) => format!("command terminated with exit code {code}"),
            Self::Failure(why) => why.clone(),
        }
    }
}

/// A client, whatever protocol it speaks.
pub struct Remote {
    /// Input; closed when the client has sent all.
    pub stdin: mpsc::Receiver<Bytes>,
    /// Terminal sizes.
    pub resize: mpsc::Receiver<Size>,
    /// What goes to it; closed when it is gone.
    pub out: mpsc::Sender<Out>,
}

/// Reads terminal sizes from JSON objects in a row.
pub fn parse_sizes(buffer: &mut Vec<u8>, data: &[u8]) -> Vec<Size> {
    buffer.extend_from_slice(data);
    let mut sizes = Vec::new();
    let mut stream = serde_json::Deserializer::from_slice(buffer).into_iter::<Size>();
    let mut used = 0;
    while let Some(Ok(size)) = stream.next() {
        sizes.push(size);
        used = stream.byte_offset();
    }
    drop(stream);
    buffer.drain(..used);
    // A size is a few bytes: what has not become one by then never will.
    if buffer.len() > 4096 {
        buffer.clear();
    }
    sizes
}

/// A SPDY connection as a client: waits until it has opened its streams.
pub async fn over_spdy(mut connection: spdy::Connection, streams: Streams, protocol: &str) -> Result<Remote> {
    let resizable = matches!(protocol, "v3.channel.k8s.io" | "v4.channel.k8s.io");
    let wanted =
        [("error", true), ("stdin", streams.stdin), ("stdout", streams.stdout), ("stderr", streams.stderr)];
    let mut missing: Vec<&str> = wanted.iter().filter(|(_, w)| *w).map(|(n, _)| *n).collect();
    if streams.tty && resizable {
        missing.push("resize");
    }
    let mut opened: Vec<(&str, spdy::Incoming)> = Vec::new();
    let open = async {
        while !missing.is_empty() {
            let incoming = connection.incoming.recv().await?;
            let kind = incoming.header("streamtype").unwrap_or_default().to_owned();
            if let Some(at) = missing.iter().position(|m| *m == kind) {
                opened.push((missing.remove(at), incoming));
            }
        }
        Some(())
    };
    let gone = || Error::State("the client went away before it had opened its streams".to_owned());
    let what = || "waiting for the client's streams".to_owned();
    crate::error::within(STREAMS_DEADLINE, what, open).await?.ok_or_else(gone)?;

    let number = |name: &str| opened.iter().find(|(n, _)| *n == name).map(|(_, i)| i.stream);
    let outputs = Outputs {
        stdout: number("stdout"),
        stderr: number("stderr"),
        error: number("error").unwrap_or_default(),
        json: protocol == "v4.channel.k8s.io",
    };
    let mut take = |name: &str| {
        let at = opened.iter().position(|(n, _)| *n == name)?;
        Some(opened.swap_remove(at).1.data)
    };
    let stdin = take("stdin").unwrap_or_else(|| mpsc::channel(1).1);
    let (sizes, resize) = mpsc::channel(8);
    if let Some(data) = take("resize") {
        // Ends with the stream.
        tokio::spawn(read_sizes(data, sizes));
    }
    let (out, outgoing) = mpsc::channel(16);
    // Ends with the session, or the connection.
    tokio::spawn(outputs.write(connection, outgoing));
    Ok(Remote { stdin, resize, out })
}

async fn read_sizes(mut data: mpsc::Receiver<Bytes>, sizes: mpsc::Sender<Size>) {
    let mut buffer = Vec::new();
    while let Some(data) = data.recv().await {
        for size in parse_sizes(&mut buffer, &data) {
            if sizes.send(size).await.is_err() {
                return;
            }
        }
    }
}

struct Outputs {
    stdout: Option<u32>,
    stderr: Option<u32>,
    error: u32,
    json: bool,
}

impl Outputs {
    async fn write(self, connection: spdy::Connection, mut outgoing: mpsc::Receiver<Out>) {
        let writer = &connection.writer;
        loop {
            // Cancel-safe: neither a receive nor waiting for the end loses anything.
            let out = tokio::select! {
                out = outgoing.recv() => out,
                () = writer.closed() => return,
            };
            let (stream, data) = match out {
                Some(Out::Output(Output::Stdout(data))) => (self.stdout, data),
                Some(Out::Output(Output::Stderr(data))) => (self.stderr, data),
                Some(Out::Status(ending)) => {
                    let text = if self.json { ending.json() } else { ending.text() };
                    writer.data(self.error, text.into()).await;
                    break;
                }
                None => break,
            };
            if let Some(stream) = stream
                && !writer.data(stream, data).await
            {
                return;
            }
        }
        for stream in [self.stdout, self.stderr, Some(self.error)].into_iter().flatten() {
            writer.end(stream).await;
        }
    }
}

/// A WebSocket as a client.
pub fn over_websocket(socket: websocket::Socket, streams: Streams) -> Remote {
    let (input, stdin) = mpsc::channel(64);
    let (sizes, resize) = mpsc::channel(8);
    let (out, outgoing) = mpsc::channel(16);
    // Ends with the session, or the connection.
    tokio::spawn(websocket::serve_remote(socket, streams, input, sizes, outgoing));
    Remote { stdin, resize, out }
}

/// Runs a command for a client.
pub async fn exec(
    service: &Service,
    container: String,
    command: Vec<String>,
    streams: Streams,
    remote: Remote,
) {
    let Remote { stdin, resize, out } = remote;
    let session = async {
        let container = service.ask(|reply| Command::UseContainer(container, reply)).await?;
        let (input, mut output) = Exec::start(&container, command, streams.tty, streams.stdin).await?.split();
        let pump = async {
            loop {
                match output.next().await? {
                    ExecEvent::Output(data) => drop(out.send(Out::Output(data)).await),
                    ExecEvent::Exited(code) => return Ok::<i32, Error>(code),
                }
            }
        };
        // The first to end ends the session; dropping `output` kills a command whose client is gone.
        tokio::select! {
            code = pump => code.map(Some),
            () = feed(input, stdin, resize, streams) => Ok(None),
            () = out.closed() => Ok(None),
        }
    };
    let ending = match session.await {
        Ok(Some(0)) => Ending::Success,
        Ok(Some(code)) => Ending::ExitCode(code),
        Ok(None) => return,
        Err(error) => start_failure(error),
    };
    let _ = out.send(Out::Status(ending)).await; // the client may have gone
}

/// A command that is not there ends like a shell's would.
fn start_failure(error: Error) -> Ending {
    use atoll_spec::guest::GuestErrorKind as Kind;
    match error {
        Error::Guest { kind: Kind::CommandNotFound, message, .. } => {
            Ending::Failure(format!("error executing command in container: {message}"))
        }
        error => Ending::Failure(format!("error executing command in container: {error}")),
    }
}

/// Input and sizes to the command; never ends by itself.
async fn feed(
    mut input: ExecInput,
    mut stdin: mpsc::Receiver<Bytes>,
    mut resize: mpsc::Receiver<Size>,
    streams: Streams,
) {
    let mut open = streams.stdin;
    loop {
        // Cancel-safe: receives lose nothing.
        let sent = tokio::select! {
            data = stdin.recv(), if open => match data {
                Some(data) if data.is_empty() => Ok(()),
                Some(data) => input.write(&data).await,
                None => {
                    open = false;
                    input.write(&[]).await
                }
            },
            Some(size) = resize.recv() => input.resize(size.columns, size.rows).await,
            else => break,
        };
        if sent.is_err() {
            break; // the command has ended: its output says how
        }
    }
    std::future::pending().await
}

/// Follows a container's own process for a client.
pub async fn attach(service: &Service, container: String, streams: Streams, remote: Remote) {
    let Remote { stdin, resize, out } = remote;
    let session = async {
        let container = service.ask(|reply| Command::UseContainer(container, reply)).await?;
        let ended = || Error::State(format!("container {} has no output to follow", container.id));
        let console = container.console.clone().ok_or_else(ended)?;
        let mut output = console.attach();
        let show = async {
            while let Some(data) = output.recv().await {
                let wanted = match data {
                    Output::Stdout(_) => streams.stdout,
                    Output::Stderr(_) => streams.stderr,
                };
                if wanted && out.send(Out::Output(data)).await.is_err() {
                    return;
                }
            }
        };
        // The end of the output ends the session, and so does a client that is gone.
        tokio::select! {
            () = show => {}
            () = feed_console(&container, stdin, resize, streams) => {}
            () = out.closed() => {}
        }
        Ok(())
    };
    let ending = match session.await {
        Ok(()) => Ending::Success,
        Err(error @ (Error::State(_) | Error::NotFound { .. })) => Ending::Failure(error.to_string()),
        Err(error) => Ending::Failure(format!("error attaching to container: {error}")),
    };
    let _ = out.send(Out::Status(ending)).await; // the client may have gone
}

async fn feed_console(
    container: &RunningContainer,
    mut stdin: mpsc::Receiver<Bytes>,
    mut resize: mpsc::Receiver<Size>,
    streams: Streams,
) {
    let Some(console) = &container.console else { return std::future::pending().await };
    let mut open = streams.stdin && container.spec.stdin;
    loop {
        // Cancel-safe: receives lose nothing.
        let sent = tokio::select! {
            data = stdin.recv(), if open => match data {
                Some(data) if data.is_empty() => Ok(()),
                Some(data) => console.input(&data).await,
                None => {
                    open = false;
                    if container.spec.stdin_once { console.close_input().await } else { Ok(()) }
                }
            },
            Some(size) = resize.recv() => console.resize(size.columns, size.rows).await,
            else => break,
        };
        if sent.is_err() {
            break; // the container has ended: so will its output
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_across_pieces() {
        let mut buffer = Vec::new();
        assert_eq!(parse_sizes(&mut buffer, b"{\"Width\":80,\"Hei"), []);
        let sizes = parse_sizes(&mut buffer, b"ght\":24}\n{\"Width\":1,\"Height\":2}{");
        assert_eq!(sizes, [Size { columns: 80, rows: 24 }, Size { columns: 1, rows: 2 }]);
        assert_eq!(buffer, b"{");
        assert_eq!(parse_sizes(&mut buffer, &[b'x'; 5000]), []);
        assert!(buffer.is_empty());
    }

    #[test]
    fn endings_are_worded_as_clients_read_them() {
        assert_eq!(Ending::Success.json(), r#"{"metadata":{},"status":"Success"}"#);
        let code = Ending::ExitCode(3).json();
        assert!(
            code.contains(
                r#""reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}"#
            ),
            "{code}"
        );
        assert!(Ending::Failure("x".into()).json().contains(r#""code":500"#));
    }
}
