//! What this machine has, and what pods may use of it. Measured once at start.

/// Resources of the machine, and what is kept back from pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Processors, in thousandths.
    pub cpu_millis: u64,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Size of the file system that holds images, scratch disks and logs, in bytes.
    pub storage_bytes: u64,
    /// Most pods.
    pub pods: u32,
    /// Processor time kept for the host, in thousandths.
    pub reserved_cpu_millis: u64,
    /// Memory kept for the host and as eviction threshold, in bytes.
    pub reserved_memory_bytes: u64,
    /// Storage kept free, in bytes.
    pub reserved_storage_bytes: u64,
}

impl Capacity {
    /// Processor time that pods may request, in thousandths.
    pub fn allocatable_cpu_millis(&self) -> u64 {
        self.cpu_millis.saturating_sub(self.reserved_cpu_millis)
    }

    /// Memory that pods may request, in bytes.
    pub fn allocatable_memory_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(self.reserved_memory_bytes)
    }

    /// Storage that pods may request, in bytes.
    pub fn allocatable_storage_bytes(&self) -> u64 {
        self.storage_bytes.saturating_sub(self.reserved_storage_bytes)
    }
}
