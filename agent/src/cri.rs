//! Thin CRI client: one unix socket, a deadline for every call, errors that name the call and its object.
//!
//! Called by `pods` (what runs) and `kubelet_api` (what is looked at). It translates nothing: requests and answers
//! are the generated types of `atoll_cri`. Invariant: no call here can wait for ever.

use atoll_cri::v1;
use atoll_cri::{ImageServiceClient, RuntimeServiceClient};
use atoll_spec::images::{ACCESS, Access, PULL_SECRET, PullSecret};
use hyper_util::rt::TokioIo;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

/// Deadline of calls that only look.
const LOOK: Duration = Duration::from_secs(30);
/// Deadline of calls that make or remove something.
const CHANGE: Duration = Duration::from_secs(120);
/// Deadline of starting a sandbox: a microVM boots, under emulation slowly.
const BOOT: Duration = Duration::from_secs(240);
/// What the runtime gets to end a command that took too long, and to say so.
const EXEC_MARGIN: Duration = Duration::from_secs(10);
/// Longest image pull.
const PULL: Duration = Duration::from_secs(3600);
/// Largest answer: a list of every container on the node.
const MAX_ANSWER: usize = 16 << 20;

/// Why a CRI call failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} {object}: {}", .status.message())]
pub struct CriError {
    /// The call.
    pub call: &'static str,
    /// On what.
    pub object: String,
    /// The runtime's answer.
    pub status: Box<Status>,
}

impl CriError {
    /// The runtime does not know the object.
    pub fn is_not_found(&self) -> bool {
        self.status.code() == Code::NotFound
    }

    /// The runtime does not know the call.
    pub fn is_unimplemented(&self) -> bool {
        self.status.code() == Code::Unimplemented
    }
}

/// Result of a CRI call.
pub type Result<T> = std::result::Result<T, CriError>;

/// A client of the container runtime; cheap to clone. Connects at the first call, and again after a restart of the
/// runtime.
#[derive(Clone, Debug)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// What `exec_sync` of a command brought back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit code.
    pub exit_code: i32,
    /// Standard output, then standard error.
    pub output: Vec<u8>,
}

async fn within<T>(
    call: &'static str,
    object: &str,
    limit: Duration,
    answer: impl Future<Output = std::result::Result<tonic::Response<T>, Status>>,
) -> Result<T> {
    let status = match tokio::time::timeout(limit, answer).await {
        Ok(Ok(response)) => return Ok(response.into_inner()),
        Ok(Err(status)) => status,
        // Not `DeadlineExceeded`: that is the runtime's word for what it did and what took too long.
        Err(_) => Status::unavailable(format!("the runtime did not answer within {} s", limit.as_secs())),
    };
    Err(CriError { call, object: object.to_owned(), status: Box::new(status) })
}

macro_rules! remove_like {
    ($(#[$doc:meta] $name:ident, $rpc:ident, $call:literal, $request:ident, $field:ident;)*) => {$(
        #[$doc]
        ///
        /// # Errors
        /// When the runtime refuses; an object it does not know is a success.
        pub async fn $name(&self, id: &str) -> Result<()> {
            let request = v1::$request { $field: id.to_owned() };
            match within($call, id, CHANGE, self.runtime.clone().$rpc(request)).await {
                Err(error) if !error.is_not_found() => Err(error),
                _ => Ok(()),
            }
        }
    )*};
}

