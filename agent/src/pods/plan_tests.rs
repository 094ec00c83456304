//! What is done when, as tables, and what never happens, as properties.

use super::*;
use crate::pods::testing::{actual, pod, ran, sandbox};
use proptest::prelude::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// Memory in which every running container has passed its probes.
fn probed(actual: &Actual) -> Memory {
    let probed = |r: &Ran| (r.id.clone(), Probed { started: true, ready: true, kill: None });
    Memory { probed: actual.running().map(probed).collect(), ..Memory::default() }
}

fn step(desired: &Desired, actual: &Actual) -> Vec<String> {
    run(desired, actual, &probed(actual), at(1_000)).actions.iter().map(show).collect()
}

fn show(action: &Action) -> String {
    match action {
        Action::CreateSandbox { attempt } => format!("sandbox {attempt}"),
        Action::Start { name, restarts, sandbox } => format!("start {name} {restarts} in {sandbox}"),
        Action::Kill { id, .. } => format!("kill {id}"),
        Action::StopSandbox { id } => format!("stop {id}"),
        Action::RemoveContainer { id } | Action::RemoveSandbox { id } => format!("remove {id}"),
    }
}

const TWO: &str = "{containers: [{name: a, image: i}, {name: b, image: i}]}";
const INIT: &str = "{initContainers: [{name: i, image: i}, {name: s, image: i, restartPolicy: Always}],
    containers: [{name: a, image: i}]}";

#[test]
fn from_nothing_to_running() {
    let desired = pod(TWO);
    assert_eq!(step(&desired, &Actual::default()), ["sandbox 0"]);
    assert_eq!(step(&desired, &actual(vec![])), ["start a 0 in s0"]);
    assert_eq!(step(&desired, &actual(vec![ran("a", 0, State::Running, 0)])), ["start b 0 in s0"]);
    let both = actual(vec![ran("a", 0, State::Running, 0), ran("b", 0, State::Running, 0)]);
    assert!(step(&desired, &both).is_empty());
}

#[test]
fn init_then_sidecar_then_main() {
    let desired = pod(INIT);
    assert_eq!(step(&desired, &actual(vec![])), ["start i 0 in s0"]);
    assert!(step(&desired, &actual(vec![ran("i", 0, State::Running, 0)])).is_empty());
    assert_eq!(step(&desired, &actual(vec![ran("i", 0, State::Exited, 1)])), ["start i 1 in s0"]);
    let initialised = ran("i", 0, State::Exited, 0);
    assert_eq!(step(&desired, &actual(vec![initialised.clone()])), ["start s 0 in s0"]);
    let side = actual(vec![initialised.clone(), ran("s", 0, State::Running, 0)]);
    assert_eq!(step(&desired, &side), ["start a 0 in s0"]);
    // The sidecar's startup probe has not succeeded yet.
    assert!(run(&desired, &side, &Memory::default(), at(1_000)).actions.is_empty());
}

#[test]
fn a_sidecar_that_ends_is_restarted_beside_its_main() {
    let desired = pod(INIT);
    let seen = actual(vec![
        ran("i", 0, State::Exited, 0),
        ran("s", 0, State::Exited, 1),
        ran("a", 0, State::Running, 0),
    ]);
    assert_eq!(step(&desired, &seen), ["start s 1 in s0"]);
}

#[test]
fn init_containers_the_runtime_forgot_are_not_rerun() {
    let desired = pod(INIT);
    let seen = actual(vec![ran("s", 0, State::Running, 0), ran("a", 0, State::Running, 0)]);
    assert!(step(&desired, &seen).is_empty());
}

#[test]
fn a_crash_waits_for_its_back_off() {
    let desired = pod("{containers: [{name: a, image: i}]}");
    let seen = actual(vec![ran("a", 1, State::Exited, 1)]);
    let mut memory = Memory::default();
    // Ended at second 111.
    memory.crashes.tried("a", at(100), at(100));
    let plan = run(&desired, &seen, &memory, at(115));
    assert!(plan.actions.is_empty());
    assert_eq!(plan.wake, Some(at(121)));
    assert_eq!(plan.waiting["a"].reason, "CrashLoopBackOff");
    assert_eq!(plan.waiting["a"].message, "back-off 10s restarting failed container=a pod=p_ns(u)");
    assert_eq!(run(&desired, &seen, &memory, at(121)).actions.len(), 1);
}

