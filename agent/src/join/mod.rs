//! From a token to a client certificate: kubeadm's flow.
//!
//! ```text
//! cluster-info, unverified → signature (token) → pin (CA) → cluster-info again, verified, the same bytes
//!   → key on disk → request with the token → signed → certificate on disk
//! ```
//!
//! Called by `app`. Invariant: the token goes to no server whose certificate does not come from a CA that the pin
//! vouches for; [`https`] makes anything else impossible to write.

pub mod cluster_info;
pub mod https;
pub mod jws;
pub mod renew;
pub mod request;
pub mod store;
pub mod token;

use bytes::Bytes;
use http::StatusCode;
use https::{Answer, Verified};
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use rcgen::KeyPair;
use request::Outcome;
use std::time::{Duration, Instant};
use store::{Identity, Store};
use token::{Join, Server};

/// Result of joining.
pub type Result<T, E = JoinError> = std::result::Result<T, E>;

/// How long a request may stay unsigned before the person at the console is told.
pub const SIGNED_WITHIN: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Why joining failed: one line each, for the console.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Not a URL.
    #[error("cannot join: join.server {url:?} is not an address such as https://10.0.0.1:6443")]
    Server {
        /// What was given.
        url: String,
    },
    /// Not a token.
    #[error(
        "cannot join: join.token is not a token (six letters or digits, a dot, sixteen more): make one with `atoll-supervisor token create`"
    )]
    TokenFormat,
    /// Not a pin.
    #[error("cannot join: pin {pin:?} in join.caPins is not `sha256:` and 64 hexadecimal digits")]
    PinFormat {
        /// What was given.
        pin: String,
    },
    /// No pin.
    #[error(
        "cannot join: join.caPins has no pin, and the token is never sent to a server that no pin vouches for: `atoll-supervisor token create` prints it"
    )]
    NoPin,
    /// No connection.
    #[error("cannot join: {server} does not answer: is the address right, and is the Supervisor up?")]
    Unreachable {
        /// Which server.
        server: Server,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Its certificate is not the cluster's.
    #[error(
        "cannot join: the certificate of {server} is not from the CA that the pin vouches for, the token was not sent: is the address right, and the clock?"
    )]
    Certificate {
        /// Which server.
        server: Server,
        /// Why.
        source: std::io::Error,
    },
    /// Its certificate is not in force, so one of the two clocks is wrong.
    #[error(
        "cannot join: by this host's clock, {now}, the certificate of {server} {is}, the token was not sent: is the host's clock right (time.servers), or the server's certificate to be renewed?"
    )]
    Clock {
        /// Which server.
        server: Server,
        /// The clock of this host.
        now: Timestamp,
        /// Since when or from when it is not in force.
        is: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is there and cannot answer now.
    #[error(
        "cannot join: {server} cannot answer now ({status}: {message}): nothing to do, it is asked again"
    )]
    Busy {
        /// Which server.
        server: Server,
        /// HTTP status.
        status: StatusCode,
        /// What it said.
        message: String,
        /// How long it asked to wait.
        retry_after: Option<Duration>,
    },
    /// The certificate from an earlier start is no longer in force, and there is no token for a new one.
    #[error(
        "cannot join: the client certificate of node {node} expired at {since} while the host was off, and the machine config has no join section to get a new one: put server, token and CA pin there (`atoll-supervisor token create --machine-config`); by the host's clock it is {now}"
    )]
    Expired {
        /// Which node.
        node: String,
        /// When it expired.
        since: Timestamp,
        /// The clock of this host.
        now: Timestamp,
    },
    /// It is no control plane, or not set up for joining.
    #[error(
        "cannot join: {server} has no usable cluster-info: {reason}: is it a control plane that hosts can join by token?"
    )]
    ClusterInfo {
        /// Which server.
        server: Server,
        /// What is wrong.
        reason: String,
    },
    /// It does not know the token.
    #[error(
        "cannot join: {server} does not know the token {id}: it expired, was deleted, or is another cluster's: make a new token"
    )]
    UnknownToken {
        /// Which server.
        server: Server,
        /// Public half of the token.
        id: String,
    },
    /// The signature is not the token's.
    #[error(
        "cannot join: what {server} says is not signed with the token {id}, which was not sent: the second half of join.token is wrong, or this is not the cluster"
    )]
    Signature {
        /// Which server.
        server: Server,
        /// Public half of the token.
        id: String,
    },
    /// No CA of the cluster matches a pin.
    #[error(
        "cannot join: no pin in join.caPins matches the CA of {server} ({found}), the token was not sent: is it the right cluster?"
    )]
    Pin {
        /// Which server.
        server: Server,
        /// Pins of what it has.
        found: String,
    },
    /// The verified server says something else than the unverified one.
    #[error(
        "cannot join: {server} said one thing before it was verified and another after, the token was not sent: somebody stands between, or the cluster is changing"
    )]
    Changed {
        /// Which server.
        server: Server,
    },
    /// The API server refused the token or the request.
    #[error("cannot join: {server} refused the token {id} ({status}: {message}): make a new token")]
    Refused {
        /// Which server.
        server: Server,
        /// Public half of the token.
        id: String,
        /// HTTP status.
        status: StatusCode,
        /// What it said.
        message: String,
    },
    /// Somebody said no.
    #[error("cannot join: the certificate request {name} was {reason}: a new one is made at the next try")]
    Denied {
        /// Which request.
        name: String,
        /// Why.
        reason: String,
    },
    /// Nobody said anything.
    #[error(
        "cannot join: the certificate request {name} is not signed yet: approve it with `kubectl certificate approve {name}`"
    )]
    Unsigned {
        /// Which request.
        name: String,
    },
}

