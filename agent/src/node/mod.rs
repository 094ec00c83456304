//! The node object: registration, lease, status, capacity.
//!
//! Flow: [`register`] (create, or bring an existing node up to date) → every ten seconds [`facts`] → [`status`]
//! (pure) → patch, when something changed or five minutes passed. The lease has a task of its own, so that a slow
//! status never lets it expire. Invariant: nothing else writes the node object.

pub mod capacity;
mod facts;
mod lease;
pub mod measure;
mod register;
mod status;

use crate::app::Shared;
use crate::cri::Cri;
use crate::error::{Error, Result, chain};
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use kube::api::{Api, Patch, PatchParams};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How often the status is computed, once the node is Ready.
const COMPUTE: Duration = Duration::from_secs(10);
/// The same while it is not yet: Ready should not wait for its turn. Longer each time, for it may stay so.
const COMPUTE_UNREADY: Duration = Duration::from_secs(1);
/// An unchanged status is posted this often; liveness is the lease's business.
const POST_UNCHANGED: Duration = Duration::from_secs(300);
/// Deadline of one call.
const CALL: Duration = Duration::from_secs(15);
const FIRST_BACK_OFF: Duration = Duration::from_millis(500);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);

/// What `node` tells the rest of the agent.
pub struct Outputs {
    /// The node object as the API server has it.
    pub node: watch::Sender<Option<Arc<Node>>>,
    /// Name and version of the runtime, as `name://version`.
    pub runtime_version: watch::Sender<Option<String>>,
    /// Why the API server cannot be reached; `None` while it can.
    pub contact: watch::Sender<Option<String>>,
}

/// Registers the node and keeps its lease and status until `stop` is true.
pub async fn run(shared: Shared, cri: Cri, outputs: Outputs, mut stop: watch::Receiver<bool>) {
    let work = async {
        let (node, contact) = (outputs.node.subscribe(), outputs.contact.clone());
        let lease = lease::keep(shared.client.clone(), shared.node_name(), node, contact);
        tokio::join!(lease, keep_status(&shared, &cri, &outputs));
    };
    // Both arms may be cancelled anywhere: whatever was under way is done again at the next start.
    tokio::select! {
        () = work => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

/// Never returns.
async fn keep_status(shared: &Shared, cri: &Cri, outputs: &Outputs) {
    let mut keeper = Keeper { shared, cri, outputs, api: Api::all(shared.client.clone()), posted: None };
    let (mut back_off, mut unready) = (FIRST_BACK_OFF, COMPUTE_UNREADY);
    loop {
        match keeper.turn().await {
            Ok(ready) => {
                back_off = FIRST_BACK_OFF;
                let pause = if ready { COMPUTE } else { unready };
                unready = if ready { COMPUTE_UNREADY } else { (unready.mul_f64(1.25)).min(COMPUTE) };
                tokio::time::sleep(pause).await;
            }
            Err(error) => {
                tracing::warn!("node {}: {}", shared.node_name(), chain(&error));
                tokio::time::sleep(back_off).await;
                back_off = (back_off * 2).min(LONGEST_BACK_OFF);
            }
        }
    }
}

struct Keeper<'a> {
    shared: &'a Shared,
    cri: &'a Cri,
    outputs: &'a Outputs,
    api: Api<Node>,
    /// What was posted last, without heartbeats, and when.
    posted: Option<(NodeStatus, Instant)>,
}

impl Keeper<'_> {
    /// Registers where needed, computes the status, posts it where needed; answers whether the node is Ready.
    async fn turn(&mut self) -> Result<bool> {
        let name = self.shared.node_name();
        let mut node = self.registered(&name).await?;
        let facts = facts::gather(self.shared, self.cri).await;
        self.outputs.runtime_version.send_if_modified(|known| {
            let changed = *known != facts.runtime.version;
            known.clone_from(&facts.runtime.version);
            changed
        });
        let before = node.status.clone().unwrap_or_default();
        let computed = status::compute(&facts, &before, jiff::Timestamp::now());
        let ready = status::is_ready(&computed);
        let comparable = status::without_heartbeats(&computed);
        let due = !status::is_known(&computed, &before)
            || self
                .posted
                .as_ref()
                .is_none_or(|(posted, at)| *posted != comparable || at.elapsed() >= POST_UNCHANGED);
        if due {
            node = self.post(&name, &computed).await?;
            if ready && !status::is_ready(&before) {
                tracing::info!("node {name} is Ready");
            }
            self.posted = Some((comparable, Instant::now()));
        }
        self.publish(node);
        Ok(ready)
    }

    /// The node object; registered first when it is not there or not ours yet.
    async fn registered(&mut self, name: &str) -> Result<Node> {
        if self.posted.is_some()
            && let Some(node) = within("read the node", self.api.get_opt(name)).await?
        {
            return Ok(node);
        }
        let mut wanted = register::node(&self.shared.config.borrow());
        if self.posted.take().is_some() {
            tracing::warn!("the Node object of {name} is gone from the API server: registering it again");
            // Its pods still have addresses of the old network; a new one would cut them off.
            register::keep_network(&mut wanted, self.outputs.node.borrow().as_deref());
        }
        register::ensure(&self.api, wanted).await
    }

    async fn post(&self, name: &str, computed: &NodeStatus) -> Result<Node> {
        let patch = Patch::Strategic(status::patch(computed));
        within("update the node's status", self.api.patch_status(name, &PatchParams::default(), &patch)).await
    }

    fn publish(&self, node: Node) {
        self.outputs.node.send_if_modified(|known| {
            let version = |n: &Node| n.metadata.resource_version.clone();
            let changed = known.as_deref().map(version) != Some(version(&node));
            if changed {
                *known = Some(Arc::new(node));
            }
            changed
        });
    }
}

async fn within<T>(operation: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T> {
    tokio::time::timeout(CALL, call)
        .await
        .map_err(|_| Error::Deadline { what: operation.into(), seconds: CALL.as_secs() })?
        .map_err(|error| Error::api(format!("cannot {operation}"), error))
}
