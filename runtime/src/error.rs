//! Errors of the runtime: operation, object, remedy.
//!
//! The kind of each decides the gRPC status that `cri` answers with.

use crate::images::ImageError;
use std::path::{Path, PathBuf};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing of that name.
    #[error("{kind} {id} not found")]
    NotFound {
        /// Sandbox, container.
        kind: &'static str,
        /// The id that was given.
        id: String,
    },
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// Right, but not now.
    #[error("{0}")]
    State(String),
    /// There is one already.
    #[error("{0}")]
    Exists(String),
    /// Will not be done on this runtime, and why.
    #[error("{0}")]
    Refused(String),
    /// Took too long.
    #[error("{what} took longer than {seconds} s")]
    Deadline {
        /// Which operation.
        what: String,
        /// Its deadline.
        seconds: u64,
    },
    /// Images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The guest refused.
    #[error("guest of {sandbox}: {message}")]
    Guest {
        /// Which guest.
        sandbox: String,
        /// For translation to an exit code.
        kind: atoll_spec::guest::GuestErrorKind,
        /// Its words.
        message: String,
    },
    /// No connection to the guest or the VMM.
    #[error("lost the virtual machine of sandbox {sandbox}: {why}")]
    Lost {
        /// Which sandbox.
        sandbox: String,
        /// What happened.
        why: String,
    },
    /// The host kernel or file system refused.
    #[error("cannot {operation} {object}: {source}")]
    Io {
        /// Verb.
        operation: &'static str,
        /// Object.
        object: String,
        /// Reason.
        source: std::io::Error,
    },
    /// A step of a launch failed.
    #[error("cannot {operation} {object}: {why}")]
    Step {
        /// Verb.
        operation: &'static str,
        /// Object.
        object: String,
        /// Reason and remedy.
        why: String,
    },
    /// The daemon is on its way out.
    #[error("the runtime is stopping")]
    Stopping,
}

/// Result of the runtime.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Adapter for `map_err`.
    pub fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let object = PathBuf::from(path).display().to_string();
        move |source| Self::Io { operation, object, source }
    }

    /// The same for objects that are not files.
    pub fn os<E: Into<std::io::Error>>(operation: &'static str, object: &str) -> impl FnOnce(E) -> Self {
        let object = object.to_owned();
        move |source| Self::Io { operation, object, source: source.into() }
    }

    /// A container that does not exist.
    pub fn no_container(id: &str) -> Self {
        Self::NotFound { kind: "container", id: id.to_owned() }
    }

    /// A sandbox that does not exist.
    pub fn no_sandbox(id: &str) -> Self {
        Self::NotFound { kind: "sandbox", id: id.to_owned() }
    }
}

/// Bounds a wait: every one has a deadline.
pub async fn within<T>(
    deadline: std::time::Duration,
    what: impl FnOnce() -> String,
    work: impl Future<Output = T>,
) -> Result<T> {
    tokio::time::timeout(deadline, work)
        .await
        .map_err(|_| Error::Deadline { what: what(), seconds: deadline.as_secs() })
}
