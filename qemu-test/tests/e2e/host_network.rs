//! The network of a host fails in the ways that networks do, and comes back. One host of its own goes through all of
//! them, one test at a time; it is booted without DHCP and, once there is some, without DNS.

use crate::own::{STAYS, apply_script, own_host};
use crate::shared::{POD, lab};
use crate::turns::Turn;
use anyhow::ensure;
use atoll_qemu_test::artifacts::Profile;
use atoll_qemu_test::inspect::{Inspector, Target};
use atoll_qemu_test::lab::{BUSYBOX, Lab, node_name};
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::network::{Offer, SERVER, address};
use atoll_qemu_test::oci::{Image, noise};
use atoll_qemu_test::process::wait_for;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const INDEX: usize = 3;
/// Nobody has it.
const NOBODY: &str = "10.77.0.254";
const LINE: Duration = Duration::from_secs(120);
/// From a change of what DHCP offers until the host has it: renewals each ten seconds, and what follows.
const RENEWED: Duration = Duration::from_secs(150);

struct Host {
    machine: Machine,
    /// Its console while there was no DHCP server.
    without_dhcp: String,
    /// What it said of DNS when it had joined.
    without_dns: String,
}

/// Renews each ten seconds, so that a change of the offer arrives soon.
fn offer(lab: &Lab, address: Option<&str>, options: &[&str]) -> anyhow::Result<()> {
    let options = ["option:T1,10"].iter().chain(options).map(ToString::to_string).collect();
    lab.network.offer(INDEX, Offer { address: address.map(str::to_owned), options })
}

fn dead_dns() -> String {
    format!("option:dns-server,{NOBODY}")
}

fn boot() -> anyhow::Result<Host> {
    let (_turn, artifacts, lab) = own_host(INDEX);
    lab.network.isolate(INDEX, true)?;
    offer(lab, None, &[&dead_dns()])?;
    let mut spec = lab.machine_spec(artifacts, Profile::Test, INDEX, Some(lab.machine_config(INDEX)?));
    spec.memory_mib = 2048;
    let mut machine = Machine::boot(spec)?;
    machine.serial.expect("no address: check the DHCP server", 0, LINE)?;
    let without_dhcp = machine.serial.text();
    lab.network.isolate(INDEX, false)?;
    lab.wait_ready(&mut machine, INDEX)?;
    let without_dns = machine.serial.expect("DNS is dead", 0, LINE)?;
    let from = machine.serial.position();
    offer(lab, None, &[])?;
    machine.serial.expect("DNS answers again", from, RENEWED)?;
    Ok(Host { machine, without_dhcp, without_dns })
}

/// The host, for one test at a time.
struct InTurn {
    host: MutexGuard<'static, Host>,
    _turn: Arc<Turn>,
}

impl std::ops::Deref for InTurn {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

fn host() -> InTurn {
    static HOST: OnceLock<Result<Mutex<Host>, String>> = OnceLock::new();
    match HOST.get_or_init(|| boot().map(Mutex::new).map_err(|error| format!("{error:#}"))) {
        Ok(host) => {
            let host = host.lock().unwrap_or_else(PoisonError::into_inner);
            InTurn { host, _turn: own_host(INDEX).0 }
        }
        Err(error) => panic!("the host did not come up: {error}"),
    }
}

/// A pod on this host, deleted when the test ends.
struct Pod<'a>(&'a Lab, &'static str);

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // The lab dies with the tests: one that is left over harms nothing.
        let _ = self.0.supervisor.kubectl(&["delete", "pod", self.1, "--wait=false", "--grace-period=1"]);
    }
}

impl Pod<'_> {
    fn wait(&self, path: &str, value: &str, deadline: Duration) -> anyhow::Result<()> {
        self.0.supervisor.wait_field("pod", self.1, path, value, deadline)
    }

    /// It runs in the container that it was started with.
    fn untouched(&self) -> anyhow::Result<()> {
        let field = |path| self.0.supervisor.field("pod", self.1, path);
        ensure!(field("{.status.phase}")? == "Running", "{} does not run", self.1);
        let restarts = field("{.status.containerStatuses[0].restartCount}")?;
        ensure!(restarts == "0", "{} was started again {restarts} times", self.1);
        Ok(())
    }

    fn wait_logs(&self, wanted: &str) -> anyhow::Result<()> {
        wait_for("the pod's log through the API server", RENEWED, || {
            let output = self.0.supervisor.kubectl(&["logs", self.1])?;
            Ok((output.code == 0 && output.stdout == wanted).then_some(()))
        })
    }
}

