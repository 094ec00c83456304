//! Keeps a client from asking before the server said it may: `Retry-After` of a 429 or 5xx answer holds every later
//! request of the same client back.
//!
//! Called by `api_client`, as a layer around its connections. Whoever asked gets the server's answer as it came and
//! decides on its own back-off; this only makes sure that nothing is sent too soon, whoever asks next. Invariant: no
//! answer holds a client back for longer than [`LONGEST`].

use http::{HeaderMap, Request, Response, StatusCode};
use jiff::Timestamp;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Instant;
use tower::{BoxError, Service, ServiceExt as _};

/// The most that a server is obeyed.
pub const LONGEST: Duration = Duration::from_secs(60);
/// A request waits this long to be sent; a longer wait is an error at once, so that no deadline is spent on it.
const PATIENT: Duration = Duration::from_secs(5);

/// A request that was not sent.
#[derive(Debug, thiserror::Error)]
#[error("the API server is overloaded and asked for {seconds} s more of patience")]
pub struct TooSoon {
    seconds: u64,
}

/// The layer. Clones share what the server said.
#[derive(Debug, Clone)]
pub struct Patience<S> {
    inner: S,
    not_before: Arc<Mutex<Option<Instant>>>,
}

impl<S> Patience<S> {
    /// Around a service; nothing is held back yet.
    pub fn new(inner: S) -> Self {
        Self { inner, not_before: Arc::default() }
    }

    fn left(&self) -> Duration {
        let not_before = *self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
        not_before.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()))
    }

    fn note(&self, wait: Duration) {
        let until = Instant::now() + wait;
        let mut not_before = self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
        if not_before.is_none_or(|known| known < until) {
            *not_before = Some(until);
        }
    }
}

impl<S, B, R> Service<Request<B>> for Patience<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = Response<R>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let patience = self.clone();
        Box::pin(async move {
            loop {
                match patience.left() {
                    Duration::ZERO => break,
                    left if left > PATIENT => {
                        return Err(TooSoon { seconds: left.as_secs_f64().ceil() as u64 }.into());
                    }
                    left => tokio::time::sleep(left).await,
                }
            }
            let response = patience.inner.clone().oneshot(request).await.map_err(Into::into)?;
            if let Some(wait) = retry_after(response.status(), response.headers()) {
                patience.note(wait);
            }
            Ok(response)
        })
    }
}

/// How long an answer asks to wait, at most [`LONGEST`]; `None` when it does not.
pub fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    if status != StatusCode::TOO_MANY_REQUESTS && !status.is_server_error() {
        return None;
    }
    let text = headers.get(http::header::RETRY_AFTER)?.to_str().ok()?.trim();
    // Seconds, or a date (RFC 9110, section 10.2.3).
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
            Duration::try_from(at.duration_since(Timestamp::now())).ok()?
        }
    };
    Some(wait.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(http::header::RETRY_AFTER, value.parse().unwrap())])
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_bounded() {
        let busy = StatusCode::TOO_MANY_REQUESTS;
        assert_eq!(retry_after(busy, &headers("7")), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(StatusCode::SERVICE_UNAVAILABLE, &headers("1")), Some(Duration::from_secs(1)));
        assert_eq!(retry_after(busy, &headers("86400")), Some(LONGEST));
        assert_eq!(retry_after(busy, &headers("18446744073709551615")), Some(LONGEST));
        assert_eq!(retry_after(busy, &headers("Tue, 31 Dec 2199 23:59:59 GMT")), Some(LONGEST));
        assert_eq!(retry_after(busy, &headers("Wed, 21 Oct 2015 07:28:00 GMT")), None);
        for nonsense in ["", "-1", "soon", "1.5"] {
            assert_eq!(retry_after(busy, &headers(nonsense)), None, "{nonsense:?}");
        }
        assert_eq!(retry_after(StatusCode::OK, &headers("7")), None);
        assert_eq!(retry_after(busy, &HeaderMap::new()), None);
    }

    /// Answers 429 with this wait to the first request, 200 to the others.
    fn server(
        wait: &'static str,
        asked: Arc<AtomicUsize>,
    ) -> impl Service<
        Request<()>,
        Response = Response<()>,
        Error = BoxError,
        Future = impl Future<Output = Result<Response<()>, BoxError>> + Send,
    > + Clone
    + Send
    + Sync
    + 'static {
        tower::service_fn(move |_: Request<()>| {
            let first = asked.fetch_add(1, Ordering::Relaxed) == 0;
            let mut response = Response::new(());
            if first {
                *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
                *response.headers_mut() = headers(wait);
            }
            std::future::ready(Ok(response))
        })
    }

    #[tokio::test]
    async fn a_429_holds_every_later_request_back_and_is_itself_passed_on() {
        let asked = Arc::new(AtomicUsize::new(0));
        let patience = Patience::new(server("1", asked.clone()));
        let first = patience.clone().oneshot(Request::new(())).await.unwrap();
        assert_eq!(first.status(), StatusCode::TOO_MANY_REQUESTS);
        let begun = Instant::now();
        let two = tokio::join!(
            patience.clone().oneshot(Request::new(())),
            patience.clone().oneshot(Request::new(()))
        );
        assert!(two.0.is_ok() && two.1.is_ok());
        assert!(begun.elapsed() >= Duration::from_millis(950));
        assert_eq!(asked.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn a_long_wait_is_an_error_at_once_and_nothing_is_sent() {
        let asked = Arc::new(AtomicUsize::new(0));
        let patience = Patience::new(server("30", asked.clone()));
        patience.clone().oneshot(Request::new(())).await.unwrap();
        let error = patience.oneshot(Request::new(())).await.unwrap_err();
        assert!(error.to_string().contains("30 s more"), "{error}");
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}
