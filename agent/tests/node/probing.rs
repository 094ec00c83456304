//! Probes of containers by the real agent: what a probe cannot learn kills nothing.

use crate::host::{Host, PODS, SOON, until};
use serde_json::{Value, json};
use std::time::Instant;

fn bind(host: &Host, pod: &str, more: Value) {
    let mut container = json!({ "name": "main", "image": "image:1" });
    for (field, value) in more.as_object().cloned().unwrap_or_default() {
        container[field] = value;
    }
    host.bind(pod, json!({ "containers": [container] }));
}

async fn told(host: &Host, message: &str) {
    until(message, SOON, || {
        let events = host.cluster.objects("/api/v1/namespaces/default/events/");
        events.iter().any(|e| e["message"].as_str().unwrap_or_default().contains(message)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runtime_that_does_not_answer_kills_no_container() {
    let host = Host::ready().await;
    host.runtime.stall(true);
    let from = Instant::now();
    let probe = json!({ "exec": { "command": ["true"] }, "periodSeconds": 1, "failureThreshold": 1 });
    bind(&host, "p", json!({ "livenessProbe": probe }));
    host.wait_running("p").await;
    until("a second probe", SOON, || (host.runtime.count(from, "ExecSync") > 1).then_some(())).await;
    told(&host, "Liveness probe errored and resulted in unknown state: ExecSync").await;
    assert_eq!(host.runtime.count(from, "StopContainer"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn port_that_nobody_named_fails_its_probes_and_not_the_pod() {
    let host = Host::ready().await;
    let from = Instant::now();
    let probe = json!({ "tcpSocket": { "port": "wbe" }, "periodSeconds": 1, "failureThreshold": 1 });
    bind(&host, "p", json!({ "livenessProbe": probe, "readinessProbe": probe }));
    host.wait_running("p").await;
    for probe in ["Liveness", "Readiness"] {
        let why = "probe errored and resulted in unknown state: no port of the container is named 'wbe'";
        told(&host, &format!("{probe} {why}")).await;
    }
    let pod = host.cluster.get(&format!("{PODS}/p")).expect("the pod");
    assert_eq!(pod["status"]["phase"], "Running");
    assert_eq!(pod["status"]["containerStatuses"][0]["ready"], false);
    assert_eq!(host.runtime.count(from, "StopContainer"), 0);
}
