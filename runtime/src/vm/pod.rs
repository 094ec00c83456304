//! A running pod VM: its guest, its VMM, its layer window.
//!
//! Made by `vm::launch` and by `service::recover`, shared by the jobs of the service. Invariant: the window and the
//! VMM's mappings agree; a layer is in the window only after the VMM has mapped it.

use crate::error::{Error, Result};
use crate::images::LayerFile;
use crate::vm::client::VmmClient;
use crate::vm::guest::GuestLink;
use crate::vm::host::{Host, HostUsage, VmmProcess};
use crate::vm::window::Window;
use atoll_spec::guest::{Call, GuestStats, Layer, Reply};
use atoll_spec::ids::SandboxId;
use atoll_spec::units::GuestCid;
use atoll_spec::vm::{VmRequest, VmStats};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Deadline of a request to the VMM.
const VMM_DEADLINE: Duration = Duration::from_secs(20);
/// Deadline of a call that the guest answers at once.
pub const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// How long a guest may take to power off before it is killed.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(5);

/// How long the phases of a launch took.
#[derive(Debug, Clone, Copy)]
pub struct LaunchTimes {
    /// VMM process, network and scratch disk.
    pub claim: Duration,
    /// The VMM builds the machine and enters its jail.
    pub jail: Duration,
    /// The guest boots, until its first process calls.
    pub guest: Duration,
    /// The guest is told who it is.
    pub configure: Duration,
}

/// A running pod VM.
pub struct PodVm {
    /// Whose.
    pub sandbox: SandboxId,
    /// Its vsock address.
    pub cid: GuestCid,
    /// Its guest.
    pub link: Arc<GuestLink>,
    /// Its VMM process.
    pub process: VmmProcess,
    /// How long its launch took; unknown for one that a predecessor of this process launched.
    pub launched: Option<LaunchTimes>,
    vmm: VmmClient,
    host: Arc<dyn Host>,
    window: Mutex<Window>,
}

impl PodVm {
    /// From its parts.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one part, and its two callers have them one by one"
    )]
    pub fn new(
        sandbox: SandboxId,
        cid: GuestCid,
        link: Arc<GuestLink>,
        vmm: VmmClient,
        process: VmmProcess,
        host: Arc<dyn Host>,
        window: Window,
        launched: Option<LaunchTimes>,
    ) -> Arc<Self> {
        Arc::new(Self { sandbox, cid, link, process, launched, vmm, host, window: Mutex::new(window) })
    }

    /// Brings layers into the window, the lowest first.
    pub async fn map(&self, layers: &[LayerFile]) -> Result<Vec<Layer>> {
        let mut window = self.window.lock().await;
        let mut mapped = Vec::with_capacity(layers.len());
        for file in layers {
            let digest = file.diff_id.to_string();
            let placed = window.place(&digest, file.length).map_err(Error::Invalid)?;
            if placed.new
                && let Err(error) = self.map_one(file, placed.layer).await
            {
                window.withdraw(&digest);
                return Err(error);
            }
            mapped.push(placed.layer);
        }
        Ok(mapped)
    }

    async fn map_one(&self, file: &LayerFile, layer: Layer) -> Result<()> {
        let open = File::open(&file.path).map_err(Error::io("open layer", &file.path))?;
        let request = VmRequest::MapLayer { offset: layer.offset, length: layer.length };
        self.vmm.order(&request, &[open.as_fd()], VMM_DEADLINE).await
    }

    /// The window as it is now, for the record.
    pub async fn extents(&self) -> BTreeMap<String, Layer> {
        self.window.lock().await.extents().clone()
    }

    /// Counters of the guest.
    pub async fn guest_stats(&self) -> Result<GuestStats> {
        match self.link.call(Call::Stats, CALL_DEADLINE).await? {
            Reply::Stats(stats) => Ok(*stats),
            _ => Err(Error::Lost { sandbox: self.sandbox.to_string(), why: "unexpected answer".to_owned() }),
        }
    }

    /// Counters of the VMM.
    pub async fn vmm_stats(&self) -> Result<VmStats> {
        self.vmm.stats(VMM_DEADLINE).await
    }

    /// Counters of the host's cgroup.
    pub fn host_usage(&self) -> HostUsage {
        self.host.usage(&self.sandbox)
    }

    /// Ends the VM: asks the guest to power off when `gently`, then kills. Answers when the process is gone.
    pub async fn stop(&self, gently: bool) {
        if gently {
            // What the guest answers does not matter: it is killed when it does not end.
            let asked = async {
                let _ = self.link.call(Call::PowerOff, POWER_OFF_DEADLINE).await;
                self.process.exited().await
            };
            if tokio::time::timeout(POWER_OFF_DEADLINE, asked).await.is_ok() {
                return;
            }
        }
        self.process.kill();
        if tokio::time::timeout(POWER_OFF_DEADLINE, self.process.exited()).await.is_err() {
            tracing::error!(sandbox = %self.sandbox, pid = self.process.pid, "the VMM does not end after SIGKILL");
        }
    }
}
