//! A pod's status from what the runtime has ◇.
//!
//! Called by `worker` after every look at the runtime; the answer goes to `status_manager`, the only writer. The old
//! status is an input for three things alone: transition times, what the runtime has forgotten, and phases that
//! nothing leaves.

use super::actual::{Actual, Ran, State, timestamp};
use super::desired::{Container, Desired, Role};
use super::plan::{Probed, Waiting};
use super::{conditions, phase, resources};
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as api;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::collections::BTreeMap;

/// Everything a status is made of.
pub struct Inputs<'a> {
    /// The pod.
    pub desired: &'a Desired,
    /// What the runtime has.
    pub actual: &'a Actual,
    /// Why the last attempts to start containers did not bring them up, by name.
    pub waiting: &'a BTreeMap<String, Waiting>,
    /// Probe results by container id.
    pub probed: &'a BTreeMap<String, Probed>,
    /// Status as last computed, or as the API server had it.
    pub old: &'a api::PodStatus,
    /// Nothing of the pod will be started again.
    pub ending: bool,
    /// Nothing of the pod runs any more.
    pub stopped: bool,
    /// Phase, reason and message that the node decided on: refusal, deadline.
    pub failed: Option<(&'a str, &'a str)>,
    /// Name of the runtime, the scheme of container ids.
    pub runtime: &'a str,
    /// Addresses of the node.
    pub host_ips: &'a [String],
    /// Now.
    pub now: Timestamp,
}

/// The status.
pub fn compute(inputs: &Inputs<'_>) -> api::PodStatus {
    let desired = inputs.desired;
    let of = |roles: &[Role]| -> Vec<api::ContainerStatus> {
        let chosen = desired.containers.iter().filter(|c| roles.contains(&c.role));
        chosen.map(|c| container_status(inputs, c)).collect()
    };
    let ephemeral = of(&[Role::Ephemeral]);
    // A pod that was never let in has no containers to speak of.
    let refused =
        inputs.failed.is_some() && inputs.actual.containers.is_empty() && inputs.actual.sandboxes.is_empty();
    let (init, main) = if refused {
        (Vec::new(), Vec::new())
    } else {
        (of(&[Role::Init, Role::Sidecar]), of(&[Role::Main]))
    };
    let all: Vec<&api::ContainerStatus> = init.iter().chain(&main).collect();
    let initialised = main.iter().any(|s| {
        let state = s.state.as_ref();
        state.is_some_and(|s| s.running.is_some() || s.terminated.is_some())
            || s.last_state.as_ref().is_some_and(|s| s.terminated.is_some())
    });
    let (phase, reason, message) =
        final_phase(inputs, phase::phase(desired, &all, inputs.ending, initialised));
    let old_conditions = inputs.old.conditions.as_deref().unwrap_or_default();
    let conditions = conditions::conditions(
        desired,
        &phase,
        &all,
        inputs.actual.sandbox().is_some(),
        initialised,
        old_conditions,
        inputs.now,
    );
    let ips = pod_ips(inputs);
    let host_ips: Vec<_> = inputs.host_ips.iter().map(|ip| api::HostIP { ip: ip.clone() }).collect();
    api::PodStatus {
        conditions: Some(conditions),
        host_ip: inputs.host_ips.first().cloned(),
        host_ips: (!host_ips.is_empty()).then_some(host_ips),
        pod_ip: ips.first().cloned(),
        pod_ips: (!ips.is_empty()).then(|| ips.into_iter().map(|ip| api::PodIP { ip }).collect()),
        container_statuses: (!main.is_empty()).then_some(main),
        ephemeral_container_statuses: (!ephemeral.is_empty()).then_some(ephemeral),
        init_container_statuses: (!init.is_empty()).then_some(init),
        phase: Some(phase),
        reason,
        message,
        qos_class: inputs.old.qos_class.clone().or_else(|| Some(resources::qos(desired.spec()).to_owned())),
        start_time: inputs.old.start_time.clone().or(Some(Time(inputs.now))),
        observed_generation: desired.pod.metadata.generation,
        ..api::PodStatus::default()
    }
}

