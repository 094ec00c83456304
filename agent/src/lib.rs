//! The Atoll node agent: pods to CRI calls.
//!
//! Flow: `config` (flags and hostd's file) → `join` (a client certificate) → `app` (owns every task) → `node`
//! (registration, lease, status), `pods` (watch → desired → plan → apply → status) and `kubelet_api` (logs, exec).

pub mod api_client;
pub mod app;
pub mod config;
pub mod cri;
pub mod error;
pub mod events;
pub mod exchange;
pub mod join;
pub mod kubelet_api;
pub mod node;
pub mod notify;
pub mod patience;
pub mod pods;
pub mod probes;
pub mod report;
pub mod volumes;

pub use error::{Error, Result};
