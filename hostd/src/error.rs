//! What can go wrong in hostd: every message names the operation, the object and, where there is one, the remedy.

use std::io;

/// An operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel or a file said no.
    #[error("cannot {operation} {object}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// Why not.
        source: io::Error,
    },
    /// Netlink said no.
    #[error("cannot {operation} {object}")]
    Netlink {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// Why not.
        source: Box<rtnetlink::Error>,
    },
    /// A program failed, or took too long.
    #[error("{program} {object}: {outcome}")]
    Program {
        /// Its name.
        program: String,
        /// What it worked on.
        object: String,
        /// How it ended, and its last words.
        outcome: String,
    },
    /// The partition table cannot be worked with.
    #[error("partition table of {device}")]
    PartitionTable {
        /// The disk.
        device: String,
        /// What is wrong with it.
        source: crate::gpt::GptError,
    },
    /// Something on the host is not as it has to be; the text names it and says what to do.
    #[error("{0}")]
    Host(String),
    /// A config could not be fetched.
    #[error("cannot fetch {url}: {reason}")]
    Fetch {
        /// From where.
        url: String,
        /// Why not.
        reason: String,
    },
    /// Something did not happen in time.
    #[error("{what} took longer than {seconds} s")]
    Deadline {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
    },
}

/// Result of an operation of hostd.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Adds the operation and the object to an error of the kernel.
pub(crate) trait Context<T> {
    /// Names what was tried, and on what.
    fn context(self, operation: &'static str, object: impl std::fmt::Display) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, operation: &'static str, object: impl std::fmt::Display) -> Result<T> {
        self.map_err(|source| Error::Io { operation, object: object.to_string(), source })
    }
}

impl<T> Context<T> for Result<T, rustix::io::Errno> {
    fn context(self, operation: &'static str, object: impl std::fmt::Display) -> Result<T> {
        self.map_err(io::Error::from).context(operation, object)
    }
}

impl<T> Context<T> for Result<T, rtnetlink::Error> {
    fn context(self, operation: &'static str, object: impl std::fmt::Display) -> Result<T> {
        self.map_err(|source| Error::Netlink {
            operation,
            object: object.to_string(),
            source: Box::new(source),
        })
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
