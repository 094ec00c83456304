//! Removes what belongs to no pod any more: sandboxes, volume directories, log directories; and, for `worker`, the
//! files of one pod that has ended, and those of one run of a container.
//!
//! Invariant: nothing is touched before the API server's list of pods was complete, for until then every pod looks
//! like an orphan. The runtime and the disk are looked at first and the known pods after, so that a pod that has
//! just come is never taken for one that has gone.

use super::actual::{Actual, POD_UID, Ran};
use super::container_config::log_path;
use super::context::Context;
use super::desired::Desired;
use super::{log_rotation, start};
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const EVERY: Duration = Duration::from_secs(60);
const ORPHAN_GRACE: Duration = Duration::from_secs(10);

type Known = watch::Receiver<Option<BTreeSet<String>>>;

/// Cleans up until `stop` changes to `true`.
pub async fn run(ctx: Arc<Context>, mut known: Known, mut stop: watch::Receiver<bool>) {
    let work = async {
        loop {
            if known.wait_for(Option::is_some).await.is_err() {
                return;
            }
            if let Err(error) = sandboxes(&ctx, &known).await {
                tracing::warn!(%error, "cannot clean up sandboxes");
            }
            directories(&ctx, &known);
            tokio::time::sleep(EVERY).await;
        }
    };
    // Both may be dropped at any point: the next start cleans up again.
    tokio::select! {
        () = work => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

fn is_known(known: &Known, uid: &str) -> bool {
    known.borrow().as_ref().is_none_or(|uids| uids.contains(uid))
}

async fn sandboxes(ctx: &Context, known: &Known) -> crate::cri::Result<()> {
    let containers = ctx.cri.containers(None).await?;
    for sandbox in ctx.cri.sandboxes(None).await? {
        let Some(uid) = sandbox.labels.get(POD_UID) else { continue };
        if is_known(known, uid) {
            continue;
        }
        tracing::info!(sandbox = sandbox.id, uid, "removing a sandbox of a pod that is gone");
        let own = containers.iter().filter(|c| c.pod_sandbox_id == sandbox.id).map(|c| c.id.as_str());
        if let Err(error) = orphan(ctx, &sandbox.id, own).await {
            tracing::warn!(sandbox = sandbox.id, uid, %error, "cannot remove a sandbox of a pod that is gone");
        }
    }
    Ok(())
}

async fn orphan(
    ctx: &Context,
    sandbox: &str,
    containers: impl Iterator<Item = &str>,
) -> crate::cri::Result<()> {
    for container in containers {
        ctx.cri.stop_container(container, ORPHAN_GRACE).await?;
        ctx.cri.remove_container(container).await?;
    }
    ctx.cri.stop_sandbox(sandbox).await?;
    ctx.cri.remove_sandbox(sandbox).await
}

fn directories(ctx: &Context, known: &Known) {
    let own = [&ctx.dirs.pods, &ctx.dirs.volumes];
    let pods =
        own.into_iter().flat_map(|dir| names(dir).into_iter().map(move |name| (dir, (name.clone(), name))));
    let logs = names(&ctx.dirs.logs).into_iter().filter_map(|name| {
        let uid = name.rsplit('_').next()?.to_owned();
        Some((name, uid))
    });
    let all = pods.chain(logs.map(|l| (&ctx.dirs.logs, l)));
    for (parent, (name, uid)) in all.collect::<Vec<_>>() {
        if is_known(known, &uid) || !looks_like_uid(&uid) {
            continue;
        }
        let path = parent.join(name);
        if let Err(error) = std::fs::remove_dir_all(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove a directory of a pod that is gone");
        }
    }
}

/// Removes the files of a pod that has ended. Answers whether nothing is left.
pub async fn remove_files(ctx: &Context, desired: &Desired) -> bool {
    let logs = ctx.dirs.pod_logs(desired);
    let removed_logs = match tokio::fs::remove_dir_all(&logs).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    for result in [ctx.volumes.teardown(&desired.key.uid).await, removed_logs] {
        if let Err(error) = result {
            tracing::warn!(pod = %desired.key, %error, "cannot remove the pod's files; trying again");
            return false;
        }
    }
    true
}

/// One run of a container that the runtime is to forget.
pub struct Run {
    id: String,
    /// Its container and its number; `None` when another run writes to the same files.
    files: Option<(String, u32)>,
}

impl Run {
    /// The run behind a container's id.
    pub fn of(actual: &Actual, id: String) -> Self {
        let ran = actual.containers.iter().find(|ran| ran.id == id);
        let shares = |ran: &Ran| actual.runs(&ran.name).filter(|r| r.restarts == ran.restarts).count() > 1;
        let files = ran.filter(|ran| !shares(ran)).map(|ran| (ran.name.clone(), ran.restarts));
        Self { id, files }
    }

    /// Removes it, then its logs and its last words. What of these cannot be removed goes with the pod.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub async fn remove(&self, ctx: &Context, desired: &Desired) -> crate::cri::Result<()> {
        ctx.cri.remove_container(&self.id).await?;
        let Some((name, restarts)) = &self.files else { return Ok(()) };
        let log = ctx.dirs.pod_logs(desired).join(log_path(name, *restarts));
        let message = start::message(&ctx.dirs.pod(&desired.key.uid), name, *restarts);
        let rotated = log_rotation::rotated(&log);
        for path in [log, message].into_iter().chain(rotated) {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove a file of a run that is over");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// A guard against a wrong directory in the flags.
fn looks_like_uid(name: &str) -> bool {
    name.len() == 36 && name.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}
