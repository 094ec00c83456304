//! A host without a kernel: VMMs and guests are tasks of the test, behind the runtime's own seams.
//!
//! The VMM speaks the control protocol over its real socket; the guest dials like a real one, over socket pairs whose
//! address the fake host vouches for. What survives a restart of the runtime lives in [`FakeHost`].

#![expect(dead_code, clippy::unwrap_used, reason = "each test binary uses its part, and a test may panic")]

pub mod guest;

use atoll_cri::v1::*;
use atoll_cri::{ImageServiceClient, RuntimeServiceClient};
use atoll_runtime::app::App;
use atoll_runtime::config::Config;
use atoll_runtime::error::Result;
use atoll_runtime::vm::address::PodCidr;
use atoll_runtime::vm::guest::Dialled;
use atoll_runtime::vm::host::{BootFiles, Host, HostUsage, VmmOrder, VmmProcess};
use atoll_runtime::vm::network::Port;
use atoll_spec::ids::SandboxId;
use atoll_spec::units::GuestCid;
use atoll_spec::vm::{MAX_MESSAGE, VmReply, VmRequest, VmStats};
use clap::Parser;
use futures_util::future::BoxFuture;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tonic::transport::Channel;

/// What is left of the host's resources: empty when nothing leaks.
#[derive(Default)]
pub struct Taken {
    pub ports: BTreeSet<String>,
    pub cgroups: BTreeSet<String>,
    pub vmms: BTreeMap<String, FakeVmm>,
    pub mapped: Vec<(u64, u64)>,
}

/// What a guest can do wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Its control connection breaks at a receipt for output.
    Receipt,
    /// Its control connection breaks while a tree is published.
    Publish,
    /// Its control connection breaks before it starts a container.
    Start,
    /// It refuses to remove a container.
    Remove,
    /// It does not say what it has.
    List,
    /// It does not open a container's stdio again.
    Stdio,
    /// It reads a file only after the next acknowledgement of events, or half a second.
    File,
}

#[derive(Clone)]
pub struct FakeVmm {
    pub cid: GuestCid,
    /// How many containers the guest has.
    pub containers: Arc<std::sync::atomic::AtomicUsize>,
    /// Bytes of output that the runtime has acknowledged last.
    pub acknowledged: Arc<std::sync::atomic::AtomicU64>,
    /// How often it opened a container's stdio again.
    pub reopened: Arc<std::sync::atomic::AtomicUsize>,
    /// The sandbox's record as it was on disk at each acknowledgement of events.
    pub records: Arc<watch::Sender<Vec<String>>>,
    directory: PathBuf,
    /// What the guest does wrong, once each.
    faults: Arc<Mutex<BTreeSet<Fault>>>,
    exit: Arc<watch::Sender<Option<i32>>>,
}

impl FakeVmm {
    pub fn end(&self, status: i32) {
        self.exit.send_if_modified(|e| e.is_none().then(|| *e = Some(status)).is_some());
    }

    /// The guest will do this wrong, once.
    pub fn inject(&self, fault: Fault) {
        self.faults.lock().unwrap().insert(fault);
    }

    /// Whether a fault has not happened yet.
    pub fn is_waiting(&self, fault: Fault) -> bool {
        self.faults.lock().unwrap().contains(&fault)
    }

    fn happens(&self, fault: Fault) -> bool {
        self.faults.lock().unwrap().remove(&fault)
    }

    /// The runtime has acknowledged events.
    fn acknowledged_events(&self) {
        let record = std::fs::read_to_string(self.directory.join("state.json")).unwrap();
        self.records.send_modify(|records| records.push(record));
    }

    pub async fn ended(&self) {
        let _ = self.exit.subscribe().wait_for(Option::is_some).await;
    }

    fn process(&self) -> VmmProcess {
        let copy = self.clone();
        VmmProcess::new(1, self.exit.subscribe(), Arc::new(move || copy.end(137)))
    }
}

/// How guests reach the runtime that runs now.
#[derive(Clone, Default)]
pub struct Exchange(Arc<Mutex<Option<mpsc::Sender<Dialled>>>>);

