//! Places on the host that more than one process has to know: who makes them, who writes and who reads.

/// Files of pods that may lie on the disk: hostd makes it for the agent, the runtime reads.
pub const PODS: &str = "/data/pods";

/// Volumes of pods whose content comes from the API server, Secrets among them: in memory, so that nothing of it reaches
/// a disk. init makes it for the agent, the runtime reads.
pub const VOLUMES: &str = "/run/atoll/volumes";

/// The agent's user and group, who own both.
pub const AGENT_UID: u32 = 800;
