//! This node's pods, as the API server has them: watched, listed again after a gap, for ever.

use super::context::Context;
use super::dispatch::Dispatcher;
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Config, Event, watcher};
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// Hands pods and changes of the runtime to the workers until `stop` changes to `true`.
pub async fn run(
    ctx: Arc<Context>,
    known: watch::Sender<Option<BTreeSet<String>>>,
    mut changes: mpsc::Receiver<Option<String>>,
    mut stop: watch::Receiver<bool>,
) {
    let api: Api<Pod> = Api::all(ctx.shared.client.clone());
    // A node may list and watch its own pods only.
    let config = Config::default().fields(&format!("spec.nodeName={}", ctx.shared.node_name()));
    let mut pods = watcher(api, config).default_backoff().boxed();
    let mut dispatcher = Dispatcher::new(ctx, known);
    loop {
        // Every arm is cancel-safe: streams and channels keep what was not taken, and so does the set of workers.
        tokio::select! {
            event = pods.next() => match event {
                Some(Ok(event)) => hand_over(&mut dispatcher, event),
                Some(Err(error)) => tracing::warn!(%error, "the watch of pods broke; beginning again"),
                None => return,
            },
            Some(uid) = changes.recv() => dispatcher.runtime_changed(uid.as_deref()),
            () = dispatcher.worker_ended() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

fn hand_over(dispatcher: &mut Dispatcher, event: Event<Pod>) {
    match event {
        Event::Init => dispatcher.list_begun(),
        Event::InitApply(pod) | Event::Apply(pod) => {
            let mut pod = pod;
            // Large, and of no use here.
            pod.metadata.managed_fields = None;
            dispatcher.applied(pod);
        }
        Event::InitDone => dispatcher.list_complete(),
        Event::Delete(pod) => dispatcher.deleted(pod),
    }
}
