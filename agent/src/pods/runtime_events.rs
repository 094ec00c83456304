//! Which pods changed in the runtime: its events, and a slow look at everything for those that were lost.
//!
//! A runtime without events is looked at every second.

use crate::cri::{Cri, Result};
use atoll_cri::v1;
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash as _, Hasher as _};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

const WITH_EVENTS: Duration = Duration::from_secs(20);
const WITHOUT_EVENTS: Duration = Duration::from_secs(1);
const RECONNECT: Duration = Duration::from_secs(2);
/// How long a runtime that has no events is not asked for them again.
const NO_EVENTS: Duration = Duration::from_secs(300);

/// Tells `changed` the uid of every pod that changed (`None`: nobody knows which) until `stop` changes to `true`.
pub async fn run(cri: Cri, changed: mpsc::Sender<Option<String>>, mut stop: watch::Receiver<bool>) {
    let (live, seen_live) = watch::channel(false);
    let events = events(&cri, &changed, &live);
    let relist = relist(&cri, &changed, seen_live);
    // All three may be dropped at any point: what they know is learnt again by the next relist.
    tokio::select! {
        () = events => {}
        () = relist => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

async fn events(cri: &Cri, changed: &mpsc::Sender<Option<String>>, live: &watch::Sender<bool>) {
    loop {
        match cri.events().await {
            Ok(mut stream) => {
                live.send_replace(true);
                loop {
                    match stream.message().await {
                        Ok(Some(event)) => {
                            let uid = event.pod_sandbox_status.and_then(|s| s.metadata).map(|m| m.uid);
                            if changed.send(uid.filter(|u| !u.is_empty())).await.is_err() {
                                return;
                            }
                        }
                        Ok(None) => break,
                        Err(status) if status.code() == tonic::Code::Unimplemented => {
                            live.send_replace(false);
                            tokio::time::sleep(NO_EVENTS).await;
                            break;
                        }
                        Err(_) => break,
                    }
                }
                live.send_replace(false);
            }
            Err(error) if error.is_unimplemented() => tokio::time::sleep(NO_EVENTS).await,
            Err(error) => tracing::debug!(%error, "no events from the runtime"),
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

async fn relist(cri: &Cri, changed: &mpsc::Sender<Option<String>>, mut live: watch::Receiver<bool>) {
    let mut before: HashMap<String, u64> = HashMap::new();
    let mut away = false;
    loop {
        match look(cri).await {
            Ok(now) => {
                let gone = before.keys().filter(|uid| !now.contains_key(*uid));
                let differ =
                    now.iter().filter(|(uid, hash)| before.get(*uid) != Some(*hash)).map(|(uid, _)| uid);
                for uid in gone.chain(differ).cloned().collect::<Vec<String>>() {
                    if changed.send(Some(uid)).await.is_err() {
                        return;
                    }
                }
                if std::mem::take(&mut away) {
                    tracing::info!("the container runtime answers again");
                }
                before = now;
            }
            Err(error) => {
                if !std::mem::replace(&mut away, true) {
                    tracing::warn!(%error, "the container runtime does not answer: is it running?");
                }
            }
        }
        let wait = if *live.borrow_and_update() { WITH_EVENTS } else { WITHOUT_EVENTS };
        // An event stream that breaks may have lost something: look at once.
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = live.changed() => {}
        }
    }
}

async fn look(cri: &Cri) -> Result<HashMap<String, u64>> {
    let mut parts: HashMap<String, Vec<(String, i32)>> = HashMap::new();
    let uid = |labels: &HashMap<String, String>| labels.get(super::actual::POD_UID).cloned();
    for v1::PodSandbox { id, state, labels, .. } in cri.sandboxes(None).await? {
        if let Some(uid) = uid(&labels) {
            parts.entry(uid).or_default().push((id, state));
        }
    }
    for v1::Container { id, state, labels, .. } in cri.containers(None).await? {
        if let Some(uid) = uid(&labels) {
            parts.entry(uid).or_default().push((id, state));
        }
    }
    let hash = |mut parts: Vec<(String, i32)>| {
        parts.sort();
        let mut hasher = DefaultHasher::new();
        parts.hash(&mut hasher);
        hasher.finish()
    };
    Ok(parts.into_iter().map(|(uid, parts)| (uid, hash(parts))).collect())
}
