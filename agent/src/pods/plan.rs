//! What to do next for a pod: desired × actual × probes × clock → actions ◇.
//!
//! ```text
//!            nothing ──CreateSandbox──► sandbox ──Start init…──► initialised ──Start main…──► running
//!                                          ▲                                                    │
//!                                          └──── sandbox lost: Kill, StopSandbox ◄──────────────┤
//!   stopping (deleted, deadline, failed, complete): Kill mains → Kill sidecars in reverse → StopSandbox → stopped
//!   deleted and stopped: RemoveContainer…, RemoveSandbox… → gone
//! ```
//!
//! Called by `worker` after every change, never by a timer alone; it answers when to ask again. Invariants: no
//! action is given for something on which one is under way; at most one container is being started at a time, in the
//! order of the spec; a stopping pod is never given a start.

use super::actual::{Actual, Ran, State};
use super::attempts::CRASH_LOOP;
use super::backoff::{self, Backoff};
use super::desired::{Container, Desired, Role};
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What probes say of a running container, by the runtime's id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Probed {
    /// The startup probe has succeeded, or there is none.
    pub started: bool,
    /// The readiness probe's verdict; `true` without one.
    pub ready: bool,
    /// Set when the liveness or startup probe wants it killed.
    pub kill: Option<ProbeKill>,
}

/// A probe's wish to kill a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeKill {
    /// `liveness` or `startup`.
    pub probe: &'static str,
    /// The probe's own grace.
    pub grace: Option<Duration>,
}

/// What an action works on; one at a time for each.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// The pod's next sandbox.
    NewSandbox,
    /// A container being started, by name.
    Start(String),
    /// A container of the runtime, by id.
    Container(String),
    /// A sandbox of the runtime, by id.
    Sandbox(String),
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Make a sandbox.
    CreateSandbox {
        /// Which one of the pod.
        attempt: u32,
    },
    /// Pull, create, start, run its hook.
    Start {
        /// Name in the pod.
        name: String,
        /// How often it was started before.
        restarts: u32,
        /// Sandbox to start it in.
        sandbox: String,
    },
    /// Run the preStop hook, ask, then kill.
    Kill {
        /// Runtime's id.
        id: String,
        /// Name in the pod.
        name: String,
        /// Why, for the event.
        why: String,
        /// Time it gets, hook included.
        grace: Duration,
    },
    /// Stop a sandbox.
    StopSandbox {
        /// Runtime's id.
        id: String,
    },
    /// Remove an ended container.
    RemoveContainer {
        /// Runtime's id.
        id: String,
    },
    /// Remove a stopped sandbox.
    RemoveSandbox {
        /// Runtime's id.
        id: String,
    },
}

impl Action {
    /// What it works on.
    pub fn target(&self) -> Target {
        match self {
            Self::CreateSandbox { .. } => Target::NewSandbox,
            Self::Start { name, .. } => Target::Start(name.clone()),
            Self::Kill { id, .. } | Self::RemoveContainer { id } => Target::Container(id.clone()),
            Self::StopSandbox { id } | Self::RemoveSandbox { id } => Target::Sandbox(id.clone()),
        }
    }
}

/// Why a container is not running though it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// In a word.
    pub reason: String,
    /// In a sentence.
    pub message: String,
}

/// Why and until when a pod is being stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// For the containers' events.
    pub why: String,
    /// When containers are killed at the latest.
    pub deadline: Timestamp,
    /// Its sandboxes and containers are removed too.
    pub remove: bool,
}

/// What the worker knows beside spec and runtime.
#[derive(Debug, Default)]
pub struct Memory {
    /// Restart back-off by container name.
    pub crashes: Backoff,
    /// Failed starts: not again before this time.
    pub not_before: BTreeMap<String, Timestamp>,
    /// Sandbox creation: not again before this time.
    pub sandbox_not_before: Option<Timestamp>,
    /// Back-off of sandboxes that were lost, under [`LOST`].
    losses: Backoff,
    /// Probe results by container id.
    pub probed: BTreeMap<String, Probed>,
    /// What is under way.
    pub busy: BTreeSet<Target>,
}

