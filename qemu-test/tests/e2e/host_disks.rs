//! The disk of a host is damaged while it is off. One host goes through it all, the tests look at what it did.

use crate::own::{
    self, LINE, STAYS, apply_script, boot_id, console, own_host, power_off, says, wait_ready_again,
};
use crate::shared::POD;
use anyhow::ensure;
use atoll_qemu_test::artifacts::Profile;
use atoll_qemu_test::inspect::Inspector;
use atoll_qemu_test::lab::{BUSYBOX, Lab, node_name};
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::oci::Image;
use atoll_qemu_test::process::wait_for;
use std::sync::OnceLock;

const INDEX: usize = 6;
/// Neither zeros nor the signature of anything.
const SCRAP: u8 = 0x5a;
/// Groups of 128 MiB in which ext4 keeps a copy of its superblock, as far as this disk goes.
const COPIES: [u64; 9] = [0, 1, 3, 5, 7, 9, 25, 27, 49];

/// What the console said in each boot, and what came of it.
struct Story {
    /// A disk as it was flashed.
    flashed: String,
    /// DATA's superblock is scrap, STATE is empty, the config has no token.
    damaged: String,
    /// The same disk, and a config with a token.
    joined_again: String,
    /// What the pod said then, whose image was in the repaired store.
    log: String,
    /// While DATA was full: the console, the condition of the node, what became of a pod with a new image.
    full: String,
    /// Events of that pod while DATA was full.
    full_events: String,
    /// Every superblock of DATA is scrap.
    beyond_repair: String,
    /// The beginning of DATA after that boot.
    beginning: Vec<u8>,
}

/// Boots it again and gives the place from which on the console is this boot's.
fn boot_again(mut machine: Machine, config: Option<String>) -> anyhow::Result<(Machine, usize)> {
    let from = machine.serial.position();
    machine.set_config(config);
    Ok((machine.boot_again()?, from))
}

fn go_through() -> anyhow::Result<Story> {
    let (_turn, artifacts, lab) = own_host(INDEX);
    let node = node_name(INDEX);
    let mut spec = lab.machine_spec(artifacts, Profile::Test, INDEX, Some(lab.machine_config(INDEX)?));
    spec.memory_mib = 2048;
    let mut machine = Machine::boot(spec)?;
    lab.wait_ready(&mut machine, INDEX)?;
    apply_script(lab, INDEX, "stored", (BUSYBOX, STAYS), "Always")?;
    lab.supervisor.wait_field("pod", "stored", "{.status.phase}", "Running", POD)?;
    let first_boot = boot_id(lab, INDEX)?;
    let flashed = console(&machine, 0);
    power_off(&mut machine)?;

    let data = machine.spec().volume("DATA")?;
    data.overwrite(1024, 64 << 10, SCRAP)?;
    machine.spec().volume("STATE")?.overwrite(0, 1 << 20, 0)?;
    let (mut machine, from) = boot_again(machine, None)?;
    machine.serial.expect("not part of a cluster", from, LINE)?;
    let damaged = console(&machine, from);
    power_off(&mut machine)?;

    let (mut machine, from) = boot_again(machine, Some(lab.machine_config(INDEX)?))?;
    wait_ready_again(lab, &mut machine, INDEX, &first_boot)?;
    let running = "{.status.conditions[?(@.type==\"Ready\")].status}";
    lab.supervisor.wait_field("pod", "stored", running, "True", POD)?;
    let log = lab.supervisor.kubectl_ok(&["logs", "stored"])?;
    let joined_again = console(&machine, from);
    let (full, full_events) = fill_and_free(lab, &machine)?;
    power_off(&mut machine)?;

    data.overwrite(0, 1 << 20, SCRAP)?;
    for group in COPIES {
        data.overwrite(group * (128 << 20), 64 << 10, SCRAP)?;
    }
    let (mut machine, from) = boot_again(machine, Some(lab.machine_config(INDEX)?))?;
    machine.serial.expect("is left as it is", from, LINE)?;
    // Tried again after half a minute, by the same process.
    let again = machine.serial.position();
    machine.serial.expect("storage is not ready", again, LINE)?;
    power_off(&mut machine)?;
    let beyond_repair = console(&machine, from);
    let beginning = data.read(0, 1 << 20)?;
    lab.supervisor.kubectl_ok(&["delete", "pod", "stored", "--force", "--grace-period=0"])?;
    lab.supervisor.kubectl_ok(&["delete", "node", &node])?;
    Ok(Story { flashed, damaged, joined_again, log, full, full_events, beyond_repair, beginning })
}

