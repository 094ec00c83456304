//! Exec, attach and port forwarding over both protocols, by clients written from the protocols' side.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod fake;

use atoll_cri::v1::*;
use atoll_runtime::streaming::spdy::{Encoder, Frame, Reader};
use bytes::Bytes;
use fake::{Client, Fixture};
use futures_util::{SinkExt, StreamExt};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Message, protocol::frame::coding::CloseCode};

const DEADLINE: Duration = Duration::from_secs(20);

async fn setup(
    command: &[&str],
    change: impl FnOnce(&mut ContainerConfig),
) -> (Fixture, Client, String, String) {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("stream").await;
    let mut config = client.container_config("main", command);
    config.stdin = true;
    change(&mut config);
    let id = client.create_with(&sandbox, config).await.unwrap();
    client.start(&id).await;
    (fixture, client, sandbox, id)
}

async fn exec_url(client: &mut Client, id: &str, command: &[&str], stdin: bool, tty: bool) -> String {
    let request = ExecRequest {
        container_id: id.into(),
        cmd: command.iter().map(|c| (*c).to_owned()).collect(),
        tty,
        stdin,
        stdout: true,
        stderr: !tty,
    };
    client.runtime.exec(request).await.unwrap().into_inner().url
}

fn address(url: &str) -> (String, String) {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    (host.to_owned(), format!("/{path}"))
}

/// A SPDY client.
struct Spdy {
    reader: Reader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    encoder: Encoder,
    next: u32,
}

