//! What every part of the agent shares once the node has an identity, and the tasks' owner.
//!
//! ```text
//! configuration → identity (stored, or joined) → node, pods, kubelet API, renewal → SIGTERM → all ended
//! ```
//!
//! A change of node name or cluster ends the agent: init starts it again, and it joins anew. Pods do not notice.

use crate::api_client::{self, Credentials};
use crate::config::{self, Options};
use crate::cri::Cri;
use crate::error::{Error, Result, chain};
use crate::join::store::{Identity, Store};
use crate::join::token::Join;
use crate::join::{self, JoinError, cluster_info, renew};
use crate::node::capacity::Capacity;
use crate::notify;
use crate::report::Report;
use crate::{kubelet_api, node, pods};
use atoll_spec::node::{AgentConfig, JoinState};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Time for all tasks to end after SIGTERM.
const STOP: Duration = Duration::from_secs(15);
/// Wait after the first failed try to join; doubles up to [`LONGEST_BACK_OFF`].
const FIRST_BACK_OFF: Duration = Duration::from_secs(2);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);

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
    /// Why the API server cannot be reached; `None` while it can. Kept by `node`.
    pub contact: watch::Receiver<Option<String>>,
}

impl Shared {
    /// Name of this node.
    pub fn node_name(&self) -> String {
        self.config.borrow().node_name.clone()
    }
}

/// The whole life of the agent.
///
/// # Errors
/// When it cannot go on; init starts it again.
pub async fn run(options: Options) -> Result<()> {
    let (stop, stopped) = watch::channel(false);
    let signals = stop_on_signals(stop.clone())?;
    let report = Report::new();
    let writer = tokio::spawn(report.clone().write(options.status.clone()));
    notify::notify("READY=1");
    // Both arms may be cancelled anywhere: the files on disk are whole at any time.
    let result = tokio::select! {
        result = live(Arc::new(options), &report, stop, stopped.clone()) => result,
        () = wait_for(stopped, Duration::ZERO) => Ok(()),
        () = notify::stay_alive() => Ok(()),
    };
    if let Err(error) = &result {
        report.failed(JoinState::Failed, chain(error));
        tokio::task::yield_now().await; // lets the writer have it before the process ends
    }
    writer.abort();
    signals.abort();
    result
}

fn stop_on_signals(stop: watch::Sender<bool>) -> Result<tokio::task::JoinHandle<()>> {
    let listen = |kind| {
        signal(kind).map_err(|source| Error::Read { what: "signals from", path: "the kernel".into(), source })
    };
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    Ok(tokio::spawn(async move {
        // Cancel-safe: a signal that came is not lost.
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; pods keep running");
        stop.send_replace(true);
    }))
}

async fn live(
    options: Arc<Options>,
    report: &Report,
    stop: watch::Sender<bool>,
    stopped: watch::Receiver<bool>,
) -> Result<()> {
    let config = config::follow(options.config.clone()).await?;
    let store = Store::open(&options.state)?;
    let identity = obtain(&store, config.clone(), report).await;
    report.step(JoinState::Joined);
    tracing::info!("node {} of {}", config.borrow().node_name, identity.server);
    let joined = Arc::clone(&config.borrow());
    for (what, path) in [
        ("directory of pods", &options.pods),
        ("directory of volumes", &options.volumes),
        ("directory of logs", &options.logs),
    ] {
        std::fs::create_dir_all(path).map_err(|source| Error::Write { what, path: path.clone(), source })?;
    }
    let capacity = Arc::new(node::measure::capacity(&options.logs, joined.max_pods)?);
    let credentials = Credentials::new(Arc::clone(&identity.certified));
    let (node_sender, node) = watch::channel(None);
    let (version_sender, runtime_version) = watch::channel(None);
    let (contact_sender, contact) = watch::channel(None);
    let shared = Shared {
        client: api_client::client(&identity.server, &identity.ca_pem, &credentials)?,
        options: Arc::clone(&options),
        config: config.clone(),
        capacity,
        node,
        pods: watch::Sender::new(Vec::new()),
        runtime_version,
        contact,
    };
    let outputs =
        node::Outputs { node: node_sender, runtime_version: version_sender, contact: contact_sender };
    let parts = Parts { shared, outputs, store, identity, credentials, joined };
    parts.run(report, &stop, stopped).await
}

/// What the tasks are made of.
struct Parts {
    shared: Shared,
    outputs: node::Outputs,
    store: Store,
    identity: Identity,
    credentials: Arc<Credentials>,
    /// The configuration that the identity belongs to.
    joined: Arc<AgentConfig>,
}

