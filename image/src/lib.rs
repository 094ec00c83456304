//! Builds every Atoll boot artefact: profile → plan → artefacts.
//!
//! Called by `just` and by people who want an image with their own key. Invariants: the same inputs give the same
//! bytes; nothing is used whose hash is not pinned; nothing is installed on the build machine; everything that is
//! costly is kept in [`cache`] by the hash of what it was made from.

pub mod apt_sources;
pub mod cache;
pub mod configure;
pub mod cpio;
pub mod debian;
pub mod error;
pub mod esp;
pub mod gpt;
pub mod guest_kernel;
pub mod kernel;
pub mod layout;
pub mod libraries;
pub mod lock;
pub mod modules;
pub mod plan;
pub mod profile;
pub mod program;
pub mod sbom;
pub mod secure_boot;
pub mod sign;
pub mod system;
pub mod tree;
pub mod uki;
pub mod write;
