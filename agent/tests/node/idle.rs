//! A node on which nothing happens costs next to nothing: calls and processor time, counted.

use crate::host::{Host, SOON, until};
use crate::runtime::Events;
use atoll_scripted_cluster::Reach;
use serde_json::Value;
use std::time::{Duration, Instant};

const PODS: usize = 10;
/// A window to count in, not a wait for something: every interval of the agent comes up in it.
const WINDOW: Duration = Duration::from_secs(30);

/// What an idle agent does in a second, and its share of a processor.
struct Cost {
    calls: f64,
    requests: f64,
    processor: f64,
}

/// Ten pods run and everything about them has been said; then counts for a while.
async fn idle(events: Events) -> Cost {
    let mut host = Host::new(events).await;
    host.start();
    host.wait_ready().await;
    for n in 0..PODS {
        host.bind(&format!("pod-{n}"), Value::Null);
    }
    for n in 0..PODS {
        host.wait_running(&format!("pod-{n}")).await;
    }
    // The last thing to happen after a start is a list that has every pod for the first time.
    for _ in 0..3 {
        let (from, used) = (Instant::now(), host.processor());
        tokio::time::sleep(WINDOW).await;
        let (seconds, calls) = (from.elapsed().as_secs_f64(), host.runtime.calls_since(from));
        if calls.contains_key("ContainerStatus") {
            continue;
        }
        let requests = host.cluster.seen_since(from);
        let cost = Cost {
            calls: calls.values().sum::<usize>() as f64 / seconds,
            requests: requests.len() as f64 / seconds,
            processor: (host.processor() - used).as_secs_f64() / seconds,
        };
        println!("calls of the runtime in {seconds:.0} s: {calls:?}");
        println!("requests to the API server: {:#?}", requests.iter().map(|s| &s.what).collect::<Vec<_>>());
        println!("processor: {:.2} %", cost.processor * 100.0);
        return cost;
    }
    panic!("it looks at its pods again and again:\n{}", host.log());
}

impl Cost {
    fn at_most(&self, calls: f64, requests: f64, processor: f64) {
        assert!(self.calls <= calls, "{:.2} calls of the runtime a second", self.calls);
        assert!(self.requests <= requests, "{:.2} requests to the API server a second", self.requests);
        let percent = self.processor * 100.0;
        assert!(self.processor <= processor, "{percent:.1} % of a processor, unoptimised");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_idle_pods_cost_less_than_a_call_a_second_and_no_processor_time() {
    idle(Events::Told).await.at_most(0.9, 0.3, 0.02);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_idle_pods_on_a_runtime_without_events_cost_little_more() {
    idle(Events::Unimplemented).await.at_most(2.8, 0.3, 0.03);
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_that_cannot_be_written_cost_no_processor_time() {
    const MANY: usize = 12;
    let host = Host::ready().await;
    let names: Vec<String> = (0..MANY).map(|n| format!("pod-{n}")).collect();
    for name in &names {
        host.bind(name, Value::Null);
    }
    for name in &names {
        host.wait_running(name).await;
    }
    // More statuses than are written at a time, to a server that says nothing.
    host.cluster.reach(Reach::Silent);
    let first: Vec<_> = names.iter().flat_map(|name| host.runtime.running(name)).collect();
    first.iter().for_each(|id| host.runtime.exit(id, 1));
    let again = || names.iter().flat_map(|name| host.runtime.running(name)).collect::<Vec<_>>();
    until("every container to run again", SOON, || (again().len() == MANY).then_some(())).await;
    // A window to count in: shorter than the deadline of a write.
    let (from, used) = (Instant::now(), host.processor());
    tokio::time::sleep(Duration::from_secs(8)).await;
    let share = (host.processor() - used).as_secs_f64() / from.elapsed().as_secs_f64();
    println!("processor: {:.2} %", share * 100.0);
    assert!(share <= 0.05, "{:.1} % of a processor", share * 100.0);
}