/// The one name in a pod's back-off of lost sandboxes.
const LOST: &str = "sandbox";

impl Memory {
    /// A sandbox that was lost is being replaced.
    pub fn sandbox_replaced(&mut self, now: Timestamp) {
        self.losses.tried(LOST, now, now);
    }

    /// A clock that is set back makes waits longer: none is left longer than it can have been made, `start` for a
    /// container and `sandbox` for a sandbox.
    pub fn bound_waits(&mut self, start: Duration, sandbox: Duration, now: Timestamp) {
        self.not_before.values_mut().for_each(|at| *at = (*at).min(now + start));
        self.sandbox_not_before.iter_mut().for_each(|at| *at = (*at).min(now + sandbox));
    }
}

/// The answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// To do now; those of one plan may run at the same time.
    pub actions: Vec<Action>,
    /// Containers that are put off for their back-off.
    pub waiting: BTreeMap<String, Waiting>,
    /// When to ask again at the latest.
    pub wake: Option<Timestamp>,
    /// Nothing of the pod runs any more.
    pub stopped: bool,
    /// The runtime has nothing of the pod any more.
    pub gone: bool,
}

impl Plan {
    fn give(&mut self, memory: &Memory, action: Action) {
        if !memory.busy.contains(&action.target()) {
            self.actions.push(action);
        }
    }

    fn wake_at(&mut self, when: Timestamp) {
        self.wake = Some(self.wake.map_or(when, |other| other.min(when)));
    }
}

/// What is over in a pod whose containers decide for themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Something runs or will.
    Active,
    /// Every main container has ended for good, or an init container has failed for good.
    Over,
}

/// Whether the pod's containers have brought it to its end.
pub fn verdict(desired: &Desired, actual: &Actual) -> Verdict {
    let ended = |c: &Container| actual.current(&c.name).is_some_and(|ran| ended_for_good(c, ran));
    let init_failed = !started_mains(desired, actual)
        && desired.of_role(Role::Init).any(|c| {
            actual.current(&c.name).is_some_and(|r| r.state == State::Exited && r.exit_code != 0) && ended(c)
        });
    if init_failed || desired.of_role(Role::Main).all(ended) { Verdict::Over } else { Verdict::Active }
}

fn started_mains(desired: &Desired, actual: &Actual) -> bool {
    desired.of_role(Role::Main).any(|c| actual.current(&c.name).is_some_and(|r| r.state != State::Created))
}

fn ended_for_good(container: &Container, ran: &Ran) -> bool {
    ran.state == State::Exited && !container.restarts_after(ran.exit_code)
}

/// What to do for a pod that is to run.
pub fn run(desired: &Desired, actual: &Actual, memory: &Memory, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let Some(sandbox) = actual.sandbox() else {
        new_sandbox(&mut plan, actual, memory, desired, now);
        return plan;
    };
    let mut next =
        Starts { plan: &mut plan, desired, actual, memory, now, sandbox: &sandbox.id, given: false };
    // Containers of an older sandbox tell nothing of what has to run in this one.
    let initialised = desired.of_role(Role::Main).any(|c| next.here(c).is_some());
    if next.before_main(initialised) {
        for container in desired.of_role(Role::Main) {
            next.keep_running(container);
        }
    }
    for container in desired.of_role(Role::Ephemeral) {
        if actual.current(&container.name).is_none() {
            next.start(container, 0);
        }
    }
    collect_garbage(&mut plan, desired, actual, memory);
    plan
}

fn new_sandbox(plan: &mut Plan, actual: &Actual, memory: &Memory, desired: &Desired, now: Timestamp) {
    let lost: Vec<&Ran> = actual.running().collect();
    if !lost.is_empty() {
        for ran in lost {
            let why =
                format!("Pod sandbox changed, it will be killed and re-created; container {}", ran.name);
            plan.give(
                memory,
                Action::Kill { id: ran.id.clone(), name: ran.name.clone(), why, grace: desired.grace },
            );
        }
        return;
    }
    let before = actual.sandboxes.first();
    let lost = before.and_then(|s| memory.losses.until(LOST, super::actual::timestamp(s.created), now));
    if let Some(until) = memory.sandbox_not_before.filter(|until| *until > now).max(lost) {
        plan.wake_at(until);
        return;
    }
    let attempt = before.map_or(0, |s| s.attempt + 1);
    plan.give(memory, Action::CreateSandbox { attempt });
}

