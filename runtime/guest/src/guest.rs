//! The guest's state and its calls: one method for each thing the runtime may ask for.
//!
//! Calls run on threads of their own. Each container guards its own state; what is here is set once by
//! [`Guest::configure`] or is guarded by its module.

use crate::cgroup::{self, Cgroup};
use crate::container::{Container, Containers, Parts, is_file, mounts_at};
use crate::error::{Context as _, Failure, Result};
use crate::events::Outbox;
use crate::exec::Execs;
use crate::layers::Layers;
use crate::mount::Detached;
use crate::options::Options;
use crate::process::{PidNamespace, spawn};
use crate::reap::Processes;
use crate::rootfs::Root;
use crate::stage::plan::{PlannedMount, Source, Tree};
use crate::stdio::{Counts, Stream};
use crate::transport::Connection;
use crate::volumes::{self, Volumes};
use crate::{network, power, stats, sys};
use atoll_spec::guest::{Call, ContainerSpec, GuestConfig, GuestError, Hello, Mount, MountSource, Reply};
use rustix::mount::MountAttrFlags;
use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Longest silence while a tree is sent.
const TREE_SILENCE: Duration = Duration::from_secs(30);

/// What the users of other runtimes are used to: ping and low ports without capabilities, in a pod's own network.
const DEFAULT_SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ping_group_range", "0 2147483647"), ("net.ipv4.ip_unprivileged_port_start", "0")];

/// What [`Call::Configure`] brought.
struct Pod {
    config: GuestConfig,
    volumes: Volumes,
    scratch: PathBuf,
    /// First process of the PID namespace that containers share.
    shared: Option<Arc<OwnedFd>>,
}

/// The guest.
pub struct Guest {
    /// Places.
    pub options: Options,
    /// What is to be sent.
    pub outbox: Arc<Outbox>,
    /// Processes that are waited for.
    pub processes: Processes,
    /// Containers.
    pub containers: Containers,
    execs: Arc<Execs>,
    layers: Layers,
    pod: OnceLock<Pod>,
    configuring: Mutex<()>,
}

fn make_directory(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).during(|| format!("make directory {}", path.display()))
}

impl Guest {
    /// Before [`Call::Configure`].
    pub fn new(options: Options) -> Result<Self> {
        make_directory(&options.run)?;
        let layers = Layers::new(options.layers.clone(), options.run.join("layers"));
        Ok(Self {
            options,
            outbox: Arc::default(),
            processes: Processes::default(),
            containers: Containers::default(),
            execs: Arc::default(),
            layers,
            pod: OnceLock::new(),
            configuring: Mutex::default(),
        })
    }

    /// Does what the runtime asks.
    pub fn call(self: &Arc<Self>, call: Call) -> std::result::Result<Reply, GuestError> {
        self.perform(call).map_err(GuestError::from)
    }

    fn perform(self: &Arc<Self>, call: Call) -> Result<Reply> {
        let done = |()| Reply::Done;
        match call {
            Call::Configure(config) => self.configure(*config).map(done),
            Call::CreateContainer(spec) => self.create(*spec).map(done),
            Call::StartContainer { container } => self.start(&container),
            Call::SignalContainer { container, signal, all } => {
                self.containers.get(&container)?.signal(signal, all).map(done)
            }
            Call::RemoveContainer { container } => {
                self.containers.get(&container)?.remove()?;
                self.containers.forget(&container);
                Ok(Reply::Done)
            }
            Call::OpenStdio { container, stream } => {
                let container = self.containers.get(&container)?;
                container.connect(self.dial(stream)?).map(done)
            }
            Call::AckOutput { container, stream, stdout, stderr } => {
                self.containers.get(&container)?.acknowledge(stream, Counts { stdout, stderr });
                Ok(Reply::Done)
            }
            Call::UpdateLimits { container, limits } => {
                cgroup::check(&limits)?;
                self.containers.get(&container)?.cgroup.limit(&limits).map(done)
            }
            Call::Exec(spec) => {
                let container = self.containers.get(&spec.container)?;
                let stream = self.dial(spec.stream)?;
                let pid = self.execs.start(*spec, &container, stream, &self.processes)?;
                Ok(Reply::Started { pid })
            }
            Call::KillExec { exec } => self.execs.kill(&exec).map(done),
            Call::PublishTree { tree, stream } => self.publish(&tree, stream).map(done),
            Call::ReadFile { container, target } => {
                let container = self.containers.get(&container)?;
                Ok(Reply::File { base64: volumes::read_file(container.file(&target)?)? })
            }
            Call::Stats => {
                let volumes = self.pod.get().map(|pod| &pod.volumes);
                let stats = stats::collect(&self.containers, volumes, &self.options.cgroup);
                Ok(Reply::Stats(Box::new(stats)))
            }
            Call::List => {
                let containers = self.containers.all().iter().map(|container| container.describe()).collect();
                Ok(Reply::Containers { containers })
            }
            Call::AckEvents { sequence } => {
                self.outbox.acknowledge(sequence);
                Ok(Reply::Done)
            }
            Call::PowerOff => Ok(self.power_off()),
        }
    }

