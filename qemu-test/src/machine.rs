//! One emulated server: QEMU with UEFI firmware, killed when dropped.

use crate::disk::Volume;
use crate::network;
use crate::process::Background;
use crate::qmp::Qmp;
use crate::serial::Serial;
use anyhow::{Context, ensure};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How QEMU runs the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor has svm or vmx for us: hardware virtualisation.
    Kvm,
    /// Emulation, on every core.
    Tcg,
}

impl Accelerator {
    /// Decides by the processor's flags: a /dev/kvm that opens is no proof that a stock kernel runs on it.
    pub fn detect() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flag = |name: &str| cpuinfo.split_whitespace().any(|word| word == name);
        if (flag("svm") || flag("vmx")) && Path::new("/dev/kvm").exists() { Self::Kvm } else { Self::Tcg }
    }

    /// Processors of the machine, of which the tests use two.
    ///
    /// QEMU's emulation has a race: whatever processor loads the state of its FPU writes flags of the *first* one, not
    /// atomically (`cpu_clear_ignne`, for a chipset of 1989). The first processor then loses what it has just noted there
    /// while it enters or leaves a guest: that memory is nested, or that interrupts are off. Guests die of triple faults,
    /// and hosts of what guests wrote over them. So the first processor of an emulated machine is one that never runs a
    /// guest: the kernel keeps all programs from it.
    fn processors(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-smp", "2"],
            Self::Tcg => {
                &["-smp", "3", "-smbios", "type=11,value=io.systemd.stub.kernel-cmdline-extra=isolcpus=0"]
            }
        }
    }

    fn arguments(self, hardware: &Hardware) -> [&'static str; 4] {
        match (self, hardware.virtualisation) {
            (Self::Kvm, true) => ["-accel", "kvm", "-cpu", "host"],
            (Self::Kvm, false) => ["-accel", "kvm", "-cpu", "host,-svm,-vmx"],
            // Without -cx16 the emulation leaves garbage in EFLAGS after cmpxchg16b, and kernels die at random.
            (Self::Tcg, true) => ["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt,-cx16"],
            (Self::Tcg, false) => ["-accel", "tcg,thread=multi", "-cpu", "EPYC,-svm,-cx16"],
        }
    }
}

/// What the machine has, where it is not as usual.
#[derive(Debug, Clone)]
pub struct Hardware {
    /// Whether its processor can run virtual machines.
    pub virtualisation: bool,
    /// Date that its clock starts with (`2020-01-01`), instead of the right one.
    pub date: Option<&'static str>,
}

impl Default for Hardware {
    fn default() -> Self {
        Self { virtualisation: true, date: None }
    }
}

/// What to boot and with what.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// Which tap, address and hardware address.
    pub index: usize,
    /// The disk image; never written, each machine has an overlay of its own.
    pub image: PathBuf,
    /// Size the disk is grown to, in GiB.
    pub disk_gib: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Machine config given by fw_cfg; `None` leaves what the ESP has.
    pub config: Option<String>,
    /// Where overlay, firmware variables, sockets and logs go.
    pub directory: PathBuf,
    /// What it has.
    pub hardware: Hardware,
}

impl MachineSpec {
    /// Makes the disk, an overlay of the image, and the firmware's variables: a machine that was never on.
    ///
    /// # Errors
    /// When QEMU's tools or the firmware are missing.
    pub fn prepare(&self) -> anyhow::Result<()> {
        if self.directory.exists() {
            std::fs::remove_dir_all(&self.directory)?;
        }
        std::fs::create_dir_all(&self.directory)?;
        crate::process::run_ok(
            Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
                .arg(&self.image)
                .arg(self.disk())
                .arg(format!("{}G", self.disk_gib)),
            Duration::from_secs(20),
        )?;
        std::fs::copy(firmware("VARS")?, self.directory.join("vars.fd"))
            .context("cannot copy firmware variables")
            .map(drop)
    }

    /// A partition of its disk, to be changed only while it is off.
    ///
    /// # Errors
    /// When the image has none of this label.
    pub fn volume(&self, label: &str) -> anyhow::Result<Volume> {
        Volume::find(&self.image, &self.disk(), label)
    }

    fn disk(&self) -> PathBuf {
        self.directory.join("disk.qcow2")
    }
}

/// A running machine.
#[derive(Debug)]
pub struct Machine {
    spec: MachineSpec,
    qemu: Background,
    /// Its console.
    pub serial: Serial,
}

impl Machine {
    /// Makes the overlay disk and boots from it.
    ///
    /// # Errors
    /// When QEMU, its tools or the firmware are missing, or QEMU refuses its arguments.
    pub fn boot(spec: MachineSpec) -> anyhow::Result<Self> {
        spec.prepare()?;
        Self::start(spec)
    }

    /// Boots again from the same disk, after [`Machine::wait_off`] or [`Machine::power_cut`].
    ///
    /// # Errors
    /// Those of [`Machine::boot`].
    pub fn boot_again(self) -> anyhow::Result<Self> {
        let spec = self.spec.clone();
        drop(self);
        Self::start(spec)
    }

