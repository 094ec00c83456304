//! From a plan to a running guest, in typed phases that each own their failure path.
//!
//! ```text
//! Plan ──claim──► Prepared ──boot──► Jailed ──greet──► PodVm
//!                 VMM process,        VMM in its jail,   guest configured
//!                 tap, scratch disk,  guest kernel runs
//!                 boot files: all at once
//! ```
//!
//! Called by the service's launch job. Invariant: when a phase fails, everything that earlier phases took from the host
//! has been given back before the error is answered. What was claimed is found by the sandbox's id alone (cgroup, filter
//! element, directory), so [`unwind`] also cleans up after a predecessor that was killed half-way.

use crate::error::{Error, Result, within};
use crate::vm::client::{self, VmmClient};
use crate::vm::guest::{Door, GuestLink, GuestNews};
use crate::vm::host::{BootFiles, Host, VmmOrder, VmmProcess};
use crate::vm::network::Port;
use crate::vm::pod::{LaunchTimes, PodVm};
use crate::vm::scratch::Scratch;
use crate::vm::window::Window;
use atoll_spec::guest::{Call, GuestConfig};
use atoll_spec::ids::SandboxId;
use atoll_spec::units::{GuestCid, MiB};
use atoll_spec::vm::{BootFd, VmRequest, VmSpec};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};

/// Time for the VMM to build the machine and enter its jail.
const BOOT_DEADLINE: Duration = Duration::from_secs(30);
/// By how much the deadline of the whole is later than the guest's own: whose guest says nothing reads just that.
const LATER: Duration = Duration::from_secs(2);

/// What launching needs beside the plan; one for all sandboxes.
pub struct Launcher {
    /// The host.
    pub host: Arc<dyn Host>,
    /// Where guests dial in.
    pub door: Door,
    /// Scratch disks.
    pub scratch: Scratch,
    /// Where the links report.
    pub news: mpsc::Sender<GuestNews>,
}

/// What is to run.
pub struct Plan {
    /// Whose VM.
    pub sandbox: SandboxId,
    /// The sandbox's directory; exists.
    pub directory: PathBuf,
    /// The VMM's control socket.
    pub socket: PathBuf,
    /// The guest's vsock address.
    pub cid: GuestCid,
    /// Its network.
    pub port: Port,
    /// User and group of the VMM.
    pub uid: u32,
    /// Memory.
    pub memory: MiB,
    /// Processors.
    pub vcpus: u8,
    /// What its containers may write altogether, in bytes.
    pub storage_limit: Option<u64>,
    /// What the guest is told.
    pub guest: GuestConfig,
    /// Keep the serial console.
    pub console: bool,
    /// For the whole launch.
    pub deadline: Duration,
    /// Becomes true when nobody wants it any more.
    pub cancelled: watch::Receiver<bool>,
}

/// Launches a sandbox's VM.
pub async fn launch(launcher: &Arc<Launcher>, plan: Plan) -> Result<Arc<PodVm>> {
    let (sandbox, deadline) = (plan.sandbox.clone(), plan.deadline);
    let mut cancelled = plan.cancelled.clone();
    let remains = Remains::of(&plan);
    let phases = async {
        let prepared = Prepared::claim(launcher, plan).await?;
        let jailed = prepared.boot().await?;
        jailed.greet().await
    };
    let what = || format!("launching the virtual machine of sandbox {sandbox}");
    // Dropping the phases half-way is what the unwinding below is for.
    let result = tokio::select! {
        result = within(deadline + LATER, what, phases) => result.flatten(),
        Ok(_) = cancelled.wait_for(|c| *c) => Err(Error::State(format!("sandbox {sandbox} was stopped during its launch"))),
    };
    match result {
        Ok(pod) => Ok(pod),
        Err(error) => {
            let error = explain(error, &remains);
            unwind(launcher.as_ref(), &remains).await;
            Err(error)
        }
    }
}

/// What a sandbox may have left on the host.
#[derive(Debug, Clone)]
pub struct Remains {
    /// Whose.
    pub sandbox: SandboxId,
    /// Its vsock address.
    pub cid: GuestCid,
    /// Its network.
    pub port: Port,
    /// Its directory.
    pub directory: PathBuf,
    /// Its control socket.
    pub socket: PathBuf,
}

