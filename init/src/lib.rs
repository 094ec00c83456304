//! PID 1 of the Atoll host.
//!
//! Power-on to power-off in one process: [`boot`] runs a fixed list of phases, [`event_loop`] then keeps the fixed
//! table of [`services`] running by the pure rules of [`supervise`], and [`shutdown`] takes everything down again.
//! hostd talks to it over [`control`].
//!
//! Invariants: it never exits and never panics its way out (see `main`); nothing it does on its main thread may
//! take longer than it promised to [`watchdog`], whose thread reboots the machine when it does; it never waits for
//! a console, a service or a peer.

pub mod boot;
pub mod cgroups;
pub mod clock;
pub mod command_line;
pub mod console;
pub mod control;
pub mod devices;
pub mod error;
pub mod event_loop;
pub mod hardening;
pub mod hotplug;
pub mod identity;
pub mod log;
pub mod modules;
pub mod mounts;
pub mod notify;
pub mod power_button;
pub mod process;
pub mod programs;
pub mod reap;
pub mod services;
pub mod shutdown;
pub mod supervise;
pub mod sys;
pub mod watchdog;
