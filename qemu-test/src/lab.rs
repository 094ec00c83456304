//! A whole lab: network, Supervisor, registry and booted hosts, as the demo and the end-to-end tests use it.
//!
//! Flow: `Lab::start` (network → Supervisor and registry side by side → image pushed) → `boot_host` →
//! `wait_node_ready`. Everything dies when it is dropped.

use crate::artifacts::{Artifacts, Profile};
use crate::machine::{Hardware, Machine, MachineSpec};
use crate::network::{Network, SERVER};
use crate::oci::Image;
use crate::progress::Progress;
use crate::registry::Registry;
use crate::supervisor::Supervisor;
use anyhow::{Context, anyhow};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The registry as image names write it; the lab's DNS knows it.
pub const REGISTRY: &str = "registry.lab:5000";
/// A registry that tests serve themselves, by the same name; its port is free otherwise.
pub const OWN_REGISTRY: &str = "registry.lab:5001";
/// The image that examples and tests run.
pub const BUSYBOX: &str = "registry.lab:5000/busybox:1";
/// Longest time from power-on to Ready under emulation.
pub const READY: Duration = Duration::from_secs(300);

/// Everything that runs beside the hosts, and the hosts.
#[derive(Debug)]
pub struct Lab {
    directory: PathBuf,
    /// The control plane.
    pub supervisor: Supervisor,
    /// The image registry.
    pub registry: Registry,
    /// Bridge, DHCP, DNS, time.
    pub network: Network,
}

impl Lab {
    /// Starts network, Supervisor and registry, and pushes the test image.
    ///
    /// # Errors
    /// When one of them does not come up; its log is named.
    pub fn start(artifacts: &Artifacts, directory: &Path, progress: &mut Progress) -> anyhow::Result<Self> {
        if directory.exists() {
            std::fs::remove_dir_all(directory)
                .with_context(|| format!("cannot clear {}", directory.display()))?;
        }
        std::fs::create_dir_all(directory)?;
        let network = Network::start(directory)?;
        let binary = artifacts.supervisor()?;
        let (supervisor, registry) = progress.step("start Supervisor and registry", || {
            std::thread::scope(|scope| {
                let registry = scope.spawn(|| {
                    let registry = Registry::start(SERVER, &directory.join("registry"))?;
                    registry.push("busybox", "1", &Image::busybox()?)?;
                    anyhow::Ok(registry)
                });
                let supervisor = Supervisor::start(
                    &binary,
                    &directory.join("supervisor"),
                    SERVER,
                    &directory.join("supervisor.log"),
                )?;
                let registry = registry.join().map_err(|_| anyhow!("the registry's thread panicked"))??;
                Ok((supervisor, registry))
            })
        })?;
        Ok(Self { directory: directory.to_owned(), supervisor, registry, network })
    }

    /// The machine config that joins host `index` with a fresh token; hosts are named `node-1`, `node-2`, … The first
    /// is the one for pods that name no node: the others belong to tests that stop, cut off and break them.
    ///
    /// # Errors
    /// When no token can be made.
    pub fn machine_config(&self, index: usize) -> anyhow::Result<String> {
        let own = if index == 0 { "" } else { "node: {taints: ['lab/own:NoSchedule']}\n" };
        Ok(format!(
            "{}\nhostname: {}\n{own}",
            self.supervisor.machine_config(&[REGISTRY, OWN_REGISTRY])?.trim_end(),
            node_name(index)
        ))
    }

    /// What host `index` is booted with.
    pub fn machine_spec(
        &self,
        artifacts: &Artifacts,
        profile: Profile,
        index: usize,
        config: Option<String>,
    ) -> MachineSpec {
        MachineSpec {
            index,
            image: artifacts.image(profile),
            disk_gib: 8,
            memory_mib: 4096,
            config,
            directory: self.directory.join(node_name(index)),
            hardware: Hardware::default(),
        }
    }

    /// Boots host `index` with a config of its own that makes it join.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn boot_host(
        &self,
        artifacts: &Artifacts,
        profile: Profile,
        index: usize,
    ) -> anyhow::Result<Machine> {
        let config = self.machine_config(index)?;
        Machine::boot(self.machine_spec(artifacts, profile, index, Some(config)))
    }

    /// Waits until host `index` is Ready; on failure the error carries the end of its console.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_ready(&self, machine: &mut Machine, index: usize) -> anyhow::Result<()> {
        machine.check_alive()?;
        self.supervisor.wait_node_ready(&node_name(index), READY).with_context(|| {
            let text = machine.serial.text();
            let lines: Vec<&str> = text.lines().collect();
            format!("end of the console:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
        })
    }

    /// Where its files and logs are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Name of host `index`.
pub fn node_name(index: usize) -> String {
    format!("node-{}", index + 1)
}