/// Decides which containers are started.
struct Starts<'a> {
    plan: &'a mut Plan,
    desired: &'a Desired,
    actual: &'a Actual,
    memory: &'a Memory,
    now: Timestamp,
    sandbox: &'a str,
    given: bool,
}

impl Starts<'_> {
    /// The newest run in the present sandbox.
    fn here(&self, container: &Container) -> Option<&Ran> {
        self.actual.current(&container.name).filter(|r| r.sandbox == self.sandbox)
    }

    /// Init containers and sidecars; answers whether the main ones may run.
    fn before_main(&mut self, initialised: bool) -> bool {
        for container in self.desired.before_main() {
            if container.role == Role::Sidecar {
                let up = self.keep_running(container);
                if !up && !initialised {
                    return false;
                }
                continue;
            }
            if initialised {
                continue;
            }
            let done = match self.here(container) {
                Some(ran) if ran.state == State::Exited && ran.exit_code == 0 => true,
                Some(ran) if ended_for_good(container, ran) => return false,
                _ => false,
            };
            if !done {
                self.keep_running(container);
                return false;
            }
        }
        true
    }

    /// Starts it when it does not run, kills it when it must be replaced. Answers whether it runs and has started.
    fn keep_running(&mut self, container: &Container) -> bool {
        let Some(ran) = self.here(container).cloned() else {
            match self.actual.current(&container.name).cloned() {
                Some(before) if container.role == Role::Main && ended_for_good(container, &before) => {}
                // It may have been what ended its sandbox.
                Some(before) if !before.sandbox.is_empty() => self.restart(container, &before),
                before => self.start(container, before.map_or(0, |before| before.restarts + 1)),
            }
            return false;
        };
        match ran.state {
            State::Running => {
                if let Some(kill) = self.reason_to_kill(container, &ran) {
                    self.plan.give(self.memory, kill);
                    return false;
                }
                let starting = self.memory.busy.contains(&Target::Start(container.name.clone()));
                !starting && self.memory.probed.get(&ran.id).is_some_and(|p| p.started)
            }
            State::Exited => {
                if container.restarts_after(ran.exit_code) {
                    self.restart(container, &ran);
                }
                false
            }
            // Made and not started: whoever was to start it is gone. The next one takes its place.
            State::Created | State::Unknown => {
                self.restart(container, &ran);
                false
            }
        }
    }

    fn reason_to_kill(&self, container: &Container, ran: &Ran) -> Option<Action> {
        let (why, grace) = if ran.hash.is_some_and(|hash| hash != container.hash) {
            (format!("Container {} definition changed, will be restarted", container.name), None)
        } else {
            let kill = self.memory.probed.get(&ran.id)?.kill.as_ref()?;
            let then = if container.restarts_after(137) { ", will be restarted" } else { "" };
            (format!("Container {} failed {} probe{then}", container.name, kill.probe), kill.grace)
        };
        let grace = grace.unwrap_or(self.desired.grace);
        Some(Action::Kill { id: ran.id.clone(), name: container.name.clone(), why, grace })
    }

    fn restart(&mut self, container: &Container, ran: &Ran) {
        let name = &container.name;
        // The attempt under way is counted already: the wait after it is not this one's.
        if self.memory.busy.contains(&Target::Start(name.clone())) {
            return;
        }
        // The wait after a failed start comes first, for it is the news.
        if let Some(until) = self.memory.not_before.get(name).filter(|until| **until > self.now) {
            self.plan.wake_at(*until);
            return;
        }
        if let Some(until) = self.memory.crashes.until(name, ran.ended(), self.now) {
            let seconds = self.memory.crashes.delay_seconds(name);
            let message = backoff::message(seconds, name, &self.desired.key.long());
            self.plan.waiting.insert(name.clone(), Waiting { reason: CRASH_LOOP.to_owned(), message });
            self.plan.wake_at(until);
            return;
        }
        self.start(container, ran.restarts + 1);
    }

    fn start(&mut self, container: &Container, restarts: u32) {
        let starting = self.memory.busy.iter().any(|t| matches!(t, Target::Start(_)));
        if let Some(until) = self.memory.not_before.get(&container.name).filter(|until| **until > self.now) {
            self.plan.wake_at(*until);
            return;
        }
        if starting || self.given {
            return;
        }
        self.given = true;
        let (name, sandbox) = (container.name.clone(), self.sandbox.to_owned());
        self.plan.give(self.memory, Action::Start { name, restarts, sandbox });
    }
}

