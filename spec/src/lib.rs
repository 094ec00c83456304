//! Types that two Atoll processes exchange.
//!
//! A type lives here when, and only when, it crosses a process border: machine config (file → hostd,
//! atollctl), host facts (hostd → agent, runtime), control messages (init ↔ hostd), and the messages between
//! runtime, VMM and guest. Invariant: no I/O, no async, no kernel types; every module is pure.

pub mod control;
pub mod disk;
pub mod guest;
pub mod ids;
pub mod images;
pub mod machine;
pub mod node;
pub mod places;
pub mod units;
pub mod vm;
