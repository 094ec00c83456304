//! One HTTP/1.1 request on a connection of its own, and TLS that takes any certificate.
//!
//! Called by `join::https`, before there is an identity, and by `probes::http`. The caller opens the connection, decides
//! whom to believe and sets the deadline. Invariant: the connection ends with the call, and no more of an answer is
//! kept than the caller allows.

use bytes::Bytes;
use http::request::Request;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

/// Why there is no answer.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What a server answered.
pub struct Answer {
    /// HTTP status.
    pub status: http::StatusCode,
    /// How long it asks to wait before the next request, where it cannot answer this one.
    pub retry_after: Option<std::time::Duration>,
    /// Body; empty when it was not wanted.
    pub body: Bytes,
}

/// How much of an answer's body is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// Nothing: the status is enough, and the connection is closed after it.
    Ignored,
    /// All of it; more than this many bytes is an error.
    AtMost(usize),
}

/// Sends the request and reads the answer.
///
/// # Errors
/// When the server hangs up, does not speak HTTP, or answers with more than is wanted.
pub async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
    wanted: Body,
) -> Result<Answer, Cause> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let send = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let retry_after = crate::patience::retry_after(status, response.headers());
        let body = match wanted {
            Body::Ignored => Bytes::new(),
            Body::AtMost(most) => Limited::new(response.into_body(), most).collect().await?.to_bytes(),
        };
        Ok(Answer { status, retry_after, body })
    };
    let mut send = std::pin::pin!(send);
    // Cancel-safe: `send` is pinned outside and goes on. The connection may end before its answer is looked at; if it
    // ended badly, `send` says how.
    tokio::select! {
        answer = &mut send => answer,
        _ = connection => send.await,
    }
}

/// What is asked of the certificate of a server that nobody vouches for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// That the server has its key, as TLS asks.
    Key,
    /// Nothing: it may even be one that nobody can read.
    Nothing,
}

/// TLS that takes any certificate.
///
/// # Errors
/// Never with the cipher suites that this program is built with.
pub fn any_certificate(proof: Proof) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone { provider, proof }))
        .with_no_client_auth();
    Ok(config)
}

#[derive(Debug)]
struct Anyone {
    provider: Arc<CryptoProvider>,
    proof: Proof,
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if self.proof == Proof::Nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let known = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if self.proof == Proof::Nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
