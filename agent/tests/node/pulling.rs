//! Images that cannot be had: what a pod shows of them.

use crate::host::{Host, PODS, SOON, until};
use crate::runtime::BAD_IMAGE;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn image_that_cannot_be_pulled_is_named_with_the_cause_whatever_the_state() {
    let host = Host::ready().await;
    let image = format!("{BAD_IMAGE}:1");
    host.bind("waits", json!({ "containers": [{ "name": "main", "image": image }] }));
    let cause = "cannot unpack layer sha256:1: it is cut short";
    // The runtime's words alone would not say which image it is.
    for (reason, message) in [
        ("ErrImagePull", format!("Failed to pull image \"{image}\": {cause}")),
        ("ImagePullBackOff", format!("Back-off pulling image \"{image}\": ErrImagePull: {cause}")),
    ] {
        // Shown for 2 s at each try, and there are several.
        until(reason, SOON, || {
            let pod = host.cluster.get(&format!("{PODS}/waits"))?;
            let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
            (waiting["reason"] == reason && waiting["message"] == message.as_str()).then_some(())
        })
        .await;
    }
}
