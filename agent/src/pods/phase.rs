//! A pod's phase from its containers' states ◇.
//!
//! Called by `status`. Invariant: a phase that nothing leaves is never left.

use super::desired::{Desired, Role};
use k8s_openapi::api::core::v1 as api;

/// A container's state, reduced to what the phase depends on.
enum Seen {
    Running {
        started: bool,
    },
    Ended {
        exit_code: i32,
    },
    /// Waiting after an earlier run ended.
    Between {
        exit_code: i32,
    },
    Waiting,
}

fn seen(status: Option<&api::ContainerStatus>) -> Option<Seen> {
    let status = status?;
    let state = status.state.as_ref()?;
    if state.running.is_some() {
        return Some(Seen::Running { started: status.started == Some(true) });
    }
    if let Some(ended) = &state.terminated {
        return Some(Seen::Ended { exit_code: ended.exit_code });
    }
    let last = status.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    Some(last.map_or(Seen::Waiting, |ended| Seen::Between { exit_code: ended.exit_code }))
}

#[derive(Default)]
struct Counts {
    unknown: u32,
    running: u32,
    waiting: u32,
    stopped: u32,
    stopped_for_good: u32,
    succeeded: u32,
    pending_init: u32,
    pending_sidecars: u32,
    init_failed: bool,
}

fn count(desired: &Desired, statuses: &[&api::ContainerStatus]) -> Counts {
    let mut counts = Counts::default();
    for container in &desired.containers {
        let state = seen(statuses.iter().copied().find(|s| s.name == container.name));
        match (container.role, state) {
            (Role::Init, Some(Seen::Ended { exit_code } | Seen::Between { exit_code })) => {
                counts.init_failed |= exit_code != 0 && !container.restarts_after(exit_code);
            }
            (Role::Init, _) => counts.pending_init += 1,
            (Role::Sidecar, Some(Seen::Running { started })) => {
                counts.running += 1;
                counts.pending_sidecars += u32::from(!started);
            }
            // An ended sidecar says nothing about the pod.
            (Role::Sidecar, Some(Seen::Ended { .. } | Seen::Between { .. })) => {}
            (Role::Sidecar, Some(Seen::Waiting)) => {
                counts.pending_sidecars += 1;
                counts.waiting += 1;
            }
            (Role::Main, Some(Seen::Running { .. })) => counts.running += 1,
            (Role::Main, Some(Seen::Ended { exit_code })) => {
                counts.stopped += 1;
                counts.stopped_for_good += u32::from(!container.restarts_after(exit_code));
                counts.succeeded += u32::from(exit_code == 0);
            }
            (Role::Main, Some(Seen::Between { exit_code })) => {
                counts.stopped += 1;
                counts.stopped_for_good += u32::from(!container.restarts_after(exit_code));
            }
            (Role::Main, Some(Seen::Waiting)) => counts.waiting += 1,
            (Role::Sidecar | Role::Main, None) => counts.unknown += 1,
            (Role::Ephemeral, _) => {}
        }
    }
    counts
}

/// The phase. `stopped`: nothing of the pod will ever be started again; `initialised`: a main container has started.
pub fn phase(
    desired: &Desired,
    statuses: &[&api::ContainerStatus],
    stopped: bool,
    initialised: bool,
) -> &'static str {
    let counts = count(desired, statuses);
    if counts.init_failed {
        return "Failed";
    }
    let initialising = counts.pending_init > 0 || (counts.pending_sidecars > 0 && !initialised);
    if initialising || counts.waiting > 0 || counts.unknown > 0 {
        return "Pending";
    }
    if counts.running > 0 {
        return "Running";
    }
    if counts.stopped == 0 {
        return "Pending";
    }
    let ended = if counts.stopped == counts.succeeded { "Succeeded" } else { "Failed" };
    if stopped || counts.stopped == counts.stopped_for_good { ended } else { "Running" }
}
