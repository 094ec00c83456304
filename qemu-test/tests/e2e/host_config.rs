//! What a person or the hardware gives a host is wrong: its clock, its config, its processor.

use crate::own::{self, LINE, boot_id, console, own_host, power_off, says, wait_off, wait_ready_again};
use anyhow::{Context, ensure};
use atoll_qemu_test::artifacts::Profile;
use atoll_qemu_test::lab::{READY, node_name};
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::network::Offer;
use atoll_qemu_test::process::wait_for;
use std::sync::OnceLock;

const INDEX: usize = 7;

/// What the console said in each boot.
struct Story {
    /// The clock is in 2020 and at first there is no time server.
    years_behind: String,
    /// The clock is in 2035 and the config on the ESP is invalid.
    years_ahead: String,
}

fn go_through() -> anyhow::Result<Story> {
    let (_turn, artifacts, lab) = own_host(INDEX);
    let mut spec = lab.machine_spec(artifacts, Profile::Release, INDEX, None);
    spec.memory_mib = 1536;
    spec.hardware.date = Some("2020-01-01");
    spec.prepare()?;
    let config = lab.machine_config(INDEX)?;
    spec.volume("ESP")?.put_file("machine.yaml", &config)?;
    let options = |time: &[&str]| {
        let all = ["option:T1,10"].iter().chain(time).map(ToString::to_string).collect();
        Offer { address: None, options: all }
    };
    lab.network.offer(INDEX, options(&["option:ntp-server,10.77.0.254"]))?;
    let mut machine = Machine::start(spec)?;
    machine.serial.expect("the clock says a time before 2025", 0, LINE)?;
    lab.network.offer(INDEX, options(&[]))?;
    lab.wait_ready(&mut machine, INDEX)?;
    let years_behind = machine.serial.text();
    let first_boot = boot_id(lab, INDEX)?;
    power_off(&mut machine)?;

    machine.spec().volume("ESP")?.put_file("machine.yaml", &format!("{config}\nnetwrok: {{}}\n"))?;
    machine.spec_mut().hardware.date = Some("2035-01-01");
    let from = machine.serial.position();
    let mut machine = machine.boot_again()?;
    wait_ready_again(lab, &mut machine, INDEX, &first_boot)?;
    machine.press_power_button()?;
    machine.serial.expect("asked by power-button", from, LINE)?;
    machine.press_power_button()?;
    wait_off(&mut machine)?;
    let years_ahead = console(&machine, from);
    lab.supervisor.kubectl_ok(&["delete", "node", &node_name(INDEX)])?;
    Ok(Story { years_behind, years_ahead })
}

fn story() -> anyhow::Result<&'static Story> {
    static STORY: OnceLock<Result<Story, String>> = OnceLock::new();
    own::story(&STORY, go_through)
}

#[test]
fn clock_years_behind_is_set_before_tls_and_without_a_time_server_the_console_says_what_is_wrong()
-> anyhow::Result<()> {
    let console = &story()?.years_behind;
    says(
        console,
        &["no time server answers (10.77.0.254: ", "give 'time.servers' in machine.yaml", "clock set"],
    )?;
    let at = |text: &str| console.find(text).unwrap_or(usize::MAX);
    ensure!(at("clock set seconds=\"+") < at("joined https"), "joined before the clock was set:\n{console}");
    Ok(())
}

#[test]
fn clock_years_ahead_is_set_before_tls() -> anyhow::Result<()> {
    let console = &story()?.years_ahead;
    says(console, &["clock set seconds=\"-2"])?;
    ensure!(!console.contains("cannot join"), "a certificate was looked at too early:\n{console}");
    Ok(())
}

#[test]
fn machine_config_made_invalid_on_the_esp_gives_way_to_the_last_good_one() -> anyhow::Result<()> {
    says(
        &story()?.years_ahead,
        &[
            "the machine config (machine.yaml on the ESP) has 1 problem and is not used:",
            "netwrok: unknown field: did you mean 'network'?",
            "the last good config is used instead; mend this and boot again",
            "joined https",
        ],
    )
}

#[test]
fn power_button_pressed_twice_waits_for_nobody() -> anyhow::Result<()> {
    says(
        &story()?.years_ahead,
        &["asked to shut down again: not waiting for services any longer", "power off"],
    )
}

#[test]
fn no_kvm_makes_the_node_not_ready_with_reason_and_remedy_and_nothing_crashes() -> anyhow::Result<()> {
    let (_turn, artifacts, lab) = own_host(INDEX);
    let mut spec = lab.machine_spec(artifacts, Profile::Release, INDEX, Some(lab.machine_config(INDEX)?));
    spec.memory_mib = 1536;
    spec.hardware.virtualisation = false;
    let mut machine = Machine::boot(spec)?;
    let line = machine.serial.expect("node is not Ready:", 0, LINE)?;
    let message = wait_for("the condition of the node", READY, || {
        let path = "{.status.conditions[?(@.type==\"Ready\")].message}";
        let text = lab.supervisor.field("node", &node_name(INDEX), path)?;
        Ok(text.contains("/dev/kvm").then_some(text))
    })
    .with_context(|| machine.serial.text())?;
    for text in [&message, &line] {
        ensure!(text.contains("/dev/kvm") && text.contains("enable virtualisation"), "no remedy in {text:?}");
    }
    let status = "{.status.conditions[?(@.type==\"Ready\")].status}";
    assert_eq!(lab.supervisor.field("node", &node_name(INDEX), status)?, "False");
    power_off(&mut machine)?;
    let console = machine.serial.text();
    ensure!(!console.contains("next try in"), "a service crashes:\n{console}");
    lab.supervisor.kubectl_ok(&["delete", "node", &node_name(INDEX)]).map(drop)
}
