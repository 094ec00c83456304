//! The file in which the console finds what the agent is doing.
//!
//! Called by `app`: whoever learns something changes the [`Report`], one task writes the file.

use crate::app::Shared;
use crate::notify::notify;
use atoll_spec::node::{AgentStatus, JoinState};
use k8s_openapi::api::core::v1::{Node, Pod};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

/// What is reported; cheap to clone.
#[derive(Debug, Clone)]
pub struct Report(watch::Sender<AgentStatus>);

impl Report {
    /// Nothing joined yet.
    pub fn new() -> Self {
        Self(watch::Sender::new(AgentStatus {
            join: JoinState::NotConfigured,
            node_ready: false,
            pods_running: 0,
            last_error: None,
        }))
    }

    /// A step of joining, without an error.
    pub fn step(&self, join: JoinState) {
        self.change(|status| {
            status.join = join;
            status.last_error = None;
        });
    }

    /// An error, with what to do.
    pub fn failed(&self, join: JoinState, error: String) {
        self.change(|status| {
            status.join = join;
            status.last_error = Some(error);
        });
    }

    fn change(&self, change: impl FnOnce(&mut AgentStatus)) {
        self.0.send_if_modified(|status| {
            let before = status.clone();
            change(status);
            *status != before
        });
    }

    /// Writes every change to the file. Never returns; what is written is whole at any time.
    pub async fn write(self, path: PathBuf) {
        let mut changes = self.0.subscribe();
        loop {
            let status = changes.borrow_and_update().clone();
            if let Err(error) = replace(&path, &status) {
                tracing::warn!("cannot write {}: {error}", path.display());
            }
            notify(&format!("STATUS={}", sentence(&status)));
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Follows node and pods. Ends with the agent.
    pub async fn follow(self, shared: Shared) {
        let (mut node, mut pods) = (shared.node.clone(), shared.pods.subscribe());
        let mut contact = shared.contact.clone();
        loop {
            let readiness = node.borrow_and_update().as_deref().map(readiness);
            let silent = contact.borrow_and_update().clone();
            let running = running(&pods.borrow_and_update());
            self.change(|status| {
                // What the API server said last counts only while it can be asked.
                status.node_ready = matches!(readiness, Some(Ok(()))) && silent.is_none();
                status.pods_running = running;
                if status.join == JoinState::Joined {
                    let unready = readiness.and_then(Result::err);
                    status.last_error =
                        silent.or_else(|| unready.map(|why| format!("node is not Ready: {why}")));
                }
            });
            // All are cancel-safe: a change that is not seen now is seen at the next look.
            let ended = tokio::select! {
                changed = node.changed() => changed.is_err(),
                changed = pods.changed() => changed.is_err(),
                changed = contact.changed() => changed.is_err(),
            };
            if ended {
                return;
            }
        }
    }
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether the API server has the node as Ready, and why not.
fn readiness(node: &Node) -> Result<(), String> {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    match conditions.iter().find(|condition| condition.type_ == "Ready") {
        Some(ready) if ready.status == "True" => Ok(()),
        Some(ready) => Err(ready.message.clone().unwrap_or_else(|| "no reason given".into())),
        None => Err("its status was not posted yet".into()),
    }
}

fn running(pods: &[Arc<Pod>]) -> u32 {
    let phase =
        |pod: &&Arc<Pod>| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
    u32::try_from(pods.iter().filter(phase).count()).unwrap_or(u32::MAX)
}

fn sentence(status: &AgentStatus) -> String {
    match (status.join, &status.last_error) {
        (_, Some(error)) => error.replace('\n', " "),
        (JoinState::NotConfigured, None) => "no join section in the machine config".into(),
        (JoinState::Joining, None) => "joining".into(),
        (JoinState::Failed, None) => "not joined".into(),
        (JoinState::Joined, None) if status.node_ready => {
            format!("node Ready, {} pods running", status.pods_running)
        }
        (JoinState::Joined, None) => "joined, node not Ready yet".into(),
    }
}

fn replace(path: &Path, status: &AgentStatus) -> std::io::Result<()> {
    let partial = path.with_extension("partial");
    std::fs::write(&partial, serde_json::to_vec(status)?)?;
    std::fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{NodeCondition, NodeStatus};

    #[test]
    fn readiness_says_why_not() {
        let node = |status: &str| {
            let ready = NodeCondition {
                type_: "Ready".into(),
                status: status.into(),
                message: Some("no runtime".into()),
                ..NodeCondition::default()
            };
            let status = NodeStatus { conditions: Some(vec![ready]), ..NodeStatus::default() };
            Node { status: Some(status), ..Node::default() }
        };
        assert_eq!(readiness(&node("True")), Ok(()));
        assert_eq!(readiness(&node("False")), Err("no runtime".into()));
        assert!(readiness(&Node::default()).is_err());
    }

    #[test]
    fn the_file_has_the_last_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status.json");
        let report = Report::new();
        report.failed(JoinState::Failed, "cannot join: why".into());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let writer = tokio::spawn(report.clone().write(path.clone()));
            tokio::task::yield_now().await;
            let read = || serde_json::from_slice::<AgentStatus>(&std::fs::read(&path).unwrap()).unwrap();
            assert_eq!(read().last_error.as_deref(), Some("cannot join: why"));
            report.step(JoinState::Joined);
            tokio::task::yield_now().await;
            assert_eq!((read().join, read().last_error), (JoinState::Joined, None));
            writer.abort();
        });
    }
}
