//! The only writer of pod statuses, and the only one that deletes pods.
//!
//! ```text
//! worker ──set(status)──► newest version of each pod ──patch──► API server
//!                                     └─ finished: patch accepted ──► DELETE grace=0 with the uid
//! ```
//!
//! Invariants: of one pod at most one request is under way; an older version never follows a newer; a failure is
//! tried again for ever, with back-off; a pod is deleted only after its last status was accepted. Finalizers are
//! nobody's business here.

use super::desired::PodKey;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Requests at a time.
const PARALLEL: usize = 8;
const REQUEST: Duration = Duration::from_secs(15);
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

struct Entry {
    key: PodKey,
    pod: Arc<Pod>,
    version: u64,
    posted: u64,
    finished: bool,
    deleted: bool,
    under_way: bool,
    wait: Duration,
    /// By the steady clock: the other one may be set while a write waits.
    not_before: Option<Instant>,
    /// Version of the object that holds our newest status.
    accepted: Option<u64>,
}

impl Entry {
    /// Whether somebody else wrote over what is ours: a controller that thought the node was away marks its pods
    /// as not ready, and nobody but the node takes that back.
    fn overwritten(&self, pod: &Pod, status: &PodStatus) -> bool {
        let newer = object_version(pod).zip(self.accepted).is_some_and(|(seen, ours)| seen > ours);
        let theirs = pod.status.as_ref();
        self.posted == self.version
            && newer
            && theirs.is_some_and(|theirs| essence(theirs) != essence(status))
    }

    fn due(&self, now: Instant) -> bool {
        let work = self.version > self.posted || (self.finished && !self.deleted);
        work && !self.under_way && self.not_before.is_none_or(|at| at <= now)
    }
}

#[derive(Default)]
struct State {
    entries: BTreeMap<String, Entry>,
}

/// Takes statuses; cheap to clone.
#[derive(Clone)]
pub struct Statuses {
    client: kube::Client,
    state: Arc<Mutex<State>>,
    wake: Arc<Notify>,
    shown: watch::Sender<Vec<Arc<Pod>>>,
}

enum Posted {
    /// The object's version since then.
    Accepted(Option<u64>),
    Deleted,
    /// The pod, or this uid of it, is not there any more.
    Gone,
    Failed(String),
}

