//! What the host is: read from the kernel, never from the config.

pub mod network;
pub mod storage;
