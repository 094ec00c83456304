//! What a container that ends again and again shows: every status that is written, in its order, as on any node.

use crate::host::{Host, PODS, SOON, until};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Three runs that end with 1, 2 and 3: state, restart count, how the run before ended.
const CRASHES: [&str; 9] = [
    "waiting ContainerCreating 0 last -",
    "running 0 last -",
    "terminated 1 0 last -",
    "running 1 last 1",
    "terminated 2 1 last 1",
    "waiting CrashLoopBackOff 10s 1 last 2",
    "running 2 last 2",
    "terminated 3 2 last 2",
    "waiting CrashLoopBackOff 20s 2 last 3",
];

fn shown(pod: &Value) -> Option<String> {
    let status = pod["status"]["containerStatuses"].get(0)?;
    let state = &status["state"];
    let text = if state["running"].is_object() {
        "running".to_owned()
    } else if let Some(code) = state["terminated"]["exitCode"].as_i64() {
        assert_eq!(state["terminated"]["reason"], "Error", "{status:#}");
        format!("terminated {code}")
    } else {
        let reason = state["waiting"]["reason"].as_str().unwrap_or("?");
        let message = state["waiting"]["message"].as_str().unwrap_or_default();
        match message.strip_prefix("back-off ").and_then(|rest| rest.split_once(' ')) {
            Some((delay, rest)) => {
                assert!(rest.starts_with("restarting failed container=main pod="), "{message}");
                format!("waiting {reason} {delay}")
            }
            None => format!("waiting {reason}"),
        }
    };
    let last = &status["lastState"]["terminated"]["exitCode"];
    let last = last.as_i64().map_or_else(|| "-".to_owned(), |code| code.to_string());
    Some(format!("{text} {} last {last}", status["restartCount"]))
}

fn written(host: &Host, pod: &str) -> Vec<String> {
    let versions = host.cluster.versions(&format!("{PODS}/{pod}"));
    let mut all: Vec<String> = versions.iter().filter_map(shown).collect();
    all.dedup();
    all
}

/// Whether all of these were written, in the order of `legal`, and nothing else: a state that is over before the last
/// write has been answered may be left out.
fn check(written: &[String], legal: &[&str], needed: &[&str]) {
    let mut rest = legal.iter();
    for one in written {
        assert!(rest.any(|next| next == one), "{one:?} is not what comes next in {written:#?}");
    }
    for one in needed {
        assert!(written.iter().any(|w| w == one), "{one:?} is missing in {written:#?}");
    }
}