/// Keeps, of each container, the newest run and the last one that ended before it, for `kubectl logs --previous`. Runs
/// that were made and never started are in nobody's way, but they would be ever more.
fn collect_garbage(plan: &mut Plan, desired: &Desired, actual: &Actual, memory: &Memory) {
    for container in &desired.containers {
        let mut kept = false;
        for old in actual.runs(&container.name).skip(1).filter(|r| !r.sandbox.is_empty()) {
            let ended = old.state == State::Exited;
            if (ended && kept) || old.state == State::Created {
                plan.give(memory, Action::RemoveContainer { id: old.id.clone() });
            }
            kept |= ended;
        }
    }
    for old in actual.sandboxes.iter().skip(1) {
        if old.ready {
            plan.give(memory, Action::StopSandbox { id: old.id.clone() });
        } else if actual.containers.iter().all(|c| c.sandbox != old.id) {
            plan.give(memory, Action::RemoveSandbox { id: old.id.clone() });
        }
    }
}

/// What to do for a pod that is to end.
pub fn stop(desired: &Desired, actual: &Actual, memory: &Memory, stop: &Stop, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let role = |ran: &Ran| desired.container(&ran.name).map_or(Role::Main, |c| c.role);
    let running: Vec<&Ran> = actual.running().collect();
    let mut next: Vec<&Ran> = running.iter().copied().filter(|r| role(r) != Role::Sidecar).collect();
    if next.is_empty() {
        // Sidecars end in reverse, each when those it served have ended.
        let last =
            desired.of_role(Role::Sidecar).rev().find_map(|c| running.iter().find(|r| r.name == c.name));
        next.extend(last);
    }
    let left = Duration::try_from(stop.deadline.duration_since(now)).unwrap_or(Duration::ZERO);
    for ran in &next {
        let (id, name) = (ran.id.clone(), ran.name.clone());
        plan.give(memory, Action::Kill { id, name, why: stop.why.clone(), grace: left });
    }
    let starting = memory.busy.iter().any(|t| matches!(t, Target::Start(_) | Target::NewSandbox));
    if !running.is_empty() || starting {
        return plan;
    }
    let ready: Vec<_> = actual.sandboxes.iter().filter(|s| s.ready).collect();
    for sandbox in &ready {
        plan.give(memory, Action::StopSandbox { id: sandbox.id.clone() });
    }
    plan.stopped = ready.is_empty();
    if plan.stopped && stop.remove {
        remove(&mut plan, actual, memory);
    }
    plan
}

fn remove(plan: &mut Plan, actual: &Actual, memory: &Memory) {
    // Runs that only the status remembers have no sandbox, and there is nothing of them to remove.
    let mut left = actual.containers.iter().filter(|c| !c.sandbox.is_empty()).peekable();
    if left.peek().is_none() {
        for sandbox in &actual.sandboxes {
            plan.give(memory, Action::RemoveSandbox { id: sandbox.id.clone() });
        }
        plan.gone = actual.sandboxes.is_empty();
    }
    for container in left {
        plan.give(memory, Action::RemoveContainer { id: container.id.clone() });
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "plan_simulation.rs"]
mod simulation;
