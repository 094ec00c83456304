//! The Atoll host daemon: machine config to plan to applied state.
//!
//! One direction: `config` reads what a person wants, `observe` what the host is, `plan` compares the two and returns
//! steps (pure), `apply` does them, `status` says how it went. `app` owns all state in one task; links, leases, clock,
//! agent and init report to it as events.

pub mod dhcp;
pub mod error;
pub mod gpt;
pub mod plan;
pub mod sys;