/// Phase, reason and message: a final phase stays, and is not said while something still runs.
fn final_phase(inputs: &Inputs<'_>, computed: &str) -> (String, Option<String>, Option<String>) {
    let old = inputs.old;
    let is_final = |phase: &str| matches!(phase, "Succeeded" | "Failed");
    let api_phase = inputs.desired.terminal_phase();
    if let Some(last) = api_phase.or(old.phase.as_deref().filter(|p| is_final(p))) {
        return (last.to_owned(), old.reason.clone(), old.message.clone());
    }
    let stays =
        || (old.phase.clone().unwrap_or_else(|| "Pending".into()), old.reason.clone(), old.message.clone());
    if let Some((reason, message)) = inputs.failed {
        if !inputs.stopped {
            return stays();
        }
        return ("Failed".into(), Some(reason.to_owned()), Some(message.to_owned()));
    }
    if inputs.ending && inputs.stopped {
        let last = if is_final(computed) { computed } else { "Failed" };
        return (last.to_owned(), None, None);
    }
    if is_final(computed) && !inputs.stopped {
        return stays();
    }
    (computed.to_owned(), None, None)
}

fn pod_ips(inputs: &Inputs<'_>) -> Vec<String> {
    match inputs.actual.sandboxes.first() {
        Some(sandbox) if !sandbox.ips.is_empty() => sandbox.ips.clone(),
        // The address of a stopped sandbox is gone from the runtime; the pod's status keeps it.
        _ => inputs.old.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect(),
    }
}

fn container_status(inputs: &Inputs<'_>, container: &Container) -> api::ContainerStatus {
    let mut runs = inputs.actual.runs(&container.name);
    let (current, previous) = (runs.next(), runs.next());
    let id = |ran: &Ran| format!("{}://{}", inputs.runtime, ran.id);
    let mut state = state_of(inputs, current, &id);
    let known = previous.filter(|r| r.state == State::Exited);
    let forgotten = forgotten_last_state(inputs.old, container, current, &id);
    let newer = forgotten.filter(|(number, _)| known.is_none_or(|r| i64::from(r.restarts) < *number));
    let mut last = newer.map(|(_, ended)| ended).or_else(|| known.map(|r| terminated(r, &id)));
    // What the API calls waiting is a wish that is not met; an end without one stays an end.
    let wanted = match current {
        Some(ran) if ran.state == State::Exited => container.restarts_after(ran.exit_code),
        ran => ran.is_none_or(|ran| ran.state != State::Running),
    };
    if let Some(waiting) = inputs.waiting.get(&container.name).filter(|_| wanted) {
        if let Some(ended) = state.terminated.take() {
            last = Some(ended);
        }
        let (reason, message) = (waiting.reason.clone(), waiting.message.clone());
        let message = (!message.is_empty()).then_some(message);
        state = api::ContainerState {
            waiting: Some(api::ContainerStateWaiting { reason: Some(reason), message }),
            ..api::ContainerState::default()
        };
    }
    let running = state.running.is_some();
    let probed = current.and_then(|r| inputs.probed.get(&r.id)).cloned().unwrap_or_default();
    let started = running && probed.started;
    let ready = match container.role {
        Role::Init => state.terminated.as_ref().is_some_and(|t| t.exit_code == 0),
        Role::Sidecar | Role::Main => started && probed.ready,
        Role::Ephemeral => false,
    };
    api::ContainerStatus {
        name: container.name.clone(),
        image: current
            .map(|r| r.image.clone())
            .filter(|i| !i.is_empty())
            .unwrap_or_else(|| container.image.clone()),
        image_id: current.map(|r| r.image_ref.clone()).unwrap_or_default(),
        container_id: current.map(id),
        restart_count: current.map_or(0, |r| i32::try_from(r.restarts).unwrap_or(i32::MAX)),
        ready,
        started: Some(started),
        state: Some(state),
        last_state: last.map(|t| api::ContainerState { terminated: Some(t), ..Default::default() }),
        resources: container.spec.resources.clone().filter(|r| *r != api::ResourceRequirements::default()),
        allocated_resources: container.spec.resources.as_ref().and_then(|r| r.requests.clone()),
        user: current.filter(|_| running).and_then(|r| r.user.as_ref()).map(|(uid, gid, groups)| {
            api::ContainerUser {
                linux: Some(api::LinuxContainerUser {
                    uid: *uid,
                    gid: *gid,
                    supplemental_groups: Some(groups.clone()),
                }),
            }
        }),
        volume_mounts: volume_mounts(container),
        ..api::ContainerStatus::default()
    }
}

fn volume_mounts(container: &Container) -> Option<Vec<api::VolumeMountStatus>> {
    let mounts = container.spec.volume_mounts.as_ref()?;
    let status = |m: &api::VolumeMount| api::VolumeMountStatus {
        name: m.name.clone(),
        mount_path: m.mount_path.clone(),
        read_only: m.read_only.filter(|r| *r),
        recursive_read_only: m
            .read_only
            .filter(|r| *r)
            .map(|_| m.recursive_read_only.clone().unwrap_or_else(|| "Disabled".into())),
        ..Default::default()
    };
    Some(mounts.iter().map(status).collect())
}

