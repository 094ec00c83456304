//! What a pod asks for, checked and in the shape that `plan` works with ◇.
//!
//! Called by `worker` whenever the API server's copy changed. Invariant: a [`Desired`] holds nothing this node
//! cannot do; [`super::refuse`] says what that is.

use k8s_openapi::api::core::v1 as api;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

/// Who a pod is. Two pods of one name are told apart by the uid.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodKey {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

impl PodKey {
    /// The key of an API object; `None` when it has no name or uid, which the API server never sends.
    pub fn of(pod: &api::Pod) -> Option<Self> {
        let meta = &pod.metadata;
        Some(Self { namespace: meta.namespace.clone()?, name: meta.name.clone()?, uid: meta.uid.clone()? })
    }

    /// As people name it in events: `name_namespace(uid)`.
    pub fn long(&self) -> String {
        format!("{}_{}({})", self.name, self.namespace, self.uid)
    }
}

impl std::fmt::Display for PodKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A hundred years, for whatever somebody wants to take for ever.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// When a container that ended is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// Always.
    Always,
    /// After a failure.
    OnFailure,
    /// Never.
    Never,
}

impl Restart {
    fn parse(text: Option<&str>) -> Option<Self> {
        match text? {
            "Always" => Some(Self::Always),
            "OnFailure" => Some(Self::OnFailure),
            "Never" => Some(Self::Never),
            _ => None,
        }
    }
}

/// What a container is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container that goes on running; the next one starts when it has started.
    Sidecar,
    /// An ordinary container.
    Main,
    /// Added to a running pod to look at it; runs once and counts for nothing.
    Ephemeral,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pull {
    /// Every time a container is started.
    Always,
    /// When the runtime does not have it.
    IfNotPresent,
    /// Never.
    Never,
}

/// What a probe or hook does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handler {
    /// Runs a command in the container; 0 is success.
    Exec(Vec<String>),
    /// Asks over HTTP; 200 to 399 is success.
    Http {
        /// Over TLS, without checking the certificate.
        tls: bool,
        /// Address; the pod's when empty.
        host: String,
        /// Port.
        port: u16,
        /// Path and query.
        path: String,
        /// Extra headers.
        headers: Vec<(String, String)>,
    },
    /// Opens a connection.
    Tcp {
        /// Address; the pod's when empty.
        host: String,
        /// Port.
        port: u16,
    },
    /// Asks the gRPC health service.
    Grpc {
        /// Port.
        port: u16,
        /// Service to ask for.
        service: String,
    },
    /// Waits (hooks only).
    Sleep(Duration),
    /// Cannot be done as it is written, and why. It fails where it is used, and the pod runs.
    Unusable(String),
}

/// A probe with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// What it does.
    pub handler: Handler,
    /// Wait after the container's start.
    pub initial_delay: Duration,
    /// Time between probes.
    pub period: Duration,
    /// Deadline of one probe.
    pub timeout: Duration,
    /// Successes in a row that count.
    pub successes: u32,
    /// Failures in a row that count.
    pub failures: u32,
    /// Grace when this probe's failure kills the container.
    pub grace: Option<Duration>,
}

/// One container of a pod.
#[derive(Debug, Clone)]
pub struct Container {
    /// Name, unique in the pod.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Image as written in the pod.
    pub image: String,
    /// When to pull it.
    pub pull: Pull,
    /// Restart policy of this container.
    pub restart: Restart,
    /// Exit codes that are restarted whatever the policy says.
    restart_rules: Vec<api::ContainerRestartRule>,
    /// Startup probe.
    pub startup: Option<Probe>,
    /// Liveness probe.
    pub liveness: Option<Probe>,
    /// Readiness probe.
    pub readiness: Option<Probe>,
    /// Run after the start.
    pub post_start: Option<Handler>,
    /// Run before the stop.
    pub pre_stop: Option<Handler>,
    /// Changes when the container must be replaced: its name and image.
    pub hash: u64,
    /// The rest of it.
    pub spec: Arc<api::Container>,
}