impl Exchange {
    /// Dials; waits while no runtime listens.
    pub async fn dial(&self, cid: GuestCid) -> UnixStream {
        loop {
            let sender = self.0.lock().unwrap().clone();
            if let Some(sender) = sender {
                let (ours, theirs) = UnixStream::pair().unwrap();
                if sender.send((cid, Box::new(theirs))).await.is_ok() {
                    return ours;
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

#[derive(Clone, Default)]
pub struct FakeHost {
    pub taken: Arc<Mutex<Taken>>,
    pub exchange: Exchange,
    /// The packet filter: pod CIDR and taps.
    pub filter: Arc<Mutex<(String, BTreeSet<String>)>>,
    /// Installing the filter of this CIDR takes until it is another one.
    pub held: Arc<watch::Sender<Option<String>>>,
    /// How many installations have begun.
    pub installing: Arc<watch::Sender<usize>>,
    /// The next launches fail at this step.
    pub broken: Arc<Mutex<Option<&'static str>>>,
}

impl FakeHost {
    fn fails(&self, step: &'static str) -> Result<()> {
        if *self.broken.lock().unwrap() == Some(step) {
            let why = "broken on purpose".to_owned();
            return Err(atoll_runtime::error::Error::Step { operation: step, object: "x".into(), why });
        }
        Ok(())
    }

    pub fn vmm(&self, sandbox: &str) -> FakeVmm {
        self.taken.lock().unwrap().vmms[sandbox].clone()
    }

    pub fn containers_of(&self, sandbox: &str) -> usize {
        self.vmm(sandbox).containers.load(std::sync::atomic::Ordering::SeqCst)
    }

    pub fn is_clean(&self) -> bool {
        let taken = self.taken.lock().unwrap();
        taken.ports.is_empty() && taken.cgroups.is_empty() && taken.vmms.is_empty()
    }
}

impl Host for FakeHost {
    fn check(&self) -> std::result::Result<(), String> {
        match *self.broken.lock().unwrap() {
            Some("check") => Err("cannot open /dev/kvm: enable virtualisation".to_owned()),
            _ => Ok(()),
        }
    }

    fn install_network<'a>(&'a self, cidr: PodCidr, ports: &'a [Port]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            self.installing.send_modify(|installing| *installing += 1);
            // An error would say that the test is over.
            let _ = self.held.subscribe().wait_for(|held| *held != Some(cidr.to_string())).await;
            let taps = ports.iter().map(|port| port.tap.clone()).collect();
            *self.filter.lock().unwrap() = (cidr.to_string(), taps);
            Ok(())
        })
    }

    fn open_network<'a>(&'a self, port: &'a Port) -> BoxFuture<'a, Result<OwnedFd>> {
        Box::pin(async {
            self.taken.lock().unwrap().ports.insert(port.tap.clone());
            self.fails("network")?;
            Ok(File::open("/dev/null").unwrap().into())
        })
    }

    fn close_network<'a>(&'a self, port: &'a Port) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            self.taken.lock().unwrap().ports.remove(&port.tap);
            Ok(())
        })
    }

    fn boot_files(&self) -> Result<BootFiles> {
        let null = || File::open("/dev/null").unwrap();
        Ok(BootFiles {
            kvm: null(),
            kernel: null(),
            initramfs: null(),
            vhost_vsock: null(),
            vhost_net: null(),
        })
    }

    fn spawn_vmm(&self, order: &VmmOrder, listener: &OwnedFd) -> Result<VmmProcess> {
        let vmm = FakeVmm {
            cid: order.cid,
            containers: Arc::default(),
            acknowledged: Arc::default(),
            reopened: Arc::default(),
            records: Arc::new(watch::Sender::new(Vec::new())),
            directory: order.directory.clone(),
            faults: Arc::default(),
            exit: Arc::new(watch::Sender::new(None)),
        };
        let mut taken = self.taken.lock().unwrap();
        taken.cgroups.insert(order.sandbox.to_string());
        taken.vmms.insert(order.sandbox.to_string(), vmm.clone());
        drop(taken);
        self.fails("spawn")?;
        let (host, listener, process) = (self.clone(), listener.try_clone().unwrap(), vmm.process());
        let runtime = tokio::runtime::Handle::current();
        std::thread::spawn(move || host.control(&listener, &vmm, &runtime));
        Ok(process)
    }

    fn adopt_vmm(&self, sandbox: &SandboxId) -> Result<Option<VmmProcess>> {
        Ok(self.taken.lock().unwrap().vmms.get(sandbox.as_str()).map(FakeVmm::process))
    }

    fn clear<'a>(&'a self, sandbox: &'a SandboxId) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            let mut taken = self.taken.lock().unwrap();
            taken.cgroups.remove(sandbox.as_str());
            if let Some(vmm) = taken.vmms.remove(sandbox.as_str()) {
                vmm.end(137);
            }
            Ok(())
        })
    }

    fn usage(&self, _: &SandboxId) -> HostUsage {
        HostUsage { cpu_ns: 5, memory_bytes: 6, tasks: 7 }
    }

    fn listen(&self) -> mpsc::Receiver<Dialled> {
        let (sender, receiver) = mpsc::channel(16);
        *self.exchange.0.lock().unwrap() = Some(sender);
        receiver
    }
}