impl JoinError {
    /// How long the server asked to wait before the next try.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Busy { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// One try, from token to identity. A try that follows a failed or interrupted one goes on with its key and request.
///
/// # Errors
/// A [`JoinError`], or what keeps the identity from being stored.
pub async fn join(join: &Join, node: &str, store: &Store) -> crate::Result<Identity> {
    let trusted = discover(join).await?;
    let server = Verified::new(&join.server, &trusted.ca_pem)?;
    confirm(join, &server, &trusted).await?;
    let key = store.pending_key()?;
    let pem = match sign(join, &server, node, &key).await {
        Err(error @ JoinError::Denied { .. }) => {
            store.forget_pending_key()?;
            return Err(error.into());
        }
        other => other?,
    };
    let identity = store.save(node, &key, &pem, &trusted.ca_pem, &join.server)?;
    tracing::info!("joined {} as {node}", join.server);
    Ok(identity)
}

/// Reads what anybody may read, and decides whether to trust it.
async fn discover(join: &Join) -> Result<cluster_info::Trusted> {
    let answer = https::fetch_unverified(&join.server, cluster_info::PATH).await?;
    expect_cluster_info(&join.server, &answer)?;
    cluster_info::trust(&answer.body, join)
}

/// Reads it again from the server that its own CA vouches for.
async fn confirm(join: &Join, server: &Verified, trusted: &cluster_info::Trusted) -> Result<()> {
    let answer = server.get(cluster_info::PATH, None).await?;
    expect_cluster_info(&join.server, &answer)?;
    let again = cluster_info::trust(&answer.body, join)?;
    if again.kubeconfig != trusted.kubeconfig {
        return Err(JoinError::Changed { server: join.server.clone() });
    }
    Ok(())
}

fn expect_cluster_info(server: &Server, answer: &Answer) -> Result<()> {
    if answer.status == StatusCode::OK {
        return Ok(());
    }
    busy(server, answer)?;
    let reason = format!("{}: {}", answer.status, message(&answer.body));
    Err(JoinError::ClusterInfo { server: server.clone(), reason })
}

/// An overloaded or failing server says nothing about the token: it is asked again.
fn busy(server: &Server, answer: &Answer) -> Result<()> {
    if answer.status != StatusCode::TOO_MANY_REQUESTS && !answer.status.is_server_error() {
        return Ok(());
    }
    Err(JoinError::Busy {
        server: server.clone(),
        status: answer.status,
        message: message(&answer.body),
        retry_after: answer.retry_after,
    })
}

/// Makes the request, or finds the one made before, and waits until it is signed.
async fn sign(join: &Join, server: &Verified, node: &str, key: &KeyPair) -> Result<String> {
    let malformed = |reason: String| JoinError::ClusterInfo { server: join.server.clone(), reason };
    let object = request::object(node, key).map_err(|error| malformed(error.to_string()))?;
    let name = request::name(node, key);
    let body = serde_json::to_vec(&object).map_err(|error| malformed(error.to_string()))?;
    let answer = server.post(request::PATH, &join.token, Bytes::from(body)).await?;
    if answer.status != StatusCode::CONFLICT {
        expect_success(join, &answer)?;
    }
    let path = format!("{}/{name}", request::PATH);
    let deadline = Instant::now() + SIGNED_WITHIN;
    while Instant::now() < deadline {
        let answer = server.get(&path, Some(&join.token)).await?;
        expect_success(join, &answer)?;
        let object: CertificateSigningRequest =
            serde_json::from_slice(&answer.body).map_err(|error| malformed(error.to_string()))?;
        match request::outcome(&object) {
            Outcome::Signed(pem) => return Ok(pem),
            Outcome::Refused(reason) => return Err(JoinError::Denied { name, reason }),
            Outcome::Pending => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
    Err(JoinError::Unsigned { name })
}

fn expect_success(join: &Join, answer: &Answer) -> Result<()> {
    if answer.status.is_success() {
        return Ok(());
    }
    busy(&join.server, answer)?;
    Err(JoinError::Refused {
        server: join.server.clone(),
        id: join.token.id().to_owned(),
        status: answer.status,
        message: message(&answer.body),
    })
}

/// The message of a Kubernetes `Status`, or the beginning of whatever it is, in one line.
fn message(body: &[u8]) -> String {
    let text = serde_json::from_slice::<serde_json::Value>(body)
        .ok()
        .and_then(|status| status.get("message")?.as_str().map(str::to_owned))
        .unwrap_or_else(|| String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned());
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
