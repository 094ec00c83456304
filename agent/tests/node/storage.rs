//! Pods that keep more on disk than they may are evicted, and others are not looked at.

use crate::host::{Host, PODS, SOON, until};
use serde_json::{Value, json};
use std::time::Instant;

const MIB: u64 = 1 << 20;

fn limited(limit: Option<&str>, volumes: Value) -> Value {
    let limits = limit.map_or(json!({}), |limit| json!({"limits": {"ephemeral-storage": limit}}));
    let main = json!({"name": "main", "image": "image:1", "resources": limits});
    json!({"containers": [main], "volumes": volumes})
}

async fn evicted(host: &Host, name: &str, message: &str) {
    let status = until("the pod to be evicted", SOON, || {
        let pod = host.cluster.get(&format!("{PODS}/{name}"))?;
        (pod["status"]["phase"] == "Failed").then(|| pod["status"].clone())
    })
    .await;
    assert_eq!((status["reason"].as_str(), status["message"].as_str()), (Some("Evicted"), Some(message)));
    assert!(host.runtime.running(name).is_empty());
    until("an event that says so", SOON, || {
        let events = host.cluster.objects("/api/v1/namespaces/default/events/");
        events.iter().any(|e| e["reason"] == "Evicted" && e["message"] == message).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_that_writes_more_than_its_limit_is_evicted_and_not_started_again() {
    let host = Host::ready().await;
    host.bind("writes", limited(Some("64Mi"), json!([])));
    host.wait_running("writes").await;
    let main = host.runtime.running("writes").remove(0);
    host.runtime.writes(&main, 64 * MIB + 1);
    evicted(&host, "writes", "Pod ephemeral local storage usage exceeds the total limit of containers 64Mi.")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_whose_log_is_larger_than_its_limit_is_evicted() {
    let host = Host::ready().await;
    host.bind("logs", limited(Some("1Mi"), json!([])));
    host.wait_running("logs").await;
    let main = host.runtime.running("logs").remove(0);
    std::fs::write(host.runtime.log(&main), vec![b'x'; 2 << 20]).unwrap();
    evicted(&host, "logs", "Pod ephemeral local storage usage exceeds the total limit of containers 1Mi.")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_that_fills_its_empty_dir_beyond_the_limit_is_evicted() {
    let host = Host::ready().await;
    host.bind("stores", limited(None, json!([{"name": "v", "emptyDir": {"sizeLimit": "8Mi"}}])));
    host.wait_running("stores").await;
    let main = host.runtime.running("stores").remove(0);
    host.runtime.stores(&main, 9 * MIB);
    evicted(&host, "stores", "Usage of EmptyDir volume \"v\" exceeds the limit \"8Mi\".").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_without_limits_may_write_and_is_not_looked_at() {
    let host = Host::ready().await;
    let from = Instant::now();
    host.bind("open", limited(None, json!([{"name": "v", "emptyDir": {}}])));
    host.bind("within", limited(Some("64Mi"), json!([])));
    for name in ["open", "within"] {
        host.wait_running(name).await;
    }
    host.runtime.writes(&host.runtime.running("open")[0], 1 << 40);
    // Its log counts too.
    host.runtime.writes(&host.runtime.running("within")[0], 63 * MIB);
    until("two looks at the one with a limit", SOON, || {
        (host.runtime.count(from, "PodSandboxStats") >= 2).then_some(())
    })
    .await;
    for name in ["open", "within"] {
        assert_eq!(host.runtime.running(name).len(), 1, "{name} was ended");
    }
}

/// Files below this directory that have these bytes in them.
fn holders(directory: &std::path::Path, what: &str) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let each = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => holders(&entry.path(), what),
        Ok(kind) if kind.is_file() => {
            let content = std::fs::read(entry.path()).unwrap_or_default();
            if String::from_utf8_lossy(&content).contains(what) { vec![entry.path()] } else { Vec::new() }
        }
        _ => Vec::new(),
    });
    each.flatten().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_lie_in_memory_alone_are_kept_by_a_restart_and_made_anew_after_a_boot() {
    const SAYS: &str = "hunter2";
    let mut host = Host::ready().await;
    host.cluster.put(
        "/api/v1/namespaces/default/secrets/s",
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "default"},
               "data": {"password": "aHVudGVyMg=="}}),
    );
    let more = json!({
        "containers": [{"name": "main", "image": "image:1",
            "env": [{"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "s", "key": "password"}}}],
            "volumeMounts": [{"name": "s", "mountPath": "/s"}, {"name": "p", "mountPath": "/p"}]}],
        "volumes": [{"name": "s", "secret": {"secretName": "s"}},
                    {"name": "p", "projected": {"sources": [{"secret": {"name": "s"}}]}}, {"name": "e", "emptyDir": {}}],
    });
    host.bind("discreet", more);
    let before = host.wait_running("discreet").await;
    let uid = before["metadata"]["uid"].as_str().unwrap().to_owned();
    let on_disk = |host: &Host| {
        ["pods", "logs", "state"].iter().flat_map(|dir| holders(&host.path(dir), SAYS)).collect::<Vec<_>>()
    };
    assert_eq!(on_disk(&host), [""; 0].map(std::path::PathBuf::from));
    let in_memory = holders(&host.path("volumes"), SAYS);
    assert_eq!(in_memory.len(), 2, "{in_memory:?}");
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(host.path("volumes").join(&uid)).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o700, "nobody else looks in");

    host.kill();
    let renewed = host.renewed();
    host.start();
    until("the agent to be back", SOON, || (host.renewed() != renewed).then_some(())).await;
    assert_eq!(holders(&host.path("volumes"), SAYS), in_memory, "the same files, not written again");

    host.kill();
    host.runtime.lose_power();
    std::fs::remove_dir_all(host.path("volumes")).unwrap();
    host.start();
    until("the pod to run again", SOON, || (!host.runtime.running("discreet").is_empty()).then_some(()))
        .await;
    assert_eq!(holders(&host.path("volumes"), SAYS).len(), 2);
    assert_eq!(on_disk(&host), [""; 0].map(std::path::PathBuf::from));

    host.cluster.remove(&format!("{PODS}/discreet"));
    until("nothing of it to be left", SOON, || (!host.path("volumes").join(&uid).exists()).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volume_that_cannot_be_written_keeps_no_other_from_being_brought_up_to_date() {
    const SAYS: &str = "hunter2";
    let host = Host::ready().await;
    host.cluster.put(
        "/api/v1/namespaces/default/secrets/s",
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "default"},
               "data": {"password": "aHVudGVyMg=="}}),
    );
    host.bind(
        "half",
        json!({"containers": [{"name": "main", "image": "image:1"}],
               "volumes": [{"name": "gone", "configMap": {"name": "gone"}}, {"name": "s", "secret": {"secretName": "s"}}]}),
    );
    until("the volume behind it to be written", SOON, || {
        (!holders(&host.path("volumes"), SAYS).is_empty()).then_some(())
    })
    .await;
    assert!(host.runtime.running("half").is_empty(), "it has not all that it asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn log_whose_rotation_was_cut_short_is_opened_anew() {
    let host = Host::ready().await;
    host.bind("logs", limited(None, json!([])));
    host.wait_running("logs").await;
    let log = host.runtime.log(&host.runtime.running("logs").remove(0));
    let renamed = format!("{log}.20260101-000000");
    std::fs::write(&log, "2026-01-01T00:00:00Z stdout F one\n").unwrap();
    std::fs::rename(&log, &renamed).unwrap();
    until("the log to be there again", SOON, || std::path::Path::new(&log).exists().then_some(())).await;
    assert!(std::path::Path::new(&renamed).exists());
}