/// Leaves four MiB on DATA, asks for a pod whose image is new, and frees DATA again: the pod then runs.
fn fill_and_free(lab: &Lab, machine: &Machine) -> anyhow::Result<(String, String)> {
    let node = node_name(INDEX);
    let pressure = "{.status.conditions[?(@.type==\"DiskPressure\")].status}";
    let inspector = Inspector::new(&machine.address())?;
    lab.registry.push("large", "1", &Image::busybox_with_noise(16, 1)?)?;
    let from = machine.serial.position();
    inspector.fill(4 << 20)?;
    machine.serial.expect("DATA is nearly full (0 % free)", from, LINE)?;
    lab.supervisor.wait_field("node", &node, pressure, "True", LINE)?;
    apply_script(lab, INDEX, "squeezed", ("registry.lab:5000/large:1", STAYS), "Always")?;
    let events = wait_for("an event of the pod that does not fit", POD, || {
        let arguments = ["get", "events", "--field-selector", "involvedObject.name=squeezed,type=Warning"];
        let text =
            lab.supervisor.kubectl_ok(&[&arguments[..], &["-o", "jsonpath={.items[*].message}"]].concat())?;
        Ok(text.contains("pull").then_some(text))
    })?;
    let console = console(machine, from);
    inspector.fill(0)?;
    lab.supervisor.wait_field("node", &node, pressure, "False", LINE)?;
    lab.supervisor.wait_field("pod", "squeezed", "{.status.phase}", "Running", POD)?;
    lab.supervisor.kubectl_ok(&["delete", "pod", "squeezed"])?;
    Ok((console, events))
}

fn story() -> anyhow::Result<&'static Story> {
    static STORY: OnceLock<Result<Story, String>> = OnceLock::new();
    own::story(&STORY, go_through)
}

#[test]
fn data_with_a_damaged_file_system_is_repaired_at_boot() -> anyhow::Result<()> {
    let story = story()?;
    says(&story.damaged, &["(DATA) was damaged and is repaired from its backup", "check all of /dev/vda3"])?;
    ensure!(!story.damaged.contains("format /dev/vda3"), "DATA was formatted:\n{}", story.damaged);
    ensure!(story.log.ends_with("ran\n"), "the pod did not run from what DATA holds: {:?}", story.log);
    Ok(())
}

#[test]
fn flashed_disk_gets_ids_of_its_own_and_is_found_by_them() -> anyhow::Result<()> {
    let story = story()?;
    let given = "give /dev/vda and its partitions ids of their own";
    says(&story.flashed, &[given, "format /dev/vda3 as DATA"])?;
    for later in [&story.damaged, &story.joined_again] {
        ensure!(!later.contains(given), "it was given others again:\n{later}");
        says(later, &["mount /dev/vda3 at /data"])?;
    }
    Ok(())
}

#[test]
fn data_beyond_repair_is_left_alone_and_the_console_says_what_to_do() -> anyhow::Result<()> {
    let story = story()?;
    says(
        &story.beyond_repair,
        &["/dev/vda3 (DATA) holds something unknown, not ext4, and is left as it is", "flash the disk again"],
    )?;
    ensure!(!story.beyond_repair.contains("format /dev/vda3"), "formatted:\n{}", story.beyond_repair);
    ensure!(!story.beyond_repair.contains("next try in"), "a service crashes:\n{}", story.beyond_repair);
    ensure!(story.beginning.iter().all(|byte| *byte == SCRAP), "something was written onto DATA");
    Ok(())
}

#[test]
fn state_wiped_is_told_and_the_host_joins_again_only_with_a_token() -> anyhow::Result<()> {
    let story = story()?;
    let lost = "STATE was empty and was made anew, though DATA is not: this host has lost its identity";
    says(&story.damaged, &[lost, "not part of a cluster: put a 'join' section into machine.yaml"])?;
    ensure!(!story.damaged.contains("joined https"), "it joined without a token:\n{}", story.damaged);
    says(&story.joined_again, &["joined https"])
}

#[test]
fn data_full_then_freed() -> anyhow::Result<()> {
    let story = story()?;
    says(&story.full, &["DATA is nearly full (0 % free): images cannot be pulled"])?;
    let events = &story.full_events;
    for text in ["no room for", "remove images or pods that are not needed"] {
        ensure!(events.contains(text), "no {text:?} in the events: {events}");
    }
    ensure!(!story.full.contains("next try in"), "a service crashes:\n{}", story.full);
    Ok(())
}
