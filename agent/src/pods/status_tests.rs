//! Statuses as tables, each as a node of any other kind would show it.

use super::*;
use crate::pods::testing::{actual, pod, pod_with, ran, sandbox};

struct Case<'a> {
    desired: &'a Desired,
    actual: Actual,
    waiting: BTreeMap<String, Waiting>,
    ready: bool,
    ending: bool,
    stopped: bool,
    failed: Option<(&'a str, &'a str)>,
    /// The node's own last status; `None`: what the API server has.
    old: Option<api::PodStatus>,
}

fn case<'a>(desired: &'a Desired, actual: Actual) -> Case<'a> {
    Case {
        desired,
        actual,
        waiting: BTreeMap::new(),
        ready: true,
        ending: false,
        stopped: false,
        failed: None,
        old: None,
    }
}

fn show(case: &Case<'_>) -> api::PodStatus {
    let probed = |r: &Ran| (r.id.clone(), Probed { started: true, ready: case.ready, kill: None });
    let old = case.old.clone().or_else(|| case.desired.pod.status.clone()).unwrap_or_default();
    compute(&Inputs {
        desired: case.desired,
        actual: &case.actual,
        waiting: &case.waiting,
        probed: &case.actual.running().map(probed).collect(),
        old: &old,
        ending: case.ending,
        stopped: case.stopped,
        failed: case.failed,
        runtime: "atoll",
        host_ips: &["192.0.2.1".into()],
        now: Timestamp::from_second(5_000).unwrap(),
    })
}

/// `True` conditions, and `-` with the reason before those that are not.
fn conditions(status: &api::PodStatus) -> Vec<String> {
    let text = |c: &api::PodCondition| match (c.status.as_str(), &c.reason) {
        ("True", None) => c.type_.clone(),
        ("True", Some(reason)) => format!("{}({reason})", c.type_),
        (_, reason) => format!("-{}({})", c.type_, reason.as_deref().unwrap_or_default()),
    };
    status.conditions.iter().flatten().map(text).collect()
}

fn waiting_reason(status: &api::PodStatus, name: &str) -> String {
    let state = old_status(status, name).unwrap().state.clone().unwrap();
    state.waiting.and_then(|w| w.reason).unwrap_or_default()
}

const ONE: &str = "{containers: [{name: a, image: i}]}";
const INIT: &str = "{initContainers: [{name: i, image: i}], containers: [{name: a, image: i}]}";

#[test]
fn a_pod_that_has_nothing_yet() {
    let desired = pod(ONE);
    let status = show(&case(&desired, Actual::default()));
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    assert_eq!(waiting_reason(&status, "a"), "ContainerCreating");
    assert_eq!(
        conditions(&status),
        [
            "-PodReadyToStartContainers()",
            "Initialized",
            "-Ready(ContainersNotReady)",
            "-ContainersReady(ContainersNotReady)",
            "PodScheduled"
        ]
    );
    let ready = status.conditions.as_ref().unwrap().iter().find(|c| c.type_ == "Ready").unwrap();
    assert_eq!(ready.message.as_deref(), Some("containers with unready status: [a]"));
    assert_eq!(status.qos_class.as_deref(), Some("BestEffort"));
    assert_eq!(status.host_ip.as_deref(), Some("192.0.2.1"));
    assert_eq!(status.observed_generation, Some(1));
}

#[test]
fn a_running_pod() {
    let desired = pod(ONE);
    let status = show(&case(&desired, actual(vec![ran("a", 0, State::Running, 0)])));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.pod_ip.as_deref(), Some("10.0.0.2"));
    assert_eq!(
        conditions(&status),
        ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"]
    );
    let a = old_status(&status, "a").unwrap();
    assert_eq!(a.container_id.as_deref(), Some("atoll://a-0"));
    assert_eq!((a.ready, a.started, a.restart_count), (true, Some(true), 0));
    let mut unready = case(&desired, actual(vec![ran("a", 0, State::Running, 0)]));
    unready.ready = false;
    assert!(conditions(&show(&unready)).contains(&"-Ready(ContainersNotReady)".into()));
}

