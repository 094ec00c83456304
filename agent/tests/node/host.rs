//! The real agent as a process, between a scripted control plane and a pretend runtime.

use crate::runtime::{Events, Runtime};
use atoll_scripted_cluster::{Cluster, TOKEN};
use atoll_spec::node::{AgentConfig, AgentStatus, JoinConfig};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Deadline for what should come soon, on a machine that is busy with other things.
pub const SOON: Duration = Duration::from_secs(60);
pub const NODE: &str = "/api/v1/nodes/node-1";
pub const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/node-1";
pub const PODS: &str = "/api/v1/namespaces/default/pods";

/// One host; its files go with it, and so does its agent.
pub struct Host {
    directory: tempfile::TempDir,
    agent: Option<Child>,
    pub cluster: Cluster,
    pub runtime: Runtime,
    /// Port of the kubelet API.
    pub port: u16,
}

/// Waits until `look` has something.
pub async fn until<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < deadline, "waited {} s for {what}", deadline.as_secs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Host {
    /// A host that knows how to join; its agent is not running yet.
    pub async fn new(events: Events) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let cluster = Cluster::start().await;
        let runtime = Runtime::start(&directory.path().join("cri.sock"), events);
        let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = probe.local_addr().expect("bound").port();
        let host = Self { directory, agent: None, cluster, runtime, port };
        host.configure(Some(host.join()));
        host
    }

    /// A host whose node is Ready.
    pub async fn ready() -> Self {
        let mut host = Self::new(Events::Told).await;
        host.start();
        host.wait_ready().await;
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What joins its cluster.
    pub fn join(&self) -> JoinConfig {
        JoinConfig { server: self.cluster.url(), token: TOKEN.into(), ca_pins: vec![self.cluster.pin()] }
    }

    /// Writes hostd's file, as hostd does.
    pub fn configure(&self, join: Option<JoinConfig>) {
        let config = AgentConfig {
            node_name: "node-1".into(),
            addresses: vec!["127.0.0.1".parse().expect("an address")],
            join,
            labels: [("rack".to_owned(), "7".to_owned())].into(),
            taints: Vec::new(),
            max_pods: 110,
            clock_synchronised: true,
            machine_id: "0".repeat(32),
            os_image: "Atoll test".into(),
        };
        let (path, partial) = (self.path("config.json"), self.path("config.partial"));
        std::fs::write(&partial, serde_json::to_vec(&config).expect("JSON")).expect("written");
        std::fs::rename(partial, path).expect("renamed");
    }

    /// Starts the agent.
    pub fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).expect("a log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-agent"));
        for (flag, name) in [
            ("--config", "config.json"),
            ("--status", "status.json"),
            ("--state", "state"),
            ("--pods", "pods"),
            ("--volumes", "volumes"),
            ("--logs", "logs"),
            ("--cri", "cri.sock"),
        ] {
            command.arg(flag).arg(self.path(name));
        }
        command.arg("--listen").arg(format!("127.0.0.1:{}", self.port));
        let agent =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("the agent");
        self.agent = Some(agent);
    }

    /// Kills the agent where it stands.
    pub fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().expect("it runs");
            agent.wait().expect("it is ours");
        }
    }

    /// Processor time that the agent has used.
    pub fn processor(&self) -> Duration {
        let pid = self.agent.as_ref().expect("it runs").id();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        // Fields 14 and 15 (proc_pid_stat(5)), in ticks of 10 ms; the name before them may hold spaces.
        let fields: Vec<&str> = stat.rsplit(") ").next().expect("a name").split(' ').collect();
        let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 10)
    }

    /// Everything the agent has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits for a line that has all of these words, and returns it.
    pub async fn line(&self, words: &[&str]) -> String {
        let begun = Instant::now();
        loop {
            let log = self.log();
            if let Some(line) = log.lines().find(|line| words.iter().all(|word| line.contains(word))) {
                return line.to_owned();
            }
            assert!(begun.elapsed() < SOON, "no line with {words:?} in\n{log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What the console is told.
    pub fn status(&self) -> Option<AgentStatus> {
        serde_json::from_slice(&std::fs::read(self.path("status.json")).ok()?).ok()
    }

    pub fn is_ready(&self) -> bool {
        let node = self.cluster.get(NODE).unwrap_or_default();
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    }

    pub async fn wait_ready(&self) {
        let begun = Instant::now();
        while !self.is_ready() {
            assert!(begun.elapsed() < SOON, "the node is not Ready:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Binds a pod with one container to the node; its spec can be added to.
    pub fn bind(&self, name: &str, more: Value) -> Value {
        let mut spec = json!({
            "nodeName": "node-1", "restartPolicy": "Always", "terminationGracePeriodSeconds": 1,
            "containers": [{ "name": "main", "image": "image:1" }],
        });
        for (field, value) in more.as_object().cloned().unwrap_or_default() {
            spec[field] = value;
        }
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "spec": spec,
            "metadata": { "name": name, "namespace": "default", "generation": 1 },
            "status": { "phase": "Pending" },
        });
        self.cluster.put(&format!("{PODS}/{name}"), pod)
    }

    /// Waits until the API server has a pod as running, and returns it.
    pub async fn wait_running(&self, name: &str) -> Value {
        let begun = Instant::now();
        loop {
            let pod = self.cluster.get(&format!("{PODS}/{name}")).unwrap_or_default();
            if pod["status"]["containerStatuses"][0]["state"]["running"].is_object() {
                return pod;
            }
            assert!(begun.elapsed() < SOON, "pod {name} does not run: {pod:#}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// When the lease was renewed last.
    pub fn renewed(&self) -> String {
        let lease = self.cluster.get(LEASE).unwrap_or_default();
        lease["spec"]["renewTime"].as_str().unwrap_or_default().to_owned()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- what the agent said\n{}", self.log());
        }
    }
}
