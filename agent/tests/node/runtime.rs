//! A pretend container runtime behind a real CRI socket: sandboxes and containers are entries in a table, every call is
//! counted, and it outlives the agents of a test.

use atoll_cri::v1::*;
use atoll_cri::{ImageService, ImageServiceServer, RuntimeService, RuntimeServiceServer};
use atoll_spec::images::{ACCESS, Access, PULL_SECRET};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use tokio::sync::{broadcast, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

#[derive(Default)]
struct Table {
    ids: u32,
    sandboxes: BTreeMap<String, Sandbox>,
    containers: BTreeMap<String, Made>,
    calls: Vec<(Instant, &'static str)>,
    pod_cidr: String,
    /// Containers end with this as soon as they are started.
    doomed: Option<i32>,
    /// Containers that cannot be removed.
    stuck: Vec<String>,
    /// Bytes that each container, and each volume of a sandbox by its directory, holds.
    written: BTreeMap<String, u64>,
    stored: BTreeMap<String, BTreeMap<String, u64>>,
    /// The registry wants this password, and who has shown it.
    guarded: Option<(String, Access)>,
}

#[derive(Clone)]
struct Sandbox {
    config: PodSandboxConfig,
    ready: bool,
    created: i64,
    ip: String,
}

#[derive(Clone)]
struct Made {
    sandbox: String,
    config: ContainerConfig,
    state: ContainerState,
    created: i64,
    started: i64,
    finished: i64,
    exit_code: i32,
    log: String,
}

/// Whether it tells its events, as the real one does, or has to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Events {
    Told,
    Unimplemented,
}

#[derive(Clone)]
pub struct Runtime {
    table: Arc<Mutex<Table>>,
    events: broadcast::Sender<ContainerEventResponse>,
    tells: Events,
    /// No container is made while this is set.
    held: watch::Sender<bool>,
    /// Nothing is run in a container and none is stopped while this is set.
    stalled: watch::Sender<bool>,
}

fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).expect("before the year 2262")
}

impl Runtime {
    /// Serves on a socket.
    pub fn start(socket: &Path, tells: Events) -> Self {
        let runtime = Self {
            table: Arc::default(),
            events: broadcast::channel(256).0,
            tells,
            held: watch::Sender::new(false),
            stalled: watch::Sender::new(false),
        };
        let listener = tokio::net::UnixListener::bind(socket).expect("a socket");
        let served = tonic::transport::Server::builder()
            .add_service(RuntimeServiceServer::new(runtime.clone()))
            .add_service(ImageServiceServer::new(runtime.clone()))
            .serve_with_incoming(UnixListenerStream::new(listener));
        tokio::spawn(served);
        runtime
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no test panics with the lock held")
    }

    fn called(&self, call: &'static str) -> MutexGuard<'_, Table> {
        let mut table = self.table();
        table.calls.push((Instant::now(), call));
        table
    }

    /// Calls since `from`, by name.
    pub fn calls_since(&self, from: Instant) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for (_, call) in self.table().calls.iter().filter(|(at, _)| *at >= from) {
            *counts.entry(*call).or_default() += 1;
        }
        counts
    }

    pub fn count(&self, from: Instant, call: &str) -> usize {
        self.calls_since(from).get(call).copied().unwrap_or_default()
    }

    /// Ids of the containers that run in pods of this name.
    pub fn running(&self, pod: &str) -> Vec<String> {
        let table = self.table();
        let of = |made: &Made| {
            let sandbox = table.sandboxes.get(&made.sandbox);
            let name = sandbox.and_then(|s| s.config.metadata.as_ref()).map(|m| m.name.as_str());
            made.state == ContainerState::ContainerRunning && name == Some(pod)
        };
        table.containers.iter().filter(|(_, made)| of(made)).map(|(id, _)| id.clone()).collect()
    }

    /// Uids of the pods that have a sandbox.
    pub fn pods(&self) -> Vec<String> {
        let uid = |s: &Sandbox| s.config.metadata.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        self.table().sandboxes.values().map(uid).collect()
    }

    pub fn pod_cidr(&self) -> String {
        self.table().pod_cidr.clone()
    }

    /// Log of a container, on this machine.
    pub fn log(&self, id: &str) -> String {
        self.table().containers[id].log.clone()
    }

