//! The control plane goes away and comes back, whole or in parts, and a host is off meanwhile: pods do not notice what
//! they need not, and the node's truth is right afterwards.
//!
//! These tests harm the Supervisor that all others use: each waits until nobody else needs it ([`alone`]).

use crate::own::{self, STAYS, apply_script, own_host, power_off};
use crate::shared::{Shared, alone_in_the_lab, lab, long, machine, shell_pod};
use anyhow::{Context, ensure};
use atoll_qemu_test::artifacts::{Artifacts, Profile};
use atoll_qemu_test::lab::{BUSYBOX, Lab, node_name};
use atoll_qemu_test::process::wait_for;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Deadline for what follows the control plane's return.
const BACK: Duration = Duration::from_secs(180);
/// The host that is off while things happen.
const INDEX: usize = 4;
const OFF_DEADLINE: Duration = Duration::from_secs(300);
/// Life of a certificate that is to be renewed while the host is on, and to expire while it is off.
const SHORT: Duration = Duration::from_secs(150);

/// Nobody else needs the Supervisor while this lives; it is whole again when it goes.
struct Alone {
    host: Shared,
}

fn alone() -> Alone {
    Alone { host: alone_in_the_lab() }
}

impl Drop for Alone {
    fn drop(&mut self) {
        // A test that failed in the middle leaves it as it may be: the others need it whole.
        let supervisor = &self.host.supervisor;
        if !supervisor.kubectl(&["get", "--raw", "/readyz"]).is_ok_and(|output| output.code == 0) {
            supervisor.stop();
            // What fails here fails in every other test, with its reason.
            let _ = supervisor.resume(&[]);
        }
    }
}

/// A pod that says something every second, and what must not change of it.
struct Witness {
    pod: crate::shared::Pod,
    identity: String,
}

const IDENTITY: &str = "{.metadata.uid} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount} {.status.podIP}";

impl Witness {
    fn begin(host: &Shared, name: &str) -> anyhow::Result<Self> {
        let script = "n=0; while true; do echo tick $n; n=$((n+1)); sleep 1; done";
        let pod = shell_pod(host, name, script, "Always")?;
        pod.wait_phase("Running")?;
        let identity = pod.field(IDENTITY)?;
        ensure!(identity.split(' ').nth(2) == Some("0"), "it was restarted already: {identity}");
        Ok(Self { pod, identity })
    }

    /// The same container of the same pod runs, was never restarted, and has all of its log.
    fn unchanged(&self) -> anyhow::Result<()> {
        ensure!(
            self.pod.field(IDENTITY)? == self.identity,
            "{} ≠ {}",
            self.pod.field(IDENTITY)?,
            self.identity
        );
        self.pod.wait_field("{.status.conditions[?(@.type==\"Ready\")].status}", "True")?;
        // What says yes here has the node's word by way of the API server, the kubelet API and the runtime.
        ensure!(self.pod.exec(&["echo", "here"])?.trim() == "here");
        let log = self.pod.logs()?;
        for (n, line) in log.lines().enumerate() {
            ensure!(line == format!("tick {n}"), "line {n} of its log is {line:?}");
        }
        Ok(())
    }

    fn ticks(&self) -> anyhow::Result<usize> {
        Ok(self.pod.logs()?.lines().count())
    }
}

fn renewed(lab: &Lab, node: &str) -> anyhow::Result<String> {
    let lease = ["get", "lease", "-n", "kube-node-lease", node, "-o", "jsonpath={.spec.renewTime}"];
    Ok(lab.supervisor.kubectl(&lease)?.stdout)
}

/// The lease is renewed and the node is Ready, both from now on.
fn node_is_back(lab: &Lab) -> anyhow::Result<()> {
    let known = renewed(lab, "node-1")?;
    wait_for("the lease to be renewed", BACK, || {
        let now = renewed(lab, "node-1")?;
        Ok((!now.is_empty() && now != known).then_some(()))
    })?;
    lab.supervisor.wait_node_ready("node-1", BACK)
}

