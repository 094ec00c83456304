//! A pod's conditions ◇: PodReadyToStartContainers, Initialized, Ready, ContainersReady, PodScheduled.
//!
//! Called by `status`. Conditions of other writers (readiness gates, schedulers) are those of the API server's newest
//! copy, untouched; a condition's transition time changes with its status only.

use super::desired::{Desired, Role};
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as api;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// Conditions that this node writes.
pub const OWNED: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

struct Verdict {
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    const TRUE: Self = Self { status: true, reason: None, message: None };

    fn no(reason: &'static str, message: Option<String>) -> Self {
        Self { status: false, reason: Some(reason), message }
    }
}

/// All conditions of a pod.
pub fn conditions(
    desired: &Desired,
    phase: &str,
    statuses: &[&api::ContainerStatus],
    sandbox_ready: bool,
    initialised: bool,
    old: &[api::PodCondition],
    now: Timestamp,
) -> Vec<api::PodCondition> {
    let others = of_others(desired);
    let containers_ready = containers_ready(desired, phase, statuses);
    let ready = match &containers_ready {
        Verdict { status: true, .. } => readiness_gates(desired, &others),
        no => Verdict { status: false, reason: no.reason, message: no.message.clone() },
    };
    let sandbox =
        if sandbox_ready { Verdict::TRUE } else { Verdict { status: false, reason: None, message: None } };
    let own =
        [sandbox, initialized(desired, phase, statuses, initialised), ready, containers_ready, Verdict::TRUE];
    let generation = desired.pod.metadata.generation;
    let made =
        OWNED.into_iter().zip(own).map(|(name, verdict)| condition(name, verdict, generation, old, now));
    others.into_iter().chain(made).collect()
}

/// What others say of the pod. Never from the node's own last status: that one is as old as the node's last look.
fn of_others(desired: &Desired) -> Vec<api::PodCondition> {
    let all = desired.pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    all.into_iter().flatten().filter(|c| !OWNED.contains(&c.type_.as_str())).cloned().collect()
}

fn condition(
    name: &str,
    verdict: Verdict,
    generation: Option<i64>,
    old: &[api::PodCondition],
    now: Timestamp,
) -> api::PodCondition {
    let status = if verdict.status { "True" } else { "False" };
    let before = old.iter().find(|c| c.type_ == name && c.status == status);
    api::PodCondition {
        type_: name.to_owned(),
        status: status.to_owned(),
        reason: verdict.reason.map(str::to_owned),
        message: verdict.message,
        last_transition_time: before.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now))),
        last_probe_time: None,
        observed_generation: generation,
    }
}

fn named<'a>(statuses: &[&'a api::ContainerStatus], name: &str) -> Option<&'a api::ContainerStatus> {
    statuses.iter().copied().find(|s| s.name == name)
}

/// Names as Go prints a list of strings, which is what people and tools know from these messages.
fn list(names: &[&str]) -> String {
    format!("[{}]", names.join(" "))
}

fn sentence(parts: &[(&str, &[&str])]) -> Option<String> {
    let said: Vec<_> = parts
        .iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, names)| format!("{what}: {}", list(names)))
        .collect();
    (!said.is_empty()).then(|| said.join(", "))
}

fn containers_ready(desired: &Desired, phase: &str, statuses: &[&api::ContainerStatus]) -> Verdict {
    let (mut unknown, mut unready) = (Vec::new(), Vec::new());
    for container in desired.of_role(Role::Sidecar).chain(desired.of_role(Role::Main)) {
        match named(statuses, &container.name) {
            None => unknown.push(container.name.as_str()),
            Some(status) if !status.ready => unready.push(container.name.as_str()),
            Some(_) => {}
        }
    }
    if phase == "Succeeded" && unknown.is_empty() {
        return Verdict::no("PodCompleted", None);
    }
    if phase == "Failed" {
        return Verdict::no("PodFailed", None);
    }
    let parts = [
        ("containers with unknown status", unknown.as_slice()),
        ("containers with unready status", &unready),
    ];
    sentence(&parts).map_or(Verdict::TRUE, |message| Verdict::no("ContainersNotReady", Some(message)))
}

fn readiness_gates(desired: &Desired, others: &[api::PodCondition]) -> Verdict {
    let mut unmet = Vec::new();
    for gate in desired.spec().readiness_gates.iter().flatten() {
        let name = &gate.condition_type;
        match others.iter().find(|c| c.type_ == *name) {
            None => {
                unmet.push(format!("corresponding condition of pod readiness gate {name:?} does not exist."))
            }
            Some(c) if c.status != "True" => {
                unmet.push(format!(
                    "the status of pod readiness gate {name:?} is not \"True\", but {}",
                    c.status
                ));
            }
            Some(_) => {}
        }
    }
    if unmet.is_empty() {
        Verdict::TRUE
    } else {
        Verdict::no("ReadinessGatesNotReady", Some(unmet.join(", ")))
    }
}

fn initialized(
    desired: &Desired,
    phase: &str,
    statuses: &[&api::ContainerStatus],
    initialised: bool,
) -> Verdict {
    let (mut unknown, mut incomplete) = (Vec::new(), Vec::new());
    for container in desired.before_main() {
        let done = |s: &api::ContainerStatus| match container.role {
            Role::Sidecar => s.started == Some(true),
            _ => s.ready,
        };
        match named(statuses, &container.name) {
            None => unknown.push(container.name.as_str()),
            Some(status) if !done(status) => incomplete.push(container.name.as_str()),
            Some(_) => {}
        }
    }
    if phase == "Succeeded" && unknown.is_empty() {
        return Verdict { status: true, reason: Some("PodCompleted"), message: None };
    }
    if initialised {
        return Verdict::TRUE;
    }
    let parts = [
        ("containers with unknown status", unknown.as_slice()),
        ("containers with incomplete status", &incomplete),
    ];
    sentence(&parts).map_or(Verdict::TRUE, |message| Verdict::no("ContainersNotInitialized", Some(message)))
}
