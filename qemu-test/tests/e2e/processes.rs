//! Any process of a host may die or hang at any step of a pod's life: no pod runs twice, none is lost, nothing is left.

use crate::shared::{POD, Pod, Shared, alone, long, shell_pod};
use anyhow::{Context, ensure};
use atoll_qemu_test::inspect::{Step, Target};
use atoll_qemu_test::process::{Background, wait_for};
use std::time::Duration;

const KILL: i32 = 9;
const CONT: i32 = 18;
const STOP: i32 = 19;

/// Steps on the way up, in their order.
const UP: [Step; 4] = [Step::Launching, Step::Launched, Step::Created, Step::Running];
/// Steps on the way down that last long enough to be met.
const DOWN: [Step; 1] = [Step::Stopping];

fn service(name: &str) -> Target {
    Target::Service(name.to_owned())
}

/// A pod that says once for each run of its container that it ran.
fn talker(lab: &Shared, name: &str) -> anyhow::Result<Pod> {
    shell_pod(lab, name, "echo ran; sleep 1000000", "Always")
}

/// The pod runs, in one sandbox, and its container has run just as often as its status says.
fn runs_once(lab: &Shared, pod: &Pod) -> anyhow::Result<()> {
    pod.wait_field("{.status.conditions[?(@.type==\"Ready\")].status}", "True")?;
    let up = |phase: &str| ["launching", "ready"].contains(&phase);
    wait_for("one sandbox with a microVM", POD, || {
        let sandboxes = lab.inspector().inventory()?.sandboxes;
        let count = sandboxes.iter().filter(|s| s.pod == pod.name && up(&s.phase)).count();
        ensure!(count < 2, "{} has {count} sandboxes at once: {sandboxes:?}", pod.name);
        Ok((count == 1).then_some(()))
    })?;
    wait_for("the container's one line", POD, || {
        let log = pod.logs()?;
        ensure!(log.is_empty() || log == "ran\n", "the container of {} said {log:?}", pod.name);
        Ok((!log.is_empty()).then_some(()))
    })
}

/// Sends `signal` to `target` while the pod is at `step` of its way up, and sees it through.
fn survives_on_the_way_up(
    lab: &Shared,
    target: &Target,
    signal: i32,
    step: Step,
    name: &str,
) -> anyhow::Result<()> {
    let host = lab.inspector();
    let pod = talker(lab, name)?;
    host.at(name, step, POD, Some((target.clone(), signal)))?;
    resume(lab, target, signal)?;
    if matches!((target, signal), (Target::Vmm(_), KILL)) {
        // What the API says is of the life before, until the agent has seen its end.
        host.at(name, Step::Launching, POD, None)?;
        pod.wait_field("{.status.conditions[?(@.type==\"Ready\")].status}", "False")?;
    }
    runs_once(lab, &pod)?;
    let restarts = pod.field("{.status.containerStatuses[0].restartCount}")?;
    // A container that was made and not started is made anew, which counts, here as in every Kubernetes node.
    if !matches!(target, Target::Vmm(_)) && !matches!(step, Step::Created) {
        ensure!(restarts == "0", "{name} was restarted {restarts} times although its microVM lived");
    }
    pod.delete()?;
    host.at(name, Step::Removed, POD, None)?;
    host.nothing_leaked()
}

/// Sends `signal` to `target` while the pod is at `step` of its way down, and sees it go.
fn goes_in_spite(lab: &Shared, target: &Target, signal: i32, step: Step, name: &str) -> anyhow::Result<()> {
    let host = lab.inspector();
    let pod = talker(lab, name)?;
    pod.wait_phase("Running")?;
    let mut delete = Background::spawn(
        "kubectl delete",
        &mut lab.supervisor.kubectl_command(&["delete", "pod", name]),
        &lab.directory().join("delete.log"),
    )?;
    host.at(name, step, POD, Some((target.clone(), signal)))?;
    resume(lab, target, signal)?;
    let status = delete.wait(POD)?;
    ensure!(status.success(), "kubectl delete ended with {status}");
    host.at(name, Step::Removed, POD, None)?;
    host.nothing_leaked()
}

/// What was stopped goes on after a minute.
fn resume(lab: &Shared, target: &Target, signal: i32) -> anyhow::Result<()> {
    if signal == STOP {
        let minute = std::time::Instant::now() + Duration::from_secs(60);
        wait_for("a minute to pass", Duration::from_secs(61), || {
            Ok((std::time::Instant::now() >= minute).then_some(()))
        })?;
        // PID 1 may have put a fresh process in its place meanwhile, or be about to: then there is nothing to resume.
        let _ = lab.inspector().signal(target.clone(), CONT);
    }
    Ok(())
}

