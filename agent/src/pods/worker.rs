//! One pod's life: a task that looks, plans, acts, and says what is.
//!
//! ```text
//!        ┌────────────► look at the runtime ─► decide its fate ─► plan ─► actions (own tasks) ─► status ─┐
//!        │                                                                                             │
//!        └── woken by: the pod changed · the runtime changed · an action ended · a probe · the clock ◄──┘
//! ```
//!
//! Started by `dispatch`, one for each uid. Invariants: the worker itself waits for nothing but its wake-ups, so a
//! slow pull or hook never delays a deletion; what is under way on a target is in `memory.busy`; once ending, a pod
//! never runs again.

use super::actual::{Actual, Ran};
use super::attempts::{Attempts, Look};
use super::context::Context;
use super::desired::Desired;
use super::fate::{self, Fate};
use super::observe::Observer;
use super::plan::{self, Action, Memory, Plan, Stop, Target};
use super::start::{self, Start, StartError};
use super::storage_watch::{self, StorageWatch};
use super::{backoff, cleanup, dispatch::Mailbox, refuse, status};
use crate::events::{Severity, pod_reference};
use crate::probes::Probers;
use crate::volumes::Volumes;
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as api;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::{AbortHandle, JoinSet};

/// Brings volumes up to date this often though nothing happened.
const RESYNC: Duration = Duration::from_secs(60);
/// And looks at the runtime this often: what changed there is told by `runtime_events`.
const LOOK: Duration = Duration::from_secs(600);
/// Waits between failed looks and failed actions.
const RETRY: Duration = Duration::from_secs(3);
/// Waits between failed sandboxes, doubled each time.
const SANDBOX_WAIT: Duration = Duration::from_secs(2);
const SANDBOX_LONGEST: Duration = Duration::from_secs(60);

