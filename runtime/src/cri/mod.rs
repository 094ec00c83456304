//! The CRI services: translation between the wire and the service, nothing else.
//!
//! `sandbox`, `container`, `image` and `stream` hold the translation of their part; this file has the two generated
//! traits, each method one line. Called by `server`. Invariant: no state, no I/O here; every error goes through
//! [`status`], and is logged where it was handled, not here.

mod container;
mod events;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod image;
mod runtime;
mod sandbox;
mod stats;
mod stream;

use crate::error::Error;
use crate::images::ImageError;
use crate::service::Service;
use crate::streaming::Streaming;
use atoll_cri::v1::{self, *};
use futures_util::stream::BoxStream;
use tonic::{Request, Response, Status};

/// Both CRI services.
#[derive(Clone)]
pub struct Cri {
    service: Service,
    streaming: Streaming,
}

impl Cri {
    /// Serves what `service` and `streaming` do.
    pub fn new(service: Service, streaming: Streaming) -> Self {
        Self { service, streaming }
    }
}

/// The gRPC status of an error.
pub fn status(error: Error) -> Status {
    let message = error.to_string();
    match error {
        Error::NotFound { .. } => Status::not_found(message),
        Error::Invalid(_) | Error::Refused(_) => Status::invalid_argument(message),
        Error::State(_) => Status::failed_precondition(message),
        Error::Exists(_) => Status::already_exists(message),
        Error::Deadline { .. } => Status::deadline_exceeded(message),
        Error::Lost { .. } | Error::Stopping => Status::unavailable(message),
        Error::Image(ImageError::NotFound(_) | ImageError::NotInRegistry { .. }) => {
            Status::not_found(message)
        }
        Error::Image(ImageError::Reference { .. }) => Status::invalid_argument(message),
        Error::Image(ImageError::Denied { .. }) => Status::permission_denied(message),
        Error::Image(ImageError::Full { .. }) => Status::resource_exhausted(message),
        Error::Image(ImageError::Deadline { .. }) => Status::deadline_exceeded(message),
        Error::Image(_) | Error::Guest { .. } | Error::Io { .. } | Error::Step { .. } => {
            Status::unknown(message)
        }
    }
}

fn missing(field: &str) -> Status {
    Status::invalid_argument(format!("{field} is missing from the request"))
}

fn unsupported(what: &str) -> Status {
    Status::unimplemented(format!("{what} is not supported by this version of Atoll"))
}

type Answer<T> = Result<Response<T>, Status>;
type Stream<T> = BoxStream<'static, Result<T, Status>>;

/// A list as a stream of one-page answers.
fn stream_of<T: Send + 'static, P: Send + 'static>(
    items: Vec<T>,
    page: fn(Vec<T>) -> P,
) -> Response<Stream<P>> {
    const PAGE: usize = 256;
    let mut items = items.into_iter().peekable();
    let pages = std::iter::from_fn(move || {
        items.peek()?;
        Some(Ok(page(items.by_ref().take(PAGE).collect())))
    });
    Response::new(Box::pin(futures_util::stream::iter(pages)))
}

