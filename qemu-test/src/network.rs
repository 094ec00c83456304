//! The lab's network: a bridge with one tap per machine, dnsmasq as DHCP and DNS server, a time server.
//!
//! Called only inside the lab's own network namespace.

use crate::process::{Background, run_ok};
use crate::time_server::TimeServer;
use anyhow::ensure;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Address of the bridge: Supervisor, registry, DNS, DHCP and time are all here.
pub const SERVER: &str = "10.77.0.1";
/// Most machines of a lab.
pub const MACHINES: usize = 6;

/// The bridge and its services.
#[derive(Debug)]
pub struct Network {
    dnsmasq: Option<Background>,
    dnsmasq_command: Vec<String>,
    log: std::path::PathBuf,
    _time: TimeServer,
}

/// Name of the tap of machine `index`.
pub fn tap(index: usize) -> String {
    format!("tap{index}")
}

/// Address that DHCP gives machine `index`.
pub fn address(index: usize) -> String {
    format!("10.77.0.{}", 10 + index)
}

/// Hardware address of machine `index`.
pub fn mac(index: usize) -> String {
    format!("52:54:00:a7:00:{index:02x}")
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    run_ok(Command::new("ip").args(arguments.split(' ')), Duration::from_secs(10)).map(drop)
}

impl Network {
    /// Makes bridge and taps, and starts the services.
    ///
    /// # Errors
    /// When not inside a lab's namespace, or a tool fails.
    pub fn start(directory: &Path) -> anyhow::Result<Self> {
        ensure!(
            crate::namespaces::inside(),
            "refusing to change this machine's network: run inside a lab's namespaces"
        );
        ip("link set lo up")?;
        ip("link add br0 type bridge")?;
        ip(&format!("addr add {SERVER}/24 dev br0"))?;
        ip("link set br0 up")?;
        for index in 0..MACHINES {
            ip(&format!("tuntap add dev {} mode tap", tap(index)))?;
            ip(&format!("link set {} master br0", tap(index)))?;
            ip(&format!("link set {} up", tap(index)))?;
        }
        let mut command: Vec<String> = [
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-hosts",
            "--no-resolv",
            "--bind-interfaces",
            "--interface=br0",
            "--except-interface=lo",
            "--user=root",
            "--group=root",
            "--domain=lab",
            "--log-dhcp",
            "--dhcp-authoritative",
            "--dhcp-range=10.77.0.100,10.77.0.150,10m",
            "--address=/supervisor.lab/10.77.0.1",
            "--address=/registry.lab/10.77.0.1",
            "--dhcp-option=option:ntp-server,10.77.0.1",
            "--dhcp-option=option:router,10.77.0.1",
            "--dhcp-option=option:dns-server,10.77.0.1",
        ]
        .map(str::to_owned)
        .to_vec();
        command.push(format!("--dhcp-leasefile={}", directory.join("leases").display()));
        command.push(format!("--pid-file={}", directory.join("dnsmasq.pid").display()));
        for index in 0..MACHINES {
            command.push(format!("--dhcp-host={},{},node-{}", mac(index), address(index), index + 1));
        }
        let time = TimeServer::start(SERVER)?;
        let mut network =
            Self { dnsmasq: None, dnsmasq_command: command, log: directory.join("dnsmasq.log"), _time: time };
        network.start_dhcp()?;
        Ok(network)
    }

    /// Starts the DHCP and DNS server.
    ///
    /// # Errors
    /// When dnsmasq cannot be started.
    pub fn start_dhcp(&mut self) -> anyhow::Result<()> {
        let mut command = Command::new("dnsmasq");
        command.args(&self.dnsmasq_command).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        self.dnsmasq = Some(Background::spawn("dnsmasq", &mut command, &self.log)?);
        Ok(())
    }

    /// Stops the DHCP and DNS server.
    pub fn stop_dhcp(&mut self) {
        self.dnsmasq = None;
    }

    /// Pulls or plugs the cable of machine `index`.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn cable(&self, index: usize, plugged: bool) -> anyhow::Result<()> {
        ip(&format!("link set {} {}", tap(index), if plugged { "up" } else { "down" }))
    }
}
