//! Power cut at any moment: QEMU is killed where it stands and booted again, and everything is right.

use crate::own::{STAYS, apply_script, console, own_host, power_off};
use crate::shared::long;
use anyhow::{Context, ensure};
use atoll_qemu_test::artifacts::Profile;
use atoll_qemu_test::inspect::{Inspector, Step};
use atoll_qemu_test::lab::{BUSYBOX, Lab, node_name};
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::oci::Image;
use atoll_qemu_test::process::wait_for;
use std::time::Duration;

const INDEX: usize = 5;
const POD: &str = "cut";
const DEADLINE: Duration = Duration::from_secs(300);

/// When the power goes.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// This long after power-on: firmware, boot phases, join.
    Boot(Duration),
    /// When the pod is at a step.
    Step(Step),
    /// This long after its deletion was asked for.
    Delete(Duration),
}

/// Moments in an order that differs from seed to seed; every kind comes up within a few.
fn moment(random: &mut u64) -> Moment {
    // Xorshift (Marsaglia 2003): enough to scatter, and the same again from the same seed.
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    let pick = *random >> 33;
    let span = |most_ms: u64| Duration::from_millis((*random >> 11) % most_ms);
    match pick % 7 {
        0 | 1 => Moment::Boot(span(25_000)),
        2 => Moment::Step(Step::Launching),
        3 => Moment::Step(Step::Pulling),
        4 => Moment::Step(Step::Created),
        5 => Moment::Step(Step::Running),
        _ => Moment::Delete(span(3_000)),
    }
}

/// An image of its own for each round, so that there is always something to pull.
fn push_image(lab: &Lab, round: u32) -> anyhow::Result<()> {
    let image = Image::busybox_with_noise(4, u64::from(round) << 1)?;
    lab.registry.push("cut", &round.to_string(), &image).map(drop)
}

/// The host of this boot is Ready: what the API says may still be of the one before.
fn wait_up(lab: &Lab, machine: &mut Machine, host: &Inspector) -> anyhow::Result<()> {
    wait_for("the inspector to answer", DEADLINE, || Ok(host.inventory().ok().map(drop)))?;
    let boot_id = host_boot_id(host)?;
    lab.supervisor.wait_field("node", &node_name(INDEX), "{.status.nodeInfo.bootID}", &boot_id, DEADLINE)?;
    lab.wait_ready(machine, INDEX)
}

/// Waits for the moment and cuts.
fn cut(lab: &Lab, machine: &mut Machine, host: &Inspector, moment: Moment, round: u32) -> anyhow::Result<()> {
    match moment {
        Moment::Boot(after) => {
            let at = std::time::Instant::now() + after;
            wait_for("the moment", after * 2 + Duration::from_secs(1), || {
                Ok((std::time::Instant::now() >= at).then_some(()))
            })?;
        }
        Moment::Step(step) => {
            wait_up(lab, machine, host)?;
            push_image(lab, round)?;
            apply_script(lab, INDEX, POD, (&format!("registry.lab:5000/cut:{round}"), STAYS), "Always")?;
            host.at(POD, step, DEADLINE, None)?;
        }
        Moment::Delete(after) => {
            wait_up(lab, machine, host)?;
            apply_script(lab, INDEX, POD, (BUSYBOX, STAYS), "Always")?;
            lab.supervisor.wait_field("pod", POD, "{.status.phase}", "Running", DEADLINE)?;
            lab.supervisor.kubectl_ok(&["delete", "pod", POD, "--wait=false"])?;
            let at = std::time::Instant::now() + after;
            wait_for("the moment", after * 2 + Duration::from_secs(1), || {
                Ok((std::time::Instant::now() >= at).then_some(()))
            })?;
        }
    }
    machine.power_cut();
    Ok(())
}