#[test]
fn starts_that_fail_push_out_no_run_that_ended() {
    let desired = pod("{containers: [{name: a, image: i}]}");
    let mut seen = actual(vec![
        ran("a", 4, State::Running, 0),
        ran("a", 3, State::Created, 0),
        ran("a", 2, State::Created, 0),
        ran("a", 1, State::Exited, 1),
        ran("a", 0, State::Exited, 1),
    ]);
    assert_eq!(step(&desired, &seen), ["remove a-3", "remove a-2", "remove a-0"]);
    seen.containers.remove(0);
    assert_eq!(step(&desired, &seen)[1..], ["remove a-2", "remove a-0"]);
}

#[test]
fn an_ephemeral_container_runs_once_and_counts_for_nothing() {
    let spec = "{containers: [{name: a, image: i}], ephemeralContainers: [{name: e, image: i, targetContainerName: a}]}";
    let desired = pod(spec);
    let main = ran("a", 0, State::Running, 0);
    assert_eq!(step(&desired, &actual(vec![main.clone()])), ["start e 0 in s0"]);
    assert!(step(&desired, &actual(vec![main, ran("e", 0, State::Exited, 1)])).is_empty());
    let over = pod(&spec.replace("{containers", "{restartPolicy: Never, containers"));
    let seen = actual(vec![ran("a", 0, State::Exited, 0), ran("e", 0, State::Running, 0)]);
    assert_eq!(verdict(&over, &seen), Verdict::Over);
}

#[test]
fn restart_policies() {
    for (policy, code, restarts) in [
        ("Always", 0, true),
        ("Always", 1, true),
        ("OnFailure", 0, false),
        ("OnFailure", 1, true),
        ("Never", 1, false),
    ] {
        let desired = pod(&format!("{{restartPolicy: {policy}, containers: [{{name: a, image: i}}]}}"));
        let seen = actual(vec![ran("a", 0, State::Exited, code)]);
        assert_eq!(!step(&desired, &seen).is_empty(), restarts, "{policy} {code}");
        assert_eq!(verdict(&desired, &seen) == Verdict::Active, restarts, "{policy} {code}");
    }
}

#[test]
fn a_failed_init_container_ends_the_pod() {
    let desired = pod(
        "{restartPolicy: Never, initContainers: [{name: i, image: i}], containers: [{name: a, image: i}]}",
    );
    let seen = actual(vec![ran("i", 0, State::Exited, 1)]);
    assert_eq!(verdict(&desired, &seen), Verdict::Over);
    assert!(step(&desired, &seen).is_empty());
}

#[test]
fn a_lost_sandbox_is_replaced_once_its_containers_have_ended() {
    let desired = pod("{containers: [{name: a, image: i}]}");
    let lost = Actual::new(vec![sandbox(0, false)], vec![ran("a", 0, State::Running, 0)]);
    assert_eq!(step(&desired, &lost), ["kill a-0"]);
    let ended = Actual::new(vec![sandbox(0, false)], vec![ran("a", 0, State::Exited, 137)]);
    assert_eq!(step(&desired, &ended), ["sandbox 1"]);
    let again = Actual::new(vec![sandbox(1, true), sandbox(0, false)], vec![ran("a", 0, State::Exited, 137)]);
    assert_eq!(step(&desired, &again), ["start a 1 in s1"]);
}

#[test]
fn a_container_that_takes_its_sandbox_with_it_waits_for_its_back_off() {
    let desired = pod("{containers: [{name: a, image: i}]}");
    let again = Actual::new(vec![sandbox(1, true), sandbox(0, false)], vec![ran("a", 1, State::Exited, 137)]);
    let mut memory = Memory::default();
    // Ended at second 111.
    memory.crashes.tried("a", at(100), at(100));
    let plan = run(&desired, &again, &memory, at(115));
    assert!(plan.actions.is_empty());
    assert_eq!((plan.wake, plan.waiting["a"].reason.as_str()), (Some(at(121)), "CrashLoopBackOff"));
    let plan = run(&desired, &again, &memory, at(121));
    assert_eq!(plan.actions.iter().map(show).collect::<Vec<_>>(), ["start a 2 in s1"]);
}

#[test]
fn what_succeeded_is_not_run_again_in_a_new_sandbox_unless_it_comes_before_the_rest() {
    let desired = pod("{restartPolicy: OnFailure, initContainers: [{name: i, image: i}],
          containers: [{name: a, image: i}, {name: b, image: i}]}");
    let sandboxes = vec![sandbox(1, true), sandbox(0, false)];
    let mut ended =
        vec![ran("i", 0, State::Exited, 0), ran("a", 0, State::Exited, 0), ran("b", 0, State::Exited, 137)];
    let again = |ended: &[Ran]| step(&desired, &Actual::new(sandboxes.clone(), ended.to_vec()));
    assert_eq!(again(&ended), ["start i 1 in s1"]);
    let mut anew = ran("i", 1, State::Exited, 0);
    anew.sandbox = "s1".into();
    ended.insert(0, anew);
    assert_eq!(again(&ended), ["start b 1 in s1"]);
}

