//! The Atoll host daemon: machine config to plan to applied state.
//!
//! One direction: `config` reads what a person wants, `observe` what the host is, `plan` compares the two and returns
//! steps (pure), `apply` does them, `status` says how it went. `host` owns all state in one task; links, leases,
//! clock, agent and init report to it as events.

pub mod advert;
pub mod agent_status;
pub mod app;
pub mod apply;
pub mod boot_reason;
pub mod bus;
pub mod clock;
pub mod config;
pub mod console;
pub mod crash_log;
pub mod dhcp;
pub mod error;
pub mod fetch;
pub mod files;
pub mod gpt;
pub mod host;
pub mod links;
pub mod metrics;
pub mod names;
pub mod notify;
pub mod observe;
pub mod options;
pub mod plan;
pub mod prepare;
pub mod publish;
pub mod routers;
pub mod screen;
pub mod sntp;
pub mod status;
pub mod sys;