    /// Log of a run of the container in the pod of this name.
    pub fn log_of(&self, pod: &str, run: u32) -> String {
        let table = self.table();
        let of = |made: &&Made| {
            let sandbox = table.sandboxes.get(&made.sandbox);
            let name = sandbox.and_then(|s| s.config.metadata.as_ref()).map(|m| m.name.as_str());
            name == Some(pod) && made.config.metadata.as_ref().is_some_and(|m| m.attempt == run)
        };
        table.containers.values().find(of).expect("a run").log.clone()
    }

    /// Whether calls that make a container wait.
    pub fn hold(&self, hold: bool) {
        self.held.send_replace(hold);
    }

    /// Whether calls that run something in a container, or stop it, are never answered.
    pub fn stall(&self, stall: bool) {
        self.stalled.send_replace(stall);
    }

    /// From now on this container cannot be removed.
    pub fn stick(&self, id: &str) {
        self.table().stuck.push(id.to_owned());
    }

    /// From now on containers end with this code as soon as they are started; `None`: they run.
    pub fn doom(&self, code: Option<i32>) {
        self.table().doomed = code;
    }

    /// The container ends by itself.
    pub fn exit(&self, id: &str, code: i32) {
        let mut table = self.table();
        let made = table.containers.get_mut(id).expect("a container");
        (made.state, made.exit_code, made.finished) = (ContainerState::ContainerExited, code, now());
        let sandbox = made.sandbox.clone();
        self.tell(&table, id, &sandbox, ContainerEventType::ContainerStoppedEvent);
    }

    /// From now on the image is one that was pulled, and the registry gives it for this password.
    pub fn guard(&self, password: &str, access: Access) {
        self.table().guarded = Some((password.to_owned(), access));
    }

    /// Who has shown the password.
    pub fn access(&self) -> Access {
        self.table().guarded.clone().expect("a guarded image").1
    }

    /// A container has this much in its writable layer.
    pub fn writes(&self, id: &str, bytes: u64) {
        self.table().written.insert(id.to_owned(), bytes);
    }

    /// The pod of a container has this much in each volume that lives in its guest.
    pub fn stores(&self, id: &str, bytes: u64) {
        let mut table = self.table();
        let sandbox = table.containers[id].sandbox.clone();
        let volumes = &table.sandboxes[&sandbox].config.annotations["atoll.dev/scratch-volumes"];
        let volumes: Vec<serde_json::Value> = serde_json::from_str(volumes).expect("a list");
        let path = |volume: &serde_json::Value| (volume["path"].as_str().expect("a path").to_owned(), bytes);
        let stored = volumes.iter().map(path).collect();
        table.stored.insert(sandbox, stored);
    }

    /// As when the host loses its power: nothing runs any more, the table is still there.
    pub fn lose_power(&self) {
        let mut table = self.table();
        table.sandboxes.values_mut().for_each(|sandbox| sandbox.ready = false);
        for made in table.containers.values_mut().filter(|m| m.state == ContainerState::ContainerRunning) {
            (made.state, made.exit_code, made.finished) = (ContainerState::ContainerExited, 255, now());
        }
    }

    fn tell(&self, table: &Table, id: &str, sandbox: &str, kind: ContainerEventType) {
        let status = table.sandboxes.get(sandbox).map(|s| sandbox_status(sandbox, s));
        let event = ContainerEventResponse {
            container_id: id.into(),
            container_event_type: kind.into(),
            created_at: now(),
            pod_sandbox_status: status,
            containers_statuses: Vec::new(),
        };
        // An error says that nobody listens.
        let _ = self.events.send(event);
    }
}

fn sandbox_state(ready: bool) -> i32 {
    if ready { PodSandboxState::SandboxReady.into() } else { PodSandboxState::SandboxNotready.into() }
}