#[tonic::async_trait]
impl atoll_cri::RuntimeService for Cri {
    type StreamPodSandboxesStream = Stream<StreamPodSandboxesResponse>;
    type StreamContainersStream = Stream<StreamContainersResponse>;
    type StreamContainerStatsStream = Stream<StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Stream<StreamPodSandboxStatsResponse>;
    type GetContainerEventsStream = Stream<ContainerEventResponse>;
    type StreamPodSandboxMetricsStream = Stream<StreamPodSandboxMetricsResponse>;

    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        Ok(Response::new(runtime::version()))
    }

    async fn run_pod_sandbox(&self, r: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        self.run_sandbox(r.into_inner()).await.map(Response::new)
    }

    async fn stop_pod_sandbox(&self, r: Request<StopPodSandboxRequest>) -> Answer<StopPodSandboxResponse> {
        self.stop_sandbox(r.into_inner()).await.map(Response::new)
    }

    async fn remove_pod_sandbox(
        &self,
        r: Request<RemovePodSandboxRequest>,
    ) -> Answer<RemovePodSandboxResponse> {
        self.remove_sandbox(r.into_inner()).await.map(Response::new)
    }

    async fn pod_sandbox_status(
        &self,
        r: Request<PodSandboxStatusRequest>,
    ) -> Answer<PodSandboxStatusResponse> {
        self.sandbox_status(r.into_inner()).await.map(Response::new)
    }

    async fn list_pod_sandbox(&self, r: Request<ListPodSandboxRequest>) -> Answer<ListPodSandboxResponse> {
        let items = self.list_sandboxes(r.into_inner().filter).await?;
        Ok(Response::new(ListPodSandboxResponse { items }))
    }

    async fn stream_pod_sandboxes(
        &self,
        r: Request<StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = self.list_sandboxes(r.into_inner().filter).await?;
        Ok(stream_of(items, |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes }))
    }

    async fn create_container(&self, r: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        self.create(r.into_inner()).await.map(Response::new)
    }

    async fn start_container(&self, r: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        self.start(r.into_inner()).await.map(Response::new)
    }

    async fn stop_container(&self, r: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        self.stop(r.into_inner()).await.map(Response::new)
    }

    async fn remove_container(&self, r: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        self.remove(r.into_inner()).await.map(Response::new)
    }

    async fn list_containers(&self, r: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
        let containers = self.list(r.into_inner().filter).await?;
        Ok(Response::new(ListContainersResponse { containers }))
    }

    async fn stream_containers(
        &self,
        r: Request<StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let items = self.list(r.into_inner().filter).await?;
        Ok(stream_of(items, |containers| StreamContainersResponse { containers }))
    }

    async fn container_status(&self, r: Request<ContainerStatusRequest>) -> Answer<ContainerStatusResponse> {
        self.status(r.into_inner()).await.map(Response::new)
    }

    async fn update_container_resources(
        &self,
        r: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        self.update(r.into_inner()).await.map(Response::new)
    }

    async fn reopen_container_log(
        &self,
        r: Request<ReopenContainerLogRequest>,
    ) -> Answer<ReopenContainerLogResponse> {
        self.reopen_log(r.into_inner()).await.map(Response::new)
    }

    async fn exec_sync(&self, r: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        self.exec_to_end(r.into_inner()).await.map(Response::new)
    }

    async fn exec(&self, r: Request<ExecRequest>) -> Answer<ExecResponse> {
        self.exec_url(r.into_inner()).await.map(Response::new)
    }

    async fn attach(&self, r: Request<AttachRequest>) -> Answer<AttachResponse> {
        self.attach_url(r.into_inner()).await.map(Response::new)
    }

    async fn port_forward(&self, r: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        self.port_forward_url(r.into_inner()).await.map(Response::new)
    }

    async fn container_stats(&self, r: Request<ContainerStatsRequest>) -> Answer<ContainerStatsResponse> {
        self.stats_of(&r.into_inner().container_id).await.map(Response::new)
    }

    async fn list_container_stats(
        &self,
        r: Request<ListContainerStatsRequest>,
    ) -> Answer<ListContainerStatsResponse> {
        let stats = self.all_container_stats(r.into_inner().filter).await?;
        Ok(Response::new(ListContainerStatsResponse { stats }))
    }

    async fn stream_container_stats(
        &self,
        r: Request<StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let stats = self.all_container_stats(r.into_inner().filter).await?;
        Ok(stream_of(stats, |container_stats| StreamContainerStatsResponse { container_stats }))
    }

    async fn pod_sandbox_stats(&self, r: Request<PodSandboxStatsRequest>) -> Answer<PodSandboxStatsResponse> {
        self.sandbox_stats(&r.into_inner().pod_sandbox_id).await.map(Response::new)
    }

    async fn list_pod_sandbox_stats(
        &self,
        r: Request<ListPodSandboxStatsRequest>,
    ) -> Answer<ListPodSandboxStatsResponse> {
        let stats = self.all_sandbox_stats(r.into_inner().filter).await?;
        Ok(Response::new(ListPodSandboxStatsResponse { stats }))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        r: Request<StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let stats = self.all_sandbox_stats(r.into_inner().filter).await?;
        Ok(stream_of(stats, |pod_sandbox_stats| StreamPodSandboxStatsResponse { pod_sandbox_stats }))
    }

    async fn update_runtime_config(
        &self,
        r: Request<UpdateRuntimeConfigRequest>,
    ) -> Answer<UpdateRuntimeConfigResponse> {
        self.set_runtime_config(r.into_inner()).await.map(Response::new)
    }

    async fn status(&self, r: Request<StatusRequest>) -> Answer<StatusResponse> {
        self.runtime_status(r.into_inner()).await.map(Response::new)
    }

    async fn checkpoint_container(
        &self,
        _: Request<CheckpointContainerRequest>,
    ) -> Answer<CheckpointContainerResponse> {
        Err(unsupported("CheckpointContainer"))
    }

    async fn checkpoint_pod(&self, _: Request<CheckpointPodRequest>) -> Answer<CheckpointPodResponse> {
        Err(unsupported("CheckpointPod"))
    }

    async fn restore_pod(&self, _: Request<RestorePodRequest>) -> Answer<RestorePodResponse> {
        Err(unsupported("RestorePod"))
    }

    async fn get_container_events(
        &self,
        _: Request<GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        Ok(Response::new(events::follow(self.service.events())))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Answer<ListMetricDescriptorsResponse> {
        Ok(Response::new(ListMetricDescriptorsResponse { descriptors: stats::descriptors() }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Answer<ListPodSandboxMetricsResponse> {
        let pod_metrics = self.all_metrics().await?;
        Ok(Response::new(ListPodSandboxMetricsResponse { pod_metrics }))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let metrics = self.all_metrics().await?;
        Ok(stream_of(metrics, |pod_sandbox_metrics| StreamPodSandboxMetricsResponse { pod_sandbox_metrics }))
    }

    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        Ok(Response::new(runtime::config()))
    }

    async fn update_pod_sandbox_resources(
        &self,
        r: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        let id = r.into_inner().pod_sandbox_id;
        Err(Status::unimplemented(format!(
            "sandbox {id}: a virtual machine keeps the memory and processors it started with"
        )))
    }
}

#[tonic::async_trait]
impl atoll_cri::ImageService for Cri {
    type StreamImagesStream = Stream<StreamImagesResponse>;

    async fn list_images(&self, r: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        let images = self.images(r.into_inner().filter);
        Ok(Response::new(ListImagesResponse { images }))
    }

    async fn stream_images(&self, r: Request<StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        Ok(stream_of(self.images(r.into_inner().filter), |images| StreamImagesResponse { images }))
    }

    async fn image_status(&self, r: Request<ImageStatusRequest>) -> Answer<ImageStatusResponse> {
        self.image(r.into_inner()).map(Response::new)
    }

    async fn pull_image(&self, r: Request<PullImageRequest>) -> Answer<PullImageResponse> {
        self.pull(r.into_inner()).await.map(Response::new)
    }

    async fn remove_image(&self, r: Request<RemoveImageRequest>) -> Answer<RemoveImageResponse> {
        self.remove_image_named(r.into_inner()).await.map(Response::new)
    }

    async fn image_fs_info(&self, _: Request<v1::ImageFsInfoRequest>) -> Answer<ImageFsInfoResponse> {
        self.fs_info().map(Response::new)
    }
}