impl Container {
    /// Its place in the pod, for events.
    pub fn field(&self) -> String {
        let list = match self.role {
            Role::Init | Role::Sidecar => "initContainers",
            Role::Main => "containers",
            Role::Ephemeral => "ephemeralContainers",
        };
        format!("spec.{list}{{{}}}", self.name)
    }

    /// Whether it is started again after it ended with `exit_code`.
    pub fn restarts_after(&self, exit_code: i32) -> bool {
        let by_rule = self.restart_rules.iter().any(|rule| {
            rule.exit_codes.as_ref().is_some_and(|codes| {
                let named = codes.values.iter().flatten().any(|v| *v == exit_code);
                if codes.operator == "NotIn" { !named } else { named }
            })
        });
        by_rule
            || match self.restart {
                Restart::Always => true,
                Restart::OnFailure => exit_code != 0,
                Restart::Never => false,
            }
    }
}

/// A pod that is to run, or to end.
#[derive(Debug, Clone)]
pub struct Desired {
    /// Who.
    pub key: PodKey,
    /// The API server's copy.
    pub pod: Arc<api::Pod>,
    /// Init containers, ordinary ones, ephemeral ones, each kind in order.
    pub containers: Vec<Container>,
    /// Time its containers get to end.
    pub grace: Duration,
    /// Longest the pod may be active.
    pub active_deadline: Option<Duration>,
    /// Set when somebody deleted it: the grace they gave.
    pub deleted: Option<Duration>,
}

impl Desired {
    /// Reads a pod. What is refused is not looked at here.
    ///
    /// # Errors
    /// A sentence for the pod's status.
    pub fn read(key: PodKey, pod: Arc<api::Pod>) -> Result<Self, String> {
        let spec = pod.spec.as_ref().ok_or("the pod has no spec")?;
        let policy = Restart::parse(spec.restart_policy.as_deref()).unwrap_or(Restart::Always);
        let mut containers = Vec::new();
        for container in spec.init_containers.iter().flatten() {
            let sidecar = container.restart_policy.as_deref() == Some("Always");
            let role = if sidecar { Role::Sidecar } else { Role::Init };
            containers.push(read_container(container, role, policy));
        }
        for container in &spec.containers {
            containers.push(read_container(container, Role::Main, policy));
        }
        for container in spec.ephemeral_containers.iter().flatten() {
            containers.push(read_container(&ordinary(container)?, Role::Ephemeral, Restart::Never));
        }
        let grace = seconds(spec.termination_grace_period_seconds.unwrap_or(30));
        let deleted = pod.metadata.deletion_timestamp.as_ref().map(|_| {
            seconds(
                pod.metadata
                    .deletion_grace_period_seconds
                    .or(spec.termination_grace_period_seconds)
                    .unwrap_or(30),
            )
        });
        let active_deadline = spec.active_deadline_seconds.map(seconds);
        Ok(Self { key, containers, grace, active_deadline, deleted, pod: pod.clone() })
    }

    /// Its spec.
    pub fn spec(&self) -> &api::PodSpec {
        // `read` refused a pod without one.
        self.pod.spec.as_ref().expect("checked by read")
    }

    /// A container by name.
    pub fn container(&self, name: &str) -> Option<&Container> {
        self.containers.iter().find(|c| c.name == name)
    }

    /// Containers of one role, in order.
    pub fn of_role(&self, role: Role) -> impl DoubleEndedIterator<Item = &Container> {
        self.containers.iter().filter(move |c| c.role == role)
    }

    /// Containers that come before the main ones, in order.
    pub fn before_main(&self) -> impl Iterator<Item = &Container> {
        self.containers.iter().filter(|c| matches!(c.role, Role::Init | Role::Sidecar))
    }

