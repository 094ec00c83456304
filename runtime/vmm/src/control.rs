//! The control socket: descriptor 3, a listening `SOCK_SEQPACKET` socket that the runtime made (atoll_spec::vm says what
//! goes over it). The only place where requests become calls on the machine.
//!
//! ```text
//! waiting for Boot (deadline) ──► serving ──► the machine ended, or Kill: process exits
//! ```
//!
//! The runtime may go away and come back: connections end, the listener stays. Bounded: at most [`MAX_PEERS`]
//! connections (a new one pushes out the oldest), one packet at a time of at most `MAX_MESSAGE` bytes, and a peer that
//! does not read its answers is dropped, never waited for.

use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::vcpu::End;
use atoll_spec::vm::{MAX_MESSAGE, VmReply, VmRequest, VmSpec, exit};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketFlags, accept_with,
    recvmsg, send, sockopt,
};
use std::collections::VecDeque;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Most connections at a time.
const MAX_PEERS: usize = 4;
/// How long the first request may take.
const BOOT_DEADLINE: Duration = Duration::from_secs(30);
/// Most descriptors in a packet.
const MAX_FDS: usize = 16;

/// The listener and who has connected.
pub struct Server {
    listener: OwnedFd,
    peers: VecDeque<OwnedFd>,
    buffer: Vec<u8>,
}

/// A packet: a request, or why it is none.
pub(crate) struct Packet {
    pub(crate) request: std::result::Result<VmRequest, String>,
    fds: Vec<OwnedFd>,
}

/// A boot request, to be answered with [`Server::answer_boot`].
pub struct Boot {
    /// The machine asked for.
    pub spec: VmSpec,
    /// Its descriptors, in the order of `spec.fds`.
    pub fds: Vec<OwnedFd>,
    peer: OwnedFd,
}

/// What woke the server.
enum Woken {
    Packet(usize, Packet),
    Ended,
    Deadline,
}

impl Server {
    /// Takes over a listening socket.
    pub fn new(listener: OwnedFd) -> Result<Self> {
        let listening =
            sockopt::socket_acceptconn(&listener).map_err(|error| Error::NoListener(error.into()))?;
        let kind = sockopt::socket_type(&listener).map_err(|error| Error::NoListener(error.into()))?;
        if !listening || kind != rustix::net::SocketType::SEQPACKET {
            return Err(Error::NoListener(Errno::INVAL.into()));
        }
        Ok(Self { listener, peers: VecDeque::new(), buffer: vec![0; MAX_MESSAGE] })
    }

    /// Waits for the boot request. Everything else is answered with an error meanwhile.
    pub fn wait_for_boot(&mut self) -> Result<Boot> {
        let until = Instant::now() + BOOT_DEADLINE;
        loop {
            match self.wait(None, Some(until))? {
                Woken::Packet(at, packet) => match packet.request {
                    Ok(VmRequest::Boot(spec)) => {
                        if let Some(peer) = self.peers.remove(at) {
                            return Ok(Boot { spec: *spec, fds: packet.fds, peer });
                        }
                    }
                    Ok(_) => {
                        self.answer(at, &error("the machine is not booted yet: send a boot request first"))
                    }
                    Err(message) => self.answer(at, &VmReply::Error { message }),
                },
                Woken::Ended | Woken::Deadline => {
                    return Err(Error::NoBoot { seconds: BOOT_DEADLINE.as_secs() });
                }
            }
        }
    }

    /// Answers the boot request and keeps its connection.
    pub fn answer_boot(&mut self, peer: OwnedFd, reply: &VmReply) {
        self.admit(peer);
        self.answer(self.peers.len() - 1, reply);
    }

    /// Serves requests until the machine has ended; returns the exit status of the process and a line for stderr.
    pub fn serve(&mut self, machine: &Machine) -> Result<(i32, Option<String>)> {
        loop {
            match self.wait(Some(machine), None)? {
                Woken::Ended => match machine.end() {
                    Some(End::Stopped) => return Ok((exit::GUEST_STOPPED, None)),
                    Some(End::Crashed) => return Ok((exit::GUEST_CRASHED, None)),
                    Some(End::Failed(reason)) => return Ok((exit::VMM_FAILED, Some(reason))),
                    None => {}
                },
                Woken::Packet(at, packet) => match self.handle(packet, machine) {
                    Some(reply) => self.answer(at, &reply),
                    None => {
                        self.answer(at, &VmReply::Ok);
                        return Ok((exit::GUEST_STOPPED, None));
                    }
                },
                Woken::Deadline => {}
            }
        }
    }