/// The whole table for one target: every step up and down.
fn at_every_step(target: impl Fn(&str) -> Target, signal: i32, word: &str) -> anyhow::Result<()> {
    let lab = &alone();
    for step in UP {
        let name = format!("{word}-{step:?}").to_lowercase();
        survives_on_the_way_up(lab, &target(&name), signal, step, &name)
            .with_context(|| format!("signal {signal} to {:?} at {step:?}", target(&name)))?;
    }
    for step in DOWN {
        let name = format!("{word}-{step:?}").to_lowercase();
        goes_in_spite(lab, &target(&name), signal, step, &name)
            .with_context(|| format!("signal {signal} to {:?} at {step:?}", target(&name)))?;
    }
    Ok(())
}

#[test]
fn killed_agent_at_every_step() -> anyhow::Result<()> {
    at_every_step(|_| service("agent"), KILL, "kill-agent")
}

#[test]
fn killed_runtime_at_every_step() -> anyhow::Result<()> {
    at_every_step(|_| service("runtime"), KILL, "kill-runtime")
}

#[test]
#[ignore = "takes minutes: ./just soak runs it"]
fn killed_hostd_at_every_step() -> anyhow::Result<()> {
    at_every_step(|_| service("hostd"), KILL, "kill-hostd")
}

#[test]
#[ignore = "takes minutes: ./just soak runs it"]
fn killed_vmm_at_every_step_up() -> anyhow::Result<()> {
    let lab = &alone();
    for step in UP {
        let name = format!("kill-vmm-{step:?}").to_lowercase();
        survives_on_the_way_up(lab, &Target::Vmm(name.clone()), KILL, step, &name)
            .with_context(|| format!("VMM killed at {step:?}"))?;
    }
    Ok(())
}

#[test]
fn dead_vm_is_seen_within_two_seconds() -> anyhow::Result<()> {
    let lab = &alone();
    let pod = talker(lab, "dead-vm")?;
    pod.wait_phase("Running")?;
    let host = lab.inspector();
    let killed = host.signal(Target::Vmm("dead-vm".into()), KILL)?;
    let seen = host.at("dead-vm", Step::Stopped, POD, None)?;
    ensure!(seen - killed <= 2000, "the runtime saw it after {} ms", seen - killed);
    pod.wait_field("{.status.containerStatuses[0].restartCount}", "1")?;
    runs_once(lab, &pod)
}

#[test]
fn job_runs_once_although_everything_is_killed() -> anyhow::Result<()> {
    let lab = &alone();
    for name in ["agent", "runtime", "hostd"] {
        let job = format!("once-{name}");
        let pod = shell_pod(lab, &job, "echo ran; sleep 2; echo done", "Never")?;
        lab.inspector().at(&job, Step::Running, POD, Some((service(name), KILL)))?;
        pod.wait_phase("Succeeded")?;
        assert_eq!(pod.logs()?, "ran\ndone\n", "of {job}");
        assert_eq!(pod.field("{.status.containerStatuses[0].restartCount}")?, "0");
    }
    Ok(())
}

/// A minute each: all steps in the soak, the running pod in the short form.
fn stopped_for_a_minute(target: impl Fn(&str) -> Target, word: &str) -> anyhow::Result<()> {
    if long() {
        return at_every_step(target, STOP, word);
    }
    let lab = &alone();
    survives_on_the_way_up(lab, &target(word), STOP, Step::Running, word)
}

#[test]
#[ignore = "takes minutes: ./just soak runs it"]
fn stopped_runtime_for_a_minute() -> anyhow::Result<()> {
    stopped_for_a_minute(|_| service("runtime"), "stop-runtime")
}

#[test]
#[ignore = "takes minutes: ./just soak runs it"]
fn stopped_agent_for_a_minute() -> anyhow::Result<()> {
    stopped_for_a_minute(|_| service("agent"), "stop-agent")
}

#[test]
#[ignore = "takes minutes: ./just soak runs it"]
fn stopped_hostd_for_a_minute() -> anyhow::Result<()> {
    stopped_for_a_minute(|_| service("hostd"), "stop-hostd")
}

#[test]
#[ignore = "takes minutes: ./just soak runs it"]
fn stopped_vmm_for_a_minute() -> anyhow::Result<()> {
    let lab = &alone();
    survives_on_the_way_up(lab, &Target::Vmm("stop-vmm".into()), STOP, Step::Running, "stop-vmm")
}