#[test]
fn a_sandbox_lost_again_and_again_is_replaced_later_each_time() {
    let desired = pod("{containers: [{name: a, image: i}]}");
    let lost_when_made_at = |second: i64| {
        let mut lost = sandbox(3, false);
        lost.created = second * 1_000_000_000;
        Actual::new(vec![lost], vec![])
    };
    let mut memory = Memory::default();
    assert_eq!(
        run(&desired, &lost_when_made_at(100), &memory, at(101)).actions.len(),
        1,
        "the first at once"
    );
    memory.sandbox_replaced(at(101));
    let plan = run(&desired, &lost_when_made_at(102), &memory, at(104));
    assert_eq!((plan.actions.len(), plan.wake), (0, Some(at(112))));
    assert_eq!(run(&desired, &lost_when_made_at(102), &memory, at(112)).actions.len(), 1);
    memory.sandbox_replaced(at(112));
    assert_eq!(run(&desired, &lost_when_made_at(113), &memory, at(114)).wake, Some(at(133)));
    // One that lived longer than that is replaced at once.
    assert_eq!(run(&desired, &lost_when_made_at(113), &memory, at(133)).actions.len(), 1);
}

#[test]
fn probes_and_changes_kill() {
    let desired = pod("{containers: [{name: a, image: i}]}");
    let mut changed = ran("a", 0, State::Running, 0);
    changed.hash = Some(0);
    assert_eq!(step(&desired, &actual(vec![changed])), ["kill a-0"]);
    let seen = actual(vec![ran("a", 0, State::Running, 0)]);
    let mut memory = probed(&seen);
    let grace = Some(Duration::from_secs(3));
    memory.probed.get_mut("a-0").unwrap().kill = Some(ProbeKill { probe: "liveness", grace });
    let plan = run(&desired, &seen, &memory, at(1_000));
    let why = "Container a failed liveness probe, will be restarted".to_owned();
    let kill = Action::Kill { id: "a-0".into(), name: "a".into(), why, grace: Duration::from_secs(3) };
    assert_eq!(plan.actions, [kill]);
}

#[test]
fn what_only_the_status_remembers_is_not_removed_again() {
    let desired = pod("{containers: [{name: a, image: i}]}");
    let mut remembered = ran("a", 0, State::Exited, 0);
    remembered.sandbox = String::new();
    let seen = Actual::new(vec![], vec![remembered]);
    let order = Stop { why: String::new(), deadline: at(1_030), remove: true };
    let plan = stop(&desired, &seen, &Memory::default(), &order, at(1_000));
    assert!(plan.gone && plan.actions.is_empty());
}

#[test]
fn stops_mains_then_sidecars_in_reverse_then_the_sandbox() {
    let desired = pod(
        "{initContainers: [{name: s, image: i, restartPolicy: Always}, {name: t, image: i, restartPolicy: Always}],
          containers: [{name: a, image: i}]}",
    );
    let order = Stop { why: "Stopping".into(), deadline: at(1_030), remove: true };
    let mut seen = actual(["s", "t", "a"].iter().map(|n| ran(n, 0, State::Running, 0)).collect());
    let mut done = Vec::new();
    for _ in 0..12 {
        let plan = stop(&desired, &seen, &Memory::default(), &order, at(1_000));
        for action in &plan.actions {
            done.push(show(action));
            match action {
                Action::Kill { id, grace, .. } => {
                    assert_eq!(*grace, Duration::from_secs(30));
                    seen.containers.iter_mut().filter(|c| c.id == *id).for_each(|c| c.state = State::Exited);
                }
                Action::StopSandbox { id } => {
                    seen.sandboxes.iter_mut().filter(|s| s.id == *id).for_each(|s| s.ready = false);
                }
                Action::RemoveContainer { id } => seen.containers.retain(|c| c.id != *id),
                Action::RemoveSandbox { id } => seen.sandboxes.retain(|s| s.id != *id),
                Action::CreateSandbox { .. } | Action::Start { .. } => {
                    panic!("a stopping pod starts {action:?}")
                }
            }
        }
        if plan.gone {
            break;
        }
    }
    let removed: BTreeSet<_> = done.split_off(4).into_iter().collect();
    assert_eq!(done, ["kill a-0", "kill t-0", "kill s-0", "stop s0"]);
    assert_eq!(
        removed.into_iter().collect::<Vec<_>>(),
        ["remove a-0", "remove s-0", "remove s0", "remove t-0"]
    );
}

