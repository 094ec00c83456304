//! One microVM without a pod: the guest's kernel and a first process that does nothing but switch off. Once under our
//! VMM, once under QEMU's `microvm` machine, with the same kernel and the same KVM, one after the other.

use super::clock::ms;
use crate::figure::{Figure, Unit, median};
use crate::reference;
use anyhow::{Context, ensure};
use atoll_image::cpio::Archive;
use atoll_runtime::config::Config;
use atoll_runtime::vm::client::{self, VmmClient};
use atoll_runtime::vm::host::{Host, LinuxHost, VmmOrder};
use atoll_runtime::vm::launch::cmdline;
use atoll_spec::ids::SandboxId;
use atoll_spec::units::{GuestCid, MiB};
use atoll_spec::vm::{BootFd, VmRequest, VmSpec, exit};
use clap::Parser;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Memory of the machine.
const MEMORY: MiB = MiB(128);
/// Longest time for anything.
const DEADLINE: Duration = Duration::from_secs(120);
/// Where sockets, logs and the initramfs go.
const DIRECTORY: &str = "/run/atoll-bench";
/// The first process, which is also what pods run.
const FIRST: &str = "/usr/bin/atoll-bench-pod";
#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    config: Config,
}

/// What both machines boot.
struct Bench {
    config: Config,
    initramfs: PathBuf,
}

/// Times of our VMM, in milliseconds from before its process was made.
struct Run {
    booted: f64,
    ended: f64,
}

/// Measures both, each so many times.
///
/// # Errors
/// When one of them does not boot.
pub async fn measure(samples: usize) -> anyhow::Result<Vec<Figure>> {
    std::fs::create_dir_all(DIRECTORY).context("cannot make the bench's directory")?;
    let bench = Bench {
        config: Defaults::parse_from(["bench"]).config,
        initramfs: Path::new(DIRECTORY).join("init.cpio"),
    };
    let mut archive = Archive::default();
    // Without a console a program is started with nothing open, and takes this instead.
    archive.directory("dev", 0o755);
    archive.character_device("dev/null", 0o666, 1, 3);
    archive.file("init", 0o755, &std::fs::read(FIRST).with_context(|| format!("cannot read {FIRST}"))?);
    std::fs::write(&bench.initramfs, archive.finish()).context("cannot write the initramfs")?;
    let packed = Path::new("/usr/bin").join(reference::ARCHIVE);
    let packed = File::open(&packed).with_context(|| format!("cannot open {}", packed.display()))?;
    let directory = Path::new(DIRECTORY).join("qemu");
    std::fs::create_dir_all(&directory).context("cannot make QEMU's directory")?;
    // Nothing that can be written to may be executed on the host, but this.
    let nothing: Option<&std::ffi::CStr> = None;
    rustix::mount::mount("bench", &directory, "tmpfs", rustix::mount::MountFlags::empty(), nothing)
        .context("cannot mount memory for QEMU")?;
    tar::Archive::new(packed).unpack(&directory).context("cannot unpack QEMU")?;
    let host = LinuxHost::new(&bench.config);
    // Each once for nothing: the first virtual machine of a host turns virtualisation on, and the runtime holds one from
    // then on; files come into memory.
    bench.ours(&host, samples).await?;
    bench.qemu()?;
    let (mut ours, mut qemu) = (Vec::new(), Vec::new());
    for number in 0..samples {
        ours.push(bench.ours(&host, number).await?);
        qemu.push(bench.qemu()?);
    }
    let booted = median(&ours.iter().map(|run| run.booted).collect::<Vec<_>>());
    let ended = median(&ours.iter().map(|run| run.ended).collect::<Vec<_>>());
    let other = median(&qemu);
    Ok(vec![
        Figure::new("vmm.jailed", booted, Unit::Ms),
        Figure::new("vmm.to-power-off", ended, Unit::Ms),
        Figure::new("vmm.qemu-to-power-off", other, Unit::Ms),
        Figure::new("vmm.against-qemu", ended / other, Unit::Ratio),
    ])
}

impl Bench {
    /// Our VMM, started and jailed as the runtime does it for a pod, without network and disks.
    async fn ours(&self, host: &LinuxHost, number: usize) -> anyhow::Result<Run> {
        let sandbox: SandboxId = format!("{number:064x}").parse().context("no id")?;
        let socket = Path::new(DIRECTORY).join("vmm.sock");
        let cid = GuestCid::new(1_000_000).context("no vsock address")?;
        let directory = PathBuf::from(DIRECTORY);
        let order = VmmOrder { sandbox: sandbox.clone(), cid, memory: MEMORY, vcpus: 1, directory };
        let begun = Instant::now();
        let listener = client::listen(&socket)?;
        let process = host.spawn_vmm(&order, &listener)?;
        let vmm = VmmClient::connect(&sandbox, &socket)?;
        let files = host.boot_files()?;
        let initramfs = File::open(&self.initramfs).context("cannot open the initramfs")?;
        let parts = [
            (BootFd::Kvm, files.kvm.as_fd()),
            (BootFd::Kernel, files.kernel.as_fd()),
            (BootFd::Initramfs, initramfs.as_fd()),
            (BootFd::VhostVsock, files.vhost_vsock.as_fd()),
        ];
        let (kinds, fds): (Vec<BootFd>, Vec<BorrowedFd<'_>>) = parts.into_iter().unzip();
        let spec = VmSpec {
            sandbox: sandbox.clone(),
            vcpus: 1,
            memory: MEMORY,
            cid,
            mac: None,
            cmdline: cmdline(false),
            fds: kinds,
            uid: Some(self.config.vmm_uid_base),
        };
        vmm.order(&VmRequest::Boot(Box::new(spec)), &fds, DEADLINE).await?;
        let booted = ms(begun.elapsed());
        let status =
            tokio::time::timeout(DEADLINE, process.exited()).await.context("the VMM does not end")?;
        let ended = ms(begun.elapsed());
        host.clear(&sandbox).await?;
        ensure!(status == exit::GUEST_STOPPED, "the VMM ended with status {status}");
        Ok(Run { booted, ended })
    }

    /// QEMU's smallest machine: no PCI, no ACPI tables of devices, no serial port.
    fn qemu(&self) -> anyhow::Result<f64> {
        let directory = Path::new(DIRECTORY).join("qemu");
        let mut command = Command::new(directory.join(reference::LOADER));
        command
            .arg("--library-path")
            .args([&directory, &directory.join(reference::PROGRAM)])
            .arg("-L")
            .arg(&directory)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-M", "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off"])
            .args(["-cpu", "host", "-smp", "1", "-m", &MEMORY.0.to_string()])
            .arg("-kernel")
            .arg(&self.config.guest_kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            // It has no keyboard controller to reset the machine with.
            .args(["-append", &cmdline(false).replace("reboot=k", "reboot=t")])
            .stdin(Stdio::null());
        let begun = Instant::now();
        let output = command.output().context("cannot run QEMU")?;
        let time = ms(begun.elapsed());
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "QEMU ended with {}: {said}", output.status);
        Ok(time)
    }
}