    /// Replaces the machine config that the next boot gets by fw_cfg.
    pub fn set_config(&mut self, config: Option<String>) {
        self.spec.config = config;
    }

    /// What it was booted with.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// Changes what the next boot finds.
    pub fn spec_mut(&mut self) -> &mut MachineSpec {
        &mut self.spec
    }

    /// Boots from the disk that is there.
    ///
    /// # Errors
    /// When QEMU is missing or refuses its arguments.
    pub fn start(spec: MachineSpec) -> anyhow::Result<Self> {
        let log = spec.directory.join("serial.log");
        let mut command = Self::command(&spec, &log)?;
        let qemu = Background::spawn("QEMU", &mut command, &spec.directory.join("qemu.log"))?;
        let mut machine = Self { serial: Serial::new(&log), qemu, spec };
        Qmp::connect(&machine.qmp_socket()).or_else(|error| machine.qemu.check_alive().and(Err(error)))?;
        Ok(machine)
    }

    fn command(spec: &MachineSpec, log: &Path) -> anyhow::Result<Command> {
        let file = |name: &str| spec.directory.join(name).display().to_string();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,smm=off"])
            .args(Accelerator::detect().processors())
            .args(Accelerator::detect().arguments(&spec.hardware))
            .args([
                "-m",
                &spec.memory_mib.to_string(),
                "-uuid",
                &format!("a7011000-0000-4000-8000-{:012}", spec.index),
            ])
            .args([
                "-drive",
                &format!("if=pflash,format=raw,readonly=on,file={}", firmware("CODE")?.display()),
            ])
            .args(["-drive", &format!("if=pflash,format=raw,file={}", file("vars.fd"))])
            .args(["-drive", &format!("if=none,id=disk,format=qcow2,file={}", file("disk.qcow2"))])
            .args(["-device", "virtio-blk-pci,drive=disk"])
            .args([
                "-netdev",
                &format!("tap,id=net,ifname={},script=no,downscript=no", network::tap(spec.index)),
            ])
            .args([
                "-device",
                &format!("virtio-net-pci,netdev=net,romfile=,mac={}", network::mac(spec.index)),
            ])
            .args(["-device", "virtio-rng-pci", "-device", "i6300esb", "-action", "watchdog=reset"])
            .args([
                "-chardev",
                &format!(
                    "socket,id=serial,server=on,wait=off,path={},logfile={},logappend=on",
                    file("serial.sock"),
                    log.display()
                ),
            ])
            .args(["-serial", "chardev:serial"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", file("qmp.sock"))]);
        if let Some(date) = spec.hardware.date {
            command.args(["-rtc", &format!("base={date}")]);
        }
        if let Some(config) = &spec.config {
            let path = spec.directory.join("machine.yaml");
            std::fs::write(&path, config).with_context(|| format!("cannot write {}", path.display()))?;
            command.args(["-fw_cfg", &format!("name=opt/dev.atoll/machine.yaml,file={}", path.display())]);
        }
        Ok(command)
    }

    fn qmp_socket(&self) -> PathBuf {
        self.spec.directory.join("qmp.sock")
    }

    /// Its address in the lab's network.
    pub fn address(&self) -> String {
        network::address(self.spec.index)
    }

    /// Pulls the network cable out of the machine, or plugs it in: its card sees no peer.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn cable(&self, plugged: bool) -> anyhow::Result<()> {
        let link = json!({ "name": "net", "up": plugged });
        Qmp::connect(&self.qmp_socket())?.execute("set_link", link).map(drop)
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn press_power_button(&self) -> anyhow::Result<()> {
        Qmp::connect(&self.qmp_socket())?.execute("system_powerdown", json!({})).map(drop)
    }

    /// Waits until the machine has powered itself off.
    ///
    /// # Errors
    /// When it still runs at the deadline, or QEMU ended with an error.
    pub fn wait_off(&mut self, deadline: Duration) -> anyhow::Result<()> {
        let status = self.qemu.wait(deadline).with_context(|| {
            format!(
                "the machine did not power off; end of its console:\n{}",
                crate::process::tail(&self.spec.directory.join("serial.log"), 30)
            )
        })?;
        ensure!(status.success(), "QEMU ended with {status}");
        Ok(())
    }

    /// Cuts the power: QEMU is killed where it stands.
    pub fn power_cut(&mut self) {
        self.qemu.kill();
    }

    /// Fails when QEMU has ended.
    ///
    /// # Errors
    /// With the end of its log.
    pub fn check_alive(&mut self) -> anyhow::Result<()> {
        self.qemu.check_alive()
    }
}

/// OVMF's 4 MiB code or variables, as Debian's ovmf has them.
fn firmware(part: &str) -> anyhow::Result<PathBuf> {
    let path = PathBuf::from(format!("/usr/share/OVMF/OVMF_{part}_4M.fd"));
    ensure!(path.exists(), "no UEFI firmware at {}: install the package ovmf (./just setup)", path.display());
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emulation_never_offers_cmpxchg16b() {
        for virtualisation in [true, false] {
            let hardware = Hardware { virtualisation, ..Hardware::default() };
            assert!(Accelerator::Tcg.arguments(&hardware).join(" ").contains("-cx16"));
        }
    }
}