    fn pod(&self) -> Result<&Pod> {
        self.pod
            .get()
            .ok_or_else(|| Failure::wrong_state("the guest was not configured yet: call configure first"))
    }

    fn dial(&self, number: u64) -> Result<Stream> {
        let connection = self.options.peer.dial(&Hello::Stream { stream: number });
        let connection = connection.during(|| format!("open stream {number} to the runtime"))?;
        Ok(Stream { connection, number })
    }

    fn configure(&self, config: GuestConfig) -> Result<()> {
        let _alone = self.configuring.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pod) = self.pod.get() {
            // The clock differs at each repetition.
            let same =
                GuestConfig { unix_ns: 0, ..pod.config.clone() } == GuestConfig { unix_ns: 0, ..config };
            return if same {
                Ok(())
            } else {
                Err(Failure::wrong_state("the guest was configured differently"))
            };
        }
        if self.options.machine {
            self.configure_machine(&config)?;
        }
        let scratch = self.mount_scratch(config.scratch_disk)?;
        let volumes = Volumes::new(&self.options.run, &scratch)?;
        self.write_etc(&config)?;
        let shared = config.share_process_namespace.then(|| self.start_pause()).transpose()?;
        // Nobody else sets it: `configuring` is held.
        let _ = self.pod.set(Pod { config, volumes, scratch, shared });
        Ok(())
    }

    fn configure_machine(&self, config: &GuestConfig) -> Result<()> {
        if config.unix_ns > 0 {
            sys::set_clock(config.unix_ns).during(|| "set the clock".into())?;
        }
        rustix::system::sethostname(config.hostname.as_bytes()).during(|| "set the host name".into())?;
        for (name, value) in DEFAULT_SYSCTLS {
            // A convenience: a kernel without it loses nothing else.
            let _ = std::fs::write(sysctl_path(name)?, value);
        }
        for (name, value) in &config.sysctls {
            let path = sysctl_path(name)?;
            std::fs::write(&path, value).during(|| format!("set sysctl {name} to '{value}'"))?;
        }
        config.network.as_ref().map_or(Ok(()), network::configure)
    }

    /// Where containers write: the scratch disk, or memory.
    fn mount_scratch(&self, disk: bool) -> Result<PathBuf> {
        let directory = self.options.run.join("scratch");
        make_directory(&directory)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOATIME;
        let scratch = if disk {
            let source = self.options.scratch.to_string_lossy();
            // What is on it dies with the VM: it need not survive a crash of the host, so no barriers.
            let options = [("source", source.as_ref()), ("nobarrier", ""), ("discard", "")];
            Detached::filesystem("ext4", &options, attributes)?
        } else {
            Detached::filesystem("tmpfs", &[("mode", "0755")], attributes)?
        };
        scratch.attach_at(&directory)?;
        Ok(directory)
    }

    fn write_etc(&self, config: &GuestConfig) -> Result<()> {
        let (etc, shm) = (self.options.run.join("etc"), self.options.run.join("shm"));
        for directory in [&etc, &shm, &self.options.run.join("empty")] {
            make_directory(directory)?;
        }
        let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
        if let Some(network) = &config.network {
            hosts.push_str(&format!("{}\t{}\n", network.address, config.hostname));
        }
        let files = [
            ("resolv.conf", config.resolv_conf.clone()),
            ("hostname", format!("{}\n", config.hostname)),
            ("hosts", hosts),
        ];
        for (name, content) in files {
            let path = etc.join(name);
            std::fs::write(&path, content).during(|| format!("write {}", path.display()))?;
        }
        let size = config.shm_bytes.to_string();
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        Detached::filesystem("tmpfs", &[("mode", "1777"), ("size", &size)], attributes)?.attach_at(&shm)
    }

    fn start_pause(&self) -> Result<Arc<OwnedFd>> {
        let empty = self.options.run.join("empty");
        let pid = spawn(&["pause", &empty.to_string_lossy()], PidNamespace::New, None)?;
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
        pidfd.during(|| "hold on to the shared PID namespace".into()).map(Arc::new)
    }

    fn create(&self, spec: ContainerSpec) -> Result<()> {
        let pod = self.pod()?;
        check(&spec)?;
        let name = spec.container.clone();
        self.containers.add(&name, || {
            let directory = self.options.run.join("containers").join(name.as_str());
            let writable = pod.scratch.join("containers").join(name.as_str());
            let layers = self.layers.mount_all(&spec.layers)?;
            let files = write_files(&spec, &directory)?;
            let cgroup = Cgroup::create(&self.options.cgroup, name.as_str(), &spec.limits)?;
            let root = match Root::stack(&layers, &directory.join("root"), &writable) {
                Ok(root) => root,
                Err(failure) => {
                    // The first failure is the one to tell.
                    let _ = cgroup.remove(Duration::ZERO);
                    return Err(failure);
                }
            };
            Ok(Container::new(spec, Parts { root, cgroup, directory, files }))
        })
    }

    fn start(self: &Arc<Self>, name: &atoll_spec::ids::ContainerId) -> Result<Reply> {
        let pod = self.pod()?;
        let container = self.containers.get(name)?;
        let tree = self.plan_tree(pod, &container)?;
        let stream = self.dial(container.spec.stdio_stream)?;
        let pid = container.start(tree, pod.shared.clone(), stream, &self.processes, &self.outbox)?;
        Ok(Reply::Started { pid })
    }

    fn plan_tree(&self, pod: &Pod, container: &Container) -> Result<Tree> {
        let spec = &container.spec;
        let etc = ["resolv.conf", "hostname", "hosts"].into_iter().filter_map(|name| {
            let target = format!("/etc/{name}");
            let source = Source::File(self.options.run.join("etc").join(name));
            let read_only = spec.read_only_root;
            (!mounts_at(spec, &target)).then_some(PlannedMount { target, source, read_only })
        });
        let mounts = spec.mounts.iter().map(|mount| self.plan_mount(pod, container, mount));
        Ok(Tree {
            root: container.root().to_owned(),
            read_only_root: spec.read_only_root,
            privileged: spec.privileged,
            shm: self.options.run.join("shm"),
            etc: etc.collect(),
            mounts: mounts.collect::<Result<_>>()?,
            masked_paths: spec.masked_paths.clone(),
            read_only_paths: spec.read_only_paths.clone(),
        })
    }

    fn plan_mount(&self, pod: &Pod, container: &Container, mount: &Mount) -> Result<PlannedMount> {
        let mut read_only = mount.read_only;
        let source = match &mount.source {
            MountSource::Tree { tree, sub_path } => {
                read_only = true;
                Source::Inside { base: pod.volumes.tree(tree)?, sub_path: sub_path.clone(), make: false }
            }
            MountSource::Scratch { volume, sub_path, memory, size_bytes } => {
                let base = pod.volumes.scratch(volume, *memory, *size_bytes)?;
                Source::Inside { base, sub_path: sub_path.clone(), make: true }
            }
            MountSource::File { .. } => Source::File(container.file(&mount.target)?.to_owned()),
            MountSource::Tmpfs { size_bytes } => Source::Tmpfs(*size_bytes),
            MountSource::Image { layers } => {
                read_only = true;
                Source::Layers(self.layers.mount_all(layers)?)
            }
        };
        Ok(PlannedMount { target: mount.target.clone(), source, read_only })
    }

    fn publish(&self, tree: &str, stream: u64) -> Result<()> {
        let pod = self.pod()?;
        let Stream { connection, .. } = self.dial(stream)?;
        connection.set_read_timeout(Some(TREE_SILENCE)).during(|| "set a deadline for the tree".into())?;
        let mut archive = std::io::BufReader::with_capacity(64 * 1024, Patient(connection));
        pod.volumes.publish(tree, &mut archive)?;
        // To the end, so that the sender is not cut off. What follows the archive is padding.
        std::io::copy(&mut archive.take(1 << 20), &mut std::io::sink())
            .map(drop)
            .during(|| "read the tree's end".into())
    }

    /// The answer goes out first, then the machine is reset.
    fn power_off(self: &Arc<Self>) -> Reply {
        power::stop_all(self);
        let machine = self.options.machine;
        let outbox = Arc::clone(&self.outbox);
        let reset = std::thread::Builder::new().name("reset".into()).spawn(move || {
            outbox.wait_until_answered(Duration::from_millis(200));
            power::reset(machine)
        });
        match reset {
            Ok(_) => Reply::Done,
            Err(_) => power::reset(machine),
        }
    }
}