#[test]
fn supervisor_away_for_two_minutes_after_joining_leaves_pods_and_the_lease_comes_back() -> anyhow::Result<()>
{
    let alone = alone();
    let host = &alone.host;
    let witness = Witness::begin(host, "away")?;
    let (before, from) = (witness.ticks()?, machine().serial.position());
    host.supervisor.stop();
    let away = Instant::now();
    machine().serial.expect("pods keep running", from, BACK)?;
    wait_for("two minutes to pass", Duration::from_secs(150), || {
        Ok((away.elapsed() >= Duration::from_secs(120)).then_some(()))
    })?;
    host.supervisor.resume(&[])?;
    machine().serial.expect("renewed again after", from, BACK)?;
    node_is_back(host)?;
    witness.unchanged()?;
    // What the pod said meanwhile lay in the host's files.
    let ticks = witness.ticks()? - before;
    ensure!(ticks >= 60, "{ticks} lines in over two minutes");
    Ok(())
}

#[test]
fn api_server_killed_comes_back_and_pods_stay() -> anyhow::Result<()> {
    let alone = alone();
    let witness = Witness::begin(&alone.host, "api-killed")?;
    alone.host.supervisor.kill_component("kube-apiserver")?;
    alone.host.supervisor.wait_ready()?;
    node_is_back(&alone.host)?;
    witness.unchanged()?;
    Witness::begin(&alone.host, "after-api-killed").map(drop)
}

#[test]
fn etcd_killed_comes_back_and_pods_stay() -> anyhow::Result<()> {
    let alone = alone();
    let witness = Witness::begin(&alone.host, "etcd-killed")?;
    alone.host.supervisor.kill_component("etcd")?;
    alone.host.supervisor.wait_ready()?;
    node_is_back(&alone.host)?;
    witness.unchanged()?;
    Witness::begin(&alone.host, "after-etcd-killed").map(drop)
}

#[test]
fn node_object_deleted_by_hand_comes_back_ready_and_pods_stay() -> anyhow::Result<()> {
    let alone = alone();
    let host = &alone.host;
    let witness = Witness::begin(host, "node-deleted")?;
    let known = |path: &str| host.supervisor.field("node", "node-1", path);
    let (uid, network) = (known("{.metadata.uid}")?, known("{.spec.podCIDR}")?);
    let from = machine().serial.position();
    host.supervisor.kubectl_ok(&["delete", "node", "node-1"])?;
    machine().serial.expect("registering it again", from, BACK)?;
    host.supervisor.wait_node_ready("node-1", BACK)?;
    ensure!(known("{.metadata.uid}")? != uid, "the old object is still there");
    ensure!(known("{.spec.podCIDR}")? == network, "pods would have addresses of another network");
    node_is_back(host)?;
    witness.unchanged()?;
    Witness::begin(host, "after-node-deleted").map(drop)
}

/// What came of a host that was off for a while.
#[derive(Debug)]
struct OffHost {
    /// Empty in the short form: nobody waited for a certificate.
    renewed: String,
    joined_again: String,
    before: String,
    recreated: String,
    after: String,
    nodes_alike: bool,
}

const POD: &str = "same-name";
const UID_AND_RUNS: &str = "{.metadata.uid} {.status.containerStatuses[0].restartCount}";

fn apply(lab: &Lab) -> anyhow::Result<String> {
    apply_script(lab, INDEX, POD, (BUSYBOX, STAYS), "Always")?;
    lab.supervisor.field("pod", POD, "{.metadata.uid}")
}

/// One host for the three tests below: it is switched off, its pod is deleted and made again, it is switched on. In
/// the long form its certificate is renewed before and expires meanwhile.
fn off_host() -> anyhow::Result<&'static OffHost> {
    static SEEN: OnceLock<Result<OffHost, String>> = OnceLock::new();
    own::story(&SEEN, || {
        if !long() {
            let (_turn, artifacts, lab) = own_host(INDEX);
            return switch_off_and_on(artifacts, lab);
        }
        let alone = alone();
        let (artifacts, lab) = lab();
        let seen = short_certificates(lab).and_then(|()| switch_off_and_on(artifacts, lab));
        alone.host.supervisor.stop();
        alone.host.supervisor.resume(&[])?;
        seen
    })
}

