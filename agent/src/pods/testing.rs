//! Pods and runtime states for unit tests.

use super::actual::{Actual, Ran, Sandbox, State};
use super::desired::{Desired, PodKey};
use std::sync::Arc;

/// A pod `ns/p` with uid `u` and the spec given as YAML.
pub fn pod(spec: &str) -> Desired {
    pod_with("{namespace: ns, name: p, uid: u, generation: 1}", spec, "{}")
}

/// A pod of metadata, spec and status given as YAML.
pub fn pod_with(metadata: &str, spec: &str, status: &str) -> Desired {
    let text = format!("metadata: {metadata}\nspec: {spec}\nstatus: {status}\n");
    let pod: k8s_openapi::api::core::v1::Pod = serde_saphyr::from_str(&text).expect("test pod");
    let key = PodKey::of(&pod).expect("test pod has a key");
    Desired::read(key, Arc::new(pod)).expect("test pod is readable")
}

/// A sandbox `s<attempt>`.
pub fn sandbox(attempt: u32, ready: bool) -> Sandbox {
    Sandbox {
        id: format!("s{attempt}"),
        attempt,
        ready,
        created: i64::from(attempt) + 1,
        ips: vec!["10.0.0.2".into()],
    }
}

/// Run number `restarts` of a container in sandbox `s0`, named `<name>-<restarts>`.
pub fn ran(name: &str, restarts: u32, state: State, exit_code: i32) -> Ran {
    let start = 1_000_000_000 * (i64::from(restarts) * 100 + 10);
    let exited = state == State::Exited;
    Ran {
        id: format!("{name}-{restarts}"),
        sandbox: "s0".into(),
        name: name.into(),
        restarts,
        state,
        created: start,
        started: if state == State::Created { 0 } else { start },
        finished: if exited { start + 1_000_000_000 } else { 0 },
        exit_code,
        reason: match (exited, exit_code) {
            (false, _) => String::new(),
            (true, 0) => "Completed".into(),
            (true, _) => "Error".into(),
        },
        message: String::new(),
        image: "i".into(),
        image_ref: "sha256:1".into(),
        hash: None,
        log_path: String::new(),
        user: None,
    }
}

/// A ready sandbox and these containers.
pub fn actual(containers: Vec<Ran>) -> Actual {
    Actual::new(vec![sandbox(0, true)], containers)
}
