//! The real agent, as a process, between a scripted control plane and a pretend container runtime: what it does when
//! either of them misbehaves, goes away and comes back.
//!
//! Tier 2: no network beyond loopback, no fixed waits, seconds each.

mod away;
mod callers;
mod crashing;
mod host;
mod idle;
mod joining;
mod private_images;
mod probing;
mod pulling;
mod runtime;
mod storage;
