//! Many pods at once, and pods that take all memory there is.

use crate::own::{apply_script, own_host, power_off};
use crate::shared::{POD, Shared, alone, long};
use anyhow::ensure;
use atoll_qemu_test::artifacts::Profile;
use atoll_qemu_test::inspect::{Inspector, Inventory, rules};
use atoll_qemu_test::lab::{BUSYBOX, node_name};
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::process::wait_for;
use std::collections::BTreeMap;
use std::time::Duration;

const ROUND: Duration = Duration::from_secs(900);
/// The host with less memory than its pods want.
const SMALL: usize = 8;

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
fn memory_exhausted_by_pods_never_takes_the_host_plane() -> anyhow::Result<()> {
    let (_turn, artifacts, lab) = own_host(SMALL);
    let mut spec = lab.machine_spec(artifacts, Profile::Test, SMALL, Some(lab.machine_config(SMALL)?));
    spec.memory_mib = 1536;
    let mut machine = Machine::boot(spec)?;
    lab.wait_ready(&mut machine, SMALL)?;
    let host = Inspector::new(&machine.address())?;
    let plane = || -> anyhow::Result<BTreeMap<String, i32>> {
        let inventory = host.inventory()?;
        let services =
            inventory.processes.iter().filter(|p| p.parent == 1 && p.cgroup.starts_with("services/"));
        Ok(services.map(|p| (p.name.clone(), p.pid)).collect())
    };
    let before = plane()?;
    // Together they want more than the host has; each guest may have what it wants.
    let node = node_name(SMALL);
    let names = ["hog-0", "hog-1", "hog-2"];
    for name in names {
        lab.supervisor.apply(&format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: hog}}}}
spec:
  nodeName: {node}
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'dd if=/dev/zero of=/memory/taken bs=1M count=600; sleep 1000000']
    resources: {{limits: {{memory: 900Mi}}, requests: {{memory: 16Mi}}}}
    volumeMounts: [{{name: memory, mountPath: /memory}}]
  volumes: [{{name: memory, emptyDir: {{medium: Memory}}}}]
"
        ))?;
    }
    machine.serial.expect("a virtual machine ended by itself", 0, ROUND)?;
    wait_for("a pod to fail of it", POD, || {
        let phases = lab.supervisor.kubectl_ok(&["get", "pods", "-l", "app=hog"])?;
        Ok(phases.contains("Error").then_some(()))
    })?;
    ensure!(plane()? == before, "a service of the host died");
    lab.supervisor.kubectl_ok(&["delete", "pods", "-l", "app=hog", "--wait=false"])?;
    lab.supervisor.wait_node_ready(&node, Duration::from_secs(60))?;
    apply_script(lab, SMALL, "after-hogs", (BUSYBOX, "echo fine"), "Never")?;
    lab.supervisor.wait_field("pod", "after-hogs", "{.status.phase}", "Succeeded", POD)?;
    power_off(&mut machine)
}