fn pod<'a>(lab: &'a Lab, name: &'static str, image: &str, script: &str) -> anyhow::Result<Pod<'a>> {
    apply_script(lab, INDEX, name, (image, script), "Never")?;
    Ok(Pod(lab, name))
}

fn node(lab: &Lab, path: &str) -> anyhow::Result<String> {
    lab.supervisor.field("node", &node_name(INDEX), path)
}

const ADDRESS: &str = "{.status.addresses[?(@.type==\"InternalIP\")].address}";
const READY: &str = "{.status.conditions[?(@.type==\"Ready\")].status}";

#[test]
fn no_dhcp_server_at_first_then_one() -> anyhow::Result<()> {
    let host = host();
    for line in
        ["no address after 30 s: going on without, still trying", "none yet (", "check the DHCP server"]
    {
        ensure!(host.without_dhcp.contains(line), "no {line:?} in:\n{}", host.without_dhcp);
    }
    ensure!(!host.without_dhcp.contains("DHCP lease of"), "there was a server:\n{}", host.without_dhcp);
    assert_eq!(node(&lab().1, ADDRESS)?, address(INDEX));
    Ok(())
}

#[test]
fn dead_dns_joining_by_address_goes_on_and_pulls_fail_clearly_until_it_is_back() -> anyhow::Result<()> {
    let host = host();
    let lab = &lab().1;
    ensure!(host.without_dns.contains(&format!("{NOBODY}: no answer within 2 s")), "{}", host.without_dns);
    let from = host.machine.serial.position();
    offer(lab, None, &[&dead_dns()])?;
    host.machine.serial.expect("DNS is dead", from, RENEWED)?;
    // An image that the host does not have yet.
    lab.registry.push("not-yet-here", "1", &Image::busybox()?)?;
    let pod = pod(lab, "dns-dead", "registry.lab:5000/not-yet-here:1", "echo ran")?;
    let selector = "involvedObject.name=dns-dead,reason=Failed";
    let message = wait_for("an event of the failed pull", POD, || {
        let path = "jsonpath={.items[*].message}";
        let text = lab.supervisor.kubectl_ok(&["get", "events", "--field-selector", selector, "-o", path])?;
        Ok(text.contains("registry.lab").then_some(text))
    })?;
    ensure!(message.contains("pull") && message.contains("name"), "the event does not say why: {message}");
    assert_eq!(node(lab, READY)?, "True", "a host without DNS is a node all the same");
    offer(lab, None, &[])?;
    host.machine.serial.expect("DNS answers again", from, RENEWED)?;
    pod.wait("{.status.phase}", "Succeeded", POD)
}

#[test]
fn lease_renewed_with_another_address_moves_node_and_serving_certificate_and_no_pod() -> anyhow::Result<()> {
    let host = host();
    let lab = &lab().1;
    let pod = pod(lab, "moves", BUSYBOX, STAYS)?;
    pod.wait("{.status.phase}", "Running", POD)?;
    pod.wait_logs("ran\n")?;
    let name = node_name(INDEX);
    let other = "10.77.0.83";
    for address in [other.to_owned(), address(INDEX)] {
        let from = host.machine.serial.position();
        offer(lab, Some(&address), &[])?;
        host.machine.serial.expect(&format!("DHCP lease of {address}"), from, RENEWED)?;
        lab.supervisor.wait_field("node", &name, ADDRESS, &address, RENEWED)?;
        // The API server dials the new address and checks the certificate for it.
        pod.wait_logs("ran\n")?;
        lab.supervisor.wait_field("node", &name, READY, "True", RENEWED)?;
        pod.untouched()?;
    }
    Ok(())
}

#[test]
fn cable_pulled_and_put_back() -> anyhow::Result<()> {
    let host = host();
    let lab = &lab().1;
    let pod = pod(lab, "unplugged", BUSYBOX, STAYS)?;
    pod.wait("{.status.phase}", "Running", POD)?;
    let from = host.machine.serial.position();
    host.machine.cable(false)?;
    host.machine.serial.expect("no link has a peer: plug in a cable", from, LINE)?;
    lab.supervisor.wait_field("node", &node_name(INDEX), READY, "Unknown", LINE)?;
    host.machine.cable(true)?;
    lab.supervisor.wait_field("node", &node_name(INDEX), READY, "True", RENEWED)?;
    pod.wait_logs("ran\n")?;
    pod.untouched()?;
    assert_eq!(node(lab, ADDRESS)?, address(INDEX));
    Ok(())
}

