//! Containers that misbehave harm themselves only, and leave nothing.

use crate::shared::{POD, Pod, Shared, alone, apply_pod, long, ready_lab, shell_pod};
use anyhow::{Context, bail, ensure};
use atoll_qemu_test::inspect::{Inventory, Process};
use atoll_qemu_test::lab::BUSYBOX;
use atoll_qemu_test::process::{Background, wait_for};
use std::time::{Duration, Instant};

#[test]
fn container_that_ignores_sigterm_is_killed_after_its_grace() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let pod = shell_pod(lab, "ignores", "trap '' TERM; echo deaf; while true; do sleep 1; done", "Never")?;
    wait_for("it to be deaf", POD, || Ok(pod.logs().is_ok_and(|log| log.contains("deaf")).then_some(())))?;
    pod.delete()
}

#[test]
fn container_that_forks_without_end_meets_its_limit_and_harms_itself_alone() -> anyhow::Result<()> {
    // Alone, so that it takes processors from nobody who is timed.
    let lab = &alone();
    // Each child lives on and forks again. The first process needs no other one.
    let script = "bomb() { bomb & bomb & sleep 1000; }; echo lit; bomb & exec sleep 1000000";
    let pod = shell_pod(lab, "forks", script, "Never")?;
    wait_for("the limit of its processes", POD, || {
        Ok(pod.logs().is_ok_and(|log| log.contains("can't fork")).then_some(()))
    })?;
    let other = shell_pod(lab, "beside-forks", "echo fine", "Never")?;
    other.wait_phase("Succeeded")?;
    ensure!(other.logs()? == "fine\n");
    // The guest has room for its own threads: it is looked into like any other.
    let state = wait_for("an exec beside the bomb", POD, || Ok(pod.exec(&["cat", "/proc/loadavg"]).ok()))?;
    let processes: u32 = state.split([' ', '/']).nth(4).and_then(|n| n.parse().ok()).unwrap_or_default();
    ensure!(processes > 200, "not much of a bomb: {state}");
    ensure!(pod.field("{.status.phase}")? == "Running", "it is gone");
    // A grace of three seconds, and not the ten after which a guest that ends nothing loses its machine.
    let begun = Instant::now();
    pod.delete()?;
    ensure!(begun.elapsed() < Duration::from_secs(60), "it took {:?} to go", begun.elapsed());
    Ok(())
}

/// A pod whose only container writes, with limits and volumes as given.
fn writer(lab: &Shared, name: &str, script: &str, limit: &str, volume: &str) -> anyhow::Result<Pod> {
    let script = serde_json::to_string(script)?;
    apply_pod(
        lab,
        name,
        &format!(
            "  restartPolicy: Always
  terminationGracePeriodSeconds: 3
  volumes: [{{name: v, emptyDir: {volume}}}]
  containers:
  - name: main
    image: {BUSYBOX}
    command: [/bin/sh, -c, {script}]
    resources: {{limits: {limit}}}
    volumeMounts: [{{name: v, mountPath: /v}}]
"
        ),
    )
}

fn evicted(pod: &Pod, message: &str) -> anyhow::Result<()> {
    pod.wait_phase("Failed")?;
    let status = (pod.field("{.status.reason}")?, pod.field("{.status.message}")?);
    ensure!(status == ("Evicted".to_owned(), message.to_owned()), "{status:?}");
    ensure!(pod.field("{.status.containerStatuses[0].restartCount}")? == "0", "it was started again");
    ensure!(pod.wait_event("Evicted")?.contains(message));
    Ok(())
}

