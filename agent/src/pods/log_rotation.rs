//! Keeps container logs small: 10 MiB a file, 5 files a container.
//!
//! ```text
//! 0.log ──rename──► 0.log.<time>, then the runtime opens 0.log anew; the oldest of more than four is removed
//! ```

use super::actual::{CONTAINER_NAME, POD_NAME, POD_NAMESPACE, POD_UID};
use super::container_config::log_path;
use super::context::Context;
use atoll_cri::v1;
use jiff::Timestamp;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const EVERY: Duration = Duration::from_secs(10);
const MAX_BYTES: u64 = 10 << 20;
/// Rotated files kept beside the one being written.
const KEPT: usize = 4;

/// Rotates until `stop` changes to `true`.
pub async fn run(ctx: Arc<Context>, mut stop: watch::Receiver<bool>) {
    let work = async {
        loop {
            tokio::time::sleep(EVERY).await;
            if let Err(error) = rotate_all(&ctx).await {
                tracing::debug!(%error, "logs were not looked at");
            }
        }
    };
    // Both may be dropped at any point: a log that was renamed and not reopened is found at the next round, for the
    // runtime goes on writing to the renamed file.
    tokio::select! {
        () = work => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

async fn rotate_all(ctx: &Context) -> crate::cri::Result<()> {
    for container in ctx.cri.containers(None).await? {
        if container.state != v1::ContainerState::ContainerRunning as i32 {
            continue;
        }
        let Some(path) = path(&ctx.dirs.logs, &container) else { continue };
        match std::fs::metadata(&path) {
            Ok(log) if log.len() > MAX_BYTES => rotate(ctx, &container.id, &path).await,
            // A rotation that was cut short: the runtime still writes to the file that got another name.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if let Err(error) = ctx.cri.reopen_log(&container.id).await {
                    tracing::warn!(path = %path.display(), %error, "the runtime did not reopen a log");
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn path(logs: &Path, container: &v1::Container) -> Option<PathBuf> {
    let label = |name: &str| container.labels.get(name);
    let pod = format!("{}_{}_{}", label(POD_NAMESPACE)?, label(POD_NAME)?, label(POD_UID)?);
    let attempt = container.metadata.as_ref()?.attempt;
    Some(logs.join(pod).join(log_path(label(CONTAINER_NAME)?, attempt)))
}

async fn rotate(ctx: &Context, id: &str, path: &Path) {
    let stamp = Timestamp::now().strftime("%Y%m%d-%H%M%S");
    let rotated = PathBuf::from(format!("{}.{stamp}", path.display()));
    if let Err(error) = std::fs::rename(path, &rotated) {
        tracing::warn!(path = %path.display(), %error, "cannot rotate a log");
        return;
    }
    if let Err(error) = ctx.cri.reopen_log(id).await {
        tracing::warn!(path = %path.display(), %error, "the runtime did not reopen a log");
        // Give it back its name, or nothing would be found under it.
        if let Err(error) = std::fs::rename(&rotated, path) {
            tracing::warn!(path = %path.display(), %error, "cannot undo the rotation of a log");
        }
        return;
    }
    remove_oldest(path);
}

/// Files that a log was rotated to, the oldest first.
pub fn rotated(path: &Path) -> Vec<PathBuf> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Vec::new();
    };
    let prefix = format!("{name}.");
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let mut old: Vec<_> =
        entries.filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(&prefix)).collect();
    old.sort();
    old.into_iter().map(|name| parent.join(name)).collect()
}

fn remove_oldest(path: &Path) {
    let old = rotated(path);
    for path in &old[..old.len().saturating_sub(KEPT)] {
        if let Err(error) = std::fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove an old log");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_four() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        for n in 1..=6 {
            std::fs::write(format!("{}.2026010{n}-000000", log.display()), "").unwrap();
        }
        std::fs::write(dir.path().join("1.log.20260101-000000"), "").unwrap();
        remove_oldest(&log);
        let mut left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left.len(), 5);
        assert_eq!(left[0], "0.log.20260103-000000");
    }
}