#[test]
fn init_containers() {
    let desired = pod(INIT);
    let status = show(&case(&desired, actual(vec![ran("i", 0, State::Running, 0)])));
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    assert_eq!(waiting_reason(&status, "a"), "PodInitializing");
    assert!(conditions(&status).contains(&"-Initialized(ContainersNotInitialized)".into()));
    let status =
        show(&case(&desired, actual(vec![ran("i", 0, State::Exited, 0), ran("a", 0, State::Running, 0)])));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert!(old_status(&status, "i").unwrap().ready);
}

#[test]
fn a_crash_loop_shows_how_it_ended() {
    let desired = pod(ONE);
    let mut seen = case(&desired, actual(vec![ran("a", 2, State::Exited, 1), ran("a", 1, State::Exited, 1)]));
    let waiting = Waiting { reason: "CrashLoopBackOff".into(), message: "back-off 20s".into() };
    seen.waiting.insert("a".into(), waiting);
    let status = show(&seen);
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(waiting_reason(&status, "a"), "CrashLoopBackOff");
    let a = old_status(&status, "a").unwrap();
    assert_eq!(a.restart_count, 2);
    let last = a.last_state.clone().unwrap().terminated.unwrap();
    assert_eq!((last.exit_code, last.container_id.as_deref()), (1, Some("atoll://a-2")));
    assert!(a.state.as_ref().unwrap().terminated.is_none());
}

#[test]
fn a_restarted_container_shows_its_last_state() {
    let desired = pod(ONE);
    let status =
        show(&case(&desired, actual(vec![ran("a", 1, State::Running, 0), ran("a", 0, State::Exited, 3)])));
    let a = old_status(&status, "a").unwrap();
    assert_eq!(a.last_state.clone().unwrap().terminated.unwrap().exit_code, 3);
    assert_eq!(a.restart_count, 1);
}

#[test]
fn a_job_is_over_only_when_nothing_runs() {
    let desired = pod_with(
        "{namespace: ns, name: p, uid: u}",
        "{restartPolicy: Never, containers: [{name: a, image: i}]}",
        "{phase: Running}",
    );
    for (code, phase, reason) in [(0, "Succeeded", "PodCompleted"), (1, "Failed", "PodFailed")] {
        let mut seen = case(&desired, actual(vec![ran("a", 0, State::Exited, code)]));
        seen.ending = true;
        assert_eq!(show(&seen).phase.as_deref(), Some("Running"));
        seen.stopped = true;
        seen.actual.sandboxes = vec![sandbox(0, false)];
        let status = show(&seen);
        assert_eq!(status.phase.as_deref(), Some(phase));
        assert!(conditions(&status).contains(&format!("-Ready({reason})")), "{:?}", conditions(&status));
    }
}

#[test]
fn a_refused_pod_is_failed() {
    let desired = pod(ONE);
    let mut seen = case(&desired, Actual::default());
    (seen.ending, seen.stopped, seen.failed) = (true, true, Some(("Unsupported", "no")));
    let status = show(&seen);
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!((status.reason.as_deref(), status.message.as_deref()), (Some("Unsupported"), Some("no")));
    assert!(status.container_statuses.is_none());
}

#[test]
fn nothing_leaves_a_final_phase() {
    let desired = pod_with("{namespace: ns, name: p, uid: u}", ONE, "{phase: Failed, reason: Evicted}");
    let status = show(&case(&desired, actual(vec![ran("a", 0, State::Running, 0)])));
    assert_eq!((status.phase.as_deref(), status.reason.as_deref()), (Some("Failed"), Some("Evicted")));
}

