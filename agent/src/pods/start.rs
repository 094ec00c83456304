//! Makes a sandbox, starts and stops containers: what `plan` decided, done through CRI.
//!
//! Called by `worker`, each call in a task of its own. Invariant: every failure comes back as the reason and message
//! that the pod's status shows.

use super::container_config::{self, Parts};
use super::context::Context;
use super::desired::{Container, Desired};
use super::{dns, env, refuse, sandbox_config};
use crate::events::{Severity, pod_reference};
use crate::probes;
use atoll_cri::v1;
use jiff::Timestamp;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Wait after a failure that has no back-off of its own.
const RETRY: Duration = Duration::from_secs(10);
/// The longest wait after any failure: that of image pulls.
pub const LONGEST: Duration = Duration::from_secs(300);
/// Longest postStart hook; the API sets no limit.
const POST_START: Duration = Duration::from_secs(3600);
/// A container always gets this much between being asked and being killed.
const LEAST_GRACE: Duration = Duration::from_secs(2);

/// Why a container is not started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartError {
    /// In a word, as people know it.
    pub reason: &'static str,
    /// In a sentence.
    pub message: String,
    /// When to try again.
    pub again: Timestamp,
}

impl StartError {
    /// To be tried again after the usual wait.
    pub fn later(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), again: Timestamp::now() + RETRY }
    }
}

/// Makes volumes ready, then the sandbox.
///
/// # Errors
/// The event's reason, and why.
pub async fn sandbox(ctx: &Context, desired: &Desired, attempt: u32) -> Result<(), (&'static str, String)> {
    let facts = ctx.facts(desired, &[]);
    ctx.volumes.prepare(desired, &facts).await.map_err(|e| ("FailedMount", e.to_string()))?;
    let failed = |why: String| ("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {why}"));
    log_directory(&ctx.dirs.pod_logs(desired)).map_err(failed)?;
    let config = sandbox_config::sandbox(desired, attempt, &ctx.dirs, &ctx.cluster_dns());
    ctx.cri.run_sandbox(config, &ctx.handler(desired)).await.map_err(|e| failed(e.to_string()))?;
    Ok(())
}

/// What a start needs beside the pod.
#[derive(Debug, Clone)]
pub struct Start {
    /// Name of the container.
    pub name: String,
    /// How often it was started before.
    pub restarts: u32,
    /// Sandbox to start it in, and which one of the pod it is.
    pub sandbox: String,
    /// Number of the sandbox.
    pub sandbox_attempt: u32,
    /// Addresses of the pod.
    pub ips: Vec<String>,
}

/// Pulls, creates, starts, runs the postStart hook.
///
/// # Errors
/// As the status shows it.
pub async fn container(ctx: &Context, desired: &Desired, start: &Start) -> Result<(), StartError> {
    let Some(container) = desired.container(&start.name) else {
        return Err(StartError::later("CreateContainerConfigError", "the pod has no such container"));
    };
    let event = |severity, reason, message: String| {
        let object = pod_reference(&desired.pod, Some(container.field()));
        ctx.events.record(object, severity, reason, message);
    };
    if let Some(why) = refuse::check_ephemeral(&desired.pod, &start.name) {
        let why = format!("this node cannot run the container: {why}");
        event(Severity::Warning, "Failed", format!("Error: {why}"));
        return Err(StartError::later("CreateContainerConfigError", why));
    }
    let sandbox = sandbox_config::sandbox(desired, start.sandbox_attempt, &ctx.dirs, &ctx.cluster_dns());
    let image = ctx.images.ensure(desired, container, &sandbox).await?;
    let config = configure(ctx, desired, container, start, &image).await.map_err(|why| {
        event(Severity::Warning, "Failed", format!("Error: {why}"));
        StartError::later("CreateContainerConfigError", why)
    })?;
    let id = ctx.cri.create_container(&start.sandbox, config, sandbox).await.map_err(|error| {
        event(Severity::Warning, "Failed", format!("Error: {error}"));
        StartError::later("CreateContainerError", error.status.message())
    })?;
    event(Severity::Normal, "Created", "Container created".into());
    ctx.cri.start_container(&id).await.map_err(|error| {
        event(Severity::Warning, "Failed", format!("Error: {}", error.status.message()));
        StartError::later("RunContainerError", error.status.message())
    })?;
    event(Severity::Normal, "Started", "Container started".into());
    post_start(ctx, desired, container, &id, start).await
}

