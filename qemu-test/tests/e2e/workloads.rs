//! Controllers above pods, and pods that talk to each other and to the API server.

use crate::shared::{POD, apply_pod, ready_lab};
use atoll_qemu_test::lab::BUSYBOX;
use atoll_qemu_test::oci::{Image, Layer};
use atoll_qemu_test::process::{run_ok, wait_for};
use serde_json::json;
use std::process::Command;
use std::time::Duration;

#[test]
fn deployment_of_five_replicas() -> anyhow::Result<()> {
    let lab = &ready_lab();
    lab.supervisor.apply(&format!(
        "apiVersion: apps/v1
kind: Deployment
metadata: {{name: five}}
spec:
  replicas: 5
  selector: {{matchLabels: {{app: five}}}}
  template:
    metadata: {{labels: {{app: five}}}}
    spec:
      nodeSelector: {{kubernetes.io/hostname: node-1}}
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: {BUSYBOX}
        command: [sleep, '1000000']
"
    ))?;
    lab.supervisor.wait_field(
        "deployment",
        "five",
        "{.status.readyReplicas}",
        "5",
        Duration::from_secs(300),
    )?;
    let ips = lab.supervisor.kubectl_ok(&[
        "get",
        "pods",
        "-l",
        "app=five",
        "-o",
        "jsonpath={.items[*].status.podIP}",
    ])?;
    let mut ips: Vec<&str> = ips.split(' ').collect();
    ips.sort_unstable();
    ips.dedup();
    assert_eq!(ips.len(), 5, "{ips:?}");
    lab.supervisor.kubectl_ok(&["delete", "deployment", "five", "--wait=false"])?;
    wait_for("all five to go", POD, || {
        Ok(lab
            .supervisor
            .kubectl_ok(&["get", "pods", "-l", "app=five", "-o", "name"])?
            .is_empty()
            .then_some(()))
    })
}

#[test]
fn job_completes() -> anyhow::Result<()> {
    let lab = &ready_lab();
    lab.supervisor.apply(&format!(
        "apiVersion: batch/v1
kind: Job
metadata: {{name: sum}}
spec:
  template:
    spec:
      nodeSelector: {{kubernetes.io/hostname: node-1}}
      restartPolicy: Never
      containers:
      - name: main
        image: {BUSYBOX}
        command: [/bin/sh, -c, 'echo $((6 * 7))']
"
    ))?;
    lab.supervisor.wait_field("job", "sum", "{.status.succeeded}", "1", POD)?;
    assert_eq!(lab.supervisor.kubectl_ok(&["logs", "job/sum"])?, "42\n");
    lab.supervisor.kubectl_ok(&["delete", "job", "sum", "--wait=false"]).map(drop)
}

/// An image with this machine's curl and the libraries it needs.
fn curl_image() -> anyhow::Result<Image> {
    let mut layer = Layer::default();
    let list = run_ok(Command::new("ldd").arg("/usr/bin/curl"), Duration::from_secs(10))?;
    let libraries = list.split_whitespace().filter(|word| word.starts_with('/'));
    for path in ["/usr/bin/curl"].into_iter().chain(libraries) {
        layer = layer.file(path.trim_start_matches('/'), 0o755, &std::fs::read(path)?)?;
    }
    Image::new(vec![layer], json!({ "Entrypoint": ["/usr/bin/curl"] }))
}

#[test]
fn pod_reads_a_secret_and_calls_the_api_server() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let supervisor = &lab.supervisor;
    lab.registry.push("curl", "1", &curl_image()?)?;
    supervisor
        .apply("apiVersion: v1\nkind: Secret\nmetadata: {name: caller-secret}\nstringData: {who: atoll}\n")?;
    supervisor.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {name: view}\nroleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}\nsubjects: [{kind: ServiceAccount, name: default, namespace: default}]\n",
    )?;
    let pod = apply_pod(
        lab,
        "caller",
        &format!(
            "  restartPolicy: Never
  volumes:
  - {{name: secret, secret: {{secretName: caller-secret}}}}
  - {{name: work, emptyDir: {{}}}}
  initContainers:
  - name: header
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'cat /secret/who; printf \"Authorization: Bearer %s\" \"$(cat /var/run/secrets/kubernetes.io/serviceaccount/token)\" > /work/header; printf \"url = https://%s:%s/api/v1/namespaces/default/pods/caller\" $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT > /work/url']
    volumeMounts: [{{name: secret, mountPath: /secret}}, {{name: work, mountPath: /work}}]
  containers:
  - name: main
    image: registry.lab:5000/curl:1
    args: [-sS, --fail, --http1.1, --max-time, '60', --retry, '5', --retry-all-errors, --cacert, /var/run/secrets/kubernetes.io/serviceaccount/ca.crt, -H, '@/work/header', -K, /work/url]
    volumeMounts: [{{name: work, mountPath: /work}}]
"
        ),
    )?;
    pod.wait_phase("Succeeded")?;
    assert_eq!(supervisor.kubectl_ok(&["logs", "caller", "-c", "header"])?.trim_end(), "atoll");
    let log = supervisor.kubectl_ok(&["logs", "caller", "-c", "main"])?;
    assert!(log.contains("\"name\": \"caller\""), "{log}");
    Ok(())
}

#[test]
fn pods_reach_each_other_and_the_host_reaches_them() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let server = crate::shared::shell_pod(
        lab,
        "net-server",
        "mkdir /www; echo reached > /www/index.html; exec httpd -f -p 8080 -h /www",
        "Never",
    )?;
    server.wait_phase("Running")?;
    let ip = server.field("{.status.podIP}")?;
    let client = crate::shared::shell_pod(
        lab,
        "net-client",
        &format!(
            "for i in 1 2 3 4 5 6 7 8 9 10; do wget -q -O - http://{ip}:8080/ && break; sleep 1; done; cat /etc/resolv.conf /etc/hosts; hostname"
        ),
        "Never",
    )?;
    client.wait_phase("Succeeded")?;
    let log = client.logs()?;
    assert!(log.starts_with("reached\n"), "{log}");
    assert!(log.contains("nameserver 10.77.0.1") && log.contains("net-client"), "{log}");
    Ok(())
}