impl Statuses {
    /// Writes through `client`; `shown` always holds every pod with its newest status.
    pub fn new(client: kube::Client, shown: watch::Sender<Vec<Arc<Pod>>>) -> Self {
        Self { client, state: Arc::default(), wake: Arc::default(), shown }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a pod's newest status. `finished`: nothing of it is left, delete it.
    pub fn set(&self, key: &PodKey, pod: &Arc<Pod>, status: PodStatus, finished: bool) {
        let mut state = self.lock();
        let entry = state.entries.entry(key.uid.clone()).or_insert_with(|| Entry {
            key: key.clone(),
            pod: pod.clone(),
            version: 0,
            posted: 0,
            finished: false,
            deleted: false,
            under_way: false,
            wait: FIRST_WAIT,
            not_before: None,
            accepted: object_version(pod),
        });
        entry.finished |= finished;
        let first = entry.version == 0 && entry.posted == 0;
        let changed = entry.pod.status.as_ref() != Some(&status) || entry.overwritten(pod, &status);
        if changed || entry.pod.metadata.resource_version != pod.metadata.resource_version {
            entry.pod = Arc::new(Pod { status: Some(status), ..Pod::clone(pod) });
            entry.version += u64::from(changed);
        } else if !first && !finished {
            return;
        }
        self.show(&state);
        self.wake.notify_one();
    }

    /// Forgets a pod that the API server does not have any more.
    pub fn forget(&self, uid: &str) {
        let mut state = self.lock();
        state.entries.remove(uid);
        self.show(&state);
    }

    /// Forgets the pods that the API server does not have any more: all but these.
    pub fn keep(&self, uids: &BTreeSet<String>) {
        let mut state = self.lock();
        state.entries.retain(|uid, _| uids.contains(uid));
        self.show(&state);
    }

    /// Called with the lock held: of two lists made at once, the older one must not be shown last.
    fn show(&self, state: &State) {
        self.shown.send_replace(state.entries.values().map(|e| e.pod.clone()).collect());
    }

    /// Writes until `stop` changes to `true`, and then what is left for at most a few seconds.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        let mut requests = JoinSet::new();
        loop {
            let next = self.start_due(&mut requests);
            let wait = next.map_or(LONGEST_WAIT, |at| at.saturating_duration_since(Instant::now()));
            // Every arm is cancel-safe: none of them has taken anything when another one wins.
            tokio::select! {
                Some(done) = requests.join_next() => {
                    if let Ok((uid, version, posted)) = done {
                        self.note(&uid, version, posted);
                    }
                }
                () = self.wake.notified() => {}
                () = tokio::time::sleep(wait) => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        self.start_due(&mut requests);
        // What was not written by then is computed and written again by the next start.
        let _ = tokio::time::timeout(Duration::from_secs(3), async {
            while requests.join_next().await.is_some() {}
        })
        .await;
    }

    /// Starts what is due; answers when the next one is.
    fn start_due(&self, requests: &mut JoinSet<(String, u64, Posted)>) -> Option<Instant> {
        let now = Instant::now();
        let mut state = self.lock();
        for (uid, entry) in &mut state.entries {
            if requests.len() >= PARALLEL {
                break;
            }
            if !entry.due(now) {
                continue;
            }
            entry.under_way = true;
            let (client, key, pod, version) =
                (self.client.clone(), entry.key.clone(), entry.pod.clone(), entry.version);
            let (uid, patch, delete) = (uid.clone(), entry.version > entry.posted, entry.finished);
            requests.spawn(async move {
                let post = post(client, &key, &pod, patch, delete);
                let posted = tokio::time::timeout(REQUEST, post).await;
                (uid, version, posted.unwrap_or_else(|_| Posted::Failed("no answer".into())))
            });
        }
        if requests.len() >= PARALLEL {
            // Whatever is due has to wait for one of these to end; waking at its time would be waking without end.
            return None;
        }
        let waiting = state
            .entries
            .values()
            .filter(|e| !e.under_way && (e.version > e.posted || (e.finished && !e.deleted)));
        waiting.map(|e| e.not_before.unwrap_or(now)).min()
    }

    fn note(&self, uid: &str, version: u64, posted: Posted) {
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(uid) else { return };
        entry.under_way = false;
        match posted {
            Posted::Accepted(_) | Posted::Deleted | Posted::Gone => {
                entry.posted = version;
                entry.wait = FIRST_WAIT;
                entry.not_before = None;
                match posted {
                    Posted::Accepted(version) => entry.accepted = version.or(entry.accepted),
                    _ => entry.deleted = true,
                }
            }
            Posted::Failed(why) => {
                tracing::warn!(pod = %entry.key, why, "cannot write the pod's status; trying again");
                entry.not_before = Some(Instant::now() + entry.wait);
                entry.wait = (entry.wait * 2).min(LONGEST_WAIT);
            }
        }
    }
}

async fn post(client: kube::Client, key: &PodKey, pod: &Pod, patch: bool, delete: bool) -> Posted {
    let api: Api<Pod> = Api::namespaced(client, &key.namespace);
    let mut accepted = None;
    if patch {
        let body = patch_body(&key.uid, pod.status.as_ref());
        match api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(body)).await {
            Ok(patched) => accepted = object_version(&patched),
            Err(kube::Error::Api(status)) if matches!(status.code, 404) || is_other_uid(&status.message) => {
                return Posted::Gone;
            }
            Err(error) => return Posted::Failed(crate::volumes::objects::short(&error)),
        }
    }
    if !delete {
        return Posted::Accepted(accepted);
    }
    let preconditions = Preconditions { uid: Some(key.uid.clone()), resource_version: None };
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(preconditions),
        ..Default::default()
    };
    match api.delete(&key.name, &params).await {
        Ok(_) => Posted::Deleted,
        // 409: the name belongs to another pod now.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Posted::Gone,
        Err(error) => Posted::Failed(crate::volumes::objects::short(&error)),
    }
}

fn object_version(pod: &Pod) -> Option<u64> {
    pod.metadata.resource_version.as_ref()?.parse().ok()
}

/// The part of a status that others sometimes write over: phase, and our conditions.
fn essence(status: &PodStatus) -> (Option<&str>, Vec<(&str, &str)>) {
    let conditions = status.conditions.iter().flatten().map(|c| (c.type_.as_str(), c.status.as_str()));
    let mut ours: Vec<_> = conditions.filter(|(name, _)| super::conditions::OWNED.contains(name)).collect();
    ours.sort_unstable();
    (status.phase.as_deref(), ours)
}

fn is_other_uid(message: &str) -> bool {
    message.contains("uid mismatch")
        || message.contains("metadata.uid")
        || message.contains("Precondition failed: UID")
}