/// Says what it means when a read runs into the connection's deadline.
struct Patient(Connection);

impl std::io::Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer).map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock => {
                std::io::Error::other(format!("the runtime sent nothing for {} s", TREE_SILENCE.as_secs()))
            }
            _ => error,
        })
    }
}

fn check(spec: &ContainerSpec) -> Result<()> {
    cgroup::check(&spec.limits)?;
    if spec.process.args.is_empty() {
        return Err(Failure::invalid("the container has no command"));
    }
    let absolute = |path: &str| path.starts_with('/');
    if let Some(mount) = spec.mounts.iter().find(|mount| !absolute(&mount.target)) {
        return Err(Failure::invalid(format!("mount target '{}' is not absolute", mount.target)));
    }
    Ok(())
}

/// Writes the files that a spec brings; they live in memory.
fn write_files(spec: &ContainerSpec, directory: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let files = directory.join("files");
    make_directory(&files)?;
    let mut paths = BTreeMap::new();
    for (number, mount) in spec.mounts.iter().enumerate().filter(|(_, mount)| is_file(&mount.source)) {
        if let MountSource::File { base64, mode } = &mount.source {
            let path = files.join(number.to_string());
            volumes::write_file(&path, base64, *mode)?;
            paths.insert(mount.target.clone(), path);
        }
    }
    Ok(paths)
}

/// `net.ipv4.ip_forward` is `/proc/sys/net/ipv4/ip_forward`; a slash in a name stands for itself.
fn sysctl_path(name: &str) -> Result<PathBuf> {
    let ok = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/');
    let parts: Vec<&str> = name.split(['.', '/']).collect();
    if !name.bytes().all(ok) || parts.iter().any(|part| part.is_empty()) {
        return Err(Failure::invalid(format!("'{name}' is not a sysctl")));
    }
    let separator = if name.contains('/') { '/' } else { '.' };
    Ok(Path::new("/proc/sys").join(name.replace(separator, "/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_stay_below_proc_sys() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward").unwrap(), Path::new("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/x").unwrap(),
            Path::new("/proc/sys/net/ipv4/conf/eth0.1/x")
        );
        for bad in ["", "..", "a..b", "/etc/x", "a b", "a/../b"] {
            assert!(sysctl_path(bad).is_err(), "{bad:?}");
        }
    }
}
