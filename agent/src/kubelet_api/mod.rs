//! The kubelet API on port 10250: logs, exec, attach, port-forward, pods, health.
//!
//! Flow: TLS ([`serving`] certificate) → who calls ([`caller`]) → may they ([`access`]) → [`routes`] → [`logs`] or
//! [`streams`]. Containers are found through CRI by the labels that `pods` puts on what it makes ([`find`]).
//! Invariant: nothing is answered before the caller is authenticated and the API server has allowed the call.

mod access;
mod caller;
mod find;
mod logline;
mod logs;
mod routes;
mod serving;
mod streams;

use crate::app::Shared;
use crate::cri::Cri;
use crate::error::{Error, Result, chain};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls_pki_types::CertificateDer;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

/// Connections at once; each follower of a log and each exec holds one.
const MAX_CONNECTIONS: usize = 512;
/// Longest a caller may take for TLS and for the head of its request.
const GREETING: Duration = Duration::from_secs(20);

/// Body of every answer.
type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What every request needs.
struct Api {
    shared: Shared,
    cri: Cri,
    access: access::Access,
}

/// Serves until `stop` is true. `client_ca` are the authorities whose certificates callers may show.
///
/// # Errors
/// When the port cannot be bound.
pub async fn run(
    shared: Shared,
    cri: Cri,
    client_ca: Vec<CertificateDer<'static>>,
    mut stop: watch::Receiver<bool>,
) -> Result<()> {
    let address = shared.options.listen;
    let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
    let serving = serving::Serving::new();
    let acceptor = TlsAcceptor::from(Arc::new(caller::tls_config(client_ca, serving.resolver())?));
    let access = access::Access::new(shared.client.clone(), shared.node_name());
    let renewal = tokio::spawn(serving.keep(shared.clone()));
    let api = Arc::new(Api { shared, cri, access });
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Both arms are cancel-safe: accept() loses no connection, wait_for() no change.
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!("kubelet API: cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = stopped(&mut stop) => break,
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!("kubelet API: {MAX_CONNECTIONS} connections are open, one more was refused");
            continue;
        };
        let (acceptor, api) = (acceptor.clone(), Arc::clone(&api));
        tokio::spawn(async move {
            connection(stream, acceptor, api).await;
            drop(slot);
        });
    }
    renewal.abort();
    Ok(())
}

/// Waits until `stop` is true or nobody can make it so any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, api: Arc<Api>) {
    let tls = match tokio::time::timeout(GREETING, acceptor.accept(stream)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => return tracing::debug!("kubelet API: TLS handshake: {error}"),
        Err(_) => return tracing::debug!("kubelet API: a caller did not finish its TLS handshake"),
    };
    let certificate = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
    let service = service_fn(move |request| {
        let (api, certificate) = (Arc::clone(&api), certificate.clone());
        async move { Ok::<_, Infallible>(answer(&api, certificate.as_ref(), request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(GREETING)
        .serve_connection(TokioIo::new(tls), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!("kubelet API: connection: {}", chain(&error));
    }
}

/// Authenticates, authorises, routes.
async fn answer(
    api: &Api,
    certificate: Option<&CertificateDer<'_>>,
    request: Request<Incoming>,
) -> Response<Body> {
    let caller = match caller::identify(&api.access, certificate, request.headers()).await {
        Ok(caller) => caller,
        Err(refusal) => return refusal.into_response(),
    };
    if let Err(refusal) = api.access.check(&caller, request.method(), request.uri().path()).await {
        return refusal.into_response();
    }
    routes::route(api, request).await.unwrap_or_else(Refusal::into_response)
}

/// A request that is not done, and why.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    fn into_response(self) -> Response<Body> {
        text(self.status, self.message)
    }
}

/// A plain answer.
fn text(status: StatusCode, message: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(whole(message));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert("content-type", http::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// A body that is there as a whole.
fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}
