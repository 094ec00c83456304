//! The node's lease in `kube-node-lease`: the sign of life that the node controller looks at.

use super::within;
use crate::error::{Result, chain};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Life of the lease, in seconds, and how often it is renewed; the kubelet's figures.
const SECONDS: i32 = 40;
const RENEW: Duration = Duration::from_secs(10);
/// After a failure: soon enough that two of them do not lose the lease.
const RETRY: Duration = Duration::from_secs(2);

/// Failed renewals in a row that mean more than a hiccup, such as a connection closed with its certificate.
const HICCUPS: u32 = 2;
/// While it goes on, a failure is told on the console this often.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// Renews for ever, from the moment the node is registered. `contact` is told why the API server cannot be reached,
/// and when it can again.
pub(super) async fn keep(
    client: kube::Client,
    name: String,
    mut node: watch::Receiver<Option<Arc<Node>>>,
    contact: watch::Sender<Option<String>>,
) {
    let leases: Api<Lease> = Api::namespaced(client, "kube-node-lease");
    let mut away: Option<Away> = None;
    loop {
        let owner = match node.wait_for(Option::is_some).await {
            Ok(node) => node.as_ref().and_then(|node| node.metadata.uid.clone()),
            // The agent ends.
            Err(_) => return,
        };
        let pause = match renew(&leases, &name, owner).await {
            Ok(()) => {
                if let Some(away) = away.take().filter(|away| away.failures >= HICCUPS) {
                    let seconds = away.since.elapsed().as_secs();
                    tracing::info!("lease of node {name} renewed again after {seconds} s");
                    contact.send_replace(None);
                }
                RENEW
            }
            Err(error) => {
                away.get_or_insert_with(Away::begin).note(&name, chain(&error), &contact);
                RETRY
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// A time without a renewal.
struct Away {
    since: Instant,
    failures: u32,
    told: Option<Instant>,
}

impl Away {
    fn begin() -> Self {
        Self { since: Instant::now(), failures: 0, told: None }
    }

    fn note(&mut self, name: &str, why: String, contact: &watch::Sender<Option<String>>) {
        self.failures += 1;
        if self.failures < HICCUPS {
            return tracing::debug!("lease of node {name}: {why}");
        }
        let line = format!("{why}: pods keep running, the API server is asked again");
        if self.told.is_none_or(|told| told.elapsed() >= TOLD_EVERY) {
            self.told = Some(Instant::now());
            tracing::warn!("lease of node {name}: {line}");
        }
        contact.send_replace(Some(line));
    }
}

async fn renew(leases: &Api<Lease>, name: &str, owner: Option<String>) -> Result<()> {
    let now = MicroTime(jiff::Timestamp::now());
    let patch = Patch::Merge(
        json!({ "spec": { "holderIdentity": name, "leaseDurationSeconds": SECONDS, "renewTime": now } }),
    );
    match within("renew the lease", leases.patch(name, &PatchParams::default(), &patch)).await {
        Ok(_) => return Ok(()),
        Err(crate::Error::Api { source, .. }) if matches!(source.as_ref(), kube::Error::Api(status) if status.code == 404) =>
            {}
        Err(error) => return Err(error),
    }
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(name.into()),
            namespace: Some("kube-node-lease".into()),
            owner_references: owner.map(|uid| {
                vec![OwnerReference {
                    api_version: "v1".into(),
                    kind: "Node".into(),
                    name: name.into(),
                    uid,
                    ..Default::default()
                }]
            }),
            ..Default::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.into()),
            lease_duration_seconds: Some(SECONDS),
            renew_time: Some(now),
            ..Default::default()
        }),
    };
    within("create the lease", leases.create(&PostParams::default(), &lease)).await.map(drop)
}