    /// The phase the API server has, when it is one that nothing leaves.
    pub fn terminal_phase(&self) -> Option<&str> {
        self.pod.status.as_ref()?.phase.as_deref().filter(|p| matches!(*p, "Succeeded" | "Failed"))
    }
}

/// The API takes any number of seconds; a time that is added to the clock must stay one.
fn seconds(count: i64) -> Duration {
    Duration::from_secs(u64::try_from(count).unwrap_or(0)).min(LONGEST)
}

/// An ephemeral container is one of the ordinary kind with some fields forbidden.
pub(super) fn ordinary(container: &api::EphemeralContainer) -> Result<api::Container, String> {
    let wrong = |e: serde_json::Error| format!("ephemeral container {}: {e}", container.name);
    serde_json::to_value(container).and_then(serde_json::from_value).map_err(wrong)
}

fn read_container(spec: &api::Container, role: Role, policy: Restart) -> Container {
    let own = Restart::parse(spec.restart_policy.as_deref());
    // An init container of an `Always` pod has to succeed once: it is restarted on failure.
    let inherited = if role == Role::Init && policy == Restart::Always { Restart::OnFailure } else { policy };
    let probe = |probe: &Option<api::Probe>| probe.as_ref().map(|p| read_probe(spec, p));
    let lifecycle = spec.lifecycle.as_ref();
    let hook = |handler: &Option<api::LifecycleHandler>| handler.as_ref().and_then(|h| read_hook(spec, h));
    let image = spec.image.clone().unwrap_or_default();
    let mut hasher = DefaultHasher::new();
    (&spec.name, &image).hash(&mut hasher);
    Container {
        name: spec.name.clone(),
        role,
        pull: match spec.image_pull_policy.as_deref() {
            Some("Always") => Pull::Always,
            Some("Never") => Pull::Never,
            _ => Pull::IfNotPresent,
        },
        restart: own.unwrap_or(inherited),
        restart_rules: spec.restart_policy_rules.clone().unwrap_or_default(),
        startup: probe(&spec.startup_probe),
        liveness: probe(&spec.liveness_probe),
        readiness: probe(&spec.readiness_probe),
        post_start: lifecycle.and_then(|l| hook(&l.post_start)),
        pre_stop: lifecycle.and_then(|l| hook(&l.pre_stop)),
        hash: hasher.finish(),
        image,
        spec: Arc::new(spec.clone()),
    }
}

fn read_handler(container: &api::Container, probe: &api::Probe) -> Result<Handler, String> {
    let handler = if let Some(exec) = &probe.exec {
        Handler::Exec(exec.command.clone().unwrap_or_default())
    } else if let Some(http) = &probe.http_get {
        read_http(container, http)?
    } else if let Some(tcp) = &probe.tcp_socket {
        Handler::Tcp { host: tcp.host.clone().unwrap_or_default(), port: port(container, &tcp.port)? }
    } else if let Some(grpc) = &probe.grpc {
        Handler::Grpc {
            port: u16::try_from(grpc.port).map_err(|_| format!("port {} is not one", grpc.port))?,
            service: grpc.service.clone().unwrap_or_default(),
        }
    } else {
        return Err("it has no handler".into());
    };
    Ok(handler)
}

fn read_probe(container: &api::Container, probe: &api::Probe) -> Probe {
    let count = |value: Option<i32>, default: u32| {
        value.and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default)
    };
    let duration = |value, default| Duration::from_secs(count(value, default).into());
    Probe {
        handler: read_handler(container, probe).unwrap_or_else(Handler::Unusable),
        initial_delay: Duration::from_secs(count(probe.initial_delay_seconds, 0).into()),
        period: duration(probe.period_seconds, 10),
        timeout: duration(probe.timeout_seconds, 1),
        successes: count(probe.success_threshold, 1),
        failures: count(probe.failure_threshold, 3),
        grace: probe.termination_grace_period_seconds.map(seconds),
    }
}

