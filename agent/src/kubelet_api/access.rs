//! May the caller: the API server decides, by TokenReview and SubjectAccessReview; answers are kept a while.

use super::Refusal;
use super::caller::Caller;
use hyper::{Method, StatusCode};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a yes and a no are believed: long enough for somebody who looks again and again, and not so long that
/// what was taken away goes on working. (The kubelet's minutes are for clusters of thousands of nodes.)
const ALLOWED: Duration = Duration::from_secs(30);
const DENIED: Duration = Duration::from_secs(10);
const TOKEN: Duration = Duration::from_secs(10);
/// Most answers kept.
const MAX_ANSWERS: usize = 1024;
/// Deadline of one review.
const REVIEW: Duration = Duration::from_secs(10);

/// Asks the API server and remembers.
pub(super) struct Access {
    client: kube::Client,
    node: String,
    decisions: Mutex<Remembered<(Caller, &'static str, &'static str), bool>>,
    tokens: Mutex<Remembered<[u8; 32], Option<Caller>>>,
}

impl Access {
    pub(super) fn new(client: kube::Client, node: String) -> Self {
        Self { client, node, decisions: Mutex::default(), tokens: Mutex::default() }
    }

    /// The user behind a bearer token; `None` when the API server does not know it.
    pub(super) async fn review_token(&self, token: &str) -> Result<Option<Caller>, Refusal> {
        let key: [u8; 32] = Sha256::digest(token).into();
        if let Some(known) = lock(&self.tokens).get(&key) {
            return Ok(known);
        }
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), ..Default::default() },
            ..Default::default()
        };
        let reviewed = self.create(review, "TokenReview").await?;
        let status = reviewed.status.unwrap_or_default();
        let user = status.user.unwrap_or_default();
        let caller = match user.username {
            Some(name) if status.authenticated == Some(true) => {
                Some(Caller { user: name, groups: user.groups.unwrap_or_default() })
            }
            _ => None,
        };
        lock(&self.tokens).put(key, caller.clone(), TOKEN);
        Ok(caller)
    }

    /// Whether the caller may do this to this node; 403 when not.
    pub(super) async fn check(&self, caller: &Caller, attempt: Attempt) -> Result<(), Refusal> {
        let Attempt { verb, subresources: resources } = attempt;
        for subresource in resources {
            if self.allowed(caller, verb, subresource).await? {
                return Ok(());
            }
        }
        Err(Refusal::new(
            StatusCode::FORBIDDEN,
            format!(
                "Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{}])",
                caller.user,
                resources.join(" ")
            ),
        ))
    }

    async fn allowed(
        &self,
        caller: &Caller,
        verb: &'static str,
        subresource: &'static str,
    ) -> Result<bool, Refusal> {
        let key = (caller.clone(), verb, subresource);
        if let Some(known) = lock(&self.decisions).get(&key) {
            return Ok(known);
        }
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(caller.user.clone()),
                groups: Some(caller.groups.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.into()),
                    version: Some("v1".into()),
                    resource: Some("nodes".into()),
                    subresource: Some(subresource.into()),
                    name: Some(self.node.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            },
            ..Default::default()
        };
        let allowed = self.create(review, "SubjectAccessReview").await?.status.is_some_and(|s| s.allowed);
        lock(&self.decisions).put(key, allowed, if allowed { ALLOWED } else { DENIED });
        Ok(allowed)
    }

    async fn create<K>(&self, review: K, kind: &str) -> Result<K, Refusal>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::ClusterResourceScope>
            + Clone
            + serde::Serialize
            + serde::de::DeserializeOwned
            + std::fmt::Debug,
    {
        let api: Api<K> = Api::all(self.client.clone());
        match tokio::time::timeout(REVIEW, api.create(&PostParams::default(), &review)).await {
            Ok(Ok(reviewed)) => Ok(reviewed),
            Ok(Err(error)) => {
                tracing::warn!("kubelet API: {kind}: {}", crate::error::chain(&error));
                Err(Refusal::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    format!("{kind} failed: the API server refused it"),
                ))
            }
            Err(_) => Err(Refusal::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("{kind}: the API server did not answer within {} s", REVIEW.as_secs()),
            )),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The guarded maps are whole after every statement, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is tried, as Kubernetes' authorisation names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt {
    /// Verb.
    pub verb: &'static str,
    /// Subresources of `nodes` of which one must be allowed, the finest first (Kubernetes' kubelet authorisation).
    pub subresources: &'static [&'static str],
}

impl Attempt {
    /// Of a method on a path whose first part, decoded, is `first`: the same one that `routes` goes by.
    pub(super) fn of(method: &Method, first: &str) -> Self {
        let verb = match *method {
            // A WebSocket begins with GET, yet it is not looking that is done: who may only look may not do these.
            _ if matches!(first, "exec" | "attach" | "portForward" | "run") => "create",
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ => "get",
        };
        let subresources: &[_] = match first {
            "healthz" => &["healthz", "proxy"],
            "pods" | "runningpods" => &["pods", "proxy"],
            "stats" => &["stats"],
            "metrics" => &["metrics"],
            "logs" => &["log"],
            _ => &["proxy"],
        };
        Self { verb, subresources }
    }
}

/// Answers with an end date, bounded in number.
struct Remembered<K, V> {
    answers: HashMap<K, (Instant, V)>,
}

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self { answers: HashMap::new() }
    }
}

impl<K: Hash + Eq, V: Clone> Remembered<K, V> {
    fn get(&mut self, key: &K) -> Option<V> {
        let (until, value) = self.answers.get(key)?;
        (Instant::now() < *until).then(|| value.clone())
    }

    fn put(&mut self, key: K, value: V, keep: Duration) {
        let now = Instant::now();
        if self.answers.len() >= MAX_ANSWERS {
            self.answers.retain(|_, (until, _)| now < *until);
        }
        // Still full: a caller with many tokens. Forget everything rather than grow.
        if self.answers.len() >= MAX_ANSWERS {
            self.answers.clear();
        }
        self.answers.insert(key, (now + keep, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_map_to_the_finest_subresource() {
        let of = |first| Attempt::of(&Method::GET, first);
        assert_eq!(of("pods").subresources, ["pods", "proxy"]);
        assert_eq!(of("podsx").subresources, ["proxy"]);
        assert_eq!(of("healthz").subresources, ["healthz", "proxy"]);
        assert_eq!(of("containerLogs"), Attempt { verb: "get", subresources: &["proxy"] });
    }

    #[test]
    fn what_acts_is_never_a_get() {
        for first in ["exec", "attach", "portForward", "run"] {
            let wanted = Attempt { verb: "create", subresources: &["proxy"] };
            assert_eq!(Attempt::of(&Method::GET, first), wanted);
            assert_eq!(Attempt::of(&Method::POST, first), wanted);
        }
    }

    #[test]
    fn memory_of_answers_is_bounded() {
        let mut remembered = Remembered::default();
        for key in 0..5000 {
            remembered.put(key, (), ALLOWED);
            assert!(remembered.answers.len() <= MAX_ANSWERS);
        }
        assert_eq!(remembered.get(&4999), Some(()));
    }
}
