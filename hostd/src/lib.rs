//! The Atoll host daemon: machine config to plan to applied state.
//!
//! One direction: `config` reads what a person wants, `observe` what the host is, `plan` compares the two and returns
//! steps (pure), `apply` does them, `status` says how it went. `app` owns all state in one task; links, leases, clock,
//! agent and init report to it as events.

pub mod apply;
pub mod clock;
pub mod config;
pub mod dhcp;
pub mod error;
pub mod fetch;
pub mod files;
pub mod gpt;
pub mod observe;
pub mod plan;
pub mod sntp;
pub mod sys;