#[test]
fn container_that_fills_its_writable_layer_gets_no_space_is_evicted_and_harms_itself_alone()
-> anyhow::Result<()> {
    let lab = &ready_lab();
    let free = lab.inspector().inventory()?.data_free;
    // Its disk has 256 MiB, whatever it writes. Most of it is only claimed: that is as full, and sooner.
    let script = "fallocate -l 300M /claimed; dd if=/dev/zero of=/written bs=1M count=1; sleep 1000000";
    let pod = writer(lab, "fills", script, "{ephemeral-storage: 64Mi}", "{}")?;
    // Beside it, one that has no limit: its disk ends at half of DATA, and it goes on after that.
    let script = "fallocate -l 7G /v/x; rm /v/x; dd if=/dev/zero of=/y bs=1M count=8 && sync && echo went on; \
                  sleep 1000000";
    let open = writer(lab, "fills-open", script, "{}", "{}")?;
    // Whether it met the end of its disk before it was looked at, only its log can say.
    evicted(&pod, "Pod ephemeral local storage usage exceeds the total limit of containers 64Mi.")?;
    wait_for("the other one to go on", POD, || {
        Ok(open.logs().is_ok_and(|log| log.contains("went on")).then_some(()))
    })?;
    let log = open.logs()?;
    ensure!(log.contains("No space left on device"), "no disk of a pod is that large: {log}");
    ensure!(open.field("{.status.phase}")? == "Running");
    wait_for("DATA to have the room that it had", POD, || {
        Ok((lab.inspector().inventory()?.data_free + (400 << 20) > free).then_some(()))
    })?;
    let path = "{.status.conditions[?(@.type==\"DiskPressure\")].status}";
    ensure!(lab.supervisor.field("node", "node-1", path)? == "False");
    Ok(())
}

#[test]
fn container_that_fills_its_empty_dir_is_evicted_at_the_size_limit() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let script = "dd if=/dev/zero of=/v/x bs=1M count=24; echo wrote; sleep 1000000";
    let pod = writer(lab, "fills-volume", script, "{}", "{sizeLimit: 8Mi}")?;
    evicted(&pod, "Usage of EmptyDir volume \"v\" exceeds the limit \"8Mi\".")
}

/// Processor time of a pod's microVM and how much of it is allowed in a second, in microseconds.
fn processor(lab: &Shared, pod: &str) -> anyhow::Result<(u64, u64)> {
    let host = lab.inspector();
    let sandboxes = host.inventory()?.sandboxes;
    let id = &sandboxes.iter().find(|s| s.pod == pod).context("no sandbox of that pod")?.id;
    let read = |file: &str| host.read(&format!("/sys/fs/cgroup/atoll/pods/{id}/{file}"));
    let stat = read("cpu.stat")?;
    let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
    let limit = read("cpu.max")?;
    let numbers: Vec<u64> = limit.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [quota, period] = numbers[..] else { bail!("no limit: cpu.max is {limit:?}") };
    Ok((used.context("no usage_usec in cpu.stat")?, quota * 1_000_000 / period))
}

#[test]
fn guest_that_floods_its_devices_pays_for_it_and_harms_itself_alone() -> anyhow::Result<()> {
    // Alone, so that it takes processors from nobody who is timed.
    let lab = &alone();
    // Each write of 512 bytes past the page cache, and each packet, is a notification of a virtqueue.
    let script = "echo flood; for n in 1 2 3; do (while true; do \
                  dd if=/dev/zero of=/f$n bs=512 count=20000 oflag=direct 2>/dev/null; done) & done; \
                  ping -A 169.254.1.1 > /dev/null & wait";
    let pod = shell_pod(lab, "floods", script, "Never")?;
    let other = shell_pod(lab, "beside-floods", "sleep 1000000", "Never")?;
    wait_for("the flood", POD, || Ok(pod.logs().is_ok_and(|log| log.contains("flood")).then_some(())))?;
    other.wait_phase("Running")?;
    let (begun, (before, _)) = (Instant::now(), processor(lab, "floods")?);
    while begun.elapsed() < Duration::from_secs(20) {
        let asked = Instant::now();
        ensure!(other.exec(&["echo", "well"])? == "well\n");
        ensure!(asked.elapsed() < Duration::from_secs(30), "an exec beside it took {:?}", asked.elapsed());
    }
    let (after, allowed) = processor(lab, "floods")?;
    let seconds = begun.elapsed().as_secs_f64();
    let used = (after - before) as f64 / seconds;
    println!("the flood took {:.2} of a processor, allowed are {:.2}", used / 1e6, allowed as f64 / 1e6);
    ensure!(used > 100_000.0, "not much of a flood: {used} us in a second");
    // A period is accounted for at its end.
    ensure!(used < allowed as f64 * 1.1, "{used} us in a second, allowed are {allowed}");
    ensure!(
        lab.supervisor.field("node", "node-1", "{.status.conditions[?(@.type==\"Ready\")].status}")?
            == "True"
    );
    pod.delete()
}

