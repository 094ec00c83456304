//! Harness that boots Atoll in QEMU beside a real Supervisor and a real registry.
//!
//! `lab` (the demo, `up`, `down`) and the end-to-end tests are built from the same parts: [`artifacts`] builds what
//! is needed, [`namespaces`] gives the lab a network and process tree of its own, [`lab`] puts the machines
//! together. Invariant: nothing here touches the network of the machine it runs on, and every process it starts
//! dies with it.

pub mod artifacts;
pub mod disk;
pub mod faults;
pub mod inspect;
pub mod lab;
pub mod machine;
pub mod namespaces;
pub mod network;
pub mod oci;
pub mod process;
pub mod progress;
pub mod qmp;
pub mod registry;
pub mod serial;
pub mod supervisor;
pub mod test_programs;
pub mod time_server;
