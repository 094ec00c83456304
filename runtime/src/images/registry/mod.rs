//! A client for one registry: manifests and blobs, with authentication, redirects, back-off and deadlines.
//!
//! ```text
//! get ─► 200, 206        ─► body, to be verified by the caller
//!     ─► 401             ─► log in once as the challenge says, again
//!     ─► 3xx             ─► follow, without credentials when the host changes
//!     ─► 429, 5xx, reset ─► wait (Retry-After), again
//! ```
//!
//! Invariant: credentials go to the registry they are for and to the token server that it names, to nobody else.

pub(super) mod auth;
mod http;
pub mod tls;

use super::error::ImageError;
use super::reference::ImageRef;
use super::{Auth, Patience};
use ::http::header::{ACCEPT, AUTHORIZATION, LOCATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use ::http::{HeaderValue, Request, Response, StatusCode, Uri};
use atoll_spec::node::RegistriesConfig;
use auth::Challenge;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Longest wait that a registry may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
const FIRST_WAIT: Duration = Duration::from_millis(250);
const MAX_TRIES: u32 = 5;
const MAX_REDIRECTS: u32 = 5;

/// A registry, for the pull of one image.
pub struct Registry {
    host: String,
    repository: String,
    base: String,
    auth: Option<Auth>,
    /// They came with the request, not from the settings.
    auth_is_the_pods: bool,
    connectors: tls::Connectors,
    patience: Patience,
    authorization: Mutex<Option<HeaderValue>>,
}

impl Registry {
    /// Prepares to talk to the registry of an image.
    pub fn new(
        reference: &ImageRef,
        auth: Option<Auth>,
        settings: &RegistriesConfig,
        system_ca: &Path,
        patience: Patience,
    ) -> Result<Self, ImageError> {
        let own = settings.registries.get(reference.host());
        let plain = own.is_some_and(|own| own.plain_http);
        let configured = own.and_then(|own| {
            let username = own.username.clone()?;
            Some(Auth::Basic { username, password: own.password.clone().unwrap_or_default() })
        });
        let base = format!("{}://{}", if plain { "http" } else { "https" }, reference.endpoint());
        Ok(Self {
            host: reference.host().to_owned(),
            repository: reference.path().to_owned(),
            base,
            connectors: tls::Connectors::new(settings, reference, system_ca),
            auth_is_the_pods: auth.is_some(),
            auth: auth.or(configured),
            patience,
            authorization: Mutex::default(),
        })
    }

    /// A manifest or index by tag or digest.
    pub async fn manifest(&self, wanted: &str) -> Result<Response<Body>, ImageError> {
        let path = format!("/v2/{}/manifests/{wanted}", self.repository);
        self.get(&path, Some(super::manifest::ACCEPT), 0, &format!("image {}:{wanted}", self.repository))
            .await
    }

    /// A blob from byte `from` on. The answer may begin at 0 all the same: then its status is 200.
    pub async fn blob(&self, digest: &super::Digest, from: u64) -> Result<Response<Body>, ImageError> {
        let path = format!("/v2/{}/blobs/{digest}", self.repository);
        self.get(&path, None, from, &format!("blob {digest}")).await
    }

    /// Whether what was read took credentials that not every pod has.
    pub fn took_credentials(&self) -> bool {
        let asked = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        self.auth_is_the_pods && asked
    }

    /// An error that names this registry.
    pub fn error(&self, what: &str, why: impl std::fmt::Display) -> ImageError {
        ImageError::Registry { registry: self.host.clone(), what: what.to_owned(), why: why.to_string() }
    }

    /// An answer that asking again would not change.
    fn odd(&self, why: &str) -> ImageError {
        ImageError::Malformed { what: format!("the answer of {}", self.host), why: why.to_owned() }
    }

    async fn get(
        &self,
        path: &str,
        accept: Option<&str>,
        from: u64,
        what: &str,
    ) -> Result<Response<Body>, ImageError> {
        let mut wait = FIRST_WAIT;
        let mut logged_in = false;
        let mut tries = 0;
        loop {
            tries += 1;
            let answer = self.follow(path, accept, from, what).await;
            let (pause, last) = match answer {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => match response.status() {
                    StatusCode::UNAUTHORIZED if !logged_in => {
                        logged_in = true;
                        self.log_in(&response, what).await?;
                        continue;
                    }
                    status if worth_another_try(status) => {
                        (retry_after(&response), self.error(what, format!("it answered {status}")))
                    }
                    status => return Err(self.refusal(status, what)),
                },
                Err(error) if error.is_transient() => (None, error),
                Err(error) => return Err(error),
            };
            if tries >= MAX_TRIES {
                return Err(last);
            }
            let pause = pause.unwrap_or(wait).min(LONGEST_WAIT);
            tracing::info!("{last}; trying again in {} ms", pause.as_millis());
            tokio::time::sleep(pause).await;
            wait *= 3;
        }
    }

    fn refusal(&self, status: StatusCode, what: &str) -> ImageError {
        let (registry, what) = (self.host.clone(), what.to_owned());
        match status {
            StatusCode::NOT_FOUND => ImageError::NotInRegistry { registry, what },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                ImageError::Denied { registry, what, status: status.as_u16() }
            }
            _ => self.error(&what, format!("it answered {status}")),
        }
    }

    /// Sends one request and follows redirects.
    async fn follow(
        &self,
        path: &str,
        accept: Option<&str>,
        from: u64,
        what: &str,
    ) -> Result<Response<Body>, ImageError> {
        let home: Uri = format!("{}{path}", self.base).parse().map_err(|error| self.error(what, error))?;
        let mut uri = home.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::get(uri.clone());
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            if same_place(&uri, &home)
                && let Some(value) = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone()
            {
                request = request.header(AUTHORIZATION, value);
            }
            let response = self.send(request, what).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.ok_or_else(|| self.odd("it redirects to nowhere"))?;
            uri = resolve(&uri, location).ok_or_else(|| self.odd("it redirects to something odd"))?;
            if home.scheme_str() == Some("https") && uri.scheme_str() != Some("https") {
                return Err(self.odd("it redirects from https to http"));
            }
        }
        Err(self.odd("it redirects too often"))
    }

    async fn send(
        &self,
        request: ::http::request::Builder,
        what: &str,
    ) -> Result<Response<Body>, ImageError> {
        let request = request.body(String::new()).map_err(|error| self.error(what, error))?;
        self.exchange(request, what).await
    }

    async fn exchange(&self, request: Request<String>, what: &str) -> Result<Response<Body>, ImageError> {
        let exchange = http::exchange(request, &self.connectors);
        match tokio::time::timeout(self.patience.head, exchange).await {
            Ok(Err(http::Error::Untrusted(error))) => {
                Err(ImageError::Untrusted { registry: self.host.clone(), why: error.to_string() })
            }
            Ok(Err(http::Error::Setup(why))) => {
                Err(ImageError::Settings { registry: self.host.clone(), why })
            }
            Ok(result) => result.map_err(|error| self.error(what, error)),
            Err(_) => Err(self.error(what, format!("no answer within {} s", self.patience.head.as_secs()))),
        }
    }

    async fn log_in(&self, response: &Response<Body>, what: &str) -> Result<(), ImageError> {
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<Challenge> =
            challenges.iter().filter_map(|value| auth::parse(value.to_str().ok()?)).collect();
        let denied = || self.refusal(StatusCode::UNAUTHORIZED, what);
        let bearer = challenges.iter().find(|challenge| challenge.is("bearer"));
        let value = match (&self.auth, bearer) {
            (Some(Auth::Bearer(token)), _) => auth::bearer(token),
            (credentials, Some(challenge)) => {
                let token = self.fetch_token(challenge, credentials.as_ref(), what).await?;
                auth::bearer(&token)
            }
            (Some(Auth::Basic { username, password }), None)
                if challenges.iter().any(|challenge| challenge.is("basic")) =>
            {
                auth::basic(username, password)
            }
            _ => return Err(denied()),
        };
        let value = value.ok_or_else(denied)?;
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        Ok(())
    }

    /// Gets a bearer token from the server that the challenge names.
    async fn fetch_token(
        &self,
        challenge: &Challenge,
        credentials: Option<&Auth>,
        what: &str,
    ) -> Result<String, ImageError> {
        let scope = format!("repository:{}:pull", self.repository);
        let request =
            auth::token_request(challenge, &scope, credentials).map_err(|why| self.error(what, why))?;
        if self.base.starts_with("https") && request.uri().scheme_str() != Some("https") {
            return Err(self.odd("it names a token server without TLS"));
        }
        let response = self.exchange(request, "a token").await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(self.refusal(response.status(), what));
            }
            status => return Err(self.error("a token", format!("the token server answered {status}"))),
        }
        let body = http::read_all(response.into_body(), auth::MAX_TOKEN, self.patience.silence).await;
        let body = body.map_err(|error| self.error("a token", error))?;
        auth::parse_token(&body).ok_or_else(|| self.error("a token", "the token server's answer has none"))
    }

    /// Reads a small document whole.
    pub async fn read(
        &self,
        response: Response<Body>,
        limit: u64,
        what: &str,
    ) -> Result<Vec<u8>, ImageError> {
        match http::read_all(response.into_body(), limit, self.patience.silence).await {
            Ok(bytes) => Ok(bytes),
            Err(http::Error::TooLarge(limit)) => Err(ImageError::TooLarge { what: what.to_owned(), limit }),
            Err(error) => Err(self.error(what, error)),
        }
    }
}

