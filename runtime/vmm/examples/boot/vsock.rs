//! Vsock sockets, and the frames of `atoll_spec::guest` on them.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

pub const HOST: u32 = 2;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as _;
    (address.svm_cid, address.svm_port) = (cid, port);
    address
}

const BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as _;

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: socket takes no pointers; the result is checked before it is owned.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub fn connect(cid: u32, port: u32) -> io::Result<std::fs::File> {
    let socket = socket()?;
    let to = address(cid, port);
    // SAFETY: the address outlives the call and has the length given.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const to).cast(), BYTES) })?;
    Ok(socket.into())
}

pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let at = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address outlives the call and has the length given.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), BYTES) })?;
    // SAFETY: takes no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 16) })?;
    Ok(socket)
}

/// The connection and the peer's CID.
pub fn accept(listener: &OwnedFd) -> io::Result<(std::fs::File, u32)> {
    let mut peer = address(0, 0);
    let mut bytes = BYTES;
    // SAFETY: address and length outlive the call; the length is that of the address.
    let fd = unsafe { libc::accept(listener.as_raw_fd(), (&raw mut peer).cast(), &raw mut bytes) };
    check(fd)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok((unsafe { std::fs::File::from_raw_fd(fd) }, peer.svm_cid))
}

pub fn write_frame(mut to: impl Write, json: &str) -> io::Result<()> {
    let mut frame = (json.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(json.as_bytes());
    to.write_all(&frame)
}

pub fn read_frame(mut from: impl Read) -> io::Result<String> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > atoll_spec::guest::MAX_FRAME {
        return Err(io::Error::other(format!("a frame of {length} bytes")));
    }
    let mut json = vec![0; length];
    from.read_exact(&mut json)?;
    String::from_utf8(json).map_err(io::Error::other)
}
