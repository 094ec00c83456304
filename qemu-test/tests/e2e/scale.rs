//! Many pods at once, and pods that take all memory there is.

use crate::shared::{Shared, alone, apply_pod, long, shell_pod};
use anyhow::ensure;
use atoll_qemu_test::inspect::{Inventory, rules};
use atoll_qemu_test::lab::BUSYBOX;
use atoll_qemu_test::process::wait_for;
use std::collections::BTreeMap;
use std::time::Duration;

const ROUND: Duration = Duration::from_secs(900);

/// Resident memory of the services, KiB.
fn resident(inventory: &Inventory) -> BTreeMap<String, u64> {
    let services = inventory.processes.iter().filter(|p| p.cgroup.starts_with("services/") || p.pid == 1);
    services.map(|p| (p.name.clone(), p.resident_kib)).collect()
}

/// `count` pods, all Running, all deleted; prints what one costs.
fn round(lab: &Shared, number: u32, count: u64) -> anyhow::Result<()> {
    let host = lab.inspector();
    let before = host.inventory()?;
    let started = std::time::Instant::now();
    lab.supervisor.apply(&format!(
        "apiVersion: apps/v1
kind: ReplicaSet
metadata: {{name: many}}
spec:
  replicas: {count}
  selector: {{matchLabels: {{app: many}}}}
  template:
    metadata: {{labels: {{app: many}}}}
    spec:
      nodeSelector: {{kubernetes.io/hostname: node-1}}
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: {BUSYBOX}
        command: [sleep, '1000000']
"
    ))?;
    lab.supervisor.wait_field("replicaset", "many", "{.status.readyReplicas}", &count.to_string(), ROUND)?;
    let up = started.elapsed();
    let full = host.inventory()?;
    let machines: Vec<_> = full.processes.iter().filter(|p| p.name == "atoll-vmm").collect();
    let private: u64 = machines.iter().map(|p| p.private_kib).sum();
    let taken = before.memory_available_kib.saturating_sub(full.memory_available_kib);
    println!(
        "round {number}: {count} pods Running in {:.0} s; per pod {} KiB of the VMM's own, {} KiB in all; services {:?}",
        up.as_secs_f64(),
        private / count,
        taken / count,
        resident(&full),
    );
    ensure!(machines.len() as u64 == count, "{} VMMs for {count} pods", machines.len());
    lab.supervisor.kubectl_ok(&["delete", "replicaset", "many", "--wait=false"])?;
    wait_for("all of them to go", ROUND, || {
        let left = lab.supervisor.kubectl_ok(&["get", "pods", "-l", "app=many", "-o", "name"])?;
        Ok((left.is_empty() && host.inventory()?.sandboxes.is_empty()).then_some(()))
    })?;
    host.nothing_leaked()
}

#[test]
fn rounds_of_many_pods_leave_the_host_as_it_was() -> anyhow::Result<()> {
    let lab = &alone();
    let host = lab.inspector();
    wait_for("the pods of other tests to go", ROUND, || {
        Ok(host.inventory()?.sandboxes.is_empty().then_some(()))
    })?;
    let count = if long() { 40 } else { 8 };
    round(lab, 1, count)?;
    let first = host.inventory()?;
    let rounds = if long() { 3 } else { 2 };
    for number in 2..=rounds {
        round(lab, number, count)?;
    }
    let last = host.inventory()?;
    let left = rules::beyond(&first, &last);
    ensure!(left.is_empty(), "after the last round there is more than after the first: {left:#?}");
    for (name, was) in resident(&first) {
        let is = resident(&last).get(&name).copied().unwrap_or(0);
        ensure!(is <= was + was / 5 + 1024, "{name} grew from {was} to {is} KiB");
    }
    Ok(())
}

#[test]
#[ignore = "QEMU's emulation of nested guests panics the host's kernel under this: ./just soak runs it"]
fn memory_exhausted_by_pods_never_takes_the_host_plane() -> anyhow::Result<()> {
    let lab = &alone();
    let host = lab.inspector();
    let plane = |inventory: &Inventory| -> BTreeMap<String, i32> {
        let services =
            inventory.processes.iter().filter(|p| p.parent == 1 && p.cgroup.starts_with("services/"));
        services.map(|p| (p.name.clone(), p.pid)).collect()
    };
    let before = plane(&host.inventory()?);
    // Together they want more than the host has; each guest may have what it wants.
    let pods = (0..4)
        .map(|number| {
            apply_pod(
                lab,
                &format!("hog-{number}"),
                &format!(
                    "  restartPolicy: Never
  containers:
  - name: main
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'mount -t tmpfs none /mnt 2>/dev/null; head -c 1400m /dev/zero > /dev/shm/a; x=a; while true; do x=$x$x; done']
    resources: {{limits: {{memory: 1500Mi}}, requests: {{memory: 16Mi}}}}
"
                ),
            )
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    for pod in &pods {
        wait_for("each of them to end", ROUND, || {
            let phase = pod.field("{.status.phase}")?;
            Ok((phase == "Failed").then_some(()))
        })?;
    }
    ensure!(plane(&host.inventory()?) == before, "a service of the host died");
    lab.supervisor.wait_node_ready("node-1", Duration::from_secs(60))?;
    let after = shell_pod(lab, "after-hogs", "echo fine", "Never")?;
    after.wait_phase("Succeeded")
}
