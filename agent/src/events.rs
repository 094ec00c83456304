//! Events that people see in `kubectl describe`: posted in the background, repeated ones counted, never too many.
//!
//! Called from everywhere in the agent; [`Recorder::record`] does not wait. One task posts. Invariants: the queue is
//! bounded, and an event that does not fit is dropped rather than waited for; one object's events are limited in
//! rate; while the API server is away, events wait for it, for [`KEPT`] at most.

use crate::error::is_away;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use std::collections::HashMap;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Events waiting to be posted.
const QUEUE: usize = 512;
/// Kinds of events remembered to count their repetitions.
const REMEMBERED: usize = 2048;
/// Repetitions within this time are one event.
const SAME: SignedDuration = SignedDuration::from_mins(10);
/// Events of one object at once, and the time after which it may have one more.
const BURST: f64 = 25.0;
/// What repetitions leave of it for what was not said before: a container that fails again and again must not keep
/// the others of its pod from saying why they do.
const FOR_NEWS: f64 = BURST / 2.0;
const REFILL_SECONDS: f64 = 15.0;
const REQUEST: Duration = Duration::from_secs(10);
/// How long an event is tried to be posted, and the wait between two tries.
const KEPT: Duration = Duration::from_secs(600);
/// The same for one that the server fails at: the others behind it must not wait for what may never work.
const KEPT_FAILING: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_secs(5);
/// Longest message the API server takes.
const MAX_MESSAGE: usize = 1024;

/// How serious an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// All is well.
    Normal,
    /// Somebody should look.
    Warning,
}

#[derive(Debug)]
struct Entry {
    object: ObjectReference,
    severity: Severity,
    reason: &'static str,
    message: String,
    at: Timestamp,
    /// The same moment by the steady clock: limits of rate do not follow the other one when it is set.
    since_start: Instant,
}

impl Entry {
    /// What repetitions have in common.
    fn same(&self) -> String {
        let Self { object, reason, message, .. } = self;
        format!("{:?}/{:?}/{:?}/{reason}/{message}", object.uid, object.name, object.field_path)
    }
}

/// How many events each object may still have, and as of when.
#[derive(Debug, Default)]
struct Budgets(HashMap<String, (f64, Instant)>);

impl Budgets {
    /// Whether an object may have one more event.
    fn spend(&mut self, object: &ObjectReference, at: Instant, repeated: bool) -> bool {
        if self.0.len() > REMEMBERED {
            self.0.clear();
        }
        let name = format!("{:?}/{:?}", object.uid, object.name);
        let (left, since) = self.0.entry(name).or_insert((BURST, at));
        let refill = at.saturating_duration_since(*since).as_secs_f64() / REFILL_SECONDS;
        *left = (*left + refill).min(BURST);
        *since = at;
        let least = if repeated { FOR_NEWS } else { 1.0 };
        let enough = *left >= least;
        if enough {
            *left -= 1.0;
        }
        enough
    }
}

/// Takes events; cheap to clone.
#[derive(Clone, Debug)]
pub struct Recorder {
    queue: mpsc::Sender<Entry>,
}

/// Posts events.
pub struct Poster {
    client: kube::Client,
    node: String,
    queue: mpsc::Receiver<Entry>,
    known: HashMap<String, Known>,
    budgets: Budgets,
}

struct Known {
    name: String,
    count: i32,
    last: Timestamp,
}

/// What came of posting an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Posting {
    /// It is there, or nobody wants it.
    Done,
    /// The API server cannot be asked now.
    Away,
    /// It answers that it cannot.
    Failing,
}

/// A recorder and the poster behind it.
pub fn channel(client: kube::Client, node: String) -> (Recorder, Poster) {
    let (sender, queue) = mpsc::channel(QUEUE);
    (
        Recorder { queue: sender },
        Poster { client, node, queue, known: HashMap::new(), budgets: Budgets::default() },
    )
}

/// Reference to a pod, or to one of its containers.
pub fn pod_reference(pod: &k8s_openapi::api::core::v1::Pod, field: Option<String>) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: pod.metadata.name.clone(),
        namespace: pod.metadata.namespace.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: field,
    }
}

impl Recorder {
    /// Takes an event to be posted soon.
    pub fn record(
        &self,
        object: ObjectReference,
        severity: Severity,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        let mut message: String = message.into();
        if let Some((cut, _)) = message.char_indices().nth(MAX_MESSAGE) {
            message.truncate(cut);
        }
        let (at, since_start) = (Timestamp::now(), Instant::now());
        let entry = Entry { object, severity, reason, message, at, since_start };
        // A full queue means that the API server does not keep up: events are the first to go.
        if self.queue.try_send(entry).is_err() {
            tracing::debug!(reason, "an event was dropped: the queue is full");
        }
    }
}

