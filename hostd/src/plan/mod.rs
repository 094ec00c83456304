//! What to do, decided without doing it: `plan(desired, observed)` returns steps, in order. ◇

pub mod network;
pub mod storage;

use std::fmt;

/// A step of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Disks, file systems, directories.
    Storage(storage::Step),
    /// Links, addresses, routes.
    Network(network::Step),
    /// Set the kernel's host name.
    SetHostname(String),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Storage(step) => step.fmt(f),
            Self::Network(step) => step.fmt(f),
            Self::SetHostname(name) => write!(f, "set host name {name}"),
        }
    }
}