impl FakeHost {
    /// The VMM's end of its control socket; one connection after the other.
    fn control(&self, listener: &OwnedFd, vmm: &FakeVmm, runtime: &tokio::runtime::Handle) {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let wait = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        let readable = |fd: &OwnedFd| {
            let mut fds = [PollFd::new(fd, PollFlags::IN)];
            poll(&mut fds, Some(&wait)).unwrap_or(0) > 0
        };
        let over = || vmm.exit.borrow().is_some();
        while !over() {
            if !readable(listener) {
                continue;
            }
            let connection = rustix::net::accept(listener).unwrap();
            while !over() {
                if !readable(&connection) {
                    continue;
                }
                let mut buffer = vec![0; MAX_MESSAGE];
                let length = rustix::net::recv(&connection, &mut buffer[..], rustix::net::RecvFlags::empty());
                let Ok((length, _)) = length else { break };
                if length == 0 {
                    break;
                }
                let request: VmRequest = serde_json::from_slice(&buffer[..length]).unwrap();
                let reply = self.answer(request, vmm, runtime);
                let reply = serde_json::to_vec(&reply).unwrap();
                let _ = rustix::net::send(&connection, &reply, rustix::net::SendFlags::NOSIGNAL);
            }
        }
    }

    fn answer(&self, request: VmRequest, vmm: &FakeVmm, runtime: &tokio::runtime::Handle) -> VmReply {
        match request {
            VmRequest::Boot(_) if self.fails("boot").is_err() => {
                VmReply::Error { message: "broken on purpose".to_owned() }
            }
            // A guest that never says anything.
            VmRequest::Boot(_) if self.fails("silent").is_err() => VmReply::Ok,
            VmRequest::Boot(_) if self.fails("mute").is_err() => {
                runtime.spawn(guest::mute(self.exchange.clone(), vmm.clone()));
                VmReply::Ok
            }
            VmRequest::Boot(_) => {
                runtime.spawn(guest::run(self.exchange.clone(), vmm.clone()));
                VmReply::Ok
            }
            VmRequest::MapLayer { offset, length } => {
                self.taken.lock().unwrap().mapped.push((offset, length));
                VmReply::Ok
            }
            VmRequest::Stats => VmReply::Stats(VmStats::default()),
            VmRequest::Pause | VmRequest::Resume => VmReply::Ok,
            VmRequest::Kill => {
                vmm.end(0);
                VmReply::Ok
            }
        }
    }
}

/// A runtime on a fake host, in a temporary directory.
pub struct Fixture {
    pub host: FakeHost,
    pub config: Config,
    pub directory: tempfile::TempDir,
    pub app: Option<App>,
}

/// The image that is in the store.
pub const IMAGE: &str = "registry.test/tool:1";

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

impl Fixture {
    pub async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let mut config = Cli::parse_from([
            "test",
            "--socket",
            &path("cri.sock"),
            "--data",
            &path("data"),
            "--run",
            &path("run"),
            "--volume-root",
            &path("pods"),
            "--log-root",
            &path("logs"),
            "--mkfs-ext4",
            "/bin/true",
            "--scratch-mib",
            "64",
            "--pod-cidr",
            "10.9.0.0/24",
            "--launch-seconds",
            "20",
        ])
        .config;
        config.socket_gid = 0;
        config.unpack_uid = 0;
        for root in ["pods", "logs"] {
            std::fs::create_dir(directory.path().join(root)).unwrap();
        }
        store_image(&directory.path().join("data/images"));
        let mut fixture = Self { host: FakeHost::default(), config, directory, app: None };
        fixture.start().await;
        fixture
    }

    pub async fn start(&mut self) {
        self.app = Some(App::start_on(self.config.clone(), Arc::new(self.host.clone())).await.unwrap());
    }

    pub async fn restart(&mut self) {
        self.app.take().unwrap().stop().await;
        self.start().await;
    }

    /// Where mounts of containers may lie.
    pub fn pods(&self) -> PathBuf {
        self.directory.path().join("pods")
    }

    pub async fn client(&self) -> Client {
        let endpoint = format!("unix://{}", self.config.socket.display());
        let channel = tonic::transport::Endpoint::try_from(endpoint).unwrap().connect().await.unwrap();
        let logs = self.directory.path().join("logs").display().to_string();
        Client {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(16 << 20),
            images: ImageServiceClient::new(channel),
            logs,
        }
    }
}

