//! Looks now and then at what a pod with limits keeps on disk.
//!
//! Called by `worker`, which ends the pod when [`StorageWatch::exceeded`] says why. What a container writes is in its
//! microVM, so the runtime is asked; its log is on the host.

use super::context::Context;
use super::desired::Desired;
use super::storage_limits::{self, Usage};
use atoll_cri::v1;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// As often as other node agents.
const EVERY: Duration = Duration::from_secs(10);
/// Annotation of a sandbox's statistics: bytes in each volume that lives in the guest, by its directory, as JSON.
const USAGE_ANNOTATION: &str = "atoll.dev/scratch-usage";

/// When one pod was looked at, and what came of it.
#[derive(Default)]
pub struct StorageWatch {
    last: Option<Instant>,
    under_way: bool,
    exceeded: Option<String>,
}

impl StorageWatch {
    /// Whether it is time to look; then [`Self::measured`] has to be told.
    pub fn begin(&mut self, desired: &Desired) -> bool {
        let waiting = self.under_way || self.last.is_some_and(|at| at.elapsed() < EVERY);
        if waiting || !storage_limits::any(desired) {
            return false;
        }
        self.last = Some(Instant::now());
        self.under_way = true;
        true
    }

    /// Takes what a look said: why the pod has to go. What was exceeded once stays so.
    pub fn measured(&mut self, exceeded: Option<String>) {
        self.under_way = false;
        self.exceeded = self.exceeded.take().or(exceeded);
    }

    /// Why the pod has to go.
    pub fn exceeded(&self) -> Option<&str> {
        self.exceeded.as_deref()
    }

    /// How long until the next look; `None` for a pod without limits, and during a look.
    pub fn due_in(&self) -> Option<Duration> {
        let last = self.last.filter(|_| !self.under_way)?;
        Some(EVERY.saturating_sub(last.elapsed()))
    }
}

/// One look; answers which limit is exceeded. A runtime that cannot say is asked again at the next one.
pub async fn look(ctx: &Context, desired: &Desired, sandbox: &str) -> Option<String> {
    match ctx.cri.sandbox_stats(sandbox).await {
        Ok(stats) => storage_limits::exceeded(desired, &usage(ctx, desired, &stats?)),
        Err(error) => {
            tracing::debug!(pod = %desired.key, %error, "cannot see what the pod keeps on disk");
            None
        }
    }
}

fn usage(ctx: &Context, desired: &Desired, stats: &v1::PodSandboxStats) -> Usage {
    let mut usage = Usage::default();
    let logs = ctx.dirs.pod_logs(desired);
    for container in stats.linux.iter().flat_map(|linux| &linux.containers) {
        let Some(name) = container.attributes.as_ref().and_then(|a| a.metadata.as_ref()) else { continue };
        let layer = container.writable_layer.as_ref().and_then(|l| l.used_bytes).map_or(0, |n| n.value);
        let total = layer.saturating_add(file_bytes(&logs.join(&name.name)));
        usage.containers.insert(name.name.clone(), total);
    }
    let told = stats.attributes.as_ref().and_then(|a| a.annotations.get(USAGE_ANNOTATION));
    let told: BTreeMap<String, u64> = told.and_then(|t| serde_json::from_str(t).ok()).unwrap_or_default();
    for volume in desired.spec().volumes.iter().flatten() {
        let directory = ctx.dirs.empty_dir(&desired.key.uid, &volume.name);
        if let Some(bytes) = told.get(directory.to_string_lossy().as_ref()) {
            usage.volumes.insert(volume.name.clone(), *bytes);
        }
    }
    usage
}

/// Bytes of the files in a directory.
fn file_bytes(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).filter(|m| m.is_file()).map(|m| m.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod;

    #[test]
    fn only_a_pod_with_limits_is_looked_at_and_not_twice_at_once() {
        let mut watch = StorageWatch::default();
        assert!(!watch.begin(&pod("{containers: [{name: a, image: i}]}")));
        assert_eq!(watch.due_in(), None);
        let limited =
            pod("{containers: [{name: a, image: i, resources: {limits: {ephemeral-storage: 1Mi}}}]}");
        assert!(watch.begin(&limited) && !watch.begin(&limited));
        assert_eq!(watch.due_in(), None);
        watch.measured(Some("too much".into()));
        assert!(watch.due_in().is_some_and(|wait| wait > EVERY / 2) && !watch.begin(&limited));
        watch.measured(None);
        assert_eq!(watch.exceeded(), Some("too much"));
    }
}