/// What came of an action.
enum Done {
    Sandbox(Result<(), (&'static str, String)>),
    Start {
        name: String,
        result: Result<(), StartError>,
    },
    Other(Result<(), String>),
    Refreshed,
    /// What the pod keeps on disk was looked at: why it has to go.
    Measured(Option<String>),
}

struct Running {
    target: Target,
    task: AbortHandle,
    deadline: Option<Timestamp>,
}

/// The task.
pub struct Worker {
    ctx: Arc<Context>,
    mail: Arc<Mailbox>,
    desired: Arc<Desired>,
    removed: bool,
    observer: Observer,
    /// What was seen last, and when.
    seen: Option<(Actual, Instant)>,
    memory: Memory,
    probers: Probers,
    tasks: JoinSet<Done>,
    running: HashMap<tokio::task::Id, Running>,
    attempts: Attempts,
    hooked: HashSet<String>,
    ending: Option<Stop>,
    failed: Option<(String, String)>,
    status: api::PodStatus,
    sandbox_wait: Duration,
    refreshed: Timestamp,
    refreshing: bool,
    storage: StorageWatch,
    finished: bool,
    /// Targets on which something failed a moment ago; until then they count as busy.
    cooling: Vec<(Target, Timestamp)>,
    /// The pod's files could not be removed: not again before this time.
    teardown_at: Option<Timestamp>,
}

impl Worker {
    /// A worker for a pod as first seen.
    pub fn new(ctx: Arc<Context>, mail: Arc<Mailbox>, desired: Arc<Desired>) -> Self {
        let probers = Probers::new(ctx.cri.clone(), ctx.events.clone(), mail.wake.clone());
        let status = desired.pod.status.clone().unwrap_or_default();
        Self {
            ctx,
            mail,
            desired,
            removed: false,
            observer: Observer::default(),
            seen: None,
            memory: Memory::default(),
            probers,
            tasks: JoinSet::new(),
            running: HashMap::new(),
            attempts: Attempts::default(),
            hooked: HashSet::new(),
            ending: None,
            failed: None,
            status,
            sandbox_wait: SANDBOX_WAIT,
            refreshed: Timestamp::now(),
            refreshing: false,
            storage: StorageWatch::default(),
            finished: false,
            cooling: Vec::new(),
            teardown_at: None,
        }
    }

    /// Runs until the pod is gone from the API server and from this node. Dropping it stops nothing that runs.
    pub async fn run(mut self) {
        let mut asleep = false;
        loop {
            self.read_mail();
            if self.finished && self.removed {
                return;
            }
            let next = if self.finished { None } else { self.step(asleep).await };
            let wait = next.map_or(RESYNC, |at| {
                Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default()
            });
            // Every arm is cancel-safe: a wake-up that is not taken stays.
            asleep = tokio::select! {
                () = self.mail.wake.notified() => false,
                Some(done) = self.tasks.join_next_with_id() => {
                    self.note(done);
                    false
                }
                () = tokio::time::sleep(wait.min(RESYNC)) => wait >= RESYNC,
            };
        }
    }

    fn read_mail(&mut self) {
        let (newest, removed) = self.mail.read();
        if removed && !self.removed {
            self.removed = true;
            // Not only when its last container has ended: another pod may have its name already.
            self.ctx.statuses.forget(&self.desired.key.uid);
        }
        if let Some(desired) = newest {
            self.desired = desired;
        }
    }

    /// One round; answers when the next one is due at the latest. `asleep`: nothing happened since the last one.
    async fn step(&mut self, asleep: bool) -> Option<Timestamp> {
        let now = Timestamp::now();
        self.bound_waits(now);
        self.cool_down(now);
        let uid = self.desired.key.uid.clone();
        let known = self.seen.take().filter(|(_, at)| asleep && at.elapsed() < LOOK);
        let looked = match known {
            Some(known) => Ok(known),
            None => self.observer.look(&self.ctx.cri, &uid).await.map(|actual| (actual, Instant::now())),
        };
        let mut actual = match looked {
            Ok(looked) => self.seen.insert(looked).0.clone(),
            Err(error) => {
                tracing::warn!(pod = %self.desired.key, %error, "cannot see what runs");
                return Some(now + RETRY);
            }
        };
        // Nothing that was seen has happened after this.
        let now = Timestamp::now();
        status::remember(&mut actual, &self.desired, &self.status);
        self.attempts.recover(&self.desired, &actual, &self.status, &mut self.memory.crashes);
        self.decide(&actual, now);
        self.watch_probes(&actual);
        self.memory.probed = self.probers.results();
        let plan = match &self.ending {
            Some(stop) => {
                let stop = stop.clone();
                self.shorten(&stop);
                plan::stop(&self.desired, &actual, &self.memory, &stop, now)
            }
            None => plan::run(&self.desired, &actual, &self.memory, now),
        };
        for action in plan.actions.clone() {
            self.act(action, &actual, now);
        }
        self.refresh(&actual, now);
        self.measure(&actual);
        self.publish(&actual, &plan, now).await;
        let cooled = self.cooling.iter().map(|(_, until)| *until).min();
        let measure = self.storage.due_in().filter(|_| self.ending.is_none()).map(|wait| now + wait);
        [plan.wake, self.deadline_at(), cooled, self.teardown_at, measure].into_iter().flatten().min()
    }

    /// A clock that is set back makes waits longer: none is left longer than it can have been made.
    fn bound_waits(&mut self, now: Timestamp) {
        self.memory.bound_waits(start::LONGEST, SANDBOX_LONGEST, now);
        let bound = |at: &mut Timestamp, most: Duration| *at = (*at).min(now + most);
        self.cooling.iter_mut().for_each(|(_, at)| bound(at, RETRY));
        self.teardown_at.iter_mut().for_each(|at| bound(at, RETRY));
        let grace = self.desired.grace.max(self.desired.deleted.unwrap_or_default());
        self.ending.iter_mut().for_each(|stop| bound(&mut stop.deadline, grace));
    }

    fn cool_down(&mut self, now: Timestamp) {
        let Self { cooling, memory, .. } = self;
        cooling.retain(|(target, until)| {
            let stays = *until > now;
            if !stays {
                memory.busy.remove(target);
            }
            stays
        });
    }

    /// Whether the pod is to run or to end. What was decided stays; an end may only come sooner.
    fn decide(&mut self, actual: &Actual, now: Timestamp) {
        let first = actual.sandboxes.is_empty() && actual.containers.is_empty() && self.running.is_empty();
        let refusal = if first && self.ending.is_none() { refuse::check(&self.desired.pod) } else { None };
        let evicted = self.storage.exceeded();
        let fate = fate::decide(&self.desired, actual, self.removed, refusal, evicted, &self.status, now);
        if let Some((reason, message)) = fate.failed()
            && self.ending.is_none()
        {
            let object = pod_reference(&self.desired.pod, None);
            self.ctx.events.record(object, Severity::Warning, reason, message.to_owned());
            self.failed = Some((reason.to_owned(), message.to_owned()));
        }
        let (grace, remove) = match &fate {
            Fate::Run => return,
            Fate::End { grace, remove, .. } => (*grace, *remove),
        };
        let deadline = now + grace;
        match &mut self.ending {
            Some(stop) => {
                // The grace counts from when the end began; only a shorter wish changes it.
                stop.remove |= remove;
                if remove && deadline < stop.deadline {
                    stop.deadline = deadline;
                }
            }
            None => {
                self.probers.ending();
                self.ending = Some(Stop { why: String::new(), deadline, remove });
                self.give_up_starts();
            }
        }
    }

    /// A pod that ends needs no container that is still being brought up.
    fn give_up_starts(&mut self) {
        for running in self.running.values().filter(|r| matches!(r.target, Target::Start(_))) {
            running.task.abort();
        }
    }

    /// Stops that were given more time than is left now are asked for again.
    fn shorten(&mut self, stop: &Stop) {
        let late = |r: &&Running| r.deadline.is_some_and(|d| d > stop.deadline + Duration::from_secs(1));
        for running in self.running.values().filter(late) {
            running.task.abort();
        }
    }

    fn watch_probes(&mut self, actual: &Actual) {
        let sandbox = actual.sandbox();
        let ip = sandbox.and_then(|s| s.ips.first()).map(String::as_str);
        let settled = |ran: &&Ran| {
            sandbox.is_some_and(|s| s.id == ran.sandbox)
                && !self.memory.busy.contains(&Target::Start(ran.name.clone()))
        };
        let containers: Vec<_> = actual.running().filter(settled).collect();
        let old = &self.status;
        let before = |ran: &Ran| {
            let was = status::old_status(old, &ran.name)?;
            let same = was.container_id.as_ref().is_some_and(|id| id.ends_with(&ran.id));
            same.then(|| (was.started == Some(true), was.ready))
        };
        self.probers.watch(&self.desired, &containers, ip, before);
    }

    fn act(&mut self, action: Action, actual: &Actual, now: Timestamp) {
        let target = action.target();
        tracing::debug!(pod = %self.desired.key, ?action, "doing");
        let (ctx, desired) = (self.ctx.clone(), self.desired.clone());
        let mut deadline = None;
        let task = match action {
            Action::CreateSandbox { attempt } => {
                if attempt > 0 {
                    self.memory.sandbox_replaced(now);
                    let message = "Pod sandbox changed, it will be killed and re-created.";
                    let object = pod_reference(&desired.pod, None);
                    ctx.events.record(object, Severity::Normal, "SandboxChanged", message);
                }
                self.tasks.spawn(async move { Done::Sandbox(start::sandbox(&ctx, &desired, attempt).await) })
            }
            Action::Start { name, restarts, sandbox } => {
                if let Some(ran) = actual.current(&name) {
                    self.memory.crashes.tried(&name, ran.ended(), now);
                }
                self.attempts.begun(&name, now);
                let found = actual.sandbox();
                let order = Start {
                    name: name.clone(),
                    restarts,
                    sandbox,
                    sandbox_attempt: found.map_or(0, |s| s.attempt),
                    ips: found.map(|s| s.ips.clone()).unwrap_or_default(),
                };
                self.tasks.spawn(async move {
                    Done::Start { name, result: start::container(&ctx, &desired, &order).await }
                })
            }
            Action::Kill { id, name, why, grace } => {
                deadline = Some(now + grace);
                let with_hook = self.hooked.insert(id.clone());
                let ip = actual.sandboxes.first().and_then(|s| s.ips.first()).cloned().unwrap_or_default();
                self.tasks.spawn(async move {
                    let stop = start::stop_container(&ctx, &desired, &id, &name, &why, grace, with_hook, &ip);
                    Done::Other(stop.await)
                })
            }
            Action::StopSandbox { id } => self.tasks.spawn(async move {
                Done::Other(ctx.cri.stop_sandbox(&id).await.map_err(|e| e.to_string()))
            }),
            Action::RemoveContainer { id } => {
                let run = cleanup::Run::of(actual, id);
                self.tasks.spawn(async move {
                    Done::Other(run.remove(&ctx, &desired).await.map_err(|e| e.to_string()))
                })
            }
            Action::RemoveSandbox { id } => self.tasks.spawn(async move {
                Done::Other(ctx.cri.remove_sandbox(&id).await.map_err(|e| e.to_string()))
            }),
        };
        self.memory.busy.insert(target.clone());
        self.running.insert(task.id(), Running { target, task, deadline });
    }

    fn note(&mut self, done: Result<(tokio::task::Id, Done), tokio::task::JoinError>) {
        let id = match &done {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let now = Timestamp::now();
        if let Some(running) = self.running.remove(&id) {
            if let Target::Start(name) = &running.target {
                self.attempts.given_up(name);
            }
            if matches!(done, Ok((_, Done::Other(Err(_))))) {
                self.cooling.push((running.target, now + RETRY));
            } else {
                self.memory.busy.remove(&running.target);
            }
        }
        match done {
            Ok((_, Done::Sandbox(result))) => self.note_sandbox(result, now),
            Ok((_, Done::Start { name, result: Ok(()) })) => {
                self.attempts.started(&name);
                self.memory.not_before.remove(&name);
            }
            Ok((_, Done::Start { name, result: Err(error) })) => {
                tracing::info!(pod = %self.desired.key, container = name, error.reason, error.message, "not started");
                self.attempts.failed(&name, error.reason, &error.message);
                self.memory.not_before.insert(name, error.again);
            }
            Ok((_, Done::Other(Err(why)))) => {
                tracing::warn!(pod = %self.desired.key, why, "trying again");
            }
            Ok((_, Done::Refreshed)) => self.refreshing = false,
            Ok((_, Done::Measured(exceeded))) => self.storage.measured(exceeded),
            Ok((_, Done::Other(Ok(())))) => {}
            Err(error) if error.is_cancelled() => {}
            Err(error) => tracing::error!(pod = %self.desired.key, %error, "an action ended by itself"),
        }
    }

    fn note_sandbox(&mut self, result: Result<(), (&'static str, String)>, now: Timestamp) {
        match result {
            Ok(()) => {
                self.sandbox_wait = SANDBOX_WAIT;
                self.memory.sandbox_not_before = None;
            }
            Err((reason, message)) => {
                tracing::info!(pod = %self.desired.key, reason, message, "no sandbox");
                self.ctx.events.record(
                    pod_reference(&self.desired.pod, None),
                    Severity::Warning,
                    reason,
                    message,
                );
                self.memory.sandbox_not_before = Some(now + self.sandbox_wait);
                self.sandbox_wait = (self.sandbox_wait * 2).min(SANDBOX_LONGEST);
            }
        }
    }

    /// Brings the content of volumes up to date now and then.
    fn refresh(&mut self, actual: &Actual, now: Timestamp) {
        let due = now.duration_since(self.refreshed).unsigned_abs() >= RESYNC;
        if !due || self.refreshing || self.ending.is_some() || !Volumes::changes(&self.desired) {
            return;
        }
        let Some(sandbox) = actual.sandbox() else { return };
        self.refreshed = now;
        self.refreshing = true;
        let (ctx, desired, ips) = (self.ctx.clone(), self.desired.clone(), sandbox.ips.clone());
        self.tasks.spawn(async move {
            let facts = ctx.facts(&desired, &ips);
            if let Err(error) = ctx.volumes.prepare(&desired, &facts).await {
                let object = pod_reference(&desired.pod, None);
                ctx.events.record(object, Severity::Warning, "FailedMount", error.to_string());
            }
            Done::Refreshed
        });
    }

    fn measure(&mut self, actual: &Actual) {
        if self.ending.is_some() || !self.storage.begin(&self.desired) {
            return;
        }
        let Some(sandbox) = actual.sandbox() else { return self.storage.measured(None) };
        let (ctx, desired, sandbox) = (self.ctx.clone(), self.desired.clone(), sandbox.id.clone());
        self.tasks.spawn(async move { Done::Measured(storage_watch::look(&ctx, &desired, &sandbox).await) });
    }

    async fn publish(&mut self, actual: &Actual, plan: &Plan, now: Timestamp) {
        self.memory.probed = self.probers.results();
        let (status, put_off) = self.attempts.status(&Look {
            desired: &self.desired,
            actual,
            plan,
            memory: &self.memory,
            old: &self.status,
            ending: self.ending.is_some(),
            failed: self.failed.as_ref().map(|(r, m)| (r.as_str(), m.as_str())),
            runtime: &self.ctx.runtime,
            host_ips: &self.ctx.host_ips(),
            now,
        });
        self.status = status;
        self.say_back_off(&put_off);
        let remove = self.ending.as_ref().is_some_and(|s| s.remove);
        let due = self.teardown_at.is_none_or(|at| at <= now);
        let finished = remove && plan.gone && due && cleanup::remove_files(&self.ctx, &self.desired).await;
        self.teardown_at = (remove && plan.gone && !finished).then(|| now + RETRY);
        if !self.removed {
            self.ctx.statuses.set(&self.desired.key, &self.desired.pod, self.status.clone(), finished);
        }
        self.finished = finished;
        if finished {
            self.mail.wake.notify_one();
        }
    }

    /// These are put off from now on; the status says so in the next round, which follows at once.
    fn say_back_off(&self, names: &[String]) {
        for name in names {
            let wait = backoff::short(self.memory.crashes.delay_seconds(name));
            let pod = self.desired.key.long();
            let message = format!("Back-off restarting failed container {name} in pod {pod}: waiting {wait}");
            let field = self.desired.container(name).map(super::desired::Container::field);
            let object = pod_reference(&self.desired.pod, field);
            self.ctx.events.record(object, Severity::Warning, "BackOff", message);
            self.mail.wake.notify_one();
        }
    }

    fn deadline_at(&self) -> Option<Timestamp> {
        let started = self.status.start_time.as_ref()?.0;
        self.desired.active_deadline.filter(|_| self.ending.is_none()).map(|limit| started + limit)
    }
}
