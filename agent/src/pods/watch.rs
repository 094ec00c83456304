//! This node's pods, as the API server has them: watched, listed again after a gap, for ever.

use super::context::Context;
use super::dispatch::Dispatcher;
use crate::join::renew;
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::Error::{self, WatchError, WatchStartFailed};
use kube::runtime::watcher::{Config, Event, watcher};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Waits between tries to watch: a server that comes back is not left waiting for long.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

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
    let watched = || watcher(api.clone(), config.clone()).backoff(Waits(FIRST_WAIT)).boxed();
    let mut pods = watched();
    let mut dispatcher = Dispatcher::new(ctx, known);
    let mut broken = false;
    loop {
        // Every arm is cancel-safe: streams and channels keep what was not taken, and so does the set of workers.
        tokio::select! {
            event = pods.next() => match event {
                Some(Ok(event)) => {
                    if std::mem::take(&mut broken) {
                        tracing::info!("the API server is watched for pods again");
                    }
                    hand_over(&mut dispatcher, event);
                }
                Some(Err(error)) => {
                    if is_forgotten(&error) {
                        // In a watch it begins a list by itself; instead of a watch it would be tried for ever.
                        if matches!(error, WatchStartFailed(_)) {
                            pods = watched();
                        }
                        // Told each time: it is what explains that pods which are gone end now.
                        tracing::info!("what happened since is forgotten (410): this node's pods are listed anew");
                    }
                    let why = crate::error::chain(&error);
                    if std::mem::replace(&mut broken, true) {
                        tracing::debug!(why, "the watch of pods is still broken");
                    } else {
                        tracing::warn!("the watch of pods broke and is begun again; pods keep running: {why}");
                    }
                }
                None => return,
            },
            Some(uid) = changes.recv() => dispatcher.runtime_changed(uid.as_deref()),
            () = dispatcher.worker_ended() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Whether the API server no longer has the history from where the watch would go on.
fn is_forgotten(error: &Error) -> bool {
    match error {
        WatchError(status) | WatchStartFailed(kube::Error::Api(status)) => status.code == 410,
        _ => false,
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

/// Doubled after each failure, and spread: nodes that lost the API server together do not come back together.
struct Waits(Duration);

impl Iterator for Waits {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let wait = self.0;
        self.0 = (wait * 2).min(LONGEST_WAIT);
        Some(wait.mul_f64(0.5 + renew::spread() / 2.0))
    }
}

impl Backoff for Waits {
    fn reset(&mut self) {
        self.0 = FIRST_WAIT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_doubled_spread_bounded_and_begin_again() {
        let mut waits = Waits(FIRST_WAIT);
        let all: Vec<_> = waits.by_ref().take(20).collect();
        assert!((FIRST_WAIT / 2..=FIRST_WAIT).contains(&all[0]), "{all:?}");
        assert!((FIRST_WAIT..=FIRST_WAIT * 2).contains(&all[1]), "{all:?}");
        assert!(all.iter().all(|wait| *wait <= LONGEST_WAIT) && all[19] >= LONGEST_WAIT / 2, "{all:?}");
        waits.reset();
        assert!(waits.next().unwrap() <= FIRST_WAIT);
    }
}
