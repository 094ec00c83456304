//! Service-account tokens bound to a pod: asked for once, replaced when four fifths of their life are over.

use super::objects::short;
use crate::error::is_away;
use crate::pods::desired::Desired;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ServiceAccount, ServiceAccountTokenProjection};
use kube::api::{Api, PostParams};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const REQUEST: Duration = Duration::from_secs(10);
/// Lifetime of a token when the pod does not say.
const DEFAULT_SECONDS: i64 = 3600;
/// No token is kept longer.
const LONGEST: SignedDuration = SignedDuration::from_hours(24);

#[derive(Clone)]
struct Token {
    value: String,
    asked: Timestamp,
    replace_at: Timestamp,
}

impl Token {
    /// A clock that was set back would keep it for ever.
    fn is_fresh(&self, now: Timestamp) -> bool {
        self.asked <= now && now < self.replace_at
    }
}

/// Why there is no token.
struct Failed {
    why: String,
    /// The API server cannot be asked now.
    away: bool,
}

/// Uid of the pod, volume, path in it.
type Key = (String, String, String);

/// Tokens by pod and use.
pub struct Tokens {
    client: kube::Client,
    kept: Mutex<HashMap<Key, Token>>,
}

impl Tokens {
    /// None yet.
    pub fn new(client: kube::Client) -> Self {
        Self { client, kept: Mutex::default() }
    }

    /// The token for one projection.
    ///
    /// # Errors
    /// When the API server gives none and the old one has run out.
    pub async fn get(
        &self,
        desired: &Desired,
        volume: &str,
        source: &ServiceAccountTokenProjection,
    ) -> Result<String, String> {
        let key = (desired.key.uid.clone(), volume.to_owned(), source.path.clone());
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(token) = kept.as_ref().filter(|token| token.is_fresh(Timestamp::now())) {
            return Ok(token.value.clone());
        }
        let token = match (self.request(desired, source).await, kept) {
            (Ok(token), _) => token,
            // The old one is good for some time yet, and of use to nobody while the API server is away.
            (Err(error), Some(old)) if error.away => return Ok(old.value),
            (Err(error), _) => return Err(error.why),
        };
        let value = token.value.clone();
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(key, token);
        Ok(value)
    }

    /// Forgets a pod's tokens; the API server refuses them once the pod is gone.
    pub fn forget(&self, uid: &str) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).retain(|(pod, _, _), _| pod != uid);
    }

    async fn request(
        &self,
        desired: &Desired,
        source: &ServiceAccountTokenProjection,
    ) -> Result<Token, Failed> {
        let account =
            desired.spec().service_account_name.as_deref().filter(|n| !n.is_empty()).unwrap_or("default");
        let body = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: source.audience.clone().filter(|a| !a.is_empty()).map(|a| vec![a]),
                expiration_seconds: Some(source.expiration_seconds.unwrap_or(DEFAULT_SECONDS)),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: Some(desired.key.name.clone()),
                    uid: Some(desired.key.uid.clone()),
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let failed = |why: String| Failed { why: format!("failed to fetch token: {why}"), away: false };
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &desired.key.namespace);
        let params = PostParams::default();
        let asked = Timestamp::now();
        let answer = tokio::time::timeout(REQUEST, accounts.create_token_request(account, &params, &body))
            .await
            .map_err(|_| Failed {
                away: true,
                ..failed(format!("no answer within {} s", REQUEST.as_secs()))
            })?
            .map_err(|error| Failed { away: is_away(&error), ..failed(short(&error)) })?;
        let status = answer.status.ok_or_else(|| failed("the answer holds none".into()))?;
        let (Some(value), Some(expires)) = (status.token, status.expiration_timestamp) else {
            return Err(failed("the answer holds none".into()));
        };
        let life = expires.0.duration_since(asked).min(LONGEST);
        Ok(Token { value, asked, replace_at: asked + life * 4 / 5 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_set_back_or_forth_keeps_no_token_too_long() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let token = Token { value: String::new(), asked: at(1_000_000), replace_at: at(1_002_880) };
        assert!(token.is_fresh(at(1_000_000)) && token.is_fresh(at(1_002_879)));
        assert!(
            !token.is_fresh(at(1_002_880)) && !token.is_fresh(at(2_000_000)) && !token.is_fresh(at(1_000))
        );
    }
}
