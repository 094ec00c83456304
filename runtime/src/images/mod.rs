//! Container images: pulled from a registry, kept as one read-only erofs file per layer.
//!
//! ```text
//! reference ─► registry client ─► verified blobs ─► unpack helper (sandboxed) ─► layers/<diff_id>.erofs
//!                                                                              └► images/<id>.json (index)
//! ```
//!
//! Called by the runtime service. Invariants: nothing from a registry is used before its digest has been
//! checked; archives are parsed only inside the helper process; an image is listed only when all its layers are
//! on disk and synced, so a crash at any point leaves either the whole image or garbage that the next
//! [`ImageStore::open`] removes.

mod digest;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod index;
mod jail;
mod manifest;
mod pull;
mod reference;
mod registry;
mod room;
mod scratch;
mod slots;
mod store;
mod tarscan;
mod unpack;
pub mod unpacker;

pub use digest::Digest;
pub use error::ImageError;
pub use reference::ImageRef;
pub use store::ImageStore;

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Id of an image: the digest of its config.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageId(pub Digest);

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Credentials of one pull, from the CRI request; they win over the registries file.
#[derive(Clone, PartialEq, Eq)]
pub enum Auth {
    /// User name and password, for basic authentication or to get a bearer token with.
    Basic {
        /// User name.
        username: String,
        /// Password.
        password: String,
    },
    /// An OAuth2 refresh token, exchanged for a bearer token (`identity_token`).
    Identity(String),
    /// A bearer token for the registry itself (`registry_token`).
    Bearer(String),
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Auth::Basic",
            Self::Identity(_) => "Auth::Identity",
            Self::Bearer(_) => "Auth::Bearer",
        })
    }
}

/// How to open the store.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Its directory (`/data/images`), made when missing; the store owns all of it.
    pub root: PathBuf,
    /// `spec::node::RegistriesConfig` as JSON, read at every pull; a missing file is an empty one.
    pub registries: PathBuf,
    /// The program that turns a tar into erofs.
    pub mkfs_erofs: PathBuf,
    /// The program to run as `<helper> unpack-layer` (this very binary: `/proc/self/exe`).
    pub helper: PathBuf,
    /// Certificates to trust where a registry names none.
    pub system_ca: PathBuf,
    /// User and group of the helper; `None` keeps ours (tests without root).
    pub helper_uid: Option<u32>,
    /// Where else than in the usual places that program has its parts.
    pub helper_paths: Vec<PathBuf>,
    /// Longest time for one pull.
    pub pull_deadline: Duration,
    /// Longest waits for a registry.
    pub patience: Patience,
    /// Bytes of the file system that images leave free.
    pub reserve: u64,
}

/// How long a registry may say nothing before the connection counts as broken.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Before the head of an answer.
    pub head: Duration,
    /// Within a body.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { head: Duration::from_secs(60), silence: Duration::from_secs(30) }
    }
}

impl StoreOptions {
    /// The defaults of a host, with the store in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            registries: "/run/atoll/runtime/registries.json".into(),
            mkfs_erofs: "/usr/bin/mkfs.erofs".into(),
            helper: "/proc/self/exe".into(),
            system_ca: "/etc/ssl/certs/ca-certificates.crt".into(),
            helper_uid: Some(65534),
            helper_paths: Vec::new(),
            pull_deadline: Duration::from_secs(30 * 60),
            patience: Patience::default(),
            reserve: 256 << 20,
        }
    }
}

/// One layer, ready for the layer window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFile {
    /// The erofs file.
    pub path: PathBuf,
    /// Digest of the layer's tar; names the layer.
    pub diff_id: Digest,
    /// Length of the file in bytes, a multiple of 4096.
    pub length: u64,
}

/// What the image says about running it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `user`, `uid`, `user:group` or empty.
    #[serde(default)]
    pub user: String,
    /// `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// First part of the command.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// Second part, replaced by arguments.
    #[serde(default)]
    pub cmd: Vec<String>,
    /// Empty means `/`.
    #[serde(default)]
    pub working_dir: String,
    /// Name or number; empty means SIGTERM.
    #[serde(default)]
    pub stop_signal: String,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Paths that want a volume of their own.
    #[serde(default)]
    pub volumes: BTreeSet<String>,
}

/// One image of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// `host/path:tag`, without `@digest`.
    pub repo_tags: Vec<String>,
    /// `host/path@sha256:…`.
    pub repo_digests: Vec<String>,
    /// Bytes of its layers on disk (layers shared with other images count in each).
    pub size: u64,
    /// How to run it.
    pub config: ImageConfig,
}

/// What the store takes of its file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsUsage {
    /// The store's directory.
    pub mount_point: PathBuf,
    /// Bytes in the store.
    pub used_bytes: u64,
    /// Files in the store.
    pub used_inodes: u64,
    /// Bytes of the whole file system.
    pub capacity_bytes: u64,
    /// Bytes free for us.
    pub available_bytes: u64,
}
