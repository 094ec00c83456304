//! What a pod in a microVM of its own cannot have is refused with a reason, never half-run.

use crate::shared::{apply_pod, ready_lab};
use atoll_qemu_test::lab::BUSYBOX;

fn refused(name: &str, before: &str, inside: &str, words: &[&str]) -> anyhow::Result<()> {
    let pod = apply_pod(
        &ready_lab(),
        name,
        &format!(
            "{before}  containers:\n  - name: main\n    image: {BUSYBOX}\n    command: [sleep, '1000']\n{inside}"
        ),
    )?;
    pod.wait_phase("Failed")?;
    let message = pod.field("{.status.message}")?;
    let reason = pod.field("{.status.reason}")?;
    assert!(!reason.is_empty(), "no reason; message: {message}");
    for word in words {
        assert!(message.contains(word), "no {word:?} in {message:?}");
    }
    let event = pod.wait_event(&reason)?;
    assert!(words.iter().all(|word| event.contains(word)), "{event}");
    Ok(())
}

#[test]
fn host_network_is_refused() -> anyhow::Result<()> {
    refused("refuse-hostnetwork", "  hostNetwork: true\n", "", &["hostNetwork"])
}

#[test]
fn privileged_is_refused() -> anyhow::Result<()> {
    refused("refuse-privileged", "", "    securityContext: {privileged: true}\n", &["privileged"])
}

#[test]
fn host_path_is_refused() -> anyhow::Result<()> {
    refused(
        "refuse-hostpath",
        "  volumes:\n  - {name: host, hostPath: {path: /etc}}\n",
        "    volumeMounts: [{name: host, mountPath: /host}]\n",
        &["hostPath"],
    )
}

#[test]
fn inline_csi_volume_is_refused() -> anyhow::Result<()> {
    refused(
        "refuse-csi",
        "  volumes:\n  - {name: disk, csi: {driver: example.com}}\n",
        "    volumeMounts: [{name: disk, mountPath: /disk}]\n",
        &["csi"],
    )
}