/// Puts an image of one layer into a store, as a pull would have left it.
fn store_image(root: &Path) {
    let id = "sha256:".to_owned() + &"ab".repeat(32);
    let layer = "sha256:".to_owned() + &"cd".repeat(32);
    std::fs::create_dir_all(root.join("images")).unwrap();
    std::fs::create_dir_all(root.join("layers")).unwrap();
    std::fs::write(root.join("layers").join("cd".repeat(32) + ".erofs"), vec![0; 8192]).unwrap();
    let record = serde_json::json!({
        "id": id, "sequence": 1, "repo_tags": [IMAGE], "repo_digests": [format!("registry.test/tool@{id}")],
        "layers": [{ "diff_id": layer, "length": 8192 }],
        "config": { "entrypoint": [], "cmd": ["sleep"], "env": ["A=1"] },
    });
    std::fs::write(root.join("images").join("ab".repeat(32) + ".json"), record.to_string()).unwrap();
}

/// A CRI client with the requests that tests make.
pub struct Client {
    pub runtime: RuntimeServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
    logs: String,
}

impl Client {
    pub fn sandbox_config(&self, name: &str) -> PodSandboxConfig {
        let metadata = PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            attempt: 0,
        };
        PodSandboxConfig {
            metadata: Some(metadata),
            log_directory: format!("{}/{name}", self.logs),
            ..PodSandboxConfig::default()
        }
    }

    pub async fn sandbox_with(
        &mut self,
        config: PodSandboxConfig,
    ) -> std::result::Result<String, tonic::Status> {
        let request = RunPodSandboxRequest { config: Some(config), ..Default::default() };
        Ok(self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    pub async fn sandbox(&mut self, name: &str) -> String {
        let config = self.sandbox_config(name);
        self.sandbox_with(config).await.unwrap()
    }

    pub fn container_config(&self, name: &str, command: &[&str]) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command: command.iter().map(|c| (*c).to_owned()).collect(),
            log_path: format!("{name}/0.log"),
            ..ContainerConfig::default()
        }
    }

    pub async fn create_with(
        &mut self,
        sandbox: &str,
        config: ContainerConfig,
    ) -> std::result::Result<String, tonic::Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.into(),
            config: Some(config),
            sandbox_config: None,
        };
        Ok(self.runtime.create_container(request).await?.into_inner().container_id)
    }

    pub async fn create(&mut self, sandbox: &str, name: &str, command: &[&str]) -> String {
        let config = self.container_config(name, command);
        self.create_with(sandbox, config).await.unwrap()
    }

    pub async fn start(&mut self, id: &str) {
        self.runtime.start_container(StartContainerRequest { container_id: id.into() }).await.unwrap();
    }

    pub async fn run(&mut self, sandbox: &str, name: &str, command: &[&str]) -> String {
        let id = self.create(sandbox, name, command).await;
        self.start(&id).await;
        id
    }

    pub async fn status(&mut self, id: &str) -> ContainerStatus {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: true };
        self.runtime.container_status(request).await.unwrap().into_inner().status.unwrap()
    }

    /// Waits for a container to end.
    pub async fn ended(&mut self, id: &str) -> ContainerStatus {
        let wait = async {
            loop {
                let status = self.status(id).await;
                if status.state() == ContainerState::ContainerExited {
                    return status;
                }
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), wait)
            .await
            .expect("the container did not end")
    }

    pub async fn sandbox_status(&mut self, id: &str) -> PodSandboxStatus {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: false };
        self.runtime.pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap()
    }

    pub async fn stop_container(&mut self, id: &str, timeout: i64) {
        let request = StopContainerRequest { container_id: id.into(), timeout };
        self.runtime.stop_container(request).await.unwrap();
    }

    pub async fn remove_container(&mut self, id: &str) {
        let request = RemoveContainerRequest { container_id: id.into() };
        self.runtime.remove_container(request).await.unwrap();
    }

    pub async fn stop_sandbox(&mut self, id: &str) {
        self.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.into() }).await.unwrap();
    }

    pub async fn remove_sandbox(&mut self, id: &str) {
        self.runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.into() }).await.unwrap();
    }

    pub async fn exec(
        &mut self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> std::result::Result<ExecSyncResponse, tonic::Status> {
        let cmd = command.iter().map(|c| (*c).to_owned()).collect();
        let request = ExecSyncRequest { container_id: id.into(), cmd, timeout };
        Ok(self.runtime.exec_sync(request).await?.into_inner())
    }
}
