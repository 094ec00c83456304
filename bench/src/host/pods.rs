//! Pods from the watch event to the status that says Running, and what they leave when they are many.

use super::clock::{between, ms, wall};
use super::control::{Inspected, Runtime};
use super::syscalls::Count;
use crate::figure::{Figure, Unit, median};
use crate::scripted::NODE;
use anyhow::{Context, ensure};
use atoll_scripted_cluster::{Change, Cluster};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Longest time for anything to happen to a pod. The clock leaps, so it costs nothing to be patient.
const DEADLINE: Duration = Duration::from_secs(600);
/// Where the agent has the logs of its pods.
const LOGS: &str = "/data/log/pods";
/// How many pods are started one after the other for one figure.
const SAMPLES: usize = 5;

/// What an idle pod runs.
const IDLE: &[&str] = &["/bench", "paced"];

/// The host's pods, by way of its control plane.
#[derive(Clone)]
pub struct Pods {
    /// The control plane.
    pub cluster: Cluster,
    /// The runtime, to look at what happened.
    pub runtime: Runtime,
    /// What the pods run.
    pub image: String,
    /// How many were started for a figure: no two have the same name.
    pub started: usize,
}

/// One start of a pod, in milliseconds from the watch event on.
struct Start {
    total: f64,
    phases: Vec<(&'static str, f64)>,
    inspected: Inspected,
}

fn path(name: &str) -> String {
    format!("/api/v1/namespaces/default/pods/{name}")
}

fn running(change: &Change) -> bool {
    let status = &change.object["status"];
    status["phase"] == "Running" && status["containerStatuses"][0]["state"]["running"].is_object()
}

impl Pods {
    /// Waits for the node to be Ready.
    ///
    /// # Errors
    /// At the deadline.
    pub async fn wait_ready(&self) -> anyhow::Result<()> {
        let ready = |cluster: &Cluster| {
            let node = cluster.get(&format!("/api/v1/nodes/{NODE}"))?;
            let conditions = node["status"]["conditions"].as_array()?.clone();
            conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True").then_some(())
        };
        self.cluster.wait(DEADLINE, ready).await.context("the node is not Ready")
    }

