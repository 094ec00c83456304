//! The control plane goes away, comes back, forgets, is overloaded: pods do not notice, and the node's truth is right
//! afterwards.

use crate::host::{Host, LEASE, NODE, PODS, SOON, until};
use crate::runtime::Events;
use atoll_scripted_cluster::{POD_CIDR, Reach};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn id(pod: &Value) -> String {
    pod["status"]["containerStatuses"][0]["containerID"].as_str().unwrap_or_default().to_owned()
}

fn restarts(pod: &Value) -> i64 {
    pod["status"]["containerStatuses"][0]["restartCount"].as_i64().unwrap_or(-1)
}

async fn renewed_again(host: &Host) {
    let known = host.renewed();
    until("the lease to be renewed", SOON, || (host.renewed() != known).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn supervisor_away_after_joining_leaves_pods_and_logs_and_the_lease_comes_back() {
    let host = Host::ready().await;
    host.bind("stays", Value::Null);
    let before = host.wait_running("stays").await;
    let running = host.runtime.running("stays");
    host.cluster.reach(Reach::Refused);
    host.line(&["lease of node node-1", "pods keep running, the API server is asked again"]).await;
    until("the console to know", SOON, || {
        let status = host.status()?;
        (!status.node_ready && status.last_error?.contains("pods keep running")).then_some(())
    })
    .await;
    assert_eq!(host.runtime.running("stays"), running);
    let log = std::fs::read_to_string(host.runtime.log(&running[0])).unwrap();
    assert!(log.contains("hello from"), "{log}");
    let told = host.log().lines().filter(|line| line.contains("lease of node")).count();
    host.cluster.reach(Reach::Served);
    host.line(&["lease of node node-1 renewed again after"]).await;
    until("the console to know", SOON, || host.status().filter(|status| status.node_ready)).await;
    let after = host.wait_running("stays").await;
    assert_eq!((id(&before), restarts(&after)), (id(&after), 0));
    assert_eq!(told, 1, "one line, not one for each try:\n{}", host.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn supervisor_silent_after_joining_is_noticed_and_spoken_to_again() {
    let host = Host::ready().await;
    host.bind("stays", Value::Null);
    host.wait_running("stays").await;
    host.cluster.reach(Reach::Silent);
    host.line(&["lease of node node-1", "pods keep running"]).await;
    host.cluster.reach(Reach::Served);
    host.line(&["lease of node node-1 renewed again after"]).await;
    assert_eq!(host.runtime.running("stays").len(), 1);
    host.bind("new", Value::Null);
    host.wait_running("new").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn container_that_ends_while_the_supervisor_is_away_is_restarted_and_told_afterwards() {
    let host = Host::ready().await;
    host.cluster.put("/api/v1/namespaces/default/configmaps/c", json!({"data": {"k": "v"}}));
    let more = json!({
        "volumes": [{"name": "c", "configMap": {"name": "c"}}],
        "containers": [{"name": "main", "image": "image:1", "volumeMounts": [{"name": "c", "mountPath": "/c"}],
            "env": [{"name": "K", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}]}],
    });
    host.bind("restarts", more);
    host.wait_running("restarts").await;
    let first = host.runtime.running("restarts");
    host.cluster.reach(Reach::Refused);
    host.line(&["pods keep running"]).await;
    host.runtime.exit(&first[0], 3);
    let second = until("a second run", SOON, || {
        Some(host.runtime.running("restarts")).filter(|now| !now.is_empty() && *now != first)
    })
    .await;
    host.cluster.reach(Reach::Served);
    until("the status to say so", SOON, || {
        let pod = host.cluster.get(&format!("{PODS}/restarts"))?;
        (restarts(&pod) == 1 && id(&pod).ends_with(&second[0])).then_some(())
    })
    .await;
    // Those from before, counted again; those of the time in between waited for the server.
    let all = || {
        let events = host.cluster.objects("/api/v1/namespaces/default/events/");
        events.iter().filter_map(|event| event["count"].as_i64()).sum::<i64>()
    };
    until("Pulled, Created and Started, twice", SOON, || (all() >= 6).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn api_server_restarted_keeps_the_watch_where_it_was() {
    let host = Host::ready().await;
    host.bind("stays", Value::Null);
    let before = host.wait_running("stays").await;
    let restarted = Instant::now();
    host.cluster.reach(Reach::Refused);
    // Something happens that no watch can tell meanwhile.
    host.bind("new", Value::Null);
    host.cluster.reach(Reach::Served);
    host.wait_running("new").await;
    assert_eq!(id(&before), id(&host.wait_running("stays").await));
    assert_eq!(host.cluster.count(restarted, "GET /api/v1/pods?&fieldSelector"), 0, "no list was needed");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_restarted_is_a_time_of_5xx_that_passes() {
    let host = Host::ready().await;
    host.bind("stays", Value::Null);
    let before = host.wait_running("stays").await;
    for requests in ["PATCH /apis/coordination", "PATCH /api/v1", "GET /api/v1/nodes", "POST /api/v1"] {
        host.cluster.fail(requests, 503, None, 3);
    }
    host.bind("new", Value::Null);
    host.wait_running("new").await;
    renewed_again(&host).await;
    host.cluster.heal();
    assert_eq!(id(&before), id(&host.wait_running("stays").await));
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_history_compacted_is_listed_anew_and_no_pod_is_touched() {
    let host = Host::ready().await;
    for name in ["stays", "goes"] {
        host.bind(name, Value::Null);
        host.wait_running(name).await;
    }
    let before = host.wait_running("stays").await;
    host.cluster.reach(Reach::Refused);
    // Gone, and nobody will ever be told by a watch.
    host.cluster.remove(&format!("{PODS}/goes"));
    host.bind("new", Value::Null);
    host.cluster.compact();
    let back = Instant::now();
    host.cluster.reach(Reach::Served);
    host.wait_running("new").await;
    until("the pod that is gone to end", SOON, || host.runtime.running("goes").is_empty().then_some(()))
        .await;
    assert!(host.cluster.count(back, "GET /api/v1/pods") >= 2, "a watch that was refused, and a list");
    host.line(&["is forgotten (410): this node's pods are listed anew"]).await;
    let after = host.wait_running("stays").await;
    assert_eq!((id(&before), restarts(&after)), (id(&after), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_that_is_told_410_while_it_is_open_is_listed_anew() {
    let host = Host::ready().await;
    host.bind("stays", Value::Null);
    let before = host.wait_running("stays").await;
    host.cluster.compact();
    host.bind("new", Value::Null);
    host.wait_running("new").await;
    host.line(&["is forgotten (410): this node's pods are listed anew"]).await;
    assert_eq!(id(&before), id(&host.wait_running("stays").await));
}

#[tokio::test(flavor = "multi_thread")]
async fn node_object_deleted_by_hand_comes_back_as_it_was_and_pods_stay() {
    let host = Host::ready().await;
    host.bind("stays", Value::Null);
    let before = host.wait_running("stays").await;
    let network = "10.244.9.0/24";
    let mut node = host.cluster.get(NODE).unwrap();
    (node["spec"]["podCIDR"], node["spec"]["podCIDRs"]) = (network.into(), json!([network]));
    host.cluster.put(NODE, node.clone());
    until("the runtime to know the network", SOON, || (host.runtime.pod_cidr() == network).then_some(()))
        .await;
    host.cluster.remove(NODE);
    // With it goes its lease, by the garbage collector.
    host.cluster.remove(LEASE);
    host.line(&["the Node object of node-1 is gone", "registering it again"]).await;
    host.wait_ready().await;
    let again = host.cluster.get(NODE).unwrap();
    assert_ne!(again["metadata"]["uid"], node["metadata"]["uid"]);
    assert_eq!(again["metadata"]["labels"]["rack"], "7");
    assert_eq!(again["spec"]["podCIDR"], network, "pods keep their addresses");
    let lease = until("a lease", SOON, || host.cluster.get(LEASE)).await;
    assert_eq!(lease["spec"]["holderIdentity"], "node-1");
    assert_eq!(id(&before), id(&host.wait_running("stays").await));
}

#[tokio::test(flavor = "multi_thread")]
async fn node_that_was_given_up_for_unknown_says_that_it_is_ready_as_soon_as_it_sees_it() {
    let host = Host::ready().await;
    let mut node = host.cluster.get(NODE).unwrap();
    for condition in node["status"]["conditions"].as_array_mut().unwrap() {
        condition["status"] = "Unknown".into();
    }
    host.cluster.put(NODE, node);
    host.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_recreated_with_its_name_while_the_host_was_down_is_another_pod() {
    let mut host = Host::ready().await;
    host.bind("same", Value::Null);
    let before = host.wait_running("same").await;
    host.kill();
    host.runtime.lose_power();
    host.cluster.remove(&format!("{PODS}/same"));
    let again = host.bind("same", Value::Null);
    assert_ne!(again["metadata"]["uid"], before["metadata"]["uid"]);
    host.start();
    let after = host.wait_running("same").await;
    assert_eq!((restarts(&after), &after["metadata"]["uid"]), (0, &again["metadata"]["uid"]));
    assert_ne!(id(&before), id(&after));
    let old = before["metadata"]["uid"].as_str().unwrap();
    until("the old pod to leave nothing", SOON, || {
        let files =
            ["pods", "volumes", "logs"].iter().flat_map(|dir| std::fs::read_dir(host.path(dir)).unwrap());
        let left = files.flatten().any(|entry| entry.file_name().to_string_lossy().contains(old));
        (!left && !host.runtime.pods().iter().any(|uid| uid == old)).then_some(())
    })
    .await;
    assert_eq!(host.runtime.running("same").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn overloaded_server_is_asked_no_sooner_than_it_said() {
    let host = Host::ready().await;
    host.bind("stays", Value::Null);
    host.wait_running("stays").await;
    let from = Instant::now();
    host.cluster.fail("PATCH /apis/coordination", 429, Some(7), 1);
    let refused = until("a refused renewal", SOON, || {
        host.cluster
            .seen_since(from)
            .into_iter()
            .find(|seen| seen.what.starts_with("PATCH /apis/coordination"))
    })
    .await;
    renewed_again(&host).await;
    let soonest = refused.at + Duration::from_secs(7);
    // The lease and the status of the node share a connection, and what was said on it.
    let of_node = |what: &str| what.contains("/leases/") || what.contains("/nodes/");
    let sooner: Vec<_> = host
        .cluster
        .seen_since(refused.at + Duration::from_millis(1))
        .into_iter()
        .filter(|seen| of_node(&seen.what) && seen.at < soonest)
        .collect();
    assert!(sooner.is_empty(), "{sooner:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_refused_with_429_and_500_is_written_in_the_end() {
    let host = Host::ready().await;
    host.cluster.fail("PATCH /api/v1/namespaces/default/pods", 429, Some(1), 2);
    host.cluster.fail("PATCH /api/v1/namespaces/default/pods", 500, None, 2);
    host.bind("told", Value::Null);
    host.wait_running("told").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_killed_while_the_supervisor_is_away_adopts_its_pods_when_it_is_back() {
    let mut host = Host::new(Events::Told).await;
    host.start();
    host.wait_ready().await;
    host.bind("stays", Value::Null);
    let before = host.wait_running("stays").await;
    host.cluster.reach(Reach::Refused);
    host.kill();
    host.start();
    host.line(&["watch of pods broke"]).await;
    let begun = Instant::now();
    host.cluster.reach(Reach::Served);
    until("a new status of the node", SOON, || {
        (host.cluster.count(begun, "PATCH /api/v1/nodes/node-1/status") > 0).then_some(())
    })
    .await;
    let after = host.wait_running("stays").await;
    assert_eq!((id(&before), restarts(&after)), (id(&after), 0));
    assert_eq!(host.runtime.running("stays").len(), 1);
    assert_eq!(host.runtime.pod_cidr(), POD_CIDR);
}

#[tokio::test(flavor = "multi_thread")]
async fn orphan_that_cannot_be_removed_keeps_no_other_from_being_removed() {
    let mut host = Host::ready().await;
    for name in ["a", "b", "c"] {
        host.bind(name, Value::Null);
        host.wait_running(name).await;
    }
    host.kill();
    for name in ["a", "b", "c"] {
        host.cluster.remove(&format!("{PODS}/{name}"));
    }
    // Sandboxes are listed in the order in which they were made.
    for name in ["a", "b"] {
        host.runtime.stick(&host.runtime.running(name)[0]);
    }
    host.start();
    until("the third to go", SOON, || (host.runtime.pods().len() == 2).then_some(())).await;
    assert!(host.runtime.running("c").is_empty());
}
