//! Sees a published tree change and sends it again.
//!
//! One task per tree that has a `..data` link (what Kubernetes switches when a ConfigMap, Secret or token changes).
//! Invariant: between the start of the watch and its end no change is missed: the watch exists before the tree is read.

use crate::error::{Error, Result};
use crate::roots::Found;
use crate::vm::guest::GuestLink;
use crate::volumes::tree;
use futures_util::StreamExt;
use inotify::{Inotify, WatchMask};
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::AbortHandle;

/// Pause before a failed sending is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// A watched tree; the watch ends with it.
#[derive(Debug)]
pub struct Watched(AbortHandle);

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Publishes a tree and keeps it up to date.
pub async fn publish_and_watch(link: Arc<GuestLink>, name: String, directory: Arc<Found>) -> Result<Watched> {
    let changes = changes(&directory)?;
    tree::publish(&link, &name, &directory).await?;
    Ok(follow(link, name, directory, changes))
}

/// Keeps a tree up to date that the guest has already, as after a restart; sends it once, as it may have changed meanwhile.
pub fn watch_again(link: Arc<GuestLink>, name: String, directory: Arc<Found>) -> Result<Watched> {
    let changes = changes(&directory)?;
    let task = tokio::spawn(async move {
        send_until_done(&link, &name, &directory).await;
        follow_loop(link, name, directory, changes).await;
    });
    Ok(Watched(task.abort_handle()))
}

type Changes = inotify::EventStream<Vec<u8>>;

fn changes(directory: &Found) -> Result<Changes> {
    let make = || {
        let inotify = Inotify::init()?;
        inotify
            .watches()
            .add(directory.stable_path(), WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::ONLYDIR)?;
        inotify.into_event_stream(vec![0; 4096])
    };
    make().map_err(Error::io("watch", directory.path()))
}

fn follow(link: Arc<GuestLink>, name: String, directory: Arc<Found>, changes: Changes) -> Watched {
    Watched(tokio::spawn(follow_loop(link, name, directory, changes)).abort_handle())
}

async fn follow_loop(link: Arc<GuestLink>, name: String, directory: Arc<Found>, mut changes: Changes) {
    while let Some(Ok(event)) = changes.next().await {
        if event.name.as_deref() == Some(OsStr::new("..data")) {
            tracing::info!(directory = %directory.path().display(), "volume changed, sending it to the pod");
            send_until_done(&link, &name, &directory).await;
        }
    }
}

async fn send_until_done(link: &GuestLink, name: &str, directory: &Arc<Found>) {
    loop {
        match tree::publish(link, name, directory).await {
            Ok(()) => return,
            // A connection that broke is dialled again; when the VM ends, the service drops the watch, and this ends with it.
            Err(error) => {
                tracing::warn!(directory = %directory.path().display(), %error, "cannot send a changed volume")
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}
