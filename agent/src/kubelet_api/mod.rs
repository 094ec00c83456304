//! The kubelet API on port 10250: logs, exec, attach, port-forward, pods, health.
//!
//! Flow: TLS ([`serving`] certificate) → who calls ([`caller`]) → may they ([`access`]) → [`routes`] → [`logs`] or
//! [`streams`]. Containers are found through CRI by the labels that `pods` puts on what it makes ([`find`]).
//! Invariants: nothing is answered before the caller is authenticated and the API server has allowed the call; what a
//! caller can take before that is bounded ([`strangers`], [`GREETING`], [`HEAD`]).

mod access;
mod caller;
mod find;
mod logline;
mod logs;
mod routes;
mod serving;
mod strangers;
mod streams;
mod vigil;

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
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use strangers::{Stranger, Strangers};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

/// Connections at once; each follower of a log and each exec holds one.
const MAX_CONNECTIONS: usize = 512;
/// Longest a caller may take for TLS, for the head of its request, and between two requests.
const GREETING: Duration = Duration::from_secs(10);
/// Most bytes of a request's head: the command of an exec is in it.
const HEAD: usize = 128 * 1024;

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
    let strangers = Strangers::default();
    loop {
        // Both arms are cancel-safe: accept() loses no connection, wait_for() no change.
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
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
        let Some(stranger) = strangers.enter(peer.ip()) else {
            tracing::debug!("kubelet API: too many unknown callers at {}, one more was refused", peer.ip());
            continue;
        };
        if let Err(error) = vigil::watch(&stream) {
            tracing::debug!("kubelet API: a caller that vanishes will not be noticed: {error}");
        }
        let visit = Visit { stranger: Mutex::new(Some(stranger)), slot: Arc::new(slot) };
        tokio::spawn(connection(stream, acceptor.clone(), Arc::clone(&api), visit));
    }
    renewal.abort();
    Ok(())
}

/// Waits until `stop` is true or nobody can make it so any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// What a connection takes of what there is.
struct Visit {
    /// Until the caller is known.
    stranger: Mutex<Option<Stranger>>,
    /// Until the connection, and every stream that began on it, has ended.
    slot: Slot,
}

/// One of [`MAX_CONNECTIONS`].
type Slot = Arc<OwnedSemaphorePermit>;

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, api: Arc<Api>, visit: Visit) {
    let tls = match tokio::time::timeout(GREETING, acceptor.accept(stream)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => return tracing::debug!("kubelet API: TLS handshake: {error}"),
        Err(_) => return tracing::debug!("kubelet API: a caller did not finish its TLS handshake"),
    };
    let certificate = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
    let visit = Arc::new(visit);
    let service = service_fn(move |request| {
        let (api, certificate, visit) = (Arc::clone(&api), certificate.clone(), Arc::clone(&visit));
        async move { Ok::<_, Infallible>(answer(&api, certificate.as_ref(), &visit, request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(GREETING)
        .max_buf_size(HEAD)
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
    visit: &Visit,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let caller = match caller::identify(&api.access, certificate, request.headers()).await {
        Ok(caller) => caller,
        Err(refusal) => {
            let mut response = refusal.into_response();
            // Nobody keeps a connection open for strangers.
            response.headers_mut().insert("connection", http::HeaderValue::from_static("close"));
            return response;
        }
    };
    visit.stranger.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Err(refusal) = api.access.check(&caller, routes::attempt(&request)).await {
        return refusal.into_response();
    }
    request.extensions_mut().insert(Arc::clone(&visit.slot));
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
