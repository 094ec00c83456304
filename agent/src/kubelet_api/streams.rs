//! exec, attach and port-forward: asks the runtime for a streaming URL and joins the caller's upgraded connection to
//! it, byte for byte. What is spoken inside (SPDY/3.1 or WebSocket) is between the API server and the runtime.

use super::routes::Query;
use super::{Api, Body, Refusal, Slot, find, text, whole};
use atoll_cri::v1;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HOST, HeaderMap, UPGRADE};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use std::time::Duration;
use tokio::net::TcpStream;

/// Deadline for the runtime to give a URL and to answer at it.
const SETUP: Duration = Duration::from_secs(30);
/// Most of an error message that is passed on, in bytes.
const MAX_ERROR: usize = 64 * 1024;
/// Longest life of one stream; the kubelet's default for idle ones is four hours.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// A checked request for a stream.
pub(super) enum Wanted {
    Exec(v1::ExecRequest),
    Attach(v1::AttachRequest),
    PortForward(v1::PortForwardRequest),
}

impl Wanted {
    pub(super) fn exec(container_id: String, query: &Query) -> Result<Self, Refusal> {
        let cmd = query.all("command");
        if cmd.is_empty() {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "command: give at least one"));
        }
        let (stdin, stdout, stderr, tty) = directions(query)?;
        Ok(Self::Exec(v1::ExecRequest { container_id, cmd, tty, stdin, stdout, stderr }))
    }

    pub(super) fn attach(container_id: String, query: &Query) -> Result<Self, Refusal> {
        let (stdin, stdout, stderr, tty) = directions(query)?;
        Ok(Self::Attach(v1::AttachRequest { container_id, stdin, tty, stdout, stderr }))
    }

    pub(super) fn port_forward(pod_sandbox_id: String, query: &Query) -> Result<Self, Refusal> {
        // Over SPDY the ports come with the streams; over WebSocket they are in the query.
        let port = query
            .all("port")
            .iter()
            .flat_map(|list| list.split(','))
            .map(|text| text.parse::<u16>().map(i32::from))
            .collect::<Result<Vec<i32>, _>>()
            .map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, "port: give numbers from 1 to 65535"))?;
        Ok(Self::PortForward(v1::PortForwardRequest { pod_sandbox_id, port }))
    }
}

/// stdin, stdout, stderr, tty; a terminal has no stderr of its own.
fn directions(query: &Query) -> Result<(bool, bool, bool, bool), Refusal> {
    let tty = query.flag("tty");
    let (stdin, stdout) = (query.flag("input"), query.flag("output"));
    let stderr = query.flag("error") && !tty;
    if !stdin && !stdout && !stderr {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            "you must specify at least 1 of stdin, stdout, stderr",
        ));
    }
    Ok((stdin, stdout, stderr, tty))
}

/// Answers with the runtime's answer and, when that is an upgrade, joins the two connections.
pub(super) async fn serve(
    api: &Api,
    mut request: Request<Incoming>,
    wanted: Wanted,
) -> Result<Response<Body>, Refusal> {
    let url = streaming_url(api, wanted).await?;
    let late = || {
        Refusal::new(
            StatusCode::GATEWAY_TIMEOUT,
            format!("the runtime's streaming server did not answer within {} s", SETUP.as_secs()),
        )
    };
    // The stream counts as the connection that it began on, which ends with the upgrade.
    let slot = request.extensions_mut().remove::<Slot>();
    let caller = hyper::upgrade::on(&mut request);
    let mut answer = tokio::time::timeout(SETUP, forward(&url, &request)).await.map_err(|_| late())??;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ERROR).collect().await;
        return Ok(text(status, body.map(|b| b.to_bytes()).unwrap_or_default()));
    }
    let runtime = hyper::upgrade::on(&mut answer);
    tokio::spawn(async move {
        let joined = async {
            let (caller, runtime) = tokio::try_join!(caller, runtime).map_err(std::io::Error::other)?;
            tokio::io::copy_bidirectional(&mut TokioIo::new(caller), &mut TokioIo::new(runtime)).await
        };
        match tokio::time::timeout(LONGEST, joined).await {
            Ok(Ok(_)) => {}
            // A client that goes away is the usual end of a terminal.
            Ok(Err(error)) => tracing::debug!("stream ended: {error}"),
            Err(_) => tracing::info!("a stream was ended after {} h", LONGEST.as_secs() / 3600),
        }
        drop(slot);
    });
    let mut response = Response::new(whole(""));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = answer.headers().clone();
    Ok(response)
}