impl Spdy {
    async fn upgrade(url: &str, protocol: &str) -> Result<Self, String> {
        let (host, path) = address(url);
        let mut stream = TcpStream::connect(&host).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
             X-Stream-Protocol-Version: v9.channel.k8s.io\r\nX-Stream-Protocol-Version: {protocol}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await.unwrap());
        }
        let answer = String::from_utf8(answer).unwrap();
        if !answer.starts_with("HTTP/1.1 101") {
            return Err(answer);
        }
        assert!(
            answer.to_lowercase().contains(&format!("x-stream-protocol-version: {protocol}")),
            "{answer}"
        );
        let (from, writer) = stream.into_split();
        Ok(Self { reader: Reader::new(from), writer, encoder: Encoder::default(), next: 1 })
    }

    async fn send(&mut self, frame: Frame) {
        let bytes = self.encoder.encode(&frame).unwrap();
        self.writer.write_all(&bytes).await.unwrap();
    }

    async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let stream = self.next;
        self.next += 2;
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        self.send(Frame::SynStream { stream, headers, fin: false }).await;
        stream
    }

    async fn data(&mut self, stream: u32, data: &str, fin: bool) {
        self.send(Frame::Data { stream, data: Bytes::from(data.to_owned()), fin }).await;
    }

    /// Everything that comes, by stream, until all of `streams` have ended.
    async fn collect(&mut self, streams: &[u32]) -> BTreeMap<u32, String> {
        let mut all = BTreeMap::new();
        let mut open = streams.to_vec();
        let read = async {
            while !open.is_empty() {
                match self.reader.next().await.unwrap().expect("connection ended early") {
                    Frame::Data { stream, data, fin } => {
                        *all.entry(stream).or_insert_with(String::new) += std::str::from_utf8(&data).unwrap();
                        open.retain(|s| !(fin && *s == stream));
                    }
                    Frame::Reset { stream, .. } => open.retain(|s| *s != stream),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(DEADLINE, read).await.expect("streams did not end");
        all
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_over_spdy() {
    let (_fixture, mut client, _, id) = setup(&["sleep"], |_| ()).await;
    let url = exec_url(&mut client, &id, &["cat"], true, false).await;
    let mut spdy = Spdy::upgrade(&url, "v4.channel.k8s.io").await.unwrap();
    let error = spdy.open(&[("streamtype", "error")]).await;
    let stdin = spdy.open(&[("streamtype", "stdin")]).await;
    let stdout = spdy.open(&[("streamtype", "stdout")]).await;
    let stderr = spdy.open(&[("streamtype", "stderr")]).await;
    spdy.data(stdin, "one ", false).await;
    spdy.send(Frame::Ping(1)).await;
    spdy.data(stdin, "two", true).await;
    let all = spdy.collect(&[error, stdout, stderr]).await;
    assert_eq!(
        (all[&stdout].as_str(), all[&error].as_str()),
        ("one two", r#"{"metadata":{},"status":"Success"}"#)
    );

    // The same URL does not work again.
    assert!(Spdy::upgrade(&url, "v4.channel.k8s.io").await.err().unwrap().contains("404"));
    let url = exec_url(&mut client, &id, &["exit", "9"], false, false).await;
    assert!(Spdy::upgrade(&url, "v8.channel.k8s.io").await.err().unwrap().contains("403"));
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_with_a_terminal_over_spdy() {
    let (_fixture, mut client, _, id) = setup(&["sleep"], |_| ()).await;
    let url = exec_url(&mut client, &id, &["sizes"], true, true).await;
    let mut spdy = Spdy::upgrade(&url, "v4.channel.k8s.io").await.unwrap();
    let error = spdy.open(&[("streamtype", "error")]).await;
    let stdin = spdy.open(&[("streamtype", "stdin")]).await;
    let stdout = spdy.open(&[("streamtype", "stdout")]).await;
    let resize = spdy.open(&[("streamtype", "resize")]).await;
    spdy.data(resize, "{\"Width\":80,\"Height\":24}\n", false).await;
    let read = async {
        loop {
            if let Some(Frame::Data { stream, data, .. }) = spdy.reader.next().await.unwrap()
                && stream == stdout
                && data == "80x24\n"
            {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, read).await.expect("no size");
    spdy.data(stdin, "", true).await;
    assert!(spdy.collect(&[error, stdout]).await[&error].contains("Success"));
}

async fn websocket(url: &str, protocol: &str) -> tokio_tungstenite::WebSocketStream<TcpStream> {
    let (host, path) = address(url);
    let mut request = format!("ws://{host}{path}").into_client_request().unwrap();
    request.headers_mut().insert("Sec-WebSocket-Protocol", protocol.parse().unwrap());
    let stream = TcpStream::connect(&host).await.unwrap();
    let (socket, answer) = tokio_tungstenite::client_async(request, stream).await.unwrap();
    assert_eq!(answer.headers()["Sec-WebSocket-Protocol"], protocol);
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_over_websocket() {
    let (_fixture, mut client, _, id) = setup(&["sleep"], |_| ()).await;
    let url = exec_url(&mut client, &id, &["cat"], true, false).await;
    let mut socket = websocket(&url, "v5.channel.k8s.io").await;
    socket.send(Message::binary(&b"\x00hello"[..])).await.unwrap();
    socket.send(Message::binary(&[255u8, 0][..])).await.unwrap();
    let (mut stdout, mut status, mut code) = (Vec::new(), Vec::new(), None);
    let read = async {
        while let Some(Ok(message)) = socket.next().await {
            match message {
                Message::Binary(data) if data[0] == 1 => stdout.extend_from_slice(&data[1..]),
                Message::Binary(data) if data[0] == 3 => status.extend_from_slice(&data[1..]),
                Message::Close(frame) => code = frame.map(|f| f.code),
                _ => {}
            }
        }
    };
    tokio::time::timeout(DEADLINE, read).await.expect("the socket was not closed");
    assert_eq!((stdout.as_slice(), code), (&b"hello"[..], Some(CloseCode::Normal)));
    assert_eq!(String::from_utf8(status).unwrap(), r#"{"metadata":{},"status":"Success"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_sees_output_and_gives_input() {
    let (_fixture, mut client, _, id) = setup(&["cat"], |config| config.stdin_once = true).await;
    let request =
        AttachRequest { container_id: id.clone(), stdin: true, tty: false, stdout: true, stderr: true };
    let url = client.runtime.attach(request).await.unwrap().into_inner().url;
    let mut spdy = Spdy::upgrade(&url, "v4.channel.k8s.io").await.unwrap();
    let error = spdy.open(&[("streamtype", "error")]).await;
    let stdin = spdy.open(&[("streamtype", "stdin")]).await;
    let stdout = spdy.open(&[("streamtype", "stdout")]).await;
    let stderr = spdy.open(&[("streamtype", "stderr")]).await;
    spdy.data(stdin, "through attach\n", true).await;
    let all = spdy.collect(&[error, stdout, stderr]).await;
    assert_eq!(all[&stdout], "through attach\n");
    let ended = client.ended(&id).await;
    assert_eq!(ended.exit_code, 0);
    assert!(std::fs::read_to_string(&ended.log_path).unwrap().contains("through attach"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forwarded_connection_that_fails_says_why() {
    let (_fixture, mut client, sandbox, _) = setup(&["sleep"], |_| ()).await;
    let request = PortForwardRequest { pod_sandbox_id: sandbox, port: vec![] };
    let url = client.runtime.port_forward(request).await.unwrap().into_inner().url;
    let mut spdy = Spdy::upgrade(&url, "portforward.k8s.io").await.unwrap();
    let error = spdy.open(&[("streamtype", "error"), ("port", "x"), ("requestid", "0")]).await;
    let data = spdy.open(&[("streamtype", "data"), ("port", "x"), ("requestid", "0")]).await;
    let all = spdy.collect(&[error, data]).await;
    assert!(all[&error].contains("'x' is not a port"), "{all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_upgrade_is_refused() {
    let (_fixture, mut client, _, id) = setup(&["sleep"], |_| ()).await;
    let url = exec_url(&mut client, &id, &["cat"], true, false).await;
    let (host, path) = address(&url);
    for (path, expect) in [("/exec/guess", "404"), ("/", "404"), (path.as_str(), "400")] {
        let mut stream = TcpStream::connect(&host).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {expect}")), "{answer}");
    }
}
