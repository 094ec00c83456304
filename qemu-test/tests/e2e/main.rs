//! End-to-end tests: real firmware, real control plane, real registry, real KVM in the booted host.
//!
//! Run by `./just e2e`, inside a network and process namespace of their own. One host of the test image is shared
//! by all tests that do not harm it ([`shared`]); the others boot their own.

mod boot;
mod containers;
mod control_plane;
mod cri;
mod host_config;
mod host_disks;
mod host_network;
mod images;
mod join;
mod node;
mod own;
mod pods;
mod power;
mod processes;
mod refusals;
mod scale;
mod shared;
mod streams;
mod turns;
mod workloads;
