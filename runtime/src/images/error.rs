//! Errors of image handling: operation, object, remedy.

use super::digest::Digest;
use std::path::{Path, PathBuf};

/// Why an image operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The text does not name an image.
    #[error("'{text}' is not an image reference: {why}")]
    Reference {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Not in the store.
    #[error("image '{0}' is not on this host: pull it first")]
    NotFound(String),
    /// The registry has no such image.
    #[error("{registry} has no {what}: check the name and the tag")]
    NotInRegistry {
        /// Which registry.
        registry: String,
        /// Manifest or blob.
        what: String,
    },
    /// The registry refused the credentials, or wants some.
    #[error("{registry} refused access to {what} ({status}): give a pull secret that may read it")]
    Denied {
        /// Which registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// HTTP status.
        status: u16,
    },
    /// No usable answer from the registry.
    #[error("cannot read {what} from {registry}: {why}")]
    Registry {
        /// Which registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// What happened.
        why: String,
    },
    /// Its certificate does not verify.
    #[error("cannot trust {registry}: {why}; if it is yours, give its CA certificate in the machine config")]
    Untrusted {
        /// Which registry.
        registry: String,
        /// What TLS says.
        why: String,
    },
    /// The content is not what its digest says.
    #[error(
        "{what} does not match its digest: expected {expected}, got {actual}; the registry or the path to it alters data"
    )]
    DigestMismatch {
        /// What was read.
        what: String,
        /// The digest asked for.
        expected: Digest,
        /// What it hashed to.
        actual: Digest,
    },
    /// Something larger than allowed, or than announced.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// What.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// A manifest, index or config that is not understood.
    #[error("{what} is not usable: {why}")]
    Malformed {
        /// Which document.
        what: String,
        /// Why.
        why: String,
    },
    /// The index has nothing for this machine.
    #[error("{image} has no variant for linux/amd64 (it has {available}): build or choose one that has")]
    NoPlatform {
        /// The image.
        image: String,
        /// What the index lists.
        available: String,
    },
    /// A layer was refused or could not be turned into a file system.
    #[error("cannot unpack layer {layer}: {why}")]
    Unpack {
        /// The layer's diff_id.
        layer: Digest,
        /// The helper's last words.
        why: String,
    },
    /// Setting up TLS or reading the registries file.
    #[error("registry settings for {registry}: {why}")]
    Settings {
        /// Which registry.
        registry: String,
        /// What is wrong.
        why: String,
    },
    /// Took too long.
    #[error("{what} took longer than {seconds} s")]
    Deadline {
        /// Which operation.
        what: String,
        /// Its deadline.
        seconds: u64,
    },
    /// The file system of the store has no room.
    #[error(
        "no room for {what}: {available} bytes are free in {path}, which keeps {reserve} free for the host; remove images or pods that are not needed, or give the host a larger disk",
        path = path.display()
    )]
    Full {
        /// What was to be stored.
        what: String,
        /// The store.
        path: PathBuf,
        /// Bytes that are free.
        available: u64,
        /// Bytes of them that images never take.
        reserve: u64,
    },
    /// The host's file system.
    #[error("cannot {operation} {path}: {source}", path = path.display())]
    Io {
        /// Verb.
        operation: &'static str,
        /// Object.
        path: PathBuf,
        /// Reason.
        source: std::io::Error,
    },
}

impl ImageError {
    /// Adapter for `map_err`.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }

    /// Whether asking again later may help (network trouble, a busy registry).
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Registry { .. } | Self::Deadline { .. })
    }
}
