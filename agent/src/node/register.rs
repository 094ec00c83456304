//! The node object as this host registers it: name, labels, taints. Kubernetes' own labels are always ours;
//! of a node that exists, other labels and taints are left as they are.

use super::within;
use crate::error::Result;
use atoll_spec::node::AgentConfig;
use k8s_openapi::api::core::v1::{Node, NodeSpec, Taint};
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::json;
use std::collections::BTreeMap;

/// The object to register.
pub(super) fn node(config: &AgentConfig) -> Node {
    let mut labels: BTreeMap<String, String> = config.labels.clone();
    for (key, value) in [
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", "amd64"),
        ("kubernetes.io/hostname", config.node_name.as_str()),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", "amd64"),
    ] {
        labels.insert(key.into(), value.into());
    }
    let taints: Vec<Taint> = config.taints.iter().filter_map(|text| parse_taint(text)).collect();
    Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels),
            ..Default::default()
        },
        spec: Some(NodeSpec { taints: (!taints.is_empty()).then_some(taints), ..Default::default() }),
        status: None,
    }
}

/// Asks for the pod network that the node had before.
pub(super) fn keep_network(wanted: &mut Node, before: Option<&Node>) {
    let Some(before) = before.and_then(|node| node.spec.as_ref()) else { return };
    let spec = wanted.spec.get_or_insert_default();
    spec.pod_cidr.clone_from(&before.pod_cidr);
    spec.pod_cidrs.clone_from(&before.pod_cidrs);
}

/// `key=value:Effect` or `key:Effect`; hostd has checked them.
fn parse_taint(text: &str) -> Option<Taint> {
    let (key, effect) = text.rsplit_once(':')?;
    let (key, value) = key.split_once('=').map_or((key, None), |(key, value)| (key, Some(value.to_owned())));
    Some(Taint { key: key.into(), value, effect: effect.into(), time_added: None })
}

/// Creates the node, or brings the labels of an existing one up to date.
pub(super) async fn ensure(api: &Api<Node>, wanted: Node) -> Result<Node> {
    let name = wanted.metadata.name.clone().unwrap_or_default();
    let Some(existing) = within("read the node", api.get_opt(&name)).await? else {
        tracing::info!("registering node {name}");
        return match within("register the node", api.create(&PostParams::default(), &wanted)).await {
            // Made by a second agent of this name in between, or by the call before whose answer was lost.
            Err(crate::Error::Api { source, .. }) if is_conflict(&source) => {
                within("read the node", api.get(&name)).await
            }
            other => other,
        };
    };
    let labels = wanted.metadata.labels.unwrap_or_default();
    let has = existing.metadata.labels.clone().unwrap_or_default();
    if labels.iter().all(|(key, value)| has.get(key) == Some(value)) {
        return Ok(existing);
    }
    let patch = Patch::Merge(json!({ "metadata": { "labels": labels } }));
    within("update the node's labels", api.patch(&name, &PatchParams::default(), &patch)).await
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taints_are_read_as_kubectl_writes_them() {
        let taint = parse_taint("dedicated=build:NoSchedule").unwrap();
        assert_eq!(
            (taint.key.as_str(), taint.value.as_deref(), taint.effect.as_str()),
            ("dedicated", Some("build"), "NoSchedule")
        );
        assert_eq!(parse_taint("gpu:NoExecute").unwrap().value, None);
        assert!(parse_taint("nothing").is_none());
    }
}