#[test]
fn what_the_runtime_forgot_is_remembered() {
    let desired = pod_with(
        "{namespace: ns, name: p, uid: u}",
        "{restartPolicy: Never, containers: [{name: a, image: i}]}",
        "{phase: Running, containerStatuses: [{name: a, image: i, imageID: x, ready: true, restartCount: 1,
           containerID: 'atoll://z', state: {running: {startedAt: '2026-01-01T00:00:00Z'}}}]}",
    );
    let mut seen = Actual::default();
    remember(&mut seen, &desired, desired.pod.status.as_ref().unwrap());
    let a = seen.current("a").unwrap();
    assert_eq!((a.exit_code, a.reason.as_str(), a.restarts), (137, "ContainerStatusUnknown", 1));
    assert_eq!(crate::pods::plan::verdict(&desired, &seen), crate::pods::plan::Verdict::Over);
    // Never started: nothing to remember.
    let fresh = pod(ONE);
    let mut seen = Actual::default();
    remember(&mut seen, &fresh, &api::PodStatus::default());
    assert!(seen.containers.is_empty());
}

#[test]
fn readiness_gates_and_transition_times() {
    let desired = pod_with(
        "{namespace: ns, name: p, uid: u}",
        "{readinessGates: [{conditionType: x/y}], containers: [{name: a, image: i}]}",
        "{conditions: [{type: Initialized, status: 'True', lastTransitionTime: '2020-01-01T00:00:00Z'}]}",
    );
    let status = show(&case(&desired, actual(vec![ran("a", 0, State::Running, 0)])));
    assert!(conditions(&status).contains(&"-Ready(ReadinessGatesNotReady)".into()));
    let initialized = status.conditions.as_ref().unwrap().iter().find(|c| c.type_ == "Initialized").unwrap();
    assert!(initialized.last_transition_time.as_ref().unwrap().0.to_string().starts_with("2020"));
}

#[test]
fn readiness_gate_is_what_the_newest_copy_says() {
    let at = |gate: &str, old: api::PodStatus| {
        let desired = pod_with(
            "{namespace: ns, name: p, uid: u}",
            "{readinessGates: [{conditionType: x/y}], containers: [{name: a, image: i}]}",
            &format!("{{conditions: [{gate}]}}"),
        );
        let mut case = case(&desired, actual(vec![ran("a", 0, State::Running, 0)]));
        case.old = Some(old);
        show(&case)
    };
    let ready = |status: &api::PodStatus| conditions(status).contains(&"Ready".to_owned());
    let unmet = "-Ready(ReadinessGatesNotReady)".to_owned();
    let absent = at("", api::PodStatus::default());
    assert!(conditions(&absent).contains(&unmet));
    let met = at("{type: x/y, status: 'True'}", absent);
    assert!(ready(&met), "{:?}", conditions(&met));
    let taken_back = at("{type: x/y, status: 'False'}", met.clone());
    assert!(conditions(&taken_back).contains(&unmet));
    // Its writer may also remove it.
    assert!(conditions(&at("", met)).contains(&unmet));
}

#[test]
fn a_run_before_does_not_become_the_newest_again() {
    let desired = pod_with(
        "{namespace: ns, name: p, uid: u}",
        ONE,
        "{phase: Running, containerStatuses: [{name: a, image: i, imageID: x, ready: false, restartCount: 2,
           containerID: 'atoll://a-2', state: {waiting: {reason: CrashLoopBackOff}},
           lastState: {terminated: {exitCode: 7, containerID: 'atoll://a-2'}}}]}",
    );
    let old = desired.pod.status.as_ref().unwrap();
    let mut seen = actual(vec![ran("a", 1, State::Exited, 1)]);
    remember(&mut seen, &desired, old);
    let runs: Vec<_> = seen.runs("a").map(|r| (r.id.as_str(), r.restarts, r.exit_code)).collect();
    assert_eq!(runs, [("a-2", 2, 7), ("a-1", 1, 1)]);
    let mut newer = actual(vec![ran("a", 2, State::Exited, 1)]);
    remember(&mut newer, &desired, old);
    assert_eq!(newer.runs("a").count(), 1);
}