impl Remains {
    fn of(plan: &Plan) -> Self {
        Self {
            sandbox: plan.sandbox.clone(),
            cid: plan.cid,
            port: plan.port.clone(),
            directory: plan.directory.clone(),
            socket: plan.socket.clone(),
        }
    }
}

/// Gives back everything a sandbox's VM took from the host; what is not there is skipped.
pub async fn unwind(launcher: &Launcher, remains: &Remains) {
    let cleared = launcher.host.clear(&remains.sandbox);
    let closed = launcher.host.close_network(&remains.port);
    let (cleared, closed) = tokio::join!(cleared, closed);
    for result in [cleared, closed] {
        if let Err(error) = result {
            tracing::error!(sandbox = %remains.sandbox, %error, "could not clean up after a virtual machine");
        }
    }
    launcher.door.forget(remains.cid);
    for file in [remains.directory.join("scratch.img"), remains.socket.clone()] {
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::error!(path = %file.display(), %error, "cannot remove a file of a virtual machine");
            }
            _ => {}
        }
    }
}

/// Adds the VMM's last words to an error of a launch.
fn explain(error: Error, remains: &Remains) -> Error {
    let tail = |name: &str| {
        let text = std::fs::read(remains.directory.join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().rev().take(3).map(str::trim).filter(|l| !l.is_empty()).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    };
    let words: Vec<String> =
        ["vmm.log", "console.log"].into_iter().map(tail).filter(|t| !t.is_empty()).collect();
    if words.is_empty() {
        return error;
    }
    Error::Step {
        operation: "launch",
        object: format!("sandbox {}", remains.sandbox),
        why: format!("{error} (last words: {})", words.join("; ")),
    }
}

/// Everything claimed; nothing runs but an idle VMM.
struct Prepared {
    launcher: Arc<Launcher>,
    plan: Plan,
    link: Arc<GuestLink>,
    process: VmmProcess,
    tap: OwnedFd,
    scratch: File,
    files: BootFiles,
    started: Instant,
}

impl Prepared {
    /// VMM, network and scratch disk at the same time.
    async fn claim(launcher: &Arc<Launcher>, plan: Plan) -> Result<Self> {
        let started = Instant::now();
        let link = GuestLink::new(plan.sandbox.clone(), launcher.news.clone());
        launcher.door.admit(plan.cid, link.clone());
        let spawned = {
            let (launcher, socket) = (launcher.clone(), plan.socket.clone());
            let order = VmmOrder {
                sandbox: plan.sandbox.clone(),
                cid: plan.cid,
                memory: plan.memory,
                vcpus: plan.vcpus,
                directory: plan.directory.clone(),
            };
            async move {
                let listener = client::listen(&socket)?;
                launcher.host.spawn_vmm(&order, &listener)
            }
        };
        let scratch_path = plan.directory.join("scratch.img");
        let (process, tap, scratch) = tokio::try_join!(
            spawned,
            launcher.host.open_network(&plan.port),
            launcher.scratch.copy_to(&scratch_path, plan.storage_limit),
        )?;
        let files = launcher.host.boot_files()?;
        Ok(Self { launcher: launcher.clone(), plan, link, process, tap, scratch, files, started })
    }

    /// Hands everything to the VMM, which enters its jail and starts the guest.
    async fn boot(self) -> Result<Jailed> {
        let claimed = self.started.elapsed();
        let vmm = VmmClient::connect(&self.plan.sandbox, &self.plan.socket)?;
        let console = if self.plan.console { Some(open_console(&self.plan)?) } else { None };
        let mut kinds = vec![
            (BootFd::Kvm, self.files.kvm.as_fd()),
            (BootFd::Kernel, self.files.kernel.as_fd()),
            (BootFd::Initramfs, self.files.initramfs.as_fd()),
            (BootFd::VhostVsock, self.files.vhost_vsock.as_fd()),
            (BootFd::VhostNet, self.files.vhost_net.as_fd()),
            (BootFd::Tap, self.tap.as_fd()),
            (BootFd::Scratch, self.scratch.as_fd()),
        ];
        if let Some(console) = &console {
            kinds.push((BootFd::Console, console.as_fd()));
        }
        let (kinds, fds): (Vec<BootFd>, Vec<BorrowedFd<'_>>) = kinds.into_iter().unzip();
        let spec = VmSpec {
            sandbox: self.plan.sandbox.clone(),
            vcpus: self.plan.vcpus,
            memory: self.plan.memory,
            cid: self.plan.cid,
            mac: Some(self.plan.port.mac),
            cmdline: cmdline(self.plan.console),
            fds: kinds,
            uid: Some(self.plan.uid),
        };
        vmm.order(&VmRequest::Boot(Box::new(spec)), &fds, BOOT_DEADLINE).await?;
        let booted = self.started.elapsed();
        Ok(Jailed { prepared: self, vmm, claimed, booted })
    }
}

fn open_console(plan: &Plan) -> Result<File> {
    let path = plan.directory.join("console.log");
    File::options().create(true).append(true).open(&path).map_err(Error::io("open", &path))
}

/// The guest kernel's command line; the VMM adds the devices.
pub fn cmdline(console: bool) -> String {
    let output = if console { "console=ttyS0" } else { "quiet 8250.nr_uarts=0" };
    format!(
        "{output} reboot=k panic=1 swiotlb=noforce no_timer_check rcupdate.rcu_expedited=1 random.trust_cpu=on"
    )
}

/// The VMM is in its jail and the guest's kernel runs.
struct Jailed {
    prepared: Prepared,
    vmm: VmmClient,
    claimed: Duration,
    booted: Duration,
}

impl Jailed {
    /// Waits for the guest and tells it who it is.
    async fn greet(self) -> Result<Arc<PodVm>> {
        let Self { prepared, vmm, claimed, booted } = self;
        let Prepared { launcher, plan, link, process, started, .. } = prepared;
        let silent = |error: Error, what: &str| match error {
            Error::Deadline { .. } => Error::Step {
                operation: "boot",
                object: format!("the guest of sandbox {}", plan.sandbox),
                why: format!("it {what} within {} s", plan.deadline.as_secs()),
            },
            other => other,
        };
        let left = || plan.deadline.saturating_sub(started.elapsed());
        let hello = async {
            link.connected(left()).await.map_err(|e| silent(e, "did not call the runtime"))?;
            let hello = started.elapsed();
            let mut config = Box::new(plan.guest.clone());
            config.unix_ns = unix_ns();
            let configured = link.call(Call::Configure(config), left()).await;
            configured.map_err(|e| silent(e, "called the runtime and did not answer it"))?;
            Ok::<Duration, Error>(hello)
        };
        // Whichever is first decides; a cancelled call leaves no trace but an answer nobody waits for.
        let hello = tokio::select! {
            result = hello => result?,
            status = process.exited() => {
                return Err(Error::Step {
                    operation: "boot",
                    object: format!("the guest of sandbox {}", plan.sandbox),
                    why: format!("the VMM ended with status {status}"),
                });
            }
        };
        let times = LaunchTimes {
            claim: claimed,
            jail: booted - claimed,
            guest: hello - booted,
            configure: started.elapsed() - hello,
        };
        tracing::info!(
            sandbox = %plan.sandbox,
            address = %plan.port.address,
            claim_ms = times.claim.as_millis() as u64,
            jail_ms = times.jail.as_millis() as u64,
            guest_ms = times.guest.as_millis() as u64,
            configure_ms = times.configure.as_millis() as u64,
            "virtual machine is up"
        );
        let (host, window) = (launcher.host.clone(), Window::default());
        Ok(PodVm::new(plan.sandbox, plan.cid, link, vmm, process, host, window, Some(times)))
    }
}

/// The wall clock, nanoseconds since 1970.
pub fn unix_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_never_has_ip_and_always_a_way_out() {
        for console in [true, false] {
            let line = cmdline(console);
            assert!(!line.contains("ip=") && line.contains("panic=1"), "{line}");
            assert_eq!(line.contains("console="), console);
        }
    }
}
