//! The Atoll microVM runtime: a CRI v1 server.

pub mod images;