async fn wait_shown(host: &Host, pod: &str, what: &str) {
    let begun = Instant::now();
    while !written(host, pod).iter().any(|one| one == what) {
        assert!(begun.elapsed() < SOON, "no {what:?} in {:#?}", written(host, pod));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Makes the agent look at the pod, twice: what the first look led to is written, or on its way.
async fn look_again(host: &Host, pod: &str) {
    for value in ["one", "two"] {
        let from = Instant::now();
        host.cluster.label(&format!("{PODS}/{pod}"), value);
        until("a look", SOON, || (host.runtime.count(from, "ListContainers") > 0).then_some(())).await;
    }
}

async fn crash(host: &Host, pod: &str, code: i32) {
    let id = until("a run", SOON, || host.runtime.running(pod).pop()).await;
    host.runtime.exit(&id, code);
}

/// The start that is held back has begun.
async fn start_begun(host: &Host, from: Instant) {
    until("a start", SOON, || (host.runtime.count(from, "CreateContainer") > 0).then_some(())).await;
}

async fn crash_twice(host: &Host, pod: &str) -> Instant {
    host.bind(pod, Value::Null);
    wait_shown(host, pod, CRASHES[1]).await;
    host.runtime.hold(true);
    let first = Instant::now();
    crash(host, pod, 1).await;
    start_begun(host, first).await;
    assert!(first.elapsed() < Duration::from_secs(5), "the first restart is made at once");
    wait_shown(host, pod, CRASHES[2]).await;
    look_again(host, pod).await;
    host.runtime.hold(false);
    wait_shown(host, pod, CRASHES[3]).await;
    host.runtime.hold(true);
    let second = Instant::now();
    crash(host, pod, 2).await;
    wait_shown(host, pod, CRASHES[5]).await;
    second
}

async fn after_the_back_off(host: &Host, pod: &str, second: Instant) {
    start_begun(host, second).await;
    assert!(second.elapsed() > Duration::from_secs(8), "a back-off of 10 s took {:?}", second.elapsed());
    look_again(host, pod).await;
    host.runtime.hold(false);
    wait_shown(host, pod, CRASHES[6]).await;
    crash(host, pod, 3).await;
    wait_shown(host, pod, CRASHES[8]).await;
    let optional = [CRASHES[0], CRASHES[4], CRASHES[7]];
    let needed: Vec<_> = CRASHES.iter().copied().filter(|one| !optional.contains(one)).collect();
    check(&written(host, pod), &CRASHES, &needed);
}

/// Files of the runs of a pod's container, in its order: logs, and last words.
fn kept(host: &Host, pod: &str) -> [Vec<String>; 2] {
    let object = host.cluster.get(&format!("{PODS}/{pod}")).expect("the pod");
    let uid = object["metadata"]["uid"].as_str().expect("a uid");
    let logs = format!("logs/default_{pod}_{uid}/main");
    [logs, format!("pods/{uid}/containers/main")].map(|directory| {
        let entries = std::fs::read_dir(host.path(&directory)).expect("a directory");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn crashing_container_shows_terminated_then_runs_then_waits_longer_each_time() {
    let host = Host::ready().await;
    let second = crash_twice(&host, "crashes").await;
    let first = host.runtime.log_of("crashes", 0);
    std::fs::write(format!("{first}.20260101-000000"), "").expect("written");
    after_the_back_off(&host, "crashes", second).await;
    let newest = [["1.log", "2.log"], ["1.message", "2.message"]].map(|two| two.map(str::to_owned).to_vec());
    until("only the newest two runs' files", SOON, || (kept(&host, "crashes") == newest).then_some(())).await;
    let previous = std::fs::read_to_string(host.runtime.log_of("crashes", 1)).expect("the previous log");
    assert!(previous.contains("hello from"), "{previous}");
    let events = || host.cluster.objects("/api/v1/namespaces/default/events/");
    for delay in ["10s", "20s"] {
        until("an event that names the wait", SOON, || {
            let says = |event: &Value| {
                let message = event["message"].as_str().unwrap_or_default();
                event["reason"] == "BackOff"
                    && message
                        .starts_with("Back-off restarting failed container main in pod crashes_default(")
                    && message.ends_with(&format!(": waiting {delay}"))
            };
            events().iter().any(says).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_killed_in_the_middle_of_a_back_off_goes_on_with_it() {
    let mut host = Host::ready().await;
    let second = crash_twice(&host, "crashes").await;
    host.kill();
    let back = Instant::now();
    host.start();
    until("a look", SOON, || (host.runtime.count(back, "ListContainers") > 1).then_some(())).await;
    look_again(&host, "crashes").await;
    after_the_back_off(&host, "crashes", second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn container_that_exits_at_once_never_waits_before_its_first_restart() {
    let host = Host::ready().await;
    host.runtime.doom(Some(3));
    host.bind("exits", Value::Null);
    let legal = [
        "waiting ContainerCreating 0 last -",
        "running 0 last -",
        "terminated 3 0 last -",
        "running 1 last 3",
        "terminated 3 1 last 3",
        "waiting CrashLoopBackOff 10s 1 last 3",
        "running 2 last 3",
        "terminated 3 2 last 3",
        "waiting CrashLoopBackOff 20s 2 last 3",
    ];
    wait_shown(&host, "exits", legal[8]).await;
    check(&written(&host, "exits"), &legal, &[legal[5], legal[8]]);
}