async fn streaming_url(api: &Api, wanted: Wanted) -> Result<Uri, Refusal> {
    let mut runtime = api.cri.runtime();
    let call = async {
        match wanted {
            Wanted::Exec(request) => runtime.exec(request).await.map(|answer| answer.into_inner().url),
            Wanted::Attach(request) => runtime.attach(request).await.map(|answer| answer.into_inner().url),
            Wanted::PortForward(request) => {
                runtime.port_forward(request).await.map(|answer| answer.into_inner().url)
            }
        }
    };
    let url = tokio::time::timeout(SETUP, call)
        .await
        .map_err(|_| Refusal::new(StatusCode::GATEWAY_TIMEOUT, "the runtime did not answer in time"))?
        .map_err(|status| {
            find::runtime_failed(crate::cri::CriError {
                call: "stream",
                object: String::new(),
                status: Box::new(status),
            })
        })?;
    url.parse()
        .map_err(|_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the runtime gave a URL that is none"))
}

/// Sends the caller's request to the runtime's streaming server.
async fn forward(url: &Uri, request: &Request<Incoming>) -> Result<Response<Incoming>, Refusal> {
    let failed = |what: &str, error: &dyn std::error::Error| {
        Refusal::new(StatusCode::BAD_GATEWAY, format!("the runtime's streaming server: {what}: {error}"))
    };
    let authority = url
        .authority()
        .ok_or_else(|| Refusal::new(StatusCode::BAD_GATEWAY, "the runtime's streaming URL has no host"))?;
    let stream =
        TcpStream::connect(authority.as_str()).await.map_err(|error| failed("cannot connect", &error))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed("handshake", &error))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!("streaming connection: {error}");
        }
    });
    let target = url.path_and_query().map_or("/", |path| path.as_str());
    let mut outgoing = Request::new(Empty::<bytes::Bytes>::new());
    *outgoing.method_mut() = request.method().clone();
    *outgoing.uri_mut() = target
        .parse()
        .map_err(|_| Refusal::new(StatusCode::BAD_GATEWAY, "the runtime's streaming URL has no path"))?;
    *outgoing.headers_mut() = passed_on(request.headers());
    if let Ok(host) = authority.as_str().parse() {
        outgoing.headers_mut().insert(HOST, host);
    }
    sender.send_request(outgoing).await.map_err(|error| failed("no answer", &error))
}

/// Headers of the upgrade itself; never the caller's credentials.
fn passed_on(headers: &HeaderMap) -> HeaderMap {
    headers
        .iter()
        .filter(|(name, _)| {
            **name == CONNECTION
                || **name == UPGRADE
                || name.as_str().starts_with("sec-websocket-")
                || name.as_str() == "x-stream-protocol-version"
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_stay_here() {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", "Bearer secret".parse().unwrap());
        headers.insert("upgrade", "SPDY/3.1".parse().unwrap());
        headers.append("x-stream-protocol-version", "v4.channel.k8s.io".parse().unwrap());
        headers.append("x-stream-protocol-version", "v3.channel.k8s.io".parse().unwrap());
        let passed = passed_on(&headers);
        assert!(!passed.contains_key("authorization"));
        assert_eq!(passed.get_all("x-stream-protocol-version").iter().count(), 2);
    }
}
