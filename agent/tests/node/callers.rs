//! Callers of the kubelet API, over real TLS: whoever has no business here is refused with the right status, and
//! nothing is done.

use crate::host::{Host, PODS, SOON};
use atoll_scripted_cluster::{Reach, authority, client_certificate};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::client::TlsStream;

/// Certificate and key, PEM.
type Identity = (String, String);

/// A host with a pod `p`, whose kubelet API answers.
async fn host() -> Host {
    let host = Host::ready().await;
    host.bind("p", Value::Null);
    host.wait_running("p").await;
    host.line(&["serving certificate for node-1 in use"]).await;
    host
}

async fn open(host: &Host, from: &str, identity: Option<&Identity>) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(host.cluster.ca().der().clone()).expect("a CA");
    let builder =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring has them")
            .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
            builder.with_client_auth_cert(chain, key).expect("they fit")
        }
    };
    let socket = TcpSocket::new_v4()?;
    socket.bind(format!("{from}:0").parse().expect("an address"))?;
    let to: SocketAddr = format!("127.0.0.1:{}", host.port).parse().expect("an address");
    let stream = socket.connect(to).await?;
    let name = ServerName::try_from("127.0.0.1").expect("an address");
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// Sends these bytes and reads the answer: its status and everything after it.
async fn send(host: &Host, identity: Option<&Identity>, request: &[u8]) -> std::io::Result<(u16, String)> {
    send_from(host, "127.0.0.1", identity, request).await
}

async fn send_from(
    host: &Host,
    from: &str,
    identity: Option<&Identity>,
    request: &[u8],
) -> std::io::Result<(u16, String)> {
    let talk = async {
        let mut stream = open(host, from, identity).await?;
        // The server may answer and hang up before it has read everything.
        let sent = stream.write_all(request).await;
        let mut answer = Vec::new();
        let mut chunk = vec![0; 16 * 1024];
        let ended = loop {
            match stream.read(&mut chunk).await {
                Ok(0) => break Ok(()),
                Ok(n) => answer.extend_from_slice(&chunk[..n]),
                Err(error) => break Err(error),
            }
        };
        let text = String::from_utf8_lossy(&answer).into_owned();
        match text.split(' ').nth(1).and_then(|status| status.parse().ok()) {
            Some(status) => Ok((status, text)),
            None => Err(sent.and(ended).err().unwrap_or_else(|| std::io::ErrorKind::UnexpectedEof.into())),
        }
    };
    tokio::time::timeout(SOON, talk).await.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
}

fn get(path: &str, token: Option<&str>) -> Vec<u8> {
    let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    format!("GET {path} HTTP/1.1\r\nHost: n\r\n{token}Connection: close\r\n\r\n").into_bytes()
}

