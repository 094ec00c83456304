//! The node's lease in `kube-node-lease`: the sign of life that the node controller looks at.

use super::within;
use crate::error::{Result, chain};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Life of the lease, in seconds, and how often it is renewed; the kubelet's figures.
const SECONDS: i32 = 40;
const RENEW: Duration = Duration::from_secs(10);
/// After a failure: soon enough that two of them do not lose the lease.
const RETRY: Duration = Duration::from_secs(2);

/// Renews for ever, from the moment the node is registered.
pub(super) async fn keep(client: kube::Client, name: String, mut node: watch::Receiver<Option<Arc<Node>>>) {
    let leases: Api<Lease> = Api::namespaced(client, "kube-node-lease");
    loop {
        let owner = match node.wait_for(Option::is_some).await {
            Ok(node) => node.as_ref().and_then(|node| node.metadata.uid.clone()),
            // The agent ends.
            Err(_) => return,
        };
        let pause = match renew(&leases, &name, owner).await {
            Ok(()) => RENEW,
            Err(error) => {
                tracing::warn!("lease of node {name}: {}", chain(&error));
                RETRY
            }
        };
        tokio::time::sleep(pause).await;
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