fn any_state() -> impl Strategy<Value = State> {
    prop_oneof![Just(State::Created), Just(State::Running), Just(State::Exited), Just(State::Unknown)]
}

fn any_actual() -> impl Strategy<Value = Actual> {
    let container = ("[isab]", 0u32..4, any_state(), prop_oneof![Just(0), Just(1), Just(137)], 0u32..3);
    let containers = prop::collection::vec(container, 0..8);
    (containers, prop::collection::vec(any::<bool>(), 0..3)).prop_map(|(containers, ready)| {
        let mut ids = BTreeSet::new();
        let containers = containers.into_iter().filter(|c| ids.insert((c.0.clone(), c.1))).map(
            |(name, restarts, state, code, sandbox)| {
                let mut ran = ran(&name, restarts, state, code);
                ran.sandbox = format!("s{sandbox}");
                ran
            },
        );
        let sandboxes = ready.into_iter().enumerate().map(|(n, ready)| sandbox(n as u32, ready));
        Actual::new(sandboxes.collect(), containers.collect())
    })
}

fn any_busy() -> impl Strategy<Value = BTreeSet<Target>> {
    let target = prop_oneof![
        Just(Target::NewSandbox),
        "[isab]".prop_map(Target::Start),
        ("[isab]", 0u32..4).prop_map(|(n, r)| Target::Container(format!("{n}-{r}"))),
        (0u32..3).prop_map(|n| Target::Sandbox(format!("s{n}"))),
    ];
    prop::collection::btree_set(target, 0..4)
}

proptest! {
    #[test]
    fn invariants(seen in any_actual(), busy in any_busy(), policy in "(Always|OnFailure|Never)", deleted: bool) {
        let desired = pod(&format!(
            "{{restartPolicy: {policy}, initContainers: [{{name: i, image: i}}, {{name: s, image: i, restartPolicy: Always}}],
               containers: [{{name: a, image: i}}, {{name: b, image: i}}]}}"
        ));
        let memory = Memory { busy, ..probed(&seen) };
        let order = Stop { why: String::new(), deadline: at(1_030), remove: true };
        let plan = if deleted {
            stop(&desired, &seen, &memory, &order, at(1_000))
        } else {
            run(&desired, &seen, &memory, at(1_000))
        };
        let mut targets = BTreeSet::new();
        for action in &plan.actions {
            prop_assert!(!memory.busy.contains(&action.target()), "{:?} is under way", action);
            prop_assert!(targets.insert(action.target()), "{:?} twice", action);
            if let Action::Start { name, sandbox, .. } = action {
                prop_assert!(!deleted);
                prop_assert_eq!(Some(sandbox), seen.sandbox().map(|s| &s.id));
                let here = seen.current(name).filter(|r| r.sandbox == *sandbox);
                prop_assert!(here.is_none_or(|r| r.state != State::Running), "{} runs already", name);
            }
            if let Action::RemoveContainer { id } = action {
                let ran = seen.containers.iter().find(|c| c.id == *id).unwrap();
                prop_assert!(ran.state != State::Running);
            }
        }
        let starts = plan.actions.iter().filter(|a| matches!(a, Action::Start { .. })).count();
        prop_assert!(starts <= 1);
        prop_assert!(!plan.stopped || seen.running().count() == 0);
    }
}

#[test]
fn a_clock_set_back_by_years_stops_no_pod() {
    let (then, now) = (at(2_000_000_000), at(1_000_000_000));
    let wait = Duration::from_secs(300);
    let desired = pod("{containers: [{name: a, image: i}]}");
    let mut memory = Memory {
        not_before: BTreeMap::from([("a".to_owned(), then)]),
        sandbox_not_before: Some(then),
        ..Memory::default()
    };
    memory.bound_waits(wait, wait, now);
    assert_eq!(run(&desired, &Actual::default(), &memory, now).wake, Some(now + wait));
    assert_eq!(run(&desired, &actual(vec![]), &memory, now).wake, Some(now + wait));
    // What is waited for rightly stays as it is.
    let soon = now + Duration::from_secs(1);
    memory.not_before.insert("a".into(), soon);
    memory.bound_waits(wait, wait, now);
    assert_eq!(memory.not_before["a"], soon);
}