    /// Does one request; `None` after [`VmRequest::Kill`].
    fn handle(&self, packet: Packet, machine: &Machine) -> Option<VmReply> {
        let Packet { request, fds } = packet;
        Some(match request {
            Ok(VmRequest::Boot(_)) => error("the machine is booted already: one process runs one machine"),
            Ok(VmRequest::MapLayer { offset, length }) => match <[OwnedFd; 1]>::try_from(fds) {
                Ok([fd]) => answer_of(machine.layers().map(offset, length, File::from(fd))),
                Err(fds) => error(&format!("a layer comes with one descriptor, not {}", fds.len())),
            },
            Ok(VmRequest::Pause) => answer_of(machine.pause()),
            Ok(VmRequest::Resume) => {
                machine.resume();
                VmReply::Ok
            }
            Ok(VmRequest::Stats) => VmReply::Stats(machine.stats()),
            Ok(VmRequest::Kill) => return None,
            Err(message) => VmReply::Error { message },
        })
    }

    /// Waits for a packet, for the machine's end or for the deadline; accepts connections meanwhile.
    fn wait(&mut self, machine: Option<&Machine>, until: Option<Instant>) -> Result<Woken> {
        loop {
            let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
            if timeout.is_some_and(|left| left.is_zero()) {
                return Ok(Woken::Deadline);
            }
            let (accepting, ended, ready) = self.poll(machine, timeout)?;
            if ended {
                return Ok(Woken::Ended);
            }
            if let Some(at) = ready {
                match receive(&self.peers[at], &mut self.buffer) {
                    Ok(Some(packet)) => return Ok(Woken::Packet(at, packet)),
                    // Gone, or broken: the runtime connects again.
                    Ok(None) | Err(_) => drop(self.peers.remove(at)),
                }
            } else if accepting {
                // A connection that was given up meanwhile is none.
                if let Ok(peer) = accept_with(&self.listener, SocketFlags::CLOEXEC) {
                    self.admit(peer);
                }
            }
        }
    }

    /// (Somebody connects, the machine has ended, this peer has something.)
    fn poll(
        &self,
        machine: Option<&Machine>,
        timeout: Option<Duration>,
    ) -> Result<(bool, bool, Option<usize>)> {
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
        fds.extend(self.peers.iter().map(|peer| PollFd::new(peer, PollFlags::IN)));
        if let Some(machine) = machine {
            // SAFETY: the machine outlives the call, and with it the event.
            let event = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(machine.ended())) };
            fds.push(PollFd::from_borrowed_fd(event, PollFlags::IN));
        }
        let timeout = timeout
            .map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok((false, false, None)),
            Err(error) => return Err(Error::system("wait for requests")(error)),
        }
        let woken = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        let peers = self.peers.len();
        Ok((woken(0), woken(peers + 1), (0..peers).find(|at| woken(at + 1))))
    }

    fn admit(&mut self, peer: OwnedFd) {
        if self.peers.len() >= MAX_PEERS {
            self.peers.pop_front();
        }
        self.peers.push_back(peer);
    }

    fn answer(&mut self, at: usize, reply: &VmReply) {
        let Some(peer) = self.peers.get(at) else { return };
        let bytes = serde_json::to_vec(reply).unwrap_or_default();
        if send(peer, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_err() {
            self.peers.remove(at);
        }
    }
}

impl Boot {
    /// Takes the connection, to answer on.
    pub fn into_parts(self) -> (VmSpec, Vec<OwnedFd>, OwnedFd) {
        (self.spec, self.fds, self.peer)
    }
}

fn error(message: &str) -> VmReply {
    VmReply::Error { message: message.to_owned() }
}

fn answer_of<E: std::fmt::Display>(result: std::result::Result<(), E>) -> VmReply {
    match result {
        Ok(()) => VmReply::Ok,
        Err(reason) => error(&reason.to_string()),
    }
}

/// One packet; `None` at the end of the connection.
pub(crate) fn receive(peer: &OwnedFd, buffer: &mut [u8]) -> rustix::io::Result<Option<Packet>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = match recvmsg(peer, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags) {
        Ok(message) => message,
        Err(Errno::AGAIN | Errno::INTR) => {
            return Ok(Some(Packet {
                request: Err("the packet vanished: send it again".into()),
                fds: vec![],
            }));
        }
        Err(error) => return Err(error),
    };
    let fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let cut = message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    if message.bytes == 0 && !cut {
        return Ok(None);
    }
    let request = if cut {
        Err(format!("the request is cut: send at most {MAX_MESSAGE} bytes and {MAX_FDS} descriptors"))
    } else {
        serde_json::from_slice(&buffer[..message.bytes])
            .map_err(|error| format!("cannot read the request: {error}"))
    };
    Ok(Some(Packet { request, fds }))
}