/// Takes one connection; gives it `give` and reads it to its end.
fn serve(give: Vec<u8>) -> anyhow::Result<(u16, JoinHandle<std::io::Result<usize>>)> {
    let listener = TcpListener::bind((SERVER, 0))?;
    let port = listener.local_addr()?.port();
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(POD))?;
        stream.set_write_timeout(Some(POD))?;
        if !give.is_empty() {
            stream.write_all(&give)?;
            // Only here: who sends us something would take it for the end of the conversation.
            stream.shutdown(Shutdown::Write)?;
        }
        stream.read_to_end(&mut Vec::new())
    });
    Ok((port, served))
}

#[test]
fn mtu_1400_on_the_path_reaches_the_link_and_nothing_hangs() -> anyhow::Result<()> {
    let host = host();
    let lab = &lab().1;
    let from = host.machine.serial.position();
    offer(lab, None, &["option:mtu,1400"])?;
    // From here on the way to the host drops what is larger, without a word.
    lab.network.narrow(INDEX, 1400)?;
    let narrow = || -> anyhow::Result<()> {
        let line = host.machine.serial.expect("set MTU 1400", from, RENEWED)?;
        let link =
            line.rsplit(": set MTU").nth(1).and_then(|text| text.split_whitespace().last()).unwrap_or("eth0");
        let inspector = Inspector::new(&address(INDEX))?;
        let mtu = inspector.read(&format!("/sys/class/net/{link}/mtu"))?;
        ensure!(mtu.trim() == "1400", "the MTU of {link} is {mtu}");
        // Down, a pull of 4 MiB and as much by the pod itself; up, 4 MiB of the pod and its log of 600 KiB.
        lab.registry.push("noise", "1", &Image::busybox_with_noise(4, 1)?)?;
        let ((up, received), (down, given)) = (serve(Vec::new())?, serve(noise(4, 1))?);
        let script = format!(
            "yes 0123456789 | head -n 60000; cat /noise | nc {SERVER} {up}; \
             nc {SERVER} {down} < /dev/null > /got; cmp /got /noise && echo both ways"
        );
        let pod = pod(lab, "narrow", "registry.lab:5000/noise:1", &script)?;
        pod.wait("{.status.phase}", "Succeeded", POD)?;
        let received = received.join().expect("it does not panic")?;
        ensure!(received == 4 << 20, "{received} bytes came from the pod");
        given.join().expect("it does not panic")?;
        let log = lab.supervisor.kubectl_ok(&["logs", "narrow"])?;
        ensure!(log.len() > 600_000 && log.ends_with("both ways\n"), "a log of {} bytes", log.len());
        Ok(())
    };
    let outcome = narrow();
    lab.network.narrow(INDEX, 1500)?;
    offer(lab, None, &["option:mtu,1500"])?;
    outcome
}

#[test]
fn hostd_killed_and_hostd_stopped_comes_back_and_the_network_stays() -> anyhow::Result<()> {
    let host = host();
    let lab = &lab().1;
    let pod = pod(lab, "hostd-gone", BUSYBOX, STAYS)?;
    pod.wait("{.status.phase}", "Running", POD)?;
    let inspector = Inspector::new(&address(INDEX))?;
    for (signal, found_out) in [
        (9, "service hostd was killed (SIGKILL)"),
        (19, "service hostd hung: gave no sign of life for 30 s and was killed"),
    ] {
        let from = host.machine.serial.position();
        inspector.signal(Target::Service("hostd".into()), signal)?;
        host.machine.serial.expect(found_out, from, LINE)?;
        host.machine.serial.expect("service hostd ready", from, LINE)?;
        let console = host.machine.serial.text();
        let console = console.get(from..).unwrap_or_default();
        ensure!(!console.contains("remove address"), "the address was taken away:\n{console}");
        ensure!(!console.contains("service agent starting"), "the agent was started again:\n{console}");
        assert_eq!(node(lab, READY)?, "True");
        pod.wait_logs("ran\n")?;
        pod.untouched()?;
    }
    Ok(())
}