#[test]
fn log_without_line_ends_is_rotated() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let mib = if long() { 1024 } else { 48 };
    let script = format!("head -c {mib}M /dev/zero | tr '\\0' x; echo; echo end; sleep 1000000");
    let pod = shell_pod(lab, "gigabyte", &script, "Never")?;
    pod.wait_phase("Running")?;
    let uid = pod.field("{.metadata.uid}")?;
    let most = Duration::from_secs(if long() { 1800 } else { 240 });
    wait_for("the last line", most, || {
        Ok(lab
            .supervisor
            .kubectl(&["logs", "gigabyte", "--tail=1"])
            .is_ok_and(|out| out.stdout == "end\n")
            .then_some(()))
    })?;
    // 10 MiB each, five of them, and what is written between two looks.
    let directory = format!("/data/log/pods/default_gigabyte_{uid}/main");
    let files = lab.inspector().sizes(&directory)?;
    let total: u64 = files.values().sum();
    ensure!(files.len() <= 6 && total < 128 << 20, "{files:?}");
    Ok(())
}

#[test]
fn exec_into_a_dead_container_says_so() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let pod = shell_pod(lab, "dead", "true", "Never")?;
    pod.wait_phase("Succeeded")?;
    let output = lab.supervisor.kubectl(&["exec", "dead", "--", "true"])?;
    ensure!(output.code != 0 && !output.stderr.trim().is_empty(), "{output:?}");
    Ok(())
}

/// Descriptors and threads of the services that carry an exec.
fn load(inventory: &Inventory) -> Vec<(String, u64, u64)> {
    let of = |process: &Process| (process.name.clone(), process.descriptors, process.threads);
    let carriers = ["atoll-agent", "atoll-runtime"];
    inventory.processes.iter().filter(|p| carriers.contains(&p.name.as_str())).map(of).collect()
}

#[test]
fn client_that_disappears_from_its_exec_leaves_no_process() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let pod = shell_pod(lab, "disappears", "sleep 1000000", "Never")?;
    pod.wait_phase("Running")?;
    let mut exec = Background::spawn(
        "kubectl exec",
        &mut lab.supervisor.kubectl_command(&[
            "exec",
            "-i",
            "disappears",
            "--",
            "sh",
            "-c",
            "touch /tmp/here; exec sleep 4711",
        ]),
        &lab.directory().join("disappears.log"),
    )?;
    let running = || Ok::<_, anyhow::Error>(pod.exec(&["ps"])?.contains("sleep 4711"));
    wait_for("the exec to run", POD, || Ok(running()?.then_some(())))?;
    exec.kill();
    wait_for("its process to end", POD, || Ok((!running()?).then_some(())))
}

#[test]
fn many_execs_in_a_row_leak_nothing() -> anyhow::Result<()> {
    let lab = &alone();
    let pod = shell_pod(lab, "execs", "sleep 1000000", "Never")?;
    pod.wait_phase("Running")?;
    let host = lab.inspector();
    let round = |count: u32| (0..count).try_for_each(|_| pod.exec(&["true"]).map(drop));
    // What is made once, as connections that are kept, is made by the first ones.
    round(5)?;
    let before = load(&host.inventory()?);
    round(if long() { 200 } else { 20 })?;
    wait_for("descriptors and threads to be as before", POD, || {
        let now = load(&host.inventory()?);
        let same = before.iter().zip(&now).all(|(b, n)| n.1 <= b.1 + 3 && n.2 <= b.2 + 2);
        Ok((same && before.len() == now.len()).then_some(()))
    })?;
    ensure!(pod.exec(&["ps"])?.lines().count() <= 4, "processes are left in the guest");
    Ok(())
}
