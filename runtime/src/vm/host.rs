//! What a sandbox takes from the host, behind one narrow trait, so that tests can stand in for the kernel.
//!
//! Called by `vm::launch`, `vm::pod` and `service`. [`LinuxHost`] is the real one. Invariant: whatever a method gives, the
//! matching one (`close_network`, `clear`) takes back, also when it was given by a predecessor of this process.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::vm::address::PodCidr;
use crate::vm::guest::Dialled;
use crate::vm::jail;
use crate::vm::keeper::Keeper;
use crate::vm::network::{self, Filter, Port};
use atoll_spec::ids::SandboxId;
use atoll_spec::units::{GuestCid, MiB};
use futures_util::future::BoxFuture;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Exit status of a VMM that was not our child: it is known to have ended, not how.
pub const STATUS_UNKNOWN: i32 = -1;

/// A running VMM.
#[derive(Clone)]
pub struct VmmProcess {
    /// Its number.
    pub pid: i32,
    exit: watch::Receiver<Option<i32>>,
    kill: Arc<dyn Fn() + Send + Sync>,
}

impl VmmProcess {
    /// From its parts: `exit` becomes `Some(status)` when it ends, `kill` ends it.
    pub fn new(pid: i32, exit: watch::Receiver<Option<i32>>, kill: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { pid, exit, kill }
    }

    /// Watches a pidfd: the end of the process is seen at once.
    pub fn watch(pid: i32, pidfd: OwnedFd) -> Result<Self> {
        let (sender, exit) = watch::channel(None);
        let pidfd = Arc::new(pidfd);
        let copy = pidfd.try_clone().map_err(Error::os("watch", &format!("process {pid}")))?;
        let watched = crate::sys::watch_fd(copy).map_err(Error::os("watch", &format!("process {pid}")))?;
        // Ends with the process.
        tokio::spawn(async move {
            let _ = watched.readable().await; // a pidfd becomes readable when its process has ended
            let status = crate::sys::wait_exit(watched.get_ref()).unwrap_or(STATUS_UNKNOWN);
            sender.send_replace(Some(status));
        });
        let kill = Arc::new(move || {
            // It may have ended meanwhile, which is what is wanted.
            let _ = rustix::process::pidfd_send_signal(pidfd.as_fd(), rustix::process::Signal::KILL);
        });
        Ok(Self { pid, exit, kill })
    }

    /// Ends it now.
    pub fn kill(&self) {
        (self.kill)();
    }

    /// Waits for its end; answers its exit status, or [`STATUS_UNKNOWN`].
    pub async fn exited(&self) -> i32 {
        let mut exit = self.exit.clone();
        exit.wait_for(Option::is_some).await.ok().and_then(|s| *s).unwrap_or(STATUS_UNKNOWN)
    }
}

/// How to start a VMM.
#[derive(Debug, Clone)]
pub struct VmmOrder {
    /// For which sandbox.
    pub sandbox: SandboxId,
    /// The guest's vsock address.
    pub cid: GuestCid,
    /// Memory of the guest; the cgroup allows some more.
    pub memory: MiB,
    /// Processors of the guest.
    pub vcpus: u8,
    /// The sandbox's directory.
    pub directory: PathBuf,
}

/// Files that a VM boots from, opened anew for each.
pub struct BootFiles {
    /// The hypervisor device.
    pub kvm: File,
    /// The guest kernel.
    pub kernel: File,
    /// The guest's initramfs.
    pub initramfs: File,
    /// The vsock back end.
    pub vhost_vsock: File,
    /// The network back end.
    pub vhost_net: File,
}

/// What the processes of a VM took from the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostUsage {
    /// Nanoseconds of CPU time.
    pub cpu_ns: u64,
    /// Bytes of memory, guest memory included.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub tasks: u64,
}

/// The host, as far as sandboxes need it.
pub trait Host: Send + Sync + 'static {
    /// Why no VM can run here, and what to do about it.
    fn check(&self) -> std::result::Result<(), String>;
    /// Turns forwarding and filtering on, with the pods that run already.
    fn install_network<'a>(&'a self, cidr: PodCidr, ports: &'a [Port]) -> BoxFuture<'a, Result<()>>;
    /// A tap, its route and its filter.
    fn open_network<'a>(&'a self, port: &'a Port) -> BoxFuture<'a, Result<OwnedFd>>;
    /// Takes back what outlives the tap.
    fn close_network<'a>(&'a self, port: &'a Port) -> BoxFuture<'a, Result<()>>;
    /// Opens what a VM boots from.
    fn boot_files(&self) -> Result<BootFiles>;
    /// Starts a VMM that listens on `listener`.
    fn spawn_vmm(&self, order: &VmmOrder, listener: &OwnedFd) -> Result<VmmProcess>;
    /// Finds the VMM that a predecessor of this process started.
    fn adopt_vmm(&self, sandbox: &SandboxId) -> Result<Option<VmmProcess>>;
    /// Kills what is left of a sandbox's processes and removes their cgroup.
    fn clear<'a>(&'a self, sandbox: &'a SandboxId) -> BoxFuture<'a, Result<()>>;
    /// What the sandbox's processes took.
    fn usage(&self, sandbox: &SandboxId) -> HostUsage;
    /// Starts listening for guests.
    fn listen(&self) -> mpsc::Receiver<Dialled>;
}