    /// Binds a pod to the node.
    pub fn bind(&self, name: &str, command: &[&str]) {
        let container = json!({
            "name": "main", "image": self.image, "imagePullPolicy": "IfNotPresent", "command": command,
            "resources": { "limits": { "memory": "128Mi" } },
        });
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": "default", "generation": 1 },
            "spec": { "nodeName": NODE, "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
                      "automountServiceAccountToken": false, "containers": [container] },
            "status": { "phase": "Pending" },
        });
        self.cluster.put(&path(name), pod);
    }

    /// Waits until a pod runs, and answers when it was bound and when that was said.
    ///
    /// # Errors
    /// At the deadline.
    pub async fn wait_running(&self, name: &str) -> anyhow::Result<(Change, Change)> {
        let look = |cluster: &Cluster| {
            let changes = cluster.changes(&path(name));
            let first = changes.first()?.clone();
            changes.into_iter().find(running).map(|change| (first, change))
        };
        let state = || self.cluster.get(&path(name)).map(|pod| pod["status"].to_string()).unwrap_or_default();
        self.cluster
            .wait(DEADLINE, look)
            .await
            .with_context(|| format!("pod {name} does not run: {}", state()))
    }

    /// Waits until a pod's log has so many lines, and answers what the last of them says.
    ///
    /// # Errors
    /// At the deadline.
    pub async fn wait_line(&self, name: &str, lines: usize) -> anyhow::Result<String> {
        let pod = self.cluster.get(&path(name)).with_context(|| format!("no pod {name}"))?;
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        let log = format!("{LOGS}/default_{name}_{uid}/main/0.log");
        let begun = Instant::now();
        loop {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(line) = text.lines().nth(lines - 1) {
                // `TIME stdout F what was said` (the log format of CRI).
                return Ok(line.splitn(4, ' ').nth(3).unwrap_or_default().to_owned());
            }
            ensure!(begun.elapsed() < DEADLINE, "pod {name} does not say its line {lines}; it said:\n{text}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Deletes a pod, as the API server does when somebody asks it to, and waits until it is gone.
    ///
    /// # Errors
    /// At the deadline.
    pub async fn delete(&self, name: &str) -> anyhow::Result<()> {
        let mut pod = self.cluster.get(&path(name)).with_context(|| format!("no pod {name}"))?;
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        pod["metadata"]["deletionGracePeriodSeconds"] = Value::from(1);
        self.cluster.put(&path(name), pod);
        let gone = |cluster: &Cluster| cluster.get(&path(name)).is_none().then_some(());
        self.cluster.wait(DEADLINE, gone).await.with_context(|| format!("pod {name} does not go"))
    }

    /// Starts a pod and takes its start apart.
    async fn start(&mut self, name: &str) -> anyhow::Result<Start> {
        self.bind(name, IDLE);
        let (bound, said) = self.wait_running(name).await?;
        let inspected = self.runtime.inspect(name).await?;
        let (bound_ns, said_ns) = (wall(bound.at), wall(said.at));
        let launch: f64 = inspected.launch.iter().map(|(_, ms)| ms).sum();
        let (created, started) = inspected.container_ns;
        let up = inspected.asked_ns + (launch * 1e6) as i64;
        let mut phases = vec![("agent", between(bound_ns, inspected.asked_ns))];
        phases.extend(inspected.launch.iter().copied());
        phases.push(("container-create", between(up, created)));
        phases.push(("container-start", between(created, started)));
        phases.push(("status", between(started, said_ns)));
        Ok(Start { total: ms(said.at - bound.at), phases, inspected })
    }

    /// Starts pods one after the other beside those that run already; each is gone before the next.
    ///
    /// # Errors
    /// When one does not run.
    pub async fn starts(&mut self, beside: usize, samples: usize) -> anyhow::Result<Vec<Figure>> {
        let mut starts = Vec::new();
        for _ in 0..samples {
            self.started += 1;
            let name = format!("start-{}", self.started);
            starts.push(self.start(&name).await?);
            self.delete(&name).await?;
        }
        let of = |pick: &dyn Fn(&Start) -> f64| median(&starts.iter().map(pick).collect::<Vec<_>>());
        let mut figures = vec![Figure::new(format!("pod.beside-{beside}.total"), of(&|s| s.total), Unit::Ms)];
        let first = starts.first().context("no sample")?;
        for (at, (phase, _)) in first.phases.iter().enumerate() {
            let name = format!("pod.beside-{beside}.{phase}");
            figures.push(Figure::new(name, of(&|s| s.phases.get(at).map_or(0.0, |(_, ms)| *ms)), Unit::Ms));
        }
        if beside == 0 {
            let inspected = &first.inspected;
            let step = |(name, at): &(String, f64)| Figure::new(format!("vmm.step.{name}"), *at, Unit::Ms);
            let exit = |(name, n): &(String, f64)| Figure::new(format!("vmm.exits.{name}"), *n, Unit::Count);
            figures.extend(inspected.steps.iter().map(step));
            figures.extend(inspected.exits.iter().map(exit));
        }
        Ok(figures)
    }

    /// Starts a pod and counts what its VMM asks of the host meanwhile.
    ///
    /// # Errors
    /// When it does not run, or the kernel does not count.
    pub async fn count(&mut self) -> anyhow::Result<Vec<Figure>> {
        let count = Count::begin()?;
        self.started += 1;
        let name = format!("start-{}", self.started);
        let start = self.start(&name).await?;
        let figures = count.of(start.inspected.vmm)?;
        self.delete(&name).await?;
        Ok(figures)
    }

    /// Fills the host up to so many idle pods, one after the other: many machines that boot at once under the repeatable
    /// clock hang the emulated host (docs/performance.md).
    ///
    /// # Errors
    /// When one does not run.
    pub async fn fill(&self, from: usize, to: usize) -> anyhow::Result<()> {
        for number in from..to {
            let name = format!("idle-{number}");
            self.bind(&name, IDLE);
            self.wait_running(&name).await?;
        }
        Ok(())
    }

    /// Deletes the pods of [`Pods::fill`].
    ///
    /// # Errors
    /// When one does not go.
    pub async fn empty(&self, count: usize) -> anyhow::Result<()> {
        for number in 0..count {
            self.delete(&format!("idle-{number}")).await?;
        }
        Ok(())
    }

    /// How many samples a figure takes.
    pub fn samples(full: bool) -> usize {
        if full { SAMPLES } else { 1 }
    }
}
