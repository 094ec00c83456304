//! What befalls one host's way to the API server while the control plane itself is well: each trouble comes, is told on
//! the host's console, touches no pod, and goes.

use super::relay::{Relay, SUPERVISOR};
use super::{BACK, INDEX, Witness, renewed};
use crate::own::{STAYS, apply_script, console};
use anyhow::{Context, ensure};
use atoll_odd_registry::{Answer, Server, identity};
use atoll_qemu_test::lab::{BUSYBOX, Lab, node_name};
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::network::SERVER;
use atoll_qemu_test::process::{Background, wait_for};
use base64::Engine as _;
use std::time::{Duration, Instant};

/// How long somebody sits: the deadline of the webhook that does not answer.
const SITS: Duration = Duration::from_secs(30);

/// What happens to a pod is kept by the API server's watch cache for 75 s at least (its `eventFreshDuration`), and
/// afterwards until the room is needed.
const FRESH: Duration = Duration::from_secs(77);
/// How long the Supervisor is away.
const AWAY: Duration = Duration::from_secs(120);
/// How many pods make history by being written to, all of them each time.
const WRITERS: usize = 50;

/// A priority level without a seat, for one node and somebody who sits there all the same: the real server lets one
/// request through when there is none, and answers every other with 429 and `Retry-After`.
const NO_SEAT: &str = "
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: PriorityLevelConfiguration
metadata: {name: no-seat}
spec:
  type: Limited
  limited: {nominalConcurrencyShares: 0, lendablePercent: 0, borrowingLimitPercent: 0, limitResponse: {type: Reject}}
---
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: FlowSchema
metadata: {name: no-seat}
spec:
  matchingPrecedence: 2
  priorityLevelConfiguration: {name: no-seat}
  rules:
  - subjects: [{kind: User, user: {name: 'system:node:NODE'}}, {kind: User, user: {name: sits}}]
    resourceRules: [{verbs: ['*'], apiGroups: ['*'], resources: ['*'], namespaces: ['*'], clusterScope: true}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: sits, namespace: default}
