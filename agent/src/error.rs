//! Everything that can go wrong in the agent outside pods, each with operation, object and remedy.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. The cause, where there is one, is the error's source; print the chain with [`chain`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// What the file is.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {what} {}: is the state partition mounted and not full?", path.display())]
    Write {
        /// What the file is.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// hostd's file is not one.
    #[error("{} is not what this version of hostd writes: update the host as a whole", path.display())]
    Config {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Joining failed.
    #[error(transparent)]
    Join(#[from] crate::join::JoinError),
    /// A certificate or key cannot be used.
    #[error("{what} cannot be used: {reason}")]
    Certificate {
        /// Which certificate or key.
        what: String,
        /// Why.
        reason: String,
    },
    /// A call to the API server failed.
    #[error("{operation}")]
    Api {
        /// What was tried, on what.
        operation: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// The kubelet API cannot listen.
    #[error("cannot listen on {address}: is another node agent running?")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The container runtime did not answer.
    #[error("container runtime: {operation}")]
    Runtime {
        /// What was tried.
        operation: String,
        /// Why.
        #[source]
        source: Box<tonic::Status>,
    },
    /// Something took longer than it may.
    #[error("{what} took more than {seconds} s")]
    Deadline {
        /// What.
        what: String,
        /// How long it may take.
        seconds: u64,
    },
}

impl Error {
    /// An API call's failure.
    pub fn api(operation: impl Into<String>, source: kube::Error) -> Self {
        Self::Api { operation: operation.into(), source: Box::new(source) }
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
