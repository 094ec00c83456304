//! Probes of running containers: startup, liveness, readiness.
//!
//! ```text
//! started ──startup fails──► kill            ready ◄──success──┐
//!    │ startup succeeds (or there is none)     │               │
//!    ├──► liveness: fails ──► kill             └──fails──► not ready
//!    └──► readiness ───────────────────────────────────────────┘
//! ```
//!
//! Called by `pods::worker`, which reads [`Probers::results`] and is woken on every change. One task for each container,
//! ended with it. Invariants: a slow probe delays no other container's; a result belongs to one container id.

mod attempt;
mod grpc;
mod http;

use crate::cri::Cri;
use crate::events::{Recorder, Severity, pod_reference};
use crate::pods::actual::{Ran, timestamp};
use crate::pods::desired::{Container, Desired, Probe};
use crate::pods::plan::{ProbeKill, Probed};
use attempt::Outcome;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};

pub use attempt::hook;

type Results = Arc<Mutex<BTreeMap<String, Probed>>>;

/// The probes of one pod.
pub struct Probers {
    cri: Cri,
    events: Recorder,
    results: Results,
    changed: Arc<Notify>,
    ending: watch::Sender<bool>,
    tasks: JoinSet<()>,
    running: HashMap<String, AbortHandle>,
}

impl Probers {
    /// None yet; `changed` is told when a result changes.
    pub fn new(cri: Cri, events: Recorder, changed: Arc<Notify>) -> Self {
        Self {
            cri,
            events,
            results: Results::default(),
            changed,
            ending: watch::channel(false).0,
            tasks: JoinSet::new(),
            running: HashMap::new(),
        }
    }

    /// Probes exactly these containers from now on. `before`: what was known of them before this agent started.
    pub fn watch(
        &mut self,
        desired: &Desired,
        containers: &[&Ran],
        ip: Option<&str>,
        before: impl Fn(&Ran) -> Option<(bool, bool)>,
    ) {
        self.running.retain(|id, task| {
            let stays = containers.iter().any(|c| c.id == *id);
            if !stays {
                task.abort();
                lock(&self.results).remove(id);
            }
            stays
        });
        while self.tasks.try_join_next().is_some() {}
        for ran in containers {
            let Some(container) = desired.container(&ran.name) else { continue };
            if !self.running.contains_key(&ran.id) {
                self.start(desired, container, ran, ip, before(ran));
            }
        }
    }

    fn start(
        &mut self,
        desired: &Desired,
        container: &Container,
        ran: &Ran,
        ip: Option<&str>,
        before: Option<(bool, bool)>,
    ) {
        let (was_started, was_ready) = before.unwrap_or_default();
        let started = container.startup.is_none() || was_started;
        let ready = container.readiness.is_none() || was_ready;
        lock(&self.results).insert(ran.id.clone(), Probed { started, ready, kill: None });
        let prober = Prober {
            cri: self.cri.clone(),
            events: self.events.clone(),
            object: pod_reference(&desired.pod, Some(container.field())),
            id: ran.id.clone(),
            ip: ip.unwrap_or_default().to_owned(),
            since: timestamp(ran.started),
            results: self.results.clone(),
            changed: self.changed.clone(),
            started: watch::channel(started).0,
            ending: self.ending.subscribe(),
        };
        let (startup, liveness, readiness) =
            (container.startup.clone(), container.liveness.clone(), container.readiness.clone());
        let task = self.tasks.spawn(async move { prober.run(startup, liveness, readiness).await });
        self.running.insert(ran.id.clone(), task);
    }

    /// The pod is being stopped: nothing is killed for its probes any more.
    pub fn ending(&self) {
        self.ending.send_replace(true);
    }

    /// What is known now, by container id.
    pub fn results(&self) -> BTreeMap<String, Probed> {
        lock(&self.results).clone()
    }
}

fn lock(results: &Results) -> std::sync::MutexGuard<'_, BTreeMap<String, Probed>> {
    results.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The probes of one container.
