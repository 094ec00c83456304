//! The release image: boots, joins, survives a reboot, powers off cleanly, and has nothing of the test image.

use crate::own::{boot_id, own_host, power_off, wait_ready_again};
use crate::shared::{machine, ready_lab, shell_pod};
use atoll_qemu_test::artifacts::Profile;
use atoll_qemu_test::machine::Accelerator;
use std::net::TcpStream;
use std::time::Duration;

const INDEX: usize = 1;

#[test]
fn release_host_joins_reboots_and_powers_off_cleanly() -> anyhow::Result<()> {
    let (_turn, artifacts, lab) = own_host(INDEX);
    let mut host = lab.boot_host(artifacts, Profile::Release, INDEX)?;
    lab.wait_ready(&mut host, INDEX)?;

    for port in [10350, 10351, 10352] {
        let address = format!("{}:{port}", host.address()).parse()?;
        assert!(
            TcpStream::connect_timeout(&address, Duration::from_secs(3)).is_err(),
            "the release image carries the test bridge on port {port}"
        );
    }
    let machine_id = lab.supervisor.field("node", "node-2", "{.status.nodeInfo.machineID}")?;
    let first_boot = boot_id(lab, INDEX)?;
    assert_eq!(machine_id.len(), 32, "machine id {machine_id:?}");

    power_off(&mut host)?;

    // Without a token: the identity on STATE is enough.
    let config = lab.machine_config(INDEX)?;
    let mut in_join = false;
    let without_token = config.lines().filter(|line| {
        in_join = line.starts_with("join:") || (in_join && line.starts_with([' ', '-']));
        !in_join
    });
    let without_token = without_token.fold(String::new(), |text, line| text + line + "\n");
    host.set_config(Some(without_token));
    let mut host = host.boot_again()?;
    wait_ready_again(lab, &mut host, INDEX, &first_boot)?;
    assert_eq!(lab.supervisor.field("node", "node-2", "{.status.nodeInfo.machineID}")?, machine_id);
    power_off(&mut host)?;
    lab.supervisor.kubectl_ok(&["delete", "node", "node-2"])?;
    Ok(())
}

#[test]
fn console_tells_each_phase_with_its_time() {
    let _lab = ready_lab();
    let host = machine();
    let text = host.serial.text();
    for phase in ["mounts", "system", "services"] {
        assert!(
            text.lines().any(|line| line.contains("atoll:") && line.contains(phase) && line.contains("ms")),
            "no line for phase {phase} with its time on the console:\n{text}"
        );
    }
}

/// Every socket that somebody could speak to first, and who may. `*` stands for a number or an id.
const SOCKETS: [(&str, &str); 12] = [
    ("tcp 0.0.0.0:10250", "kubelet API: client certificate or token, and the API server is asked"),
    ("tcp 127.0.0.1:*", "the runtime's streaming server: a token of one use, given to the agent over CRI"),
    ("packet 0800", "hostd's DHCP client: answers to its own questions"),
    ("packet 0806", "hostd's probe for an address that DHCP gives: who has it says so"),
    ("packet 86dd", "what IPv6 routers advertise: whole, and from the link itself, by its hop limit"),
    ("unix /run/atoll/init/bus.sock", "D-Bus of PID 1: root only, by peer credentials"),
    ("unix /run/atoll/init/notify.sock", "readiness of services: who speaks is known by cgroup"),
    ("unix /run/atoll/hostd/metrics.sock", "metrics and health: by file mode"),
    // Bound under another name and moved to its place once it has its mode.
    ("unix /run/atoll/runtime/cri.*", "CRI: root and the agent's group, by file mode"),
    ("unix /run/atoll/runtime/vm/*", "a VMM's control socket: root only, by file mode"),
    ("tcp 0.0.0.0:1035*", "the test image's bridge and inspector"),
    ("udp *", "a question of hostd's that is on its way: DNS, SNTP or the renewal of its lease"),
];

#[test]
fn every_socket_of_the_host_is_known() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let fits = |pattern: &str, socket: &str| match pattern.split_once('*') {
        None => pattern == socket,
        Some((start, _)) => socket.starts_with(start),
    };
    let listeners = lab.inspector().inventory()?.listeners;
    let unknown: Vec<&String> =
        listeners.iter().filter(|socket| !SOCKETS.iter().any(|(pattern, _)| fits(pattern, socket))).collect();
    assert!(unknown.is_empty(), "nobody knows who may use {unknown:?}");
    for (pattern, _) in
        SOCKETS.iter().filter(|(pattern, _)| pattern.contains("10250") || pattern.contains("cri"))
    {
        assert!(listeners.iter().any(|socket| fits(pattern, socket)), "no {pattern} in {listeners:?}");
    }
    Ok(())
}

#[test]
fn emulated_processor_lacks_cmpxchg16b() -> anyhow::Result<()> {
    if Accelerator::detect() == Accelerator::Kvm {
        return Ok(());
    }
    let lab = &ready_lab();
    let pod = shell_pod(lab, "cpu-flags", "grep -m1 ^flags /proc/cpuinfo", "Never")?;
    pod.wait_phase("Succeeded")?;
    let flags = pod.logs()?;
    assert!(flags.contains(" sse2 "), "{flags}");
    assert!(!flags.contains(" cx16"), "cx16 is on: kernels would die at random under this emulation");
    Ok(())
}