fn state_of(inputs: &Inputs<'_>, current: Option<&Ran>, id: &impl Fn(&Ran) -> String) -> api::ContainerState {
    match current {
        Some(ran) if ran.state == State::Running => api::ContainerState {
            running: Some(api::ContainerStateRunning { started_at: Some(Time(timestamp(ran.started))) }),
            ..Default::default()
        },
        Some(ran) if ran.state == State::Exited => {
            api::ContainerState { terminated: Some(terminated(ran, id)), ..Default::default() }
        }
        _ => {
            let has_init = inputs.desired.before_main().next().is_some();
            let reason = if has_init { "PodInitializing" } else { "ContainerCreating" };
            api::ContainerState {
                waiting: Some(api::ContainerStateWaiting { reason: Some(reason.into()), message: None }),
                ..Default::default()
            }
        }
    }
}

fn terminated(ran: &Ran, id: &impl Fn(&Ran) -> String) -> api::ContainerStateTerminated {
    api::ContainerStateTerminated {
        container_id: Some(id(ran)),
        exit_code: ran.exit_code,
        reason: Some(ran.reason.clone()).filter(|r| !r.is_empty()),
        message: Some(ran.message.clone()).filter(|m| !m.is_empty()),
        started_at: (ran.started > 0).then(|| Time(timestamp(ran.started))),
        finished_at: (ran.finished > 0).then(|| Time(timestamp(ran.finished))),
        signal: None,
    }
}

/// The previous run as the old status remembers it, and how often it had been started before.
fn forgotten_last_state(
    old: &api::PodStatus,
    container: &Container,
    current: Option<&Ran>,
    id: &impl Fn(&Ran) -> String,
) -> Option<(i64, api::ContainerStateTerminated)> {
    let before = old_status(old, &container.name)?;
    let current_id = current.map(id);
    let number = i64::from(before.restart_count);
    let ended = before.state.as_ref().and_then(|s| s.terminated.clone());
    if let Some(ended) = ended.filter(|_| before.container_id != current_id) {
        return Some((number, ended));
    }
    let last = before.last_state.as_ref()?.terminated.clone()?;
    // While a container waits, its newest run is its last state.
    let same = last.container_id == before.container_id;
    (last.container_id != current_id).then_some((if same { number } else { number - 1 }, last))
}

/// A container's entry in a status.
pub fn old_status<'a>(old: &'a api::PodStatus, name: &str) -> Option<&'a api::ContainerStatus> {
    let lists = [&old.container_statuses, &old.init_container_statuses, &old.ephemeral_container_statuses];
    lists.into_iter().flatten().flatten().find(|s| s.name == name)
}

/// Adds to what the runtime has those runs that only the old status knows, as ended: a container that was running
/// when the runtime lost it ended in an unknown way, and must not be taken for one that never ran. Nor does a run
/// before it become the newest again: restarts are never counted backwards.
pub fn remember(actual: &mut Actual, desired: &Desired, old: &api::PodStatus) {
    for container in &desired.containers {
        let Some(before) = old_status(old, &container.name) else { continue };
        let restarts = u32::try_from(before.restart_count).unwrap_or(0);
        if actual.current(&container.name).is_some_and(|newest| newest.restarts >= restarts) {
            continue;
        }
        let (Some(id), Some(state)) = (&before.container_id, &before.state) else { continue };
        let ended = state.terminated.clone().or_else(|| {
            state.running.as_ref()?;
            Some(api::ContainerStateTerminated {
                exit_code: 137,
                reason: Some("ContainerStatusUnknown".into()),
                message: Some("The container could not be located when the pod was terminated".into()),
                ..Default::default()
            })
        });
        let ended = ended.or_else(|| before.last_state.as_ref().and_then(|s| s.terminated.clone()));
        let Some(ended) = ended else { continue };
        let nanoseconds =
            |time: Option<Time>| time.map_or(0, |t| i64::try_from(t.0.as_nanosecond()).unwrap_or(0));
        actual.containers.push(Ran {
            id: id.rsplit("://").next().unwrap_or(id).to_owned(),
            sandbox: String::new(),
            name: container.name.clone(),
            restarts,
            state: State::Exited,
            created: 0,
            started: nanoseconds(ended.started_at),
            finished: nanoseconds(ended.finished_at),
            exit_code: ended.exit_code,
            reason: ended.reason.unwrap_or_default(),
            message: ended.message.unwrap_or_default(),
            image: before.image.clone(),
            image_ref: before.image_id.clone(),
            hash: None,
            log_path: String::new(),
            user: None,
        });
    }
    actual.sort();
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
