//! From the API server's pods to one worker each.
//!
//! ```text
//! watch ──► dispatch ──mailbox (newest copy wins)──► worker of that uid
//! runtime ──uids that changed──┘
//! ```
//!
//! Invariants: one worker for each uid, never two; what is not this node's business yet (a list that is not
//! complete) removes nothing.

use super::context::Context;
use super::desired::{Desired, PodKey};
use super::worker::Worker;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// After this long a worker's end has nothing to do with the one before it.
const FORGIVEN: Duration = Duration::from_secs(600);

/// A worker's mailbox: it holds the newest copy only.
#[derive(Default)]
pub struct Mailbox {
    slot: Mutex<Slot>,
    /// Told of everything the worker should look at.
    pub wake: Arc<Notify>,
}

#[derive(Default)]
struct Slot {
    newest: Option<Arc<Desired>>,
    removed: bool,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the newest copy, if there is one, and whether the API server has dropped the pod.
    pub fn read(&self) -> (Option<Arc<Desired>>, bool) {
        let mut slot = self.lock();
        (slot.newest.take(), slot.removed)
    }

    fn put(&self, desired: Arc<Desired>) {
        self.lock().newest = Some(desired);
        self.wake.notify_one();
    }

    fn remove(&self, last: Option<Arc<Desired>>) {
        let mut slot = self.lock();
        slot.removed = true;
        if last.is_some() {
            slot.newest = last;
        }
        drop(slot);
        self.wake.notify_one();
    }
}

struct Handle {
    mail: Arc<Mailbox>,
    desired: Arc<Desired>,
    /// The newest worker's start, and how long it was put off.
    begun: Instant,
    put_off: Duration,
}

/// How long the next worker is put off after one that ended by itself `ran` after it was asked for: whatever it
/// stumbled over is most often still there.
fn put_off(before: Duration, ran: Duration) -> Duration {
    let before = if ran > FORGIVEN { Duration::ZERO } else { before };
    (before * 2).clamp(FIRST_WAIT, LONGEST_WAIT)
}

/// Owns the workers.
pub struct Dispatcher {
    ctx: Arc<Context>,
    workers: JoinSet<String>,
    handles: HashMap<String, Handle>,
    tasks: HashMap<tokio::task::Id, String>,
    /// Uids in a list that is being received.
    listing: Option<BTreeSet<String>>,
    /// Uids with a worker, once the first list was complete.
    known: watch::Sender<Option<BTreeSet<String>>>,
}

impl Dispatcher {
    /// No workers yet; `known` is told of their uids once the first list was complete.
    pub fn new(ctx: Arc<Context>, known: watch::Sender<Option<BTreeSet<String>>>) -> Self {
        Self {
            ctx,
            workers: JoinSet::new(),
            handles: HashMap::new(),
            tasks: HashMap::new(),
            listing: None,
            known,
        }
    }

    /// A list begins.
    pub fn list_begun(&mut self) {
        self.listing = Some(BTreeSet::new());
    }

    /// The list is complete: what was not in it is gone.
    pub fn list_complete(&mut self) {
        let Some(listed) = self.listing.take() else { return };
        for (uid, handle) in &self.handles {
            if !listed.contains(uid) {
                handle.mail.remove(None);
            }
        }
        self.ctx.statuses.keep(&listed);
        self.known.send_replace(Some(self.handles.keys().cloned().collect()));
    }

    /// A pod as the API server has it now.
    pub fn applied(&mut self, pod: Pod) {
        let Some(key) = PodKey::of(&pod) else { return };
        let uid = key.uid.clone();
        if let Some(listed) = &mut self.listing {
            listed.insert(uid.clone());
        }
        let pod = Arc::new(pod);
        let desired = match Desired::read(key.clone(), pod.clone()) {
            Ok(desired) => Arc::new(desired),
            Err(why) => return self.unreadable(&key, &pod, why),
        };
        match self.handles.get_mut(&uid) {
            Some(handle) => {
                handle.desired = desired.clone();
                handle.mail.put(desired);
            }
            None => {
                let (begun, put_off) = (Instant::now(), Duration::ZERO);
                self.handles.insert(uid.clone(), Handle { mail: Arc::default(), desired, begun, put_off });
                self.spawn(&uid);
                self.tell_known();
            }
        }
    }

    /// A pod that cannot be understood is Failed, and goes when it is deleted.
    fn unreadable(&self, key: &PodKey, pod: &Arc<Pod>, why: String) {
        let status = PodStatus {
            phase: Some("Failed".into()),
            reason: Some("Invalid".into()),
            message: Some(format!("This node cannot understand the pod: {why}.")),
            start_time: pod
                .status
                .as_ref()
                .and_then(|s| s.start_time.clone())
                .or(Some(Time(Timestamp::now()))),
            observed_generation: pod.metadata.generation,
            ..Default::default()
        };
        self.ctx.statuses.set(key, pod, status, pod.metadata.deletion_timestamp.is_some());
    }

    /// The API server has dropped a pod.
    pub fn deleted(&mut self, pod: Pod) {
        let Some(key) = PodKey::of(&pod) else { return };
        // At once: another pod may have its name already.
        self.ctx.statuses.forget(&key.uid);
        if let Some(handle) = self.handles.get(&key.uid) {
            let last = Desired::read(key, Arc::new(pod)).ok().map(Arc::new);
            handle.mail.remove(last);
        }
    }

    /// Something of a pod changed in the runtime; `None`: nobody knows of which.
    pub fn runtime_changed(&self, uid: Option<&str>) {
        match uid {
            Some(uid) => {
                if let Some(handle) = self.handles.get(uid) {
                    handle.mail.wake.notify_one();
                }
            }
            None => self.handles.values().for_each(|h| h.mail.wake.notify_one()),
        }
    }

    fn spawn(&mut self, uid: &str) {
        let Some(handle) = self.handles.get(uid) else { return };
        let worker = Worker::new(self.ctx.clone(), handle.mail.clone(), handle.desired.clone());
        let (name, put_off) = (uid.to_owned(), handle.put_off);
        let task = self.workers.spawn(async move {
            tokio::time::sleep(put_off).await;
            worker.run().await;
            name
        });
        self.tasks.insert(task.id(), uid.to_owned());
    }

    fn tell_known(&self) {
        if self.known.borrow().is_some() {
            self.known.send_replace(Some(self.handles.keys().cloned().collect()));
        }
    }

    /// Waits until a worker has ended; for ever when there is none. Cancel-safe.
    pub async fn worker_ended(&mut self) {
        let ended = match self.workers.join_next_with_id().await {
            Some(ended) => ended,
            None => return std::future::pending().await,
        };
        match ended {
            Ok((id, uid)) => {
                self.tasks.remove(&id);
                self.handles.remove(&uid);
                self.tell_known();
            }
            Err(error) => {
                let Some(uid) = self.tasks.remove(&error.id()) else { return };
                let Some(handle) = self.handles.get_mut(&uid) else { return };
                handle.put_off = put_off(handle.put_off, handle.begun.elapsed());
                handle.begun = Instant::now();
                let wait = handle.put_off.as_secs();
                tracing::error!(uid, %error, wait, "a pod's worker ended by itself; starting another one");
                self.spawn(&uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_that_end_by_themselves_are_put_off_longer_each_time() {
        let mut wait = Duration::ZERO;
        let mut next = |ran: Duration| {
            wait = put_off(wait, ran);
            wait.as_secs()
        };
        let at_once: Vec<u64> = (0..8).map(|_| next(Duration::ZERO)).collect();
        assert_eq!(at_once, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(next(FORGIVEN + FIRST_WAIT), 1);
    }
}
