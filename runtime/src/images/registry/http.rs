//! One HTTP/1.1 exchange over TCP or TLS: a connection for each request. A pull makes a handful of requests, so
//! a pool would save little and hide which connection failed.

use super::tls::Connectors;
use bytes::Bytes;
use http::header::{HOST, USER_AGENT};
use http::{HeaderValue, Request, Response, Uri};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

const CONNECT_DEADLINE: Duration = Duration::from_secs(20);

/// Body of an answer.
pub type Body = Incoming;

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection.
    #[error("cannot connect to {host}: {source}")]
    Connect {
        /// Host and port.
        host: String,
        /// Why.
        source: std::io::Error,
    },
    /// The address is not usable, or TLS could not be set up.
    #[error("{0}")]
    Setup(String),
    /// TLS was refused, by us or by them.
    #[error("{0}")]
    Untrusted(std::io::Error),
    /// The exchange broke.
    #[error("{}", chain(.0))]
    Broken(#[from] hyper::Error),
    /// Silence.
    #[error("nothing came for {0} s")]
    Silent(u64),
    /// More than expected.
    #[error("the answer is longer than {0} bytes")]
    TooLarge(u64),
}

/// hyper's messages say what failed, their sources say why.
fn chain(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Connects, sends, and returns the head with the body to be read.
pub async fn exchange(
    mut request: Request<String>,
    connectors: &Connectors,
) -> Result<Response<Body>, Error> {
    let uri = request.uri().clone();
    let setup = |why: &str| Error::Setup(format!("{uri}: {why}"));
    let authority = uri.authority().ok_or_else(|| setup("no host"))?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let secure = uri.scheme_str() == Some("https");
    let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let value = HeaderValue::from_str(authority.as_str()).map_err(|_| setup("an odd host"))?;
    request.headers_mut().insert(HOST, value);
    request
        .headers_mut()
        .insert(USER_AGENT, HeaderValue::from_static(concat!("atoll/", env!("CARGO_PKG_VERSION"))));
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = path.parse::<Uri>().map_err(|_| setup("an odd path"))?;

    let connecting = TcpStream::connect((host.as_str(), port));
    let failed = |source| Error::Connect { host: format!("{host}:{port}"), source };
    let stream = match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
        Ok(stream) => stream.map_err(failed)?,
        Err(_) => return Err(failed(std::io::ErrorKind::TimedOut.into())),
    };
    // Small requests, one at a time: waiting to fill a packet only delays them.
    stream.set_nodelay(true).map_err(failed)?;
    if secure {
        let connector = connectors.connector(authority.as_str()).map_err(Error::Setup)?;
        let name =
            rustls_pki_types::ServerName::try_from(host.clone()).map_err(|_| setup("an odd host name"))?;
        let stream = tokio::time::timeout(CONNECT_DEADLINE, connector.connect(name, stream)).await;
        let stream = stream.map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))?;
        let stream = stream.map_err(|error| match error.kind() {
            // What TLS has against the peer comes as this kind.
            std::io::ErrorKind::InvalidData => Error::Untrusted(error),
            _ => failed(error),
        })?;
        speak(stream, request).await
    } else {
        speak(stream, request).await
    }
}

async fn speak(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<String>,
) -> Result<Response<Body>, Error> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the body: when it has been read or dropped, the connection has nothing left to do.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!("a connection to a registry ended: {error}");
        }
    });
    Ok(sender.send_request(request).await?)
}

/// The next piece of a body; `None` at its end.
pub async fn next_chunk(body: &mut Body, silence: Duration) -> Result<Option<Bytes>, Error> {
    loop {
        let frame = tokio::time::timeout(silence, body.frame()).await;
        match frame.map_err(|_| Error::Silent(silence.as_secs()))? {
            None => return Ok(None),
            Some(frame) => {
                // Trailers are of no interest.
                if let Ok(data) = frame?.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

/// A whole body of at most `limit` bytes.
pub async fn read_all(mut body: Body, limit: u64, silence: Duration) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = next_chunk(&mut body, silence).await? {
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(Error::TooLarge(limit));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}
