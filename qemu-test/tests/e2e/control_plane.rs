//! The control plane goes away and comes back, whole or in parts, and a host is off meanwhile: pods do not notice what
//! they need not, and the node's truth is right afterwards.
//!
//! Most of these tests harm the Supervisor that all others use: each waits until nobody else needs it ([`alone`]). One
//! host of its own goes through what harms only its own way there ([`troubles`]), beside other tests.

mod relay;
mod troubles;

use crate::own::{self, STAYS, apply_script, own_host, power_off};
use crate::shared::{self, Shared, alone_in_the_lab, lab, long, machine};
use anyhow::{Context, ensure};
use atoll_qemu_test::artifacts::{Artifacts, Profile};
use atoll_qemu_test::inspect::{Step, Target};
use atoll_qemu_test::lab::{BUSYBOX, Lab, node_name};
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::network::SERVER;
use atoll_qemu_test::process::wait_for;
use relay::{Relay, SUPERVISOR};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use troubles::{Away, Impostor, Troubled};

/// Deadline for what follows the control plane's return.
const BACK: Duration = Duration::from_secs(180);
/// The host that is off while things happen.
const INDEX: usize = 4;
/// Where it finds the Supervisor.
const PORT: u16 = 7443;
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
struct Witness<'a> {
    lab: &'a Lab,
    name: &'static str,
    identity: String,
}

const IDENTITY: &str = "{.metadata.uid} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount} {.status.podIP}";

impl<'a> Witness<'a> {
    /// On host `index`.
    fn begin(lab: &'a Lab, index: usize, name: &'static str) -> anyhow::Result<Self> {
        let script = "n=0; while true; do echo tick $n; n=$((n+1)); sleep 1; done";
        apply_script(lab, index, name, (BUSYBOX, script), "Always")?;
        let mut witness = Self { lab, name, identity: String::new() };
        lab.supervisor.wait_field("pod", name, "{.status.phase}", "Running", BACK)?;
        witness.identity = witness.field(IDENTITY)?;
        let identity = &witness.identity;
        ensure!(identity.split(' ').nth(2) == Some("0"), "it was restarted already: {identity}");
        Ok(witness)
    }

    fn field(&self, path: &str) -> anyhow::Result<String> {
        self.lab.supervisor.field("pod", self.name, path)
    }

    /// The same container of the same pod runs, was never restarted, and has all of its log.
    fn unchanged(&self) -> anyhow::Result<()> {
        let now = self.field(IDENTITY)?;
        ensure!(now == self.identity, "{now} ≠ {}", self.identity);
        let ready = "{.status.conditions[?(@.type==\"Ready\")].status}";
        self.lab.supervisor.wait_field("pod", self.name, ready, "True", BACK)?;
        // What says yes here has the node's word by way of the API server, the kubelet API and the runtime.
        let here = self.lab.supervisor.kubectl_ok(&["exec", self.name, "--", "echo", "here"])?;
        ensure!(here.trim() == "here", "{here:?}");
        let log = self.log()?;
        for (n, line) in log.lines().enumerate() {
            ensure!(line == format!("tick {n}"), "line {n} of its log is {line:?}");
        }
        Ok(())
    }

    fn log(&self) -> anyhow::Result<String> {
        self.lab.supervisor.kubectl_ok(&["logs", self.name])
    }

    fn ticks(&self) -> anyhow::Result<usize> {
        Ok(self.log()?.lines().count())
    }
}

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        // The lab dies with the tests: one that is left over harms nothing but their speed.
        let _ =
            self.lab.supervisor.kubectl(&["delete", "pod", self.name, "--wait=false", "--grace-period=1"]);
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
fn api_server_killed_comes_back_and_pods_stay() -> anyhow::Result<()> {
    let alone = alone();
    let witness = Witness::begin(&alone.host, 0, "api-killed")?;
    alone.host.supervisor.kill_component("kube-apiserver")?;
    alone.host.supervisor.wait_ready()?;
    node_is_back(&alone.host)?;
    witness.unchanged()?;
    Witness::begin(&alone.host, 0, "after-api-killed").map(drop)
}