/// The patch: absent fields are removed, lists that the API merges by key are replaced, other writers' conditions
/// stay.
fn patch_body(uid: &str, status: Option<&PodStatus>) -> Value {
    let mut body = serde_json::to_value(status).unwrap_or_default();
    if let Some(fields) = body.as_object_mut() {
        for absent in [
            "reason",
            "message",
            "containerStatuses",
            "initContainerStatuses",
            "ephemeralContainerStatuses",
            "podIP",
            "podIPs",
        ] {
            fields.entry(absent).or_insert(Value::Null);
        }
        for list in ["podIPs", "hostIPs"] {
            if let Some(Value::Array(items)) = fields.get_mut(list) {
                items.insert(0, json!({"$patch": "replace"}));
            }
        }
        if let Some(Value::Array(conditions)) = fields.get_mut("conditions") {
            conditions.retain(|c| c["type"].as_str().is_some_and(|t| super::conditions::OWNED.contains(&t)));
            for condition in conditions {
                if let Some(fields) = condition.as_object_mut() {
                    for absent in ["reason", "message"] {
                        fields.entry(absent).or_insert(Value::Null);
                    }
                }
            }
        }
    }
    json!({"metadata": {"uid": uid}, "status": body})
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{PodCondition, PodIP};

    #[tokio::test]
    async fn what_others_wrote_over_is_written_again() {
        let statuses = offline();
        let ready = |status: &str| PodStatus {
            conditions: Some(vec![PodCondition {
                type_: "Ready".into(),
                status: status.into(),
                ..Default::default()
            }]),
            ..Default::default()
        };
        let object = |version: &str, status: &str| {
            let mut pod = Pod { status: Some(ready(status)), ..Default::default() };
            pod.metadata.resource_version = Some(version.into());
            Arc::new(pod)
        };
        let key = PodKey { namespace: "ns".into(), name: "p".into(), uid: "u".into() };
        let version = || statuses.lock().entries["u"].version;
        statuses.set(&key, &object("5", "False"), ready("True"), false);
        assert_eq!(version(), 1);
        statuses.note("u", 1, Posted::Accepted(Some(7)));
        // An old copy, still on its way, is no news.
        statuses.set(&key, &object("6", "False"), ready("True"), false);
        statuses.set(&key, &object("7", "True"), ready("True"), false);
        assert_eq!(version(), 1);
        statuses.set(&key, &object("8", "False"), ready("True"), false);
        assert_eq!(version(), 2);
    }

    fn offline() -> Statuses {
        let config = kube::Config::new("http://127.0.0.1:9".parse().unwrap());
        let client = kube::Client::try_from(config).unwrap();
        Statuses::new(client, watch::channel(Vec::new()).0)
    }

    fn named(name: &str) -> (PodKey, Arc<Pod>) {
        let key = PodKey { namespace: "ns".into(), name: name.into(), uid: format!("uid-{name}") };
        let mut pod = Pod::default();
        pod.metadata.name = Some(name.into());
        (key, Arc::new(pod))
    }

    /// A list that was made earlier and shown later hid a pod: `kubectl logs` of a running pod said NotFound.
    #[tokio::test]
    async fn pods_whose_status_changes_at_the_same_time_are_all_shown() {
        const THREADS: usize = 4;
        let statuses = offline();
        let (begin, end) = (std::sync::Barrier::new(THREADS), std::sync::Barrier::new(THREADS));
        let missed = std::sync::atomic::AtomicUsize::new(0);
        let work = |n: usize| {
            let (key, pod) = named(&n.to_string());
            for round in 0..3000 {
                let status = PodStatus { phase: Some(round.to_string()), ..PodStatus::default() };
                begin.wait();
                statuses.set(&key, &pod, status.clone(), false);
                end.wait();
                let shown = statuses.shown.borrow().clone();
                let newest = shown.iter().filter(|pod| pod.status.as_ref() == Some(&status)).count();
                missed.fetch_add(THREADS - newest, std::sync::atomic::Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            for n in 0..THREADS {
                let work = &work;
                scope.spawn(move || work(n));
            }
        });
        assert_eq!(missed.into_inner(), 0);
    }

    #[tokio::test]
    async fn pods_that_are_not_listed_are_not_shown() {
        let statuses = offline();
        for name in ["a", "b"] {
            let (key, pod) = named(name);
            statuses.set(&key, &pod, PodStatus::default(), false);
        }
        statuses.keep(&["uid-b".to_owned()].into());
        let shown: Vec<_> = statuses.shown.borrow().iter().map(|pod| pod.metadata.name.clone()).collect();
        assert_eq!(shown, [Some("b".to_owned())]);
    }

    #[tokio::test]
    async fn with_every_request_under_way_nothing_is_woken_by_the_clock() {
        let statuses = offline();
        for n in 0..=PARALLEL {
            let (key, pod) = named(&n.to_string());
            let status = PodStatus { phase: Some("Running".into()), ..PodStatus::default() };
            statuses.set(&key, &pod, status, false);
        }
        let mut requests = JoinSet::new();
        assert_eq!(statuses.start_due(&mut requests), None);
        assert_eq!(requests.len(), PARALLEL);
    }

    #[test]
    fn a_patch_says_what_is_gone_and_leaves_others_alone() {
        let condition =
            |name: &str| PodCondition { type_: name.into(), status: "True".into(), ..Default::default() };
        let status = PodStatus {
            phase: Some("Running".into()),
            pod_ips: Some(vec![PodIP { ip: "10.0.0.2".into() }]),
            conditions: Some(vec![condition("Ready"), condition("example.com/gate")]),
            ..Default::default()
        };
        let body = patch_body("u", Some(&status));
        assert_eq!(body["metadata"]["uid"], "u");
        assert_eq!(body["status"]["reason"], Value::Null);
        assert_eq!(body["status"]["podIPs"], json!([{"$patch": "replace"}, {"ip": "10.0.0.2"}]));
        let conditions = body["status"]["conditions"].as_array().unwrap();
        assert_eq!(conditions.len(), 1);
        assert_eq!(conditions[0]["message"], Value::Null);
    }
}