fn short_certificates(lab: &Lab) -> anyhow::Result<()> {
    lab.supervisor.stop();
    lab.supervisor.resume(&["--host-certificates", &format!("{}s", SHORT.as_secs())])
}

fn switch_off_and_on(artifacts: &Artifacts, lab: &Lab) -> anyhow::Result<OffHost> {
    let mut seen = OffHost {
        renewed: String::new(),
        joined_again: String::new(),
        before: String::new(),
        recreated: String::new(),
        after: String::new(),
        nodes_alike: false,
    };
    let mut machine = lab.boot_host(artifacts, Profile::Test, INDEX)?;
    lab.wait_ready(&mut machine, INDEX)?;
    let node = || lab.supervisor.field("node", &node_name(INDEX), "{.metadata.uid}");
    let first_node = node()?;
    apply(lab)?;
    lab.supervisor.wait_field("pod", POD, "{.status.phase}", "Running", OFF_DEADLINE)?;
    seen.before = lab.supervisor.field("pod", POD, UID_AND_RUNS)?;
    if long() {
        seen.renewed = machine.serial.expect("client certificate renewed, valid until", 0, OFF_DEADLINE)?;
    }
    let signed = Instant::now();
    power_off(&mut machine)?;
    lab.supervisor.kubectl_ok(&["delete", "pod", POD, "--force", "--grace-period=0"])?;
    seen.recreated = apply(lab)?;
    if long() {
        wait_for("the certificate to expire", SHORT * 2, || Ok((signed.elapsed() > SHORT).then_some(())))?;
    }
    let from = machine.serial.position();
    let mut machine = machine.boot_again()?;
    if long() {
        seen.joined_again = machine.serial.expect("joining again", from, OFF_DEADLINE)?;
    }
    machine.serial.expect("host is up", from, OFF_DEADLINE)?;
    seen.after = running_pod(lab, &seen.recreated).with_context(|| machine.serial.text())?;
    lab.wait_ready(&mut machine, INDEX)?;
    seen.nodes_alike = node()? == first_node;
    lab.supervisor.kubectl_ok(&["delete", "pod", POD, "--force", "--grace-period=0"])?;
    power_off(&mut machine)?;
    Ok(seen)
}

fn running_pod(lab: &Lab, uid: &str) -> anyhow::Result<String> {
    wait_for("the new pod to run", OFF_DEADLINE, || {
        let phase = lab.supervisor.field("pod", POD, "{.status.phase} {.metadata.uid}")?;
        Ok((phase == format!("Running {uid}")).then_some(()))
    })?;
    lab.supervisor.field("pod", POD, UID_AND_RUNS)
}

#[test]
#[ignore = "waits minutes for a certificate to end: ./just soak runs it"]
fn client_certificate_near_its_end_is_renewed_by_the_real_control_plane() -> anyhow::Result<()> {
    let seen = off_host()?;
    ensure!(seen.renewed.contains("agent:"), "{seen:?}");
    Ok(())
}

#[test]
#[ignore = "waits minutes for a certificate to end: ./just soak runs it"]
fn client_certificate_expired_while_the_host_was_off_joins_again_by_the_token() -> anyhow::Result<()> {
    let seen = off_host()?;
    ensure!(seen.joined_again.contains("client certificate of node-5 expired at"), "{seen:?}");
    ensure!(seen.nodes_alike, "it is the same node as before: {seen:?}");
    Ok(())
}

#[test]
fn pod_recreated_with_its_name_while_the_host_was_off_is_a_new_pod() -> anyhow::Result<()> {
    let seen = off_host()?;
    ensure!(!seen.before.starts_with(&seen.recreated), "{seen:?}");
    ensure!(seen.after == format!("{} 0", seen.recreated), "{seen:?}");
    Ok(())
}
