//! The DHCP client of one link: carries messages between the link and the [`Machine`], and leases to the app.

use super::machine::{Action, Input, Machine};
use super::packet::{Lease, Message};
use super::{arp, frame};
use crate::error::{Context, Result};
use crate::sys;
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// The link a client works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
}

/// Something changed on a link.
#[derive(Debug, Clone)]
pub struct Change {
    /// On which link.
    pub link: u32,
    /// What.
    pub news: News,
}

/// What changed.
#[derive(Debug, Clone)]
pub enum News {
    /// A lease came or was renewed, and holds until then.
    Held(Box<Lease>, Option<Instant>),
    /// There is no lease any more.
    Lost,
    /// The server gave an address that somebody has: what to tell.
    Taken(String),
}

/// Runs a client until the task is dropped, or the link goes away.
pub async fn run(link: Link, hostname: Option<String>, changes: mpsc::Sender<Change>) -> Result<()> {
    let raw =
        sys::packet_socket(link.index, frame::CLIENT_PORT).context("open a DHCP socket on", &link.name)?;
    // Not UDP to the kernel, but `UdpSocket` only waits and calls recv(2), which is the same for a packet socket.
    let socket = UdpSocket::from_std(raw.into()).context("watch the DHCP socket of", &link.name)?;
    let began = Instant::now();
    let mut machine = Machine::new(link.mac, hostname, seed(), 0.0);
    // Held while a renewal is on its way: with it, the kernel does not answer the server with "port unreachable".
    let mut unicast = None;
    // Open while an address is probed.
    let mut probes = None;
    loop {
        let deadline = began + Duration::from_secs_f64(machine.deadline().clamp(0.0, 1e9));
        // Cancel-safe: `receive` and `owner` read a packet only when the socket is readable, and return it in the same
        // poll.
        let input = tokio::select! {
            message = receive(&socket) => Input::Received(message.context("receive from", &link.name)?),
            by = owner(&probes, &link, machine.probed()) => Input::Taken(by.context("receive from", &link.name)?),
            () = tokio::time::sleep_until(deadline) => Input::Timer,
        };
        for action in machine.step(input, began.elapsed().as_secs_f64()) {
            let news = match action {
                Action::Broadcast(message) => {
                    let packet = frame::broadcast(&message.encode());
                    if let Err(error) = sys::send_broadcast(socket.as_fd(), link.index, &packet) {
                        // The link may be down for now; the machine tries again.
                        tracing::debug!(link = link.name, %error, "DHCP message not sent");
                    }
                    continue;
                }
                Action::Unicast(server, message) => {
                    unicast = send_unicast(&link, server, &message).await;
                    continue;
                }
                Action::Probe(address) => {
                    send_probe(&link, address, &mut probes);
                    continue;
                }
                Action::Conflict(lease, by, pause) => News::Taken(conflict(&lease, by, pause)),
                Action::Granted(lease) => {
                    let end = lease.seconds.map(|s| Instant::now() + Duration::from_secs(u64::from(s)));
                    News::Held(lease, end)
                }
                Action::Lost => News::Lost,
            };
            unicast = None;
            if changes.send(Change { link: link.index, news }).await.is_err() {
                return Ok(());
            }
        }
        if machine.probed().is_none() {
            probes = None;
        }
        // Only kept alive; answers arrive on the packet socket.
        let _held: &Option<UdpSocket> = &unicast;
    }
}

fn conflict(lease: &Lease, by: [u8; 6], pause: u32) -> String {
    let by: Vec<String> = by.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "the DHCP server {} gave the address {}, which {} has already: declined, and asked again after {pause} s; give that \
         machine another address, or take it out of the server's range",
        lease.server,
        lease.address.addr(),
        by.join(":")
    )
}

/// A link on which nothing can be probed gets its address without.
fn send_probe(link: &Link, address: Ipv4Addr, probes: &mut Option<UdpSocket>) {
    let sent = (|| {
        let socket = match probes.take() {
            Some(socket) => socket,
            None => UdpSocket::from_std(sys::arp_socket(link.index)?.into())?,
        };
        let socket = probes.insert(socket);
        sys::send_arp(socket.as_fd(), link.index, &arp::probe(link.mac, address))
    })();
    if let Err(error) = sent {
        tracing::debug!(link = link.name, %address, %error, "not probed");
    }
}

/// Waits for somebody who has the address that is probed.
async fn owner(
    probes: &Option<UdpSocket>,
    link: &Link,
    address: Option<Ipv4Addr>,
) -> std::io::Result<[u8; 6]> {
    let (Some(socket), Some(address)) = (probes, address) else { return std::future::pending().await };
    let mut buffer = [0; 64];
    loop {
        match socket.recv(&mut buffer).await {
            Ok(length) => {
                if let Some(by) = arp::owner(&buffer[..length], link.mac, address) {
                    return Ok(by);
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
            Err(error) => return Err(error),
        }
    }
}

fn seed() -> u32 {
    let mut bytes = [0; 4];
    // Without random numbers the transaction id is a constant: worse, yet no reason to stay without an address.
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(4) => u32::from_ne_bytes(bytes),
        _ => 0x41_74_6f_6c,
    }
}

async fn receive(socket: &UdpSocket) -> std::io::Result<Message> {
    let mut buffer = [0; 1600];
    loop {
        match socket.recv(&mut buffer).await {
            Ok(length) => {
                if let Some(message) = frame::payload(&buffer[..length]).and_then(Message::parse) {
                    return Ok(message);
                }
            }
            // The link went down; what comes after it is up again matters.
            Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
            Err(error) => return Err(error),
        }
    }
}

async fn send_unicast(link: &Link, server: Ipv4Addr, message: &Message) -> Option<UdpSocket> {
    let sent = async {
        let raw = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        sockopt::set_socket_reuseaddr(&raw, true)?;
        sys::bind_to_device(&raw, &link.name)?;
        let socket = std::net::UdpSocket::from(raw);
        rustix::net::bind(&socket, &std::net::SocketAddrV4::new(message.ciaddr, frame::CLIENT_PORT))?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        socket.send_to(&message.encode(), (server, frame::SERVER_PORT)).await?;
        std::io::Result::Ok(socket)
    };
    // A renewal that cannot be sent now is sent again by the machine, later to every server.
    sent.await.inspect_err(|error| tracing::debug!(link = link.name, %error, "DHCP renewal not sent")).ok()
}
