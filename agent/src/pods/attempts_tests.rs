//! What a status says while containers end and are started again: what happens, and every status that is then shown.

use super::*;
use crate::pods::plan::{self, Action, Probed, Target};
use crate::pods::testing::{actual, pod, ran};

/// A pod of one container `a`, its runtime and its agent.
struct World {
    desired: Desired,
    actual: Actual,
    memory: Memory,
    attempts: Attempts,
    status: api::PodStatus,
    now: Timestamp,
    /// Restarts of the run that the start under way makes.
    making: u32,
    shown: Vec<String>,
}

impl World {
    fn new(spec: &str) -> Self {
        Self {
            desired: pod(spec),
            actual: actual(Vec::new()),
            memory: Memory::default(),
            attempts: Attempts::default(),
            status: api::PodStatus::default(),
            now: Timestamp::from_second(10_000).unwrap(),
            making: 0,
            shown: Vec::new(),
        }
    }

    fn nanoseconds(&self) -> i64 {
        i64::try_from(self.now.as_nanosecond()).unwrap()
    }

    /// Rounds as the worker makes them, until none follows from the one before.
    fn look(&mut self) {
        loop {
            let mut seen = self.actual.clone();
            status::remember(&mut seen, &self.desired, &self.status);
            self.attempts.recover(&self.desired, &seen, &self.status, &mut self.memory.crashes);
            let probed = |r: &super::super::actual::Ran| {
                (r.id.clone(), Probed { started: true, ready: true, kill: None })
            };
            self.memory.probed = seen.running().map(probed).collect();
            let plan = plan::run(&self.desired, &seen, &self.memory, self.now);
            for action in &plan.actions {
                if let Action::Start { name, restarts, .. } = action {
                    if let Some(before) = seen.current(name) {
                        self.memory.crashes.tried(name, before.ended(), self.now);
                    }
                    self.attempts.begun(name, self.now);
                    self.memory.busy.insert(action.target());
                    self.making = *restarts;
                }
                if let Action::RemoveContainer { id } = action {
                    self.actual.containers.retain(|c| c.id != *id);
                }
            }
            let (status, put_off) = self.attempts.status(&Look {
                desired: &self.desired,
                actual: &seen,
                plan: &plan,
                memory: &self.memory,
                old: &self.status,
                ending: false,
                failed: None,
                runtime: "atoll",
                host_ips: &[],
                now: self.now,
            });
            self.status = status;
            self.shown.push(show(&self.status));
            if put_off.is_empty() {
                return;
            }
        }
    }

    fn happens(&mut self, what: &str) {
        self.now += jiff::SignedDuration::from_millis(1);
        let at = self.nanoseconds();
        let (word, number) = what.split_once(' ').unwrap_or((what, "0"));
        let number: i32 = number.parse().unwrap_or(0);
        match word {
            "look" => {}
            "wait" => self.now += jiff::SignedDuration::from_secs(number.into()),
            // The runtime has it, and the agent has not been told that its call succeeded.
            "made" | "created" => {
                let state = if word == "made" { State::Running } else { State::Created };
                let mut made = ran("a", self.making, state, 0);
                (made.created, made.started) = (at, if word == "made" { at } else { 0 });
                self.actual.containers.insert(0, made);
            }
            "done" => {
                self.memory.busy.remove(&Target::Start("a".into()));
                self.attempts.started("a");
            }
            "fails" => {
                self.memory.busy.remove(&Target::Start("a".into()));
                self.attempts.failed("a", "CreateContainerError", "no space");
                self.memory.not_before.insert("a".into(), self.now + jiff::SignedDuration::from_secs(10));
            }
            "exit" => {
                let newest = &mut self.actual.containers[0];
                (newest.state, newest.exit_code, newest.finished) = (State::Exited, number, at);
                newest.reason = if number == 0 { "Completed" } else { "Error" }.into();
            }
            // The runtime does not know its newest container any more.
            "lost" => drop(self.actual.containers.remove(0)),
            "agent" => (self.memory, self.attempts) = (Memory::default(), Attempts::default()),
            _ => panic!("{what}?"),
        }
        self.look();
    }
}