/// An exec as kubectl begins it, over WebSocket.
fn exec(token: Option<&str>) -> Vec<u8> {
    let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let path = "/exec/default/p/main?command=id&output=1";
    format!(
        "GET {path} HTTP/1.1\r\nHost: n\r\n{token}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .into_bytes()
}

/// How often the runtime was asked to do something for a caller.
fn done(host: &Host, from: Instant) -> usize {
    ["Exec", "ExecSync", "Attach", "PortForward"].iter().map(|call| host.runtime.count(from, call)).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_with_every_right_is_served() {
    let host = host().await;
    let from = Instant::now();
    let admin = client_certificate(host.cluster.ca(), "admin", "g", ClientAuth);
    for verb in ["get", "create"] {
        host.cluster.allow("admin", verb, "proxy");
    }
    let (status, body) = send(&host, Some(&admin), &get("/pods", None)).await.unwrap();
    assert!(status == 200 && body.contains("\"name\":\"p\""), "{body}");
    let (status, body) =
        send(&host, Some(&admin), &get("/containerLogs/default/p/main", None)).await.unwrap();
    assert!(status == 200 && body.contains("hello from"), "{body}");
    // The pretend runtime executes nothing, but it is asked: what the other tests look for can happen.
    send(&host, Some(&admin), &get("/exec/default/p/main?command=id&output=1", None)).await.unwrap();
    assert_eq!(done(&host, from), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn name_that_was_given_to_another_pod_leads_to_that_one() {
    let host = host().await;
    let admin = client_certificate(host.cluster.ca(), "admin", "g", ClientAuth);
    host.cluster.allow("admin", "get", "proxy");
    let old = host.runtime.running("p");
    host.runtime.stall(true);
    host.cluster.remove(&format!("{PODS}/p"));
    host.bind("p", Value::Null);
    host.wait_running("p").await;
    let new = host.runtime.running("p").into_iter().find(|id| !old.contains(id)).expect("another container");
    let (status, body) =
        send(&host, Some(&admin), &get("/containerLogs/default/p/main", None)).await.unwrap();
    assert!(status == 200 && body.contains(&format!("hello from {new}")), "{body}");
    assert_eq!(host.runtime.running("p").len(), 2, "the old one is still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_without_anything_gets_401_everywhere() {
    let host = host().await;
    let from = Instant::now();
    for path in [
        "/",
        "/healthz",
        "/pods",
        "/metrics",
        "/containerLogs/default/p/main",
        "/exec/default/p/main",
        "/no/such",
    ] {
        let (status, body) = send(&host, None, &get(path, None)).await.unwrap();
        assert_eq!(status, 401, "{path}: {body}");
        assert!(!body.contains("hello from"), "{body}");
    }
    assert_eq!(send(&host, None, &exec(None)).await.unwrap().0, 401);
    assert_eq!(done(&host, from), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_with_an_unknown_token_gets_401() {
    let host = host().await;
    let from = Instant::now();
    let long = "x".repeat(20_000);
    for token in ["nobody", "", " ", "a b", long.as_str()] {
        let (status, body) = send(&host, None, &get("/pods", Some(token))).await.unwrap();
        assert_eq!(status, 401, "{body}");
    }
    assert_eq!(send(&host, None, &exec(Some("nobody"))).await.unwrap().0, 401);
    assert_eq!(done(&host, from), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_without_rights_gets_403_and_nothing_is_executed() {
    let host = host().await;
    let from = Instant::now();
    host.cluster.user("t", Some("somebody"));
    let nobody = client_certificate(host.cluster.ca(), "system:node:other", "system:nodes", ClientAuth);
    for path in
        ["/pods", "/containerLogs/default/p/main", "/exec/default/p/main?command=id&output=1", "/no/such"]
    {
        let (status, body) = send(&host, None, &get(path, Some("t"))).await.unwrap();
        assert_eq!(status, 403, "{path}: {body}");
        let (status, body) = send(&host, Some(&nobody), &get(path, None)).await.unwrap();
        assert_eq!(status, 403, "{path}: {body}");
    }
    assert_eq!(send(&host, None, &exec(Some("t"))).await.unwrap().0, 403);
    assert_eq!(done(&host, from), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_with_the_right_to_look_cannot_execute() {
    let host = host().await;
    let from = Instant::now();
    host.cluster.user("t", Some("monitor"));
    host.cluster.allow("monitor", "get", "proxy");
    assert_eq!(send(&host, None, &get("/pods", Some("t"))).await.unwrap().0, 200);
    assert_eq!(send(&host, None, &exec(Some("t"))).await.unwrap().0, 403);
    for path in [
        "/%65xec/default/p/main?command=id&output=1",
        "/attach/default/p/main?output=1",
        "/portForward/default/p",
    ] {
        let (status, body) = send(&host, None, &get(path, Some("t"))).await.unwrap();
        assert_eq!(status, 403, "{path}: {body}");
    }
    assert_eq!(done(&host, from), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_whose_token_is_revoked_is_refused_within_seconds() {
    let host = host().await;
    host.cluster.user("t", Some("monitor"));
    host.cluster.allow("monitor", "get", "proxy");
    assert_eq!(send(&host, None, &get("/pods", Some("t"))).await.unwrap().0, 200);
    host.cluster.user("t", None);
    let revoked = Instant::now();
    while send(&host, None, &get("/pods", Some("t"))).await.unwrap().0 != 401 {
        assert!(revoked.elapsed() < Duration::from_secs(20), "a revoked token still works");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(send(&host, None, &exec(Some("t"))).await.unwrap().0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_of_another_authority_or_with_a_certificate_for_servers_gets_no_connection() {
    let host = host().await;
    let from = Instant::now();
    host.cluster.allow("admin", "create", "proxy");
    let other = authority("kubernetes");
    for identity in [
        client_certificate(&other, "admin", "system:masters", ClientAuth),
        client_certificate(host.cluster.ca(), "admin", "system:masters", ServerAuth),
    ] {
        let error = send(&host, Some(&identity), &exec(None)).await.unwrap_err();
        assert!(error.to_string().contains("ertificate") || error.to_string().contains("alert"), "{error}");
    }
    assert_eq!(done(&host, from), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_is_refused_while_nobody_can_say_who_it_is() {
    let host = host().await;
    let from = Instant::now();
    host.cluster.user("t", Some("admin"));
    host.cluster.allow("admin", "create", "proxy");
    host.cluster.reach(Reach::Refused);
    let (status, body) = send(&host, None, &exec(Some("t"))).await.unwrap();
    assert_eq!(status, 500, "{body}");
    assert_eq!(done(&host, from), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_large_heads_and_bodies_are_refused_at_once() {
    let host = host().await;
    let from = Instant::now();
    let line = |name: &str, bytes: usize| format!("{name}: {}\r\n", "x".repeat(bytes));
    let with = |headers: &str| format!("GET /pods HTTP/1.1\r\nHost: n\r\n{headers}\r\n").into_bytes();
    let (status, _) = send(&host, None, &with(&line("X-Large", 300_000))).await.unwrap();
    assert_eq!(status, 431);
    let many: String = (0..500).map(|n| line(&format!("X-{n}"), 1)).collect();
    assert_eq!(send(&host, None, &with(&many)).await.unwrap().0, 431);
    let (status, _) = send(&host, None, &get(&format!("/exec/{}", "x".repeat(80_000)), None)).await.unwrap();
    assert!(status == 414 || status == 431, "{status}");
    // The body never comes: whoever waits for it waits for ever.
    let body = b"POST /exec/default/p/main HTTP/1.1\r\nHost: n\r\nContent-Length: 10000000000\r\n\r\n";
    assert_eq!(send(&host, None, body).await.unwrap().0, 401);
    let flood = [&body[..], &vec![b'x'; 4 << 20]].concat();
    match send(&host, None, &flood).await {
        Ok((status, _)) => assert_eq!(status, 401),
        // Hung up on in the middle of it.
        Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "{error}"),
    }
    assert_eq!(done(&host, from), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_callers_are_hung_up_on_and_leave_room_for_others() {
    let host = host().await;
    let admin = client_certificate(host.cluster.ca(), "admin", "g", ClientAuth);
    host.cluster.allow("admin", "get", "proxy");
    let to = format!("127.0.0.1:{}", host.port);
    let begun = Instant::now();
    // More than the whole API takes: some say nothing, some a byte at a time, some do it inside TLS.
    let mut mute = Vec::new();
    for _ in 0..600 {
        mute.push(TcpStream::connect(&to).await.unwrap());
    }
    let (status, _) = send_from(&host, "127.0.0.2", Some(&admin), &get("/pods", None)).await.unwrap();
    assert_eq!(status, 200, "another address is served meanwhile");
    for mut stream in mute {
        let ended = tokio::time::timeout(SOON, stream.read(&mut [0])).await.expect("it is hung up on");
        assert!(matches!(ended, Ok(0) | Err(_)));
    }
    let slow = async |from: &str| {
        let mut stream = open(&host, from, None).await.unwrap();
        for byte in b"GET /pods HTTP/1.1\r\nX-Slow: ".iter().chain(std::iter::repeat_n(&b'x', 600)) {
            if stream.write_all(&[*byte]).await.is_err() || stream.flush().await.is_err() {
                return;
            }
            let mut answer = [0; 64];
            // It may be told 408 before it is hung up on.
            let read = tokio::time::timeout(Duration::from_millis(100), stream.read(&mut answer)).await;
            if matches!(read, Ok(Ok(0) | Err(_))) {
                return;
            }
        }
        panic!("a head of a byte a time was waited for");
    };
    tokio::join!(slow("127.0.0.3"), slow("127.0.0.4"));
    assert!(begun.elapsed() < Duration::from_secs(45), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connection_of_a_known_caller_is_closed() {
    let host = host().await;
    let admin = client_certificate(host.cluster.ca(), "admin", "g", ClientAuth);
    host.cluster.allow("admin", "get", "proxy");
    let mut stream = open(&host, "127.0.0.1", Some(&admin)).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: n\r\n\r\n").await.unwrap();
    let ended = async {
        let mut chunk = [0; 1024];
        while !matches!(stream.read(&mut chunk).await, Ok(0) | Err(_)) {}
    };
    tokio::time::timeout(Duration::from_secs(30), ended)
        .await
        .expect("nothing more is asked, so it is closed");
}

/// Requests as nobody should send them.
/// What the kernel has started for the agent's end of a connection, and in how many milliseconds it runs out.
fn timer(stream: &TcpStream) -> Option<(u32, u64)> {
    let hex = |address: SocketAddr| {
        let SocketAddr::V4(v4) = address else { panic!("{address}") };
        format!("{:08X}:{:04X}", u32::from_ne_bytes(v4.ip().octets()), v4.port())
    };
    let (theirs, mine) =
        (hex(stream.peer_addr().expect("a peer")), hex(stream.local_addr().expect("an end")));
    let table = std::fs::read_to_string("/proc/self/net/tcp").expect("the kernel's table");
    let v6 = std::fs::read_to_string("/proc/self/net/tcp6").unwrap_or_default();
    table.lines().chain(v6.lines()).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ends = words.get(1).is_some_and(|w| w.ends_with(&theirs)) && words.get(2)?.ends_with(&mine);
        let (kind, when) = words.get(5).filter(|_| ends)?.split_once(':')?;
        // The kernel tells ticks of a hundredth of a second.
        Some((kind.parse().ok()?, u64::from_str_radix(when, 16).ok()? * 10))
    })
}

/// One whose machine is gone says nothing any more, so nothing but this ends its streams.
#[tokio::test]
async fn caller_that_falls_silent_is_asked_whether_it_is_there() {
    const KEEPALIVE: u32 = 2;
    let host = host().await;
    let admin = client_certificate(host.cluster.ca(), "admin", "g", ClientAuth);
    let stream = open(&host, "127.0.0.1", Some(&admin)).await.unwrap();
    let end = Instant::now() + Duration::from_secs(8);
    loop {
        let timer = timer(stream.get_ref().0);
        match timer {
            Some((KEEPALIVE, within)) if (1..=30_000).contains(&within) => break,
            _ => assert!(Instant::now() < end, "{timer:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn strange_requests() -> impl Strategy<Value = Vec<u8>> {
    let method = prop_oneof![
        3 => prop::sample::select(vec!["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "PRI"])
            .prop_map(str::to_owned),
        1 => "[A-Z]{1,12}",
    ];
    let part = prop_oneof![
        3 => prop::sample::select(vec!["exec", "attach", "portForward", "containerLogs", "pods", "default", "p",
            "main", "..", "%2e%2e", "%00", "healthz", "stats", "run", ""]).prop_map(str::to_owned),
        1 => "[!-~]{0,20}",
    ];
    let path = prop::collection::vec(part, 0..6).prop_map(|parts| format!("/{}", parts.join("/")));
    let query =
        prop_oneof![Just(String::new()), "\\?[!-~]{0,60}", Just("?command=id&output=1&input=1".to_owned())];
    let header = prop_oneof![
        Just("Upgrade: SPDY/3.1\r\nConnection: Upgrade".to_owned()),
        Just("Upgrade: websocket\r\nConnection: Upgrade".to_owned()),
        Just("Authorization: Bearer nobody".to_owned()),
        Just("Authorization: Basic YWRtaW46YWRtaW4=".to_owned()),
        Just("X-Remote-User: admin\r\nX-Remote-Group: system:masters".to_owned()),
        Just("Impersonate-User: admin".to_owned()),
        Just("Transfer-Encoding: chunked".to_owned()),
        Just("Content-Length: 3\r\nContent-Length: 4".to_owned()),
        "[A-Za-z-]{1,20}: [ -~]{0,40}",
        "[ -~]{0,30}",
    ];
    let headers = prop::collection::vec(header, 0..5);
    (method, path, query, headers, prop::collection::vec(any::<u8>(), 0..40)).prop_map(
        |(method, path, query, headers, body)| {
            let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
            let head =
                format!("{method} {path}{query} HTTP/1.1\r\nHost: n\r\n{headers}Connection: close\r\n\r\n");
            [head.as_bytes(), &body].concat()
        },
    )
}

/// Sends many, and answers the statuses with the requests; `None`: hung up on without one.
async fn strange(host: &Host, identity: Option<&Identity>, count: usize) -> Vec<(Option<u16>, String)> {
    let mut runner = TestRunner::deterministic();
    let mut answers = Vec::new();
    for _ in 0..count {
        let request = strange_requests().new_tree(&mut runner).expect("a request").current();
        let text = String::from_utf8_lossy(&request).into_owned();
        match send(host, identity, &request).await {
            Ok((status, _)) => answers.push((Some(status), text)),
            Err(error) => {
                assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "{text}");
                answers.push((None, text));
            }
        }
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn no_strange_request_of_a_stranger_does_anything() {
    let host = host().await;
    let from = Instant::now();
    let answers = strange(&host, None, 300).await;
    for (status, request) in &answers {
        assert!(matches!(status, Some(400 | 401 | 414 | 431) | None), "{status:?}: {request}");
    }
    assert!(answers.iter().filter(|(status, _)| *status == Some(401)).count() > 100, "most can be read");
    assert_eq!(done(&host, from), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_strange_request_of_a_caller_without_rights_does_anything() {
    let host = host().await;
    let from = Instant::now();
    let nobody = client_certificate(host.cluster.ca(), "somebody", "g", ClientAuth);
    let answers = strange(&host, Some(&nobody), 300).await;
    for (status, request) in &answers {
        assert!(matches!(status, Some(400 | 403 | 414 | 431) | None), "{status:?}: {request}");
    }
    assert!(answers.iter().filter(|(status, _)| *status == Some(403)).count() > 100, "most can be read");
    assert_eq!(done(&host, from), 0);
}