impl Cri {
    /// A client of the runtime behind `socket`.
    pub fn new(socket: &Path) -> Self {
        let path: PathBuf = socket.into();
        let connect = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is not used: the connector above knows the socket.
        let channel = Endpoint::from_static("http://runtime.invalid")
            .connect_timeout(Duration::from_secs(5))
            .connect_with_connector_lazy(connect);
        Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER),
        }
    }

    /// The runtime service, for calls that are not here; the caller sets the deadline.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        self.runtime.clone()
    }

    /// The image service, for calls that are not here; the caller sets the deadline.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        self.images.clone()
    }

    /// Name and version of the runtime.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn version(&self) -> Result<v1::VersionResponse> {
        let request = v1::VersionRequest { version: "v1".into() };
        within("Version", "", LOOK, self.runtime.clone().version(request)).await
    }

    /// Tells the runtime the pod network of this node.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub async fn set_pod_cidr(&self, cidr: &str) -> Result<()> {
        let request = v1::UpdateRuntimeConfigRequest {
            runtime_config: Some(v1::RuntimeConfig {
                network_config: Some(v1::NetworkConfig { pod_cidr: cidr.to_owned() }),
            }),
        };
        within("UpdateRuntimeConfig", cidr, LOOK, self.runtime.clone().update_runtime_config(request))
            .await?;
        Ok(())
    }

    /// Sandboxes, all or those of one pod.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<v1::PodSandbox>> {
        let filter = v1::PodSandboxFilter { label_selector: uid_selector(pod_uid), ..Default::default() };
        let request = v1::ListPodSandboxRequest { filter: Some(filter) };
        let object = pod_uid.unwrap_or("all");
        Ok(within("ListPodSandbox", object, LOOK, self.runtime.clone().list_pod_sandbox(request))
            .await?
            .items)
    }

    /// Containers, all or those of one pod.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn containers(&self, pod_uid: Option<&str>) -> Result<Vec<v1::Container>> {
        let filter = v1::ContainerFilter { label_selector: uid_selector(pod_uid), ..Default::default() };
        let request = v1::ListContainersRequest { filter: Some(filter) };
        let object = pod_uid.unwrap_or("all");
        Ok(within("ListContainers", object, LOOK, self.runtime.clone().list_containers(request))
            .await?
            .containers)
    }

    /// State of one sandbox; `None` when the runtime does not know it.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn sandbox_status(&self, id: &str) -> Result<Option<v1::PodSandboxStatus>> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        match within("PodSandboxStatus", id, LOOK, self.runtime.clone().pod_sandbox_status(request)).await {
            Ok(answer) => Ok(answer.status),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// State of one container; `None` when the runtime does not know it.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn container_status(&self, id: &str) -> Result<Option<v1::ContainerStatus>> {
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        match within("ContainerStatus", id, LOOK, self.runtime.clone().container_status(request)).await {
            Ok(answer) => Ok(answer.status),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What a sandbox and its containers take; `None` when the runtime does not know it.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn sandbox_stats(&self, id: &str) -> Result<Option<v1::PodSandboxStats>> {
        let request = v1::PodSandboxStatsRequest { pod_sandbox_id: id.to_owned() };
        match within("PodSandboxStats", id, LOOK, self.runtime.clone().pod_sandbox_stats(request)).await {
            Ok(answer) => Ok(answer.stats),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts a sandbox; answers its id.
    ///
    /// # Errors
    /// When the runtime cannot.
    pub async fn run_sandbox(&self, config: v1::PodSandboxConfig, handler: &str) -> Result<String> {
        let object =
            config.metadata.as_ref().map(|m| format!("{}/{}", m.namespace, m.name)).unwrap_or_default();
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        let answer =
            within("RunPodSandbox", &object, BOOT, self.runtime.clone().run_pod_sandbox(request)).await?;
        Ok(answer.pod_sandbox_id)
    }

    remove_like! {
        /// Stops a sandbox and what runs in it.
        stop_sandbox, stop_pod_sandbox, "StopPodSandbox", StopPodSandboxRequest, pod_sandbox_id;
        /// Removes a sandbox and its containers.
        remove_sandbox, remove_pod_sandbox, "RemovePodSandbox", RemovePodSandboxRequest, pod_sandbox_id;
        /// Removes a container.
        remove_container, remove_container, "RemoveContainer", RemoveContainerRequest, container_id;
    }

    /// Makes a container; answers its id.
    ///
    /// # Errors
    /// When the runtime cannot.
    pub async fn create_container(
        &self,
        sandbox: &str,
        config: v1::ContainerConfig,
        sandbox_config: v1::PodSandboxConfig,
    ) -> Result<String> {
        let object = config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let answer =
            within("CreateContainer", &object, CHANGE, self.runtime.clone().create_container(request))
                .await?;
        Ok(answer.container_id)
    }

    /// Starts a container.
    ///
    /// # Errors
    /// When the runtime cannot.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let request = v1::StartContainerRequest { container_id: id.to_owned() };
        within("StartContainer", id, CHANGE, self.runtime.clone().start_container(request)).await?;
        Ok(())
    }

    /// Stops a container: asks it, and kills it after `grace`. A container that is gone is a success.
    ///
    /// # Errors
    /// When the runtime cannot.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout: seconds_up(grace) };
        match within("StopContainer", id, grace + CHANGE, self.runtime.clone().stop_container(request)).await
        {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Runs a command in a container and waits for it.
    ///
    /// # Errors
    /// When the runtime cannot, or the command takes longer than `limit` (`DeadlineExceeded`), or the runtime does
    /// not answer (`Unavailable`).
    pub async fn exec_sync(&self, id: &str, command: &[String], limit: Duration) -> Result<ExecOutput> {
        let request = v1::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.to_vec(),
            timeout: seconds_up(limit),
        };
        let margin = limit + EXEC_MARGIN;
        let answer = within("ExecSync", id, margin, self.runtime.clone().exec_sync(request)).await?;
        let mut output = answer.stdout;
        output.extend_from_slice(&answer.stderr);
        Ok(ExecOutput { exit_code: answer.exit_code, output })
    }

    /// Opens a container's log file anew, after it was renamed.
    ///
    /// # Errors
    /// When the runtime cannot.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let request = v1::ReopenContainerLogRequest { container_id: id.to_owned() };
        within("ReopenContainerLog", id, LOOK, self.runtime.clone().reopen_container_log(request)).await?;
        Ok(())
    }

    /// Events of containers, until the runtime ends the stream.
    ///
    /// # Errors
    /// When the runtime has no such stream.
    pub async fn events(&self) -> Result<tonic::Streaming<v1::ContainerEventResponse>> {
        let request = v1::GetEventsRequest {};
        within("GetContainerEvents", "", LOOK, self.runtime.clone().get_container_events(request)).await
    }

    /// An image as the runtime has it; `None` when it has not.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn image(&self, image: &str) -> Result<Option<v1::Image>> {
        let request = v1::ImageStatusRequest { image: Some(image_spec(image)), verbose: false };
        Ok(within("ImageStatus", image, LOOK, self.images.clone().image_status(request)).await?.image)
    }

    /// The same, with who may use it: `None` where the runtime does not say, as of an image that nobody pulled.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn image_and_access(&self, image: &str) -> Result<Option<(v1::Image, Option<Access>)>> {
        let request = v1::ImageStatusRequest { image: Some(image_spec(image)), verbose: true };
        let answer = within("ImageStatus", image, LOOK, self.images.clone().image_status(request)).await?;
        // What cannot be read admits nobody, so that the registry is asked.
        let access = answer.info.get(ACCESS).map(|text| serde_json::from_str(text).unwrap_or_default());
        Ok(answer.image.map(|image| (image, access)))
    }

    /// Pulls an image; answers the reference to create containers with. `auth` is told with the secret that it is from.
    ///
    /// # Errors
    /// When the runtime cannot.
    pub async fn pull(
        &self,
        image: &str,
        auth: Option<(PullSecret, v1::AuthConfig)>,
        sandbox: v1::PodSandboxConfig,
    ) -> Result<String> {
        let mut spec = image_spec(image);
        let (secret, auth) = auth.unzip();
        if let Some(secret) = secret.and_then(|secret| serde_json::to_string(&secret).ok()) {
            spec.annotations.insert(PULL_SECRET.to_owned(), secret);
        }
        let request = v1::PullImageRequest { image: Some(spec), auth, sandbox_config: Some(sandbox) };
        Ok(within("PullImage", image, PULL, self.images.clone().pull_image(request)).await?.image_ref)
    }
}

fn image_spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec { image: image.to_owned(), user_specified_image: image.to_owned(), ..Default::default() }
}

fn uid_selector(pod_uid: Option<&str>) -> HashMap<String, String> {
    pod_uid.map(|uid| ("io.kubernetes.pod.uid".to_owned(), uid.to_owned())).into_iter().collect()
}

/// CRI counts whole seconds; rounding down would make a short deadline none.
fn seconds_up(duration: Duration) -> i64 {
    let whole = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    if duration.subsec_nanos() > 0 { whole.saturating_add(1) } else { whole }
}
