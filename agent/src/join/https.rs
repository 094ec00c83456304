//! One HTTPS request at a time, for the conversation before there is an identity.
//!
//! Invariant: the token can only be given to a [`Verified`] connection. [`fetch_unverified`] sends a path and nothing
//! else, so there is no way to leak anything through it.

use super::token::{Server, Token};
use super::{JoinError, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Longest one request may take, from the connection to the end of the answer.
const REQUEST: Duration = Duration::from_secs(20);
/// Longest answer, in bytes.
const ANSWER: usize = 4 << 20;

/// What a server answered.
pub struct Answer {
    /// HTTP status.
    pub status: http::StatusCode,
    /// Body.
    pub body: Bytes,
}

/// Reads a public object from a server that nobody vouches for yet.
///
/// # Errors
/// When it cannot be reached.
pub async fn fetch_unverified(server: &Server, path: &str) -> Result<Answer> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = builder(&provider)
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
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
        let config = builder(&provider).with_root_certificates(roots).with_no_client_auth();
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

fn builder(provider: &Arc<CryptoProvider>) -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .expect("ring has cipher suites for TLS 1.2 and 1.3")
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
        converse(tls, request).await.map_err(|source| unreachable(server, source))
    };
    match tokio::time::timeout(REQUEST, talk).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(unreachable(server, elapsed.into())),
    }
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

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
        if source.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
            JoinError::Certificate { server: server.clone(), source }
        } else {
            unreachable(server, source.into())
        }
    })
}

/// One request and its answer; the connection is closed after it.
async fn converse(
    tls: TlsStream<TcpStream>,
    request: http::Request<Full<Bytes>>,
) -> std::result::Result<Answer, Cause> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
    let send = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER).collect().await?;
        Ok(Answer { status, body: body.to_bytes() })
    };
    tokio::pin!(send);
    // Cancel-safe: `send` is pinned outside and goes on; the connection is not needed any more once it is over.
    tokio::select! {
        answer = &mut send => answer,
        ended = connection => {
            ended?;
            send.await
        }
    }
}

/// Takes any certificate: for reading what is public, and proves itself by signature and pin.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