#[test]
fn pods_changed_while_the_agent_sleeps_and_the_api_server_restarts_are_caught_up_with() -> anyhow::Result<()>
{
    let alone = alone();
    let (host, inspector) = (&alone.host, alone.host.inspector());
    let witness = Witness::begin(host, 0, "changed-stays")?;
    let gone = Witness::begin(host, 0, "changed-gone")?;
    // While the agent sleeps its watch breaks, and then things happen that nobody tells it; all of it well within the time
    // that PID 1 gives it.
    let agent = || Target::Service("agent".to_owned());
    inspector.signal(agent(), 19)?;
    let meanwhile = || {
        host.supervisor.kill_component("kube-apiserver")?;
        host.supervisor.wait_ready()?;
        host.supervisor.kubectl_ok(&["delete", "pod", gone.name, "--force", "--grace-period=0"])?;
        apply_script(host, 0, "changed-new", (BUSYBOX, STAYS), "Always")
    };
    let meanwhile = meanwhile();
    inspector.signal(agent(), 18)?;
    meanwhile?;
    inspector.at(gone.name, Step::Removed, BACK, None)?;
    host.supervisor.wait_field("pod", "changed-new", "{.status.phase}", "Running", BACK)?;
    node_is_back(host)?;
    witness.unchanged()?;
    host.supervisor.kubectl_ok(&["delete", "pod", "changed-new", "--wait=false"]).map(drop)
}

#[test]
fn etcd_killed_comes_back_and_pods_stay() -> anyhow::Result<()> {
    let alone = alone();
    let witness = Witness::begin(&alone.host, 0, "etcd-killed")?;
    alone.host.supervisor.kill_component("etcd")?;
    alone.host.supervisor.wait_ready()?;
    node_is_back(&alone.host)?;
    witness.unchanged()?;
    Witness::begin(&alone.host, 0, "after-etcd-killed").map(drop)
}

#[test]
fn node_object_deleted_by_hand_comes_back_ready_and_pods_stay() -> anyhow::Result<()> {
    // Nobody else's node: hosts of their own may go on beside.
    let host = &shared::alone();
    let witness = Witness::begin(host, 0, "node-deleted")?;
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
    Witness::begin(host, 0, "after-node-deleted").map(drop)
}

/// What came of a host that could not reach the control plane in many ways, and was off for a while.
#[derive(Debug, Default)]
struct OffHost {
    unreachable_at_boot: String,
    another_certificate_while_joining: String,
    too_many_requests: String,
    server_errors: String,
    another_certificate: String,
    /// Empty in the long form: its certificate does not last through that.
    away: Away,
    /// Empty in the long form: there it joins again.
    unreachable_at_second_boot: String,
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

/// One host for the tests below: it goes through every trouble, it is switched off, its pod is deleted and made again, it
/// is switched on. In the long form its certificate is renewed before and expires meanwhile.
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
    let mut seen = OffHost::default();
    let mut relay = Relay::shut(PORT);
    let mut machine = join_in_the_end(artifacts, lab, &mut relay, &mut seen)?;
    let node = || lab.supervisor.field("node", &node_name(INDEX), "{.metadata.uid}");
    let first_node = node()?;
    apply(lab)?;
    lab.supervisor.wait_field("pod", POD, "{.status.phase}", "Running", OFF_DEADLINE)?;
    seen.before = lab.supervisor.field("pod", POD, UID_AND_RUNS)?;
    {
        let witness = Witness::begin(lab, INDEX, "untroubled")?;
        let (machine, relay, witness) = (&machine, &mut relay, &witness);
        let mut troubled = Troubled { lab, machine, relay, witness };
        seen.too_many_requests = troubled.too_many_requests()?;
        seen.server_errors = troubled.server_errors()?;
        seen.another_certificate = troubled.another_certificate()?;
        if !long() {
            seen.away = troubled.away_for_two_minutes()?;
        }
    }
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
    if !long() {
        relay.close()?;
    }
    let mut machine = machine.boot_again()?;
    if long() {
        seen.joined_again = machine.serial.expect("joining again", from, OFF_DEADLINE)?;
    } else {
        seen.unreachable_at_second_boot =
            machine.serial.expect("the watch of pods broke", from, OFF_DEADLINE)?;
        relay.lead(|_| SUPERVISOR.to_owned())?;
    }
    machine.serial.expect("host is up", from, OFF_DEADLINE)?;
    seen.after = running_pod(lab, &seen.recreated).with_context(|| machine.serial.text())?;
    lab.wait_ready(&mut machine, INDEX)?;
    seen.nodes_alike = node()? == first_node;
    lab.supervisor.kubectl_ok(&["delete", "pod", POD, "--force", "--grace-period=0"])?;
    power_off(&mut machine)?;
    Ok(seen)
}

