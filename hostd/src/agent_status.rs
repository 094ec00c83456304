//! Watches the file in which the agent says how it goes.

use crate::files;
use atoll_spec::node::AgentStatus;
use futures_util::StreamExt;
use inotify::{Inotify, WatchMask};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;

/// Largest status file that is read.
const LIMIT: u64 = 64 * 1024;
/// Pause before watching again when the directory is not there (yet), and between looks when it cannot be watched.
const PAUSE: Duration = Duration::from_secs(2);

/// Reports the agent's status each time it changes.
pub async fn run(file: PathBuf, changes: mpsc::Sender<Option<AgentStatus>>) {
    let mut last = None;
    loop {
        // The watch comes before the first look, so that no change falls between the two.
        let watch = file.parent().map(watch);
        let mut stream = match watch {
            Some(Ok(stream)) => Some(stream),
            _ => None,
        };
        loop {
            let now = read(&file);
            if last.as_ref() != Some(&now) {
                last = Some(now.clone());
                if changes.send(now).await.is_err() {
                    return;
                }
            }
            match &mut stream {
                Some(events) => {
                    if !matches!(events.next().await, Some(Ok(_))) {
                        break;
                    }
                }
                None => break,
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn watch(directory: &Path) -> std::io::Result<inotify::EventStream<[u8; 1024]>> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE | WatchMask::DELETE | WatchMask::ONLYDIR;
    inotify.watches().add(directory, mask)?;
    inotify.into_event_stream([0; 1024])
}

fn read(file: &Path) -> Option<AgentStatus> {
    let bytes = files::read(file, LIMIT).ok().flatten()?;
    serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::warn!(%error, "the agent's status is not readable"))
        .ok()
}