async fn post_start(
    ctx: &Context,
    desired: &Desired,
    container: &Container,
    id: &str,
    start: &Start,
) -> Result<(), StartError> {
    let Some(hook) = &container.post_start else { return Ok(()) };
    let ip = start.ips.first().map(String::as_str).unwrap_or_default();
    let ran = probes::hook(&ctx.cri, id, ip, hook, POST_START);
    // The hook ends with its container.
    let ended = async {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            match ctx.cri.container_status(id).await {
                Ok(Some(status)) if status.state == v1::ContainerState::ContainerRunning as i32 => {}
                Err(_) => {}
                _ => return Err("the container ended before its hook".to_owned()),
            }
        }
    };
    let result = tokio::select! { result = ran => result, result = ended => result };
    let Err(why) = result else { return Ok(()) };
    tracing::info!(pod = %desired.key, container = container.name, why, "postStart hook");
    let object = pod_reference(&desired.pod, Some(container.field()));
    ctx.events.record(object, Severity::Warning, "FailedPostStartHook", "PostStartHook failed");
    let message = format!("PostStartHook failed: {why}");
    stop_container(ctx, desired, id, &container.name, "FailedPostStartHook", desired.grace, true, ip)
        .await
        .ok();
    Err(StartError { reason: "PostStartHookError", message, again: Timestamp::now() })
}

async fn configure(
    ctx: &Context,
    desired: &Desired,
    container: &Container,
    start: &Start,
    image: &v1::Image,
) -> Result<v1::ContainerConfig, String> {
    let facts = ctx.facts(desired, &start.ips);
    let volumes = ctx.volumes.prepare(desired, &facts).await.map_err(|e| e.to_string())?;
    let (maps, secrets) = env::references(&container.spec);
    let key = &desired.key;
    let objects = ctx.volumes.objects.fetch(&key.namespace, &key.uid, &maps, &secrets).await?;
    let env = env::resolve(desired, &container.spec, &objects, &facts)?;
    let pod_dir = ctx.dirs.pod(&desired.key.uid);
    let hosts = pod_dir.join("etc-hosts");
    let text = dns::hosts_file(desired, &start.ips, &ctx.cluster_dns().domain);
    let message = message(&pod_dir, &container.name, start.restarts);
    write(&hosts, &text, 0o644)?;
    write(&message, "", 0o666)?;
    log_directory(&ctx.dirs.pod_logs(desired).join(&container.name))?;
    let values = env.iter().cloned().collect();
    for mount in container.spec.volume_mounts.iter().flatten() {
        if let Some((directory, true)) = volumes.get(&mount.name) {
            sub_directory(directory, &container_config::sub_path(mount, &values)?)?;
        }
    }
    let places = container_config::Places { volumes, hosts, message };
    container_config::container(Parts {
        desired,
        container,
        restarts: start.restarts,
        image,
        env,
        places: &places,
        node_memory: ctx.shared.capacity.memory_bytes,
    })
}

/// Where a run of a container leaves its last words, under the directory of its pod.
pub fn message(pod: &Path, container: &str, restarts: u32) -> PathBuf {
    pod.join("containers").join(container).join(format!("{restarts}.message"))
}

/// Log files are the runtime's, for its user and group only. They take the group of this directory, which is ours.
fn log_directory(path: &Path) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("cannot make {}: {e}", path.display());
    std::fs::create_dir_all(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o2755)).map_err(failed)
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    std::fs::write(path, text).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)
}

/// Makes the directory a `subPath` names, one step at a time, so that no link leads out of the volume.
fn sub_directory(volume: &Path, sub_path: &Path) -> Result<(), String> {
    let mut path: PathBuf = volume.to_owned();
    for part in sub_path {
        path.push(part);
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() => return Err(format!("subPath: {} is a link", path.display())),
            Ok(_) => {}
            Err(_) => {
                std::fs::create_dir(&path).map_err(|e| format!("cannot make {}: {e}", path.display()))?
            }
        }
    }
    Ok(())
}

/// Runs the preStop hook inside the grace, then asks the container to end, then kills it.
///
/// # Errors
/// When the runtime cannot.
#[expect(
    clippy::too_many_arguments,
    reason = "one call of one verb; a struct would only be taken apart again"
)]
pub async fn stop_container(
    ctx: &Context,
    desired: &Desired,
    id: &str,
    name: &str,
    why: &str,
    grace: Duration,
    with_hook: bool,
    ip: &str,
) -> Result<(), String> {
    let container = desired.container(name);
    let object = pod_reference(&desired.pod, container.map(Container::field));
    let message = if why.is_empty() { format!("Stopping container {name}") } else { why.to_owned() };
    ctx.events.record(object.clone(), Severity::Normal, "Killing", message);
    let begun = Instant::now();
    let hook = container.and_then(|c| c.pre_stop.as_ref()).filter(|_| with_hook && !grace.is_zero());
    if let Some(hook) = hook {
        let ran = tokio::time::timeout(grace, probes::hook(&ctx.cri, id, ip, hook, grace)).await;
        if let Ok(Err(why)) = ran {
            tracing::info!(pod = %desired.key, container = name, why, "preStop hook");
            ctx.events.record(object, Severity::Warning, "FailedPreStopHook", "PreStopHook failed");
        }
    }
    let left = grace.saturating_sub(begun.elapsed()).max(LEAST_GRACE);
    ctx.cri.stop_container(id, left).await.map_err(|e| e.to_string())
}
