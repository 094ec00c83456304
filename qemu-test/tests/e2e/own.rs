//! What tests with hosts of their own share.

use crate::turns::{self, Turn, Use};
use anyhow::{Context, ensure};
use atoll_qemu_test::artifacts::Artifacts;
use atoll_qemu_test::lab::{Lab, READY, node_name};
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::process::wait_for;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Deadline of a line on the console.
pub const LINE: Duration = Duration::from_secs(180);
/// Deadline of a shutdown.
const OFF: Duration = Duration::from_secs(120);

/// The turn of a test that boots host `index`, and the lab.
pub fn own_host(index: usize) -> (Arc<Turn>, &'static Artifacts, &'static Lab) {
    let turn = turns::take(Use::OwnHost(index));
    let (artifacts, lab) = crate::shared::lab();
    (turn, artifacts, lab)
}

/// What a host went through, for the tests that look at it: the first of them goes through it.
pub fn story<S>(
    told: &'static OnceLock<Result<S, String>>,
    go_through: fn() -> anyhow::Result<S>,
) -> anyhow::Result<&'static S> {
    told.get_or_init(|| go_through().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow::Error::msg(error.clone()))
}

/// Every one of `lines` is in `console`.
pub fn says(console: &str, lines: &[&str]) -> anyhow::Result<()> {
    for line in lines {
        ensure!(console.contains(line), "no {line:?} in:\n{console}");
    }
    Ok(())
}

/// The boot that the API server knows host `index` by.
pub fn boot_id(lab: &Lab, index: usize) -> anyhow::Result<String> {
    lab.supervisor.field("node", &node_name(index), "{.status.nodeInfo.bootID}")
}

/// Waits until the host is Ready in another boot than `before`.
pub fn wait_ready_again(lab: &Lab, machine: &mut Machine, index: usize, before: &str) -> anyhow::Result<()> {
    let from = machine.serial.position();
    wait_for("a new boot id", READY, || {
        let now = boot_id(lab, index)?;
        Ok((now != before && !now.is_empty()).then_some(()))
    })
    .with_context(|| console(machine, from))?;
    lab.wait_ready(machine, index)
}

/// What the console said from this position on.
pub fn console(machine: &Machine, from: usize) -> String {
    machine.serial.text().get(from..).unwrap_or_default().to_owned()
}

/// Presses the power button and waits until the machine is off.
pub fn power_off(machine: &mut Machine) -> anyhow::Result<()> {
    machine.press_power_button()?;
    wait_off(machine)
}

/// Waits until the machine is off.
pub fn wait_off(machine: &mut Machine) -> anyhow::Result<()> {
    machine.wait_off(OFF).map(drop)
}

/// A pod on host `index` that runs a shell script, started again by `restart`, which is a restart policy.
pub fn apply_script(
    lab: &Lab,
    index: usize,
    name: &str,
    (image, script): (&str, &str),
    restart: &str,
) -> anyhow::Result<()> {
    lab.supervisor.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeName: {}
  restartPolicy: {restart}
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: {image}
    command: [/bin/sh, -c, {}]
",
        node_name(index),
        serde_json::to_string(script)?
    ))
}

/// A script that says once that it ran, and goes on.
pub const STAYS: &str = "echo ran; sleep 1000000";