/// Boots the host while nobody answers it, then somebody else does once the pin was checked, then the Supervisor.
fn join_in_the_end(
    artifacts: &Artifacts,
    lab: &Lab,
    relay: &mut Relay,
    seen: &mut OffHost,
) -> anyhow::Result<Machine> {
    let config = lab.machine_config(INDEX)?.replace(SUPERVISOR, &format!("{SERVER}:{PORT}"));
    let mut machine = Machine::boot(lab.machine_spec(artifacts, Profile::Test, INDEX, Some(config)))?;
    seen.unreachable_at_boot = machine.serial.expect("cannot join", 0, OFF_DEADLINE)?;
    let (from, impostor) = (machine.serial.position(), Impostor::sit());
    let there = impostor.address();
    // The first connection is for the cluster-info that pin and signature vouch for, the next are to be verified.
    relay.lead(move |before| if before % 2 == 0 { SUPERVISOR.to_owned() } else { there.clone() })?;
    seen.another_certificate_while_joining =
        machine.serial.expect("is not from the CA that the pin vouches for", from, OFF_DEADLINE)?;
    impostor.heard_nothing()?;
    relay.lead(|_| SUPERVISOR.to_owned())?;
    lab.wait_ready(&mut machine, INDEX)?;
    Ok(machine)
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

#[test]
fn supervisor_unreachable_at_boot_is_joined_when_it_comes() -> anyhow::Result<()> {
    let line = &off_host()?.unreachable_at_boot;
    ensure!(line.contains("does not answer: is the address right, and is the Supervisor up?"), "{line}");
    Ok(())
}

#[test]
fn supervisor_unreachable_at_the_boot_of_a_joined_host_is_found_when_it_comes() -> anyhow::Result<()> {
    let seen = off_host()?;
    let line = &seen.unreachable_at_second_boot;
    ensure!(long() || line.contains("is begun again; pods keep running"), "{line}");
    ensure!(seen.nodes_alike, "it is the same node as before: {seen:?}");
    Ok(())
}

#[test]
fn another_certificate_after_the_pin_was_checked_gets_no_token() -> anyhow::Result<()> {
    let line = &off_host()?.another_certificate_while_joining;
    ensure!(line.contains("cannot join") && line.contains("the token was not sent"), "{line}");
    Ok(())
}

#[test]
fn another_certificate_after_joining_is_told_nothing_and_pods_stay() -> anyhow::Result<()> {
    let line = &off_host()?.another_certificate;
    ensure!(line.contains("certificate") && line.contains("pods keep running"), "{line}");
    Ok(())
}

#[test]
fn real_429_for_half_a_minute_leaves_pods_and_the_lease_comes_back() -> anyhow::Result<()> {
    let line = &off_host()?.too_many_requests;
    ensure!(line.contains("429") && line.contains("pods keep running"), "{line}");
    Ok(())
}

#[test]
fn status_refused_with_real_500_is_written_in_the_end() -> anyhow::Result<()> {
    let line = &off_host()?.server_errors;
    ensure!(line.contains("500") && line.contains("pods keep running"), "{line}");
    Ok(())
}

#[test]
fn supervisor_away_for_two_minutes_after_joining_leaves_pods_and_the_lease_comes_back() -> anyhow::Result<()>
{
    let ticks = off_host()?.away.ticks;
    ensure!(long() || ticks >= 60, "{ticks} lines in over two minutes");
    Ok(())
}

#[test]
fn watch_history_forgotten_by_the_real_server_is_listed_anew_and_pods_stay() -> anyhow::Result<()> {
    let line = &off_host()?.away.forgotten;
    ensure!(long() || line.contains("pods are listed anew"), "{line}");
    Ok(())
}
