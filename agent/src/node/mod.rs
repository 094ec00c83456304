//! The node object: registration, lease, status, capacity.

pub mod capacity;