pub use http::{Body, Error as HttpError, next_chunk};
/// Shared by the downloads of one pull.
pub type SharedRegistry = Arc<Registry>;

fn worth_another_try(status: StatusCode) -> bool {
    status.is_server_error()
        || status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT
}

/// Seconds only: the date form is not in use by registries.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

fn same_place(one: &Uri, other: &Uri) -> bool {
    one.scheme() == other.scheme() && one.authority() == other.authority()
}

/// Absolute, or absolute on the same host: registries use no other form.
fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let location: Uri = location.parse().ok()?;
    if location.scheme().is_some() {
        return matches!(location.scheme_str(), Some("http" | "https")).then_some(location);
    }
    let mut parts = location.into_parts();
    let base = base.clone().into_parts();
    parts.scheme = base.scheme;
    parts.authority = parts.authority.or(base.authority);
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects() {
        let base: Uri = "https://r.example:5000/v2/a/blobs/x".parse().unwrap();
        let to = |location| resolve(&base, location).map(|uri| uri.to_string());
        assert_eq!(to("/there?x=1").as_deref(), Some("https://r.example:5000/there?x=1"));
        assert_eq!(to("https://cdn.example/b").as_deref(), Some("https://cdn.example/b"));
        assert_eq!(to("ftp://cdn.example/b"), None);
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        assert!(same_place(&base, &uri("https://r.example:5000/other")));
        assert!(!same_place(&base, &uri("https://r.example/other")));
        assert!(!same_place(&base, &uri("http://r.example:5000/other")));
    }
}
