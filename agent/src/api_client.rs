//! The client of the API server: HTTP/2 over TLS with a certificate that can be replaced while it is in use.
//!
//! Called by `app`. Invariants: after [`Credentials::replace`] no connection lives on that was made with the old
//! certificate, and none is resumed; a client that the server asked to wait ([`Patience`]) waits.

use crate::error::{Error, Result};
use crate::join::https::roots;
use crate::join::token::Server;
use crate::patience::Patience;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, SignatureScheme};
use rustls_pki_types::ServerName;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower::ServiceExt as _;

/// Longest a connection may take, TLS included.
const CONNECT: Duration = Duration::from_secs(15);
/// A silent connection is asked for a sign of life this often.
const PING: Duration = Duration::from_secs(15);
/// And is given up when none comes within this.
const PONG: Duration = Duration::from_secs(10);

/// The certificate in use.
#[derive(Debug)]
pub struct Credentials {
    current: RwLock<Arc<CertifiedKey>>,
    generation: watch::Sender<u64>,
}

impl Credentials {
    /// Starting with this certificate.
    pub fn new(certified: Arc<CertifiedKey>) -> Arc<Self> {
        Arc::new(Self { current: RwLock::new(certified), generation: watch::Sender::new(0) })
    }

    /// Uses another certificate from now on and closes every connection made with the old one.
    pub fn replace(&self, certified: Arc<CertifiedKey>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = certified;
        self.generation.send_modify(|generation| *generation += 1);
    }
}

impl ResolvesClientCert for Credentials {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A client with connections of its own.
///
/// # Errors
/// When the CA cannot be used.
pub fn client(server: &Server, ca_pem: &str, credentials: &Arc<Credentials>) -> Result<kube::Client> {
    let broken = |reason: String| Error::Certificate { what: "the cluster's CA".into(), reason };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has cipher suites for TLS 1.2 and 1.3")
        .with_root_certificates(roots(ca_pem).map_err(broken)?)
        .with_client_cert_resolver(Arc::clone(credentials) as Arc<dyn ResolvesClientCert>);
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    tls.resumption = Resumption::disabled();
    let name = ServerName::try_from(server.host.clone()).map_err(|error| broken(error.to_string()))?;
    let connector = Connector {
        server: server.clone(),
        name,
        tls: TlsConnector::from(Arc::new(tls)),
        credentials: Arc::clone(credentials),
    };
    let http = Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .http2_keep_alive_interval(PING)
        .http2_keep_alive_timeout(PONG)
        .http2_keep_alive_while_idle(true)
        .build::<_, kube::client::Body>(connector);
    let authority: http::uri::Authority =
        server.authority().parse().map_err(|error: http::uri::InvalidUri| broken(error.to_string()))?;
    let service = Patience::new(http).map_request(move |request| absolute(request, authority.clone()));
    Ok(kube::Client::new(service, "default"))
}

/// kube's requests name a path; the client under it wants the server too.
fn absolute<B>(mut request: http::Request<B>, authority: http::uri::Authority) -> http::Request<B> {
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(http::uri::Scheme::HTTPS);
    parts.authority = Some(authority);
    parts.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    *request.uri_mut() = http::Uri::from_parts(parts).expect("scheme, authority and path are all there");
    request
}

#[derive(Clone)]
struct Connector {
    server: Server,
    name: ServerName<'static>,
    tls: TlsConnector,
    credentials: Arc<Credentials>,
}

impl Connector {
    async fn connect(self) -> io::Result<Link> {
        let mut generation = self.credentials.generation.subscribe();
        generation.mark_unchanged();
        let open = async {
            let stream = TcpStream::connect((self.server.host.as_str(), self.server.port)).await?;
            stream.set_nodelay(true)?;
            self.tls.connect(self.name, stream).await
        };
        let stream = tokio::time::timeout(CONNECT, open).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("no connection after {} s", CONNECT.as_secs()))
        })??;
        let replaced = Box::pin(async move {
            // An error says that the credentials are gone, and with them the client.
            let _ = generation.changed().await;
        });
        Ok(Link { stream: TokioIo::new(stream), replaced })
    }
}

impl tower::Service<http::Uri> for Connector {
    type Response = Link;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Link>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

/// A connection that ends when the certificate it was made with is replaced.
struct Link {
    stream: TokioIo<TlsStream<TcpStream>>,
    replaced: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Connection for Link {
    fn connected(&self) -> Connected {
        let connected = Connected::new();
        if self.stream.inner().get_ref().1.alpn_protocol() == Some(b"h2") {
            connected.negotiated_h2()
        } else {
            connected
        }
    }
}

impl Read for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.replaced.as_mut().poll(context).is_ready() {
            // Ready once and for all: the future is not polled again, the connection is torn down.
            self.replaced = Box::pin(std::future::ready(()));
            let closed = io::Error::new(io::ErrorKind::ConnectionAborted, "the certificate was renewed");
            return Poll::Ready(Err(closed));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl Write for Link {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
