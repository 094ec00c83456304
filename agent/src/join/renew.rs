//! Renewal of the client certificate: at 70 to 90 % of its life, with a fresh key, by the node itself.

use super::request::{self, Outcome};
use super::store::{Identity, Store};
use super::{JoinError, LOOK_AGAIN, SIGNED_WITHIN};
use crate::api_client::Credentials;
use crate::error::{Error, Result, chain};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::api::{Api, PostParams};
use std::sync::Arc;
use std::time::Duration;

/// How often the clock is looked at; it may jump, so nothing sleeps until a far moment.
const LOOK: Duration = Duration::from_secs(30);
/// Wait after a renewal, whatever came of it.
const AGAIN: Duration = Duration::from_secs(60);
/// Longest one call may take.
const CALL: Duration = Duration::from_secs(20);

/// When to renew, in seconds since 1970. `part` is from 0 to 1 and spreads nodes that joined together.
pub fn due(not_before: i64, not_after: i64, part: f64) -> i64 {
    let life = u32::try_from(not_after - not_before).unwrap_or(u32::MAX);
    let after = f64::from(life) * (0.7 + 0.2 * part.clamp(0.0, 1.0));
    not_before.saturating_add(Duration::from_secs_f64(after).as_secs().try_into().unwrap_or(i64::MAX))
}

/// Keeps the certificate fresh until it cannot: returns when it has expired, so that the caller joins again.
pub async fn keep(
    client: kube::Client,
    node: String,
    store: Store,
    mut identity: Identity,
    credentials: Arc<Credentials>,
) {
    loop {
        let due = due(identity.not_before, identity.not_after, spread());
        tracing::info!("client certificate is renewed after {}", moment(due));
        while now() < due {
            tokio::time::sleep(LOOK).await;
        }
        loop {
            match renew(&client, &node, &store, &identity).await {
                Ok(renewed) => {
                    credentials.replace(Arc::clone(&renewed.certified));
                    tracing::info!("client certificate renewed, valid until {}", moment(renewed.not_after));
                    identity = renewed;
                    // One that is due at once, by a wrong clock or a very short life, must not be a storm of requests.
                    tokio::time::sleep(AGAIN).await;
                    break;
                }
                Err(error) if now() >= identity.not_after => {
                    tracing::error!("client certificate has expired: {}", chain(&error));
                    return;
                }
                Err(error) => {
                    tracing::warn!("client certificate not renewed yet, trying again: {}", chain(&error));
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }
}

async fn renew(client: &kube::Client, node: &str, store: &Store, identity: &Identity) -> Result<Identity> {
    let key = store.pending_key()?;
    let object = request::object(node, &key).map_err(|error| Error::Certificate {
        what: "the certificate request".into(),
        reason: error.to_string(),
    })?;
    let name = request::name(node, &key);
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let created =
        within("create the certificate request", requests.create(&PostParams::default(), &object)).await;
    match created {
        Err(Error::Api { source, .. }) if matches!(&*source, kube::Error::Api(status) if status.code == 409) =>
            {}
        other => drop(other?),
    }
    let signed = async {
        loop {
            let object = within("read the certificate request", requests.get(&name)).await?;
            match request::outcome(&object) {
                Outcome::Signed(pem) => return Ok::<_, Error>(pem),
                Outcome::Refused(reason) => {
                    store.forget_pending_key()?;
                    return Err(JoinError::Denied { name: name.clone(), reason }.into());
                }
                Outcome::Pending => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    };
    let pem = match tokio::time::timeout(SIGNED_WITHIN, signed).await {
        Ok(pem) => pem?,
        Err(_) => return Err(JoinError::Unsigned { name }.into()),
    };
    store.save(node, &key, &pem, &identity.ca_pem, &identity.server)
}

async fn within<T>(operation: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T> {
    tokio::time::timeout(CALL, call)
        .await
        .map_err(|_| Error::Deadline { what: operation.into(), seconds: CALL.as_secs() })?
        .map_err(|error| Error::api(format!("cannot {operation}"), error))
}

/// Seconds since 1970.
pub fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

fn moment(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

/// A number from 0 to 1 that differs between nodes.
pub fn spread() -> f64 {
    let mut byte = [0];
    let random = ring::rand::SystemRandom::new();
    match ring::rand::SecureRandom::fill(&random, &mut byte) {
        Ok(()) => f64::from(byte[0]) / 255.0,
        Err(_) => 0.5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_between_70_and_90_percent() {
        assert_eq!(due(1000, 2000, 0.0), 1700);
        assert_eq!(due(1000, 2000, 1.0), 1900);
        assert_eq!(due(1000, 2000, 7.0), 1900);
        assert_eq!(due(2000, 1000, 0.5).cmp(&2000), std::cmp::Ordering::Greater);
    }
}
