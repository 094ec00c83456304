//! The system calls for which no safe wrapper exists: packet sockets, partition resizing, clock adjustment.
//!
//! Everything else goes through rustix. Nothing here decides anything.

use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn link_address(index: u32, protocol: libc::c_int, destination: [u8; 6]) -> libc::sockaddr_ll {
    // SAFETY: `sockaddr_ll` is plain data for which all zeros is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (protocol as u16).to_be();
    address.sll_ifindex = index as i32;
    address.sll_halen = 6;
    address.sll_addr[..6].copy_from_slice(&destination);
    address
}

fn op(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// A socket that sees the IPv4/UDP packets to `port` that arrive on one link, also before it has an address.
/// Non-blocking. Packets begin at the IP header.
pub fn packet_socket(link: u32, port: u16) -> io::Result<OwnedFd> {
    let program = [
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 9), // protocol
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 6, 17),
        op(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, 6), // fragment offset
        op(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 4, 0, 0x1fff),
        op(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0, 0, 0), // header length
        op(libc::BPF_LD | libc::BPF_H | libc::BPF_IND, 0, 0, 2),  // destination port
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, u32::from(port)),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0xffff),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    filtered_socket(link, libc::ETH_P_IP, program)
}

/// A socket that sees the ARP packets that arrive on one link. Non-blocking.
pub fn arp_socket(link: u32) -> io::Result<OwnedFd> {
    filtered_socket(link, libc::ETH_P_ARP, [op(libc::BPF_RET | libc::BPF_K, 0, 0, 0xffff)])
}

/// A socket that sees what IPv6 routers advertise on one link. Non-blocking. Packets begin at the IP header.
pub fn advert_socket(link: u32) -> io::Result<OwnedFd> {
    let program = [
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 6), // next header: ICMPv6
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 3, 58),
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 40), // its type
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, 134),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0xffff),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    filtered_socket(link, libc::ETH_P_IPV6, program)
}

fn filtered_socket<const N: usize>(
    link: u32,
    protocol: libc::c_int,
    mut program: [libc::sock_filter; N],
) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers are passed. Protocol 0: nothing is received before the filter is in place and `bind` says so.
    let raw = check(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
    // SAFETY: `raw` was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let filter = libc::sock_fprog { len: N as u16, filter: program.as_mut_ptr() };
    // SAFETY: `filter` points to `program`, which outlives the call; the kernel copies it.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as u32,
        )
    })?;
    bind_to_link(&socket, link, protocol)?;
    Ok(socket)
}

fn bind_to_link(socket: &OwnedFd, link: u32, protocol: libc::c_int) -> io::Result<()> {
    let address = link_address(link, protocol, [0; 6]);
    // SAFETY: `address` is a whole `sockaddr_ll` and its size is given.
    check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
    })
    .map(drop)
}

/// Sends an IPv4 packet to everyone on a link.
pub fn send_broadcast(socket: BorrowedFd<'_>, link: u32, packet: &[u8]) -> io::Result<()> {
    send(socket, link_address(link, libc::ETH_P_IP, [0xff; 6]), packet)
}

/// Sends an ARP packet to everyone on a link.
pub fn send_arp(socket: BorrowedFd<'_>, link: u32, packet: &[u8]) -> io::Result<()> {
    send(socket, link_address(link, libc::ETH_P_ARP, [0xff; 6]), packet)
}

/// Sends an IPv6 packet to all routers on a link.
pub fn send_to_routers(socket: BorrowedFd<'_>, link: u32, packet: &[u8]) -> io::Result<()> {
    send(socket, link_address(link, libc::ETH_P_IPV6, [0x33, 0x33, 0, 0, 0, 2]), packet)
}

fn send(socket: BorrowedFd<'_>, address: libc::sockaddr_ll, packet: &[u8]) -> io::Result<()> {
    // SAFETY: both pointers are to live values whose sizes are given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets a socket use one link only.
pub fn bind_to_device(socket: &OwnedFd, link: &str) -> io::Result<()> {
    // SAFETY: the pointer is to `link`, whose length is given; the kernel copies it.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            link.as_ptr().cast(),
            link.len() as u32,
        )
    })
    .map(drop)
}

const BLKPG: libc::Ioctl = 0x1269;
const BLKPG_RESIZE_PARTITION: libc::c_int = 3;

#[repr(C)]
struct BlkpgPartition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

#[repr(C)]
struct BlkpgRequest {
    operation: libc::c_int,
    flags: libc::c_int,
    data_length: libc::c_int,
    data: *mut BlkpgPartition,
}

/// Tells the kernel that a partition of `disk` has a new length. It may be in use. Both in bytes.
pub fn resize_partition(disk: &File, number: u32, start: u64, length: u64) -> io::Result<()> {
    let mut partition = BlkpgPartition {
        start: start as i64,
        length: length as i64,
        number: number as i32,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let mut request = BlkpgRequest {
        operation: BLKPG_RESIZE_PARTITION,
        flags: 0,
        data_length: size_of::<BlkpgPartition>() as i32,
        data: &raw mut partition,
    };
    // SAFETY: BLKPG reads one `blkpg_ioctl_arg`, whose `data` points to a live `blkpg_partition` of the given size.
    check(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw mut request) }).map(drop)
}

/// Moves the clock by `seconds` gradually and tells the kernel that it is right, so that it also sets the RTC.
pub fn slew_clock(seconds: f64, poll_exponent: u8) -> io::Result<()> {
    // SAFETY: `timex` is plain data for which all zeros is a valid value.
    let mut timex: libc::timex = unsafe { zeroed() };
    timex.modes = libc::ADJ_OFFSET
        | libc::ADJ_STATUS
        | libc::ADJ_NANO
        | libc::ADJ_TIMECONST
        | libc::ADJ_MAXERROR
        | libc::ADJ_ESTERROR;
    timex.status = libc::STA_PLL | libc::STA_NANO;
    timex.offset = (seconds.clamp(-0.5, 0.5) * 1e9) as i64;
    timex.constant = i64::from(poll_exponent.saturating_sub(4));
    // SAFETY: `timex` is a live, whole value.
    check(unsafe { libc::adjtimex(&raw mut timex) }).map(drop)
}
