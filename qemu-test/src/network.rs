//! The lab's network: a bridge with one tap per machine, dnsmasq as DHCP and DNS server, a time server.
//!
//! Called only inside the lab's own network namespace.

use crate::process::{Background, run_ok};
use crate::time_server::TimeServer;
use anyhow::{Context, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Address of the bridge: Supervisor, registry, DNS, DHCP and time are all here.
pub const SERVER: &str = "10.77.0.1";
/// Most machines of a lab.
pub const MACHINES: usize = 9;

/// Files that dnsmasq reads.
const HOSTS: &str = "dhcp-hosts";
const OPTIONS: &str = "dhcp-options";

/// The bridge and its services.
#[derive(Debug)]
pub struct Network {
    dnsmasq: Mutex<Option<Background>>,
    dnsmasq_command: Vec<String>,
    log: std::path::PathBuf,
    directory: PathBuf,
    offers: Mutex<BTreeMap<usize, Offer>>,
    _time: TimeServer,
}

/// What DHCP gives one machine, where it differs from what all get.
#[derive(Debug, Clone, Default)]
pub struct Offer {
    /// Another address than [`address`].
    pub address: Option<String>,
    /// Options as dnsmasq writes them (`option:mtu,1400`); they replace those that all get.
    pub options: Vec<String>,
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
        // Given once, it stays: otherwise the bridge takes over the smallest of its ports.
        ip("link set br0 mtu 1500 up")?;
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
        command.push(format!("--dhcp-hostsfile={}", directory.join(HOSTS).display()));
        command.push(format!("--dhcp-optsfile={}", directory.join(OPTIONS).display()));
        let time = TimeServer::start(SERVER)?;
        let network = Self {
            dnsmasq: Mutex::default(),
            dnsmasq_command: command,
            log: directory.join("dnsmasq.log"),
            directory: directory.to_owned(),
            offers: Mutex::default(),
            _time: time,
        };
        network.write_offers(&BTreeMap::new())?;
        network.start_dhcp()?;
        Ok(network)
    }

    /// Starts the DHCP and DNS server, in place of one that runs.
    ///
    /// # Errors
    /// When dnsmasq cannot be started.
    pub fn start_dhcp(&self) -> anyhow::Result<()> {
        let mut command = Command::new("dnsmasq");
        command.args(&self.dnsmasq_command).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let mut running = self.dnsmasq.lock().unwrap_or_else(PoisonError::into_inner);
        // The old one first: it has the ports.
        drop(running.take());
        *running = Some(Background::spawn("dnsmasq", &mut command, &self.log)?);
        Ok(())
    }

    /// Stops the DHCP and DNS server.
    pub fn stop_dhcp(&self) {
        *self.dnsmasq.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Changes what machine `index` gets at its next exchange with DHCP. Others keep what they have: the server is started
    /// anew, with the leases of the old one.
    ///
    /// # Errors
    /// When dnsmasq cannot be told.
    pub fn offer(&self, index: usize, offer: Offer) -> anyhow::Result<()> {
        let mut offers = self.offers.lock().unwrap_or_else(PoisonError::into_inner);
        offers.insert(index, offer);
        self.write_offers(&offers)?;
        self.start_dhcp()
    }

    /// dnsmasq reads both files at its start. It would at SIGHUP too, but 2.90 was seen to die of that (SIGSEGV) when it had
    /// given a lease to one of these hosts.
    fn write_offers(&self, offers: &BTreeMap<usize, Offer>) -> anyhow::Result<()> {
        let (mut hosts, mut options) = (String::new(), String::new());
        for index in 0..MACHINES {
            let offer = offers.get(&index).cloned().unwrap_or_default();
            let address = offer.address.unwrap_or_else(|| address(index));
            hosts += &format!("{},set:m{index},{address},node-{}\n", mac(index), index + 1);
            for option in &offer.options {
                options += &format!("tag:m{index},{option}\n");
            }
        }
        for (name, text) in [(HOSTS, hosts), (OPTIONS, options)] {
            let path = self.directory.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Takes machine `index` off the bridge, or puts it back: its cable stays in, and nothing is behind it.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn isolate(&self, index: usize, alone: bool) -> anyhow::Result<()> {
        let tap = tap(index);
        ip(&if alone { format!("link set {tap} nomaster") } else { format!("link set {tap} master br0") })
    }

    /// Narrows the way to machine `index`: what is larger is dropped without a word.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn narrow(&self, index: usize, mtu: u32) -> anyhow::Result<()> {
        // A bridge passes what is to be cut up on the way out, whatever the size of its pieces: nothing is to be cut up.
        let pieces = if mtu < 1500 { 1 } else { 65535 };
        ip(&format!("link set br0 gso_max_segs {pieces}"))?;
        ip(&format!("link set {} mtu {mtu}", tap(index)))
    }
}
