//! Finds the sandbox and the containers of a pod by the labels that `pods` put on them.

use super::{Api, Refusal};
use atoll_cri::v1;
use hyper::StatusCode;
use k8s_openapi::api::core::v1::Pod;
use std::sync::Arc;

/// Label that names a container inside its pod.
const CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// A pod of this node; 404 when there is none of that name.
pub(super) fn pod(api: &Api, namespace: &str, name: &str) -> Result<Arc<Pod>, Refusal> {
    let pods = api.shared.pods.borrow();
    let found = pods.iter().find(|pod| {
        pod.metadata.namespace.as_deref() == Some(namespace) && pod.metadata.name.as_deref() == Some(name)
    });
    found.cloned().ok_or_else(|| {
        Refusal::new(StatusCode::NOT_FOUND, format!("pod {namespace}/{name} does not run on this node"))
    })
}

/// Attempts of one container of a pod, the newest first.
pub(super) async fn attempts(api: &Api, pod: &Pod, container: &str) -> Result<Vec<v1::Container>, Refusal> {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let mut found = api.cri.containers(Some(uid)).await.map_err(runtime_failed)?;
    found.retain(|c| c.labels.get(CONTAINER_NAME).is_some_and(|name| name == container));
    found.sort_by_key(|c| std::cmp::Reverse((c.metadata.as_ref().map_or(0, |m| m.attempt), c.created_at)));
    Ok(found)
}

/// The running attempt of a container; 400 or 404 with the reason when none runs.
pub(super) async fn running(api: &Api, pod: &Pod, container: &str) -> Result<String, Refusal> {
    check_name(pod, container)?;
    let attempts = attempts(api, pod, container).await?;
    attempts.into_iter().find(|c| c.state() == v1::ContainerState::ContainerRunning).map(|c| c.id).ok_or_else(
        || {
            Refusal::new(
                StatusCode::NOT_FOUND,
                format!("container not found (\"{container}\"): it is not running"),
            )
        },
    )
}

/// The ready sandbox of a pod.
pub(super) async fn sandbox(api: &Api, pod: &Pod) -> Result<String, Refusal> {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let sandboxes = api.cri.sandboxes(Some(uid)).await.map_err(runtime_failed)?;
    sandboxes
        .into_iter()
        .find(|s| s.state() == v1::PodSandboxState::SandboxReady)
        .map(|s| s.id)
        .ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, "the pod's sandbox is not running"))
}

/// 400 when the pod has no container of that name.
pub(super) fn check_name(pod: &Pod, container: &str) -> Result<(), Refusal> {
    let spec = pod.spec.as_ref();
    let known = spec.is_some_and(|spec| {
        spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(|c| c.name == container)
            || spec.ephemeral_containers.iter().flatten().any(|c| c.name == container)
    });
    if known {
        return Ok(());
    }
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    Err(Refusal::new(StatusCode::BAD_REQUEST, format!("container {container} is not valid for pod {name}")))
}

/// 500 with what the runtime said.
pub(super) fn runtime_failed(error: crate::cri::CriError) -> Refusal {
    let status = if error.is_not_found() { StatusCode::NOT_FOUND } else { StatusCode::INTERNAL_SERVER_ERROR };
    Refusal::new(status, error.to_string())
}
