//! The pod's network device, by netlink: address, next hop, default route.
//!
//! The address is a /32 and the next hop lies outside of it, so the route is marked on-link and the neighbour
//! is permanent: the guest never asks by ARP. Done here and not by `ip=` on the command line, which costs
//! the kernel about 20 ms of waiting.

use crate::error::{Context as _, Result};
use atoll_spec::guest::GuestNetwork;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const NEW_NEIGHBOUR: u16 = 28;
const ERROR: u16 = 2;

const REQUEST_ACK: u16 = 0x1 | 0x4;
const CREATE_REPLACE: u16 = 0x400 | 0x100;

const UP: u32 = 1;
const PERMANENT: u16 = 0x80;
const ON_LINK: u32 = 4;
const MAIN_TABLE: u8 = 254;
const BOOT_PROTOCOL: u8 = 3;
const UNICAST: u8 = 1;
const INET: u8 = 2;
const HOST_SCOPE: u8 = 254;

/// One request under construction: header, fixed part, attributes.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend([0; 4]);
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((REQUEST_ACK | flags).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(fixed);
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        // Values here are at most a few bytes.
        let length = (4 + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

fn link_up(index: u32, mtu: Option<u16>) -> Vec<u8> {
    let mut fixed = vec![0; 4];
    fixed.extend(index.to_ne_bytes());
    fixed.extend(UP.to_ne_bytes());
    fixed.extend(UP.to_ne_bytes());
    let message = Message::new(NEW_LINK, 0, &fixed);
    match mtu {
        Some(mtu) => message.attribute(4, &u32::from(mtu).to_ne_bytes()).finish(),
        None => message.finish(),
    }
}

fn address(index: u32, address: Ipv4Addr) -> Vec<u8> {
    let mut fixed = vec![INET, 32, 0, 0];
    fixed.extend(index.to_ne_bytes());
    Message::new(NEW_ADDRESS, CREATE_REPLACE, &fixed)
        .attribute(1, &address.octets())
        .attribute(2, &address.octets())
        .finish()
}

fn neighbour(index: u32, network: &GuestNetwork) -> Vec<u8> {
    let mut fixed = vec![INET, 0, 0, 0];
    fixed.extend(index.to_ne_bytes());
    fixed.extend(PERMANENT.to_ne_bytes());
    fixed.extend([0, 0]);
    Message::new(NEW_NEIGHBOUR, CREATE_REPLACE, &fixed)
        .attribute(1, &network.gateway.octets())
        .attribute(2, &network.gateway_mac)
        .finish()
}

fn default_route(index: u32, network: &GuestNetwork) -> Vec<u8> {
    let mut fixed = vec![INET, 0, 0, 0, MAIN_TABLE, BOOT_PROTOCOL, 0, UNICAST];
    fixed.extend(ON_LINK.to_ne_bytes());
    Message::new(NEW_ROUTE, CREATE_REPLACE, &fixed)
        .attribute(5, &network.gateway.octets())
        .attribute(4, &index.to_ne_bytes())
        .attribute(7, &network.address.octets())
        .finish()
}

struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> std::result::Result<Self, Errno> {
        // Without a protocol it is NETLINK_ROUTE.
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None).map(Self)
    }

    /// Sends one request and waits for its acknowledgement, which the kernel gives before `send` returns.
    fn ask(&self, message: &[u8]) -> std::io::Result<()> {
        send(&self.0, message, SendFlags::empty())?;
        let mut reply = [0; 1024];
        let (_, length) = recv(&self.0, &mut reply[..], RecvFlags::DONTWAIT)?;
        parse_acknowledgement(&reply[..length])
    }
}

fn parse_acknowledgement(reply: &[u8]) -> std::io::Result<()> {
    let kind = reply.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let code = reply.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(ERROR), Some(0)) => Ok(()),
        (Some(ERROR), Some(code)) => Err(std::io::Error::from_raw_os_error(-code)),
        _ => Err(std::io::Error::other("the kernel's answer is not an acknowledgement")),
    }
}

/// Index of an interface; the loopback device is always 1.
fn index_of(name: &str) -> Result<u32> {
    let path = format!("/sys/class/net/{name}/ifindex");
    let text = std::fs::read_to_string(&path).during(|| format!("find network device {name} ({path})"))?;
    text.trim().parse().during(|| format!("read {path}"))
}

/// Brings the loopback device up; it gives itself 127.0.0.1.
pub fn configure_loopback() -> Result<()> {
    let netlink = Netlink::open().during(|| "open a netlink socket".into())?;
    netlink.ask(&link_up(1, None)).during(|| "bring the loopback device up".into())?;
    let mut fixed = vec![INET, 8, 0, HOST_SCOPE];
    fixed.extend(1u32.to_ne_bytes());
    let home = Ipv4Addr::LOCALHOST.octets();
    let message =
        Message::new(NEW_ADDRESS, CREATE_REPLACE, &fixed).attribute(1, &home).attribute(2, &home).finish();
    netlink.ask(&message).during(|| "give the loopback device its address".into())
}

/// Sets up `eth0`.
pub fn configure(network: &GuestNetwork) -> Result<()> {
    let netlink = Netlink::open().during(|| "open a netlink socket".into())?;
    let index = index_of("eth0")?;
    netlink
        .ask(&link_up(index, Some(network.mtu)))
        .during(|| format!("bring eth0 up, mtu {}", network.mtu))?;
    netlink
        .ask(&address(index, network.address))
        .during(|| format!("give eth0 address {}", network.address))?;
    netlink.ask(&neighbour(index, network)).during(|| format!("set the neighbour {}", network.gateway))?;
    netlink
        .ask(&default_route(index, network))
        .during(|| format!("set the default route to {}", network.gateway))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_message_has_the_kernels_layout() {
        let network = GuestNetwork {
            address: Ipv4Addr::new(10, 1, 2, 3),
            gateway: Ipv4Addr::new(169, 254, 1, 1),
            gateway_mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        };
        let route = default_route(2, &network);
        assert_eq!(route.len(), 16 + 12 + 3 * 8);
        assert_eq!(u32::from_ne_bytes(route[..4].try_into().unwrap()) as usize, route.len());
        assert_eq!(&route[28..36], &[8, 0, 5, 0, 169, 254, 1, 1]);
        let neighbour = neighbour(2, &network);
        assert_eq!(neighbour.len(), 16 + 12 + 8 + 12, "six bytes are padded to eight");
    }

    #[test]
    fn acknowledgements() {
        let mut reply = vec![0; 36];
        reply[4] = 2;
        assert!(parse_acknowledgement(&reply).is_ok());
        reply[16..20].copy_from_slice(&(-17i32).to_ne_bytes());
        assert_eq!(parse_acknowledgement(&reply).unwrap_err().raw_os_error(), Some(17));
        assert!(parse_acknowledgement(&[]).is_err());
    }
}
