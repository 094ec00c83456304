//! Flags, and the file in which hostd tells the agent who it is.
//!
//! Called by `app` once; [`follow`] reads again whenever hostd has replaced the file. Nothing else reads either.

use crate::error::{Error, Result, chain};
use atoll_spec::node::AgentConfig;
use atoll_spec::places;
use futures_util::StreamExt as _;
use inotify::{Inotify, WatchMask};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

/// Node agent of an Atoll host: joins it to a Kubernetes control plane with a token and runs the pods that the
/// control plane binds to it, through a container runtime that speaks CRI.
///
/// Every default is the place on an Atoll host; on a development machine give all of them.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "atoll-agent", version)]
pub struct Options {
    /// What hostd says about this host (JSON, with the join token)
    #[arg(long, default_value = "/run/atoll/agent/config.json", value_name = "FILE")]
    pub config: PathBuf,
    /// Where to write the state of joining, for the console
    #[arg(long, default_value = "/run/atoll/agent/status.json", value_name = "FILE")]
    pub status: PathBuf,
    /// Keys, certificates and kubeconfig of this node
    #[arg(long, default_value = "/state/agent", value_name = "DIR")]
    pub state: PathBuf,
    /// Hosts files and termination logs of pods
    #[arg(long, default_value = places::PODS, value_name = "DIR")]
    pub pods: PathBuf,
    /// Volumes of pods whose content comes from the API server; to be in memory
    #[arg(long, default_value = places::VOLUMES, value_name = "DIR")]
    pub volumes: PathBuf,
    /// Logs of containers
    #[arg(long, default_value = "/data/log/pods", value_name = "DIR")]
    pub logs: PathBuf,
    /// Socket of the container runtime
    #[arg(long, default_value = "/run/atoll/runtime/cri.sock", value_name = "SOCKET")]
    pub cri: PathBuf,
    /// Address of the kubelet API (TLS, callers authenticated)
    #[arg(long, default_value = "0.0.0.0:10250", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    /// Resolver configuration that pods with `dnsPolicy: Default` get
    #[arg(long, default_value = "/etc/resolv.conf", value_name = "FILE")]
    pub resolv_conf: PathBuf,
    /// Name server that pods with `dnsPolicy: ClusterFirst` get
    #[arg(long, value_name = "ADDRESS")]
    pub cluster_dns: Option<std::net::IpAddr>,
    /// Domain of the cluster
    #[arg(long, default_value = "cluster.local", value_name = "DOMAIN")]
    pub cluster_domain: String,
}

/// Reads hostd's file.
///
/// # Errors
/// When it cannot be read or is not what hostd writes; the path is named.
pub fn read(path: &Path) -> Result<AgentConfig> {
    let text =
        std::fs::read(path).map_err(|source| Error::Read { what: "config", path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::Config { path: path.into(), source })
}

/// Reads the file now and whenever it has been replaced. While hostd has not written it yet, waits for it.
///
/// # Errors
/// When its directory cannot be watched.
pub async fn follow(path: PathBuf) -> Result<watch::Receiver<Arc<AgentConfig>>> {
    let watched = |source| Error::Read { what: "the directory of", path: path.clone(), source };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let inotify = Inotify::init().map_err(watched)?;
    inotify.watches().add(directory, WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE).map_err(watched)?;
    let mut changes = inotify.into_event_stream([0; 4096]).map_err(watched)?;
    let first = loop {
        match read(&path) {
            Ok(config) => break config,
            Err(error) => tracing::warn!("waiting for the configuration: {}", chain(&error)),
        }
        if changes.next().await.is_none() {
            return Err(watched(std::io::ErrorKind::UnexpectedEof.into()));
        }
    };
    let (sender, receiver) = watch::channel(Arc::new(first));
    tokio::spawn(async move {
        // Ends when the agent's last part has dropped its receiver, or with the process.
        while changes.next().await.is_some() && !sender.is_closed() {
            match read(&path) {
                Ok(config) => {
                    sender.send_if_modified(|known| {
                        let changed = **known != config;
                        *known = Arc::new(config);
                        changed
                    });
                }
                Err(error) => tracing::warn!("the configuration stays as it was: {}", chain(&error)),
            }
        }
    });
    Ok(receiver)
}