struct Prober {
    cri: Cri,
    events: Recorder,
    object: ObjectReference,
    id: String,
    ip: String,
    since: Timestamp,
    results: Results,
    changed: Arc<Notify>,
    started: watch::Sender<bool>,
    ending: watch::Receiver<bool>,
}

impl Prober {
    async fn run(&self, startup: Option<Probe>, liveness: Option<Probe>, readiness: Option<Probe>) {
        let startup = async {
            if let Some(probe) = startup.filter(|_| !*self.started.borrow()) {
                self.until_killed("Startup", &probe, true).await;
            }
        };
        let liveness = async {
            if let Some(probe) = liveness {
                self.after_start().await;
                self.until_killed("Liveness", &probe, false).await;
            }
        };
        let readiness = async {
            if let Some(probe) = readiness {
                self.after_start().await;
                self.readiness(&probe).await;
            }
        };
        tokio::join!(startup, liveness, readiness);
    }

    async fn after_start(&self) {
        let mut started = self.started.subscribe();
        // An error means that the prober is gone, and this task with it.
        let _ = started.wait_for(|started| *started).await;
    }

    async fn first(&self, probe: &Probe) {
        let running = Duration::try_from(Timestamp::now().duration_since(self.since)).unwrap_or_default();
        tokio::time::sleep(probe.initial_delay.saturating_sub(running)).await;
    }

    /// Startup and liveness: too many failures kill; a startup probe is over with its success.
    async fn until_killed(&self, name: &'static str, probe: &Probe, startup: bool) {
        self.first(probe).await;
        let mut ending = self.ending.clone();
        let (mut successes, mut failures) = (0, 0);
        while !*ending.borrow_and_update() {
            match self.once(name, probe).await {
                Some(true) => {
                    (successes, failures) = (successes + 1, 0);
                    if startup && successes >= probe.successes {
                        self.change(|result| result.started = true);
                        self.started.send_replace(true);
                        return;
                    }
                }
                Some(false) => (successes, failures) = (0, failures + 1),
                None => {}
            }
            if failures >= probe.failures && !*ending.borrow() {
                let name = if startup { "startup" } else { "liveness" };
                self.change(|result| result.kill = Some(ProbeKill { probe: name, grace: probe.grace }));
                return;
            }
            tokio::time::sleep(probe.period).await;
        }
    }

    async fn readiness(&self, probe: &Probe) {
        self.first(probe).await;
        let (mut successes, mut failures) = (0, 0);
        loop {
            match self.once("Readiness", probe).await {
                Some(true) => (successes, failures) = (successes + 1, 0),
                Some(false) => (successes, failures) = (0, failures + 1),
                None => {}
            }
            if successes >= probe.successes {
                self.change(|result| result.ready = true);
            } else if failures >= probe.failures {
                self.change(|result| result.ready = false);
            }
            tokio::time::sleep(probe.period).await;
        }
    }

    /// One attempt; `None` when it could not be made, which says nothing about the container.
    async fn once(&self, name: &str, probe: &Probe) -> Option<bool> {
        let outcome = attempt::probe(&self.cri, &self.id, &self.ip, &probe.handler, probe.timeout).await;
        match outcome {
            Outcome::Success => Some(true),
            Outcome::Failure(why) => {
                let message = format!("{name} probe failed: {why}");
                self.events.record(self.object.clone(), Severity::Warning, "Unhealthy", message);
                Some(false)
            }
            Outcome::Unknown(why) => {
                let message = format!("{name} probe errored and resulted in unknown state: {why}");
                self.events.record(self.object.clone(), Severity::Warning, "Unhealthy", message);
                None
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut Probed)) {
        let mut results = lock(&self.results);
        let Some(result) = results.get_mut(&self.id) else { return };
        let before = result.clone();
        change(result);
        if *result != before {
            self.changed.notify_one();
        }
    }
}