fn read_http(container: &api::Container, http: &api::HTTPGetAction) -> Result<Handler, String> {
    let path = http.path.clone().unwrap_or_default();
    Ok(Handler::Http {
        tls: http.scheme.as_deref() == Some("HTTPS"),
        host: http.host.clone().unwrap_or_default(),
        port: port(container, &http.port)?,
        path: if path.starts_with('/') { path } else { format!("/{path}") },
        headers: http.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect(),
    })
}

/// `None` for a TCP hook, which has never had an effect.
fn read_hook(container: &api::Container, hook: &api::LifecycleHandler) -> Option<Handler> {
    if let Some(exec) = &hook.exec {
        Some(Handler::Exec(exec.command.clone().unwrap_or_default()))
    } else if let Some(http) = &hook.http_get {
        Some(read_http(container, http).unwrap_or_else(Handler::Unusable))
    } else {
        hook.sleep.as_ref().map(|s| Handler::Sleep(seconds(s.seconds)))
    }
}

fn port(container: &api::Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|p| p.name.as_deref() == Some(name));
            match named.map(|p| p.container_port).or_else(|| name.parse().ok()) {
                Some(number) => number,
                None => return Err(format!("no port of the container is named '{name}'")),
            }
        }
    };
    u16::try_from(number)
        .ok()
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("port {number} is not one: use 1 to 65535"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod;

    #[test]
    fn reads_defaults() {
        let desired = pod("{containers: [{name: a, image: i, ports: [{name: web, containerPort: 80}],
               livenessProbe: {httpGet: {port: web}}}]}");
        assert_eq!(desired.grace, Duration::from_secs(30));
        let a = &desired.containers[0];
        assert_eq!((a.role, a.restart, a.pull), (Role::Main, Restart::Always, Pull::IfNotPresent));
        let probe = a.liveness.as_ref().unwrap();
        assert_eq!(
            (probe.period, probe.timeout, probe.failures, probe.successes),
            (Duration::from_secs(10), Duration::from_secs(1), 3, 1)
        );
        let http =
            Handler::Http { tls: false, host: String::new(), port: 80, path: "/".into(), headers: vec![] };
        assert_eq!(probe.handler, http);
    }

    #[test]
    fn port_without_a_name_spoils_its_probe_or_hook_alone() {
        let desired = pod("{containers: [{name: a, image: i, ports: [{name: web, containerPort: 80}],
               livenessProbe: {tcpSocket: {port: wbe}}, readinessProbe: {httpGet: {port: web}},
               lifecycle: {preStop: {httpGet: {port: wbe}}}}]}");
        let why = Handler::Unusable("no port of the container is named 'wbe'".into());
        let a = &desired.containers[0];
        assert_eq!((&a.liveness.as_ref().unwrap().handler, a.pre_stop.as_ref()), (&why, Some(&why)));
        assert!(matches!(a.readiness.as_ref().unwrap().handler, Handler::Http { port: 80, .. }));
    }

    #[test]
    fn init_containers_and_sidecars() {
        let desired =
            pod("{initContainers: [{name: i, image: i}, {name: s, image: i, restartPolicy: Always}],
              containers: [{name: a, image: i}]}");
        let roles: Vec<_> = desired.containers.iter().map(|c| (c.role, c.restart)).collect();
        assert_eq!(
            roles,
            [
                (Role::Init, Restart::OnFailure),
                (Role::Sidecar, Restart::Always),
                (Role::Main, Restart::Always)
            ]
        );
    }

    #[test]
    fn restart_rules_win_over_the_policy() {
        let desired = pod("{restartPolicy: Never, containers: [{name: a, image: i, restartPolicy: Never,
               restartPolicyRules: [{action: Restart, exitCodes: {operator: In, values: [42]}}]}]}");
        assert!(desired.containers[0].restarts_after(42));
        assert!(!desired.containers[0].restarts_after(1));
    }
}
