//! The program from outside: what it answers, says and exits with before there is a machine. No KVM is needed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use atoll_spec::vm::{BootFd, VmReply, VmRequest, VmSpec, exit};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, bind, connect, listen, recv, send, sendmsg, socket_with, sockopt,
};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Vmm {
    child: Child,
    address: SocketAddrUnix,
    _directory: tempfile::TempDir,
}

fn socket(kind: SocketType) -> OwnedFd {
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    let bound = Some(Duration::from_secs(20));
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, bound).unwrap();
    socket
}

/// Starts the program with `descriptor` as its control socket.
fn start(descriptor: &OwnedFd) -> Child {
    let raw = descriptor.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-vmm"));
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: between fork and exec only dup2 and fcntl are called, which are safe there.
    unsafe {
        command.pre_exec(move || {
            // Duplicating a descriptor onto itself would leave it closing at exec.
            let done = if raw == 3 { libc::fcntl(3, libc::F_SETFD, 0) } else { libc::dup2(raw, 3) };
            if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    command.spawn().unwrap()
}

fn vmm() -> Vmm {
    let directory = tempfile::tempdir().unwrap();
    let address = SocketAddrUnix::new(directory.path().join("control.sock")).unwrap();
    let listener = socket(SocketType::SEQPACKET);
    bind(&listener, &address).unwrap();
    listen(&listener, 8).unwrap();
    Vmm { child: start(&listener), address, _directory: directory }
}

impl Vmm {
    fn connect(&self) -> OwnedFd {
        let peer = socket(SocketType::SEQPACKET);
        connect(&peer, &self.address).unwrap();
        peer
    }

    /// Waits for the end; returns the exit code and what was said on stderr.
    fn end(mut self) -> (Option<i32>, String) {
        end(&mut self.child)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn end(child: &mut Child) -> (Option<i32>, String) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "the program does not end");
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.code(), said)
}

fn reply(peer: &OwnedFd) -> Option<VmReply> {
    let mut buffer = vec![0; 65536];
    let (bytes, _) = recv(peer, &mut buffer[..], RecvFlags::empty()).ok()?;
    (bytes > 0).then(|| serde_json::from_slice(&buffer[..bytes]).unwrap())
}

fn ask(peer: &OwnedFd, request: &VmRequest, fds: &[BorrowedFd<'_>]) -> Option<VmReply> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let json = serde_json::to_vec(request).unwrap();
    sendmsg(peer, &[IoSlice::new(&json)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    reply(peer)
}

fn message(reply: Option<VmReply>) -> String {
    match reply {
        Some(VmReply::Error { message }) => message,
        other => panic!("no error but {other:?}"),
    }
}

fn spec(fds: Vec<BootFd>) -> VmSpec {
    serde_json::from_value(serde_json::json!({
        "sandbox": "s", "vcpus": 1, "memory": 128, "cid": 3, "mac": null, "cmdline": "", "fds": fds, "uid": null
    }))
    .unwrap()
}

fn boot(spec: VmSpec) -> VmRequest {
    VmRequest::Boot(Box::new(spec))
}

#[test]
fn before_the_boot_every_other_request_is_refused_and_nothing_ends() {
    let vmm = vmm();
    let peer = vmm.connect();
    for request in
        [VmRequest::Stats, VmRequest::Pause, VmRequest::Kill, VmRequest::MapLayer { offset: 0, length: 1 }]
    {
        assert!(message(ask(&peer, &request, &[])).contains("not booted"), "{request:?}");
    }
    send(&peer, b"{\"request\":\"dance\"}", SendFlags::NOSIGNAL).unwrap();
    assert!(message(reply(&peer)).contains("cannot read the request"));
    send(&peer, &[b' '; 65537][..], SendFlags::NOSIGNAL).unwrap();
    assert!(message(reply(&peer)).contains("cut"));
    drop(peer);
    assert!(
        message(ask(&vmm.connect(), &VmRequest::Stats, &[])).contains("not booted"),
        "a new connection is served"
    );
}

#[test]
fn connections_are_bounded_and_the_newest_is_served() {
    let vmm = vmm();
    let peers: Vec<_> = (0..6).map(|_| vmm.connect()).collect();
    assert!(ask(&peers[5], &VmRequest::Stats, &[]).is_some());
    assert!(reply(&peers[0]).is_none(), "the oldest was pushed out");
}

#[test]
fn too_many_descriptors_are_refused() {
    let vmm = vmm();
    let peer = vmm.connect();
    let file = tempfile::tempfile().unwrap();
    let fds: Vec<_> = (0..20).map(|_| file.as_fd()).collect();
    assert!(message(ask(&peer, &VmRequest::Stats, &fds)).contains("16 descriptors"));
}

#[test]
fn a_boot_that_cannot_succeed_is_answered_said_and_ends() {
    let needed = vec![BootFd::Kvm, BootFd::Kernel, BootFd::Initramfs, BootFd::VhostVsock];
    let cases = [
        (spec(vec![]), 0, "Kvm"),
        (spec(needed.clone()), 3, "4 descriptors are named, 3 were sent"),
        (VmSpec { vcpus: 33, ..spec(needed.clone()) }, 4, "33 processors"),
        (VmSpec { uid: Some(0), ..spec(needed.clone()) }, 4, "user of its own"),
        (spec(needed), 4, "not KVM"),
    ];
    for (spec, count, expected) in cases {
        let vmm = vmm();
        let file = tempfile::tempfile().unwrap();
        let fds: Vec<_> = (0..count).map(|_| file.as_fd()).collect();
        let answer = message(ask(&vmm.connect(), &boot(spec), &fds));
        assert!(answer.contains(expected), "{answer}");
        let (code, said) = vmm.end();
        assert_eq!(code, Some(exit::VMM_FAILED));
        assert_eq!(said, format!("atoll-vmm: {answer}\n"), "one line, the same");
    }
}

#[test]
fn without_a_listening_socket_it_says_what_it_needs() {
    let connected = socket(SocketType::SEQPACKET);
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    for descriptor in [connected, file] {
        let mut child = start(&descriptor);
        let (code, said) = end(&mut child);
        assert_eq!(code, Some(exit::VMM_FAILED));
        assert!(said.contains("descriptor 3") && said.lines().count() == 1, "{said}");
    }
}