fn sandbox_status(id: &str, sandbox: &Sandbox) -> PodSandboxStatus {
    PodSandboxStatus {
        id: id.into(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox_state(sandbox.ready),
        created_at: sandbox.created,
        network: Some(PodSandboxNetworkStatus { ip: sandbox.ip.clone(), additional_ips: Vec::new() }),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        ..Default::default()
    }
}

fn fits(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

type Answer<T> = Result<Response<T>, Status>;
type Told<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

macro_rules! not_here {
    ($($name:ident($request:ty) -> $answer:ty;)*) => {$(
        fn $name<'a, 'b>(
            &'a self,
            _: Request<$request>,
        ) -> Pin<Box<dyn Future<Output = Answer<$answer>> + Send + 'b>>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($name))) })
        }
    )*};
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    type StreamPodSandboxesStream = Told<StreamPodSandboxesResponse>;
    type StreamContainersStream = Told<StreamContainersResponse>;
    type StreamContainerStatsStream = Told<StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Told<StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Told<StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = Told<ContainerEventResponse>;

    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        drop(self.called("Version"));
        Ok(Response::new(VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "pretend".into(),
            runtime_version: "1.0".into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Answer<StatusResponse> {
        drop(self.called("Status"));
        let condition = |name: &str| RuntimeCondition {
            r#type: name.into(),
            status: true,
            reason: String::new(),
            message: String::new(),
        };
        let conditions = vec![condition("RuntimeReady"), condition("NetworkReady")];
        Ok(Response::new(StatusResponse { status: Some(RuntimeStatus { conditions }), ..Default::default() }))
    }

    async fn run_pod_sandbox(&self, request: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        let mut table = self.called("RunPodSandbox");
        let config = request.into_inner().config.unwrap_or_default();
        table.ids += 1;
        let id = format!("sandbox-{}", table.ids);
        let ip = format!("10.244.7.{}", table.ids % 250 + 1);
        table.sandboxes.insert(id.clone(), Sandbox { config, ready: true, created: now(), ip });
        self.tell(&table, &id, &id, ContainerEventType::ContainerStartedEvent);
        Ok(Response::new(RunPodSandboxResponse { pod_sandbox_id: id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Answer<StopPodSandboxResponse> {
        let mut table = self.called("StopPodSandbox");
        let id = request.into_inner().pod_sandbox_id;
        if let Some(sandbox) = table.sandboxes.get_mut(&id) {
            sandbox.ready = false;
        }
        self.tell(&table, &id, &id, ContainerEventType::ContainerStoppedEvent);
        Ok(Response::new(StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Answer<RemovePodSandboxResponse> {
        let mut table = self.called("RemovePodSandbox");
        let id = request.into_inner().pod_sandbox_id;
        self.tell(&table, &id, &id, ContainerEventType::ContainerDeletedEvent);
        table.sandboxes.remove(&id);
        table.containers.retain(|_, made| made.sandbox != id);
        Ok(Response::new(RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Answer<PodSandboxStatusResponse> {
        let table = self.called("PodSandboxStatus");
        let id = request.into_inner().pod_sandbox_id;
        let sandbox = table.sandboxes.get(&id).ok_or_else(|| Status::not_found("no such sandbox"))?;
        let status = Some(sandbox_status(&id, sandbox));
        Ok(Response::new(PodSandboxStatusResponse { status, ..Default::default() }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Answer<ListPodSandboxResponse> {
        let table = self.called("ListPodSandbox");
        let selector = request.into_inner().filter.unwrap_or_default().label_selector;
        let listed = table.sandboxes.iter().filter(|(_, s)| fits(&s.config.labels, &selector));
        let items = listed.map(|(id, sandbox)| PodSandbox {
            id: id.clone(),
            metadata: sandbox.config.metadata.clone(),
            state: sandbox_state(sandbox.ready),
            created_at: sandbox.created,
            labels: sandbox.config.labels.clone(),
            annotations: sandbox.config.annotations.clone(),
            runtime_handler: String::new(),
        });
        Ok(Response::new(ListPodSandboxResponse { items: items.collect() }))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Answer<CreateContainerResponse> {
        drop(self.called("CreateContainer"));
        // An error would say that the test is over.
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        let mut table = self.table();
        let request = request.into_inner();
        let config = request.config.unwrap_or_default();
        let directory = request.sandbox_config.unwrap_or_default().log_directory;
        table.ids += 1;
        let id = format!("container-{}", table.ids);
        let made = Made {
            sandbox: request.pod_sandbox_id.clone(),
            log: Path::new(&directory).join(&config.log_path).display().to_string(),
            config,
            state: ContainerState::ContainerCreated,
            created: now(),
            started: 0,
            finished: 0,
            exit_code: 0,
        };
        table.containers.insert(id.clone(), made);
        self.tell(&table, &id, &request.pod_sandbox_id, ContainerEventType::ContainerCreatedEvent);
        Ok(Response::new(CreateContainerResponse { container_id: id }))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Answer<StartContainerResponse> {
        let mut table = self.called("StartContainer");
        let id = request.into_inner().container_id;
        let made = table.containers.get_mut(&id).ok_or_else(|| Status::not_found("no such container"))?;
        (made.state, made.started) = (ContainerState::ContainerRunning, now());
        let line = format!("{} stdout F hello from {id}\n", jiff::Timestamp::now());
        std::fs::write(&made.log, line).map_err(|error| Status::internal(error.to_string()))?;
        let sandbox = made.sandbox.clone();
        self.tell(&table, &id, &sandbox, ContainerEventType::ContainerStartedEvent);
        let doomed = table.doomed;
        drop(table);
        if let Some(code) = doomed {
            self.exit(&id, code);
        }
        Ok(Response::new(StartContainerResponse {}))
    }

    async fn stop_container(&self, request: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        drop(self.called("StopContainer"));
        // An error would say that the test is over.
        let _ = self.stalled.subscribe().wait_for(|stalled| !stalled).await;
        let id = request.into_inner().container_id;
        if self.table().containers.get(&id).is_some_and(|m| m.state == ContainerState::ContainerRunning) {
            self.exit(&id, 143);
        }
        Ok(Response::new(StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Answer<RemoveContainerResponse> {
        let mut table = self.called("RemoveContainer");
        let id = request.into_inner().container_id;
        if table.stuck.contains(&id) {
            return Err(Status::internal("it cannot be removed"));
        }
        if let Some(made) = table.containers.remove(&id) {
            self.tell(&table, &id, &made.sandbox, ContainerEventType::ContainerDeletedEvent);
        }
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Answer<ListContainersResponse> {
        let table = self.called("ListContainers");
        let selector = request.into_inner().filter.unwrap_or_default().label_selector;
        let listed = table.containers.iter().filter(|(_, made)| fits(&made.config.labels, &selector));
        let containers = listed.map(|(id, made)| Container {
            id: id.clone(),
            pod_sandbox_id: made.sandbox.clone(),
            metadata: made.config.metadata.clone(),
            image: made.config.image.clone(),
            image_ref: "sha256:1".into(),
            state: made.state.into(),
            created_at: made.created,
            labels: made.config.labels.clone(),
            annotations: made.config.annotations.clone(),
            image_id: "sha256:1".into(),
        });
        Ok(Response::new(ListContainersResponse { containers: containers.collect() }))
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Answer<ContainerStatusResponse> {
        let table = self.called("ContainerStatus");
        let id = request.into_inner().container_id;
        let made = table.containers.get(&id).ok_or_else(|| Status::not_found("no such container"))?;
        let status = ContainerStatus {
            id,
            metadata: made.config.metadata.clone(),
            state: made.state.into(),
            created_at: made.created,
            started_at: made.started,
            finished_at: made.finished,
            exit_code: made.exit_code,
            image: made.config.image.clone(),
            image_ref: "sha256:1".into(),
            labels: made.config.labels.clone(),
            annotations: made.config.annotations.clone(),
            mounts: made.config.mounts.clone(),
            log_path: made.log.clone(),
            ..Default::default()
        };
        Ok(Response::new(ContainerStatusResponse { status: Some(status), ..Default::default() }))
    }

    async fn exec_sync(&self, _: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        drop(self.called("ExecSync"));
        // An error would say that the test is over.
        let _ = self.stalled.subscribe().wait_for(|stalled| !stalled).await;
        Ok(Response::new(ExecSyncResponse::default()))
    }

    async fn exec(&self, _: Request<ExecRequest>) -> Answer<ExecResponse> {
        drop(self.called("Exec"));
        Err(Status::failed_precondition("the pretend runtime executes nothing"))
    }

    async fn attach(&self, _: Request<AttachRequest>) -> Answer<AttachResponse> {
        drop(self.called("Attach"));
        Err(Status::failed_precondition("the pretend runtime attaches to nothing"))
    }

    async fn port_forward(&self, _: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        drop(self.called("PortForward"));
        Err(Status::failed_precondition("the pretend runtime forwards nothing"))
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Answer<ReopenContainerLogResponse> {
        let table = self.called("ReopenContainerLog");
        let id = request.into_inner().container_id;
        let made = table.containers.get(&id).ok_or_else(|| Status::not_found("no such container"))?;
        std::fs::File::create(&made.log).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(ReopenContainerLogResponse {}))
    }

    async fn update_runtime_config(
        &self,
        request: Request<UpdateRuntimeConfigRequest>,
    ) -> Answer<UpdateRuntimeConfigResponse> {
        let mut table = self.called("UpdateRuntimeConfig");
        let network = request.into_inner().runtime_config.and_then(|config| config.network_config);
        table.pod_cidr = network.map(|network| network.pod_cidr).unwrap_or_default();
        Ok(Response::new(UpdateRuntimeConfigResponse {}))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<PodSandboxStatsRequest>,
    ) -> Answer<PodSandboxStatsResponse> {
        let table = self.called("PodSandboxStats");
        let id = request.into_inner().pod_sandbox_id;
        let sandbox = table.sandboxes.get(&id).ok_or_else(|| Status::not_found("no such sandbox"))?;
        let stored = table.stored.get(&id).cloned().unwrap_or_default();
        let stored = serde_json::to_string(&stored).expect("a map of strings");
        let attributes = PodSandboxAttributes {
            id: id.clone(),
            metadata: sandbox.config.metadata.clone(),
            annotations: [("atoll.dev/scratch-usage".to_owned(), stored)].into(),
            ..Default::default()
        };
        let containers = table.containers.iter().filter(|(_, made)| made.sandbox == id);
        let containers = containers.map(|(id, made)| ContainerStats {
            attributes: Some(ContainerAttributes {
                id: id.clone(),
                metadata: made.config.metadata.clone(),
                ..Default::default()
            }),
            writable_layer: Some(FilesystemUsage {
                used_bytes: Some(UInt64Value { value: table.written.get(id).copied().unwrap_or_default() }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let linux = LinuxPodSandboxStats { containers: containers.collect(), ..Default::default() };
        let stats = PodSandboxStats { attributes: Some(attributes), linux: Some(linux), windows: None };
        Ok(Response::new(PodSandboxStatsResponse { stats: Some(stats) }))
    }

    async fn get_container_events(
        &self,
        _: Request<GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        drop(self.called("GetContainerEvents"));
        if self.tells == Events::Unimplemented {
            return Err(Status::unimplemented("GetContainerEvents"));
        }
        let mut events = self.events.subscribe();
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(event) = events.recv().await {
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }

    not_here! {
        stream_pod_sandboxes(StreamPodSandboxesRequest) -> Self::StreamPodSandboxesStream;
        stream_containers(StreamContainersRequest) -> Self::StreamContainersStream;
        update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
        container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
        list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
        stream_container_stats(StreamContainerStatsRequest) -> Self::StreamContainerStatsStream;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) -> Self::StreamPodSandboxStatsStream;
        checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
        checkpoint_pod(CheckpointPodRequest) -> CheckpointPodResponse;
        restore_pod(RestorePodRequest) -> RestorePodResponse;
        list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
        stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest) -> Self::StreamPodSandboxMetricsStream;
        runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse;
    }
}

/// An image of this name cannot be pulled.
pub const BAD_IMAGE: &str = "bad";

fn image(name: String) -> Image {
    Image { id: "sha256:1".into(), repo_tags: vec![name], size: 1 << 20, ..Default::default() }
}

#[tonic::async_trait]
impl ImageService for Runtime {
    type StreamImagesStream = Told<StreamImagesResponse>;

    async fn list_images(&self, _: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        drop(self.called("ListImages"));
        Ok(Response::new(ListImagesResponse { images: vec![image("image:1".into())] }))
    }

    async fn image_status(&self, request: Request<ImageStatusRequest>) -> Answer<ImageStatusResponse> {
        let table = self.called("ImageStatus");
        let request = request.into_inner();
        let guarded = table.guarded.as_ref().filter(|_| request.verbose);
        let access = |(_, access): &(String, Access)| serde_json::to_string(access).expect("JSON");
        let info = guarded.map(|guarded| (ACCESS.to_owned(), access(guarded))).into_iter().collect();
        let name = request.image.unwrap_or_default().image;
        let present = !name.starts_with(BAD_IMAGE);
        Ok(Response::new(ImageStatusResponse { image: present.then(|| image(name)), info }))
    }

    async fn pull_image(&self, request: Request<PullImageRequest>) -> Answer<PullImageResponse> {
        let mut table = self.called("PullImage");
        let request = request.into_inner();
        let spec = request.image.unwrap_or_default();
        if spec.image.starts_with(BAD_IMAGE) {
            return Err(Status::unknown("cannot unpack layer sha256:1: it is cut short"));
        }
        if let Some((password, access)) = &mut table.guarded {
            if request.auth.unwrap_or_default().password != *password {
                return Err(Status::unknown("r.example refused access"));
            }
            access.secrets.push(serde_json::from_str(&spec.annotations[PULL_SECRET]).expect("a secret"));
        }
        Ok(Response::new(PullImageResponse { image_ref: "sha256:1".into() }))
    }

    not_here! {
        stream_images(StreamImagesRequest) -> Self::StreamImagesStream;
        remove_image(RemoveImageRequest) -> RemoveImageResponse;
        image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
    }
}
