//! One HTTPS request at a time, for the conversation before there is an identity.
//!
//! Invariant: the token can only be given to a [`Verified`] connection. [`fetch_unverified`] sends a path and nothing
//! else, so there is no way to leak anything through it.

use super::token::{Server, Token};
use super::{JoinError, Result};
use crate::exchange::{Body, Cause, Proof, any_certificate, exchange as converse};
use bytes::Bytes;
use http_body_util::Full;
use rustls::{CertificateError, ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub use crate::exchange::Answer;

/// Longest one request may take, from the connection to the end of the answer.
const REQUEST: Duration = Duration::from_secs(20);
/// Longest answer, in bytes.
const ANSWER: usize = 4 << 20;

/// Reads a public object from a server that nobody vouches for yet.
///
/// # Errors
/// When it cannot be reached.
pub async fn fetch_unverified(server: &Server, path: &str) -> Result<Answer> {
    let config = any_certificate(Proof::Key).map_err(|error| unreachable(server, error.into()))?;
    exchange(server, config, request(server, "GET", path, None, Bytes::new())).await
}

/// A server whose certificate must come from the cluster's CA.
pub struct Verified {
    server: Server,
    config: ClientConfig,
}

impl Verified {
    /// Of the CAs that pin and signature vouch for.
    ///
    /// # Errors
    /// When they are not certificates.
    pub fn new(server: &Server, ca_pem: &str) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots =
            roots(ca_pem).map_err(|reason| JoinError::ClusterInfo { server: server.clone(), reason })?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring has cipher suites for TLS 1.2 and 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { server: server.clone(), config })
    }

    /// Reads an object, with the token where one is given.
    ///
    /// # Errors
    /// When the server cannot be reached or its certificate is not the cluster's.
    pub async fn get(&self, path: &str, token: Option<&Token>) -> Result<Answer> {
        let request = request(&self.server, "GET", path, token, Bytes::new());
        exchange(&self.server, self.config.clone(), request).await
    }

    /// Creates an object.
    ///
    /// # Errors
    /// As [`Verified::get`].
    pub async fn post(&self, path: &str, token: &Token, body: Bytes) -> Result<Answer> {
        let request = request(&self.server, "POST", path, Some(token), body);
        exchange(&self.server, self.config.clone(), request).await
    }
}

/// Certificates of a PEM text, as roots.
pub(crate) fn roots(pem: &str) -> std::result::Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let der = der.map_err(|error| format!("the CA is not PEM: {error}"))?;
        roots.add(der).map_err(|error| format!("the CA cannot be used: {error}"))?;
    }
    if roots.is_empty() {
        return Err("there is no CA".into());
    }
    Ok(roots)
}

fn request(
    server: &Server,
    method: &str,
    path: &str,
    token: Option<&Token>,
    body: Bytes,
) -> http::Result<http::Request<Full<Bytes>>> {
    let mut request = http::Request::builder()
        .method(method)
        .uri(path)
        .header("host", server.authority())
        .header("accept", "application/json")
        .header("user-agent", concat!("atoll-agent/", env!("CARGO_PKG_VERSION")));
    if let Some(token) = token {
        request = request.header("authorization", token.authorization());
    }
    if !body.is_empty() {
        request = request.header("content-type", "application/json");
    }
    request.body(Full::new(body))
}

async fn exchange(
    server: &Server,
    config: ClientConfig,
    request: http::Result<http::Request<Full<Bytes>>>,
) -> Result<Answer> {
    let talk = async {
        let request = request.map_err(|error| unreachable(server, error.into()))?;
        let tls = connect(server, config).await?;
        converse(tls, request, Body::AtMost(ANSWER)).await.map_err(|source| unreachable(server, source))
    };
    match tokio::time::timeout(REQUEST, talk).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(unreachable(server, elapsed.into())),
    }
}

fn unreachable(server: &Server, source: Cause) -> JoinError {
    JoinError::Unreachable { server: server.clone(), source }
}

async fn connect(server: &Server, config: ClientConfig) -> Result<TlsStream<TcpStream>> {
    let name =
        ServerName::try_from(server.host.clone()).map_err(|error| unreachable(server, error.into()))?;
    let stream = TcpStream::connect((server.host.as_str(), server.port))
        .await
        .map_err(|error| unreachable(server, error.into()))?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|source| {
        match source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(error) => match out_of_time(error) {
                Some(is) => {
                    JoinError::Clock { server: server.clone(), now: jiff::Timestamp::now(), is, source }
                }
                None => JoinError::Certificate { server: server.clone(), source },
            },
            None => unreachable(server, source.into()),
        }
    })
}

/// Since when or from when a certificate is not in force, when that is all that is wrong with it.
fn out_of_time(error: &rustls::Error) -> Option<String> {
    let moment = |time: &UnixTime| {
        let seconds = i64::try_from(time.as_secs()).ok().map(jiff::Timestamp::from_second);
        seconds
            .and_then(std::result::Result::ok)
            .map_or_else(|| "an unknown time".to_owned(), |time| time.to_string())
    };
    match error {
        rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. }) => {
            Some(format!("expired at {}", moment(not_after)))
        }
        rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext { not_before, .. }) => {
            Some(format!("is not valid before {}", moment(not_before)))
        }
        _ => None,
    }
}