/// Linux with KVM.
pub struct LinuxHost {
    config: Config,
    filter: Filter,
    keeper: Mutex<Option<Keeper>>,
}

impl LinuxHost {
    /// Takes paths from the settings.
    pub fn new(config: &Config) -> Self {
        Self { config: config.clone(), filter: Filter::new(&config.nft), keeper: Mutex::default() }
    }

    /// Holds a virtual machine from now on ([`Keeper`]). Without it pods run all the same.
    pub fn hold_machine(&self) {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        if keeper.is_none() {
            match Keeper::new(&self.config.kvm) {
                Ok(held) => *keeper = Some(held),
                Err(error) => tracing::warn!("{error}"),
            }
        }
    }
}

fn open(path: &Path, write: bool) -> Result<File> {
    File::options().read(true).write(write).open(path).map_err(Error::io("open", path))
}

impl Host for LinuxHost {
    fn check(&self) -> std::result::Result<(), String> {
        let remedy = |path: &Path, remedy: &str| format!("cannot open {}: {remedy}", path.display());
        let c = &self.config;
        open(&c.kvm, true).map_err(|e| {
            format!("{e}: enable virtualisation (VT-x or AMD-V) in the firmware, or nested virtualisation in the hypervisor")
        })?;
        open(&c.vhost_vsock, true).map_err(|_| remedy(&c.vhost_vsock, "load the module vhost_vsock"))?;
        open(&c.vhost_net, true).map_err(|_| remedy(&c.vhost_net, "load the module vhost_net"))?;
        open(&c.tun, true).map_err(|_| remedy(&c.tun, "load the module tun"))?;
        for path in [&c.vmm, &c.guest_kernel, &c.guest_initramfs] {
            open(path, false).map_err(|_| remedy(path, "the system image lacks it: install a whole one"))?;
        }
        Ok(())
    }

    fn install_network<'a>(&'a self, cidr: PodCidr, ports: &'a [Port]) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.filter.install(cidr, ports))
    }

    fn open_network<'a>(&'a self, port: &'a Port) -> BoxFuture<'a, Result<OwnedFd>> {
        Box::pin(async move {
            let (tap, ()) =
                tokio::try_join!(network::open_port(&self.config.tun, port), self.filter.allow(port))?;
            Ok(tap)
        })
    }

    fn close_network<'a>(&'a self, port: &'a Port) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.filter.forget(port))
    }

    fn boot_files(&self) -> Result<BootFiles> {
        let c = &self.config;
        // For a host that could not run virtual machines when this process was started.
        self.hold_machine();
        Ok(BootFiles {
            kvm: open(&c.kvm, true)?,
            kernel: open(&c.guest_kernel, false)?,
            initramfs: open(&c.guest_initramfs, false)?,
            vhost_vsock: open(&c.vhost_vsock, true)?,
            vhost_net: open(&c.vhost_net, true)?,
        })
    }

    fn spawn_vmm(&self, order: &VmmOrder, listener: &OwnedFd) -> Result<VmmProcess> {
        jail::spawn(&self.config, order, listener)
    }

    fn adopt_vmm(&self, sandbox: &SandboxId) -> Result<Option<VmmProcess>> {
        jail::adopt(&self.config.cgroup, sandbox)
    }

    fn clear<'a>(&'a self, sandbox: &'a SandboxId) -> BoxFuture<'a, Result<()>> {
        Box::pin(jail::clear(&self.config.cgroup, sandbox))
    }

    fn usage(&self, sandbox: &SandboxId) -> HostUsage {
        jail::usage(&self.config.cgroup, sandbox)
    }

    fn listen(&self) -> mpsc::Receiver<Dialled> {
        let (sender, receiver) = mpsc::channel(16);
        // Ends when the receiver is dropped.
        tokio::spawn(accept_guests(sender));
        receiver
    }
}

/// Accepts vsock connections; the kernel says from which guest each is. Tries again while the host has no vsock.
async fn accept_guests(sender: mpsc::Sender<Dialled>) {
    use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
    let address = VsockAddr::new(VMADDR_CID_ANY, atoll_spec::guest::HOST_PORT);
    let mut told = false;
    while !sender.is_closed() {
        match VsockListener::bind(address) {
            Ok(listener) => loop {
                let (stream, peer) = match listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a guest's connection");
                        break;
                    }
                };
                let Some(cid) = GuestCid::new(peer.cid()) else { continue };
                if sender.send((cid, Box::new(stream))).await.is_err() {
                    return;
                }
            },
            Err(error) if !told => {
                tracing::error!(%error, "cannot listen for guests on vsock: load the module vhost_vsock");
                told = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
