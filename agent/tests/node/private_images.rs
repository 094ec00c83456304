//! Images that were pulled with credentials are for those who have them.

use crate::host::{Host, PODS, SOON, until};
use atoll_spec::images::Access;
use serde_json::{Value, json};
use std::time::Instant;

const IMAGE: &str = "r.example/private:1";
const SECRETS: &str = "/api/v1/namespaces/default/secrets";

fn pod(policy: &str, secret: Option<&str>) -> Value {
    let secrets: Vec<Value> = secret.iter().map(|name| json!({ "name": name })).collect();
    let main = json!({"name": "main", "image": IMAGE, "imagePullPolicy": policy});
    json!({"containers": [main], "imagePullSecrets": secrets})
}

/// A secret that is good for the registry, or is not.
fn put_secret(host: &Host, name: &str, password: &str) {
    let config = json!({"auths": {"r.example": {"username": "user", "password": password}}}).to_string();
    let data = json!({".dockerconfigjson": base64(config.as_bytes())});
    host.cluster.put(
        &format!("{SECRETS}/{name}"),
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/dockerconfigjson", "data": data,
            "metadata": { "name": name, "namespace": "default" },
        }),
    );
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

async fn waits_for(host: &Host, name: &str, reasons: &[&str]) -> String {
    until("the pod to say why it waits", SOON, || {
        let pod = host.cluster.get(&format!("{PODS}/{name}"))?;
        let waiting = pod["status"]["containerStatuses"][0]["state"]["waiting"].clone();
        let is = |reason: &&str| waiting["reason"].as_str() == Some(reason);
        reasons.iter().any(is).then(|| waiting["message"].as_str().unwrap_or_default().to_owned())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn image_of_another_pods_secret_is_asked_for_again_with_own_credentials_or_none() {
    let host = Host::ready().await;
    host.runtime.guard("right", Access::default());
    put_secret(&host, "first", "right");
    put_secret(&host, "copy", "right");
    put_secret(&host, "bad", "wrong");
    // Pulled by nobody that the record knows: the first to come has to show what it has, and may then use it.
    let from = Instant::now();
    host.bind("first", pod("IfNotPresent", Some("first")));
    host.wait_running("first").await;
    assert_eq!(host.runtime.count(from, "PullImage"), 1);
    let access = host.runtime.access();
    assert!(!access.everyone && access.secrets.len() == 1 && access.secrets[0].name == "first", "{access:?}");
    let record = serde_json::to_string(&access).unwrap();
    assert!(!record.contains("right") && !record.contains("user"), "{record}");
    // The same secret, and the same credentials in another one, are known.
    for (name, secret) in [("again", "first"), ("copies", "copy")] {
        host.bind(name, pod("IfNotPresent", Some(secret)));
        host.wait_running(name).await;
    }
    assert_eq!(host.runtime.count(from, "PullImage"), 1);
    // Others get what the registry gives them.
    for (name, secret) in [("nothing", None), ("wrong", Some("bad"))] {
        host.bind(name, pod("IfNotPresent", secret));
        let why = waits_for(&host, name, &["ErrImagePull", "ImagePullBackOff"]).await;
        assert!(why.contains("refused access"), "{why}");
        assert!(host.runtime.running(name).is_empty());
    }
    assert_eq!(host.runtime.access(), access);
}

#[tokio::test(flavor = "multi_thread")]
async fn image_that_is_never_pulled_is_for_those_who_have_shown_credentials_alone() {
    let host = Host::ready().await;
    host.runtime.guard("right", Access::default());
    put_secret(&host, "first", "right");
    host.bind("first", pod("IfNotPresent", Some("first")));
    host.wait_running("first").await;
    let from = Instant::now();
    host.bind("known", pod("Never", Some("first")));
    host.wait_running("known").await;
    host.bind("stranger", pod("Never", None));
    let why = waits_for(&host, "stranger", &["ErrImageNeverPull"]).await;
    assert!(why.contains("does not have the proper credentials"), "{why}");
    assert!(host.runtime.running("stranger").is_empty());
    assert_eq!(host.runtime.count(from, "PullImage"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn image_that_everyone_may_have_or_that_was_put_there_is_not_asked_for() {
    let host = Host::ready().await;
    let from = Instant::now();
    host.bind("put", pod("IfNotPresent", None));
    host.wait_running("put").await;
    host.runtime.guard("right", Access { everyone: true, ..Access::default() });
    host.bind("public", pod("Never", None));
    host.wait_running("public").await;
    assert_eq!(host.runtime.count(from, "PullImage"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn container_with_a_private_image_is_restarted_while_its_secret_cannot_be_read() {
    let host = Host::ready().await;
    host.runtime.guard("right", Access::default());
    put_secret(&host, "first", "right");
    host.bind("first", pod("IfNotPresent", Some("first")));
    host.wait_running("first").await;
    host.cluster.remove(&format!("{SECRETS}/first"));
    let from = Instant::now();
    let before = host.runtime.running("first").remove(0);
    host.runtime.exit(&before, 1);
    until("the container to run again", SOON, || {
        host.runtime.running("first").first().is_some_and(|id| *id != before).then_some(())
    })
    .await;
    assert_eq!(host.runtime.count(from, "PullImage"), 0);
}