/// State, restart count, how the run before ended.
fn show(status: &api::PodStatus) -> String {
    let a = status::old_status(status, "a").unwrap();
    let state = a.state.clone().unwrap();
    let text = if let Some(ended) = &state.terminated {
        format!("{} {}", ended.reason.as_deref().unwrap(), ended.exit_code)
    } else if let Some(waiting) = &state.waiting {
        let message = waiting.message.as_deref().unwrap_or_default();
        let wait = message.strip_prefix("back-off ").and_then(|rest| rest.split(' ').next());
        [waiting.reason.as_deref().unwrap(), wait.unwrap_or_default()].join(" ").trim().to_owned()
    } else {
        "running".to_owned()
    };
    let last = a.last_state.as_ref().and_then(|s| s.terminated.as_ref()).map(|t| t.exit_code);
    format!("{text}, {}, {}", a.restart_count, last.map_or_else(|| "-".to_owned(), |code| code.to_string()))
}

/// What happens, and what is shown from then on.
fn check(spec: &str, table: &[(&str, &[&str])]) {
    let mut world = World::new(spec);
    let mut before = String::new();
    for (line, (what, expected)) in table.iter().enumerate() {
        world.shown.clear();
        world.happens(what);
        world.shown.insert(0, before);
        world.shown.dedup();
        assert_eq!(world.shown[1..], **expected, "line {line}: {what}");
        before = world.shown.last().unwrap().clone();
    }
}

const ALWAYS: &str = "{containers: [{name: a, image: i}]}";

/// The first run ends with 1, the second with 2 and waits.
const TWO_CRASHES: [(&str, &[&str]); 10] = [
    ("look", &["ContainerCreating, 0, -"]),
    ("made", &[]),
    ("done", &["running, 0, -"]),
    ("exit 1", &["Error 1, 0, -"]),
    ("look", &[]),
    ("made", &[]),
    ("done", &["running, 1, 1"]),
    ("exit 2", &["Error 2, 1, 1", "CrashLoopBackOff 10s, 1, 2"]),
    ("look", &[]),
    ("wait 9", &[]),
];

