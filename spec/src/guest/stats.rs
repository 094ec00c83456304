//! Counters that the guest gives of itself and its containers.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Counters of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// The whole guest.
    pub total: Usage,
    /// Interface counters.
    pub network: NetworkUsage,
    /// By container.
    pub containers: BTreeMap<String, Usage>,
    /// Bytes in each volume on the scratch disk.
    #[serde(default)]
    pub volumes: BTreeMap<String, u64>,
}

/// CPU, memory, processes and writable layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Nanoseconds of CPU time since the start.
    pub cpu_ns: u64,
    /// Bytes in use (`memory.current`).
    pub memory_bytes: u64,
    /// Bytes in use that cannot be reclaimed easily: `memory.current` minus inactive file pages.
    pub working_set_bytes: u64,
    /// Resident anonymous bytes.
    pub rss_bytes: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Major page faults.
    pub major_page_faults: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes in the writable layer.
    pub writable_bytes: u64,
    /// Inodes in the writable layer.
    pub writable_inodes: u64,
}

/// Counters of the network device, from the pod's point of view.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkUsage {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets lost or bad on receipt.
    pub rx_errors: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets lost or bad on sending.
    pub tx_errors: u64,
}
