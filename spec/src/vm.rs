//! Messages between the runtime and one `atoll-vmm`.
//!
//! Transport: an `AF_UNIX`/`SOCK_SEQPACKET` listener that the runtime makes and passes to the VMM as descriptor
//! 3; the runtime connects to it, so a restarted runtime can connect again. One packet is one JSON message of at
//! most [`MAX_MESSAGE`] bytes; descriptors ride along as `SCM_RIGHTS`. Every request gets exactly one reply, in
//! order. The first request is [`VmRequest::Boot`]; the VMM enters its jail before it answers.

use crate::ids::SandboxId;
use crate::units::{GuestCid, MiB};
use serde::{Deserialize, Serialize};

/// Largest message either side accepts, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Address space of the layer window, in bytes: extents must end at or below it.
pub const LAYER_WINDOW_BYTES: u64 = 1 << 40;

/// Most extents the layer window holds; a block device has at most 255 partitions in Linux (`DISK_MAX_PARTS`).
pub const LAYER_WINDOW_EXTENTS: usize = 255;

/// What a microVM is made of. Descriptors follow in the packet in the order of [`BootFd`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Whose VM this is; for messages only.
    pub sandbox: SandboxId,
    /// Number of virtual processors, 1 to 32.
    pub vcpus: u8,
    /// Guest memory.
    pub memory: MiB,
    /// The guest's vsock address.
    pub cid: GuestCid,
    /// The guest's network device; `None` leaves it without one.
    pub mac: Option<[u8; 6]>,
    /// Kernel command line, without the devices, which the VMM adds.
    pub cmdline: String,
    /// Descriptors in the packet, in this order.
    pub fds: Vec<BootFd>,
    /// User and group the VMM turns into before the guest runs; `None` only for tests.
    pub uid: Option<u32>,
}

/// What a descriptor sent with [`VmRequest::Boot`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootFd {
    /// `/dev/kvm`.
    Kvm,
    /// The guest kernel, an uncompressed ELF file.
    Kernel,
    /// The guest's initramfs.
    Initramfs,
    /// `/dev/vhost-vsock`.
    VhostVsock,
    /// `/dev/vhost-net`; present exactly when `mac` is.
    VhostNet,
    /// The tap device, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`; present exactly when `mac` is.
    Tap,
    /// The scratch disk, a raw file opened read-write.
    Scratch,
    /// Where the guest's serial console goes (append, bounded by the VMM); absent means no console.
    Console,
}

/// Requests to the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum VmRequest {
    /// Build the machine, enter the jail, run it. Once only.
    Boot(Box<VmSpec>),
    /// Map the file passed with the packet into the layer window, read-only, for the life of the VM.
    MapLayer {
        /// Where it starts, in bytes; a multiple of 4096.
        offset: u64,
        /// Its length in bytes, rounded up to 4096; what lies past the end of the file reads as zeros.
        length: u64,
    },
    /// Stop the virtual processors where they are.
    Pause,
    /// Let them go on.
    Resume,
    /// Counters since the start.
    Stats,
    /// Kill the machine now; the process exits after its answer.
    Kill,
}

/// Replies of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum VmReply {
    /// Done.
    Ok,
    /// Answer to [`VmRequest::Stats`].
    Stats(VmStats),
    /// Not done, and why: operation, object, remedy.
    Error {
        /// One line.
        message: String,
    },
}

/// Counters of one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStats {
    /// Exits to the VMM, by class (`io`, `mmio-read`, `mmio-write`, `hlt`, …).
    pub exits: std::collections::BTreeMap<String, u64>,
    /// Bytes read from and written to the block devices.
    pub block_read_bytes: u64,
    /// See `block_read_bytes`.
    pub block_written_bytes: u64,
    /// Bytes of guest memory that the guest reported as free and the host took back.
    #[serde(default)]
    pub memory_returned_bytes: u64,
    /// Microseconds of the VMM's monotonic clock from its start, by launch step.
    pub launch_us: Vec<(String, u64)>,
}

/// Exit status of the VMM process.
pub mod exit {
    /// The guest reset its machine, or [`super::VmRequest::Kill`] was obeyed. A guest has no other way to power off; its
    /// kernel ends the same way after a panic, so whether it was meant is known by whether it was asked for.
    pub const GUEST_STOPPED: i32 = 0;
    /// The VMM could not build or run the machine; the reason is on stderr.
    pub const VMM_FAILED: i32 = 1;
    /// The guest crashed (triple fault, shutdown exit).
    pub const GUEST_CRASHED: i32 = 2;
}