rules: [{apiGroups: [''], resources: [configmaps], verbs: [create]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: sits, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: sits}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: sits}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: sits}
webhooks:
- name: sits.atoll.example
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 30
  clientConfig: {url: 'https://SILENT/', caBundle: AUTHORITY}
  matchConditions: [{name: sits, expression: \"request.userInfo.username == 'sits'\"}]
  rules: [{apiGroups: [''], apiVersions: ['*'], operations: [CREATE], resources: [configmaps]}]
";

/// A webhook that nobody answers, for what one node writes: the real server's 500.
const NOBODY: &str = "
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: nobody}
webhooks:
- name: nobody.atoll.example
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 1
  clientConfig: {url: 'https://127.0.0.1:1/'}
  matchConditions: [{name: node, expression: \"request.userInfo.username == 'system:node:NODE'\"}]
  rules:
  - {apiGroups: ['', coordination.k8s.io], apiVersions: ['*'], operations: ['*'],
     resources: [pods/status, leases, nodes/status]}
";

/// Somebody else at the Supervisor's address, with a certificate of their own.
pub struct Impostor(Server);

impl Impostor {
    pub fn sit() -> Self {
        let other = identity(&[SERVER, "kubernetes"], false);
        let says = |_: &atoll_odd_registry::Request| ("200 OK".to_owned(), b"{}".to_vec());
        Self(Server::listen(&format!("{SERVER}:0"), Some(&other), says))
    }

    pub fn address(&self) -> String {
        self.0.address.clone()
    }

    /// Fails when a host has said anything to it.
    pub fn heard_nothing(&self) -> anyhow::Result<()> {
        ensure!(self.0.asked().is_empty(), "it was told: {:?}", self.0.asked());
        Ok(())
    }
}

/// What came of two minutes without a Supervisor.
#[derive(Debug, Default)]
pub struct Away {
    /// What the console says of the 410.
    pub forgotten: String,
    /// Lines that the witness wrote meanwhile.
    pub ticks: usize,
}

/// One host, and the way that troubles reach it.
pub struct Troubled<'a> {
    pub lab: &'a Lab,
    pub machine: &'a Machine,
    pub relay: &'a mut Relay,
    pub witness: &'a Witness<'a>,
}

impl Troubled<'_> {
    fn object(&self, yaml: &str) -> anyhow::Result<()> {
        self.lab.supervisor.apply(&yaml.replace("NODE", &node_name(INDEX)))
    }

    /// From now on the lease cannot be renewed; answers with the console's line.
    fn lease_fails(&self, from: usize) -> anyhow::Result<String> {
        self.machine.serial.expect(&format!("lease of node {}: ", node_name(INDEX)), from, BACK)
    }

    /// The trouble is over: the lease is renewed, no pod was touched and no service started again.
    fn is_well(&self, from: usize) -> anyhow::Result<()> {
        self.machine.serial.expect(
            &format!("lease of node {} renewed again after", node_name(INDEX)),
            from,
            BACK,
        )?;
        self.lab.supervisor.wait_node_ready(&node_name(INDEX), BACK)?;
        self.witness.unchanged()?;
        let said = console(self.machine, from);
        ensure!(!said.contains(" starting") && !said.contains("panicked"), "something crashed:\n{said}");
        Ok(())
    }

    /// Everything that the node asks is answered with 429 for half a minute. Gives the console's line.
    pub fn too_many_requests(&mut self) -> anyhow::Result<String> {
        let from = self.machine.serial.position();
        let webhook = identity(&[SERVER], false);
        // It begins to answer, and says no more for as long as anybody listens.
        let silent = Server::listen(&format!("{SERVER}:0"), Some(&webhook), |_| Answer {
            head: "200 OK\r\nContent-Length: 100".to_owned(),
            body: Vec::new(),
            hang: true,
        });
        let authority = base64::engine::general_purpose::STANDARD.encode(webhook.cert.pem());
        self.object(&NO_SEAT.replace("SILENT", &silent.address).replace("AUTHORITY", &authority))?;
        let line = self.while_somebody_sits(&silent, from);
        for objects in [
            "flowschema,prioritylevelconfiguration/no-seat",
            "validatingwebhookconfiguration,role,rolebinding/sits",
        ] {
            let (kinds, name) = objects.split_once('/').context("kinds and a name")?;
            self.lab.supervisor.kubectl_ok(&["delete", kinds, name])?;
        }
        let line = line?;
        self.is_well(from).context("after a time of 429")?;
        Ok(line)
    }

    fn while_somebody_sits(&mut self, silent: &Server, from: usize) -> anyhow::Result<String> {
        // Taken up by the API server: it is in force.
        let dangling = "{.status.conditions[?(@.type==\"Dangling\")].status}";
        self.lab.supervisor.wait_field("flowschema", "no-seat", dangling, "False", BACK)?;
        let mut sits = self.somebody()?;
        wait_for("somebody to sit", BACK, || {
            if sits.check_alive().is_err() {
                // It was too early: rights or webhook were not in force.
                let delete = ["delete", "configmap", "sits", "--ignore-not-found"];
                self.lab.supervisor.kubectl_ok(&delete)?;
                sits = self.somebody()?;
            }
            Ok((!silent.asked().is_empty()).then_some(()))
        })?;
        let known = renewed(self.lab, &node_name(INDEX))?;
        // The watch is asked for anew, too.
        self.relay.lead(|_| SUPERVISOR.to_owned())?;
        let line = self.lease_fails(from)?;
        ensure!(renewed(self.lab, &node_name(INDEX))? == known, "the server let it through");
        sits.wait(SITS * 2)?;
        Ok(line)
    }

    fn somebody(&self) -> anyhow::Result<Background> {
        let create = ["create", "configmap", "sits", "--as", "sits"];
        let mut command = self.lab.supervisor.kubectl_command(&create);
        Background::spawn("who sits", &mut command, &self.lab.directory().join("sits.log"))
    }

    /// What the node writes is answered with 500 while a pod starts: its status is written in the end. Gives the
    /// console's line.
    pub fn server_errors(&self) -> anyhow::Result<String> {
        let from = self.machine.serial.position();
        let pod = "told-later";
        let phase = || self.lab.supervisor.field("pod", pod, "{.status.phase}");
        self.object(NOBODY)?;
        let trouble = || {
            let line = self.lease_fails(from)?;
            apply_script(self.lab, INDEX, pod, (BUSYBOX, STAYS), "Always")?;
            wait_for("the pod to run", BACK, || {
                Ok((self.lab.supervisor.kubectl(&["logs", pod])?.stdout == "ran\n").then_some(()))
            })?;
            ensure!(phase()? == "Pending", "the server let its status through");
            anyhow::Ok(line)
        };
        let line = trouble();
        self.lab.supervisor.kubectl_ok(&["delete", "validatingwebhookconfiguration", "nobody"])?;
        let line = line?;
        self.lab.supervisor.wait_field("pod", pod, "{.status.phase}", "Running", BACK)?;
        self.is_well(from).context("after a time of 500")?;
        self.lab.supervisor.kubectl_ok(&["delete", "pod", pod, "--wait=false"])?;
        Ok(line)
    }

    /// Somebody else answers at the Supervisor's address for a while. Gives the console's line.
    pub fn another_certificate(&mut self) -> anyhow::Result<String> {
        let from = self.machine.serial.position();
        let impostor = Impostor::sit();
        let there = impostor.address();
        self.relay.lead(move |_| there.clone())?;
        let line = self.lease_fails(from)?;
        impostor.heard_nothing()?;
        self.relay.lead(|_| SUPERVISOR.to_owned())?;
        self.is_well(from).context("after somebody else answered")?;
        Ok(line)
    }

    /// The Supervisor cannot be reached for two minutes, and forgets meanwhile what happened since: the watch is answered
    /// with a real 410.
    pub fn away_for_two_minutes(&mut self) -> anyhow::Result<Away> {
        let (from, before) = (self.machine.serial.position(), self.witness.ticks()?);
        self.relay.close()?;
        let cut = Instant::now();
        self.machine.serial.expect("pods keep running", from, BACK)?;
        let list = ["get", "--raw", "/api/v1/pods?limit=1"];
        let list: serde_json::Value = serde_json::from_str(&self.lab.supervisor.kubectl_ok(&list)?)?;
        let version =
            list["metadata"]["resourceVersion"].as_str().context("a list has a version")?.to_owned();
        let forgotten = self.make_history(cut, &version);
        self.lab.supervisor.kubectl_ok(&["delete", "pods", "-l", "makes=history", "--wait=false"])?;
        forgotten?;
        wait_for("two minutes to pass", AWAY * 2, || Ok((cut.elapsed() >= AWAY).then_some(())))?;
        self.relay.lead(|_| SUPERVISOR.to_owned())?;
        let forgotten = self.machine.serial.expect("forgotten (410)", from, BACK)?;
        self.is_well(from).context("after two minutes and a 410")?;
        // What the pod said meanwhile lay in the host's files.
        Ok(Away { forgotten, ticks: self.witness.ticks()? - before })
    }

    /// Writes to pods that nobody runs until the server remembers nothing of what followed `version`.
    fn make_history(&self, cut: Instant, version: &str) -> anyhow::Result<()> {
        let pod = |number| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: history-{number}, labels: {{makes: history}}}}\n\
                 spec: {{schedulerName: nobody, containers: [{{name: none, image: none}}]}}\n"
            )
        };
        self.lab.supervisor.apply(&(0..WRITERS).map(pod).collect::<String>())?;
        let watch = format!("/api/v1/pods?watch=1&resourceVersion={version}&timeoutSeconds=1");
        let mut round = 0;
        wait_for("the history to be forgotten", BACK, || {
            if cut.elapsed() < FRESH {
                return Ok(None);
            }
            round += 1;
            let label = format!("round={round}");
            self.lab.supervisor.kubectl_ok(&[
                "label",
                "pods",
                "-l",
                "makes=history",
                "--overwrite",
                &label,
            ])?;
            let answer = self.lab.supervisor.kubectl(&["get", "--raw", &watch])?;
            Ok(format!("{}{}", answer.stdout, answer.stderr)
                .contains("too old resource version")
                .then_some(()))
        })
    }
}
