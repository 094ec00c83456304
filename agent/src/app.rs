//! What every part of the agent shares once the node has an identity, and the tasks' owner.

use crate::config::Options;
use crate::node::capacity::Capacity;
use atoll_spec::node::AgentConfig;
use k8s_openapi::api::core::v1::{Node, Pod};
use std::sync::Arc;
use tokio::sync::watch;

/// Shared by `node`, `pods` and `kubelet_api`; cheap to clone.
///
/// `client` stays valid for the life of the process: when the client certificate is renewed, its connections are
/// closed and the next ones use the new certificate. A call that was under way then fails with a transport error
/// and is tried again like any other.
#[derive(Clone)]
pub struct Shared {
    /// The API server, as `system:node:<name>`.
    pub client: kube::Client,
    /// Flags: paths and addresses.
    pub options: Arc<Options>,
    /// What hostd last said about the host: node name, addresses.
    pub config: watch::Receiver<Arc<AgentConfig>>,
    /// What this machine has, measured at start.
    pub capacity: Arc<Capacity>,
    /// The node object as last seen (podCIDR, labels, taints); `None` until it is registered. Kept by `node`.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    /// This node's pods with their status as last computed. `pods` replaces it on every change; `node` and
    /// `kubelet_api` read it.
    pub pods: watch::Sender<Vec<Arc<Pod>>>,
    /// Name and version of the container runtime, once it has answered.
    pub runtime_version: watch::Receiver<Option<String>>,
}

impl Shared {
    /// Name of this node.
    pub fn node_name(&self) -> String {
        self.config.borrow().node_name.clone()
    }
}