/// After the boot: Ready, the pod that stays runs again with the work of one container, the pod that was cut is what
/// the API says it should be, no file system complained, nothing is left over.
fn all_is_right(lab: &Lab, machine: &mut Machine, host: &Inspector, from: usize) -> anyhow::Result<()> {
    machine.serial.expect("host is up", from, DEADLINE)?;
    wait_up(lab, machine, host)?;
    for pod in ["stays", POD] {
        let wanted = lab.supervisor.field("pod", pod, "{.metadata.deletionTimestamp}{.metadata.name}")?;
        if wanted == pod {
            wait_for("the pod to run in this boot", DEADLINE, || {
                let running = host.inventory()?.sandboxes.iter().any(|s| {
                    s.pod == pod && s.phase == "ready" && s.containers.iter().any(|c| c == "running")
                });
                Ok(running.then_some(()))
            })
            .with_context(|| describe(lab, pod))?;
            lab.supervisor.wait_field(
                "pod",
                pod,
                "{.status.conditions[?(@.type==\"Ready\")].status}",
                "True",
                DEADLINE,
            )?;
            // It is Ready with its start; its first line comes a moment later.
            wait_for("the pod's line", DEADLINE, || {
                let log = lab.supervisor.kubectl_ok(&["logs", pod])?;
                ensure!(log.is_empty() || log == "ran\n", "{pod} said {log:?}");
                Ok((!log.is_empty()).then_some(()))
            })?;
        } else {
            wait_for("the deleted pod to be gone", DEADLINE, || {
                Ok(lab.supervisor.field("pod", pod, "{.metadata.name}")?.is_empty().then_some(()))
            })
            .with_context(|| describe(lab, pod))?;
        }
    }
    let console = console(machine, from);
    for bad in ["EXT4-fs error", "I/O error", "panicked", "state.json"] {
        if let Some(line) = console.lines().find(|line| line.contains(bad)) {
            anyhow::bail!("the console says {line:?}");
        }
    }
    host.nothing_leaked()
}

fn describe(lab: &Lab, pod: &str) -> String {
    lab.supervisor.kubectl_ok(&["describe", "pod", pod]).unwrap_or_default()
}

fn host_boot_id(host: &Inspector) -> anyhow::Result<String> {
    Ok(host.read("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[test]
fn power_cuts_at_random_moments_lose_nothing() -> anyhow::Result<()> {
    let (_turn, artifacts, lab) = own_host(INDEX);
    let cuts = if long() { 50 } else { 3 };
    let seed = std::env::var("ATOLL_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_secs()));
    println!("ATOLL_SEED={seed}");
    let mut random = seed | 1;
    let mut machine = lab.boot_host(artifacts, Profile::Test, INDEX)?;
    let host = Inspector::new(&machine.address())?;
    lab.wait_ready(&mut machine, INDEX)?;
    apply_script(lab, INDEX, "stays", (BUSYBOX, STAYS), "Always")?;
    lab.supervisor.wait_field("pod", "stays", "{.status.phase}", "Running", DEADLINE)?;
    for round in 1..=cuts {
        let moment = moment(&mut random);
        println!("cut {round}: {moment:?}");
        cut(lab, &mut machine, &host, moment, round)
            .with_context(|| format!("ATOLL_SEED={seed}, before cut {round} ({moment:?})"))?;
        let from = machine.serial.position();
        machine = machine.boot_again()?;
        // The next cut may come before this boot is through; the last one never does.
        let next_is_early = matches!(moment, Moment::Boot(_)) && round % 2 == 1 && round != cuts;
        if next_is_early {
            continue;
        }
        all_is_right(lab, &mut machine, &host, from)
            .with_context(|| format!("ATOLL_SEED={seed}, after cut {round} ({moment:?})"))?;
        lab.supervisor.kubectl_ok(&["delete", "pod", POD, "--ignore-not-found"])?;
    }
    lab.supervisor.kubectl_ok(&["delete", "pod", "stays"])?;
    power_off(&mut machine)?;
    lab.supervisor.kubectl_ok(&["delete", "node", &node_name(INDEX)]).map(drop)
}
