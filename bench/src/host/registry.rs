//! A registry inside the host: it has a few images in memory and gives them out over plain HTTP.

use crate::scripted::REGISTRY;
use anyhow::Context;
use atoll_qemu_test::oci::{Image, digest};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Content and media type by path.
type Shelf = BTreeMap<String, (Bytes, &'static str)>;

/// The registry; serves until the process ends.
#[derive(Debug, Clone, Default)]
pub struct Registry(Arc<Mutex<Shelf>>);

impl Registry {
    /// Listens.
    ///
    /// # Errors
    /// When the port is taken.
    pub async fn start() -> anyhow::Result<Self> {
        let registry = Self::default();
        let listener =
            TcpListener::bind(REGISTRY).await.with_context(|| format!("cannot listen on {REGISTRY}"))?;
        tokio::spawn(registry.clone().listen(listener));
        Ok(registry)
    }

    /// Puts an image in, and answers its name.
    pub fn push(&self, name: &str, image: &Image) -> String {
        let mut shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for blob in image.blobs() {
            let path = format!("/v2/{name}/blobs/{}", blob.digest);
            shelf.insert(path, (blob.bytes.clone().into(), "application/octet-stream"));
        }
        let manifest = Bytes::from(image.manifest());
        for reference in ["1", &digest(&manifest)] {
            shelf.insert(format!("/v2/{name}/manifests/{reference}"), (manifest.clone(), MANIFEST));
        }
        format!("{REGISTRY}/{name}:1")
    }

    async fn listen(self, listener: TcpListener) {
        while let Ok((stream, _)) = listener.accept().await {
            let registry = self.clone();
            let service = service_fn(move |request| {
                let registry = registry.clone();
                async move { Ok::<_, Infallible>(registry.answer(&request)) }
            });
            // A connection that breaks is the client's to tell.
            tokio::spawn(async move {
                let io = TokioIo::new(stream);
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
            });
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match request.uri().path() {
            "/v2/" => Some((Bytes::new(), "application/json")),
            path => shelf.get(path).cloned(),
        };
        let mut response = Response::new(Full::default());
        let Some((content, kind)) = found else {
            *response.status_mut() = StatusCode::NOT_FOUND;
            return response;
        };
        response.headers_mut().insert("content-type", http::HeaderValue::from_static(kind));
        response.headers_mut().insert("content-length", content.len().into());
        if request.method() != Method::HEAD {
            *response.body_mut() = Full::new(content);
        }
        response
    }
}
