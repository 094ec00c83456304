//! What the runtime is told on its command line: every path, program and limit, with the defaults of a host.
//!
//! Called by `main` and by tests, which point everything into a temporary directory. Invariant: [`Config::check`]
//! reports every bad value at once, before anything is started.

use atoll_spec::places;
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// Flags of `atoll-runtime`.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// Unix socket to serve CRI on.
    #[arg(long, default_value = "/run/atoll/runtime/cri.sock")]
    pub socket: PathBuf,
    /// Group that may use the socket.
    #[arg(long, default_value_t = 801)]
    pub socket_gid: u32,
    /// Where images and sandboxes are kept.
    #[arg(long, default_value = "/data")]
    pub data: PathBuf,
    /// Where sockets and other files that do not outlive a boot are kept.
    #[arg(long, default_value = "/run/atoll/runtime")]
    pub run: PathBuf,
    /// Where mounts of containers may lie on the host; whoever owns it owns all that is in it.
    #[arg(long = "volume-root", default_values = [places::PODS, places::VOLUMES])]
    pub volume_roots: Vec<PathBuf>,
    /// Where logs of containers may be written.
    #[arg(long = "log-root", default_value = "/data/log")]
    pub log_roots: Vec<PathBuf>,
    /// The virtual machine monitor.
    #[arg(long, default_value = "/usr/bin/atoll-vmm")]
    pub vmm: PathBuf,
    /// The guest kernel, an uncompressed ELF file.
    #[arg(long, default_value = "/usr/lib/atoll/guest/vmlinux")]
    pub guest_kernel: PathBuf,
    /// The guest's initramfs.
    #[arg(long, default_value = "/usr/lib/atoll/guest/initramfs.cpio")]
    pub guest_initramfs: PathBuf,
    /// The hypervisor device.
    #[arg(long, default_value = "/dev/kvm")]
    pub kvm: PathBuf,
    /// The kernel's vsock back end.
    #[arg(long, default_value = "/dev/vhost-vsock")]
    pub vhost_vsock: PathBuf,
    /// The kernel's network back end.
    #[arg(long, default_value = "/dev/vhost-net")]
    pub vhost_net: PathBuf,
    /// The tap device.
    #[arg(long, default_value = "/dev/net/tun")]
    pub tun: PathBuf,
    /// Registry settings written by hostd.
    #[arg(long, default_value = "/run/atoll/runtime/registries.json")]
    pub registries: PathBuf,
    /// Certificates to trust where a registry names none.
    #[arg(long, default_value = "/etc/ssl/certs/ca-certificates.crt")]
    pub system_ca: PathBuf,
    /// Program that packs a layer.
    #[arg(long, default_value = "/usr/bin/mkfs.erofs")]
    pub mkfs_erofs: PathBuf,
    /// Program that makes the template of the scratch disk.
    #[arg(long, default_value = "/usr/sbin/mkfs.ext4")]
    pub mkfs_ext4: PathBuf,
    /// Program that filters packets.
    #[arg(long, default_value = "/usr/sbin/nft")]
    pub nft: PathBuf,
    /// The cgroup under which each sandbox gets its own.
    #[arg(long, default_value = "/sys/fs/cgroup/atoll/pods")]
    pub cgroup: PathBuf,
    /// The host's DNS settings, for pods that bring none.
    #[arg(long, default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// Pod addresses until UpdateRuntimeConfig brings them (`10.85.0.0/24`).
    #[arg(long)]
    pub pod_cidr: Option<String>,
    /// Size of a pod's scratch disk in MiB, at most half of the file system it lies on; the file is sparse.
    #[arg(long, default_value_t = 10 * 1024)]
    pub scratch_mib: u32,
    /// Memory of a pod without limits, in MiB.
    #[arg(long, default_value_t = 512)]
    pub default_memory_mib: u32,
    /// Memory that a guest needs for itself, in MiB, added to the limits of its containers.
    #[arg(long, default_value_t = 128)]
    pub guest_overhead_mib: u32,
    /// Longest time from RunPodSandbox to a ready guest, in seconds.
    #[arg(long, default_value_t = 120)]
    pub launch_seconds: u64,
    /// Write each guest's serial console to `console.log` in its directory. For debugging: it slows the boot.
    #[arg(long)]
    pub guest_console: bool,
    /// Address of the streaming server; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub streaming: std::net::SocketAddr,
    /// User and group of the sandboxed layer unpacker; 0 keeps the runtime's own.
    #[arg(long, default_value_t = 65534)]
    pub unpack_uid: u32,
    /// First user id of the virtual machine monitors: each gets this plus its vsock address.
    #[arg(long, default_value_t = 100_000)]
    pub vmm_uid_base: u32,
}

impl Config {
    /// Every problem of the settings, one line each.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let mut problems = Vec::new();
        if self.scratch_mib < 64 {
            problems.push(format!("--scratch-mib {}: give at least 64", self.scratch_mib));
        }
        if self.default_memory_mib < 128 {
            problems.push(format!("--default-memory-mib {}: give at least 128", self.default_memory_mib));
        }
        if self.launch_seconds == 0 {
            problems.push("--launch-seconds 0: give at least 1".to_owned());
        }
        if let Some(Err(why)) = self.pod_cidr.as_deref().map(crate::vm::address::PodCidr::parse) {
            problems.push(format!("--pod-cidr: {why}"));
        }
        for (flag, roots) in [("--volume-root", &self.volume_roots), ("--log-root", &self.log_roots)] {
            let relative = roots.iter().filter(|root| !root.is_absolute());
            problems.extend(relative.map(|root| format!("{flag} {}: give an absolute path", root.display())));
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// Directory of the sandboxes.
    pub fn sandboxes(&self) -> PathBuf {
        self.data.join("sandboxes")
    }

    /// Directory of the VMMs' control sockets.
    pub fn vm_sockets(&self) -> PathBuf {
        self.run.join("vm")
    }

    /// Deadline of a launch.
    pub fn launch_deadline(&self) -> Duration {
        Duration::from_secs(self.launch_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        config: Config,
    }

    #[test]
    fn defaults_are_good_and_every_bad_value_is_named() {
        assert_eq!(Cli::parse_from(["x"]).config.check(), Ok(()));
        let bad = Cli::parse_from([
            "x",
            "--scratch-mib",
            "1",
            "--pod-cidr",
            "10.0.0.0",
            "--launch-seconds",
            "0",
            "--log-root",
            "x",
        ]);
        assert_eq!(bad.config.check().unwrap_err().len(), 4);
    }
}
