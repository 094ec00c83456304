//! The pod network on the host: one tap per sandbox, routed, its source address enforced.
//!
//! Called by `vm::launch` (a pod's tap) and at start-up (forwarding, the nftables table). Invariants: every tap has
//! [`GATEWAY`] and one host route; a packet from a tap whose source is not that pod's address is dropped before routing
//! (set `pods` of table `inet atoll`); a tap lives as long as the VMM that holds it, so a crash leaks none.

use crate::error::{Error, Result};
use crate::sys;
use crate::vm::address::{GATEWAY, GATEWAY_MAC, MTU, PodCidr};
use futures_util::TryStreamExt;
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// Longest run of `nft`.
const NFT_DEADLINE: Duration = Duration::from_secs(30);

/// What one pod's device needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Name of the tap on the host.
    pub tap: String,
    /// The pod's address.
    pub address: Ipv4Addr,
    /// The pod's hardware address.
    pub mac: [u8; 6],
}

/// Makes the tap of a pod and the route to it.
pub async fn open_port(tun: &Path, port: &Port) -> Result<OwnedFd> {
    let file = std::fs::File::options().read(true).write(true).open(tun).map_err(Error::io("open", tun))?;
    sys::attach_tap(file.as_fd(), &port.tap).map_err(Error::os("make tap", &port.tap))?;
    quiet_ipv6(&port.tap);
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::os("open", "rtnetlink"))?;
    let netlink = tokio::spawn(connection);
    let result = configure(&handle, port).await;
    netlink.abort();
    result.map_err(|e| Error::Step {
        operation: "set up network device",
        object: port.tap.clone(),
        why: e.to_string(),
    })?;
    Ok(file.into())
}

async fn configure(handle: &Handle, port: &Port) -> std::result::Result<(), rtnetlink::Error> {
    let mut links = handle.link().get().match_name(port.tap.clone()).execute();
    let index = links.try_next().await?.map(|l| l.header.index).ok_or(rtnetlink::Error::RequestFailed)?;
    let link =
        LinkUnspec::new_with_index(index).address(GATEWAY_MAC.to_vec()).mtu(u32::from(MTU)).up().build();
    handle.link().set(link).execute().await?;
    handle.address().add(index, IpAddr::V4(GATEWAY), 32).execute().await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(port.address, 32)
        .output_interface(index)
        .scope(rtnetlink::packet_route::route::RouteScope::Link)
        .build();
    handle.route().add(route).replace().execute().await?;
    let mut neighbour = handle
        .neighbours()
        .add(index, IpAddr::V4(port.address))
        .state(NeighbourState::Permanent)
        .link_layer_address(&port.mac);
    neighbour = neighbour.replace();
    neighbour.execute().await
}

/// No IPv6 on a tap: pods have none, and the kernel would announce itself there. Best effort: a kernel without IPv6 has
/// no such file.
fn quiet_ipv6(tap: &str) {
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6"), "1");
}

/// The packet filter, driven through `nft`.
#[derive(Debug, Clone)]
pub struct Filter {
    nft: PathBuf,
}

impl Filter {
    /// Uses the program `nft`.
    pub fn new(nft: &Path) -> Self {
        Self { nft: nft.to_owned() }
    }

    /// Turns forwarding on and (re)makes the table: the filter of sources, and masquerading of what leaves the host.
    /// `ports` are the pods that run already.
    pub async fn install(&self, cidr: PodCidr, ports: &[Port]) -> Result<()> {
        let forward = Path::new("/proc/sys/net/ipv4/ip_forward");
        std::fs::write(forward, "1").map_err(Error::io("turn on", forward))?;
        self.run(&table(cidr, ports)).await
    }

    /// Allows a pod's address on its tap.
    pub async fn allow(&self, port: &Port) -> Result<()> {
        self.run(&format!("add element inet atoll pods {{ \"{}\" . {} }}\n", port.tap, port.address)).await
    }

    /// Forgets it. An element that is not there is no error.
    pub async fn forget(&self, port: &Port) -> Result<()> {
        let element = format!("inet atoll pods {{ \"{}\" . {} }}", port.tap, port.address);
        // Also where the table is not there (yet), as after a reboot of the host.
        let set = "add table inet atoll\nadd set inet atoll pods { type ifname . ipv4_addr; }";
        self.run(&format!("{set}\nadd element {element}\ndelete element {element}\n")).await
    }

    async fn run(&self, script: &str) -> Result<()> {
        let step = |why: String| Error::Step {
            operation: "load packet filter with",
            object: self.nft.display().to_string(),
            why,
        };
        let mut child = tokio::process::Command::new(&self.nft)
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(Error::io("run", &self.nft))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(script.as_bytes()).await.map_err(|e| step(e.to_string()))?;
        }
        let output = crate::error::within(NFT_DEADLINE, || "nft".to_owned(), child.wait_with_output())
            .await?
            .map_err(|e| step(e.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&output.stderr);
        Err(step(words.lines().next().unwrap_or("no reason given").trim().to_owned()))
    }
}

/// The whole table, replaced in one transaction. A pod's link is wider than many a path: TCP connections of pods agree on
/// segments that fit the link which they take, for who answers a pod never sees that link.
fn table(cidr: PodCidr, ports: &[Port]) -> String {
    let elements =
        ports.iter().map(|p| format!("\"{}\" . {}", p.tap, p.address)).collect::<Vec<_>>().join(", ");
    let elements = if elements.is_empty() { String::new() } else { format!("elements = {{ {elements} }}; ") };
    format!(
        "add table inet atoll
delete table inet atoll
table inet atoll {{
  set pods {{ type ifname . ipv4_addr; {elements}}}
  chain entering {{
    type filter hook prerouting priority raw; policy accept;
    iifname \"atoll*\" meta nfproto ipv6 drop
    iifname \"atoll*\" iifname . ip saddr != @pods drop
  }}
  chain passing {{
    type filter hook forward priority mangle; policy accept;
    tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {cidr} ip daddr != {cidr} oifname != \"atoll*\" masquerade
  }}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_every_pod_that_runs() {
        let port =
            Port { tap: "atoll3".into(), address: Ipv4Addr::new(10, 0, 0, 1), mac: [2, 0, 0, 0, 0, 1] };
        let text = table(PodCidr::parse("10.0.0.0/24").unwrap(), &[port]);
        assert!(text.contains("elements = { \"atoll3\" . 10.0.0.1 }"), "{text}");
        assert!(text.contains("ip saddr 10.0.0.0/24 ip daddr != 10.0.0.0/24"), "{text}");
    }
}
