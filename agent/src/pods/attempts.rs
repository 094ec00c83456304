//! What became of the attempts to start a pod's containers, and what the pod's status says of it ◇.
//!
//! ```text
//!   ended ──► (at once) begun ──► started: shown as the runtime has it
//!     │                    └────► failed: waiting with the reason of the failure ─┐
//!     └─ too soon ──► put off: waiting, CrashLoopBackOff ─────────────────────────┴─► begun … until started
//! ```
//!
//! Called by `worker`, in each round and around each start. As on every Kubernetes node, a container waits for the
//! reason of its last attempt until one succeeds: not a moment before that attempt, and on through the next one. So a
//! run's end is shown as such before what follows from it. Invariant: a restarted agent goes on where the last
//! one stopped: what was shown stays, and a back-off is not cut short.

use super::actual::{Actual, State};
use super::backoff::{self, Backoff};
use super::desired::Desired;
use super::plan::{Memory, Plan, Waiting};
use super::status::{self, Inputs};
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as api;
use std::collections::BTreeMap;

/// Reason of a container that is put off because it ended again too soon.
pub const CRASH_LOOP: &str = "CrashLoopBackOff";

/// The attempts of one pod.
#[derive(Debug, Default)]
pub struct Attempts {
    /// Why the last attempt did not bring the container up, by name.
    reasons: BTreeMap<String, Waiting>,
    /// What is being started, and since when.
    under_way: Option<(String, Timestamp)>,
    recovered: bool,
}

/// What a status is made of beside the attempts themselves.
pub struct Look<'a> {
    /// The pod.
    pub desired: &'a Desired,
    /// What the runtime has.
    pub actual: &'a Actual,
    /// What is done about it now.
    pub plan: &'a Plan,
    /// Probe results.
    pub memory: &'a Memory,
    /// Status as last computed, or as the API server had it.
    pub old: &'a api::PodStatus,
    /// Nothing of the pod will be started again.
    pub ending: bool,
    /// Reason and message that the node decided on.
    pub failed: Option<(&'a str, &'a str)>,
    /// Name of the runtime.
    pub runtime: &'a str,
    /// Addresses of the node.
    pub host_ips: &'a [String],
    /// Now.
    pub now: Timestamp,
}

impl Attempts {
    /// A start of this container is begun.
    pub fn begun(&mut self, name: &str, now: Timestamp) {
        self.under_way = Some((name.to_owned(), now));
    }

    /// It runs, or ran.
    pub fn started(&mut self, name: &str) {
        self.given_up(name);
        self.reasons.remove(name);
    }

    /// It could not be started.
    pub fn failed(&mut self, name: &str, reason: &str, message: &str) {
        self.given_up(name);
        let waiting = Waiting { reason: reason.to_owned(), message: message.to_owned() };
        self.reasons.insert(name.to_owned(), waiting);
    }

    /// The start is not gone on with.
    pub fn given_up(&mut self, name: &str) {
        self.under_way.take_if(|(starting, _)| starting == name);
    }

    /// Takes over from an agent that ran before this one, from what it wrote last. Does something once.
    pub fn recover(
        &mut self,
        desired: &Desired,
        actual: &Actual,
        old: &api::PodStatus,
        crashes: &mut Backoff,
    ) {
        if std::mem::replace(&mut self.recovered, true) {
            return;
        }
        for container in &desired.containers {
            let name = &container.name;
            let Some((before, waiting)) = put_off_before(old, name) else { continue };
            let Some(current) = actual.current(name) else { continue };
            let restarts = u32::try_from(before.restart_count).unwrap_or(0);
            let attempts = current.restarts.saturating_sub(restarts);
            // Made and not started: that attempt was never finished, the next one is due.
            let unfinished = matches!(current.state, State::Created | State::Unknown);
            if !unfinished && let Some(delay) = backoff::delay_in(&waiting.message) {
                crashes.restore(name, delay, attempts, super::actual::timestamp(current.created));
            }
            if unfinished || (attempts == 0 && current.state == State::Exited) {
                self.reasons.insert(name.clone(), waiting);
            }
        }
    }

    /// The pod's status, and the containers that `plan` puts off from now on: the next status says so.
    pub fn status(&mut self, look: &Look<'_>) -> (api::PodStatus, Vec<String>) {
        let nothing = BTreeMap::new();
        let starting = self.under_way.as_ref();
        let since = starting.map_or(0, |(_, at)| i64::try_from(at.as_nanosecond()).unwrap_or(0));
        let mut seen = look.actual.without_starting(starting.map(|(name, _)| name.as_str()), since);
        status::remember(&mut seen, look.desired, look.old);
        let status = status::compute(&Inputs {
            desired: look.desired,
            actual: &seen,
            waiting: if look.ending { &nothing } else { &self.reasons },
            probed: &look.memory.probed,
            old: look.old,
            ending: look.ending,
            stopped: look.plan.stopped,
            failed: look.failed,
            runtime: look.runtime,
            host_ips: look.host_ips,
            now: look.now,
        });
        (status, self.put_off(look.plan))
    }

    fn put_off(&mut self, plan: &Plan) -> Vec<String> {
        let news = plan.waiting.iter().filter(|(name, waiting)| self.reasons.get(*name) != Some(waiting));
        let names: Vec<String> = news.map(|(name, _)| name.clone()).collect();
        self.reasons.extend(plan.waiting.clone());
        names
    }
}

/// A container's entry in a status that says that it is put off.
fn put_off_before<'a>(old: &'a api::PodStatus, name: &str) -> Option<(&'a api::ContainerStatus, Waiting)> {
    let before = status::old_status(old, name)?;
    let waiting = before.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.clone().filter(|reason| reason == CRASH_LOOP)?;
    Some((before, Waiting { reason, message: waiting.message.clone().unwrap_or_default() }))
}

#[cfg(test)]
#[path = "attempts_tests.rs"]
mod tests;
