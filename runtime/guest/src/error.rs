//! The error of this crate: what kind, for the runtime to act on, and one line that names operation and object.

use atoll_spec::guest::{GuestError, GuestErrorKind};
use std::fmt::Display;

/// Why something in the guest failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For the runtime to act on.
    pub kind: GuestErrorKind,
    /// One line.
    pub message: String,
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure of the given kind.
    pub fn new(kind: GuestErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A bad argument.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(GuestErrorKind::Invalid, message)
    }

    /// The state does not allow it.
    pub fn wrong_state(message: impl Into<String>) -> Self {
        Self::new(GuestErrorKind::WrongState, message)
    }

    /// Nothing of that name.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(GuestErrorKind::NotFound, message)
    }

    /// The kernel, or something below us, refused.
    pub fn system(message: impl Into<String>) -> Self {
        Self::new(GuestErrorKind::System, message)
    }
}

impl From<Failure> for GuestError {
    fn from(failure: Failure) -> Self {
        GuestError { kind: failure.kind, message: failure.message }
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::system(errno.to_string())
    }
}

/// Says what was being done when something below failed.
pub trait Context<T> {
    /// `what` completes the sentence "cannot …".
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::system(format!("cannot {}: {error}", what())))
    }
}
