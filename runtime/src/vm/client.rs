//! The runtime's end of a VMM's control socket: one JSON packet per message, descriptors beside it.
//!
//! Called by `vm::launch` (boot), `vm::pod` (layers, statistics, kill) and `service::recover` (reconnect). Invariant:
//! one request is in flight at a time, and each gets one reply within its deadline; after a failure the connection
//! is not used again: the next request opens another, on which no reply to an earlier one can come.

use crate::error::{Error, Result, within};
use atoll_spec::ids::SandboxId;
use atoll_spec::vm::{MAX_MESSAGE, VmReply, VmRequest, VmStats};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

/// Most descriptors in one packet.
const MAX_FDS: usize = 16;

/// Makes the socket that a VMM listens on; its descriptor 3.
pub fn listen(path: &Path) -> Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", path)(e)),
        _ => {}
    }
    let make = || -> io::Result<OwnedFd> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 8)?;
        Ok(socket)
    };
    make().map_err(Error::io("listen on", path))
}

/// A connection to one VMM.
pub struct VmmClient {
    sandbox: SandboxId,
    path: PathBuf,
    /// `None` after a failure, and while a request is in flight.
    socket: Mutex<Option<AsyncFd<OwnedFd>>>,
}

impl VmmClient {
    /// Connects; the listener exists already, so this does not wait.
    pub fn connect(sandbox: &SandboxId, path: &Path) -> Result<Self> {
        let socket = Mutex::new(Some(open(path)?));
        Ok(Self { sandbox: sandbox.clone(), path: path.to_owned(), socket })
    }

    /// Sends a request and waits for its reply. A caller that stops waiting gives the connection up, not the client.
    pub async fn call(
        &self,
        request: &VmRequest,
        fds: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<VmReply> {
        let mut slot = self.socket.lock().await;
        let socket = match slot.take() {
            Some(socket) => socket,
            None => open(&self.path)?,
        };
        let message = serde_json::to_vec(request).map_err(|e| self.lost(&e.to_string()))?;
        let work = async {
            send(&socket, &message, fds).await?;
            receive(&socket).await
        };
        let what = || format!("VMM of sandbox {}", self.sandbox);
        let bytes = within(deadline, what, work).await?.map_err(|e| self.lost(&e.to_string()))?;
        *slot = Some(socket);
        serde_json::from_slice(&bytes).map_err(|e| self.lost(&format!("unreadable reply: {e}")))
    }

    /// [`VmmClient::call`] for requests that are answered by `Ok`.
    pub async fn order(&self, request: &VmRequest, fds: &[BorrowedFd<'_>], deadline: Duration) -> Result<()> {
        match self.call(request, fds, deadline).await? {
            VmReply::Ok => Ok(()),
            VmReply::Error { message } => Err(self.refused(message)),
            VmReply::Stats(_) => Err(self.lost("unexpected reply")),
        }
    }

    /// Counters of the VMM.
    pub async fn stats(&self, deadline: Duration) -> Result<VmStats> {
        match self.call(&VmRequest::Stats, &[], deadline).await? {
            VmReply::Stats(stats) => Ok(stats),
            VmReply::Error { message } => Err(self.refused(message)),
            VmReply::Ok => Err(self.lost("unexpected reply")),
        }
    }

    fn refused(&self, why: String) -> Error {
        Error::Step {
            operation: "run the virtual machine of",
            object: format!("sandbox {}", self.sandbox),
            why,
        }
    }

    fn lost(&self, why: &str) -> Error {
        Error::Lost { sandbox: self.sandbox.to_string(), why: why.to_owned() }
    }
}

fn open(path: &Path) -> Result<AsyncFd<OwnedFd>> {
    let make = || -> io::Result<AsyncFd<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        crate::sys::watch_fd(socket)
    };
    make().map_err(Error::io("connect to", path))
}

async fn send(socket: &AsyncFd<OwnedFd>, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if message.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "request too large"));
    }
    loop {
        let mut ready = socket.writable().await?;
        let sent = ready.try_io(|socket| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let iov = [io::IoSlice::new(message)];
            Ok(rustix::net::sendmsg(socket.get_ref().as_fd(), &iov, &mut control, SendFlags::NOSIGNAL)?)
        });
        if let Ok(result) = sent {
            return result.map(|_| ());
        }
    }
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; MAX_MESSAGE];
    loop {
        let mut ready = socket.readable().await?;
        let received = ready.try_io(|socket| {
            Ok(rustix::net::recv(socket.get_ref().as_fd(), &mut buffer[..], RecvFlags::empty())?.0)
        });
        match received {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(length)) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Ok(Err(e)) => return Err(e),
            Err(_would_block) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_that_was_given_up_spoils_no_later_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmm.sock");
        let listener = listen(&path).unwrap();
        let (asked, mut is_asked) = tokio::sync::mpsc::channel(1);
        let vmm = std::thread::spawn(move || {
            let next = || {
                let peer = rustix::net::accept(&listener).unwrap();
                let mut buffer = vec![0u8; MAX_MESSAGE];
                assert!(rustix::net::recv(&peer, &mut buffer[..], RecvFlags::empty()).unwrap().0 > 0);
                peer
            };
            let answer = |peer: &OwnedFd, reply: &VmReply| {
                rustix::net::send(peer, &serde_json::to_vec(reply).unwrap(), SendFlags::NOSIGNAL)
            };
            let given_up = next();
            asked.blocking_send(()).unwrap();
            let peer = next();
            let _ = answer(&given_up, &VmReply::Ok); // nobody may be there to take it
            answer(&peer, &VmReply::Stats(VmStats::default())).unwrap();
        });
        let sandbox = "ab".repeat(32).parse().unwrap();
        let client = VmmClient::connect(&sandbox, &path).unwrap();
        let deadline = Duration::from_secs(20);
        tokio::select! {
            _ = client.stats(deadline) => panic!("nobody has answered"),
            asked = is_asked.recv() => asked.unwrap(),
        }
        client.stats(deadline).await.unwrap();
        vmm.join().unwrap();
    }
}
