//! The runtime's CRI socket, as the agent uses it too.

use anyhow::Context;
use atoll_cri::v1 as cri;
use cri::image_service_client::ImageServiceClient;
use cri::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

const SOCKET: &str = "/run/atoll/runtime/cri.sock";

/// A client of the runtime.
#[derive(Debug, Clone)]
pub struct Runtime {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// What the runtime knows of a pod that runs. Times are nanoseconds since 1970.
#[derive(Debug, Clone)]
pub struct Inspected {
    /// When RunPodSandbox came in.
    pub asked_ns: i64,
    /// Id of the sandbox.
    pub sandbox: String,
    /// When its container was made and when it was started.
    pub container_ns: (i64, i64),
    /// Process number of the VMM.
    pub vmm: u32,
    /// The phases of its launch, in milliseconds.
    pub launch: Vec<(&'static str, f64)>,
    /// Exits to the VMM by class.
    pub exits: Vec<(String, f64)>,
    /// Steps of the VMM, in milliseconds after its start.
    pub steps: Vec<(String, f64)>,
}

impl Runtime {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens.
    pub async fn connect() -> anyhow::Result<Self> {
        let connector =
            tower::service_fn(|_| async { tokio::net::UnixStream::connect(SOCKET).await.map(TokioIo::new) });
        let endpoint = Endpoint::from_static("http://runtime").timeout(Duration::from_secs(600));
        let channel = endpoint
            .connect_with_connector(connector)
            .await
            .with_context(|| format!("cannot connect to {SOCKET}"))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
        })
    }

    /// Pulls an image.
    ///
    /// # Errors
    /// The runtime's own.
    pub async fn pull(&mut self, image: &str) -> anyhow::Result<()> {
        let image = cri::ImageSpec { image: image.into(), ..Default::default() };
        let request = cri::PullImageRequest { image: Some(image), ..Default::default() };
        self.images.pull_image(request).await.context("cannot pull")?;
        Ok(())
    }

    /// Looks at the one sandbox of a pod.
    ///
    /// # Errors
    /// When there is none, or the runtime does not tell what the bench needs.
    pub async fn inspect(&mut self, pod: &str) -> anyhow::Result<Inspected> {
        let all = self.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await?.into_inner();
        let named = |item: &cri::PodSandbox| item.metadata.as_ref().is_some_and(|m| m.name == pod);
        let sandbox = all.items.into_iter().find(named).with_context(|| format!("no sandbox of {pod}"))?.id;
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: true };
        let status = self.runtime.pod_sandbox_status(request).await?.into_inner();
        let info: Value = serde_json::from_str(status.info.get("info").context("no info of the sandbox")?)?;
        let machine = &info["machine"];
        let container = status.containers_statuses.first().context("no container")?;
        let us = |value: &Value| value.as_f64().unwrap_or_default() / 1000.0;
        let launch =
            [("claim", "claimUs"), ("jail", "jailUs"), ("guest", "guestUs"), ("configure", "configureUs")];
        let exits = machine["exits"].as_object().context("no exits")?;
        let steps = machine["vmmStepsUs"].as_array().context("no steps")?;
        Ok(Inspected {
            asked_ns: status.status.context("no status")?.created_at,
            sandbox,
            container_ns: (container.created_at, container.started_at),
            vmm: machine["vmmPid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("no VMM")?,
            launch: launch.map(|(name, field)| (name, us(&machine["launch"][field]))).to_vec(),
            exits: exits.iter().map(|(name, n)| (name.clone(), n.as_f64().unwrap_or_default())).collect(),
            steps: steps
                .iter()
                .map(|step| (step[0].as_str().unwrap_or_default().to_owned(), us(&step[1])))
                .collect(),
        })
    }
}