impl Parts {
    /// Starts every task, and ends them all when one ends or `stopped` becomes true.
    async fn run(
        self,
        report: &Report,
        stop: &watch::Sender<bool>,
        stopped: watch::Receiver<bool>,
    ) -> Result<()> {
        let Self { shared, outputs, store, identity, credentials, joined } = self;
        let cri = Cri::new(&shared.options.cri);
        // A connection of its own: no pod's traffic delays the lease.
        let node_client = api_client::client(&identity.server, &identity.ca_pem, &credentials)?;
        let client_ca = CertificateDer::pem_slice_iter(identity.ca_pem.as_bytes())
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|error| Error::Certificate {
                what: "the cluster's CA".into(),
                reason: error.to_string(),
            })?;
        let mut tasks = JoinSet::new();
        let of_node = Shared { client: node_client, ..shared.clone() };
        tasks.spawn(ends_well(node::run(of_node, cri.clone(), outputs, stopped.clone())));
        tasks.spawn(ends_well(pods::run(shared.clone(), stopped.clone())));
        tasks.spawn(kubelet_api::run(shared.clone(), cri, client_ca, stopped.clone()));
        tasks.spawn(until_moved(shared.config.clone(), joined, stopped.clone()));
        let followed = tokio::spawn(report.clone().follow(shared.clone()));
        let renewed =
            tokio::spawn(keep_identity(shared.clone(), store, identity, credentials, report.clone()));
        let first = tasks.join_next().await;
        let asked = stop.send_replace(true);
        let rest = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP, rest).await.is_err() {
            tracing::warn!("some work did not end within {} s and is left as it is", STOP.as_secs());
        }
        followed.abort();
        renewed.abort();
        match first {
            Some(Ok(Err(error))) => Err(error),
            Some(Err(panicked)) if !asked => {
                Err(Error::Certificate { what: "a task of the agent".into(), reason: panicked.to_string() })
            }
            _ => Ok(()),
        }
    }
}

async fn ends_well(task: impl Future<Output = ()>) -> Result<()> {
    task.await;
    Ok(())
}

/// Ends when the configuration names another node or cluster than the one joined.
async fn until_moved(
    mut config: watch::Receiver<Arc<AgentConfig>>,
    joined: Arc<AgentConfig>,
    stopped: watch::Receiver<bool>,
) -> Result<()> {
    let moved = async {
        let changed =
            config.wait_for(|now| now.node_name != joined.node_name || now.join != joined.join).await;
        if changed.is_ok() {
            tracing::info!("node name or cluster changed in the configuration: starting again");
        }
    };
    // Both arms only wait.
    tokio::select! {
        () = moved => {}
        () = wait_for(stopped, Duration::ZERO) => {}
    }
    Ok(())
}

/// Renews the certificate; when that failed for so long that it expired, joins again.
async fn keep_identity(
    shared: Shared,
    store: Store,
    mut identity: Identity,
    credentials: Arc<Credentials>,
    report: Report,
) {
    let node = shared.node_name();
    loop {
        renew::keep(shared.client.clone(), node.clone(), store.clone(), identity, Arc::clone(&credentials))
            .await;
        identity = obtain(&store, shared.config.clone(), &report).await;
        credentials.replace(Arc::clone(&identity.certified));
        report.step(JoinState::Joined);
    }
}

/// The stored identity where it is good, else a new one by the token; tries until it has one.
async fn obtain(store: &Store, mut config: watch::Receiver<Arc<AgentConfig>>, report: &Report) -> Identity {
    let mut back_off = FIRST_BACK_OFF;
    loop {
        let now = Arc::clone(&config.borrow_and_update());
        match attempt(store, &now, report).await {
            Ok(Some(identity)) => return identity,
            Ok(None) => {
                report.step(JoinState::NotConfigured);
                tracing::info!("no join section in the machine config: waiting for one");
                back_off = FIRST_BACK_OFF;
                // An error says that nobody will ever change it, which ends with the process.
                let _ = config.changed().await;
            }
            Err(error) => {
                let line = chain(&error);
                let asked = match &error {
                    Error::Join(error) => error.retry_after().unwrap_or_default(),
                    _ => Duration::ZERO,
                };
                let wait = back_off.max(asked);
                tracing::error!("{line} (trying again in {} s)", wait.as_secs());
                report.failed(JoinState::Failed, line);
                // A changed configuration is tried at once, the same one after the wait.
                let _ = tokio::time::timeout(wait, config.changed()).await;
                back_off = (back_off * 2).min(LONGEST_BACK_OFF);
            }
        }
    }
}

/// One try; `None` when there is neither an identity nor a way to get one.
async fn attempt(store: &Store, config: &AgentConfig, report: &Report) -> Result<Option<Identity>> {
    let join = config.join.as_ref().map(Join::try_from).transpose();
    let stored = store.load(&config.node_name);
    let expired = stored.as_ref().map(|stored| stored.not_after).filter(|end| *end <= renew::now());
    if let Some(stored) = stored.filter(|_| expired.is_none()) {
        match &join {
            // Without a readable section, the identity from before is all there is.
            Ok(None) | Err(_) => return Ok(Some(stored)),
            Ok(Some(join)) if cluster_info::check_pins(&stored.ca_pem, &join.pins, &join.server).is_ok() => {
                return Ok(Some(Identity { server: join.server.clone(), ..stored }));
            }
            Ok(Some(join)) => {
                tracing::info!("the stored identity is another cluster's: joining {}", join.server)
            }
        }
    }
    let Some(join) = join? else {
        let Some(end) = expired else { return Ok(None) };
        let since = Timestamp::from_second(end).unwrap_or_default();
        let (node, now) = (config.node_name.clone(), Timestamp::now());
        return Err(JoinError::Expired { node, since, now }.into());
    };
    if let Some(end) = expired {
        let since = Timestamp::from_second(end).unwrap_or_default();
        tracing::warn!("the client certificate of {} expired at {since}: joining again", config.node_name);
    }
    report.step(JoinState::Joining);
    tracing::info!("joining {} as {}", join.server, config.node_name);
    join::join(&join, &config.node_name, store).await.map(Some)
}

/// Waits until `stopped` is true, and then for `grace`.
async fn wait_for(mut stopped: watch::Receiver<bool>, grace: Duration) {
    // An error says that the sender is gone, which is a stop as well.
    let _ = stopped.wait_for(|stopped| *stopped).await;
    tokio::time::sleep(grace).await;
}
