//! The Atoll microVM runtime: a CRI v1 server.
//!
//! ```text
//! CRI RPC ─► cri (translation) ─► Command ─► service (one owner of all state) ─► vm ─► atoll-vmm, guest
//!                                               └► images, volumes, logs, streaming
//! ```
//!
//! Imports point one way, `cri → service → vm`; a lower module answers, or sends on a channel.

pub mod app;
pub mod config;
pub mod console;
pub mod cri;
pub mod error;
pub mod exec;
pub mod images;
pub mod log_file;
pub mod logs;
pub mod notify;
pub mod roots;
pub mod server;
pub mod service;
pub mod spec;
pub mod streaming;
pub mod sys;
pub mod vm;
pub mod volumes;
