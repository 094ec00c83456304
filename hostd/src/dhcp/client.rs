//! The DHCP client of one link: carries messages between the link and the [`Machine`], and leases to the app.

use super::frame;
use super::machine::{Action, Input, Machine};
use super::packet::{Lease, Message};
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

/// A lease came, was renewed, or went.
#[derive(Debug, Clone)]
pub struct Change {
    /// On which link.
    pub link: u32,
    /// What holds now, and until when; `None` when there is no lease any more.
    pub lease: Option<(Box<Lease>, Option<Instant>)>,
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
    loop {
        let deadline = began + Duration::from_secs_f64(machine.deadline().clamp(0.0, 1e9));
        // Cancel-safe: `receive` reads a packet only when the socket is readable, and returns it in the same poll.
        let input = tokio::select! {
            message = receive(&socket) => Input::Received(message.context("receive from", &link.name)?),
            () = tokio::time::sleep_until(deadline) => Input::Timer,
        };
        for action in machine.step(input, began.elapsed().as_secs_f64()) {
            let lease = match action {
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
                Action::Granted(lease) => {
                    let end = lease.seconds.map(|s| Instant::now() + Duration::from_secs(u64::from(s)));
                    Some((lease, end))
                }
                Action::Lost => None,
            };
            unicast = None;
            if changes.send(Change { link: link.index, lease }).await.is_err() {
                return Ok(());
            }
        }
        // Only kept alive; answers arrive on the packet socket.
        let _held: &Option<UdpSocket> = &unicast;
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
