//! Pods: watch → desired → plan → apply → status.
//!
//! ```text
//! API server ─watch─► dispatch ─► worker of each uid: observe ─► plan ─► start (CRI calls)
//! runtime ─events, relist─┘               └─► status ─► statuses ─patch, delete─► API server
//! ```
//!
//! Called by `app`, once. Pure (◇): `desired`, `refuse`, `actual`, `plan`, `fate`, `phase`, `conditions`, `status`,
//! `attempts`, `backoff`, `env`, `resources`, `storage_limits`, `dns`, `sandbox_config`, `container_config`,
//! `pull_secrets`. Invariant: all state of a pod is in the API server and the runtime; a restarted agent finds it again
//! by labels.

pub mod actual;
mod attempts;
mod backoff;
mod cleanup;
mod conditions;
pub mod container_config;
mod context;
pub mod desired;
mod dispatch;
mod dns;
pub mod env;
mod fate;
mod images;
mod log_rotation;
mod observe;
mod phase;
pub mod plan;
mod pull_secrets;
mod refuse;
pub mod resources;
mod runtime_events;
pub mod sandbox_config;
mod start;
mod status;
mod statuses;
pub mod storage_limits;
mod storage_watch;
#[cfg(test)]
pub mod testing;
mod watch;
mod worker;

use crate::app::Shared;
use crate::cri::Cri;
use context::Context;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch as tokio_watch;

/// Waits between tries to reach the runtime at start.
const RUNTIME_RETRY: Duration = Duration::from_secs(1);

/// Runs every pod of this node until `stop` changes to `true`; returns when all tasks have ended. Pods keep
/// running: a later start adopts them.
pub async fn run(shared: Shared, mut stop: tokio_watch::Receiver<bool>) {
    let cri = Cri::new(&shared.options.cri);
    let runtime = tokio::select! {
        name = runtime_name(&cri) => name,
        _ = stop.wait_for(|stop| *stop) => return,
    };
    let (events, poster) = crate::events::channel(shared.client.clone(), shared.node_name());
    let dirs = sandbox_config::Directories {
        pods: shared.options.pods.clone(),
        volumes: shared.options.volumes.clone(),
        logs: shared.options.logs.clone(),
    };
    let statuses = statuses::Statuses::new(shared.client.clone(), shared.pods.clone());
    let ctx = Arc::new(Context {
        volumes: crate::volumes::Volumes::new(shared.client.clone(), dirs.clone()),
        images: images::Images::new(cri.clone(), shared.client.clone(), events.clone()),
        statuses: statuses.clone(),
        cri: cri.clone(),
        events,
        dirs,
        runtime,
        shared: shared.clone(),
    });
    let (known, seen_known) = tokio_watch::channel(None);
    let (changed, changes) = tokio::sync::mpsc::channel(256);
    tokio::join!(
        poster.run(stop.clone()),
        statuses.run(stop.clone()),
        pod_network(&cri, shared.node.clone(), stop.clone()),
        runtime_events::run(cri.clone(), changed, stop.clone()),
        cleanup::run(ctx.clone(), seen_known, stop.clone()),
        log_rotation::run(ctx.clone(), stop.clone()),
        watch::run(ctx.clone(), known, changes, stop.clone()),
    );
}

async fn runtime_name(cri: &Cri) -> String {
    loop {
        match cri.version().await {
            Ok(version) => return version.runtime_name,
            Err(error) => tracing::warn!(%error, "waiting for the container runtime"),
        }
        tokio::time::sleep(RUNTIME_RETRY).await;
    }
}

/// Tells the runtime the node's pod network, from which pods get their addresses: when it changes, and now and then,
/// for the runtime may have restarted.
async fn pod_network(
    cri: &Cri,
    mut node: tokio_watch::Receiver<Option<Arc<k8s_openapi::api::core::v1::Node>>>,
    mut stop: tokio_watch::Receiver<bool>,
) {
    const AGAIN: Duration = Duration::from_secs(30);
    const AFTER_FAILURE: Duration = Duration::from_secs(3);
    let of = |node: &Option<Arc<k8s_openapi::api::core::v1::Node>>| {
        node.as_ref().and_then(|n| n.spec.as_ref()?.pod_cidr.clone())
    };
    let mut told: Option<String> = None;
    loop {
        let wanted = of(&node.borrow_and_update());
        let mut pause = AGAIN;
        if let Some(cidr) = &wanted {
            match cri.set_pod_cidr(cidr).await {
                Ok(()) if told.as_ref() != Some(cidr) => {
                    tracing::info!("pods of this node get addresses of {cidr}");
                    told = wanted.clone();
                }
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(%error, "the runtime does not take the pod network; trying again");
                    pause = AFTER_FAILURE;
                }
            }
        }
        // Every arm is cancel-safe: nothing is taken by one that loses.
        tokio::select! {
            changed = node.wait_for(|node| of(node) != wanted) => {
                if changed.is_err() {
                    return;
                }
            }
            () = tokio::time::sleep(pause) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}