impl Poster {
    /// Posts until every recorder is gone or `stop` changes to `true`.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        loop {
            // Both arms are cancel-safe: a receive that is not finished takes nothing.
            let entry = tokio::select! {
                entry = self.queue.recv() => entry,
                _ = stop.wait_for(|stop| *stop) => None,
            };
            let Some(entry) = entry else { return };
            if !self.budgets.spend(&entry.object, entry.since_start, self.is_known(&entry)) {
                continue;
            }
            let begun = Instant::now();
            loop {
                let goes_on = match self.post(&entry).await {
                    Posting::Done => false,
                    Posting::Away => entry.since_start.elapsed() < KEPT,
                    Posting::Failing => begun.elapsed() < KEPT_FAILING,
                };
                if !goes_on {
                    break;
                }
                tokio::select! {
                    () = tokio::time::sleep(AGAIN) => {}
                    _ = stop.wait_for(|stop| *stop) => return,
                }
            }
        }
    }

    /// Whether the same was posted not long ago.
    fn is_known(&self, entry: &Entry) -> bool {
        self.known.get(&entry.same()).is_some_and(|known| entry.at.duration_since(known.last) < SAME)
    }

    async fn post(&mut self, entry: &Entry) -> Posting {
        if self.known.len() > REMEMBERED {
            self.known.clear();
        }
        let (object, same) = (&entry.object, entry.same());
        let namespace = object.namespace.clone().unwrap_or_else(|| "default".into());
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        if let Some(known) = self.known.get_mut(&same).filter(|k| entry.at.duration_since(k.last) < SAME) {
            known.count += 1;
            known.last = entry.at;
            let patch = serde_json::json!({"count": known.count, "lastTimestamp": Time(entry.at), "message": entry.message});
            let params = PatchParams::default();
            let patch = Patch::Merge(&patch);
            let done = tokio::time::timeout(REQUEST, api.patch(&known.name, &params, &patch)).await;
            if matches!(done, Ok(Ok(_))) {
                return Posting::Done;
            }
            // The event has run out on the server, or the server is away: try as a new one.
            self.known.remove(&same);
        }
        let name = format!("{}.{:x}", object.name.as_deref().unwrap_or("node"), entry.at.as_nanosecond());
        let event = self.event(entry, &name, &namespace);
        match tokio::time::timeout(REQUEST, api.create(&PostParams::default(), &event)).await {
            Ok(Ok(_)) => {
                self.known.insert(same, Known { name, count: 1, last: entry.at });
                Posting::Done
            }
            Ok(Err(error)) => {
                tracing::debug!(reason = entry.reason, %error, "cannot post an event");
                // A try whose answer was lost had made it: its name is taken.
                match &error {
                    error if !is_away(error) => Posting::Done,
                    kube::Error::Api(_) => Posting::Failing,
                    _ => Posting::Away,
                }
            }
            Err(_) => {
                tracing::debug!(reason = entry.reason, "cannot post an event in time");
                Posting::Away
            }
        }
    }

    fn event(&self, entry: &Entry, name: &str, namespace: &str) -> Event {
        Event {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some(namespace.to_owned()),
                ..Default::default()
            },
            involved_object: entry.object.clone(),
            type_: Some(format!("{:?}", entry.severity)),
            reason: Some(entry.reason.to_owned()),
            message: Some(entry.message.clone()),
            first_timestamp: Some(Time(entry.at)),
            last_timestamp: Some(Time(entry.at)),
            event_time: None::<MicroTime>,
            count: Some(1),
            source: Some(EventSource {
                component: Some("atoll-agent".into()),
                host: Some(self.node.clone()),
            }),
            reporting_component: Some("atoll-agent".into()),
            reporting_instance: Some(self.node.clone()),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_leave_room_for_what_is_new_and_both_are_bounded() {
        let (mut budgets, pod) = (Budgets::default(), ObjectReference::default());
        let now = Instant::now();
        let count = |budgets: &mut Budgets, at, repeated| {
            std::iter::repeat_with(|| budgets.spend(&pod, at, repeated)).take_while(|spent| *spent).count()
        };
        assert_eq!(count(&mut budgets, now, true), 13);
        assert_eq!(count(&mut budgets, now, false), 12);
        let later = now + Duration::from_secs(16);
        assert_eq!(count(&mut budgets, later, true), 0, "what comes back is for news first");
        assert_eq!(count(&mut budgets, later, false), 1);
        assert_eq!(count(&mut budgets, later + Duration::from_secs(3600), false), 25);
    }
}
