//! The HTTP side: one-time URLs, upgrades.
//!
//! Run by `main` beside the CRI server. Invariant: every connection is a task of this server's set, which ends with it.

use super::{Job, Streaming, Streams, forward, remote, spdy, websocket};
use crate::service::Service;
use bytes::Bytes;
use http::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use websocket::Protocol;

const SPDY: &str = "SPDY/3.1";
const VERSIONS: &str = "X-Stream-Protocol-Version";
const ACCEPTED: &str = "X-Accepted-Stream-Protocol-Versions";
const SUBPROTOCOL: &str = "Sec-WebSocket-Protocol";
/// Protocols of exec and attach over SPDY.
const REMOTE: [&str; 3] = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io"];
/// Protocol of port forwarding over SPDY.
const FORWARD: [&str; 1] = ["portforward.k8s.io"];
/// Time for the head of a request.
const HEAD_DEADLINE: Duration = Duration::from_secs(20);

type Answer = Response<Full<Bytes>>;

/// Serves until `stop` says so; sessions that still run then are cut off.
pub async fn serve(
    listener: TcpListener,
    streaming: Streaming,
    service: Service,
    mut stop: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    loop {
        // Cancel-safe: accept and wait_for lose nothing.
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|s| *s) => return,
        };
        while connections.try_join_next().is_some() {}
        let (stream, _) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a streaming connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true); // only speed
        let (streaming, service) = (streaming.clone(), service.clone());
        connections.spawn(async move {
            let handler = service_fn(move |request| handle(request, streaming.clone(), service.clone()));
            let server = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_DEADLINE)
                .serve_connection(TokioIo::new(stream), handler)
                .with_upgrades();
            if let Err(error) = server.await {
                tracing::debug!(%error, "streaming connection ended");
            }
        });
    }
}

fn refuse(status: StatusCode, why: impl Into<String>) -> Answer {
    let mut answer = Response::new(Full::from(why.into() + "\n"));
    *answer.status_mut() = status;
    answer
}

async fn handle(
    request: Request<Incoming>,
    streaming: Streaming,
    service: Service,
) -> Result<Answer, Infallible> {
    if request.method() != Method::GET && request.method() != Method::POST {
        return Ok(refuse(StatusCode::METHOD_NOT_ALLOWED, "use GET or POST"));
    }
    let path = request.uri().path().to_owned();
    let mut parts = path.trim_start_matches('/').splitn(2, '/');
    let (verb, token) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let Some(job) = streaming.redeem(verb, token) else {
        return Ok(refuse(StatusCode::NOT_FOUND, "no such session: a URL works once, within a minute"));
    };
    let upgrade = header(request.headers(), UPGRADE.as_str()).to_ascii_lowercase();
    let upgrades = header(request.headers(), CONNECTION.as_str()).to_ascii_lowercase().contains("upgrade");
    Ok(if upgrades && upgrade == "websocket" {
        over_websocket(request, job, service)
    } else if upgrades && upgrade == SPDY.to_ascii_lowercase() {
        over_spdy(request, job, service)
    } else {
        refuse(StatusCode::BAD_REQUEST, "this URL is for an upgrade to SPDY/3.1 or WebSocket")
    })
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
}

/// Every value of a header that holds lists.
fn listed<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    let values = headers.get_all(name).into_iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).map(str::trim).filter(|v| !v.is_empty()).collect()
}

fn switching(protocol: &'static str) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.headers_mut().insert(UPGRADE, HeaderValue::from_static(protocol));
    answer
}

fn over_spdy(request: Request<Incoming>, job: Job, service: Service) -> Answer {
    let ours: &[&'static str] = if matches!(job, Job::PortForward { .. }) { &FORWARD } else { &REMOTE };
    let theirs = listed(request.headers(), VERSIONS);
    let chosen = theirs.iter().find_map(|t| ours.iter().find(|o| *o == t)).copied();
    let Some(protocol) = chosen else {
        let why =
            format!("unable to negotiate protocol: client supports {theirs:?}, server accepts {ours:?}");
        let mut answer = refuse(StatusCode::FORBIDDEN, why);
        for name in ours {
            answer.headers_mut().append(ACCEPTED, HeaderValue::from_static(name));
        }
        return answer;
    };
    // Ends with the session.
    tokio::spawn(async move {
        let upgraded = match hyper::upgrade::on(request).await {
            Ok(upgraded) => upgraded,
            Err(error) => return tracing::debug!(%error, "a client did not complete its upgrade"),
        };
        let connection = spdy::Connection::start(TokioIo::new(upgraded));
        match job {
            Job::PortForward { sandbox, .. } => forward::over_spdy(service, sandbox, connection).await,
            Job::Exec { container, command, streams } => {
                if let Some(remote) = remote_over_spdy(connection, streams, protocol).await {
                    remote::exec(&service, container, command, streams, remote).await;
                }
            }
            Job::Attach { container, streams } => {
                if let Some(remote) = remote_over_spdy(connection, streams, protocol).await {
                    remote::attach(&service, container, streams, remote).await;
                }
            }
        }
    });
    let mut answer = switching(SPDY);
    answer.headers_mut().insert(VERSIONS, HeaderValue::from_static(protocol));
    answer
}

async fn remote_over_spdy(
    connection: spdy::Connection,
    streams: Streams,
    protocol: &str,
) -> Option<remote::Remote> {
    let remote = remote::over_spdy(connection, streams, protocol).await;
    remote.inspect_err(|error| tracing::warn!(%error, "a streaming session did not come about")).ok()
}

fn over_websocket(request: Request<Incoming>, job: Job, service: Service) -> Answer {
    let ours: &[Protocol] =
        if matches!(job, Job::PortForward { .. }) { &websocket::FORWARD } else { &websocket::REMOTE };
    let theirs = listed(request.headers(), SUBPROTOCOL);
    let chosen = theirs.iter().find_map(|t| ours.iter().find(|o| o.name == *t)).copied();
    let protocol = match chosen {
        Some(protocol) => protocol,
        None if theirs.is_empty() => websocket::UNNAMED,
        None => {
            return refuse(StatusCode::FORBIDDEN, format!("none of the protocols {theirs:?} is spoken here"));
        }
    };
    let key = header(request.headers(), "Sec-WebSocket-Key").to_owned();
    if key.is_empty() || header(request.headers(), "Sec-WebSocket-Version") != "13" {
        return refuse(StatusCode::BAD_REQUEST, "not a WebSocket handshake of version 13");
    }
    let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
    // Ends with the session.
    tokio::spawn(async move {
        let upgraded = match hyper::upgrade::on(request).await {
            Ok(upgraded) => upgraded,
            Err(error) => return tracing::debug!(%error, "a client did not complete its upgrade"),
        };
        let socket = websocket::Socket::new(upgraded, protocol).await;
        match job {
            Job::PortForward { sandbox, ports } => {
                forward::over_websocket(service, sandbox, ports, socket).await
            }
            Job::Exec { container, command, streams } => {
                let remote = remote::over_websocket(socket, streams);
                remote::exec(&service, container, command, streams, remote).await;
            }
            Job::Attach { container, streams } => {
                let remote = remote::over_websocket(socket, streams);
                remote::attach(&service, container, streams, remote).await;
            }
        }
    });
    let mut answer = switching("websocket");
    if let Ok(value) = HeaderValue::from_str(&accept) {
        answer.headers_mut().insert("Sec-WebSocket-Accept", value);
    }
    if !protocol.name.is_empty() {
        answer.headers_mut().insert(SUBPROTOCOL, HeaderValue::from_static(protocol.name));
    }
    answer
}