fn after_two_crashes(more: &[(&'static str, &'static [&'static str])]) {
    check(ALWAYS, &[&TWO_CRASHES, more].concat());
}

#[test]
fn the_first_restart_is_at_once_and_the_waits_grow() {
    after_two_crashes(&[
        ("wait 2", &[]),
        ("look", &[]),
        ("made", &[]),
        ("look", &[]),
        ("done", &["running, 2, 2"]),
        ("exit 3", &["Error 3, 2, 2", "CrashLoopBackOff 20s, 2, 3"]),
        ("wait 21", &[]),
        ("made", &[]),
        ("done", &["running, 3, 3"]),
        ("exit 4", &["Error 4, 3, 3", "CrashLoopBackOff 40s, 3, 4"]),
        ("wait 41", &[]),
        ("made", &[]),
        ("done", &["running, 4, 4"]),
        ("exit 5", &["Error 5, 4, 4", "CrashLoopBackOff 1m20s, 4, 5"]),
        ("wait 81", &[]),
        ("made", &[]),
        ("done", &["running, 5, 5"]),
        ("exit 6", &["Error 6, 5, 5", "CrashLoopBackOff 2m40s, 5, 6"]),
        ("wait 161", &[]),
        ("made", &[]),
        ("done", &["running, 6, 6"]),
        ("exit 7", &["Error 7, 6, 6", "CrashLoopBackOff 5m0s, 6, 7"]),
        ("wait 301", &[]),
        ("made", &[]),
        ("done", &["running, 7, 7"]),
        ("exit 8", &["Error 8, 7, 7", "CrashLoopBackOff 5m0s, 7, 8"]),
        ("wait 301", &[]),
        ("made", &[]),
        ("done", &["running, 8, 8"]),
        // Ten minutes of peace: as if it were the first time.
        ("wait 700", &[]),
        ("exit 9", &["Error 9, 8, 8"]),
        ("made", &[]),
        ("done", &["running, 9, 9"]),
        ("exit 10", &["Error 10, 9, 9", "CrashLoopBackOff 10s, 9, 10"]),
    ]);
}

#[test]
fn a_run_that_ends_before_its_start_is_done_is_shown_when_it_is() {
    check(
        ALWAYS,
        &[
            ("look", &["ContainerCreating, 0, -"]),
            ("made", &[]),
            ("exit 3", &[]),
            ("done", &["Error 3, 0, -"]),
            ("made", &[]),
            ("exit 4", &[]),
            ("done", &["Error 4, 1, 3", "CrashLoopBackOff 10s, 1, 4"]),
            ("wait 11", &[]),
            ("made", &[]),
            ("exit 5", &[]),
            ("done", &["Error 5, 2, 4", "CrashLoopBackOff 20s, 2, 5"]),
        ],
    );
}

#[test]
fn an_agent_that_is_restarted_in_a_back_off_goes_on_with_it() {
    after_two_crashes(&[
        ("agent", &[]),
        ("look", &[]),
        ("wait 2", &[]),
        ("made", &[]),
        ("done", &["running, 2, 2"]),
        ("exit 3", &["Error 3, 2, 2", "CrashLoopBackOff 20s, 2, 3"]),
        ("agent", &[]),
        ("wait 19", &[]),
        ("agent", &[]),
        ("wait 2", &[]),
        ("made", &[]),
        ("done", &["running, 3, 3"]),
        ("exit 4", &["Error 4, 3, 3", "CrashLoopBackOff 40s, 3, 4"]),
    ]);
}

#[test]
fn an_agent_that_is_restarted_in_the_middle_of_an_attempt_takes_nothing_back() {
    // Before the runtime has made anything.
    let then: [(&str, &[&str]); 4] =
        [("wait 2", &[]), ("agent", &[]), ("made", &[]), ("done", &["running, 2, 2"])];
    after_two_crashes(&then);
    // It was made and never started: another one takes its place, at once.
    after_two_crashes(&[
        ("wait 2", &[]),
        ("created", &[]),
        ("agent", &["CrashLoopBackOff 10s, 2, 2"]),
        ("made", &[]),
        ("done", &["running, 3, 2"]),
    ]);
    // It runs, and the wait that led to it counts.
    after_two_crashes(&[
        ("wait 2", &[]),
        ("made", &[]),
        ("agent", &["running, 2, 2"]),
        ("exit 3", &["Error 3, 2, 2", "CrashLoopBackOff 20s, 2, 3"]),
    ]);
}

#[test]
fn what_the_runtime_lost_is_counted_all_the_same() {
    after_two_crashes(&[
        ("lost", &[]),
        ("made", &[]),
        ("done", &["running, 2, 2"]),
        ("agent", &[]),
        // It cannot be said how this one ended.
        ("lost", &["ContainerStatusUnknown 137, 2, 2"]),
        ("made", &[]),
        ("done", &["running, 3, 137"]),
    ]);
}

#[test]
fn a_start_that_fails_is_the_reason_until_one_succeeds() {
    after_two_crashes(&[
        ("wait 2", &[]),
        ("fails", &["CreateContainerError, 1, 2"]),
        ("wait 7", &[]),
        // Tried again, and too soon after that failure's own wait was over.
        ("wait 4", &[]),
        ("fails", &[]),
        ("wait 11", &["CrashLoopBackOff 40s, 1, 2"]),
        ("agent", &[]),
        ("wait 10", &[]),
        ("made", &[]),
        ("done", &["running, 2, 2"]),
    ]);
}

#[test]
fn what_is_not_to_be_restarted_waits_for_nothing() {
    let spec = "{restartPolicy: OnFailure, containers: [{name: a, image: i}]}";
    let last: [(&str, &[&str]); 5] = [
        ("wait 2", &[]),
        ("made", &[]),
        ("done", &["running, 2, 2"]),
        ("exit 0", &["Completed 0, 2, 2"]),
        ("wait 700", &[]),
    ];
    check(spec, &[&TWO_CRASHES[..], &last].concat());
}
